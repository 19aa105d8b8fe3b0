"""Rows of any source become questions: a folder's table, a dataset, dictionaries, a table of pandas, CVQA.

Whatever a row holds is asked with, is kept as metadata, or is refused by row and column. Above all no picture is
dropped: a cell that holds one, in any of the forms that tables have for it, and that no field ``image`` names, would be
metadata of a question that is asked blind.
"""

import ast
import contextlib
import csv
import difflib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmneurons.checks import JSON, JSONMapping, check_kind, is_missing, nearest_name
from vlmneurons.errors import QuestionError
from vlmneurons.questions import media, streams
from vlmneurons.questions.media import Base64Picture, DatasetPicture
from vlmneurons.questions.question import LETTERS, Question, derived_id

FIELDS = ("image", "question", "options", "answer", "group", "id", "image_id", "audio", "video", "answers")
"""What a table says of a question; every further column is metadata, as are answers that ``columns`` does not name."""

_MEDIA = {"image": "picture", "audio": "sound", "video": "video"}
"""Fields that are shown or heard, and how errors call what they hold."""

_SEVERAL = (*_MEDIA, "options")
"""Fields that several columns may make up."""

_OTHER_NAMES = {
    "image": ("images", "picture", "pictures", "photo", "img", "image_path", "image_1", "file_name"),
    "question": ("query", "prompt", "text", "q"),
    "options": ("choices", "candidates", "answers", "endings"),
    "answer": ("label", "correct", "target", "correct_answer", "answer_idx", "gold", "solution"),
    "group": ("culture", "country", "language", "category", "subset", "topic", "class"),
    "id": ("index", "ID", "qid", "question_id"),
}
_OPTION = re.compile(r"(?:options?|choices?|answers?|opt|ans)[ _-]?([A-Za-z]|\d)", re.IGNORECASE)
_LONGEST = 20_000
"""Characters of the longest text that is read as a list of Python's; a longer one is no list of options."""

# -- where rows come from ----------------------------------------------------------------------------------------------


def rows_of_folder(folder: Path, table: str | None) -> tuple[Path, list[JSON]]:
    """The table of a folder, and its rows.

    Raises:
        QuestionError: no table or several, or one that cannot be read without losing something.
    """
    if table is None:
        found = sorted(path.name for path in folder.glob("*") if path.suffix in (".csv", ".tsv", ".jsonl"))
        if len(found) != 1:
            has = f"{len(found)}: {', '.join(found)}" if found else "none"
            raise QuestionError(f"{folder} must hold one .csv, .tsv or .jsonl table; it has {has}. Name one: table=…")
        table = found[0]
    path = folder / table
    if path.suffix in (".parquet", ".arrow", ".xlsx", ".json"):
        raise QuestionError(
            f"the table {path} is no .csv, .tsv or .jsonl: read it with pandas or datasets, and give it to "
            "QuestionSet.from_rows or from_dataset"
        )
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no ordinary file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise QuestionError(f"the table {path} cannot be read: {error}") from error
    return path, _json_lines(text, path) if path.suffix == ".jsonl" else _cells(text, path)


def _cells(text: str, path: Path) -> list[JSON]:
    cells = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        rows = list(cells)
    except csv.Error as error:
        hint = "; a picture as text belongs into a .jsonl table" if "limit" in str(error) else ""
        raise QuestionError(f"{path}, after line {cells.line_num}, cannot be read: {error}{hint}") from error
    _refuse_twice(cells.fieldnames or (), str(path))
    for number, row in enumerate(rows, start=1):
        surplus = [cell for cell in row.pop(None, None) or () if cell]
        if surplus:
            raise QuestionError(
                f"{path}, row {number} has more cells than there are columns, such as {surplus[0][:60]!r}: put texts "
                "that hold the separator into quotation marks"
            )
    return rows


def _json_lines(text: str, path: Path) -> list[JSON]:
    def once(pairs: list[tuple[str, object]]) -> JSON:
        _refuse_twice([name for name, _ in pairs], f"{path}, line {number}")
        return dict(pairs)

    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=once)
        except QuestionError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
            raise QuestionError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise QuestionError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    return rows


def _refuse_twice(names: Sequence[object], where: str) -> None:
    """One of two columns of a name would be lost."""
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise QuestionError(f"{where}: the column {twice[0]!r} stands there twice: give each a name of its own")


def rows_of_table(rows: Any) -> list[JSON]:
    """Dictionaries as they are, and the rows of a table of pandas.

    Raises:
        QuestionError: it is neither.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        _refuse_twice(list(rows.columns), "the table")
        rows = rows.to_dict("records")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise QuestionError(
            f"from_rows takes a list of dictionaries or a pandas.DataFrame; got {type(rows).__name__}. "
            "QuestionSet.from_folder reads a table's file, from_dataset a dataset"
        )
    rows = list(rows)
    for number, row in enumerate(rows):
        check_kind(f"row {number}", row, Mapping, QuestionError, "a dictionary of values by column")
    return [dict(row) for row in rows]


def names_in_dataset(dataset: Any) -> Sequence[str] | None:
    """Names of a dataset's columns, where they are known before its rows are read."""
    transformed = getattr(dataset, "format", {}).get("type") == "custom" if hasattr(dataset, "format") else False
    return None if transformed else dataset.column_names


def rows_of_dataset(dataset: Any) -> Iterator[JSON]:
    """The rows of a dataset. Pictures are tuples of functions: one that is broken spoils its own question only."""
    import datasets

    if names_in_dataset(dataset) is None and not isinstance(dataset, datasets.IterableDataset):  # a transform
        for number in range(len(dataset)):
            yield {name: _again(dataset, number, name, value) for name, value in dataset[number].items()}
        return
    features = dataset.features or {}
    pictured = [name for name, form in features.items() if _is_pictured(form)]
    dataset = dataset.with_format(None)
    if isinstance(dataset, datasets.IterableDataset):
        for name in pictured:
            dataset = dataset.cast_column(name, _undecoded(features[name])) if _is_decoded(features[name]) else dataset
        yield from (_named(row, features) for row in dataset)  # nobody could come back for a picture later
        return
    columns = {name: iter(_lazy(dataset, name)) for name in pictured}
    for row in dataset.remove_columns(pictured) if len(pictured) < len(features) else ({} for _ in range(len(dataset))):
        yield _named(row, features) | {name: next(cells) for name, cells in columns.items()}


def _again(dataset: object, number: int, name: str, value: object) -> object:
    """A cell that a transform made: pictures are made again when they are needed, and not kept."""
    if isinstance(value, Image.Image):
        return DatasetPicture(dataset, number, name)
    if isinstance(value, list | tuple) and any(isinstance(part, Image.Image) for part in value):
        return [
            DatasetPicture(dataset, number, name, place) if isinstance(part, Image.Image) else part
            for place, part in enumerate(value)
        ]
    return value


def _inner(form: Any) -> Any:
    """What a column's lists hold; the form itself where it holds none."""
    form = form[0] if isinstance(form, list) else form
    return form.feature if type(form).__name__ in ("List", "LargeList", "Sequence") else form


def _is_decoded(form: object) -> bool:
    return type(_inner(form)).__name__ in ("Image", "Audio", "Video")


def _is_pictured(form: object) -> bool:
    """Whether a column is made for pictures, sounds or videos, or lists of them, or for encoded files of any kind."""
    inner = _inner(form)
    return _is_decoded(form) or (isinstance(inner, Mapping) and set(inner) == {"bytes", "path"})


def _undecoded(form: Any) -> Any:
    import datasets

    kept = getattr(datasets, type(_inner(form)).__name__)(decode=False)
    if _inner(form) is form:
        return kept
    return [kept] if isinstance(form, list) else type(form)(kept)


def _lazy(dataset: Any, name: str) -> Iterator[Any]:
    """Each row's pictures of a column, unread: which there are is in Arrow's own books."""
    dataset = dataset.select_columns([name]).with_format("arrow")
    number = 0
    for table in dataset.iter(batch_size=1000):
        for chunk in table.column(name).chunks:
            for cell in _filled(chunk):
                if isinstance(cell, list):
                    yield [DatasetPicture(dataset, number, name, n) if there else None for n, there in enumerate(cell)]
                else:
                    yield DatasetPicture(dataset, number, name) if cell else ({} if cell is False else None)
                number += 1


def _filled(chunk: Any) -> list[Any]:
    """For each cell whether there is a picture; None for none at all, False for one without content."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    if pa.types.is_struct(chunk.type):
        known = [part for part in chunk.flatten() if not pa.types.is_null(part.type)]
        lengths = [pc.fill_null(pc.call_function("binary_length", [part]), 0).to_pylist() for part in known]
        return [any(n) if known else None for *n, known in zip(*lengths, chunk.is_valid().to_pylist(), strict=True)]
    parts = iter(_filled(chunk.flatten()))
    lengths = pc.call_function("list_value_length", [chunk]).to_pylist()
    return [None if n is None else [next(parts) for _ in range(n)] for n in lengths]


def _named(row: Mapping[str, object], features: Mapping[str, object]) -> JSON:
    """A row whose classes have their names; -1, which datasets have where there is none, is none."""

    def of(value: Any, form: Any) -> object:
        if hasattr(form, "int2str"):
            return form.int2str(value) if isinstance(value, int) and value >= 0 else None
        inner = _inner(form)
        return [of(part, inner) for part in value] if inner is not form and isinstance(value, list) else value

    return {name: of(value, features.get(name)) for name, value in row.items()}


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
        columns: the column of each field, or several, where it is not called as the field is.
        where: how errors call a row, before its number.
        start: number of the first row.
        folder: where paths of pictures begin, and which they may not leave.
        names: the columns that there are; by default those of all rows.
        options: those of every row, where the table has none.

    Raises:
        QuestionError: a column is not there, or a row is no question.
    """
    rows = rows if names is not None else list(rows)
    have = list(names if names is not None else dict.fromkeys(name for row in rows for name in row))
    column_of = _columns(columns, have, needed=names is not None)
    if options is not None and (column_of["options"] or "answers" in column_of):
        own = (*column_of["options"], *column_of.get("answers", ()))[0]
        raise QuestionError(
            f"options={options!r} are for every row, and the table has its own in {own!r}: leave one out"
        )
    questions = []
    for number, row in enumerate(rows, start=start):
        place = f"{where} {number}"
        fields, rest = {}, dict(row)
        for field, its in column_of.items():
            cells = [rest.pop(name) for name in its if name in rest]
            if len(its) == 1 and cells:
                fields[field] = cells[0]
            elif cells:
                filled = [not _is_empty(cell) for cell in cells]
                if field == "options" and sorted(filled, reverse=True) != filled:
                    raise QuestionError(f"{place}: option {its[filled.index(False)]!r} is empty, one after it is not")
                fields[field] = [cell for cell, there in zip(cells, filled, strict=True) if there]
        if options is not None:
            fields["options"] = options if isinstance(options, str) else list(options)
        questions.append(question_of_row(fields, rest, place, folder, column_of))
    return questions


def _columns(columns: JSONMapping | None, have: Sequence[object], *, needed: bool) -> dict[str, tuple[str, ...]]:
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
        _refuse_twice(twice, "columns")
    needs = ("question", "group", *(("answer",) if "answers" not in (columns or {}) else ()))
    for field in dict.fromkeys((*(columns or ()), *needs)):
        absent = [name for name in column_of[field] if name not in have]
        if absent and (needed or field in (columns or {})) and have:
            what = "dataset" if needed else "table"
            raise QuestionError(
                f"the {what} has no column {absent[0]!r} for {field!r}; it has {', '.join(map(str, have))}"
                f"{_advice(field, absent[0], have)}"
            )
    # A field's usual name is another field's column, or stays metadata, where the field has a column of its own.
    taken = {name for field in columns or {} for name in column_of[field]} | {"answers"}
    column_of = {name: its for name, its in column_of.items() if name in (columns or {}) or not taken.intersection(its)}
    return {name: tuple(one for one in its if one in have) for name, its in column_of.items()}


def _advice(field: str, name: str, have: Sequence[object]) -> str:
    """What the column may be called instead."""
    if field == "options":
        options = [column for column in have if _OPTION.fullmatch(str(column))]
        if len(options) > 1:
            return f". Did you mean columns={{'options': {options}}}?"
    low = {str(column).casefold(): str(column) for column in have}
    near = difflib.get_close_matches(name.casefold(), list(low), 1, cutoff=0.8)
    near += [word.casefold() for word in _OTHER_NAMES.get(field, ()) if word.casefold() in low]
    near += difflib.get_close_matches(name.casefold(), [one for one in low if one not in FIELDS], 1)
    found = low[near[0]] if near else None
    return f". Did you mean columns={{{field!r}: {found!r}}}?" if found and found != name else ""


def _is_empty(cell: object) -> bool:
    return is_missing(cell) or (isinstance(cell, str) and cell == "")


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
        rest: what else the row holds: letters of options, and metadata.
        where: how errors call the row.
        folder: where paths of pictures begin, and which they may not leave.
        column_of: the columns of each field, for errors.

    Raises:
        QuestionError: it is no question, or something of it would be lost.
    """
    rest = dict(rest)
    answers = _answers(fields["answers"], where) if "answers" in fields else []
    options = [] if answers and _is_empty(fields.get("options")) else _options(fields.get("options"), rest, where)
    is_open = bool(answers) and not options
    needs = ("question", "group") if is_open else ("question", "answer", "group")
    missing = [name for name in needs if _is_empty(fields.get(name))]
    missing = [name for name in missing if name != "answer" or fields.get(name) in (None, "")]
    if missing:
        names = [str(name) for name in (*fields, *rest)]
        raise QuestionError(
            f"{where}: no value for {', '.join(missing)}; the row has {', '.join(names)}"
            f"{'' if missing[0] in fields else _advice(missing[0], missing[0], names)}"
        )
    for name in ("question", "group"):
        if not isinstance(fields[name], str | int | float | np.generic):
            raise QuestionError(f"{where}: {name} is a text; got {type(fields[name]).__name__} {fields[name]!r:.80}")
    shown = {
        kind: _pictures(fields.get(kind), f"{where}, column {_its(kind, column_of)}", folder, kind) for kind in _MEDIA
    }
    pictures = tuple(source for sources in shown.values() for source in sources)
    refuse_unasked(rest, where, folder, pictures, column_of)
    question, group = str(fields["question"]), str(fields["group"])
    right = answer_index(fields["answer"], options, where) if 2 <= len(options) <= len(LETTERS) else 0
    if is_open and not _is_empty(fields.get("answer")):
        rest["answer"] = fields["answer"]  # nothing of a row is lost
    identity, image_id = (None if _is_empty(fields.get(name)) else str(fields[name]) for name in ("id", "image_id"))
    texts = tuple(map(str, options))
    if identity is None and folder is not None and pictures:  # the same wherever the folder lies
        named = [str(part.relative_to(folder) if isinstance(part, Path) else part) for part in pictures]
        identity = derived_id(question, texts, right, group, named, str(image_id), *([answers] if answers else []))
    try:
        item = Question(
            shown["image"][0] if len(shown["image"]) == 1 else shown["image"] or None,
            *(question, texts, right, group),
            id=identity or "",
            metadata=rest,
            image_id=image_id,
            audio=list(shown["audio"]),
            video=list(shown["video"]),
            answers=answers,
        )
    except QuestionError as error:
        raise QuestionError(f"{where}: {error}") from error
    for kind, sources in shown.items():
        for source in sources:
            if isinstance(source, str | Path) and (fault := _fault(Path(source))):
                raise QuestionError(f"{where}, column {_its(kind, column_of)}: the {_MEDIA[kind]} '{source}' {fault}")
    return item


def _its(field: str, column_of: Mapping[str, Sequence[str]] | None) -> str:
    """How errors call the columns of a field."""
    return ", ".join(map(repr, (column_of or {}).get(field) or (field,)))


def _fault(path: Path) -> str:
    """What keeps a file from being opened, as far as that can be told without opening it."""
    try:
        return "" if path.is_file() else "is no ordinary file" if path.exists() else "is not there"
    except (OSError, ValueError) as error:
        return f"is no path: {error}"


def _options(options: Any, rest: JSON, where: str) -> list[Any]:
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
    found = [part.get("answer") if isinstance(part, Mapping) else part for part in parts or ()]
    if not found or not all(isinstance(part, str | int | float | np.generic) and not _is_empty(part) for part in found):
        raise QuestionError(f"{where}: answers are texts that the question accepts, at least one; got {cell!r:.120}")
    return list(map(str, found))


def _lettered(rest: JSON, where: str) -> list[str]:
    """Options in columns of their own, ``A``, ``B`` … or ``a``, ``b`` …, which are taken out of the rest."""
    upper = [letter for letter in LETTERS if not _is_empty(rest.get(letter))]
    lower = [letter for letter in LETTERS.lower() if not _is_empty(rest.get(letter))]
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


def literal_list(text: str, what: str, advice: str = "") -> Any:
    """The list that a text spells, in JSON or in Python's own way; never run.

    Args:
        text: the text.
        what: how an error begins.
        advice: how it ends.

    Raises:
        QuestionError: it spells none for certain: two texts with nothing between them, as NumPy prints them, would be
            read as one.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = error
    if len(text) <= _LONGEST:
        try:
            value = ast.literal_eval(text.strip())
            tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
            texts = sum(token.type == tokenize.STRING for token in tokens)
            if isinstance(value, list | tuple) and texts in (0, sum(isinstance(part, str) for part in value)):
                return list(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            pass
    raise QuestionError(f"{what}; got {text!r:.200}{advice}") from found


def answer_index(answer: Any, options: Sequence[Any], where: str) -> int:
    """The index of the right option, from an index, a letter or the option's text.

    Raises:
        QuestionError: it is none of these, or two of them, and of different options.
    """
    if isinstance(answer, bool | np.bool_) or is_missing(answer):
        raise QuestionError(f"{where}: answer {answer!r} is neither an index, a letter nor an option's text")
    if isinstance(answer, float | np.floating) and float(answer).is_integer():
        answer = int(answer)  # as pandas has whole numbers in a column with holes
    text = str(answer).strip()
    same = [index for index, option in enumerate(options) if str(option).strip() == text][:1]
    place = None
    if isinstance(answer, int | np.integer) or re.fullmatch(r"-?\d{1,9}", text):
        place = int(answer)
        same = same or [index for index, option in enumerate(options) if _number(option) == place][:1]
    elif len(text) == 1 and text.upper() in LETTERS:
        place = LETTERS.index(text.upper())
    if same and place is not None and place not in same and 0 <= place < len(options):
        raise QuestionError(
            f"{where}: answer {answer!r} may mean the text of an option or its place; among options that are numbers "
            "give its letter, among letters its index"
        )
    found = same[0] if same else place
    if found is not None:
        return found
    raise QuestionError(f"{where}: answer {answer!r} is neither an index, a letter nor one of the options")


def _number(option: object) -> float | None:
    try:
        return float(str(option).replace("_", "x"))
    except ValueError:
        return None


# -- pictures ----------------------------------------------------------------------------------------------------------


def _parts(cell: object) -> list[Any]:
    """The pictures of a cell: one, or those of a list, which may stand there as its text."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = literal_list(cell, "a list of pictures must be a JSON list")
    if isinstance(cell, np.ndarray) and cell.dtype == object:
        cell = cell.tolist()
    return list(cell) if isinstance(cell, list | tuple) else [] if _is_empty(cell) else [cell]


def _pictures(cell: object, where: str, folder: Path | None, kind: str) -> tuple[Any, ...]:
    """The pictures, sounds or videos of a cell."""
    if kind == "video" and isinstance(cell, list | tuple) and cell and all(map(streams.is_frame, cell)):
        cell = [cell] if folder is None else [[_picture(one, where, folder, "image") for one in cell]]
    try:
        parts = [part for one in _parts(cell) for part in ([one] if _is_empty(one) or kind == "video" else _parts(one))]
    except QuestionError as error:
        raise QuestionError(f"{where}: {error}") from error
    return tuple(_picture(part, where, folder, kind) for part in parts)


def _picture(part: Any, where: str, folder: Path | None, kind: str) -> Any:
    """One picture, sound or video of a cell, in a form that `Question` takes."""
    if kind == "audio" and hasattr(part, "get_all_samples"):  # the decoder that `datasets` hands out
        sound = part.get_all_samples()
        part = {"array": np.asarray(sound.data), "sampling_rate": sound.sample_rate}
    check = {"audio": streams.check_sound, "video": streams.check_video}.get(kind)
    if isinstance(part, Mapping) and set(part) & {"bytes", "path"} and "array" not in part:
        part = part.get("bytes") or part.get("path")
    if check is not None and not isinstance(part, str | Path) and part is not None:
        if fault := check(part):
            raise QuestionError(f"{where}: {fault}")
        return part
    if _is_empty(part) or (isinstance(part, bytes | Mapping) and not part):
        raise QuestionError(
            f"{where}: a {_MEDIA[kind]} is empty: take it out of its list, or leave the whole cell empty"
        )
    if isinstance(part, str):
        if media.is_base64_picture(part):
            return Base64Picture(part)
        if media.is_url(part):
            raise QuestionError(f"{where}: {part!r:.120} is elsewhere, and nothing is fetched: save it, give its path")
        return part if folder is None else inside(folder, part, where)
    if isinstance(part, Path) and folder is not None:
        return inside(folder, str(part), where)
    if isinstance(part, Image.Image | bytes | Path) or callable(part):
        return part
    shape = ": PIL.Image.fromarray makes a picture of an array" if hasattr(part, "__array__") else ""
    raise QuestionError(
        f"{where}: a picture is a path, bytes, base64 text, {{'bytes', 'path'}} or a PIL image; got "
        f"{type(part).__name__} {part!r:.60}{shape}"
    )


def inside(folder: Path, name: str, where: str) -> Path:
    """A path of a table, which may not lead out of the table's folder.

    Raises:
        QuestionError: it does, or is no path.
    """
    try:
        within = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise QuestionError(f"{where}: {name!r:.200} is no path of a picture: {error}") from error
    if not within:
        raise QuestionError(f"{where}: the picture's path {name!r} leads out of the folder {folder}")
    return folder / name


def refuse_unasked(
    rest: Mapping[str, object],
    where: str,
    folder: Path | None,
    pictures: Sequence[object],
    column_of: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Refuse a row with a picture in a column that no field names: the question would be asked without it.

    Args:
        rest: the row's other columns.
        where: how errors call the row.
        folder: where paths begin.
        pictures: those that the question is asked with.
        column_of: the columns of each field.

    Raises:
        QuestionError: there is one; the message names the column.
    """
    own = {str(picture) for picture in pictures}
    found = [name for name, value in rest.items() if _holds_picture(value, folder, own, named=not pictures)]
    if found:
        name, value = found[0], rest[found[0]]
        kind = _kind(value)
        names = [*(column_of or {}).get("image", ("image",) if pictures else ()), *found]
        advice = {kind: names if kind == "image" and len(names) > 1 else name}
        raise QuestionError(
            f"{where}, column {name!r} holds a {_MEDIA[kind]}, {_described(value)}, that the question would be asked "
            f"without: give columns={advice}, or leave the column out to ask without it"
        )


def _holds_picture(value: object, folder: Path | None, own: set[str], *, named: bool, depth: int = 4) -> bool:
    """Whether a cell shows a picture in any of the forms that tables have for one.

    Args:
        value: the cell.
        folder: where paths begin.
        own: paths that the question is asked with.
        named: whether a mere name of a picture's file, which is not there, is one as well: where a question has no
            picture, it is more likely forgotten than meant as a remark.
        depth: how deep lists and dictionaries are looked through.
    """
    if isinstance(value, Image.Image | DatasetPicture | Base64Picture):
        return True
    if isinstance(value, bytes | bytearray):
        return media.has_signature(bytes(value[:16]))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] in (1, 3, 4)
    if isinstance(value, str) and value.startswith("[") and len(value) < _LONGEST:
        with contextlib.suppress(QuestionError):
            value = literal_list(value, "")
    if isinstance(value, str):
        return media.is_base64_picture(value) or _names_picture(value, folder, own, named)
    if hasattr(value, "get_all_samples"):
        return True
    if isinstance(value, Mapping):
        if {"array", "sampling_rate"} <= set(value):
            return True
        if value and set(value) <= {"bytes", "path"}:
            return bool(value.get("bytes") or value.get("path"))
        value = list(value.values())
    if isinstance(value, list | tuple | np.ndarray) and depth:
        return any(_holds_picture(part, folder, own, named=named, depth=depth - 1) for part in value)
    return False


def _names_picture(text: str, folder: Path | None, own: set[str], named: bool) -> bool:
    if not 0 < len(text) < 256 or "\n" in text:
        return False
    has_suffix = text.partition("?")[0].lower().endswith((*media.SUFFIXES, *streams.SOUNDS, *streams.VIDEOS))
    if media.is_url(text) or (named and has_suffix and " " not in text.strip()):
        return named and has_suffix
    path = Path(text) if folder is None else folder / text
    if str(path) in own or (folder is None and not has_suffix):
        return False
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return has_suffix or media.has_signature(file.read(16))
    except (OSError, ValueError):  # it cannot be a path
        return False


def _first(value: object) -> object:
    """What a cell holds, or the first of several."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def _kind(value: object) -> str:
    """The field that asks with what a cell holds, as its file's name has it; else that of pictures."""
    value = _first(value)
    if isinstance(value, DatasetPicture):
        cell = value()
        value = cell.get("path") if isinstance(cell, Mapping) else cell
    name = str(value.get("path") if isinstance(value, Mapping) else value).partition("?")[0].lower()
    return "audio" if name.endswith(streams.SOUNDS) else "video" if name.endswith(streams.VIDEOS) else "image"


def _described(value: object) -> str:
    value = _first(value)
    if isinstance(value, DatasetPicture):
        return "an encoded file"
    return f"{value!r:.60}" if isinstance(value, str) else f"a {type(value).__name__}"
