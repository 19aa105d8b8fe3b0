"""Where rows come from: the table of a folder, a dataset of `datasets`, dictionaries, or a table of pandas.

A row is a dictionary of values by column. Nothing of a source is dropped: columns of the same name and surplus cells
are refused. `vlmneurons.questions.tables` makes questions of the rows.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmneurons.checks import JSON, check_kind
from vlmneurons.errors import QuestionError
from vlmneurons.questions.media import DatasetPicture


def rows_of_folder(folder: Path, table: str | None) -> tuple[Path, list[JSON]]:
    """The table of a folder, and its rows.

    Raises:
        QuestionError: no table or several, or one that cannot be read without losing something.
    """
    if table is None:
        tables = sorted(path.name for path in folder.glob("*") if path.suffix in (".csv", ".tsv", ".jsonl"))
        if len(tables) != 1:
            has = f"{len(tables)}: {', '.join(tables)}" if tables else "none"
            raise QuestionError(f"{folder} must hold one .csv, .tsv or .jsonl table; it has {has}. Name one: table=…")
        table = tables[0]
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
    return path, _json_lines(text, path) if path.suffix == ".jsonl" else _separated(text, path)


def _separated(text: str, path: Path) -> list[JSON]:
    """The rows of a .csv or .tsv table; every cell is a text.

    pandas would read more of such tables, but it numbers columns of the same name and drops a row's surplus cells.
    """
    cells = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        rows = list(cells)
    except csv.Error as error:
        hint = "; a picture as text belongs into a .jsonl table" if "limit" in str(error) else ""
        raise QuestionError(f"{path}, after line {cells.line_num}, cannot be read: {error}{hint}") from error
    refuse_twice(cells.fieldnames or (), str(path))
    for number, row in enumerate(rows, start=1):
        surplus = [cell for cell in row.pop(None, None) or () if cell]
        if surplus:
            raise QuestionError(
                f"{path}, row {number} has more cells than there are columns, such as {surplus[0][:60]!r}: put texts "
                "that hold the separator into quotation marks"
            )
    return rows


def _json_lines(text: str, path: Path) -> list[JSON]:
    """The rows of a .jsonl table: one dictionary a line."""

    def dictionary(pairs: list[tuple[str, object]]) -> JSON:
        refuse_twice([name for name, _ in pairs], f"{path}, line {number}")
        return dict(pairs)

    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=dictionary)
        except QuestionError:
            raise
        except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
            raise QuestionError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise QuestionError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    return rows


def refuse_twice(names: Sequence[object], where: str) -> None:
    """Refuse two columns of the same name, of which one would be lost."""
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise QuestionError(f"{where}: the column {twice[0]!r} stands there twice: give each a name of its own")


def rows_of_table(rows: Any) -> list[JSON]:
    """Dictionaries as they are, or the rows of a table of pandas.

    Raises:
        QuestionError: the rows are neither.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        refuse_twice(list(rows.columns), "the table")
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
    """The names of a dataset's columns; None where a transform makes the columns, row by row."""
    return None if getattr(dataset, "format", {}).get("type") == "custom" else dataset.column_names


def rows_of_dataset(dataset: Any) -> Iterator[JSON]:
    """The rows of a dataset. Pictures are read when they are needed: a broken one spoils its own question only."""
    import datasets

    if names_in_dataset(dataset) is None and not isinstance(dataset, datasets.IterableDataset):  # a transform
        for number in range(len(dataset)):
            yield {name: _transformed_cell(dataset, number, name, cell) for name, cell in dataset[number].items()}
        return
    features = dataset.features or {}
    media = [name for name, feature in features.items() if _holds_media(feature)]
    dataset = dataset.with_format(None)
    if isinstance(dataset, datasets.IterableDataset):  # it is read once: pictures are kept, but as encoded files
        for name in media:
            feature = features[name]
            dataset = dataset.cast_column(name, _undecoded(feature)) if _is_decoded(feature) else dataset
        yield from (_with_class_names(row, features) for row in dataset)
        return
    columns = {name: iter(_lazy(dataset, name)) for name in media}
    for row in dataset.remove_columns(media) if len(media) < len(features) else ({} for _ in range(len(dataset))):
        yield _with_class_names(row, features) | {name: next(cells) for name, cells in columns.items()}


def _transformed_cell(dataset: object, number: int, name: str, value: object) -> object:
    """A cell that a transform made. Its pictures are not kept, but made again when they are needed."""
    if isinstance(value, Image.Image):
        return DatasetPicture(dataset, number, name)
    if isinstance(value, list | tuple) and any(isinstance(part, Image.Image) for part in value):
        return [
            DatasetPicture(dataset, number, name, place) if isinstance(part, Image.Image) else part
            for place, part in enumerate(value)
        ]
    return value


def _inner(feature: Any) -> Any:
    """What a column's lists hold; the feature itself where it holds no lists."""
    feature = feature[0] if isinstance(feature, list) else feature
    return feature.feature if type(feature).__name__ in ("List", "LargeList", "Sequence") else feature


def _is_decoded(feature: object) -> bool:
    """Whether `datasets` decodes what a column holds: pictures, sounds or videos, or lists of them."""
    return type(_inner(feature)).__name__ in ("Image", "Audio", "Video")


def _holds_media(feature: object) -> bool:
    """Whether a column is made for pictures, sounds or videos, or lists of them, or for encoded files of any kind."""
    inner = _inner(feature)
    return _is_decoded(feature) or (isinstance(inner, Mapping) and set(inner) == {"bytes", "path"})


def _undecoded(feature: Any) -> Any:
    """The same feature, whose files stay encoded."""
    import datasets

    kept = getattr(datasets, type(_inner(feature)).__name__)(decode=False)
    if _inner(feature) is feature:
        return kept
    return [kept] if isinstance(feature, list) else type(feature)(kept)


def _lazy(dataset: Any, name: str) -> Iterator[Any]:
    """The cells of a column of pictures, unread: Arrow's lengths say which pictures there are."""
    dataset = dataset.select_columns([name]).with_format("arrow")
    number = 0
    for table in dataset.iter(batch_size=1000):
        for chunk in table.column(name).chunks:
            for filled in _filled(chunk):
                if isinstance(filled, list):
                    yield [
                        DatasetPicture(dataset, number, name, n) if is_full else None
                        for n, is_full in enumerate(filled)
                    ]
                else:
                    yield DatasetPicture(dataset, number, name) if filled else ({} if filled is False else None)
                number += 1


def _filled(chunk: Any) -> list[Any]:
    """For each cell whether it holds a picture: None where the cell is empty, False for a picture without content."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(chunk, pa.ExtensionArray):
        chunk = chunk.storage
    if pa.types.is_struct(chunk.type):  # {"bytes", "path"}: a picture has content where either has a length
        fields = [field for field in chunk.flatten() if not pa.types.is_null(field.type)]
        lengths = [pc.fill_null(pc.call_function("binary_length", [field]), 0).to_pylist() for field in fields]
        rows = zip(*lengths, chunk.is_valid().to_pylist(), strict=True)
        return [any(row_lengths) if is_valid else None for *row_lengths, is_valid in rows]
    parts = iter(_filled(chunk.flatten()))
    lengths = pc.call_function("list_value_length", [chunk]).to_pylist()
    return [None if n is None else [next(parts) for _ in range(n)] for n in lengths]


def _with_class_names(row: Mapping[str, object], features: Mapping[str, object]) -> JSON:
    """A row in which classes stand by name; -1, which datasets have for a missing class, becomes None."""

    def named(value: Any, feature: Any) -> object:
        if hasattr(feature, "int2str"):
            return feature.int2str(value) if isinstance(value, int) and value >= 0 else None
        inner = _inner(feature)
        if inner is not feature and isinstance(value, list):
            return [named(part, inner) for part in value]
        return value

    return {name: named(value, features.get(name)) for name, value in row.items()}
