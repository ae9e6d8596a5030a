"""`tamis train` on real Alpaca rows, end to end by the command line, with a small model made on the spot.

    python benchmarks/alpaca.py --output_dir runs/alpaca [--quick]

Lower level: the raw rows of AlpaGasus' `random_9k.json`; upper level and held-out rows: parts of `claude_t45.json`
(rated 4.5 or more of 5 by a strong model). No row is in two of them. Nobody planted wrong rows here; what is reported
is the held-out loss beside that of direct mixing, and how well the weights single out those training rows that are
rated 4.5 or more too (`auroc_rated`), beside what the mere length of the answer tells of it.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import DATA, finish, skip_without_data
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from tamis.metrics import auroc
from tamis.scout import PlainTrainer

NUM_VALIDATION, NUM_EVAL = 300, 500


def split_rows(seed: int) -> dict[str, list[dict]]:
    """Train, validation and eval rows; a question of the trusted file never stays in the training file."""
    raw = json.loads((DATA / "alpaca/random_9k.json").read_text(encoding="utf-8"))
    good = json.loads((DATA / "alpaca/claude_t45.json").read_text(encoding="utf-8"))
    good = [row for row in good if row["output"].strip()]
    random.Random(seed).shuffle(good)
    trusted = good[: NUM_VALIDATION + NUM_EVAL]
    used = {(row["instruction"], row["input"]) for row in trusted}
    train = [row for row in raw if row["output"].strip() and (row["instruction"], row["input"]) not in used]
    # Of two rows with the same question in the trusted part only one may stay, or it would be in two of the sets.
    unique = list({(row["instruction"], row["input"]): row for row in trusted}.values())
    return {"train": train, "validation": unique[:NUM_VALIDATION], "eval": unique[NUM_VALIDATION:]}


def make_model(rows: list[dict], model_dir: Path, num_steps: int, seed: int) -> None:
    """A byte-level BPE of 4,096 tokens and a Llama of 2.2M parameters, pretrained for a moment on the raw rows."""
    texts = ["\n".join(filter(None, (row["instruction"], row["input"], row["output"]))) for row in rows]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=160, intermediate_size=480, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    args = SFTConfig(
        str(model_dir), max_steps=num_steps, per_device_train_batch_size=16, learning_rate=2e-3, max_length=192,
        report_to="none", save_strategy="no", logging_strategy="no", bf16=False, use_cpu=True,
        activation_checkpointing=False, gradient_checkpointing=None, seed=seed,
    )  # fmt: skip
    model, dataset = LlamaForCausalLM(config), Dataset.from_dict({"text": texts})
    trainer = PlainTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train_with_bar("pretraining the base model")
    trainer.save_model()


def tamis_train(
    files: dict[str, Path], model_dir: Path, output_dir: Path, max_steps: int, *extra: str
) -> dict[str, float]:
    """Run the command as a user would and read its results from stdout."""
    command = [
        *(str(Path(sys.executable).parent / "tamis"), "train", "--model_name_or_path", str(model_dir)),
        *("--train_dataset", str(files["train"]), "--validation_dataset", str(files["validation"])),
        *("--eval_dataset", str(files["eval"]), "--output_dir", str(output_dir), "--max_steps", str(max_steps)),
        *("--learning_rate", "1e-3", "--per_device_train_batch_size", "8", "--max_length", "192", "--use_cpu"),
        *("--bf16", "false", "--activation_checkpointing", "false", "--report_to", "none", *extra),
    ]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("eval_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 steps: shows that everything runs")
    arguments = parser.parse_args()
    skip_without_data("alpaca")
    pretrain_steps, max_steps = (20, 20) if arguments.quick else (200, 200)

    files = {}
    rows = split_rows(arguments.seed)
    for name, part in rows.items():
        files[name] = arguments.output_dir / f"{name}.json"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].write_text(json.dumps(part), encoding="utf-8")
    make_model(rows["train"], arguments.output_dir / "model", pretrain_steps, arguments.seed)

    results = []
    for method, extra in {"tamis": (), "mixing": ("--selector", "none")}.items():
        run_dir = arguments.output_dir / method
        metrics = tamis_train(files, arguments.output_dir / "model", run_dir, max_steps, *extra)
        results.append({"method": method, "seed": arguments.seed, "test_loss": metrics["eval_loss"]})
    good = json.loads((DATA / "alpaca/claude_t45.json").read_text(encoding="utf-8"))
    rated = {(row["instruction"], row["input"]) for row in good}
    is_rated = np.array([(row["instruction"], row["input"]) in rated for row in rows["train"]])
    lengths = np.array([len(row["output"]) for row in rows["train"]])
    table = pq.read_table(arguments.output_dir / "tamis" / "weights.parquet")
    weights, kept = table["weight"].to_numpy(), table["kept"].to_numpy()
    results[0] |= {
        "rows": len(weights),
        "rows_kept": int(kept.sum()),
        "auroc_rated": auroc(weights[kept], is_rated[kept]),
        "auroc_rated_by_length_alone": auroc(lengths[kept], is_rated[kept]),
        "ess_ratio": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
    }
    finish(arguments, results, aggregates={"auroc": [results[0]["auroc_rated"]]})


if __name__ == "__main__":
    main()
