"""Putting the parts of a run together: `KnockoutResult.join`, and results that are whole: their sum."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from vlmneurons.checks import JSON, quoted
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files.folders import RunFolder, differences, manifest_in
from vlmneurons.files.parts import PartFolder, parts_of
from vlmneurons.statistics.identity import check_addable
from vlmneurons.study.effects import NO_GROUP
from vlmneurons.study.result import NOT_ASKED, RUN, KnockoutResult, chance_of


def join_results(folders: Sequence[str | Path], out: Path) -> KnockoutResult:
    """See `KnockoutResult.join`."""
    folders = list(folders) if isinstance(folders, Iterator) else folders  # they are gone through twice
    whole = _undivided(folders)
    told = None if whole else parts_of(folders, RUN)
    result = functools.reduce(added, whole) if told is None else _joined(told[0], told[2]["ids"])
    if (out / "knockout.json").exists() and (told is None or not (out / "manifest.json").exists()):
        raise MismatchError(f"{out} holds a result that was saved there: give another folder")
    if told is None:
        result.save(out)
        return result
    _, manifest, about = told
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

    def whole(name: str, missing: object, dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
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


# -- sums --------------------------------------------------------------------------------------------------------------


def _undivided(folders: Sequence[str | Path]) -> list[KnockoutResult]:
    """The results of several undivided runs of the same questions; none where what is given are not such.

    Raises:
        MismatchError: their questions differ; the message says which.
    """
    if not isinstance(folders, list | tuple) or len(folders) < 2:
        return []
    manifests = [manifest_in(Path(one)) for one in folders]
    contents = [one.get("content", {}) for one in manifests if one and one.get("kind") == RUN and "part" not in one]
    if len(contents) < len(manifests):
        return []
    for folder, content in zip(folders, contents, strict=True):
        if differs := list(differences({"content": content}, {"content": contents[0]})):
            raise MismatchError(f"{folder} is not of the questions that {folders[0]} is of: {'; '.join(differs[:3])}")
    return [KnockoutResult.load(one) for one in folders]


def added(one: KnockoutResult, other: KnockoutResult) -> KnockoutResult:
    """See `KnockoutResult.__add__`."""
    provenance = _added_provenance(one, other)
    place = {name: number for number, name in enumerate(other.ids)}
    shared = [name for name in one.ids if name in place]
    if not shared:
        rows = _same_masks(one, other)

        def both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.concatenate([first, second[rows]], axis=1)

        if (one.pictures is None) != (other.pictures is None):
            raise MismatchError("only one of the results knows which questions share a picture; they cannot be added")
        pictures = None if one.pictures is None else one.pictures + (other.pictures or ())
        ids, groups, masks = one.ids + other.ids, one.groups + other.groups, one.masks
        answers = np.concatenate([one.answers, other.answers])
    else:
        columns = _same_questions(one, other, shared)

        def both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.concatenate([first, second[1:, columns]])

        ids, groups, pictures, answers, masks = one.ids, one.groups, one.pictures, one.answers, one.masks + other.masks

    def table(name: str, missing: object, dtype: DTypeLike) -> np.ndarray | None:
        found = [getattr(result, name) for result in (one, other)]
        if all(values is None for values in found):
            return None
        shapes = (one.chosen.shape, other.chosen.shape)
        return both(*(np.full(s, missing, dtype) if v is None else v for v, s in zip(found, shapes, strict=True)))

    return KnockoutResult(
        ids,
        groups,
        answers,
        masks,
        both(one.chosen, other.chosen),
        both(one.margins, other.margins),
        provenance,
        table("texts", None, object),
        one.controls,
        pictures,
        table("asked", True, bool),
        table("scores", np.nan, np.float64),
    )


_OF_EACH = ("selections", "masks", "skipped", "halved", "chance", "others", "design")
"""What the provenances of two results that are added say each for itself."""


def _added_provenance(one: KnockoutResult, other: KnockoutResult) -> JSON:
    """What both say, where they may differ for both together.

    Raises:
        MismatchError: they may not; the message says why.
    """
    first, second = one.provenance, other.provenance
    for told in (first, second):
        if "part" in told:
            raise MismatchError(
                f"one of the results is part {told['part']} of a run: KnockoutResult.join puts it together with the "
                "others, and sees that none lacks"
            )
    check_addable(first, second, "results")
    mine, theirs = ({name: value for name, value in told.items() if name not in _OF_EACH} for told in (first, second))
    differs = [*differences(theirs, mine), *differences({"controls": other.controls}, {"controls": one.controls})]
    named = [{mask.group for mask in result.masks} - {NO_GROUP} for result in (one, other)]
    if all(named):
        differs += differences({"others": second.get("others")}, {"others": first.get("others")})
    if (one.scores is None) != (other.scores is None):
        differs.append("only one of the two has scores")
    plans = list(dict.fromkeys(told["design"] for told in (first, second) if "design" in told))
    if len(plans) > 1 and named[0] == named[1] and set(one.ids) & set(other.ids):
        differs.append(f"its plan is {plans[1]}, not {plans[0]}: another seed, or drawn from other questions")
    if differs:
        raise MismatchError(f"results of different settings cannot be added: of the second, {'; '.join(differs[:3])}")
    provenance = dict(first)
    for name in [name for name in _OF_EACH if name in first or name in second]:
        if name in ("selections", "masks"):
            told = first.get(name, {})
            parts = {key: f"{told[key]} + {value}" for key, value in second.get(name, {}).items() if key in told}
            provenance[name] = {**told, **second.get(name, {}), **({} if told == second.get(name) else parts)}
        elif name in ("skipped", "halved"):
            told = first.get(name, [])
            provenance[name] = [*told, *(entry for entry in second.get(name, ()) if entry not in told)]
        elif name == "chance":
            known = [(told.get(name), len(result.ids)) for told, result in ((first, one), (second, other))]
            right = [share * n for share, n in known if share is not None]
            provenance[name] = sum(right) / sum(n for _, n in known) if len(right) == 2 else None
        elif name == "design":
            provenance[name] = " + ".join(plans)
        else:
            provenance[name] = first.get(name, second.get(name))
    return provenance


def _same_masks(one: KnockoutResult, other: KnockoutResult) -> list[int]:
    """The rows of the second result's answers in the order of the first's masks.

    Raises:
        MismatchError: their masks differ.
    """
    if differing := {*one.masks} ^ {*other.masks}:
        name = min(f"{mask.selector} {mask.group}" for mask in differing)
        raise MismatchError(
            f"the results are of different questions and of {len(differing)} masks that differ ({name}, …): their sum "
            "would have gaps. Add results of the same questions, or of the same masks"
        )
    for name in one.selectors:
        mine, theirs = (result.provenance.get("masks", {}).get(name) for result in (one, other))
        if mine != theirs or (mine is None and "setting" in one.provenance):
            raise MismatchError(
                f"the results are of different questions, and of different neurons under the name {name!r} (or one is "
                "of an earlier release, which did not keep of which): they cannot be added"
            )
    row = {mask: number for number, mask in enumerate(other.masks, start=1)}
    return [0, *(row[mask] for mask in one.masks)]


def _same_questions(one: KnockoutResult, other: KnockoutResult, shared: Sequence[str]) -> list[int]:
    """The columns of the second result's answers in the order of the first's questions.

    Raises:
        MismatchError: their questions or clean answers differ, or they have masks in common.
    """
    masks = {(mask.selector, mask.repeat, mask.group) for mask in one.masks}
    twice = [f"{m.selector} {m.group}" for m in other.masks if (m.selector, m.repeat, m.group) in masks]
    if twice:
        raise MismatchError(
            f"{len(shared)} questions ({quoted(shared)}) were asked under {len(twice)} masks in both results "
            f"({quoted(twice)}), and would count twice: leave them out of one, or give its masks another name"
        )
    if lone := sorted({*one.ids} ^ {*other.ids}):
        raise MismatchError(
            f"{len(lone)} questions are in one of the results alone ({quoted(lone)}): their sum would have gaps. Take "
            "those that both have with `at`"
        )
    place = {name: number for number, name in enumerate(other.ids)}
    columns = [place[name] for name in one.ids]
    theirs = other.at(columns)
    for what in ("groups", "answers", "pictures"):
        if not np.array_equal(np.array(getattr(one, what)), np.array(getattr(theirs, what))):
            raise MismatchError(f"the results have questions of the same ids, and other {what}: they cannot be added")
    exact = one.provenance.get("dtype", "torch.float32") in ("torch.float32", "torch.float64")
    alike = one.chosen[0] == theirs.chosen[0]
    alike &= np.isclose(one.margins[0], theirs.margins[0], rtol=0, atol=1e-5 if exact else 0.1, equal_nan=True)
    if differing := [name for name, same in zip(one.ids, alike, strict=True) if not same]:
        raise MismatchError(
            f"the clean answers to {len(differing)} questions differ ({quoted(differing)}): the results are not of one "
            "model and one way of asking"
        )
    return columns
