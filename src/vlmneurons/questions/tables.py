"""Rows become questions: which column is which field, and what a question's fields look like in a row.

What a row holds is asked with, is kept as metadata, or is refused by row and column; nothing is lost unsaid.
`vlmneurons.questions.sources` reads the rows, `vlmneurons.questions.cells` the pictures in their cells.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmneurons.checks import JSON, JSONMapping, check_kind, is_missing, nearest_name
from vlmneurons.errors import QuestionError
from vlmneurons.questions.cells import MEDIA, file_fault, is_empty, literal_list, pictures_of_cell, refuse_unasked
from vlmneurons.questions.question import LETTERS, Question, derived_id, normalize
from vlmneurons.questions.sources import refuse_twice

FIELDS = ("image", "question", "options", "answer", "group", "id", "image_id", "audio", "video", "answers")
"""A question's fields in a table. Further columns are metadata, and so is ``answers`` unless ``columns`` names it."""

_SEVERAL = (*MEDIA, "options")
"""Fields that may have several columns."""

_OTHER_NAMES = {
    "image": ("images", "picture", "pictures", "photo", "img", "image_path", "image_1", "file_name"),
    "question": ("query", "prompt", "text", "q"),
    "options": ("choices", "candidates", "answers", "endings"),
    "answer": ("label", "correct", "target", "correct_answer", "answer_idx", "gold", "solution"),
    "group": ("culture", "country", "language", "category", "subset", "topic", "class"),
    "id": ("index", "ID", "qid", "question_id"),
}
_TRUE_FIRST = {
    *(("yes", "no"), ("true", "false"), ("correct", "incorrect"), ("right", "wrong"), ("y", "n"), ("t", "f")),
    *(("sí", "no"), ("si", "no"), ("sì", "no"), ("sim", "não"), ("oui", "non"), ("ja", "nein"), ("ja", "nee")),
    *(("ja", "nej"), ("да", "нет"), ("是", "否"), ("对", "错"), ("はい", "いいえ"), ("예", "아니요"), ("네", "아니요")),
    *(("ya", "tidak"), ("evet", "hayır"), ("हाँ", "नहीं"), ("نعم", "لا"), ("có", "không"), ("tak", "nie")),
}
"""Two options of which the one that 1 stands for, as a truth value, is not the one at place 1."""

_OPTION = re.compile(r"(?:options?|choices?|answers?|opt|ans)[ _-]?([A-Za-z]|\d)", re.IGNORECASE)


# -- which column is which ---------------------------------------------------------------------------------------------


def questions_of_rows(
    rows: Iterable[Mapping[str, object]],
    columns: Mapping[str, str | Sequence[str]] | None,
    where: str,
    *,
    start: int = 0,
    folder: Path | None = None,
    names: Sequence[str] | None = None,
    options: Sequence[str] | None = None,
) -> list[Question]:
    """The questions of rows.

    Args:
        rows: values by column.
        columns: the column of each field, or several, where it is not named as the field is.
        where: what errors call a row, before its number.
        start: number of the first row.
        folder: the folder that paths of pictures are relative to, and may not leave.
        names: the names of all columns; by default those that occur in the rows.
        options: the options of every row, where the table has none.

    Raises:
        QuestionError: a column is missing, or a row is no question.
    """
    rows = rows if names is not None else list(rows)
    have = list(names if names is not None else dict.fromkeys(name for row in rows for name in row))
    column_of = _columns(columns, have, needed=names is not None)
    if options is not None and (column_of["options"] or "answers" in column_of):
        column = (*column_of["options"], *column_of.get("answers", ()))[0]
        raise QuestionError(
            f"options={options!r} are for every row, and the table has its own in {column!r}: leave one out"
        )
    questions = []
    for number, row in enumerate(rows, start=start):
        fields, rest = _fields_of(row, column_of, f"{where} {number}")
        if options is not None:
            fields["options"] = options if isinstance(options, str) else list(options)
        questions.append(question_of_row(fields, rest, f"{where} {number}", folder, column_of))
    return questions


def _fields_of(row: Mapping[str, object], column_of: Mapping[str, Sequence[str]], where: str) -> tuple[JSON, JSON]:
    """A row's cells by the field that they are of, several in a list without empty ones; and the other columns."""
    fields, rest = {}, dict(row)
    for field, columns in column_of.items():
        cells = [rest.pop(name) for name in columns if name in rest]
        if len(columns) == 1 and cells:
            fields[field] = cells[0]
        elif cells:
            filled = [not is_empty(cell) for cell in cells]
            if field == "options" and sorted(filled, reverse=True) != filled:
                raise QuestionError(f"{where}: option {columns[filled.index(False)]!r} is empty, one after it is not")
            fields[field] = [cell for cell, is_filled in zip(cells, filled, strict=True) if is_filled]
    return fields, rest


def _columns(columns: JSONMapping | None, have: Sequence[object], *, needed: bool) -> dict[str, tuple[str, ...]]:
    """The columns of each field that the table has.

    Args:
        columns: what the caller said of them.
        have: the table's columns.
        needed: whether a column that a question needs must be there. Else each row is looked at, as rows may differ.
    """
    check_kind("columns", {} if columns is None else columns, Mapping, QuestionError, "a dictionary {field: column}")
    column_of: dict[str, tuple[str, ...]] = {name: (name,) for name in FIELDS}
    for field, name in (columns or {}).items():
        if field not in column_of:
            meant = nearest_name(str(field), FIELDS)
            hint = f". Did you mean {meant!r}?" if meant else ""
            raise QuestionError(f"columns has no field {field!r}; a question has {', '.join(FIELDS)}{hint}")
        if not isinstance(name, str) and not (isinstance(name, list | tuple) and name and field in _SEVERAL):
            raise QuestionError(
                f"columns: {field!r} is the name of a column"
                f"{', or a list of names' if field in _SEVERAL else ''}; got {name!r}"
            )
        column_of[field] = (name,) if isinstance(name, str) else tuple(name)
    twice = [name for field in columns or {} for name in column_of[field]]
    if len(set(twice)) < len(twice):
        refuse_twice(twice, "columns")
    needs = ("question", "group", *(("answer",) if "answers" not in (columns or {}) else ()))
    for field in dict.fromkeys((*(columns or ()), *needs)):
        absent = [name for name in column_of[field] if name not in have]
        if absent and (needed or field in (columns or {})) and have:
            source = "dataset" if needed else "table"
            raise QuestionError(
                f"the {source} has no column {absent[0]!r} for {field!r}; it has {', '.join(map(str, have))}"
                f"{_advice(field, absent[0], have)}"
            )
    # A column that is called as one field, but was given to another, is not the first field's too. Nor are "answers" a
    # field unless the caller says so: many tables call their options so.
    chosen = columns or {}
    taken = {name for field in chosen for name in column_of[field]} | {"answers"}
    return {
        field: tuple(name for name in names if name in have)
        for field, names in column_of.items()
        if field in chosen or not taken.intersection(names)
    }


def _advice(field: str, name: str, have: Sequence[object]) -> str:
    """The end of a message about a missing column: which column may be meant."""
    if field == "options":
        options = [column for column in have if _OPTION.fullmatch(str(column))]
        if len(options) > 1:
            return f". Did you mean columns={{'options': {options}}}?"
    by_lower = {str(column).casefold(): str(column) for column in have}
    nearest = difflib.get_close_matches(name.casefold(), list(by_lower), 1, cutoff=0.8)
    nearest += [word.casefold() for word in _OTHER_NAMES.get(field, ()) if word.casefold() in by_lower]
    nearest += difflib.get_close_matches(name.casefold(), [column for column in by_lower if column not in FIELDS], 1)
    column = by_lower[nearest[0]] if nearest else name
    return f". Did you mean columns={{{field!r}: {column!r}}}?" if column != name else ""


# -- one row -----------------------------------------------------------------------------------------------------------


def question_of_row(
    fields: Mapping[str, object],
    rest: Mapping[str, object],
    where: str,
    folder: Path | None = None,
    column_of: Mapping[str, Sequence[str]] | None = None,
) -> Question:
    """The question of a row.

    Args:
        fields: values of the question's fields, as tables have them.
        rest: the row's other cells: options by their letters, and metadata.
        where: what errors call the row.
        folder: the folder that paths of pictures are relative to, and may not leave.
        column_of: the columns of each field, for errors.

    Raises:
        QuestionError: the row is no question, or something of it would be lost.
    """
    rest = dict(rest)
    answers = _answers(fields["answers"], where) if "answers" in fields else []
    options = [] if answers and is_empty(fields.get("options")) else _options(fields.get("options"), rest, where)
    is_open = bool(answers) and not options
    _check_fields(fields, rest, where, is_open=is_open)
    column_name = {kind: ", ".join(map(repr, (column_of or {}).get(kind) or (kind,))) for kind in MEDIA}
    media = {
        kind: pictures_of_cell(fields.get(kind), f"{where}, column {column_name[kind]}", folder, kind) for kind in MEDIA
    }
    pictures = tuple(source for sources in media.values() for source in sources)
    refuse_unasked(rest, where, folder, pictures, column_of)
    question, group = str(fields["question"]), str(fields["group"])
    right = answer_index(fields["answer"], options, where) if 2 <= len(options) <= len(LETTERS) else 0
    if is_open and not is_empty(fields.get("answer")):
        rest["answer"] = fields["answer"]  # nothing of a row is lost
    identity, image_id = (None if is_empty(fields.get(name)) else str(fields[name]) for name in ("id", "image_id"))
    texts = tuple(map(str, options))
    if identity is None and folder is not None and pictures:  # the same wherever the folder lies
        named = [str(part.relative_to(folder) if isinstance(part, Path) else part) for part in pictures]
        identity = derived_id(question, texts, right, group, named, str(image_id), *([answers] if answers else []))
    try:
        asked = Question(
            media["image"][0] if len(media["image"]) == 1 else media["image"] or None,
            *(question, texts, right, group),
            id=identity or "",
            metadata=rest,
            image_id=image_id,
            audio=list(media["audio"]),
            video=list(media["video"]),
            answers=answers,
        )
    except QuestionError as error:
        raise QuestionError(f"{where}: {error}") from error
    for kind, sources in media.items():
        for source in sources:
            if isinstance(source, str | Path) and (fault := file_fault(Path(source))):
                raise QuestionError(f"{where}, column {column_name[kind]}: the {MEDIA[kind]} '{source}' {fault}")
    return asked


def _check_fields(fields: Mapping[str, object], rest: Mapping[str, object], where: str, *, is_open: bool) -> None:
    """Refuse a row that lacks what a question needs."""
    needs = ("question", "group") if is_open else ("question", "answer", "group")
    missing = [name for name in needs if is_empty(fields.get(name))]
    if isinstance(fields.get("answer"), float) and "answer" in missing:
        missing.remove("answer")  # NaN, of which `answer_index` says more
    if missing:
        names = [str(name) for name in (*fields, *rest)]
        raise QuestionError(
            f"{where}: no value for {', '.join(missing)}; the row has {', '.join(names)}"
            f"{'' if missing[0] in fields else _advice(missing[0], missing[0], names)}"
        )
    for name in ("question", "group"):
        if not isinstance(fields[name], str | int | float | np.generic):
            raise QuestionError(f"{where}: {name} is a text; got {type(fields[name]).__name__} {fields[name]!r:.80}")


def _options(options: Any, rest: JSON, where: str) -> list[Any]:
    """A question's options: a list, the text of one, or cells by their letters, which are taken out of the rest."""
    if isinstance(options, str):
        advice = ': write ["tea", "rice"], or give each a column: A, B, C, D, or columns={"options": [columns]}'
        options = literal_list(options, f"{where}: options must be a JSON list", advice)
    if hasattr(options, "tolist"):
        options = options.tolist()
    if options is None:
        options = _lettered(rest, where)
    if not isinstance(options, Sequence) or isinstance(options, str | bytes):
        advice = _advice("options", "options", list(rest))
        raise QuestionError(f"{where}: no options; give a list in 'options', or columns A, B, C, D{advice}")
    if any(map(is_missing, options)):  # its text would read "None"
        raise QuestionError(f"{where}: an option is missing; got {list(options)!r}")
    if not all(isinstance(option, str | int | float | np.generic) for option in options):
        raise QuestionError(f"{where}: options are texts or numbers; got {list(options)!r:.120}")
    if not options and (advice := _advice("options", "options", list(rest))):
        raise QuestionError(f"{where}: no options; the row has {', '.join(map(str, rest))}{advice}")
    return list(options)


def _answers(cell: Any, where: str) -> list[str]:
    """The answers that an open question accepts: texts, or the ``{"answer": text, …}`` of people who were asked."""
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = literal_list(cell, f"{where}: answers must be a JSON list")
    parts = [cell] if isinstance(cell, str) else cell
    texts = [part.get("answer") if isinstance(part, Mapping) else part for part in parts or ()]
    if not texts or not all(isinstance(text, str | int | float | np.generic) and not is_empty(text) for text in texts):
        raise QuestionError(f"{where}: answers are texts that the question accepts, at least one; got {cell!r:.120}")
    return list(map(str, texts))


def _lettered(rest: JSON, where: str) -> list[str]:
    """Options in columns ``A``, ``B`` … or ``a``, ``b`` …, which are taken out of the rest."""
    upper = [letter for letter in LETTERS if not is_empty(rest.get(letter))]
    lower = [letter for letter in LETTERS.lower() if not is_empty(rest.get(letter))]
    small = not {"A", "B"} & set(rest) and {"a", "b"} <= set(rest)
    alphabet, filled = (LETTERS.lower(), lower) if small else (LETTERS, upper)
    if filled != list(alphabet[: len(filled)]):
        raise QuestionError(f"{where}: options {', '.join(filled)} are there, one before is empty")
    if not small and filled and len(filled) < 26 and LETTERS[len(filled)].lower() in lower:
        raise QuestionError(
            f"{where}: options {', '.join(filled)} are there, and a column {LETTERS[len(filled)].lower()!r}: write the "
            "letters of options alike, or call the column otherwise"
        )
    options = [str(rest[letter]) for letter in filled]
    for letter in alphabet:
        rest.pop(letter, None)
    return options


def answer_index(answer: Any, options: Sequence[Any], where: str) -> int:
    """The index of the right option, from an index, a letter or the option's text.

    Raises:
        QuestionError: the answer is none of these, or it is two of them, and of different options; or
            0 or 1 among "yes" and "no".
    """
    if isinstance(answer, bool | np.bool_) or is_missing(answer):
        raise QuestionError(f"{where}: answer {answer!r} is neither an index, a letter nor an option's text")
    if isinstance(answer, float | np.floating) and float(answer).is_integer():
        answer = int(answer)  # as pandas has whole numbers in a column with holes
    text = str(answer).strip()
    by_text = [index for index, option in enumerate(options) if str(option).strip() == text][:1]
    place = None
    if isinstance(answer, int | np.integer) or re.fullmatch(r"-?\d{1,9}", text):
        place = int(answer)
        by_text = by_text or [index for index, option in enumerate(options) if _number(option) == place][:1]
    elif len(text) == 1 and text.upper() in LETTERS:
        place = LETTERS.index(text.upper())
    if by_text and place is not None and place not in by_text and 0 <= place < len(options):
        raise QuestionError(
            f"{where}: answer {answer!r} may mean the text of an option or its place; among options that are numbers "
            "give its letter, among letters its index"
        )
    if text in ("0", "1") and not by_text and tuple(normalize(str(option)) for option in options) in _TRUE_FIRST:
        by_place, by_truth = options if text == "0" else reversed(options)
        raise QuestionError(
            f"{where}: answer {answer!r} may mean {by_place!r}, by its place, or {by_truth!r}, where 1 stands for "
            f"true: give the option's text or its letter, or the options as {options[1]!r}, {options[0]!r}"
        )
    index = by_text[0] if by_text else place
    if index is not None:
        return index
    raise QuestionError(f"{where}: answer {answer!r} is neither an index, a letter nor one of the options")


def _number(option: object) -> float | None:
    """The number that an option's text spells; None where it spells none."""
    try:
        return float(str(option).replace("_", "x"))  # Python takes 1_000 for a number
    except ValueError:
        return None
