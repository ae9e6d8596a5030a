"""Commands that write once, and fail at it or are killed: a line that says so, old files whole, nothing left over."""

import gzip
import shutil
import sys

import pytest
from nothing_lost import ERRORS, NEVER, SIGKILL, Death, forks, live, write_sites
from weighed_files import ROWS, json_lines, weigh_files, write_as

from tamis.cli import main

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="writes are watched on Linux, by C"
)
REMEDIES = {"ENOSPC": "make room", "EIO": "see to the disk", "EACCES": "see to its permissions"}


class Command:
    """A command that writes below the folder ``out``, and what it writes there undisturbed."""

    def __init__(self, context, out, *arguments):
        self.context, self.out, self.arguments = context, out, arguments
        out.mkdir()
        self.whole = self.run()
        assert self.whole.exit_code == 0, self.whole.said
        self.expected = self.files()

    def run(self, death=NEVER, *options):
        return live(self.context, [*self.arguments, *options], self.out, death)

    def files(self):
        return {str(path.relative_to(self.out)): path.read_bytes() for path in self.out.rglob("*") if path.is_file()}

    def clear(self):
        shutil.rmtree(self.out)
        self.out.mkdir()

    def ends_whole(self, *options):
        life = self.run(NEVER, *options)
        return life.exit_code == 0 and self.files() == self.expected and not self.left_over()

    def left_over(self):
        return [path.name for path in self.out.rglob(".*")]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing_writes")
    names = ("a.jsonl.gz", "b.parquet", "c")
    (folder / names[0]).write_bytes(gzip.compress(json_lines(ROWS).encode()))
    for name in names[1:]:
        write_as(folder / name, ROWS)
    weigh_files(folder, *(folder / name for name in names))
    run, select, report = str(folder / "run"), folder / "select", folder / "report"
    folders = ["--output_dir", str(select / "clean"), "--dropped_dir", str(select / "dropped")]
    with forks(folder) as context:
        yield {
            "select": Command(context, select, "select", run, *folders),
            "report": Command(context, report, "report", run, "--output", str(report / "page.html")),
        }


@pytest.mark.parametrize(("name", "every"), [("select", 10), ("report", 3)])
def test_a_write_that_fails_is_named_and_leaves_nothing(commands, name, every):
    command = commands[name]
    for error, at in list(write_sites(command.whole.writes))[::every]:
        command.clear()
        life, place = command.run(Death(at, ERRORS[error])), command.whole.writes[at - 1]
        assert life.exit_code == 1 and life.last_words.startswith(f"tamis {name}: "), (place, life.said)
        assert REMEDIES[error] in life.last_words and str(command.out) in life.last_words, place
        assert life.last_words.endswith("then run the same command again")
        assert not command.files() and not command.left_over(), place
        assert command.ends_whole(), place


def test_files_that_are_there_stay_where_a_selection_fails(commands):
    """Whatever comes before they are replaced; then the manifest goes first, and the same command mends it."""
    command, overwriting = commands["select"], "--overwrite_output_dir"
    command.clear()
    writes = [write for write in command.run(NEVER).writes if write.kind != "rename"]
    assert command.files() == command.expected
    for at in (5, len(writes) // 2, len(writes)):
        assert command.run(Death(at, ERRORS["ENOSPC"]), overwriting).exit_code == 1
        assert command.files() == command.expected and not command.left_over()
    life = command.run(Death(1, ERRORS["EIO"], of="clean/c"), overwriting)
    assert life.exit_code == 1 and f"{command.out}/clean/c cannot be written" in life.last_words
    assert "clean/manifest.json" not in command.files() and command.ends_whole(overwriting)


def test_what_a_selection_leaves_that_was_killed_is_cleared_away(commands):
    command = commands["select"]
    command.clear()
    for at in (3, len(command.whole.writes) // 2):
        assert command.run(Death(at, SIGKILL)).exit_code == -9
        assert command.left_over() and not (command.out / "clean").exists()
    assert command.ends_whole()


def test_results_that_do_not_reach_stdout_are_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["--version"]) == 1
    assert (
        capsys.readouterr().err == "tamis: stdout cannot be written (No space left on device): see to where it goes\n"
    )
