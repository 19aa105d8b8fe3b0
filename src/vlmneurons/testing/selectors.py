"""The contract of selectors, as a check that anyone can run on a selector of their own."""

import copy
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmneurons.errors import SelectionError, VLMNeuronsError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.selectors import LAP, Bundle, CombinedSelector, Conditions, Selector
from vlmneurons.statistics.attributions import AttributionStatistics
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.evidence import Evidence
from vlmneurons.statistics.items import GroupedItems, Item, ItemStatistics


class ContractError(VLMNeuronsError, AssertionError):
    """A selector does not do what every selector must; the message says which clause it breaks, and on which table."""


def check_selector(selector: Selector | type[Selector], *, equivariant: bool = True) -> None:
    """Make sure that a selector does what the rest of the library takes for granted. Takes well under a second.

    It must, on small made-up statistics with dead neurons, ties, a group that leads everywhere, and a mixture of
    experts:

    1. score every neuron for every group: a float tensor ``[group, neuron]`` without NaN or ``inf``;
    2. give the same scores and sets each time, and leave the statistics as they are;
    3. select for every group, in order, never more than the budget, and fewer only if fewer are eligible;
    4. select the highest scores, equal scores by lower index;
    5. keep to ``layers``, never select what ``exclude`` holds, and with ``per_layer`` rank layer by layer;
    6. not care about the order of the groups;
    7. refuse a group without counted tokens, and, if ``contrastive``, a single group;
    8. combine with ``&``, ``|`` and ``-``;
    9. have a repr that names it and tells different settings apart.

    Selectors without a budget per group (combinations, ``LAPE(variant="tang")``) are spared the budget, ranking, layers
    and exclude; combinations, which have no scores, also clause 1. The statistics have sums of activations too. A
    selector that reads single questions, attributions or conditions gets tables of that kind.

    Args:
        selector: the selector, or its class if that can be made without arguments.
        equivariant: whether clause 6 is to hold: False for a rule in which the order of the groups matters.

    Raises:
        ContractError: a clause does not hold.

    Examples:
        >>> class Loudest(Selector):
        ...     def score(self, stats):
        ...         return stats.probability
        >>> check_selector(Loudest)
    """
    if isinstance(selector, type):
        with _clause(f"{selector.__name__}() makes a selector"):
            selector = selector()
    if not isinstance(selector, Selector):
        raise ContractError(f"a selector is an instance of vlmneurons.Selector; got {type(selector).__name__}")
    name = type(selector).__name__
    budgeted = not isinstance(selector, CombinedSelector) and not (selector.fraction is None and selector.count is None)
    for title, stats in _tables_for(selector).items():
        where = f"{name} on the table {title!r}"
        if not isinstance(selector, CombinedSelector):
            _check_scores(selector, stats, where)
        _check_select(selector, stats, where)
        if budgeted:
            _check_budget(selector, stats, where)
            _check_layers_and_exclude(selector, stats, where)
            if title in ("ordinary", "mixture of experts"):
                _check_per_layer(selector, stats, where)
    if equivariant:
        _check_order_of_groups(selector, name)
    _check_refusals(selector, name)
    if all(issubclass(ActivationStatistics, part.reads) for part in _leaves(selector)):
        _check_combining(selector, name)
    _check_repr(selector, name, budgeted)


def selector_tables() -> dict[str, ActivationStatistics]:
    """Statistics of 2,400 neurons and four groups that selectors are checked on, by what is special about them."""
    space = NeuronSpace.from_widths("language", "gate", [700, 900, 800])
    groups = ("Egypt", "Japan", "Kenya", "Peru")
    tokens = np.array([1009, 1511, 997, 1201])
    generator = np.random.default_rng(20251024)
    base = generator.uniform(0.05, 0.6, len(space))
    rates = np.clip(base + generator.normal(0, 0.1, (4, len(space))), 0.0, 1.0)

    def stats(positive: Any, tokens: Any = tokens, **more: Any) -> ActivationStatistics:
        total = np.asarray(positive) * 0.75
        return ActivationStatistics.from_counts(
            more.pop("space", space), groups, positive, tokens, [20, 30, 20, 25], total=total, **more
        )

    ordinary = generator.binomial(tokens[:, None], rates)
    dead = np.where(np.arange(len(space)) % 3 == 0, 0, ordinary)
    dead[3] = 0
    leading = ordinary // 4
    leading[1] = tokens[1] - generator.integers(0, 200, len(space))
    tied = generator.integers(0, 3, (4, len(space)))
    experts = NeuronSpace(
        tuple(Site("language", layer, f"mlp.experts.{expert}") for layer in range(3) for expert in range(4)),
        (150, 250, 200, 200) * 3,
    )
    reached = generator.integers(100, 400, (4, 12))
    reached[:, 5] = 0
    reached[2, 7] = 0
    routed = generator.binomial(np.repeat(reached, experts.widths, axis=1), rates)
    return {
        "ordinary": stats(ordinary),
        "dead neurons, and a group in which all are": stats(dead),
        "one group leads everywhere": stats(leading),
        "many ties": stats(tied, [2, 2, 2, 2]),
        "all groups alike": stats(np.tile(tied[:1], (4, 1)), [2, 2, 2, 2]),
        "mixture of experts": stats(routed, space=experts, routed=reached),
    }


def _tables_for(selector: Selector) -> dict[str, Evidence]:
    """The tables of the kind that a selector reads; a selector made of others gets one of each kind."""
    kind = selector.reads
    if kind is Bundle:
        kinds = {part.reads for part in _leaves(selector)}
        if kinds <= {ActivationStatistics}:
            return dict(selector_tables())
        of_each = [_tables_of(kind) for kind in sorted(kinds, key=lambda kind: kind.__name__)]
        return {title: Bundle([tables[title] for tables in of_each]) for title in of_each[0]}
    return _tables_of(kind)


def _leaves(selector: Selector) -> Iterator[Selector]:
    """The rules that a selector is made of; itself, if it is made of none."""
    combined = isinstance(selector, CombinedSelector)
    parts = (selector.left, selector.right) if combined else getattr(selector, "parts", ())
    for part in parts:
        yield from _leaves(part)
    if not parts:
        yield selector


def _tables_of(kind: type) -> dict[str, Evidence]:
    plain = selector_tables()
    if issubclass(ActivationStatistics, kind):
        return dict(plain)
    if kind is GroupedItems:
        return dict(_grouped_tables())
    if kind is Conditions:
        halved = {title: dataclasses.replace(stats, positive=stats.positive // 2) for title, stats in plain.items()}
        return {title: Conditions({"one": stats, "other": halved[title]}) for title, stats in plain.items()}
    if kind is AttributionStatistics:
        return {title: _attributions_of(stats) for title, stats in plain.items()}
    raise ContractError(f"check_selector has no tables of {kind.__name__} to check a selector on")


def _attributions_of(stats: ActivationStatistics) -> AttributionStatistics:
    total = (stats.positive - stats.positive.double().mean()) / 100
    strong = torch.minimum(stats.positive % 7, stats.items[:, None])
    return AttributionStatistics(stats.space, stats.groups, total, strong, stats.items)


@functools.cache
def _grouped_tables() -> Mapping[str, GroupedItems]:
    """Single questions that add up to about the statistics of `selector_tables`, in a folder that goes with the run."""
    folder = tempfile.TemporaryDirectory(prefix="vlmneurons-")
    _KEPT.append(folder)
    tables = {}
    for number, (title, stats) in enumerate(selector_tables().items()):
        parts = [(row, part) for row in range(len(stats.groups)) for part in range(4 + row)]
        items = [Item(f"{row}-{part}", stats.groups[row], 0, {}) for row, part in parts]
        counts = np.stack([(stats.positive[row].numpy() + 13 * part) // (4 + row) % 60_000 for row, part in parts])
        names = ["positive", "total", "maximum"] + (["reached"] if stats.routed is not None else [])
        made = ItemStatistics.create(Path(folder.name) / str(number), stats.space, items, {}, names)
        values: dict[str, np.ndarray] = {"positive": counts, "total": counts * 0.75, "maximum": counts * 0.5}
        if stats.routed is not None:
            values["reached"] = np.stack([stats.routed[row].numpy() for row, _ in parts])
        tokens = [int(max(counts[n].max(), 1)) for n in range(len(parts))]
        made.write(range(len(parts)), [0] * len(parts), tokens, [0.0] * len(parts), values)
        tables[title] = made.grouped()
    return tables


_KEPT: list[object] = []
"""Temporary folders, which are removed when the interpreter ends."""


@contextmanager
def _clause(expectation: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a ContractError that says what should have worked."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"this must work: {expectation}; it raised {type(error).__name__}: {error}") from error


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ContractError(message)


def _with(selector: Selector, **settings: object) -> Selector:
    """A copy with other settings, whatever kind of class it is."""
    changed = copy.copy(selector)
    for name, value in settings.items():
        object.__setattr__(changed, name, value)
    return changed


def _check_scores(selector: Selector, stats: Evidence, where: str) -> None:
    before = _copied(_tables(stats))
    with _clause(f"score, {where}"):
        scores = selector.score(stats)
    _require(isinstance(scores, Tensor), f"{where}: score must return a tensor; it returned {type(scores).__name__}")
    _require(scores.is_floating_point(), f"{where}: score must return floats; it returned {scores.dtype}")
    shape = [len(stats.groups), len(stats.space)]
    _require(
        list(scores.shape) == shape,
        f"{where}: score must return [group, neuron] = {shape}; it returned {list(scores.shape)}",
    )
    _require(not torch.isnan(scores).any(), f"{where}: score must not be NaN (-inf leaves a neuron out)")
    _require(not (scores == torch.inf).any(), f"{where}: score must not be inf (-inf leaves a neuron out)")
    _check_unchanged(stats, before, f"{where}: score")
    for name, table in _tables(stats).items():
        _require(
            scores.untyped_storage().data_ptr() != table.untyped_storage().data_ptr(),
            f"{where}: score must return a tensor of its own, not the statistics' table {name!r}",
        )
    with _clause(f"score a second time, {where}"):
        second_scores = selector.score(stats)
    _require(torch.equal(scores, second_scores), f"{where}: score must be the same each time for the same statistics")


def _check_select(selector: Selector, stats: Evidence, where: str) -> None:
    before = _copied(_tables(stats))
    with _clause(f"select, {where}"):
        selection = selector.select(stats)
    _check_unchanged(stats, before, f"{where}: select")
    _require(isinstance(selection, Selection), f"{where}: select must return a Selection; got {type(selection)}")
    _require(
        selection.groups == stats.groups,
        f"{where}: select must give a set for every group in order, {stats.groups}; it gave {selection.groups}",
    )
    _require(selection.space == stats.space, f"{where}: select must keep to the space of the statistics")
    with _clause(f"select a second time, {where}"):
        second_selection = selector.select(stats)
    _require(dict(selection) == dict(second_selection), f"{where}: select must give the same sets each time")


def _check_budget(selector: Selector, stats: Evidence, where: str) -> None:
    size = len(stats.space)
    selector = _with(selector, **_PLAIN)
    settings = [{"count": 7, "fraction": None}, {"count": None, "fraction": 0.01}, {"count": None, "fraction": 1.0}]
    for setting in settings:
        budget = setting["count"] or math.floor(setting["fraction"] * size + 1e-6)
        changed = _with(selector, **setting)
        with _clause(f"select with {setting}, {where}"):
            selection, scores = changed.select(stats), changed.score(stats)
            eligible = changed.eligible(stats, scores)
        for row, (group, neurons) in enumerate(selection.items()):
            allowed = scores[row] > -math.inf
            if eligible is not None:
                allowed &= eligible[row]
            _require(
                len(neurons) <= budget,
                f"{where}: a set must not exceed the budget of {budget}; group {group!r} has {len(neurons)}",
            )
            _check_best(neurons, scores[row], allowed, budget, f"{where}, group {group!r}, {setting}")


_PLAIN = {"layers": None, "exclude": None, "per_layer": False}


def _check_best(neurons: NeuronSet, scores: Tensor, allowed: Tensor, budget: int, where: str) -> None:
    """The chosen neurons are the first ones by falling score, then by index. A plain sort, on purpose."""
    values = scores.tolist()
    ranked = sorted(allowed.nonzero().flatten().tolist(), key=lambda neuron: (-values[neuron], neuron))
    wanted = ranked[:budget]
    _require(
        len(neurons) == len(wanted),
        f"{where}: {len(wanted)} neurons must be selected (budget {budget}, eligible {len(ranked)}); "
        f"got {len(neurons)}",
    )
    wrong = sorted(set(neurons) - set(wanted))
    if not wrong:
        return
    tied = wanted and values[wrong[0]] == values[wanted[-1]]
    reason = "equal scores go by lower index" if tied else "the highest scores must be selected"
    raise ContractError(f"{where}: {reason}; neuron {wrong[0]} was selected out of turn")


def _check_layers_and_exclude(selector: Selector, stats: Evidence, where: str) -> None:
    selector = _with(selector, **_PLAIN)
    changed = _with(selector, count=9, fraction=None)
    layer = stats.space.layers[1]
    with _clause(f"select with layers, {where}"):
        within = _with(changed, layers=(layer,)).select(stats)
    for group, neurons in within.items():
        outside = {number: count for number, count in neurons.per_layer().items() if count and number != layer}
        _require(not outside, f"{where}: layers=[{layer}] was given, but group {group!r} has neurons of {outside}")
    with _clause(f"select with layers and a fraction, {where}"):
        share = _with(selector, count=None, fraction=0.02, layers=(layer,)).select(stats)
    part = len(stats.space.restrict(layers=[layer]))
    most = max(map(len, share.values()))
    _require(
        most <= math.floor(0.02 * part + 1e-6),
        f"{where}: with layers, the fraction is of the neurons of those layers ({part}); a group got {most}",
    )
    with _clause(f"select with exclude, {where}"):
        first = changed.select(stats)
        union = NeuronSet.empty(stats.space)
        for neurons in first.values():
            union |= neurons
        for exclude in (union, first):
            rest = _with(changed, exclude=exclude).select(stats)
            for group, neurons in rest.items():
                banned = exclude if isinstance(exclude, NeuronSet) else exclude[group]
                _require(
                    neurons.isdisjoint(banned),
                    f"{where}: exclude was given as a {type(exclude).__name__}, but group {group!r} has neurons of it",
                )


def _check_per_layer(selector: Selector, stats: Evidence, where: str) -> None:
    quota, selector = 3, _with(selector, **_PLAIN)
    with _clause(f"select with per_layer, {where}"):
        whole = _with(selector, count=quota, fraction=None, per_layer=True).select(stats)
        alone = {
            layer: _with(selector, count=quota, fraction=None, layers=(layer,)).select(stats)
            for layer in stats.space.layers
        }
    for group, neurons in whole.items():
        union = NeuronSet.empty(stats.space)
        for part in alone.values():
            union |= part[group]
        _require(
            neurons == union,
            f"{where}: with per_layer and count={quota}, group {group!r} must get the first {quota} of each layer",
        )


def _check_order_of_groups(selector: Selector, name: str) -> None:
    for title in ("ordinary", "mixture of experts"):
        stats = _tables_for(selector)[title]
        order = [stats.groups[place] for place in (2, 0, 3, 1)]
        moved = stats.select_groups(order)
        with _clause(f"select with the groups in another order, {name}"):
            if isinstance(selector, CombinedSelector):
                _require(
                    dict(selector.select(stats)) == dict(selector.select(moved)),
                    f"{name}: the order of the groups must not matter to the sets (else say equivariant=False)",
                )
                continue
            expected = selector.score(stats)[[stats.groups.index(group) for group in order]]
            got = selector.score(moved)
        # Sums over groups in another order round differently.
        _require(
            torch.allclose(expected.double(), got.double(), rtol=1e-9, atol=1e-11),
            f"{name}: a group's scores must not depend on the order of the groups (else say equivariant=False)",
        )


def _check_refusals(selector: Selector, name: str) -> None:
    stats = _tables_for(selector)["ordinary"]
    uncounted = _without_counts(stats, 1)
    message = _refusal(lambda: selector.select(uncounted))
    _require(
        message is not None and stats.groups[1] in message,
        f"{name}: statistics in which nothing of {stats.groups[1]} was counted must be refused with a SelectionError "
        f"that names it; got {message or 'a selection'}",
    )
    single = stats.select_groups([stats.groups[0]])
    if not isinstance(selector, CombinedSelector):
        if selector.contrastive:
            _require(
                _refusal(lambda: selector.select(single)) is not None,
                f"{name} is contrastive: a single group must be refused with a SelectionError",
            )
        else:
            with _clause(f"select for a single group, {name} (else set contrastive = True)"):
                selector.select(single)


def _without_counts(stats: Any, row: int) -> Any:
    """The same table with nothing counted for one group."""
    if isinstance(stats, Bundle):
        return Bundle([_without_counts(table, row) for table in stats.tables])
    if isinstance(stats, Conditions):
        return Conditions({name: _without_counts(table, row) for name, table in stats.statistics.items()})
    if isinstance(stats, GroupedItems):
        return stats.taken(np.flatnonzero(stats.owner != row))
    empty = {
        name: getattr(stats, name).clone()
        for name in ("positive", "tokens", "items", "total", "strong")
        if getattr(stats, name, None) is not None
    }
    for table in empty.values():
        table[row] = 0
    return dataclasses.replace(stats, **empty)


def _refusal(select: Callable[[], object]) -> str | None:
    """The message of the SelectionError, or None if there was none."""
    try:
        select()
    except SelectionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} instead of SelectionError" if not isinstance(error, VLMNeuronsError) else ""
    return None


def _check_combining(selector: Selector, name: str) -> None:
    stats = selector_tables()["ordinary"]
    second = LAP(0.1)
    with _clause(f"combine with &, | and -, {name}"):
        sets, second_sets = selector.select(stats), second.select(stats)
        combined: Mapping[str, tuple[Selector, Callable[[NeuronSet, NeuronSet], NeuronSet]]] = {
            "&": (selector & second, lambda a, b: a & b),
            "|": (selector | second, lambda a, b: a | b),
            "-": (selector - second, lambda a, b: a - b),
        }
        for symbol, (combination, operation) in combined.items():
            for group, neurons in combination.select(stats).items():
                _require(
                    neurons == operation(sets[group], second_sets[group]),
                    f"{name}: selector {symbol} other must give each group the {symbol} of both sets",
                )
    if isinstance(selector, CombinedSelector) or (selector.fraction is None and selector.count is None):
        return
    with _clause(f"take another budget of a combination, {name}"):
        union = (selector | second).take(count=5).select(stats)
        parts = [part.take(count=5).select(stats) for part in (selector, second)]
    for group, neurons in union.items():
        _require(
            neurons == parts[0][group] | parts[1][group],
            f"{name}: (selector | other).take(count=5) must be that of both parts, for every group",
        )


def _check_repr(selector: Selector, name: str, budgeted: bool) -> None:
    with _clause(f"repr, {name}"):
        text = repr(selector)
    for part in _leaves(selector):
        _require(
            isinstance(part, CombinedSelector) or type(part).__name__ in text,
            f"{name}: repr must have the name; it is {text!r}",
        )
        for setting in part._parameters() if type(part).__repr__ is Selector.__repr__ else ():
            _require(
                hasattr(part, setting) or hasattr(part, f"_{setting}"),
                f"{name}: repr cannot tell values of {setting!r} apart: {type(part).__name__} must keep it as "
                f"self.{setting}, or have a __repr__ of its own",
            )
    _require(" at 0x" not in text, f"{name}: repr must say the settings, not an address; it is {text!r}")
    if budgeted:
        with _clause(f"repr with another budget, {name}"):
            texts = {repr(_with(selector, count=count, fraction=None)) for count in (5, 6)}
        _require(len(texts) == 2, f"{name}: repr must tell different budgets apart; it is {text!r} for both")
    title = selector.select(_tables_for(selector)["ordinary"]).selector
    _require(title == text, f"{name}: a selection must say how it was made, {text!r}; it says {title!r}")


def _tables(stats: object) -> dict[str, Tensor]:
    if isinstance(stats, Bundle):
        return {f"{n}.{name}": t for n, table in enumerate(stats.tables) for name, t in _tables(table).items()}
    if isinstance(stats, Conditions):
        return {
            f"{condition}.{name}": t
            for condition, table in stats.statistics.items()
            for name, t in _tables(table).items()
        }
    names = ("positive", "tokens", "items", "routed", "total", "strong")
    if isinstance(stats, GroupedItems):
        names = ("tokens", "items")
        return {name: getattr(stats, name) for name in names} | {"rows": torch.from_numpy(stats.rows.copy())}
    return {name: getattr(stats, name) for name in names if getattr(stats, name, None) is not None}


def _copied(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: table.clone() for name, table in tables.items()}


def _check_unchanged(stats: object, before: Mapping[str, Tensor], call: str) -> None:
    for name, table in _tables(stats).items():
        _require(torch.equal(table, before[name]), f"{call} must not write to the statistics; it changed {name!r}")
