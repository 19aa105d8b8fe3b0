"""What the cells of a table hold: lists that are written as texts, and pictures, sounds and videos in any form.

No picture is dropped. A cell that holds one, and that no field of the question names, would become metadata of a
question that is asked without it: `refuse_unasked` finds such cells.
"""

import ast
import contextlib
import io
import json
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmneurons.checks import is_missing
from vlmneurons.errors import QuestionError
from vlmneurons.questions import media, streams
from vlmneurons.questions.media import Base64Picture, DatasetPicture

MEDIA = {"image": "picture", "audio": "sound", "video": "video"}
"""A question's fields that are shown or heard, and what errors call their content."""

_LONGEST = 20_000
"""Characters of the longest text that is read as a list of Python's; a longer one is no list of options."""


def is_empty(cell: object) -> bool:
    """Whether a cell holds nothing: None, NaN or an empty text."""
    return is_missing(cell) or (isinstance(cell, str) and cell == "")


def literal_list(text: str, fault: str, advice: str = "") -> Any:
    """The list that a text spells, as JSON or as Python writes it. The text is read as data, never run.

    Args:
        text: the text.
        fault: how an error begins.
        advice: how it ends.

    Raises:
        QuestionError: the text spells no list for certain. Two texts with nothing between them, as NumPy prints them,
            are refused, as Python would read them as one.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        no_json = error
    if len(text) <= _LONGEST:
        try:
            value = ast.literal_eval(text.strip())
            tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
            texts = sum(token.type == tokenize.STRING for token in tokens)
            if isinstance(value, list | tuple) and texts in (0, sum(isinstance(part, str) for part in value)):
                return list(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            pass
    raise QuestionError(f"{fault}; got {text!r:.200}{advice}") from no_json


def file_fault(path: Path) -> str:
    """What keeps a file from being opened, as far as that can be told without opening it; empty where nothing does."""
    try:
        return "" if path.is_file() else "is no ordinary file" if path.exists() else "is not there"
    except (OSError, ValueError) as error:
        return f"is no path: {error}"


def _parts(cell: object) -> list[Any]:
    """The pictures of a cell: one, or those of a list or of its text."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = literal_list(cell, "a list of pictures must be a JSON list")
    if isinstance(cell, np.ndarray) and cell.dtype == object:
        cell = cell.tolist()
    return list(cell) if isinstance(cell, list | tuple) else [] if is_empty(cell) else [cell]


def pictures_of_cell(cell: object, where: str, folder: Path | None, kind: str) -> tuple[Any, ...]:
    """The pictures, sounds or videos of a cell."""
    if kind == "video" and isinstance(cell, list | tuple) and cell and all(map(streams.is_frame, cell)):
        cell = [cell] if folder is None else [[_picture(frame, where, folder, "image") for frame in cell]]
    try:
        parts = _parts(cell)
        if kind != "video":  # several columns, each of which may hold a list
            parts = [part for cell in parts for part in ([cell] if is_empty(cell) else _parts(cell))]
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
    if is_empty(part) or (isinstance(part, bytes | Mapping) and not part):
        raise QuestionError(
            f"{where}: a {MEDIA[kind]} is empty: take it out of its list, or leave the whole cell empty"
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
    """A path that a table names, which may not lead out of the table's folder.

    Raises:
        QuestionError: it leads out, or is no path.
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
        where: what errors call the row.
        folder: the folder that paths are relative to.
        pictures: those that the question is asked with.
        column_of: the columns of each field.

    Raises:
        QuestionError: there is such a picture; the message names the column.
    """
    asked_with = {str(picture) for picture in pictures}
    unasked = [name for name, value in rest.items() if _holds_picture(value, folder, asked_with, named=not pictures)]
    if unasked:
        name, value = unasked[0], rest[unasked[0]]
        kind = _kind(value)
        names = [*(column_of or {}).get("image", ("image",) if pictures else ()), *unasked]
        advice = {kind: names if kind == "image" and len(names) > 1 else name}
        raise QuestionError(
            f"{where}, column {name!r} holds a {MEDIA[kind]}, {_described(value)}, that the question would be asked "
            f"without: give columns={advice}, or leave the column out to ask without it"
        )


def _holds_picture(value: object, folder: Path | None, asked_with: set[str], *, named: bool, depth: int = 4) -> bool:
    """Whether a cell holds a picture in any of the forms that tables have for one.

    Args:
        value: the cell.
        folder: the folder that paths are relative to.
        asked_with: paths of the pictures that the question is asked with.
        named: whether the mere name of a picture's file counts, though no such file exists. It does where a question
            has no picture: then the picture was more likely forgotten than named as a remark.
        depth: how deep lists and dictionaries are searched.
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
        return media.is_base64_picture(value) or _names_picture(value, folder, asked_with, named)
    if hasattr(value, "get_all_samples"):
        return True
    if isinstance(value, Mapping):
        if {"array", "sampling_rate"} <= set(value):
            return True
        if value and set(value) <= {"bytes", "path"}:
            return bool(value.get("bytes") or value.get("path"))
        value = list(value.values())
    if isinstance(value, list | tuple | np.ndarray) and depth:
        return any(_holds_picture(part, folder, asked_with, named=named, depth=depth - 1) for part in value)
    return False


def _names_picture(text: str, folder: Path | None, asked_with: set[str], named: bool) -> bool:
    """Whether a text is the path or the address of a picture that the question is not asked with."""
    if not 0 < len(text) < 256 or "\n" in text:
        return False
    has_suffix = text.partition("?")[0].lower().endswith((*media.SUFFIXES, *streams.SOUNDS, *streams.VIDEOS))
    if media.is_url(text) or (named and has_suffix and " " not in text.strip()):
        return named and has_suffix
    path = Path(text) if folder is None else folder / text
    if str(path) in asked_with or (folder is None and not has_suffix):
        return False
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return has_suffix or media.has_signature(file.read(16))
    except (OSError, ValueError):  # the text is no path
        return False


def _first(value: object) -> object:
    """A cell's value, or the first of its list."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def _kind(value: object) -> str:
    """The field that a cell's value belongs to, by the end of its file's name; by default that of pictures."""
    value = _first(value)
    if isinstance(value, DatasetPicture):
        cell = value()
        value = cell.get("path") if isinstance(cell, Mapping) else cell
    name = str(value.get("path") if isinstance(value, Mapping) else value).partition("?")[0].lower()
    return "audio" if name.endswith(streams.SOUNDS) else "video" if name.endswith(streams.VIDEOS) else "image"


def _described(value: object) -> str:
    """A cell's value in a few words, for a message."""
    value = _first(value)
    if isinstance(value, DatasetPicture):
        return "an encoded file"
    return f"{value!r:.60}" if isinstance(value, str) else f"a {type(value).__name__}"
