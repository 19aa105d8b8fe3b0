"""Tables in LaTeX that are no wider than a column of a two-column paper.

An interval is set below its number. Columns that do not fit beside each other go into a further block with the same
rows, and rows that do not fit on a page go into a further float. Widths are estimated generously, so that they hold for
Computer Modern and every narrower font.
"""

import math
import re
from collections.abc import Iterable

import pandas as pd

from vlmneurons.look.numbers import in_table

_COLUMN, _LETTERS, _SMALL, _GAP = 238.0, 8.0, 6.4, 4.0
r"""Points: a column of 3.3 inches, ``\footnotesize``, ``\tiny`` (whose letters are wide), a gap between columns."""

_WIDTHS = {**dict.fromkeys("fijlrt.,:;!'|[]() -", 0.41), **dict.fromkeys("mwMW%@&−<>–…", 0.9)}
"""Widths of the letters that are narrower or wider than most, in units of the font size."""

_LABEL, _LINES = 92.0, 60
"""How wide a text is set in several lines, in points, and how many lines fit into a float."""

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "’": "'",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "α": r"$\alpha$",
}


def is_text(column: pd.Series) -> bool:
    """Whether a column holds words, which are aligned left.

    Args:
        column: of a table, with numbers as such or as they are printed.
    """
    return not pd.api.types.is_numeric_dtype(column) and not all(str(value)[:1] in "−–<0123456789" for value in column)


def latex(table: pd.DataFrame, caption: str = "", label: str = "", turned: bool = False) -> str:
    """A table in LaTeX with booktabs, every character of the cells escaped, at most 3.3 inches wide.

    Args:
        table: any table; numbers are aligned right.
        caption: of the table.
        label: what the text refers to it by.
        turned: write the names of the columns upwards, but for the first.
    """
    for label_width in (_COLUMN, _LABEL):  # a long text is broken only where it has to be
        columns = [
            _Column(str(name), table.iloc[:, n], n == 0, label_width, turned and n > 0)
            for n, name in enumerate(table.columns)
        ]
        if _fits(columns):
            break
    blocks: list[list[_Column]] = [columns[:1]]
    for column in columns[1:]:
        if not _fits([*blocks[-1], column]) and len(blocks[-1]) > 1:
            blocks.append(columns[:1])
        blocks[-1] = [*blocks[-1], column]
    lines = max((column.lines for column in columns), default=1)
    together = len(blocks) * (lines * len(table) + 3) <= _LINES
    rows = max(1, (_LINES - 3) // lines)
    parts = [range(start, min(start + rows, len(table))) for start in range(0, max(len(table), 1), rows)]
    together_or_alone = [blocks] if together else [[block] for block in blocks]
    floats = [(part, shown) for part in parts for shown in together_or_alone]
    texts = [_float(shown, part, caption, label, n, len(floats)) for n, (part, shown) in enumerate(floats, start=1)]
    letters = "".join([caption, *(text for column in columns for text in (column.name, *column.cells))])
    return _needs(letters, turned) + "\n".join(texts)


class _Column:
    """A column as it is set: its texts, their width in points, and how many lines a cell takes."""

    def __init__(self, name: str, values: pd.Series, first: bool, most: float, turned: bool) -> None:
        self.name, self.cells = name, [in_table(value) for value in values]
        self.left = first or is_text(values)
        pairs = [re.fullmatch(r"(−?[\d.]+) (\[.+\]|\(few\))", cell) for cell in self.cells]
        several = any(pair and pair[2][0] == "[" for pair in pairs)
        self.numbers, self.intervals = self.cells, []
        if several:
            self.numbers = [pair[1] if pair else cell for pair, cell in zip(pairs, self.cells, strict=True)]
            self.intervals = [pair[2] if pair else "" for pair in pairs]
        widest = max((_LETTERS * _ems(text) for text in self.numbers), default=0.0)
        widest = max(widest, max((_SMALL * _ems(text) for text in self.intervals), default=0.0))
        self.head = name.split(" ", 1) if " " in name and _LETTERS * _ems(name) > widest and not turned else [name]
        self.turned = turned
        widest = max(widest, *(_LETTERS if turned else _LETTERS * _ems(word) for word in self.head))
        self.most, self.width, self.boxed = most, min(widest, most), widest > most
        texts = self.numbers if turned else [*self.numbers, self.name]
        within = _LETTERS * max(map(_ems, texts), default=0.0) / (0.8 * most)
        self.lines = math.ceil(within) if self.boxed else 2 if several else 1

    def set_head(self, line: int) -> str:
        """One line of the column's name; where names are turned, all of it in one line that runs upwards."""
        if line >= len(self.head):
            return ""
        return rf"\rotatebox{{90}}{{{_escaped(self.name)}}}" if self.turned else self.set(self.head[line])

    def set(self, text: str) -> str:
        """A cell's text."""
        if not self.boxed or _LETTERS * _ems(text) <= self.most:
            return _escaped(text)
        return rf"\parbox[t]{{{self.most:g}pt}}{{\raggedright {_broken(text)}\strut}}"


def _ems(text: str) -> float:
    """How wide a text is at most, in units of its size."""
    return sum(
        _WIDTHS.get(letter, 1.0 if ord(letter) > 0x2E80 else 0.8 if letter.isupper() else 0.55) for letter in text
    )


def _fits(columns: Iterable[_Column]) -> bool:
    return sum(column.width + _GAP for column in columns) <= _COLUMN


def _float(blocks: list[list[_Column]], rows: range, caption: str, label: str, number: int, of: int) -> str:
    caption = caption if number == 1 else caption.partition(". ")[0]
    more = f"{caption} ({number} of {of})" if of > 1 else caption
    lines = [
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{2pt}",
        *([rf"\caption{{{_broken(more)}}}"] if caption else []),
        *([rf"\label{{{label}{f'-{number}' if number > 1 else ''}}}"] if label else []),
    ]
    for place, block in enumerate(blocks):
        align = "".join("l" if column.left else "r" for column in block)
        lines += [*([r"\\[4pt]"] if place else []), rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
        for line in range(max(len(column.head) for column in block)):
            lines.append(_row(column.set_head(line) for column in block))
        lines.append(r"\midrule")
        for row in rows:
            lines.append(_row(column.set(column.numbers[row]) for column in block))
            small = [column.intervals[row] if column.intervals else "" for column in block]
            if any(small):
                lines.append(_row(rf"\tiny {_escaped(text)}" if text else "" for text in small))
        lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _row(cells: Iterable[str]) -> str:
    text = " & ".join(cells)
    return ("{}" if text.startswith(("[", "*")) else "") + text + r" \\"  # else an argument of the \\ before it


def _escaped(text: str) -> str:
    return "".join(_ESCAPED.get(letter, letter) for letter in " ".join(text.split()))


def _broken(text: str) -> str:
    """A text whose long words may be broken anywhere."""
    words = (
        [word] if len(word) <= 16 else [word[at : at + 4] for at in range(0, len(word), 4)] for word in text.split()
    )
    return " ".join(r"\hspace{0pt}".join(map(_escaped, pieces)) for pieces in words)


def _needs(text: str, turned: bool) -> str:
    """A comment that says which packages and which fonts a document needs for the table."""
    rare = sorted({letter for letter in text if ord(letter) >= 0x180 and not letter.isspace()} - _ESCAPED.keys())
    needs = rf"% \usepackage{{booktabs{',graphicx' if turned else ''}}} and \usepackage[T1]{{fontenc}}"
    if rare:
        needs += f"; XeLaTeX or LuaLaTeX, with a font that has {''.join(rare[:20])}{'…' if len(rare) > 20 else ''}"
    return needs + "\n"
