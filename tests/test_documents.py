"""README and documentation are true: every block of Python runs, and the strict build of the site has no warning."""

import contextlib
import io
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import vlmneurons as vn
from public import callees, documented_paths, public_things
from tools.page_outputs import BLOCK as SHOWN
from tools.page_outputs import (
    PICTURE,
    WIDTH,
    alike,
    alike_pictures,
    drawn_pictures,
    printed_by_block,
    script_of,
    with_outputs,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
WITH_CODE = [name for name, path in PAGES.items() if BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """An empty working folder; models of the Hub, which cannot be downloaded here, are stood in for by the demo's."""
    monkeypatch.chdir(tmp_path)
    original = vn.VLM.from_pretrained

    def stand_in(name, **how):
        return original(name, **how) if Path(name).is_dir() else vn.load_demo()[0]

    monkeypatch.setattr(vn.VLM, "from_pretrained", stand_in)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", WITH_CODE)
@pytest.mark.usefixtures("unchecked")
def test_every_block_of_python_runs_in_order(page, as_a_reader):
    # A trace reads its own source, so the blocks of a page are one file.
    script, text = as_a_reader / "page.py", PAGES[page].read_text(encoding="utf-8")
    script.write_text(script_of(text), encoding="utf-8")
    with (
        contextlib.redirect_stdout(io.StringIO()) as told,
        pd.option_context("display.width", WIDTH, "display.max_columns", 30),
    ):
        runpy.run_path(str(script), run_name="page")
    for (code, shown), printed in zip(SHOWN.findall(text), printed_by_block(told.getvalue()), strict=True):
        if shown:
            assert alike(shown, printed), f"{page} shows another output of\n{code}\nIt printed\n{printed}"
    for kept, drawn in drawn_pictures(PAGES[page], as_a_reader):
        assert alike_pictures(kept, drawn), f"{page} shows {kept.name}, and its code draws something else"


def test_a_picture_differs_by_what_it_shows_but_not_by_how_letters_are_smoothed(tmp_path):
    for name, harm, text in (("kept", "-50", "A"), ("same", "-50", "B"), ("other", "0", "A")):
        figure = Figure(figsize=(4, 3))
        axis = figure.subplots()
        axis.imshow([[float(harm), 0], [0, -50]], vmin=-50, vmax=50, cmap="RdBu")
        axis.set_title(text)
        figure.savefig(tmp_path / f"{name}.png")
    assert alike_pictures(tmp_path / "kept.png", tmp_path / "same.png")
    assert not alike_pictures(tmp_path / "kept.png", tmp_path / "other.png")


def test_every_figure_of_the_gallery_is_drawn_by_its_page():
    names = PICTURE.findall(PAGES["docs/gallery.md"].read_text(encoding="utf-8"))
    code = "".join(BLOCK.findall(PAGES["docs/gallery.md"].read_text(encoding="utf-8")))
    assert all(f'"{Path(name).name}"' in code for name in names)
    assert {name for name in vn.__all__ if name.startswith("plot_")} == set(re.findall(r"vn\.(plot_\w+)", code))


BY_COMMAND = {
    "organism-effects.png": "examples/quickstart.py",
    "natural-effects.png": "examples/quickstart.py",
    "selector_recovery.png": "benchmarks/selector_recovery.py",
}
"""Pictures that no page's own code draws: `tests/test_examples.py` runs the command and compares."""


def test_every_picture_is_drawn_by_the_code_of_its_page_or_by_a_command_that_the_page_names():
    shown = set()
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        code = "".join(BLOCK.findall(text))
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            name = Path(picture).name
            shown.add((path.parent / picture).resolve())
            if name in BY_COMMAND:
                assert f"python {BY_COMMAND[name]}" in text, f"{page} does not say what makes {name}"
            elif not name.endswith(".svg"):  # diagrams, drawn by hand
                assert f'"{name}"' in code, f"{page} shows {name}, which nothing on it draws"
    assert shown == {*(DOCS / "images").iterdir(), DOCS / "selector_recovery.png"}


def test_an_output_differs_by_words_and_by_numbers_but_not_by_rounding():
    assert alike("a  0.123 b\n", "a 0.1231 b  \n\n")
    assert not alike("a 0.123", "a 0.143")
    assert not alike("a 0.123", "b 0.123")
    assert not alike("3 of 4", "3 of 5")
    page = "```python\nprint(1)\n```\n\nText.\n\n```python\nprint(2)\n```\n"
    shown = with_outputs(page, ["1\n", "2\n"], True)
    assert [one for _, one in SHOWN.findall(shown)] == ["1\n", "2\n"]
    assert with_outputs(shown, ["3\n", "2\n"], False).count("```text") == 2
    assert printed_by_block("1\n\x1e\n2\n\x1e\n") == ["1\n", "2\n"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, and what its build said."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
    )
    return folder, done


def test_the_strict_build_of_the_documentation_has_no_warning(site):
    folder, done = site
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    assert (folder / "index.html").is_file()


def test_every_public_name_method_and_property_has_an_entry_on_a_page_of_the_api(site):
    folder, done = site
    assert done.returncode == 0, done.stderr
    _, _, _, _, packed = (folder / "objects.inv").read_bytes().split(b"\n", 4)  # four lines, then the list, packed
    lines = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    entries = {line[0] for line in lines if line[3].startswith("api/")}
    missing = {*public_things(), *callees()} - entries
    # The methods of a class stand at its first name, and how it is made stands with the class.
    missing -= {name for name in missing if name.startswith("vlmneurons.ConAct.")}
    made = {name.removesuffix(".__init__"): callees()[name] for name in missing if name.endswith(".__init__")}
    missing -= {f"{name}.__init__" for name in made if name in entries}
    assert not missing, f"no entry for {', '.join(sorted(missing))}"
    pages = "".join(page.read_text(encoding="utf-8") for page in (folder / "api").glob("*.html"))
    for name, one in made.items():
        of_class = pages.partition(f'id="{name}"')[2].partition('class="doc doc-children"')[0]
        unsaid = set(one.parameters) - set(re.findall(r"<b><code>(?:<[^>]+>)*(\w+)<", of_class))
        assert not unsaid, f"the entry of {name} does not explain {', '.join(sorted(unsaid))}"


def test_no_public_name_has_two_entries():
    modules = [path for path in documented_paths() if isinstance(pkgutil.resolve_name(path), ModuleType)]
    twice = [path for path, times in Counter(documented_paths()).items() if times > 1]
    twice += [path for path in documented_paths() if path.rpartition(".")[0] in modules]
    assert not twice, f"on more than one page, or twice on one: {', '.join(twice)}"


def test_the_front_page_of_the_api_links_every_public_name_with_the_first_line_of_its_docstring(site):
    folder, done = site
    assert done.returncode == 0, done.stderr
    front = (folder / "api" / "index.html").read_text(encoding="utf-8")
    rows = dict(re.findall(r'<tr>\s*<td><a href="\w+\.html#([\w.]+)"><code>.*?</td>\s*<td>(.*?)</td>\s*</tr>', front))
    assert set(rows) == set(public_things()) - {"vlmneurons.VLMNeuronsError"}  # it stands there as that of `errors`
    assert rows["vlmneurons.VLM"] == "A vision-language model whose MLP neurons have names."
    assert not [path for path, first in rows.items() if not first.strip()]


def test_every_page_is_in_the_navigation_and_every_picture_exists():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert name == "README.md" or path.relative_to(DOCS).as_posix() in navigation, f"{name} is not in mkdocs.yml"
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (path.parent / picture).is_file(), f"{name} shows {picture}, which does not exist"


def test_the_notebook_of_the_tutorial_is_in_step_with_its_page_and_was_run():
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    assert code == [block.strip("\n") for block in BLOCK.findall(page)], "run python docs/generate_notebook.py"
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for heading in re.findall(r"^#+ .*$", page, re.MULTILINE):
        assert heading in text
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    outputs = [one for cell in notebook["cells"] for one in cell.get("outputs", ())]
    assert len(outputs) >= 10
    assert not [one for one in outputs if one["output_type"] == "error"]
    assert (DOCS / "tutorial.ipynb").stat().st_size < 2**20
