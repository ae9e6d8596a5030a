"""Write the transcript of a document anew: what its command prints on the world of the demo.

In an empty folder: `tamis demo --output_dir demo`, then `python DOCS/transcripts.py first_run` or `... compare`. The
first takes two minutes. The second takes an hour, and goes on where it was stopped. The command is the one that stands
in the document; of the lines of logging steps those in the middle are left out.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
PROGRAM = Path(sys.executable).with_name("tamis")
NUM_SHOWN = 3  # logging steps before and after those that are left out


def shortened(output: str) -> str:
    """The lines, of the logging steps only the first and the last, none longer than 120 characters."""
    lines = output.rstrip().splitlines()
    steps = [i for i, line in enumerate(lines) if line.startswith("training ")]
    left_out = set(steps[NUM_SHOWN:-NUM_SHOWN])
    shown = [_wrapped(line) for i, line in enumerate(lines) if i not in left_out]
    if left_out:
        shown.insert(min(left_out), "...")
    return "\n".join(shown)


def _wrapped(line: str) -> str:
    if len(line) <= 120:
        return line
    end = line.rfind(" ", 0, 120)
    return f"{line[:end]}\n  {_wrapped(line[end + 1 :])}"


def main() -> None:
    """Run the document's command here, and put what it prints into the document."""
    document = DOCS / f"{sys.argv[1]}.md"
    text = document.read_text(encoding="utf-8")
    (command,) = re.findall(r"```bash\n(tamis [^`]*?demo/world[^`]*?)\n```", text)
    arguments = shlex.split(command.replace("\\\n", " "))
    done = subprocess.run([str(PROGRAM), *arguments[1:]], check=True, capture_output=True, encoding="utf-8")
    for name, printed in {"stdout": done.stdout, "stderr": done.stderr}.items():
        place = re.compile(rf"(<!-- {name} -->\n```\n).*?(\n```\n<!-- end -->)", re.DOTALL)
        text = place.sub(lambda match, printed=printed: match[1] + shortened(printed) + match[2], text)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
