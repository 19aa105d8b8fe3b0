"""Putting the parts of a run together: `KnockoutResult.join`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmneurons.checks import JSON
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files.folders import RunFolder
from vlmneurons.files.parts import PartFolder, parts_of
from vlmneurons.study.result import NOT_ASKED, RUN, KnockoutResult, chance_of


def join_results(folders: Sequence[str | Path], out: Path) -> KnockoutResult:
    """See `KnockoutResult.join`."""
    parts, manifest, about = parts_of(folders, RUN)
    result = _joined(parts, about["ids"])
    if (out / "knockout.json").exists() and not (out / "manifest.json").exists():
        raise MismatchError(f"{out} holds a result that was saved there: give another folder")
    run = RunFolder(out, manifest, about)
    with run.opened():
        result.save(out)
        run.clear()  # of a run that was begun there undivided
    return result


def _joined(parts: Sequence[PartFolder], order: Sequence[str]) -> KnockoutResult:
    """One result of all parts, the questions in the order of the whole."""
    results = [_result_in(part) for part in parts]
    first = results[0]
    there = {name for one in results for name in one.ids}
    ids = [name for name in order if name in there]
    place = {name: number for number, name in enumerate(ids)}
    columns = [np.array([place[name] for name in one.ids], dtype=np.int64) for one in results]

    def whole(name: str, missing: object, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        values = [getattr(one, name) for one in results]
        table = np.full((*shape, len(ids)), missing, dtype=dtype)
        for where, value in zip(columns, values, strict=True):
            if value is not None:
                table[..., where] = value
        return table

    rows = (1 + len(first.masks),)
    answers, chosen = whole("answers", 0, np.int64, ()), whole("chosen", NOT_ASKED, np.int64, rows)
    margins, groups = whole("margins", np.nan, np.float64, rows), whole("groups", None, object, ())
    texts, asked = whole("texts", None, object, rows), whole("asked", True, bool, rows)
    scores = None if first.scores is None else whole("scores", np.nan, np.float64, rows)
    pictures = whole("pictures", None, object, ())
    return KnockoutResult(
        ids=tuple(ids),
        groups=tuple(groups),
        answers=answers,
        masks=first.masks,
        chosen=chosen,
        margins=margins,
        provenance=_provenance(parts[0], results, order, ids),
        texts=None if all(text is None for text in texts.flat) else texts,
        controls=first.controls,
        pictures=None if first.pictures is None else tuple(pictures),
        asked=asked,
        scores=scores,
    )


def _result_in(part: PartFolder) -> KnockoutResult:
    if not (part.folder / "knockout.json").exists():
        raise MismatchError(f"part {part.name} in {part.folder} is not finished: the same call goes on with it")
    result = KnockoutResult.load(part.folder)
    if result.provenance.get("part") != part.name:
        raise FileFormatError(f"{part.folder}: knockout.json is not of part {part.name}, as manifest.json says")
    part.refuse_unfinished([*result.ids, *result.provenance["skipped"]])
    return result


def _provenance(part: PartFolder, results: Sequence[KnockoutResult], order: Sequence[str], ids: Sequence[str]) -> JSON:
    """That of the undivided run: what is told of some questions, told of all."""
    options = dict(zip(order, part.about["options"], strict=True))
    skipped = {name for one in results for name in one.provenance["skipped"]}
    halved = [one for result in results for one in result.provenance.get("halved", ())]
    provenance: JSON = {}
    for name, value in results[0].provenance.items():
        if name not in ("halved", "part"):
            provenance[name] = value
        if name == "batch_size" and halved:
            provenance["halved"] = halved
    chance = chance_of([options[name] for name in ids])
    return {**provenance, "chance": chance, "skipped": [name for name in order if name in skipped]}
