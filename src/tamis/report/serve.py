"""The page of a run that is going on, at an address of this machine only."""

import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tamis.report.page import ReportArguments, render
from tamis.report.run_folder import read_run
from tamis.settings import given_fields, warn_without_effect

logger = logging.getLogger(__name__)

_WATCHED = ("metrics.jsonl", "weights.parquet", "scout.json", "refinements.parquet")


def serve(arguments: ReportArguments, started: Callable[[str], Any] = print) -> None:
    """Answer until the process is stopped.

    Args:
        started: is told the address.

    Raises:
        ValueError: there is no run, or the port is taken.
    """
    warn_without_effect(given_fields(arguments), {"the page is served, not written": ["output"]})
    read_run(arguments.run)
    try:
        server = make_server(arguments)
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {arguments.port} cannot be used ({error}): give another `port`") from error
    with server:
        started(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


def make_server(arguments: ReportArguments) -> ThreadingHTTPServer:
    """A server for the page at ``/`` and its version at ``/version``."""
    folder = Path(arguments.run).expanduser()
    pages = dict[str, bytes]()  # the last one, by its version

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):  # a page of another site that has had its name point here
                self.send_error(403)
            elif self.path == "/version":
                self._answer(_version(folder).encode(), "text/plain")
            elif self.path == "/":
                self._answer(page(), "text/html; charset=utf-8")
            else:
                self.send_error(404)

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, text: str, *values: Any) -> None:
            logger.debug(text, *values)

    def page() -> bytes:
        now = _version(folder)
        if now not in pages:
            html = render(read_run(arguments.run), arguments.label_column, version_url=f"/version#{now}")
            pages.clear()
            pages[now] = html.encode()
        return pages[now]

    return ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)


def _version(folder: Path) -> str:
    """Changes when a file does that the page shows."""
    paths = [folder / name for name in _WATCHED]
    return "-".join(str(path.stat().st_mtime_ns) if path.is_file() else "0" for path in paths)
