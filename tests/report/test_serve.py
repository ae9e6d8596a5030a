"""`tamis report --serve`: the page of a run as it goes on, at an address of this machine only."""

from http.client import HTTPConnection
from threading import Thread

import pytest
from weighed_files import ROWS, json_lines, weigh_files

from tamis.cli import main
from tamis.report.page import ReportArguments
from tamis.report.serve import make_server


@pytest.fixture
def server(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh_files(tmp_path, str(tmp_path / "a.jsonl"))
    with make_server(ReportArguments(str(tmp_path / "run"), port=0)) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def answer(server, path, host="localhost"):
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_the_page_follows_the_run(server, tmp_path):
    status, page = answer(server, "/")
    version = answer(server, "/version")[1]
    assert status == 200 and f"/version#{version}" in page and "connect-src &#39;self&#39;" in page
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 7, "training_loss": 1.0}\n')
    assert answer(server, "/version")[1] != version
    assert "state after step 7" in answer(server, "/")[1]


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    assert answer(server, "/", host="evil.example")[0] == 403
    assert answer(server, "/../config.yaml")[0] == 404


def test_a_port_that_is_taken(server, tmp_path, capsys):
    options = ["--serve", "true", "--port", str(server.server_port)]
    assert main(["report", str(tmp_path / "run"), *options]) == 2
    assert f"port {server.server_port} cannot be used" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), *options, "--output", "x.html"]) == 2
    assert "output is set but has no effect" in capsys.readouterr().err
