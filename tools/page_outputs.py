"""What the code of a page of the documentation prints and draws, on the page: made and compared.

    python tools/page_outputs.py docs/concepts/sites.md          renew the outputs that the page shows
    python tools/page_outputs.py --all docs/concepts/sites.md    show one below every block that prints

The blocks of Python of a page are one script, run in order. An output stands below its block, between fences of
``text title="Output"``; `tests/test_documents.py` runs the page and compares. A picture that the page shows
(``![…](images/effects.png)``) and its code writes (``savefig("effects.png")``) is renewed and compared as well.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text title=\"Output\"\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
"""A block of Python, and its output where the page shows one."""

PICTURE = re.compile(r"!\[[^\]]*\]\(((?:\.\./)*images/[\w.-]+\.png)\)")
"""A picture that a page shows."""

WIDTH = 160
"""Of a printed table, in letters: a page, as a notebook, leaves out no column that a terminal has no room for."""

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


def drawn_pictures(page: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Pictures of a page that its code drew: where they are kept, and where the code wrote them."""
    for name in PICTURE.findall(page.read_text(encoding="utf-8")):
        if (folder / Path(name).name).exists():
            yield page.parent / name, folder / Path(name).name


def alike_pictures(kept: Path, drawn: Path) -> bool:
    """Whether two pictures show the same, but for how versions of matplotlib place and smooth letters."""
    one, other = (Image.open(path).convert("RGB") for path in (kept, drawn))
    if max(abs(a - b) / b for a, b in zip(one.size, other.size, strict=True)) > 0.05:
        return False
    size = (96, round(96 * one.height / one.width))
    a, b = (np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=float) for picture in (one, other))
    return float(np.abs(a - b).mean()) < 2.5


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
            wide = f"import pandas\npandas.set_option('display.width', {WIDTH}, 'display.max_columns', 30)\n"
            script.write_text(wide + script_of(page), encoding="utf-8")
            how = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
            done = subprocess.run(
                [sys.executable, script], cwd=folder, env=how, stdout=subprocess.PIPE, text=True, check=True
            )
            for kept, drawn in drawn_pictures(path, Path(folder)):
                shutil.copyfile(drawn, kept)
        path.write_text(with_outputs(page, printed_by_block(done.stdout), given.all), encoding="utf-8")


if __name__ == "__main__":
    main()
