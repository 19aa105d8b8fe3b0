"""The tables of a study, computed from its answers: the methods of `KnockoutResult` give them, and explain them.

Every number of a summary, a pair, a difference or a report comes from `effects.estimates`: it is the mean of some value
over the questions of a group, with its interval and test by unit.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    Members,
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
"""The units of intervals and tests: pictures with all their questions, or questions one by one."""


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

    def bounds(self, means: Estimates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Estimates.bounds`."""
        return means.bounds(self.confidence, self.value)


def places_by_group(result: "KnockoutResult", names: Sequence[str]) -> list[np.ndarray]:
    """For each of these groups the places of its questions."""
    groups = np.array(result.groups)
    return [np.flatnonzero(groups == name) for name in names]


def cluster_numbers(result: "KnockoutResult", cluster: str) -> np.ndarray | None:
    """The number of each question's cluster; None where every question stands alone."""
    if cluster == "question" or result.pictures is None:
        return None
    return pd.factorize(np.array(result.pictures, dtype=object))[0]


def infinite_margins(result: "KnockoutResult") -> np.ndarray:
    """``[1 + mask, question]`` whether a margin is infinite or undefined, as an option has probability 0.

    Where all answers are generated there are no margins, and so none that are infinite.
    """
    asked = np.ones(result.margins.shape, dtype=bool) if result.asked is None else result.asked
    infinite: np.ndarray = ~(np.abs(result.margins) < 1e300)  # older files hold the largest number that there is
    return asked & infinite & ~np.isnan(result.margins).all()


def values_by_mask(values: np.ndarray, result: "KnockoutResult", selector: str) -> tuple[list[str], np.ndarray]:
    """The groups of a selector's masks, sorted, and ``[mask, question]`` values under them, repeats averaged.

    Args:
        values: ``[1 + mask, question]`` of the result, such as changes; row 0 is clean.
        result: the result.
        selector: whose masks.
    """
    rows = result.rows_of(selector)
    groups = sorted({result.masks[row - 1].group for row in rows})
    repeats = ([row for row in rows if result.masks[row - 1].group == group] for group in groups)
    return groups, np.stack([mean_of_known(values[group_rows]) for group_rows in repeats])


def _sweep_columns(result: "KnockoutResult", selector: str) -> JSON:
    """Whether a selector's name is one setting of a sweep, and how many settings of it the study was given."""
    tried = {*result.selectors, *(result.provenance.get("selections") or {})}
    base, setting = split_setting(selector)
    number = sum(split_setting(name)[0] == base for name in tried)
    return {"exploratory": setting is not None, "settings": number}


def _corrected(p: np.ndarray, name: str = "p") -> dict[str, np.ndarray]:
    """A family of p-values, and the same corrected by either method, as columns."""
    return {name: p, f"{name}_holm": holm(p.tolist()), f"{name}_bh": benjamini_hochberg(p.tolist())}


# -- cells -------------------------------------------------------------------------------------------------------------


def cell_table(result: "KnockoutResult") -> pd.DataFrame:
    """See `KnockoutResult.table`."""
    names = [*result.group_names, *result.control_names]
    members = places_by_group(result, names)
    asked = np.ones(result.chosen.shape, dtype=bool) if result.asked is None else result.asked

    def means(values: np.ndarray) -> np.ndarray:
        asked_values = np.where(asked[1:], values, np.nan)
        parts = [mean_of_known(asked_values[:, places].T) for places in members]
        return np.stack(parts, 1).reshape(-1) if parts else np.zeros(0)

    def counts(flags: np.ndarray) -> np.ndarray:
        return np.array([(asked[1:] & flags)[:, places].sum(1) for places in members], dtype=np.int64).T.reshape(-1)

    def by_mask(values: Sequence[object]) -> np.ndarray:
        return np.repeat(np.array(values), len(names))

    clean, right = result.correct[:1], result.correct[1:]
    flipped = result.chosen[1:] != result.chosen[:1]
    before, after = means(np.broadcast_to(clean, right.shape)), means(right)
    infinite = infinite_margins(result)
    margins = np.where(infinite, np.nan, result.margins)
    margin = means(margins[1:] - margins[:1])
    optional: dict[str, np.ndarray] = {}
    if infinite.any():
        optional["infinite"] = counts(infinite[1:] | infinite[:1])
        margin[optional["infinite"] > 0] = np.nan
    if (scores := result.scores) is not None:
        optional["clean_score"] = means(np.broadcast_to(scores[:1], right.shape))
        optional["score"] = means(scores[1:] - scores[:1])
    return pd.DataFrame(
        {
            "selector": by_mask([mask.selector for mask in result.masks]),
            "repeat": by_mask([mask.repeat for mask in result.masks]),
            "mask": by_mask([mask.group for mask in result.masks]),
            "group": np.tile(np.array(names), len(result.masks)),
            "neurons": by_mask([mask.size for mask in result.masks]),
            "n": counts(asked[1:]),
            "clean": before,
            "ablated": after,
            "delta": after - before,
            "flips": means(flipped),
            "right_to_wrong": means(flipped & clean & ~right),
            "wrong_to_right": means(flipped & ~clean & right),
            "wrong_to_wrong": means(flipped & ~clean & ~right),
            "failures": means(result.chosen[1:] == -1),
            "margin": margin,
            **optional,
        }
    )


def effect_table(result: "KnockoutResult", selectors: Sequence[str], inference: Inference) -> pd.DataFrame:
    """See `KnockoutResult.effects`."""
    names = [*result.group_names, *result.control_names]
    members, clusters = places_by_group(result, names), cluster_numbers(result, inference.cluster)
    values = result.values(inference.value)
    tables = []
    for selector in selectors:
        masks, change = values_by_mask(values - values[0], result, selector)
        cells = estimates(change, members, clusters)
        low, high, few = inference.bounds(cells)
        kind = np.array([[_kind(mask, name, result.control_names) for name in names] for mask in masks])
        corrected = {name: np.full(kind.shape, np.nan) for name in ("p", "p_holm", "p_bh")}
        for family in np.unique(kind):
            tested = (kind == family) & (cells.n[:, :-1] > 0)
            if family == "self":  # the same flips as in a summary
                p = np.broadcast_to(_self_pvalues(result, masks, change, clusters, inference), kind.shape)
            else:
                tested &= cells.units[:, :-1] >= LEAST_UNITS
                places = np.flatnonzero(tested.any(0)).tolist()
                flips = inference.flips(int(tested.sum()))
                p = cells.pvalues(flips, [inference.seed, 2], LEAST_UNITS, places)[:, :-1]
            for name, column in _corrected(p[tested]).items():
                corrected[name][tested] = column
        columns = {"n": cells.n, "units": cells.units, "changed": cells.changed, "effect": cells.value}
        columns |= {"low": low, "high": high, "few": few}
        table = {
            "selector": selector,
            "mask": np.repeat(np.array(masks), len(names)),
            "group": np.tile(np.array(names), len(masks)),
            "kind": kind.reshape(-1),
            **{name: column[:, :-1].reshape(-1) for name, column in columns.items()},  # the last is of all groups
            **{name: column.reshape(-1) for name, column in corrected.items()},
            **_sweep_columns(result, selector),
        }
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _kind(mask: str, group: str, controls: Sequence[str]) -> str:
    if group in controls:
        return "control"
    return "none" if mask == NO_GROUP else "self" if mask == group else "other"


def _self_pvalues(
    result: "KnockoutResult",
    masks: Sequence[str],
    change: np.ndarray,
    clusters: np.ndarray | None,
    inference: Inference,
) -> np.ndarray:
    """``[group]`` p of each group's self effect, as in a summary; NaN for groups without one, and control groups."""
    groups, effects = _effects_by_group(result, masks, change, clusters)
    p = dict(zip(groups, effects.pvalues(inference.flips(len(groups)), [inference.seed, 1])[0], strict=False))
    return np.array([p.get(name, np.nan) for name in (*result.group_names, *result.control_names)])


def _effects_by_group(
    result: "KnockoutResult", masks: Sequence[str], change: np.ndarray, clusters: np.ndarray | None
) -> tuple[list[str], Estimates]:
    """The groups that a selector's summary is of, and the self effect, cross effect and gap of each, in rows.

    These are the groups with a mask of their own or, for sets of no group and selections of other groups, all.
    """
    groups = [name for name in result.group_names if name in masks] or list(result.group_names)
    effects = question_effects(change, masks, result.groups)
    return groups, estimates(effects, places_by_group(result, groups), clusters)


# -- summaries ---------------------------------------------------------------------------------------------------------


def summary_table(result: "KnockoutResult", selectors: Sequence[str], inference: Inference) -> pd.DataFrame:
    """See `KnockoutResult.summary`."""
    values = result.values(inference.value)
    changed = result.chosen != result.chosen[0]
    shares = {
        "flips": changed,
        "right_to_wrong": changed & result.correct[0] & ~result.correct,
        "wrong_to_right": changed & ~result.correct[0] & result.correct,
        "failures": result.chosen == -1,
    }
    asked = True if result.asked is None else result.asked
    shares = {name: np.where(asked, table, np.nan) for name, table in shares.items()}
    if not result.group_names:
        return pd.DataFrame()
    tables = [_summary_of_selector(result, selector, values, shares, inference) for selector in selectors]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _summary_of_selector(
    result: "KnockoutResult",
    selector: str,
    values: np.ndarray,
    shares: Mapping[str, np.ndarray],
    inference: Inference,
) -> pd.DataFrame:
    """The rows of one selector: its groups, and last all groups together."""
    clusters, pictures = cluster_numbers(result, inference.cluster), cluster_numbers(result, "picture")
    pictures = np.arange(len(result.ids)) if pictures is None else pictures
    masks, change = values_by_mask(values - values[0], result, selector)
    groups, effects = _effects_by_group(result, masks, change, clusters)
    all_members, members = places_by_group(result, result.group_names), places_by_group(result, groups)
    parts = [*members, np.concatenate(all_members)]  # the questions of each row
    before = values[0] if inference.value == "score" else result.correct[0]
    clean = np.array([before[places].mean() for places in members])
    columns: dict[str, Any] = {
        "selector": selector,
        "group": [*groups, NO_GROUP],
        "n": list(map(len, parts)),
        "pictures": [len(np.unique(pictures[places])) for places in parts],
        "clean": [*clean, clean.mean()],
    }
    few: list[list[str]] = [[] for _ in parts]

    def cells(means: Estimates, rows: Sequence[int] | int, places: Sequence[int] | int) -> np.ndarray:
        """``[4, cell]`` value, lower and upper bound, and whether there are too few units for these."""
        return np.stack([means.value, *inference.bounds(means)])[:, rows, places]

    def put(name: str, of_rows: np.ndarray) -> None:
        columns.update(zip((name, f"{name}_low", f"{name}_high"), of_rows, strict=False))
        for names, is_few in zip(few, of_rows[3], strict=True):
            names.extend([name] if is_few else [])

    # Row of each group's own mask among the masks; a group without one has the row of no change after them.
    mask_rows = [masks.index(group) if group in masks else len(masks) for group in groups]
    no_change = np.full((1, change.shape[1]), np.nan)

    def put_by_mask(name: str, of_masks: np.ndarray, members: Members) -> Estimates:
        """What each group's own mask does, over all groups of these questions; last the mean over masks."""
        means = estimates(np.concatenate([of_masks, no_change]), members, clusters)
        put(name, np.concatenate([cells(means, mask_rows, -1), cells(means.pooled(), [0], 0)], axis=1))
        return means

    has_masks = groups[0] in masks
    is_self = np.array(masks)[:, None] == np.array(result.groups)[None]
    put("self_effect", cells(effects, 0, range(len(parts))))
    put("cross_effect", cells(effects, 1, range(len(parts))))
    caused = put_by_mask("cross_caused", np.where(is_self | (not has_masks), np.nan, change), all_members)
    put("gap", cells(effects, 2, range(len(parts))))
    reached = caused.n[mask_rows, :-1] > 0
    columns["cross_groups"] = [*reached.sum(1), reached.any(0).sum()]
    if result.control_names:
        put_by_mask("control_effect", change, places_by_group(result, result.control_names))
    columns["few"] = [", ".join(names) for names in few]
    columns |= _margin_columns(result, selector, parts)
    for name, table in shares.items():
        self_share, cross_share, _ = question_effects(values_by_mask(table, result, selector)[1], masks, result.groups)
        columns[name] = estimates((self_share if has_masks else cross_share)[None], members).value[0]
    p = effects.pvalues(inference.flips(len(groups)), [inference.seed, 1])
    for name, row in zip(("p", "cross_p", "gap_p"), p, strict=True):
        family = _corrected(row[:-1], name)
        columns |= {key: [*column, np.nan] for key, column in family.items()} | {name: row}
    return pd.DataFrame({**columns, **_sweep_columns(result, selector)})


def _margin_columns(result: "KnockoutResult", selector: str, parts: Members) -> dict[str, np.ndarray]:
    """Self and cross effect on the margin, in nats, of each row of a summary; NaN where a margin is infinite."""
    infinite = infinite_margins(result)
    margins = np.where(infinite, np.nan, result.margins)
    masks, change = values_by_mask(margins - margins[0], result, selector)
    _, effects = _effects_by_group(result, masks, change, None)
    columns: dict[str, np.ndarray] = {"self_margin": effects.value[0], "cross_margin": effects.value[1]}
    if infinite.any():
        questions = infinite[[0, *result.rows_of(selector)]].max(0)  # whether any is
        number = np.array([questions[places].sum() for places in parts])
        columns = {name: np.where(number > 0, np.nan, column) for name, column in columns.items()}
        columns["infinite"] = number
    return columns


def pair_table(result: "KnockoutResult", selector: str, inference: Inference) -> pd.DataFrame:
    """See `KnockoutResult.pairs`."""
    table = effect_table(result, [selector], inference)
    table = table.loc[table["kind"] != "control"].reset_index(drop=True)
    shape = (table["mask"].nunique(), len(result.group_names))
    is_self = (table["mask"] == table["group"]).to_numpy().reshape(shape)
    particular = excess(table["effect"].to_numpy().reshape(shape), is_self, table["n"].to_numpy().reshape(shape))
    names = {"effect": "delta", "low": "delta_low", "high": "delta_high"}
    table = table.rename(columns=names).assign(excess=particular.reshape(-1))
    kept = ["mask", "group", "n", "units", *names.values(), "few", "excess", "p", "p_holm", "p_bh"]
    return table[[*kept, "exploratory", "settings"]]


# -- comparisons -------------------------------------------------------------------------------------------------------


def difference_table(result: "KnockoutResult", first: str, second: str, inference: Inference) -> pd.DataFrame:
    """See `KnockoutResult.difference`."""
    if first == second:
        raise MismatchError(f"two selectors are compared; got {first!r} twice")
    values, clusters = result.values(inference.value), cluster_numbers(result, inference.cluster)
    effects, mask_groups = [], []
    for selector in (first, second):
        masks, change = values_by_mask(values - values[0], result, selector)
        mask_groups.append([mask for mask in masks if mask in result.group_names])
        effects.append(question_effects(change, masks, result.groups))
    if mask_groups[0] != mask_groups[1]:
        names, other_names = (", ".join(groups) or "no group" for groups in mask_groups)
        raise MismatchError(f"{first!r} has masks of {names}, {second!r} of {other_names}")
    groups = mask_groups[0] or list(result.group_names)
    members = places_by_group(result, groups)
    means = estimates(effects[0] - effects[1], members, clusters)
    low, high, few = inference.bounds(means)
    p = means.pvalues(inference.flips(len(groups)), [inference.seed, 3])
    columns = {"n": means.n, "units": means.units, "changed": means.changed}
    for name, of_selector in zip(("first", "second"), effects, strict=True):
        columns[name] = estimates(of_selector, members, clusters).value
    columns |= {"difference": means.value, "low": low, "high": high, "few": few}
    tables = []
    for row, effect in enumerate(EFFECTS):
        family = {name: [*column, np.nan] for name, column in _corrected(p[row, :-1]).items()}
        rows = {name: table[row] for name, table in columns.items()}
        tables.append(pd.DataFrame({"effect": effect, "group": [*groups, NO_GROUP], **rows, **family, "p": p[row]}))
    return pd.concat(tables, ignore_index=True)


def random_table(result: "KnockoutResult", selector: str, control: str, value: str) -> pd.DataFrame:
    """See `KnockoutResult.against_random`."""
    if selector == control:
        raise MismatchError(f"{selector!r} is compared with another name's masks; got it as its own control")
    values = result.values(value)

    def effects_by_repeat(name: str) -> Iterator[tuple[list[str], np.ndarray]]:
        """The groups of each repeat's masks, sorted, and ``[effect, place]`` their effects."""
        rows: dict[int, list[int]] = {}
        for row in result.rows_of(name):
            if result.masks[row - 1].group in result.group_names:
                rows.setdefault(result.masks[row - 1].repeat, []).append(row)
        for repeat_rows in rows.values():
            masks = [result.masks[row - 1].group for row in repeat_rows]
            effects = question_effects(values[repeat_rows] - values[0], masks, result.groups)
            yield sorted(masks), estimates(effects, places_by_group(result, sorted(masks))).value

    of_selector, drawn = list(effects_by_repeat(selector)), list(effects_by_repeat(control))
    if len(of_selector) != 1:
        raise MismatchError(f"{selector!r} has {len(of_selector)} repeats of groups; a selector is compared as one")
    ((groups, effects),) = of_selector
    for drawn_groups, _ in drawn:
        if drawn_groups != groups:
            names = ", ".join(drawn_groups)
            raise MismatchError(f"{selector!r} has masks of {', '.join(groups)}, {control!r} of {names}")
    if not drawn:
        raise MismatchError(f"{control!r} has no masks of groups")
    rows = []
    for place, name in enumerate([*groups, NO_GROUP]):
        for row, effect in enumerate(EFFECTS):
            measured, random = effects[row, place], np.array([table[row, place] for _, table in drawn])
            rows.append(
                {
                    "group": name,
                    "effect": effect,
                    "value": float(measured),
                    "control_mean": random.mean(),
                    "control_sd": random.std(ddof=1) if len(random) > 1 else np.nan,
                    "control_low": random.min(),
                    "control_high": random.max(),
                    "repeats": len(random),
                    "p": (1 + (random <= measured + 1e-12).sum()) / (1 + len(random)),
                }
            )
    return pd.DataFrame(rows)


# -- answers -----------------------------------------------------------------------------------------------------------


def answer_table(result: "KnockoutResult") -> pd.DataFrame:
    """See `KnockoutResult.answer_table`."""
    runs, places = np.nonzero(np.ones(result.chosen.shape, dtype=bool) if result.asked is None else result.asked)
    masks = result.masks
    shared = list(dict.fromkeys(["", *(mask.group for mask in masks), *result.groups]))

    def category(values: Sequence[str], rows: np.ndarray, names: Sequence[str] | None = None) -> pd.Categorical:
        """Some rows of the values, each of which is kept once."""
        return pd.Categorical(values, list(names or dict.fromkeys(values)))[rows]

    texts = [None] * len(runs) if result.texts is None else result.texts[runs, places].tolist()
    return pd.DataFrame(
        {
            "run": runs.astype(np.int32),
            "selector": category(["", *(mask.selector for mask in masks)], runs),
            "repeat": np.array([0, *(mask.repeat for mask in masks)], dtype=np.int32)[runs],
            # Masks and groups have the same categories, so that they can be compared.
            "mask": category(["", *(mask.group for mask in masks)], runs, shared),
            "intervention": category(["", *(mask.intervention for mask in masks)], runs),
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
