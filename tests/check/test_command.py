"""`tamis check` as a command: figures with known answers, the words of `tamis train`, exit codes, JSON."""

import json

import pytest
from conftest import pairs, write_jsonl

from tamis.check.command import check
from tamis.cli import main
from tamis.train_parser import make_train_parser

CHEAP = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--scout_epochs", "1", "--learning_rate", "1e-3"]
LONG = {"prompt": "1=", "completion": "1" * 60}
NUM_AROUND = len("<user>.<assistant>.")  # tokens of the chat template in a row
PROMPT_TOO_LONG = {"prompt": "2" * 50, "completion": "3"}


@pytest.fixture
def folder(tmp_path, model_dir, monkeypatch):
    """A user's files: 24 training rows, of which 3 repeat others, 2 are too long, one is dropped and one is trusted."""
    rows = pairs(12) + pairs(5, 30, wrong=True) + pairs(3) + [pairs(1, 100)[0], LONG, LONG | {"prompt": "3="}]
    write_jsonl(tmp_path / "train.jsonl", [*rows, PROMPT_TOO_LONG])
    write_jsonl(tmp_path / "validation.jsonl", pairs(6, 100))
    write_jsonl(tmp_path / "eval.jsonl", pairs(3, 200))
    (tmp_path / "model").symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = {
    "--model_name_or_path": "model",
    "--train_dataset": "train.jsonl",
    "--validation_dataset": "validation.jsonl",
    "--eval_dataset": "eval.jsonl",
    "--output_dir": "run",
    "--max_length": "40",
}


def options(*extra, without=()):
    given = [part for name, value in FILES.items() if name not in without for part in (name, value)]
    return [*given, *CHEAP, *extra]


def run(capfd, *extra, without=(), code=0):
    """The JSON object of the command, and its stderr."""
    assert main(["check", *options(*extra, without=without), "--json"]) == code
    captured = capfd.readouterr()
    return json.loads(captured.out), captured.err


def test_known_answers(folder, capfd):
    found, err = run(capfd, "--no_measure")
    assert found["can_train"] and not found["errors"]
    assert not [line for line in err.splitlines() if line.startswith("tamis check")]
    training = found["data_sets"]["train_dataset"]
    assert {name: training[name] for name in ("rows", "bad_rows", "truncated", "dropped", "repeated_rows")} == {
        "rows": 24, "bad_rows": 0, "truncated": 2, "dropped": 1, "repeated_rows": 3,
    }  # fmt: skip
    assert training["longest"] == len("1=") + 60 + NUM_AROUND
    assert training["shared"]["validation_dataset"] == {"rows": 1, "prompts": 1, "near_duplicates": 0}
    assert training["shared"]["eval_dataset"] == {"rows": 0, "prompts": 0, "near_duplicates": 0}
    validation = found["data_sets"]["validation_dataset"]
    lengths = sorted(len(row["prompt"] + row["completion"]) + NUM_AROUND for row in pairs(6, 100))
    assert validation["tokens"] == sum(lengths) and validation["median_length"] == sum(lengths[2:4]) / 2
    text = "\n".join(found["warnings"])
    assert "train_dataset: 2 of 24 rows cut to max_length=40 tokens: train.jsonl 2 (rows 21, 22)" in text
    assert "1 of 24 rows dropped, their prompt alone is longer than max_length=40" in text and "--max_length" in text
    assert "3 of 24 rows repeat another row and count again" in text and "out of --train_dataset" in text
    assert "validation_dataset and train_dataset share 1 row(s)" in text
    assert "with 6 rows a small share of wrong rows is not found" in text and "to --validation_dataset" in text
    assert len(found["warnings"]) == 5
    assert not (folder / "run").exists(), "nothing is written"


def test_what_is_trained_on_and_what_was_resolved(folder, capfd):
    found, _ = run(capfd, "--no_measure", "--rho", "0.25", "--max_steps", "7", "--gradient_accumulation_steps", "2")
    example, text = found["example"], "\n".join(found["settings"])
    assert example["place"] == "train.jsonl, row 0 (line 1)" and example["parts"][-1] == [True, "0 <eos>"]
    assert example["num_trained"] == 2 and example["num_tokens"] > 4  # with the chat template
    assert "learning_rate = 0.001 (as given)" in text
    assert "rows of a step = 32 (8 training rows, times 2 micro-batches, and 16 validation rows)" in text
    assert "steps = 7 (max_steps, as given)" in text and "rho = 0.25 (as given)" in text
    assert found["cost"]["num_steps"] == 7 and found["cost"]["seconds"] is None
    assert not found["cost"]["memory"]["is_measured"]


def test_the_keys_of_the_json(folder, capfd):
    found, _ = run(capfd, "--no_measure")
    assert list(found) == [
        "can_train", "errors", "warnings", "notes", "num_bad_rows", "bad_rows", "data_sets", "near_duplicates",
        "example", "settings", "cost",
    ]  # fmt: skip
    assert list(found["data_sets"]) == ["train_dataset", "validation_dataset", "eval_dataset"]
    assert list(found["cost"]) == ["parameters", "num_steps", "seconds", "memory", "disk", "leaves_out_generation"]
    assert found["near_duplicates"] == {"threshold": 0.8, "shingle_size": 5, "max_searched_rows": 100_000}
    again, _ = run(capfd, "--no_measure")
    for one in (found, again):  # what other processes use
        del one["cost"]["memory"]["available"], one["cost"]["disk"]["available"]
    assert again == found


def test_the_steps_that_are_measured_leave_no_lines(folder, capfd):
    found, _ = run(capfd, "--logging_steps", "1")
    assert found["cost"]["memory"]["is_measured"] and found["notes"]
    assert not [line for line in found["notes"] if line.startswith("measuring")]


def test_without_a_model_the_rows_alone_are_checked(folder, capfd):
    found, _ = run(capfd, without=("--model_name_or_path", "--validation_dataset"))
    training = found["data_sets"]["train_dataset"]
    assert training["repeated_rows"] == 3 and training["tokens"] is None
    assert found["example"] is None and found["cost"] is None and found["settings"] == []
    assert "no --model_name_or_path: the rows alone are checked" in found["notes"]


def test_a_few_measured_steps(folder, capfd):
    found, _ = run(capfd, "--max_steps", "50", "--eval_strategy", "steps", "--eval_steps", "25")
    seconds, memory = found["cost"]["seconds"], found["cost"]["memory"]
    assert 0 < seconds["step"] < 5 and seconds["training"] == pytest.approx(50 * seconds["step"])
    assert seconds["scouting"] > 0 and seconds["evaluation"] > 0
    assert seconds["total"] == pytest.approx(seconds["training"] + seconds["scouting"] + seconds["evaluation"])
    assert memory["is_measured"] and 50e6 < memory["needed"] < memory["available"] and memory["fits"]
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "extra",
    [
        ["--selector", "none", "--rho", "0"],
        ["--selector", "mirror", "--use_peft", "--lora_target_modules", "q_proj", "v_proj"],
        ["--refine_fraction", "0.5", "--max_new_tokens", "4"],
        ["--selector", "bmo", "--reference", "tracked", "--max_steps", "1"],
        ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "epoch", "--eval_on_start"],
    ],
    ids=lambda extra: " ".join(extra[:2]),
)
def test_settings_that_measure_otherwise(folder, capfd, extra):
    found, _ = run(capfd, *extra)
    seconds, scouts = found["cost"]["seconds"], "--selector" not in extra
    assert seconds["total"] > 0 and (seconds["scouting"] > 0) == scouts
    assert found["cost"]["leaves_out_generation"] == ("--refine_fraction" in extra)
    parameters = found["cost"]["parameters"]
    assert (parameters["num_trained"] < parameters["num"]) == ("--use_peft" in extra)
    assert not (folder / "run").exists()


def test_the_words_for_people(folder, capfd):
    assert main(["check", *options("--no_measure")]) == 0
    out = capfd.readouterr().out
    assert "\nrepeated rows                         3           0         0\n" in out
    assert "validation: same row                  1" in out
    assert "\ntrained on (train.jsonl, row 0 (line 1);" in out and "⟦0 <eos>⟧" in out
    assert "\nlearning_rate = 0.001 (as given)\n" in out
    assert "steps       9\n" in out and "of them trained\n" in out
    assert "warning: train_dataset: 3 of 24 rows repeat another row" in out
    assert "\x1b" not in out


def test_a_terminal_gets_colours_and_a_table(folder, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["check", *options("--no_measure")]) == 0
    out = capfd.readouterr().out
    assert "\x1b[1;32m⟦0 <eos>⟧" in out and "\x1b[1;33mwarning: " in out and "─────" in out


def test_times_are_scaled_by_the_tokens_of_a_step(folder, capfd, monkeypatch):
    """Twice the rows of a step are twice the tokens, and so is the time that a token takes of."""
    monkeypatch.setattr("tamis.check.measure._Timer.seconds_per_token", lambda _: 0.5)
    small, large = (
        run(capfd, "--selector", "none", "--rho", "0", "--per_device_train_batch_size", "1", *extra)[0]["cost"]
        for extra in ((), ("--gradient_accumulation_steps", "23"))
    )
    num_tokens = run(capfd, "--no_measure")[0]["data_sets"]["train_dataset"]["tokens"] - 2 * (80 - 40 + 1)
    assert small["num_steps"] == 3 * 23 and large["num_steps"] == 3
    for cost in (small, large):  # without padding, an epoch has the tokens of the data set
        assert cost["seconds"]["training"] == pytest.approx(3 * 0.5 * num_tokens)


# --- what cannot work -------------------------------------------------------------------------------------------------


def line_of_train(capfd, *extra, without=()) -> str:
    """What `tamis train` ends with."""
    assert main(["train", *options(*extra, without=without)]) == 2
    return capfd.readouterr().err.splitlines()[-1].removeprefix("tamis train: ")


CASES = [
    ("--train_dataset none.jsonl", "none.jsonl: no such file"),
    ("--model_name_or_path none/of/them", "no such folder"),
    ("--per_device_train_batch_size 0", "must be at least 1"),
    ("--rho 2", "rho must lie between 0 and 1"),
    ("--selector column", "reads a column 'weight'"),
    ("--eval_dataset validation.jsonl", "share 6 row(s)"),
    ("--max_length 1", "Raise --max_length"),
    ("--prompt_template none.jinja", "no such file"),
    ("--output_dir occupied", "holds a run already"),
]


@pytest.mark.parametrize(("extra", "text"), CASES, ids=[extra for extra, _ in CASES])
def test_errors_are_those_of_training(folder, capfd, extra, text):
    (folder / "occupied").mkdir()
    (folder / "occupied" / "metrics.jsonl").write_text('{"step": 1}\n')
    expected = line_of_train(capfd, *extra.split())
    assert text in expected
    found, err = run(capfd, *extra.split(), code=2)
    assert expected in found["errors"] and not found["can_train"]
    assert f"tamis check: {expected}\n" in err


def test_all_bad_files_and_rows_are_told_at_once(folder, capfd):
    rows = [json.dumps(row) for row in pairs(5)]
    bad = [json.dumps({"prompt": "1=", "completion": ""})] * 12
    (folder / "train.jsonl").write_text("\n".join([*rows, "{", *bad, *rows]), encoding="utf-8")
    (folder / "validation.jsonl").write_text("", encoding="utf-8")
    (folder / "eval.jsonl").write_text('{"prompt": null, "completion": "1"}\n', encoding="utf-8")
    found, err = run(capfd, "--train_dataset", "train.jsonl", "missing.jsonl", code=2)
    assert found["num_bad_rows"] == {"train.jsonl": 13, "eval.jsonl": 1}
    assert [row["row"] for row in found["bad_rows"]] == [*range(5, 15), 0]
    assert found["bad_rows"][0]["problem"].startswith("train.jsonl, row 5 (line 6), which must be one whole object")
    named = [error.split(",")[0].split(":")[0] for error in found["errors"]]
    assert named[0] == "missing.jsonl", "where tamis train stops, which looks for all files first"
    assert sorted(named[1:]) == ["eval.jsonl", "train.jsonl", "validation.jsonl"]
    assert err.count("tamis check: ") == 4
    assert main(["check", *options("--train_dataset", "train.jsonl")]) == 2
    assert "train.jsonl: 13 bad rows in all\n" in capfd.readouterr().out


def test_bad_rows_that_are_left_out_are_counted(folder, capfd):
    write_jsonl(folder / "train.jsonl", [*pairs(9), {"prompt": "1=", "completion": None}, *pairs(9, 40)])
    found, _ = run(capfd, "--skip_bad_rows", "--no_measure")
    assert found["data_sets"]["train_dataset"]["rows"] == 18 and found["data_sets"]["train_dataset"]["bad_rows"] == 1
    assert found["bad_rows"][0]["row"] == 9 and found["can_train"]


def test_refused_settings_do_not_hide_the_rows(folder, capfd):
    found, _ = run(capfd, "--rho", "2", code=2)
    assert found["data_sets"]["train_dataset"]["repeated_rows"] == 3


def test_too_little_memory_for_a_step(folder, capfd, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("tamis.check.measure._longest_step", fail)
    found, _ = run(capfd, code=2)
    assert found["errors"][0].startswith("out of memory: lower --per_device_train_batch_size")
    assert found["data_sets"]["train_dataset"]["rows"] == 24


def test_our_own_mistakes_are_not_hidden(folder, monkeypatch):
    monkeypatch.setattr("tamis.check.command.first_row", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["check", *options("--no_measure")])


def test_it_takes_the_options_and_the_yaml_of_training(folder, capfd):
    lines = [f"{name.removeprefix('--')}: {value}" for name, value in FILES.items()]
    (folder / "run.yaml").write_text("\n".join([*lines, "use_cpu: true", "bf16: false", "seed: 7"]))
    assert main(["check", "--config", "run.yaml", "--no_measure", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["data_sets"]["train_dataset"]["rows"] == 24
    assert main(["check", "--lerning_rate", "1"]) == 2
    assert "did you mean --learning_rate? See tamis check --help" in capfd.readouterr().err


def test_the_same_settings_are_left_as_they_were(folder):
    data, args, model_args, _ = make_train_parser("check").parse_args_and_config(options())
    before = dict(vars(args))
    check(data, args, model_args, measures=False)
    assert vars(args) == before
