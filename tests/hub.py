"""As much of the hub as an upload of small files needs, on this machine."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        """Answer the three requests of an upload, and keep what came with them."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        if self.server.refuses:
            self.answer({"error": "no"}, 403)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{constants.ENDPOINT}/{self.server.repo}"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self.answer({"files": modes})
        else:
            self.answer({"commitUrl": f"{constants.ENDPOINT}/{self.server.repo}/commit/1", "commitOid": "1"})

    def do_GET(self):
        """An empty repository."""
        self.answer({"id": self.server.repo, "sha": "0", "siblings": []})

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        """Quiet."""


@contextmanager
def serve(monkeypatch, repo: str) -> Iterator[ThreadingHTTPServer]:
    """Within it the hub is a server with ``requests`` (path, token, body) and ``refuses``.

    Args:
        repo: USER/NAME, with ``datasets/`` before it for a data set.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests, server.refuses, server.repo = [], False, repo
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def uploaded_files(hub: ThreadingHTTPServer) -> dict[str, bytes]:
    """What the last request, a commit, holds."""
    sent = [json.loads(line)["value"] for line in hub.requests[-1][2].splitlines()]
    return {entry["path"]: base64.b64decode(entry["content"]) for entry in sent if "path" in entry}
