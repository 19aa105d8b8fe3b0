"""The tables of a study, computed from its answers: what `KnockoutResult` gives by its methods, which explain them.

Every number of a summary, a pair, a difference or a report is one of `effects.estimates`: the mean of some value over
the questions of a group, with its interval and test by unit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlmneurons.checks import JSON, as_fraction, as_whole, check_choice
from vlmneurons.errors import MismatchError
from vlmneurons.study.effects import (
    LEAST_UNITS,
    NO_GROUP,
    Estimates,
    estimates,
    excess,
    mean_of_known,
    question_effects,
)
from vlmneurons.study.masks import split_setting
from vlmneurons.trust.pvalues import benjamini_hochberg, holm

if TYPE_CHECKING:
    from vlmneurons.study.result import KnockoutResult

EFFECTS = ("self_effect", "cross_effect", "gap")

CLUSTERS = ("picture", "question")
"""What an interval and a test draw: pictures with all their questions, or questions one by one."""


@dataclass(frozen=True)
class Inference:
    """How intervals and tests are made; the fields are those of `KnockoutResult.effects`."""

    value: str = "correct"
    confidence: float = 0.95
    permutations: int = 2000
    seed: int = 0
    cluster: str = "picture"

    def __post_init__(self) -> None:
        as_whole("permutations", self.permutations, MismatchError, least=0)
        as_whole("seed", self.seed, MismatchError, least=0)
        as_fraction("confidence", self.confidence, MismatchError)
        check_choice("cluster", self.cluster, CLUSTERS, MismatchError)

    def flips(self, tests: int) -> int:
        """Number of sign flips: enough that a p corrected over so many tests can be below 0.05 at all."""
        return max(self.permutations, 20 * tests) if self.permutations else 0

    def bounds(self, found: Estimates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Estimates.bounds`."""
        return found.bounds(self.confidence, self.value)


def members_of(result: "KnockoutResult", names: Sequence[str]) -> list[np.ndarray]:
    """For each group the places of its questions."""
    groups = np.array(result.groups)
    return [np.flatnonzero(groups == name) for name in names]


def clusters_of(result: "KnockoutResult", cluster: str) -> np.ndarray | None:
    """The number of each question's cluster; None where every question stands alone."""
    if cluster == "question" or result.pictures is None:
        return None
    number = {name: n for n, name in enumerate(dict.fromkeys(result.pictures))}
    return np.array([number[name] for name in result.pictures], dtype=np.int64)


def settings_of(result: "KnockoutResult", selector: str) -> JSON:
    """Whether a selector's name is one setting of a sweep, and how many settings of it the study was given."""
    tried = {*result.selectors, *(result.provenance.get("selections") or {})}
    base, setting = split_setting(selector)
    number = sum(split_setting(name)[0] == base for name in tried)
    return {"exploratory": setting is not None, "settings": number}


def changes_of(values: np.ndarray, result: "KnockoutResult", selector: str) -> tuple[list[str], np.ndarray]:
    """The groups of a selector's masks, sorted, and ``[mask, question]`` values under them, repeats averaged."""
    rows = result.rows_of(selector)
    groups = sorted({result.masks[row - 1].group for row in rows})
    of_group = ([row for row in rows if result.masks[row - 1].group == group] for group in groups)
    return groups, np.stack([mean_of_known(values[own]) for own in of_group])


def corrected(p: np.ndarray, name: str = "p") -> dict[str, np.ndarray]:
    """A family of p-values and what they are corrected to."""
    return {name: p, f"{name}_holm": holm(p.tolist()), f"{name}_bh": benjamini_hochberg(p.tolist())}


# -- cells -------------------------------------------------------------------------------------------------------------


def cell_table(result: "KnockoutResult") -> pd.DataFrame:
    """See `KnockoutResult.table`."""
    names = [*result.group_names, *result.control_names]
    members = members_of(result, names)
    asked = np.ones(result.chosen.shape, dtype=bool) if result.asked is None else result.asked

    def means(values: np.ndarray) -> np.ndarray:
        known = np.where(asked[1:], values, np.nan)
        parts = [mean_of_known(known[:, own].T) for own in members]
        return np.stack(parts, 1).reshape(-1) if parts else np.zeros(0)

    def of_mask(values: Sequence[object]) -> np.ndarray:
        return np.repeat(np.array(values), len(names))

    clean, right = result.correct[:1], result.correct[1:]
    flipped = result.chosen[1:] != result.chosen[:1]
    before, after = means(np.broadcast_to(clean, right.shape)), means(right)
    graded: dict[str, np.ndarray] = {}
    if (scores := result.scores) is not None:
        graded["clean_score"] = means(np.broadcast_to(scores[:1], right.shape))
        graded["score"] = means(scores[1:] - scores[:1])
    return pd.DataFrame(
        {
            "selector": of_mask([mask.selector for mask in result.masks]),
            "repeat": of_mask([mask.repeat for mask in result.masks]),
            "mask": of_mask([mask.group for mask in result.masks]),
            "group": np.tile(np.array(names), len(result.masks)),
            "neurons": of_mask([mask.size for mask in result.masks]),
            "n": np.array([asked[1:, own].sum(1) for own in members], dtype=np.int64).T.reshape(-1),
            "clean": before,
            "ablated": after,
            "delta": after - before,
            "flips": means(flipped),
            "right_to_wrong": means(flipped & clean & ~right),
            "wrong_to_right": means(flipped & ~clean & right),
            "wrong_to_wrong": means(flipped & ~clean & ~right),
            "failures": means(result.chosen[1:] == -1),
            "margin": means(result.margins[1:] - result.margins[:1]),
            **graded,
        }
    )


def effect_table(result: "KnockoutResult", selectors: Sequence[str], how: Inference) -> pd.DataFrame:
    """See `KnockoutResult.effects`."""
    names = [*result.group_names, *result.control_names]
    members, clusters = members_of(result, names), clusters_of(result, how.cluster)
    values = result.values(how.value)
    tables = []
    for selector in selectors:
        masks, change = changes_of(values - values[0], result, selector)
        cells = estimates(change, members, clusters)
        low, high, few = how.bounds(cells)
        kind = np.array([[_kind(mask, name, result.control_names) for name in names] for mask in masks])
        parts = {name: table[:, :-1] for name, table in (("low", low), ("high", high), ("few", few))}
        parts |= {"n": cells.n[:, :-1], "units": cells.units[:, :-1], "changed": cells.changed[:, :-1]}
        table = pd.DataFrame(
            {
                "selector": selector,
                "mask": np.repeat(np.array(masks), len(names)),
                "group": np.tile(np.array(names), len(masks)),
                "kind": kind.reshape(-1),
                **{name: parts[name].reshape(-1) for name in ("n", "units", "changed")},
                "effect": cells.value[:, :-1].reshape(-1),
                **{name: parts[name].reshape(-1) for name in ("low", "high", "few")},
            }
        )
        found = {name: np.full(kind.shape, np.nan) for name in ("p", "p_holm", "p_bh")}
        for family in np.unique(kind):
            tested = (kind == family) & (cells.n[:, :-1] > 0)
            if family == "self":  # the same flips as in a summary
                p = np.broadcast_to(_own_pvalues(result, masks, change, clusters, how), kind.shape)
            else:
                tested &= cells.units[:, :-1] >= LEAST_UNITS
                places = np.flatnonzero(tested.any(0)).tolist()
                p = cells.pvalues(how.flips(int(tested.sum())), [how.seed, 2], LEAST_UNITS, places)[:, :-1]
            for name, column in corrected(p[tested]).items():
                found[name][tested] = column
        tables.append(
            table.assign(**{name: p.reshape(-1) for name, p in found.items()}, **settings_of(result, selector))
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _kind(mask: str, group: str, controls: Sequence[str]) -> str:
    if group in controls:
        return "control"
    return "none" if mask == NO_GROUP else "self" if mask == group else "other"


def _own_pvalues(
    result: "KnockoutResult", masks: Sequence[str], change: np.ndarray, clusters: np.ndarray | None, how: Inference
) -> np.ndarray:
    """``[group]`` p of each group's self effect, as in a summary; NaN for groups without one, and control groups."""
    groups, found = _of_groups(result, masks, change, clusters)
    p = dict(zip(groups, found.pvalues(how.flips(len(groups)), [how.seed, 1])[0], strict=False))
    return np.array([p.get(name, np.nan) for name in (*result.group_names, *result.control_names)])


def _of_groups(
    result: "KnockoutResult", masks: Sequence[str], change: np.ndarray, clusters: np.ndarray | None
) -> tuple[list[str], Estimates]:
    """The groups that a selector's summary is of, and self effect, cross effect and gap of each.

    These are the groups with a mask of their own or, for sets of no group and selections of other groups, all.
    """
    groups = [name for name in result.group_names if name in masks] or list(result.group_names)
    return groups, estimates(question_effects(change, masks, result.groups), members_of(result, groups), clusters)


# -- summaries ---------------------------------------------------------------------------------------------------------


def summary_table(result: "KnockoutResult", selectors: Sequence[str], how: Inference) -> pd.DataFrame:
    """See `KnockoutResult.summary`."""
    values = {"margin": result.margins, how.value: result.values(how.value)}
    changed = result.chosen != result.chosen[0]
    shares = {
        "flips": changed,
        "right_to_wrong": changed & result.correct[0] & ~result.correct,
        "wrong_to_right": changed & ~result.correct[0] & result.correct,
        "failures": result.chosen == -1,
    }
    if result.asked is not None:
        shares = {name: np.where(result.asked, share, np.nan) for name, share in shares.items()}
    if not result.group_names:
        return pd.DataFrame()
    tables = [_summary_of(result, selector, values, shares, how) for selector in selectors]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _summary_of(
    result: "KnockoutResult",
    selector: str,
    values: Mapping[str, np.ndarray],
    shares: Mapping[str, np.ndarray],
    how: Inference,
) -> pd.DataFrame:
    """The rows of one selector."""
    clusters, shown = clusters_of(result, how.cluster), clusters_of(result, "picture")
    pictures = np.arange(len(result.ids)) if shown is None else shown
    masks, change = changes_of(values[how.value] - values[how.value][0], result, selector)
    groups, found = _of_groups(result, masks, change, clusters)
    everyone = members_of(result, result.group_names)
    members = members_of(result, groups)
    before = values["score"][0] if how.value == "score" else result.correct[0]
    clean = np.array([before[own].mean() for own in members])
    columns: dict[str, Any] = {
        "selector": selector,
        "group": [*groups, NO_GROUP],
        "n": [*map(len, members), sum(map(len, everyone))],
        "pictures": [len(np.unique(pictures[own])) for own in (*members, np.concatenate(everyone))],
        "clean": [*clean, clean.mean()],
    }
    few: list[list[str]] = [[] for _ in columns["group"]]

    def put(name: str, parts: Sequence[tuple[Estimates, int, int]]) -> None:
        tables = {id(one): (one.value, *how.bounds(one)) for one, *_ in {id(part[0]): part for part in parts}.values()}
        ends = [tuple(float(end[row, place]) for end in tables[id(one)]) for one, row, place in parts]
        for label, column in zip((name, f"{name}_low", f"{name}_high"), zip(*ends, strict=True), strict=False):
            columns[label] = list(column)
        for names, (*_, is_few) in zip(few, ends, strict=True):
            names.extend([name] if is_few else [])

    def by_mask(single: Estimates) -> list[tuple[Estimates, int, int]]:
        """What each group's own mask does to other questions, over all groups of these, and the mean over masks."""
        rows = [(single, masks.index(group) if group in masks else len(masks), -1) for group in groups]
        return [*rows, (single.pooled(), 0, 0)]

    none = np.full((1, change.shape[1]), np.nan)
    others = np.where(np.array(masks)[:, None] == np.array(result.groups)[None], np.nan, change)
    named = others if groups[0] in masks else np.full_like(others, np.nan)
    caused = estimates(np.concatenate([named, none]), everyone, clusters)
    for row, name in enumerate(EFFECTS):
        if name == "gap":
            put("cross_caused", by_mask(caused))
        put(name, [(found, row, place) for place in range(len(groups) + 1)])
    reached = [(caused.n[row, :-1] > 0) for _, row, _ in by_mask(caused)[:-1]]
    columns["cross_groups"] = [int(one.sum()) for one in (*reached, np.any(reached, axis=0))]
    if result.control_names:
        of_controls = members_of(result, result.control_names)
        put("control_effect", by_mask(estimates(np.concatenate([change, none]), of_controls, clusters)))
    columns["few"] = [", ".join(names) for names in few]
    nats = changes_of(values["margin"] - values["margin"][0], result, selector)[1]
    columns["self_margin"], columns["cross_margin"] = _of_groups(result, masks, nats, None)[1].value[:2]
    for name, table in shares.items():
        own, other, _ = question_effects(changes_of(table, result, selector)[1], masks, result.groups)
        columns[name] = estimates((own if groups[0] in masks else other)[None], members).value[0]
    p = found.pvalues(how.flips(len(groups)), [how.seed, 1])
    for name, row in zip(("p", "cross_p", "gap_p"), p, strict=True):
        family = corrected(row[:-1], name)
        columns |= {key: [*column, np.nan] for key, column in family.items()} | {name: row}
    return pd.DataFrame({**columns, **settings_of(result, selector)})


def pair_table(result: "KnockoutResult", selector: str, how: Inference) -> pd.DataFrame:
    """See `KnockoutResult.pairs`."""
    table = effect_table(result, [selector], how)
    table = table.loc[table["kind"] != "control"].reset_index(drop=True)
    shape = (table["mask"].nunique(), len(result.group_names))
    own = (table["mask"] == table["group"]).to_numpy().reshape(shape)
    left = excess(table["effect"].to_numpy().reshape(shape), own, table["n"].to_numpy().reshape(shape))
    names = {"effect": "delta", "low": "delta_low", "high": "delta_high"}
    table = table.rename(columns=names).assign(excess=left.reshape(-1))
    kept = ["mask", "group", "n", "units", *names.values(), "few", "excess", "p", "p_holm", "p_bh"]
    return table[[*kept, "exploratory", "settings"]]


# -- comparisons -------------------------------------------------------------------------------------------------------


def difference_table(result: "KnockoutResult", first: str, second: str, how: Inference) -> pd.DataFrame:
    """See `KnockoutResult.difference`."""
    if first == second:
        raise MismatchError(f"two selectors are compared; got {first!r} twice")
    values, clusters = result.values(how.value), clusters_of(result, how.cluster)
    sides, groups = [], []
    for selector in (first, second):
        masks, change = changes_of(values - values[0], result, selector)
        groups.append([mask for mask in masks if mask in result.group_names])
        sides.append(question_effects(change, masks, result.groups))
    if groups[0] != groups[1]:
        mine, theirs = (", ".join(one) or "no group" for one in groups)
        raise MismatchError(f"{first!r} has masks of {mine}, {second!r} of {theirs}")
    names = groups[0] or list(result.group_names)
    members = members_of(result, names)
    found = estimates(sides[0] - sides[1], members, clusters)
    low, high, few = how.bounds(found)
    p = found.pvalues(how.flips(len(names)), [how.seed, 3])
    one, other = (estimates(side, members, clusters).value for side in sides)
    tables = []
    for row, effect in enumerate(EFFECTS):
        family = {key: [*column, np.nan] for key, column in corrected(p[row, :-1]).items()}
        columns = {"first": one, "second": other, "difference": found.value, "low": low, "high": high, "few": few}
        counts = {"n": found.n, "units": found.units, "changed": found.changed}
        rows = {name: table[row] for name, table in (counts | columns).items()}
        tables.append(pd.DataFrame({"effect": effect, "group": [*names, NO_GROUP], **rows, **family, "p": p[row]}))
    return pd.concat(tables, ignore_index=True)


def random_table(result: "KnockoutResult", selector: str, control: str, value: str) -> pd.DataFrame:
    """See `KnockoutResult.against_random`."""
    if selector == control:
        raise MismatchError(f"{selector!r} is compared with another name's masks; got it as its own control")
    values = result.values(value)

    def repeats_of(name: str) -> Iterator[tuple[list[str], np.ndarray]]:
        rows: dict[int, list[int]] = {}
        for row in result.rows_of(name):
            if result.masks[row - 1].group in result.group_names:
                rows.setdefault(result.masks[row - 1].repeat, []).append(row)
        for own in rows.values():
            masks = [result.masks[row - 1].group for row in own]
            effects = question_effects(values[own] - values[0], masks, result.groups)
            yield sorted(masks), estimates(effects, members_of(result, sorted(masks))).value

    ours, drawn = list(repeats_of(selector)), list(repeats_of(control))
    if len(ours) != 1:
        raise MismatchError(f"{selector!r} has {len(ours)} repeats of groups; a selector is compared as one")
    groups, own = ours[0]
    for other, _ in drawn:
        if other != groups:
            raise MismatchError(f"{selector!r} has masks of {', '.join(groups)}, {control!r} of {', '.join(other)}")
    if not drawn:
        raise MismatchError(f"{control!r} has no masks of groups")
    rows = []
    for place, name in enumerate([*groups, NO_GROUP]):
        for row, effect in enumerate(EFFECTS):
            ours_here, random = own[row, place], np.array([table[row, place] for _, table in drawn])
            rows.append(
                {
                    "group": name,
                    "effect": effect,
                    "value": float(ours_here),
                    "control_mean": random.mean(),
                    "control_sd": random.std(ddof=1) if len(random) > 1 else np.nan,
                    "control_low": random.min(),
                    "control_high": random.max(),
                    "repeats": len(random),
                    "p": (1 + (random <= ours_here + 1e-12).sum()) / (1 + len(random)),
                }
            )
    return pd.DataFrame(rows)


# -- answers -----------------------------------------------------------------------------------------------------------


def answer_table(result: "KnockoutResult") -> pd.DataFrame:
    """See `KnockoutResult.answer_table`."""
    runs, places = np.nonzero(np.ones(result.chosen.shape, dtype=bool) if result.asked is None else result.asked)
    masks = result.masks
    shared = list(dict.fromkeys(["", *(mask.group for mask in masks), *result.groups]))

    def category(values: Sequence[str], at: np.ndarray, names: Sequence[str] | None = None) -> pd.Categorical:
        number = {name: code for code, name in enumerate(names or dict.fromkeys(values))}
        codes = np.array([number[value] for value in values], dtype=np.int64)[at]
        return pd.Categorical.from_codes(codes, list(number))

    def of_mask(value: Callable[[Any], str], names: Sequence[str] | None = None) -> pd.Categorical:
        return category(["", *map(value, masks)], runs, names)

    texts = [None] * len(runs) if result.texts is None else result.texts[runs, places].tolist()
    return pd.DataFrame(
        {
            "run": runs.astype(np.int32),
            "selector": of_mask(lambda mask: mask.selector),
            "repeat": np.array([0, *(mask.repeat for mask in masks)], dtype=np.int32)[runs],
            # Masks and groups have the same categories, so that they can be compared.
            "mask": of_mask(lambda mask: mask.group, shared),
            "intervention": of_mask(lambda mask: mask.intervention),
            "neurons": np.array([0, *(mask.size for mask in masks)], dtype=np.int64)[runs],
            "id": category(result.ids, places),
            "group": category(result.groups, places, shared),
            "picture": category(result.pictures or [""] * len(result.ids), places),
            "answer": result.answers[places].astype(np.int16),
            "chosen": result.chosen[runs, places].astype(np.int16),
            "correct": result.correct[runs, places],
            "margin": result.margins[runs, places],
            "text": pd.array(texts, dtype="string"),
            **({} if result.scores is None else {"score": result.scores[runs, places]}),
        }
    )
