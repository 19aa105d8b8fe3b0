"""Putting the parts of a run together: `KnockoutResult.join`, and results that are whole: their sum."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmneurons.checks import JSON, quoted
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files.folders import RunFolder, differences, manifest_in
from vlmneurons.files.parts import PartFolder, parts_of
from vlmneurons.statistics.identity import check_addable
from vlmneurons.study.effects import NO_GROUP
from vlmneurons.study.result import RUN, TABLES, KnockoutResult, chance_accuracy, tables_in


def join_results(folders: Sequence[str | Path], out: Path) -> KnockoutResult:
    """See `KnockoutResult.join`."""
    folders = list(folders) if isinstance(folders, Iterator) else folders  # they are gone through twice
    undivided = _undivided(folders)
    parts, manifest, about = ([], {}, {}) if undivided else parts_of(folders, RUN)
    result = functools.reduce(total, undivided) if undivided else _joined(parts, about["ids"])
    if (out / "knockout.json").exists() and (undivided or not (out / "manifest.json").exists()):
        raise MismatchError(f"{out} holds a result that was saved there: give another folder")
    if undivided:
        result.save(out)
        return result
    run = RunFolder(out, manifest, about)
    with run.opened():
        result.save(out)
        run.clear()  # of a run that was begun there undivided
    return result


def _joined(parts: Sequence[PartFolder], order: Sequence[str]) -> KnockoutResult:
    """One result of all parts, the questions in the order of the whole."""
    results = [_result_in(part) for part in parts]
    together = _side_by_side(results)
    place = {name: number for number, name in enumerate(together.ids)}
    whole = together.at([place[name] for name in order if name in place])  # the others were skipped
    return replace(whole, provenance=_joined_provenance(parts[0], results, order, whole.ids))


def _side_by_side(results: Sequence[KnockoutResult]) -> KnockoutResult:
    """The first result with the questions of all, which are asked under the same masks."""
    first = results[0]
    return replace(
        first,
        ids=tuple(name for result in results for name in result.ids),
        groups=tuple(group for result in results for group in result.groups),
        answers=np.concatenate([result.answers for result in results]),
        pictures=None if first.pictures is None else tuple(p for result in results for p in result.pictures or ()),
        **_combined(results, lambda tables: np.concatenate(tables, axis=1)),
    )


def _combined(
    results: Sequence[KnockoutResult], combine: Callable[[Sequence[np.ndarray]], np.ndarray]
) -> dict[str, np.ndarray]:
    """The tables of all results, combined; one that only some have is filled for the others with what means nothing."""
    combined = {}
    for name, (dtype, missing) in TABLES.items():
        tables = [tables_in(result).get(name) for result in results]
        if any(table is not None for table in tables):
            combined[name] = combine(
                [
                    np.full(result.chosen.shape, missing, dtype) if table is None else table
                    for result, table in zip(results, tables, strict=True)
                ]
            )
    return combined


def _result_in(part: PartFolder) -> KnockoutResult:
    if not (part.folder / "knockout.json").exists():
        raise MismatchError(f"part {part.name} in {part.folder} is not finished: the same call goes on with it")
    result = KnockoutResult.load(part.folder)
    if result.provenance.get("part") != part.name:
        raise FileFormatError(f"{part.folder}: knockout.json is not of part {part.name}, as manifest.json says")
    part.refuse_unfinished([*result.ids, *result.provenance["skipped"]])
    return result


def _joined_provenance(
    part: PartFolder, results: Sequence[KnockoutResult], order: Sequence[str], ids: Sequence[str]
) -> JSON:
    """The provenance of the undivided run: what each part says of its own questions is said of all of them."""
    options = dict(zip(order, part.about["options"], strict=True))
    skipped = {name for result in results for name in result.provenance["skipped"]}
    halved = [note for result in results for note in result.provenance.get("halved", ())]
    provenance: JSON = {}
    for name, value in results[0].provenance.items():
        if name not in ("halved", "part"):
            provenance[name] = value
        if name == "batch_size" and halved:
            provenance["halved"] = halved
    chance = chance_accuracy([options[name] for name in ids])
    return {**provenance, "chance": chance, "skipped": [name for name in order if name in skipped]}


# -- sums --------------------------------------------------------------------------------------------------------------


def _undivided(folders: Sequence[str | Path]) -> list[KnockoutResult]:
    """The results of several undivided runs of the same questions; none where the folders do not all hold such a run.

    Raises:
        MismatchError: their questions differ; the message says which.
    """
    if not isinstance(folders, list | tuple) or len(folders) < 2:
        return []
    manifests = [manifest_in(Path(folder)) or {} for folder in folders]
    if any(manifest.get("kind") != RUN or "part" in manifest for manifest in manifests):
        return []
    contents = [manifest.get("content", {}) for manifest in manifests]
    for folder, content in zip(folders, contents, strict=True):
        if differs := list(differences({"content": content}, {"content": contents[0]})):
            raise MismatchError(f"{folder} is not of the questions that {folders[0]} is of: {'; '.join(differs[:3])}")
    return [KnockoutResult.load(folder) for folder in folders]


def total(first: KnockoutResult, second: KnockoutResult) -> KnockoutResult:
    """See `KnockoutResult.__add__`."""
    provenance = _provenance_of_both(first, second)
    others = set(second.ids)
    shared = [name for name in first.ids if name in others]
    if shared:  # the same questions under further masks
        columns = _columns_of_same_questions(first, second, shared)
        tables = _combined([first, second], lambda tables: np.concatenate([tables[0], tables[1][1:, columns]]))
        return replace(first, masks=first.masks + second.masks, provenance=provenance, **tables)
    rows = _rows_of_same_masks(first, second)
    if (first.pictures is None) != (second.pictures is None):
        raise MismatchError("only one of the results knows which questions share a picture; they cannot be added")
    in_order = {name: table[rows] for name, table in tables_in(second).items()}
    together = _side_by_side([first, replace(second, masks=first.masks, **in_order)])
    return replace(together, provenance=provenance)


_OF_EACH = ("selections", "masks", "skipped", "halved", "chance", "others", "design")
"""What may differ between the provenances of two results that are added, and is put together."""


def _provenance_of_both(first: KnockoutResult, second: KnockoutResult) -> JSON:
    """What both results say, or the first and the second where they may differ.

    Raises:
        MismatchError: they differ where they may not; the message says how.
    """
    plans = _check_settings(first, second)
    provenance = dict(first.provenance)
    for name in _OF_EACH:
        values = [result.provenance[name] for result in (first, second) if name in result.provenance]
        if not values:
            continue
        if name in ("selections", "masks"):
            before, further = (result.provenance.get(name, {}) for result in (first, second))
            provenance[name] = {**before, **further}
            if before != further:
                provenance[name] |= {key: f"{before[key]} + {further[key]}" for key in further if key in before}
        elif name in ("skipped", "halved"):
            before, further = (result.provenance.get(name, []) for result in (first, second))
            provenance[name] = [*before, *(entry for entry in further if entry not in before)]
        elif name == "chance":
            guessed = [(result.provenance.get(name), len(result.ids)) for result in (first, second)]
            right = [share * n for share, n in guessed if share is not None]
            provenance[name] = sum(right) / sum(n for _, n in guessed) if len(right) == 2 else None
        elif name == "design":
            provenance[name] = " + ".join(plans)
        else:
            provenance[name] = values[0]
    return provenance


def _check_settings(first: KnockoutResult, second: KnockoutResult) -> list[str]:
    """Refuse results of different settings, and parts; the plans of their incomplete crossings, each once.

    Raises:
        MismatchError: they cannot be added; the message says why.
    """
    for provenance in (first.provenance, second.provenance):
        if "part" in provenance:
            raise MismatchError(
                f"one of the results is part {provenance['part']} of a run: KnockoutResult.join puts it together with "
                "the others, and sees that none lacks"
            )
    check_addable(first.provenance, second.provenance, "results")
    shared, second_shared = (
        {name: value for name, value in result.provenance.items() if name not in _OF_EACH}
        | {"controls": result.controls}
        for result in (first, second)
    )
    differs = list(differences(second_shared, shared))
    mask_groups = [{mask.group for mask in result.masks} - {NO_GROUP} for result in (first, second)]
    if all(mask_groups):
        differs += differences({"others": second.provenance.get("others")}, {"others": first.provenance.get("others")})
    if (first.scores is None) != (second.scores is None):
        differs.append("only one of the two has scores")
    plans = [result.provenance["design"] for result in (first, second) if "design" in result.provenance]
    plans = list(dict.fromkeys(plans))
    if len(plans) > 1 and mask_groups[0] == mask_groups[1] and set(first.ids) & set(second.ids):
        differs.append(f"its plan is {plans[1]}, not {plans[0]}: another seed, or drawn from other questions")
    if differs:
        raise MismatchError(f"results of different settings cannot be added: of the second, {'; '.join(differs[:3])}")
    return plans


def _rows_of_same_masks(first: KnockoutResult, second: KnockoutResult) -> list[int]:
    """The rows of the second result's tables in the order of the first's masks.

    Raises:
        MismatchError: their masks differ.
    """
    if differing := {*first.masks} ^ {*second.masks}:
        name = min(f"{mask.selector} {mask.group}" for mask in differing)
        raise MismatchError(
            f"the results are of different questions and of {len(differing)} masks that differ ({name}, …): their sum "
            "would have gaps. Add results of the same questions, or of the same masks"
        )
    for name in first.selectors:
        neurons, second_neurons = (result.provenance.get("masks", {}).get(name) for result in (first, second))
        if neurons != second_neurons or (neurons is None and "setting" in first.provenance):
            raise MismatchError(
                f"the results are of different questions, and of different neurons under the name {name!r} (or one is "
                "of an earlier release, which did not keep of which): they cannot be added"
            )
    row = {mask: number for number, mask in enumerate(second.masks, start=1)}
    return [0, *(row[mask] for mask in first.masks)]


def _columns_of_same_questions(first: KnockoutResult, second: KnockoutResult, shared: Sequence[str]) -> list[int]:
    """The columns of the second result's tables in the order of the first's questions.

    Raises:
        MismatchError: their questions or clean answers differ, or they have masks in common.
    """
    masks = {(mask.selector, mask.repeat, mask.group) for mask in first.masks}
    twice = [f"{m.selector} {m.group}" for m in second.masks if (m.selector, m.repeat, m.group) in masks]
    if twice:
        raise MismatchError(
            f"{len(shared)} questions ({quoted(shared)}) were asked under {len(twice)} masks in both results "
            f"({quoted(twice)}), and would count twice: leave them out of one, or give its masks another name"
        )
    if unshared := sorted({*first.ids} ^ {*second.ids}):
        raise MismatchError(
            f"{len(unshared)} questions are in one of the results alone ({quoted(unshared)}): their sum would have "
            "gaps. Take those that both have with `at`"
        )
    place = {name: number for number, name in enumerate(second.ids)}
    columns = [place[name] for name in first.ids]
    second = second.at(columns)
    for name in ("groups", "answers", "pictures"):
        if not np.array_equal(np.array(getattr(first, name)), np.array(getattr(second, name))):
            raise MismatchError(f"the results have questions of the same ids, and other {name}: they cannot be added")
    exact = first.provenance.get("dtype", "torch.float32") in ("torch.float32", "torch.float64")
    alike = first.chosen[0] == second.chosen[0]
    alike &= np.isclose(first.margins[0], second.margins[0], rtol=0, atol=1e-5 if exact else 0.1, equal_nan=True)
    if differing := [name for name, same in zip(first.ids, alike, strict=True) if not same]:
        raise MismatchError(
            f"the clean answers to {len(differing)} questions differ ({quoted(differing)}): the results are not of one "
            "model and one way of asking"
        )
    return columns
