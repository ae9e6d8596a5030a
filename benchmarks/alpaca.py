"""`tamis train` on real Alpaca rows, end to end by the command line, with a small model made on the spot.

    python benchmarks/alpaca.py --output_dir runs/alpaca [--quick]

Lower level: the raw rows of AlpaGasus' `random_9k.json`; upper level and held-out rows: parts of `claude_t45.json`
(rated 4.5 or more of 5 by a strong model). No row is in two of them. Nobody planted wrong rows here; what is reported
is the held-out loss beside that of direct mixing, and how well the weights single out those training rows that are
rated 4.5 or more too (`auroc_rated`), beside what the mere length of the answer tells of it.
"""

import json
import random

import numpy as np
import pyarrow.parquet as pq
from common import DATA, as_pair, finish, make_parser, make_small_model, skip_without_data, tamis_train, write_files

from tamis.metrics import auroc

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


def main() -> None:
    parser = make_parser(__doc__, seeds=())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    skip_without_data("alpaca")
    pretrain_steps, max_steps = (20, 20) if arguments.quick else (200, 200)

    rows = split_rows(arguments.seed)
    pairs = {
        part: [
            as_pair("\n\n".join(filter(str.strip, (row["instruction"], row["input"]))), row["output"]) for row in found
        ]
        for part, found in rows.items()
    }
    files = write_files(pairs, arguments.output_dir)
    texts = ["\n".join(filter(None, (row["instruction"], row["input"], row["output"]))) for row in rows["train"]]
    make_small_model(texts, arguments.output_dir / "model", pretrain_steps, arguments.seed)

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
