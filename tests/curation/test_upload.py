"""What `tamis select` sends to the hub: the files that it wrote, and nothing else of the folder."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants
from weighed_files import ROWS, chosen, json_lines

from tamis.cli import main


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs."""

    def do_POST(self):
        """Answer the three requests of an upload, and keep what came with them."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        if self.server.refuses:
            self.answer({"error": "no"}, 403)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{constants.ENDPOINT}/datasets/me/clean"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self.answer({"files": modes})
        else:
            self.answer({"commitUrl": f"{constants.ENDPOINT}/datasets/me/clean/commit/1", "commitOid": "1"})

    def do_GET(self):
        """An empty repository."""
        self.answer({"id": "me/clean", "sha": "0", "siblings": []})

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests, server.refuses = [], False
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


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
    creation, *_, commit = hub.requests
    assert json.loads(creation[2]).items() >= {"name": "clean", "organization": "me", "type": "dataset"}.items()
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_x"}
    sent = [json.loads(line)["value"] for line in commit[2].splitlines()]
    files = {entry["path"]: base64.b64decode(entry["content"]) for entry in sent if "path" in entry}
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
