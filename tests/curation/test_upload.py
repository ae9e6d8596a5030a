"""What `tamis select` sends to the hub: the files that it wrote, and nothing else of the folder."""

import json

import pytest
from hub import serve, uploaded_files
from huggingface_hub import constants
from weighed_files import ROWS, chosen, json_lines

from tamis.cli import main


@pytest.fixture
def hub(monkeypatch):
    with serve(monkeypatch, "datasets/me/clean") as server:
        yield server


@pytest.fixture
def folder(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("a.jsonl")
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean/secret.txt").write_text("mine")
    return tmp_path


def test_the_files_that_were_written_are_uploaded(hub, folder):
    lines = dict(chosen(hub_dataset_id="me/clean", hub_private_repo=True, hub_token="hf_x"))
    assert lines["uploaded"] == f"{constants.ENDPOINT}/datasets/me/clean"
    creation = hub.requests[0]
    assert json.loads(creation[2]).items() >= {"name": "clean", "organization": "me", "type": "dataset"}.items()
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_x"}
    files = uploaded_files(hub)
    assert files == {name: (folder / "clean" / name).read_bytes() for name in ("a.jsonl", "manifest.json")}


def test_a_refused_upload_loses_nothing(hub, folder, capsys):
    hub.refuses = True
    options = ["--output_dir", "clean", "--hub_dataset_id", "me/clean", "--hub_token", "hf_x"]
    assert main(["select", "run", *options]) == 2
    assert (folder / "clean/manifest.json").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the rows are in clean, but the upload to me/clean failed" in error
    assert "Upload the folder by `hf upload`" in error and "hf_x" not in error


def test_an_upload_that_cannot_work_is_refused_before_rows_are_read(folder, monkeypatch, caplog):
    monkeypatch.setattr("tamis.curation.upload.get_token", lambda: None)
    with pytest.raises(ValueError, match="`hub_dataset_id` needs a login"):
        chosen(hub_dataset_id="me/clean")
    with pytest.raises(ValueError, match="is no name of the hub"):
        chosen(hub_dataset_id="a/b/c", hub_token="hf_x")
    assert not (folder / "clean/a.jsonl").exists()
    chosen(hub_private_repo=True)
    assert "hub_private_repo is set but has no effect" in caplog.text
