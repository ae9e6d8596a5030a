"""SEAL as a rival: its share of the upper level, the rows it keeps, and that each of its stages is a run."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PLAIN, pairs, write_jsonl
from trl import ModelConfig

import tamis.compare.methods
from tamis import BilevelConfig
from tamis.compare import seal
from tamis.compare.methods import SEAL, run_seal
from tamis.compare.task import Task, run_dir
from tamis.run import DataArguments, train

COMMON = PLAIN | {"max_steps": 7, "per_device_train_batch_size": 4}


@pytest.fixture
def task(tmp_path, model_dir) -> Task:
    rows = [row | {"is_right": i % 2 == 0} for i, row in enumerate(pairs(12))]
    for name, part in {"train": rows, "validation": pairs(4, start=40), "eval": pairs(4, start=60)}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    (tmp_path / "model").symlink_to(model_dir)
    return Task.in_folder(tmp_path, "a small task")


def test_the_upper_level_is_all_in_the_first_epoch_and_less_in_each_other(task, tmp_path, monkeypatch):
    shares = []
    original = seal.SealTrainer.compute_loss

    def compute_loss(trainer, *args, **kwargs):
        shares.append(trainer.current_rho())
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(seal.SealTrainer, "compute_loss", compute_loss)
    args = BilevelConfig(str(tmp_path / "run"), **COMMON, **seal.ONE_STAGE)
    data = DataArguments(str(task.train_file), str(task.validation_file))
    train(data, args, ModelConfig(str(task.model_dir)), seal.SealTrainer)
    assert shares == pytest.approx([1.0] * 3 + [0.97] * 3 + [0.94], abs=1e-12)


def test_the_rows_with_the_highest_weights_are_kept_in_their_order(task, tmp_path):
    weights = [3.0, 1.0, 0.1, 5.0, 0.5, 0.4, 0.3, 0.2, 0.7, 0.6, 0.15, 0.05]
    run_dir(tmp_path, "x").mkdir(parents=True)
    pq.write_table(pa.table({"weight": weights}), run_dir(tmp_path, "x") / "weights.parquet")
    lines = task.train_file.read_text().splitlines()
    assert seal.keep_top(task, tmp_path, "x", 0.25).read_text().splitlines() == [lines[i] for i in (0, 1, 3)]
    assert len(seal.keep_top(task, tmp_path, "x", 0.8).read_text().splitlines()) == 9, "int(0.8 * 12), as published"


def test_seal_retrains_from_the_base_model_on_the_kept_rows(task, tmp_path, monkeypatch):
    calls = []

    def recorded(data, args, model_args, trainer_class):
        calls.append((data, args.selector, args.rho, model_args.model_name_or_path, trainer_class.__name__))
        return train(data, args, model_args, trainer_class)

    monkeypatch.setattr(tamis.compare.methods, "train", recorded)
    rows = run_seal(task, tmp_path, COMMON, shares=[0.8, 0.5])
    assert [row["group"] for row in rows] == [SEAL, *["SEAL, top 80%"] * 2, *["SEAL, top 50%"] * 2]
    assert [row["selection_auroc"] is not None for row in rows] == [True] + [False] * 4
    assert all(row["seconds"] > rows[0]["seconds"] for row in rows[1:]), "those of both stages"
    kept = [f"top{share}.jsonl" for share in (80, 80, 50, 50)]
    assert [call[0].train_dataset.rsplit("/")[-1] for call in calls] == ["train.jsonl", *kept]
    assert [call[0].validation_dataset is not None for call in calls] == [True, False, True, False, True]
    default = BilevelConfig("x").rho
    assert [call[1:3] for call in calls[1:]] == [("none", 0.0), ("none", default)] * 2
    assert {call[3] for call in calls} == {str(task.model_dir)}
    assert [call[4] for call in calls] == ["SealTrainer"] + ["BilevelTrainer"] * 4

    assert run_seal(task, tmp_path, COMMON, shares=[0.8]) == rows[:3] and len(calls) == 5, "nothing is run again"
    kept_file = run_dir(tmp_path, SEAL) / "top80.jsonl"
    monkeypatch.setattr(seal, "keep_top", lambda *_: kept_file)
    kept_file.write_text("".join(kept_file.read_text().splitlines(keepends=True)[1:]))
    run_seal(task, tmp_path, COMMON, shares=[0.8])
    assert len(calls) == 7, "other rows, another run"
