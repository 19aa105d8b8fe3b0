"""Build the notebook of the tutorial from its page, and run it: ``python docs/generate_notebook.py [--keep]``.

The page stays the one source: its text becomes cells of text, its blocks of Python cells of code, and what they give
when they are run is kept in ``docs/tutorial.ipynb``. ``--keep`` leaves the cells unrun, for a look at the result. A
test holds the cells to the page.
"""

import argparse
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
_SHOWN = re.compile(r"^```text title=\"Output\"\n.*?^```\n|^!\[[^]]*\]\([^)]*\)\n", re.MULTILINE | re.DOTALL)
"""What the page shows of what its code gives; the notebook's cells give it themselves."""
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\.md")


def cells(page: str) -> list[nbformat.NotebookNode]:
    """The cells of a page, not run."""
    made = []
    parts = _BLOCK.split(_SHOWN.sub("", page))  # text, code, text, …
    for number, part in enumerate(parts):
        text = part.strip("\n")
        if not text:
            continue
        if number % 2:
            made.append(nbformat.v4.new_code_cell(text))
        else:
            made.append(nbformat.v4.new_markdown_cell(_LINK.sub(r"](\1.html", text)))
    for number, cell in enumerate(made):
        cell["id"] = f"cell-{number:02}"  # else drawn at random, so that no two builds were equal
    return made


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="do not run the cells")
    given = parser.parse_args()
    notebook = nbformat.v4.new_notebook(cells=cells(PAGE.read_text(encoding="utf-8")))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    if not given.keep:
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]  # progress bars
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
