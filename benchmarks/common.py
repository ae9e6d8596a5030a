"""What the benchmarks share: the command line, data, small models, what tamis thought of rows, and `results.json`."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from tamis.compare.task import Task, learned_weights, run_dir
from tamis.demo.base_model import PlainTrainer
from tamis.files import write_atomically
from tamis.hashes import content_hashes, hex_digits
from tamis.output_dir import read_metrics

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def make_parser(
    docstring: str,
    *,
    quick: str = "20 steps of everything: shows that it runs",
    seeds: Sequence[int] = (0, 1, 2),
    scenarios: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """What the benchmarks' command lines share.

    Args:
        docstring: of the benchmark; its first line is the description.
        quick: what ``--quick`` does.
        seeds, scenarios: defaults of the options of these names; where empty there is no such option.
    """
    parser = argparse.ArgumentParser(description=docstring.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    if scenarios:
        parser.add_argument("--scenarios", nargs="+", default=scenarios, choices=scenarios)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def skip_without_data(folder: str) -> None:
    """Leave, with a message, where the benchmark's data are not on this machine."""
    if not (DATA / folder).is_dir():
        print(f"skipped: the data of this benchmark are not here ({DATA / folder})", file=sys.stderr)
        sys.exit(0)


def as_pair(prompt: str, completion: str) -> dict[str, str]:
    """A row whose prompt ends with a line break: the small model has no chat template to end it."""
    return {"prompt": prompt if prompt.endswith("\n") else f"{prompt}\n", "completion": completion}


def write_files(parts: dict[str, list[dict]], output_dir: Path) -> dict[str, Path]:
    """One JSON file for each part (train, validation, eval)."""
    files = {name: output_dir / f"{name}.json" for name in parts}
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        files[name].write_text(json.dumps(rows), encoding="utf-8")
    return files


def make_small_model(texts: list[str], model_dir: Path, num_steps: int, seed: int) -> None:
    """A byte-level BPE of 4,096 tokens and a Llama of 2.2M parameters, pretrained for a moment on ``texts``."""
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


def random_model(folder: Path, symbols: Sequence[str], split: PreTokenizer, **sizes: int) -> LlamaForCausalLM:
    """A Llama of random parameters with a token for each symbol, saved beside its tokenizer.

    Args:
        symbols: after padding and the end of a text.
        split: text to symbols.
        sizes: of the model, see [`~transformers.LlamaConfig`].
    """
    ids = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *symbols])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = split
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(vocab_size=len(ids), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def train_command(files: dict[str, Path], model_dir: Path, output_dir: Path, *options: str) -> list[str]:
    """`tamis train` as a user types it, in float32 on the CPU, for files as `write_files` names them."""
    return [
        *(str(Path(sys.executable).parent / "tamis"), "train", "--model_name_or_path", str(model_dir)),
        *("--train_dataset", str(files["train"]), "--validation_dataset", str(files["validation"])),
        *("--eval_dataset", str(files["eval"]), "--output_dir", str(output_dir), "--use_cpu", "--bf16", "false"),
        *options,
    ]


def last_evaluation(run_dir: Path) -> dict[str, float]:
    """The metrics of a run's last evaluation on held-out rows."""
    return next(record for record in reversed(read_metrics(run_dir)) if "eval_loss" in record)


def tamis_train(
    files: dict[str, Path], model_dir: Path, output_dir: Path, max_steps: int, *extra: str
) -> dict[str, float]:
    """Run the command as a user would; the metrics of its last evaluation."""
    options = ["--max_steps", str(max_steps), "--learning_rate", "1e-3", "--per_device_train_batch_size", "8"]
    options += ["--max_length", "192", "--activation_checkpointing", "false", "--report_to", "none", *extra]
    subprocess.run(train_command(files, model_dir, output_dir, *options), check=True)
    return last_evaluation(output_dir)


def fitted_with_labels(scores: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """Probabilities by a logistic regression of the truth on the scores: Newton's method, a touch of ridge."""
    features = np.stack([np.ones_like(scores), scores / max(scores.std(), 1e-9)], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(features @ weights).clip(-30, 30)))
        hessian = (features * (p * (1 - p))[:, None]).T @ features + 1e-3 * np.eye(2)
        weights -= np.linalg.solve(hessian, features.T @ (p - is_right) + 1e-3 * weights)
    return 1 / (1 + np.exp(-(features @ weights).clip(-30, 30)))


def estimates(folder: Path, task: Task) -> dict[str, float | None]:
    """What tamis thought of the rows, and the truth; None for shares of no rows."""
    weights, is_right = learned_weights(folder, "tamis", task)
    found = json.loads((run_dir(folder, "tamis") / "scout.json").read_text(encoding="utf-8"))
    table = pq.read_table(run_dir(folder, "tamis") / "weights.parquet", columns=["score", "kept"])
    scores, kept = table["score"].to_numpy().astype(float), table["kept"].to_numpy()
    by_labels = fitted_with_labels(scores, is_right)
    is_believed = found["is_believed"]
    return {
        "share_right": float(is_right.mean()),
        "estimated_share_right": found["share_right"],
        "expected_auroc": found["expected_auroc"] if is_believed else None,
        "is_believed": is_believed,
        "share_kept": float(kept.mean()),
        "wrong_among_kept": float((~is_right[kept]).mean()) if kept.any() else None,
        "weight_on_wrong": float(weights[~is_right].sum() / weights.sum()),
        "weight_on_wrong_by_labels": float(by_labels[~is_right].sum() / by_labels.sum()),
    }


def peak_gb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def each_in_its_process(
    make_files: Callable[[int, Path], dict[str, Path]],
    measure: Callable[[Path, Path], dict[str, Any]],
    num_rows: int,
    title: str,
) -> list[dict[str, Any]]:
    """Measure every file, beside `trusted.jsonl`, in a new process: it would inherit the peak memory of this one.

    Args:
        make_files: writes files of so many rows to a folder, and returns them by name.
        title: of the column with these names.
    """  # fmt: skip
    rows = []
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1) as executor,
    ):
        folder = Path(name)
        for kind, file in executor.submit(make_files, num_rows, folder).result().items():
            found = executor.submit(measure, file, folder / "trusted.jsonl").result()
            rows.append({title: kind, "num_rows": num_rows, **found})
    return rows


def weighed(
    rows: Sequence[dict[str, Any]], source: str, first: int, p_right: np.ndarray, score: np.ndarray
) -> pa.Table:
    """Rows as `weights.parquet` of a run has them; the weights have not the mean of one.

    Args:
        first: the place of the first of them in the file ``source``.
    """
    places = np.arange(first, first + len(rows))
    columns = {"example_id": places, "source": [source] * len(rows), "row": places}
    columns |= {"content_hash": hex_digits(content_hashes(rows)), "weight": p_right**2, "p_right": p_right}
    return pa.table(columns | {"score": score, "kept": p_right >= 0.5})


def finish(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], aggregates: dict[str, list[float | None]]
) -> None:
    """Print the rows as a table and write ``results.json``.

    Args:
        rows: one per method and seed.
        aggregates: name -> one value per seed.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    summary = {}
    for name, found in aggregates.items():
        values = [value for value in found if value is not None]
        if not values:
            continue
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        summary[name] = {"mean": float(np.mean(values)), "std": std, "num_seeds": len(values)}
        print(f"{name} {summary[name]['mean']:.3f} +- {std:.3f} ({len(values)} seeds)")
    results = {
        # not where it ran: that is a folder of somebody's machine
        "settings": {name: value for name, value in vars(arguments).items() if name != "output_dir"},
        "machine": {"processor": platform.processor() or platform.machine(), "num_cpus": os.cpu_count()},
        "versions": {name: version(name) for name in ("tamis", "torch", "transformers", "trl")},
        "rows": rows,
        "aggregates": summary,
    }
    text = json.dumps(results, indent=1)
    write_atomically(arguments.output_dir / "results.json", lambda path: path.write_text(text))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
