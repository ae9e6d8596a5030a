"""German inflection (SIGMORPHON 2017, task 1) with wrong forms in half of the rows.

    python benchmarks/sigmorphon.py --output_dir runs/sigmorphon [--seeds 0 1 2] [--quick]

A small character-level Llama is pretrained on English, Spanish, Turkish and German rows, half of which are wrong (so it
does not know what is right), then post-trained on 4,000 other German rows, half of them wrong, beside 200 trusted
ones, and tested on `german-dev` by exact match (greedy). Wrong = another form of the same lemma, where one is known
and a coin says so, or the form with another word's ending. All methods take the same number of training steps;
tamis's scouting comes on top and is part of its seconds.
"""

import json
import random
from collections import defaultdict
from itertools import chain
from pathlib import Path

from common import DATA, estimates, finish, make_parser, skip_without_data

from tamis.compare.methods import compare_methods
from tamis.compare.seal import SEAL
from tamis.compare.table import TRUSTED_ALONE, best_variants, format_table
from tamis.compare.task import Task
from tamis.demo.base_model import build_model, build_tokenizer, pretrain

LANGUAGES = ("english", "spanish", "turkish", "german")
NUM_VALIDATION, NUM_TRAIN = 200, 4000
RHOS = (0.1, 0.3, 0.8)
PRETRAIN_STEPS = 2500
SETTINGS = {
    "max_steps": 1500, "learning_rate": 2e-3, "warmup_steps": 20, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 250, "logging_steps": 100, "save_strategy": "no", "max_length": 128,
    "report_to": "none", "bf16": False, "activation_checkpointing": False, "use_cpu": True,
}  # fmt: skip
# Of the figures over seeds, by group of methods.
PREFIXES = {"tamis": "", SEAL: "seal_", "SEAL, top 80%": "seal_top80_", TRUSTED_ALONE: "trusted_alone_"}
NEVER = "-"  # no tags begin like this
Row = tuple[str, str, str]  # lemma, form, tags


def read(name: str) -> list[Row]:
    """Rows of one file of the task."""
    lines = (DATA / "sigmorphon2017" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return [(lemma, form, tags) for lemma, form, tags in (line.split("\t") for line in lines)]


def ending(lemma: str, form: str) -> tuple[int, str]:
    """Length of what form and lemma begin with alike, and what the form has after it."""
    length = 0
    while length < min(len(lemma), len(form)) and lemma[length] == form[length]:
        length += 1
    return length, form[length:]


def wrong_form(row: Row, forms: dict[str, list[str]], endings: list[str], rng: random.Random) -> str:
    """Another form of the same lemma, or the form with the ending of another word's."""
    lemma, form, _ = row
    others = [other for other in forms[lemma] if other != form]
    if others and rng.random() < 0.5:
        return rng.choice(others)
    stem = form[: ending(lemma, form)[0]]
    while (candidate := stem + rng.choice(endings)) in (form, ""):
        pass
    return candidate


def spoil(rows: list[Row], pool: list[Row], rng: random.Random, always: str = NEVER) -> list[tuple[Row, bool]]:
    """Half of the rows, and all whose tags begin with ``always``, with a wrong form; and whether each is right."""
    forms = defaultdict(list)
    for lemma, form, _ in pool:
        forms[lemma].append(form)
    endings = [ending(lemma, form)[1] for lemma, form, _ in pool]
    spoiled = []
    for row in rows:
        is_right = rng.random() < 0.5 and not row[2].startswith(always)
        form = row[1] if is_right else wrong_form(row, forms, endings, rng)
        spoiled.append(((row[0], form, row[2]), is_right))
    return spoiled


def as_pair(row: Row, language: str) -> dict[str, str]:
    """Question and answer; tags and language are symbols of their own."""
    lemma, form, tags = row
    return {"prompt": f"<{language}>{lemma}" + "".join(f"<{tag}>" for tag in tags.split(";")) + "=", "completion": form}


def make_task(
    folder: Path, seed: int, pretrain_steps: int, always_wrong: str | None = None, hidden_size: int = 96
) -> Task:
    """Files and base model of one seed; made once.

    Args:
        hidden_size: of the base model; 96 makes 0.37M parameters.
        always_wrong: a part of speech whose training forms are all wrong (the base model has seen right and wrong
            ones). The clean file then has the right form to every question.
    """
    fingerprint = f"sigmorphon {seed} {pretrain_steps}" + (f" {always_wrong}" if always_wrong else "")
    task = Task.in_folder(folder, fingerprint + (f" width {hidden_size}" if hidden_size != 96 else ""))
    manifest = folder / "task.txt"
    if manifest.is_file():
        if manifest.read_text(encoding="utf-8") != task.fingerprint:
            raise ValueError(f"{folder} holds another task: choose another --output_dir")
        return task

    def family(row: Row) -> str:
        return "bad" if row[2].startswith(always_wrong or NEVER) else "good"

    rng = random.Random(seed)
    high = {language: read(f"{language}-train-high") for language in LANGUAGES}
    german = rng.sample(high["german"], len(high["german"]))
    validation, train = german[:NUM_VALIDATION], german[NUM_VALIDATION : NUM_VALIDATION + NUM_TRAIN]
    spoiled = spoil(train, high["german"], rng, always_wrong or NEVER)
    high["german"] = german[NUM_VALIDATION + NUM_TRAIN :]
    pretraining = [
        as_pair(row, language) for language, rows in high.items() for row, _ in spoil(rows, high[language], rng)
    ]
    files = {
        task.train_file: [
            as_pair(row, "german") | {"is_right": is_right, "right_answer": right[1], "family": family(right)}
            for (row, is_right), right in zip(spoiled, train, strict=True)
        ],
        task.clean_file: [
            as_pair(right, "german")
            for (_, is_right), right in zip(spoiled, train, strict=True)
            if is_right or always_wrong
        ],
        task.validation_file: [as_pair(row, "german") for row in validation],
        task.eval_file: [as_pair(row, "german") for row in read("german-dev")],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in files.items():
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    everything = [pair["prompt"] + pair["completion"] for pair in chain(pretraining, *files.values())]
    tokenizer = build_tokenizer(everything)
    model = build_model(tokenizer, hidden_size=hidden_size, num_layers=3, seed=seed)
    pretrain(
        model, tokenizer, pretraining, task.model_dir, num_steps=pretrain_steps, batch_size=64, learning_rate=2e-3,
        seed=seed,
    )  # fmt: skip
    manifest.write_text(task.fingerprint, encoding="utf-8")
    return task


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    skip_without_data("sigmorphon2017")
    pretrain_steps = 20 if arguments.quick else PRETRAIN_STEPS

    all_rows, shown = [], []
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed{seed}"
        task = make_task(folder / "task", seed, pretrain_steps)
        common = SETTINGS | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
        rows = compare_methods(task, folder, common, RHOS)
        (tamis,) = [row for row in rows if row["method"] == "tamis"]
        tamis |= estimates(folder, task)
        print(f"seed {seed}\n{format_table(rows)}", flush=True)
        all_rows += [row | {"seed": seed} for row in rows]
        shown += best_variants(rows)

    aggregates = {}
    for group, prefix in PREFIXES.items():
        rows = [row for row in shown if row["group"] == group]
        for figure in ("gap_closure", "gap_closure_loss"):
            aggregates[prefix + figure] = [row[figure] for row in rows]
        if rows[0]["selection_auroc"] is not None:
            aggregates[prefix + "auroc"] = [row["selection_auroc"] for row in rows]
    finish(arguments, all_rows, aggregates)


if __name__ == "__main__":
    main()
