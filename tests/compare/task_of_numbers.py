"""A small task on files, which the tests of the comparison share."""

from pathlib import Path

from conftest import PLAIN, pairs, two_kinds, write_jsonl

from tamis.compare.task import Task

COMMON = PLAIN | {"max_steps": 7, "per_device_train_batch_size": 4}


def make_task(folder: Path, model_dir: str) -> Task:
    """Twelve rows, every other one right by its label, with answers of one kind."""
    rows = [row | {"is_right": i % 2 == 0} for i, row in enumerate(pairs(12))]
    return _written(folder, model_dir, rows, pairs(4, start=40), pairs(4, start=60))


def make_task_of_two_kinds(folder: Path, model_dir: str) -> Task:
    """Right and wrong rows in turn, which differ in the letter of their answers; right ones are trusted."""
    right, wrong, trusted = two_kinds(num_rows=12)
    rows = [row | {"is_right": kind == 0} for pair in zip(right, wrong, strict=True) for kind, row in enumerate(pair)]
    return _written(folder, model_dir, rows, trusted[:6], trusted[6:])


def _written(folder: Path, model_dir: str, train: list[dict], validation: list[dict], evaluation: list[dict]) -> Task:
    folder.mkdir(exist_ok=True)
    clean = [row for row in train if row["is_right"]]
    for name, rows in {"train": train, "clean": clean, "validation": validation, "eval": evaluation}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "model").symlink_to(model_dir)
    return Task.in_folder(folder, "a small task")
