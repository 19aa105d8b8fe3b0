"""What the code of a page of the documentation prints, on the page: made and compared.

    python tools/page_outputs.py docs/concepts/sites.md          renew the outputs that the page shows
    python tools/page_outputs.py --all docs/concepts/sites.md    show one below every block that prints

The blocks of Python of a page are one script, run in order. An output stands below its block, between fences of
``text title="Output"``; `tests/test_documents.py` runs the page and compares.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text title=\"Output\"\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
"""A block of Python, and its output where the page shows one."""

_END = "\x1e"
_NUMBER = re.compile(r"[-−]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


def script_of(page: str) -> str:
    """The script that the blocks of a page are, which prints a mark after each."""
    return "".join(f"{code}\nprint({_END!r})\n" for code, _ in BLOCK.findall(page))


def printed_by_block(printed: str) -> list[str]:
    """What each block printed, by what the script printed."""
    return [one.removeprefix("\n") if n else one for n, one in enumerate(printed.split(_END)[:-1])]


def plain(text: str) -> str:
    """A text without blanks at the ends of its lines, and without empty lines at its ends."""
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


def alike(shown: str, printed: str) -> bool:
    """Whether two outputs have the same words, and numbers that differ by rounding only, as other versions round."""
    if re.sub(r"[ \-]+", " ", _NUMBER.sub("#", plain(shown))) != re.sub(
        r"[ \-]+", " ", _NUMBER.sub("#", plain(printed))
    ):
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=2e-3, abs_tol=2e-4) for a, b in pairs)


def with_outputs(page: str, printed: list[str], every: bool) -> str:
    """The page with its outputs as they were printed."""
    outputs = iter(printed)

    def put(block: re.Match[str]) -> str:
        text = plain(next(outputs))
        code = f"```python\n{block[1]}```\n"
        return f'{code}\n```text title="Output"\n{text}\n```\n' if text and (every or block[2] is not None) else code

    return BLOCK.sub(put, page)


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="also for blocks that show none yet")
    given = parser.parse_args()
    for path in given.pages:
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "page.py")
            script.write_text(script_of(page), encoding="utf-8")
            how = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
            done = subprocess.run(
                [sys.executable, script], cwd=folder, env=how, stdout=subprocess.PIPE, text=True, check=True
            )
        path.write_text(with_outputs(page, printed_by_block(done.stdout), given.all), encoding="utf-8")


if __name__ == "__main__":
    main()
