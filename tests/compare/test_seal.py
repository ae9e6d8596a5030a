"""SEAL as a rival: its share of the upper level, the rows it keeps, and that each of its stages is a run."""

import json

import pyarrow.parquet as pq
import pytest
from task_of_numbers import COMMON, make_task
from trl import ModelConfig

import tamis.compare.runs
from tamis import BilevelConfig
from tamis.compare import seal
from tamis.compare.runs import TAMIS_SHARE, keep_top, share_value
from tamis.compare.seal import SEAL, run_seal
from tamis.compare.task import Task, run_dir
from tamis.run import DataArguments, train


@pytest.fixture
def task(tmp_path, model_dir) -> Task:
    return make_task(tmp_path, model_dir)


@pytest.fixture
def calls(monkeypatch) -> list:
    """The arguments of every training run from now on."""
    found = []

    def recorded(data, args, model_args, trainer_class):
        found.append((data, args, model_args, trainer_class))
        return train(data, args, model_args, trainer_class)

    monkeypatch.setattr(tamis.compare.runs, "train", recorded)
    return found


def write_scout(tmp_path, **found) -> None:
    run_dir(tmp_path, "tamis").mkdir(parents=True)
    (run_dir(tmp_path, "tamis") / "scout.json").write_text(json.dumps(found))


def test_the_upper_level_is_all_in_the_first_epoch_and_less_in_each_other(task, tmp_path, monkeypatch):
    shares = []
    original = seal.SealTrainer.compute_loss

    def compute_loss(trainer, *args, **kwargs):
        shares.append(trainer.current_rho())
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(seal.SealTrainer, "compute_loss", compute_loss)
    args = BilevelConfig(str(tmp_path / "run"), **COMMON, **seal.ONE_STAGE)
    data = DataArguments([str(task.train_file)], str(task.validation_file))
    train(data, args, ModelConfig(str(task.model_dir)), seal.SealTrainer)
    assert shares == pytest.approx([1.0] * 3 + [0.97] * 3 + [0.94], abs=1e-12)


def test_the_rows_with_the_highest_scores_are_kept_in_their_order(task, tmp_path):
    scores = [3.0, 1.0, 0.1, 5.0, 0.5, 0.4, 0.3, 0.2, 0.7, 0.6, 0.15, float("-inf")]
    lines = task.train_file.read_text().splitlines()

    def kept(share):
        return keep_top(task, scores, share, tmp_path / "kept.jsonl").read_text().splitlines()

    assert kept(0.25) == [lines[i] for i in (0, 1, 3)]
    assert kept(0.8) == [lines[i] for i in (0, 1, 3, 4, 5, 6, 7, 8, 9)], "int(0.8 * 12), as published"
    assert kept(0.01) == [lines[3]], "a file without rows cannot be trained on"
    assert kept(1.0) == lines


def test_seal_retrains_from_the_base_model_on_the_kept_rows(task, tmp_path, calls, monkeypatch):
    rows = run_seal(task, tmp_path, COMMON, shares=[0.8, 0.5])
    assert [row["group"] for row in rows] == [SEAL, *["SEAL, top 80%"] * 2, *["SEAL, top 50%"] * 2]
    assert [row["selection_auroc"] is not None for row in rows] == [True] + [False] * 4
    assert all(row["seconds"] > rows[0]["seconds"] for row in rows[1:]), "those of both stages"
    kept = [f"top_{share}.jsonl" for share in (80, 80, 50, 50)]
    assert [data.train_dataset[0].rsplit("/")[-1] for data, *_ in calls] == ["train.jsonl", *kept]
    assert [data.validation_dataset is not None for data, *_ in calls] == [True, False, True, False, True]
    default = BilevelConfig("x").rho
    assert [(args.selector, args.rho) for _, args, *_ in calls[1:]] == [("none", 0.0), ("none", default)] * 2
    assert {model_args.model_name_or_path for *_, model_args, _ in calls} == {str(task.model_dir)}
    assert [call[-1].__name__ for call in calls] == ["SealTrainer"] + ["BilevelTrainer"] * 4

    assert run_seal(task, tmp_path, COMMON, shares=[0.8]) == rows[:3] and len(calls) == 5, "nothing is run again"
    keep_fewer = lambda task, scores, share, path: keep_top(task, scores, share - 0.1, path)  # noqa: E731
    monkeypatch.setattr(seal, "keep_top", keep_fewer)
    run_seal(task, tmp_path, COMMON, shares=[0.8])
    assert len(calls) == 7, "other rows, another run"


def test_rates_are_variants_and_the_share_may_be_that_of_tamis(task, tmp_path, calls):
    write_scout(tmp_path, share_right=0.3, is_believed=True)
    rows = run_seal(task, tmp_path, COMMON, shares=[TAMIS_SHARE], rates=[5e-3, 1e-2])
    share = f"SEAL, {TAMIS_SHARE}"
    names = [SEAL, f"{SEAL}, rate 0.01", share, f"{share}, mixed", f"{share}, rate 0.01", f"{share}, rate 0.01, mixed"]
    assert [row["method"] for row in rows] == names
    assert [row["group"] for row in rows] == [SEAL] * 2 + [share] * 4
    rates = [args.selector_learning_rate for _, args, *_ in calls if args.selector == "softmax"]
    assert rates == [5e-3, 1e-2]
    weights = pq.read_table(run_dir(tmp_path, names[1]) / "weights.parquet")["weight"].to_numpy()
    lines = task.train_file.read_text().splitlines()
    best = [lines[i] for i in sorted(weights.argsort(kind="stable")[::-1][:3].tolist())]
    kept = run_dir(tmp_path, names[1]) / "tamis_s_share.jsonl"
    assert kept.read_text().splitlines() == best, "by the weights of its own rate, int(0.3 * 12) of them"


def test_the_share_of_tamis_is_one_where_its_scout_is_not_believed(tmp_path):
    assert share_value(0.4, tmp_path) == 0.4
    with pytest.raises(ValueError, match="once tamis has run"):
        share_value(TAMIS_SHARE, tmp_path)
    write_scout(tmp_path, share_right=0.3, is_believed=False)
    assert share_value(TAMIS_SHARE, tmp_path) == 1.0
    with pytest.raises(ValueError, match="give a number"):
        share_value("half", tmp_path)
