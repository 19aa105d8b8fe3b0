"""CVQA: culturally diverse questions about pictures, in 39 pairs of a language and a country.

Romero et al. 2024 (arXiv 2406.05967), ``afaji/cvqa`` on the Hub: one split, 10,374 rows, four options each. The public
copy keeps its answers secret (``Label`` is -1, a leaderboard holds them), so a study needs a labelled copy: a parquet
or arrow copy with labels, a TSV as VLMEvalKit converts it, or the public rows with ``labels=…``. A row's licence is its
picture's; nothing of the dataset is part of this library.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlmneurons.checks import JSON, abridged, as_whole, check_choice, check_kind
from vlmneurons.errors import QuestionError
from vlmneurons.questions.cells import inside, literal_list, refuse_unasked
from vlmneurons.questions.media import Base64Picture
from vlmneurons.questions.question import Question, why_outside
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.questions.sources import rows_of_dataset
from vlmneurons.questions.tables import question_of_row

log = logging.getLogger(__name__)

LANGUAGES = {
    "english": ("Translated Question", "Translated Options"),
    "local": ("Question", "Options"),
}
"""The columns of the question and its options in each language."""

_FIELD_COLUMNS = {"index", "question", "a", "b", "c", "d", "answer", "image", "image_path", "subset", "id"}
"""Columns of a TSV that are no metadata."""
_METADATA = {"Category": "category", "Image Type": "image_type", "Image Source": "image_source", "License": "license"}
_RATIO, _UNPACKED = 50, 2**28
"""A parquet may unpack to so many times its size, and always to so many bytes."""


def load_cvqa(
    source: object = "afaji/cvqa",
    *,
    language: str = "english",
    group_by: str | Callable[[Question], str] = "country",
    min_items: int = 1,
    per_group: int | None = None,
    seed: int = 0,
    labels: Mapping[str, int | str] | None = None,
    countries: Mapping[str, str] | None = None,
    revision: str | None = None,
    split: str = "test",
    on_error: str = "raise",
    **settings: Any,
) -> QuestionSet:
    """The questions of CVQA, grouped; pictures stay encoded until they are needed.

    Args:
        source: the dataset's name on the Hub; a file (``.parquet``, ``.arrow`` or ``.tsv``) or a folder of parquet or
            arrow files or one that ``Dataset.save_to_disk`` wrote; or a `datasets.Dataset`. A TSV has the columns
            ``index``, ``question``, ``A`` to ``D``, ``answer`` and ``image`` (base64, or the index of the row whose
            picture it shares) or ``image_path``; for grouping also ``Subset``, or ``country`` and ``language``.
        language: ``"english"`` (the translations) or ``"local"``. A TSV holds one language, whichever is asked for.
        group_by: ``"country"`` (ISO 3166 alpha-3, such as ``EGY``), ``"subset"`` (``"Telugu (IND)"``),
            ``"category"``, ``"language"``, any other metadata, or a function of the question.
        min_items: groups with fewer questions are left out, and named in the log.
        per_group: take this many questions of every group, chosen by a seeded hash of their ids; by default all.
        seed: of that choice.
        labels: the right option of each ``ID`` (an index from 0, a letter, or the option's text), in place of the
            dataset's own.
        countries: ISO codes of country names that `pycountry` does not know.
        revision: commit, tag or branch on the Hub.
        split: of the Hub dataset.
        on_error: what to do with a row that is no question, such as one whose right option stands there twice:
            ``"raise"``, or ``"skip"`` it (the log names it). A label outside the options is never skipped.
        **settings: ``prompt``, ``answer``, ``shuffle`` of the `QuestionSet`.

    Returns:
        Questions whose metadata has ``country``, ``country_name``, ``language``, ``subset`` and ``category``.

    Raises:
        QuestionError: the labels are secret, a row is no question (which one is said), or no group is large enough.

    Source: Romero et al. 2024 (arXiv 2406.05967).

    Example:
        ``load_cvqa("cvqa_labelled.parquet", group_by="country", min_items=100, per_group=100)``
    """
    check_choice("language", language, LANGUAGES, QuestionError)
    check_choice("on_error", on_error, ("raise", "skip"), QuestionError)
    min_items = as_whole("min_items", min_items, QuestionError)
    per_group = None if per_group is None else as_whole("per_group", per_group, QuestionError, least=1)
    name, source_rows = _rows(source, language, revision, split)
    rows = list(source_rows)
    if labels is not None:
        for row in rows:
            if row.id not in labels:
                raise QuestionError(f"{row.where}: labels has no entry for ID {row.id!r}")
            row.fields["answer"] = labels[row.id]
    if not rows:
        raise QuestionError(f"{name} has no rows")
    _refuse_secret_labels(name, rows)
    questions = []
    codes = {str(key).casefold(): value for key, value in (countries or {}).items()}
    for row in rows:
        try:
            questions.append(_question(row, codes))
        except QuestionError as error:
            if on_error == "raise":
                raise
            log.warning("skipped: %s", error)
    if skipped := len(rows) - len(questions):
        log.warning("%d of %d rows of %s are no questions and were skipped", skipped, len(rows), name)
    grouped = QuestionSet(questions, **settings).group_by(group_by)
    kept = grouped.at_least(min_items)
    thin = [f"{group} ({n})" for group, n in grouped.counts().items() if group not in kept.groups]
    if thin:
        log.warning("left out, with fewer than %d questions: %s", min_items, abridged(thin, 50))
    return kept if per_group is None else kept.balanced(per_group, seed=seed)


@dataclass(frozen=True)
class _Row:
    """A row, whatever form it was stored in: a question's fields, and its metadata."""

    where: str
    id: str
    fields: JSON
    subset: object
    metadata: JSON


# -- where rows come from ----------------------------------------------------------------------------------------------


def _rows(source: Any, language: str, revision: str | None, split: str) -> tuple[str, Iterator[_Row]]:
    """The name of the source, for messages, and its rows."""
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return "the dataset", _dataset_rows(source, language)
    check_kind("source", source, (str, os.PathLike), QuestionError, "a name on the Hub, a path or a datasets.Dataset")
    path = Path(os.fspath(source))
    if not path.exists():
        if path.suffix in (".parquet", ".arrow", ".tsv", ".csv") or str(source).count("/") != 1 or path.is_absolute():
            raise QuestionError(f"there is no file or folder {os.fspath(source)!r}")
        return str(source), _dataset_rows(_from_hub(str(source), revision, split), language)
    if not path.is_dir() and not path.is_file():
        raise QuestionError(f"{path} is no ordinary file")  # a pipe would be waited for without end
    if path.suffix in (".tsv", ".csv"):
        return str(path), _table_rows(path)
    return str(path), _dataset_rows(_from_disk(path, split), language)


def _from_hub(name: str, revision: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        raise QuestionError(
            f"the dataset {name!r} cannot be loaded from the Hub ({type(error).__name__}: {error}). Give the path of a "
            "local copy if this machine has no network"
        ) from error


def _from_disk(path: Path, split: str) -> Any:
    """A dataset from parquet or arrow files, memory-mapped."""
    import datasets

    if path.is_dir() and (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow"))
    if not files:
        raise QuestionError(f"{path} holds no .parquet or .arrow file, and is no folder that save_to_disk wrote")
    # A copy of a repository holds the files of every split.
    of_split = [file for file in files if file.name.startswith(f"{split}-")] or files
    for file in of_split:
        _check_unpacked_size(file)
    try:
        if of_split[0].suffix == ".arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in of_split])
        return datasets.Dataset.from_parquet([str(file) for file in of_split])
    except Exception as error:
        raise QuestionError(f"{path} cannot be read as a dataset ({type(error).__name__}: {error})") from error


def _check_unpacked_size(path: Path) -> None:
    """Refuse a parquet that unpacks to far more than questions and pictures do: it would fill memory and disk.

    Pictures are compressed already, and texts compress to a twentieth at best; a file that is a hundredth of its
    content holds one value many times. The sizes that a parquet states are summed first. They can say little, as a
    repeated value is stored once, so rows are then read, a few at a time, until they are too much.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise QuestionError(f"{path} is no ordinary file")
    if path.suffix != ".parquet":
        return  # Arrow's own files are mapped, not unpacked
    most = max(_UNPACKED, _RATIO * path.stat().st_size)
    try:
        file = pq.ParquetFile(path)
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        total = sum(group.column(n).total_uncompressed_size for group in groups for n in range(group.num_columns))
        read, batches = 0, file.iter_batches(batch_size=16)
        while total <= most and (batch := next(batches, None)) is not None:
            read += batch.nbytes
            total = max(total, read)
    except (OSError, pa.ArrowException):
        return  # the error is raised where the file is read
    if total > most:
        raise QuestionError(
            f"{path} has {path.stat().st_size / 2**20:,.2f} MiB and unpacks to {'over ' if total == read else ''}"
            f"{total / 2**20:,.0f} MiB, more than {_RATIO} times as much: no table of questions does. If it is right, "
            "give its rows to load_cvqa as a datasets.Dataset"
        )


def _dataset_rows(dataset: Any, language: str) -> Iterator[_Row]:
    question, options = LANGUAGES[language]
    missing = [name for name in ("image", "ID", "Subset", question, options, "Label") if name not in dataset.features]
    if missing:
        raise QuestionError(
            f"the dataset has no column {', '.join(map(repr, missing))}; it has {', '.join(dataset.column_names)}. "
            "For other datasets use QuestionSet.from_dataset(dataset, columns={…})"
        )
    for n, values in enumerate(rows_of_dataset(dataset)):
        where = f"row {n} (ID {values['ID']!r})"
        if not values["image"]:
            raise QuestionError(f"{where}: the row has no picture")
        rest = {name: value for name, value in values.items() if name != "image"}
        refuse_unasked(rest, where, None, [values["image"]])
        fields = {
            "image": values["image"],
            "question": values[question],
            "options": _options(values[options], f"{where}, column {options!r}"),
            "answer": values["Label"],
        }
        metadata = {key: values[column] for column, key in _METADATA.items() if column in values}
        yield _Row(where, str(values["ID"]), fields, values["Subset"], metadata)


def _table_rows(path: Path) -> Iterator[_Row]:
    """Rows of a TSV as VLMEvalKit writes it."""
    import pandas as pd

    try:
        # Every cell is text: "None", "NA" and "1.0" are options, not missing values or numbers.
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise QuestionError(f"{path} cannot be read as a table: {error}") from error
    names = {str(column).casefold(): column for column in table.columns}
    missing = [name for name in ("index", "question", "a", "b", "c", "d", "answer") if name not in names]
    if missing:
        raise QuestionError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, table.columns))}"
        )
    picture = next((name for name in ("image", "image_path") if name in names), None)
    if picture is None:
        raise QuestionError(f"{path} has no column 'image' (base64) or 'image_path'")
    index = [str(value) for value in table[names["index"]]]
    cells = [str(value) for value in table[names[picture]]]
    place = {name: n for n, name in enumerate(index)}
    for n, values in enumerate(table.to_dict("records")):
        where = f"{path}, row {n + 1} (index {index[n]!r})"
        cell = cells[n]
        if not cell:
            raise QuestionError(f"{where}: the row has no picture")
        if picture == "image_path":
            image: Any = inside(path.parent, cell, where)
        else:
            if len(cell) <= 64 and cell in place:  # the picture of another row
                cell = cells[place[cell]]
            image = cell if cell.lstrip().startswith("[") else Base64Picture(cell)
        low = {name: values[column] for name, column in names.items()}
        fields = {
            "image": image,
            "question": low["question"],
            "options": [low[letter] for letter in "abcd" if low[letter] != ""],
            "answer": low["answer"],
        }
        subset: Any = low.get("subset")
        if subset in (None, "") and "country" in low:
            subset = (low.get("language", ""), low["country"])
        metadata = {name: value for name, value in low.items() if name not in _FIELD_COLUMNS}
        yield _Row(where, low.get("id") or index[n], fields, subset, metadata)


# -- one row -----------------------------------------------------------------------------------------------------------


def _question(row: _Row, codes: Mapping[str, str]) -> Question:
    metadata = dict(row.metadata)
    if row.subset not in (None, ""):
        language, country = parse_subset(row.subset, row.where)
        name = country.replace("_", " ")
        code = codes.get(name.casefold()) or codes.get(country.casefold()) or _country_code(name, row.where)
        metadata.update(
            subset=f"{language.replace('_', ' ')} ({code})" if language else code,
            language=language.replace("_", " "),
            country=code,
            country_name=name,
        )
    # The group is what group_by makes of it later; until then every row has one.
    fields = {**row.fields, "id": row.id, "group": metadata.get("country", "all")}
    return question_of_row(fields, metadata, row.where)


def parse_subset(subset: object, where: str = "Subset") -> tuple[str, str]:
    """Language and country of a ``Subset`` cell, which CVQA stores as text: ``"('Telugu', 'India')"``.

    The text is read as data, never run.

    Raises:
        QuestionError: the cell is no pair of two texts.

    Examples:
        >>> parse_subset("('Telugu', 'India')")
        ('Telugu', 'India')
    """
    pair = _text_list(subset, 2)
    if pair is None or not pair[1].strip():
        raise QuestionError(f"{where}: Subset must be a pair such as \"('Telugu', 'India')\"; got {_shown(subset)}")
    return pair[0].strip(), pair[1].strip()


def _options(value: object, where: str) -> list[str]:
    """The options of a cell: a list, or the text of one, as the dataset's oldest revisions have it."""
    options = _text_list(value, 4)
    if options is None:
        raise QuestionError(
            f"{where}: options must be a list of 4 texts, or the text of one such as \"['a', 'b', 'c', 'd']\"; "
            f"got {_shown(value)}"
        )
    return options


def _text_list(value: object, length: int) -> list[str] | None:
    """The texts of a list of this length, or of a text that spells one; None for anything else."""
    texts: Any = value
    with contextlib.suppress(QuestionError):
        texts = literal_list(value, "no list") if isinstance(value, str) else value
    if hasattr(texts, "tolist"):
        texts = texts.tolist()
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) != length:
        return None
    return list(texts) if all(isinstance(text, str) for text in texts) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


@cache
def _alpha_3(name: str) -> str | None:
    """The ISO code of a country's name; None where `pycountry` knows none for certain."""
    try:
        import pycountry
    except ImportError as error:
        raise QuestionError("country names need the package pycountry: pip install 'vlmneurons[cvqa]'") from error
    try:
        return str(pycountry.countries.lookup(name).alpha_3)
    except LookupError:
        pass
    try:
        codes = {country.alpha_3 for country in pycountry.countries.search_fuzzy(name)}
    except LookupError:
        return None
    return str(codes.pop()) if len(codes) == 1 else None  # "Korea" may be either


def _country_code(name: str, where: str) -> str:
    code = _alpha_3(name)
    if code is None:
        raise QuestionError(
            f"{where}: {name!r} is no country name that pycountry knows for certain; say what it is: "
            f"countries={{{name!r}: 'XYZ'}}"
        )
    return code


def _refuse_secret_labels(name: str, rows: Sequence[_Row]) -> None:
    """Refuse -1 and other labels of no option: Python takes -1 for the last option, and some scripts scored it so."""
    outside = []
    for row in rows:
        label = row.fields["answer"]
        number = int(label) if isinstance(label, str) and label.strip().lstrip("-").isdigit() else label
        options = row.fields["options"]
        index = number if isinstance(number, int | float) and not isinstance(number, bool) else None
        misses = index is not None and not 0 <= index < len(options) and str(label) not in options
        if label is None or label == "" or misses:
            outside.append(row)
    if outside:
        count = f"all {len(rows):,}" if len(outside) == len(rows) else f"{len(outside):,} of {len(rows):,}"
        labels = {str(row.fields["answer"]).strip() for row in outside}
        why = (
            ". The public copy of CVQA keeps its answers secret (Label -1). Use a labelled copy (parquet, or the TSV "
            "of VLMEvalKit), or give labels={ID: answer}"
        )
        if not labels & {"-1", "", "None"}:
            why = why_outside([4], 4) if labels == {"4"} else ". Correct these rows, or give labels={ID: answer}"
        raise QuestionError(
            f"{name}: Label is {outside[0].fields['answer']!r} in {count} rows (first: {outside[0].where}), but the "
            f"options are 0–3{why}"
        )
