"""What a saved model tells of its data, what `--push_to_hub` sends, and what loggers are told."""

import re
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import two_kinds, write_jsonl
from hub import serve, uploaded_files

from tamis.cli import main
from tamis.model_card import data_section, source_name
from tamis.output_dir import read_metrics

TOKEN = "hf_secretsecretsecret"
OWN_METRICS = {"training_loss", "validation_loss", "rho", "ess"}


@pytest.fixture
def train(model_dir, tmp_path, monkeypatch):
    """Run the command with a scout; returns the run directory."""
    right, wrong, trusted = two_kinds()
    held_out, trusted = trusted[:4], trusted[4:]
    monkeypatch.chdir(tmp_path)
    parts = {"train": right + wrong, "validation": trusted, "eval": held_out}
    flags = ["--model_name_or_path", model_dir, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    for name, rows in parts.items():
        flags += [f"--{name}_dataset", write_jsonl(tmp_path / f"my_{name}.jsonl", rows)]
    flags += ["--scout_learning_rate", "1e-2", "--scout_epochs", "8", "--use_cpu", "--bf16", "false"]
    flags += ["--logging_steps", "1"]

    def run(*extra: str):
        assert main(["train", *flags, *extra]) == 0
        return tmp_path / "run"

    return run


@pytest.fixture
def hub(monkeypatch):
    with serve(monkeypatch, "me/model") as server:
        yield server


def test_the_card_tells_of_the_data(train, tmp_path):
    card = (train("--report_to", "none") / "README.md").read_text(encoding="utf-8")
    data = card.split("## Data\n")[1].split("## Training procedure")[0]
    assert "- Training rows: 24\n- Trusted rows: 8\n- Held-out rows: 4\n" in data
    assert "- Sources of the training rows: `my_train.jsonl`\n" in data
    share = re.search(r"- Share estimated right: (\d+)% \(90% interval", data)
    assert share and 35 <= int(share[1]) <= 65, "half of them are"
    assert re.search(r"- AUROC to expect of the weights: (0\.9\d|1\.00)\n", data)
    assert re.search(r"- Rows kept: 1\d \(\d+%\)\n", data)
    assert "xiao2025unified" in card and "vonwerra2020trl" in card and "2511.21056" in card
    assert str(tmp_path) not in card


def test_the_card_says_where_the_scout_saw_nothing(tmp_path):
    (tmp_path / "scout.json").write_text('{"is_believed": false}')
    assert "did not tell the training rows apart" in data_section(tmp_path, {"train_dataset": 1200}, [])


def test_the_card_counts_refined_rows(tmp_path):
    pq.write_table(
        pa.table({"kept": [True, True, False, False], "refined": [False, False, True, False]}),
        tmp_path / "weights.parquet",
    )
    section = data_section(tmp_path, {"train_dataset": 1200, "eval_dataset": 0}, [])
    assert section == (
        "## Data\n\n- Training rows: 1,200\n- Rows kept: 2 (50%)\n- Rows trained on with responses of the model: 1\n"
    )


def test_names_of_the_hub_stay_and_paths_lose_their_folders():
    names = ("yahma/alpaca-cleaned", "/home/me/rows.jsonl", "data/rows.jsonl", "a/b/c", "alpaca")
    assert [source_name(name) for name in names] == ["yahma/alpaca-cleaned", "rows.jsonl", "rows.jsonl", "c", "alpaca"]


def test_the_hub_gets_the_model_and_its_card(train, hub, tmp_path):
    run = train("--report_to", "none", "--push_to_hub", "--hub_model_id", "me/model", "--hub_token", TOKEN)
    assert {token for _, token, _ in hub.requests} == {f"Bearer {TOKEN}"}
    sent = uploaded_files(hub)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "weights.parquet", "scout.json"} <= set(
        sent
    )
    assert not [name for name in sent if name.startswith(("checkpoint-", "."))]
    for name in ("model.safetensors", "weights.parquet", "README.md"):
        assert sent[name] == (run / name).read_bytes(), name
    card = sent["README.md"].decode()
    assert "MODEL = 'me/model'" in card and "# Model Card for model" in card
    assert "tamis" in yaml.safe_load(card.split("---")[1])["tags"]
    assert str(tmp_path) not in card
    assert [name for name, content in sent.items() if TOKEN.encode() in content] == []


def test_tensorboard_has_the_metrics_of_tamis(train, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = train("--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    records = read_metrics(run)
    for name in OWN_METRICS:
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(record["step"], pytest.approx(record[name])) for record in records if name in record]
        assert shown == expected and len(shown) >= 2, name


def test_wandb_offline_has_the_metrics_of_tamis(train, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train("--report_to", "wandb")
    assert {f"train/{name}" for name in OWN_METRICS} <= set(wandb.run.summary.keys())
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_trackio_has_the_metrics_of_tamis(train, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    train("--report_to", "trackio", "--project", "tamis-test")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = " ".join(row[0] for row in connection.execute("select metrics from metrics"))
    assert all(f'train/{name}"' in logged for name in OWN_METRICS)
