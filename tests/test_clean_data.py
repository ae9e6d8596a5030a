"""docs/clean_data.md: its commands and its snippet run, and the entries for other trainers fit the rows."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from tamis.cli import main

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "clean_data.md").read_text(encoding="utf-8")
ROWS = {
    "pairs": [{"prompt": f"{i}=", "completion": "xx" if i % 2 else "yy"} for i in range(40)],
    "messages": [
        {"messages": [{"role": "user", "content": f"{i}="}, {"role": "assistant", "content": "xx" if i % 2 else "yy"}]}
        for i in range(40)
    ],
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_page_from_scoring_to_trl(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rows in {"train": ROWS["pairs"], "validation": ROWS["pairs"][1::2][:12]}.items():
        rows = rows if name == "train" else [row | {"prompt": "9" + row["prompt"]} for row in rows]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in blocks("bash")[0].replace("\\\n", "").splitlines():
        words = shlex.split(command.replace("Qwen/Qwen3-0.6B", str(model_dir)))
        extra = ["--scout_epochs", "1", "--scout_learning_rate", "1e-3"] if words[1] == "score" else []
        assert words[0] == "tamis" and main([*words[1:], *extra]) == 0
    kept = [json.loads(line) for line in Path("clean/train.jsonl").read_text().splitlines()]
    assert kept and all(row in ROWS["pairs"] for row in kept)
    small = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    monkeypatch.setattr("trl.SFTConfig", lambda **given: SFTConfig(**given, **small))
    found = {}
    exec(blocks("python")[0].replace("Qwen/Qwen3-0.6B", str(model_dir)), found)
    assert found["trainer"].state.global_step == 2 and len(found["trainer"].train_dataset) == len(kept)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_entries_for_axolotl(text):
    (entry,) = yaml.safe_load(text)["datasets"]
    assert entry["path"] == "clean/train.jsonl" and entry["ds_type"] == "json"
    assert entry["type"] == "alpaca" or entry["field_messages"] in ROWS["messages"][0]


@pytest.mark.parametrize("text", [text for text in blocks("json") if "file_name" in text])
def test_entries_for_llama_factory(text):
    entry = json.loads(text)["clean"]
    assert entry["file_name"] == "clean/train.jsonl"
    rows = ROWS["messages" if entry.get("formatting") == "sharegpt" else "pairs"]
    assert set(entry["columns"].values()) <= set(rows[0])
    if "tags" in entry:
        assert {entry["tags"]["role_tag"], entry["tags"]["content_tag"]} == set(rows[0]["messages"][0])
