"""Write the transcript of docs/first_run.md anew: `tamis demo --output_dir demo`, then `python docs/first_run.py demo`.

Takes two minutes. The command is the one that stands in the document; lines that are alike are left out in the middle.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCUMENT = Path(__file__).with_name("first_run.md")
PROGRAM = Path(sys.executable).with_name("tamis")
NUM_SHOWN = 3  # logging steps before and after those that are left out


def shortened(stderr: str) -> str:
    """The lines, of the logging steps only the first and the last, none longer than 120 characters."""
    lines = stderr.splitlines()
    steps = [i for i, line in enumerate(lines) if line.startswith("training ")]
    left_out = set(steps[NUM_SHOWN:-NUM_SHOWN])
    shown = [_wrapped(line) for i, line in enumerate(lines) if i not in left_out]
    shown.insert(steps[NUM_SHOWN], "...")
    return "\n".join(shown)


def _wrapped(line: str) -> str:
    if len(line) <= 120:
        return line
    end = line.rfind(" ", 0, 120)
    return f"{line[:end]}\n  {_wrapped(line[end + 1 :])}"


def main() -> None:
    """Run the document's command on the world that the demo has left, and put what it prints into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (command,) = re.findall(r"```bash\n(tamis train.*?)\n```", text, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(sys.argv[1]) / "world", Path(folder) / "demo/world")
        arguments = shlex.split(command.replace("\\\n", " "))
        done = subprocess.run(
            [str(PROGRAM), *arguments[1:]], cwd=folder, check=True, capture_output=True, text=True, encoding="utf-8"
        )
    for name, shown in {"stdout": done.stdout.rstrip(), "stderr": shortened(done.stderr)}.items():
        found = re.compile(rf"(<!-- {name} -->\n```\n).*?(\n```\n<!-- end -->)", re.DOTALL)
        text, number = found.subn(lambda match, shown=shown: match[1] + shown + match[2], text)
        assert number == 1, f"{DOCUMENT.name} has {number} places for {name}"
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
