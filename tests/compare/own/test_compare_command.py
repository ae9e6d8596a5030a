"""`tamis compare` from files to the table: equal tokens, resumed runs, methods that fail, metrics of the user."""

import json
import sys
from pathlib import Path

import pytest
from conftest import two_kinds, write_jsonl

from tamis.cli import main
from tamis.compare.own import runner
from tamis.compare.own.contenders import DEFAULT_METHODS
from tamis.trainer import BilevelTrainer

METRICS = '''
def num_letters(rows, answers):
    """So that every row's columns and response are seen."""
    assert all(set(row["response"]) <= set("a ") and row["prompt"].endswith("=") for row in rows)
    return [len(answer) for answer in answers]

def one_too_few(rows, answers):
    return [1.0] * (len(rows) - 1)
'''


@pytest.fixture
def options(model_dir, tmp_path, monkeypatch):
    """Of a small comparison of everything, on right and wrong rows."""
    right, wrong, trusted = two_kinds(num_rows=12)
    files = {"train": right + wrong, "validation": trusted[:6], "eval": trusted[6:]}
    flags = ["--model_name_or_path", model_dir, "--output_dir", str(tmp_path / "comparison")]
    for name, rows in files.items():
        flags += [f"--{name}_dataset", write_jsonl(tmp_path / f"{name}.jsonl", rows)]
    (tmp_path / "my_metrics.py").write_text(METRICS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metrics", raising=False)
    flags += ["--learning_rate", "1e-2", "--scout_learning_rate", "1e-2", "--scout_epochs", "4", "--rhos", "0.3"]
    return [*flags, "--max_steps", "4", "--seeds", "0", "1", "--use_cpu", "--bf16", "false", "--report_to", "none"]


def results(tmp_path) -> dict[str, dict]:
    """By folder what each run came to."""
    files = (tmp_path / "comparison").rglob("runs/*/result.json")
    return {str(file.parent): json.loads(file.read_text()) for file in files}


def test_all_methods_see_the_same_tokens_and_what_is_finished_is_not_made_again(options, tmp_path, capsys, monkeypatch):
    options += ["--metric", "eval_loss", "exact_match", "my_metrics:num_letters"]
    options += ["--per_device_train_batch_size", "4", "--max_new_tokens", "8"]
    assert main(["compare", *options]) == 0
    text, found = capsys.readouterr().out, results(tmp_path)
    runs = [run["result"] for run in found.values() if run["result"]["method"] != "base model"]
    assert len(runs) == 2 * (len(DEFAULT_METHODS) + 1), "random is there alone and mixed"
    tokens = [run["num_tokens"] for run in runs]
    assert max(tokens) - min(tokens) <= max(tokens) / 4, "one step of four is the finest that there is"
    assert all(len(values) == 6 for run in runs for values in run["values"].values())
    assert {tuple(run["values"]) for run in runs} == {("eval_loss", "exact_match", "my_metrics:num_letters")}

    table = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert table["verdict"] in text and {line["num_seeds"] for line in table["methods"]} == {2}
    assert table["verdict"].startswith("On your data tamis has a held-out loss of")
    tamis = next(line for line in table["methods"] if line["method"] == "tamis")
    mine = [run["values"]["eval_loss"] for run in runs if run["method"] == "tamis"]
    assert tamis["values"]["eval_loss"] == pytest.approx(sum(map(sum, mine)) / 12)
    assert table["verdict"] in (tmp_path / "comparison" / "comparison.html").read_text()

    monkeypatch.setattr(runner, "make_trainer", None)
    assert main(["compare", *options]) == 0
    assert capsys.readouterr().out == text and results(tmp_path) == found


def test_another_seed_makes_only_its_own_runs(options, tmp_path, capsys):
    options += ["--methods", "plain_sft", "tamis"]
    assert main(["compare", *options]) == 0
    before = results(tmp_path)
    assert main(["compare", *options, "--seeds", "0", "1", "2"]) == 0
    after = results(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + 2
    assert main(["compare", *options, "--max_steps", "5"]) == 0
    assert {run["result"]["num_steps"] for run in results(tmp_path).values()} >= {5}


def test_a_method_that_fails_does_not_end_the_others(options, tmp_path, capsys, monkeypatch):
    original = BilevelTrainer.train

    def train(self, *args, **kwargs):
        if Path(self.args.output_dir).name == "plain_sft" and self.args.seed == 1:
            raise RuntimeError("<b>broken</b>")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(BilevelTrainer, "train", train)
    options += ["--methods", "plain_sft", "mixing", "tamis"]
    assert main(["compare", *options]) == 1
    table = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    lines = {line["group"]: line for line in table["methods"]}
    assert lines["plain SFT"]["num_seeds"] == 1 and "broken" in lines["plain SFT"]["errors"][0]
    assert lines["tamis"]["num_seeds"] == 2 and lines["plain SFT"]["behind"]["num_seeds"] == 1
    page = (tmp_path / "comparison" / "comparison.html").read_text()
    assert "&lt;b&gt;broken" in page and "<b>broken" not in page, "texts are escaped"

    monkeypatch.setattr(BilevelTrainer, "train", original)
    assert main(["compare", *options]) == 0, "the same command makes the run that is missing"


def test_a_budget_in_minutes_is_measured_and_one_in_tokens_is_kept(options, tmp_path, capsys):
    options += ["--methods", "plain_sft", "trusted_alone", "tamis"]
    place = options.index("--max_steps")
    options = [*options[:place], *options[place + 2 :], "--seeds", "0"]
    assert main(["compare", *options, "--max_minutes", "0.01", "--output_dir", "minutes"]) == 0
    assert "0.01 minutes, at " in capsys.readouterr().out
    assert main(["compare", *options, "--max_tokens", "1000", "--output_dir", "tokens"]) == 0
    lines = json.loads((tmp_path / "tokens" / "comparison.json").read_text())["methods"]
    assert all(abs(line["num_tokens"] - 1000) < 110 for line in lines if line["method"] != "base model")


def test_a_metric_of_the_user_that_returns_nonsense_is_named(options, capsys):
    options += ["--methods", "tamis", "plain_sft", "--metric", "my_metrics:one_too_few"]
    assert main(["compare", *options]) == 2
    assert "'my_metrics:one_too_few' returned values of shape (5,)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "nonsense"], "unknown method 'nonsense' in --methods: choose from plain_sft"),
        (["--seeds", "1", "1"], "seeds: give at least one, and each once"),
        (["--rhos", "1.0"], "rhos: mixing takes shares between 0 and 1"),
        (["--keep_share", "0"], "keep_share must be above 0"),
        (["--max_tokens", "0"], "max_tokens must be positive"),
        (["--max_tokens", "9", "--max_minutes", "9"], "give one"),
        (["--methods", "select_then_sft"], "add tamis to --methods\n"),
        (["--methods", "random", "plain_sft"], "add tamis to --methods, or give --keep_share"),
        (["--metric", "bleu"], "unknown metric 'bleu'"),
        (["--metric", "my_metrics:absent"], "metric 'my_metrics:absent' cannot be imported"),
        (["--metric", "no_such_module:f"], "cannot be imported"),
        (["--eval_dataset", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(flags, message, options, capsys, monkeypatch):
    monkeypatch.setattr(runner, "make_trainer", None)
    assert main(["compare", *options, *flags]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def test_held_out_rows_are_needed(options, capsys):
    place = options.index("--eval_dataset")
    assert main(["compare", *options[:place], *options[place + 2 :]]) == 2
    assert "give --eval_dataset" in capsys.readouterr().err
