"""The contract of selectors, as a check that anyone can run on a selector of their own."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmneurons.errors import SelectionError, VLMNeuronsError
from vlmneurons.neurons import NeuronSet, Selection
from vlmneurons.selectors import LAP, CombinedSelector, Selector
from vlmneurons.sites import NeuronSpace, Site
from vlmneurons.statistics import ActivationStatistics


class ContractError(VLMNeuronsError, AssertionError):
    """A selector does not do what every selector must; the message says which clause it breaks, and on which table."""


def check_selector(selector: Selector | type[Selector], *, equivariant: bool = True) -> None:
    """Make sure that a selector does what the rest of the library takes for granted. Takes well under a second.

    It must, on small made-up statistics with dead neurons, ties, a group that leads everywhere, and a mixture of
    experts:

    1. score every neuron for every group: a float tensor ``[group, neuron]`` without NaN;
    2. give the same scores and sets each time, and leave the statistics as they are;
    3. select for every group, in order, never more than the budget, and fewer only if fewer are eligible;
    4. select the highest scores, equal scores by lower index;
    5. keep to ``layers``, and never select what ``exclude`` holds;
    6. not care about the order of the groups;
    7. refuse a group without counted tokens, and, if ``contrastive``, a single group;
    8. combine with ``&``, ``|`` and ``-``;
    9. have a repr that names it and tells different settings apart.

    Selectors without a budget per group (combinations, ``LAPE(variant="tang")``) are spared the budget, ranking, layers
    and exclude; combinations, which have no scores, also clause 1. The statistics have sums of activations too.

    Args:
        selector: the selector, or its class if that can be made without arguments.
        equivariant: whether clause 6 is to hold: False for a rule in which the order of the groups matters.

    Raises:
        ContractError: a clause does not hold.

    Example:
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
    for title, stats in selector_tables().items():
        where = f"{name} on the table {title!r}"
        if not isinstance(selector, CombinedSelector):
            _check_scores(selector, stats, where)
        _check_select(selector, stats, where)
        if budgeted:
            _check_budget(selector, stats, where)
            _check_layers_and_exclude(selector, stats, where)
    if equivariant:
        _check_order_of_groups(selector, name)
    _check_refusals(selector, name)
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


@contextmanager
def _clause(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a ContractError that says what should have worked."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"this must work: {what}; it raised {type(error).__name__}: {error}") from error


def _require(holds: Any, message: str) -> None:
    if not holds:
        raise ContractError(message)


def _with(selector: Selector, **settings: Any) -> Selector:
    """A copy with other settings, whatever kind of class it is."""
    changed = copy.copy(selector)
    for name, value in settings.items():
        object.__setattr__(changed, name, value)
    return changed


def _check_scores(selector: Selector, stats: ActivationStatistics, where: str) -> None:
    before = _tables(stats)
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
    _check_unchanged(stats, before, f"{where}: score")
    for name in before:
        own = getattr(stats, name)
        _require(
            scores.untyped_storage().data_ptr() != own.untyped_storage().data_ptr(),
            f"{where}: score must return a tensor of its own, not the statistics' table {name!r}",
        )
    with _clause(f"score a second time, {where}"):
        again = selector.score(stats)
    _require(torch.equal(scores, again), f"{where}: score must be the same each time for the same statistics")


def _check_select(selector: Selector, stats: ActivationStatistics, where: str) -> None:
    before = _tables(stats)
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
        again = selector.select(stats)
    _require(dict(selection) == dict(again), f"{where}: select must give the same sets each time")


def _check_budget(selector: Selector, stats: ActivationStatistics, where: str) -> None:
    size = len(stats.space)
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


def _check_best(neurons: NeuronSet, scores: Tensor, allowed: Tensor, budget: int, where: str) -> None:
    """The chosen neurons are the first ones by falling score, then by index. A plain sort, on purpose."""
    ranked = sorted(allowed.nonzero().flatten().tolist(), key=lambda neuron: (-float(scores[neuron]), neuron))
    wanted = ranked[:budget]
    _require(
        len(neurons) == len(wanted),
        f"{where}: {len(wanted)} neurons must be selected (budget {budget}, eligible {len(ranked)}); "
        f"got {len(neurons)}",
    )
    wrong = sorted(set(neurons) - set(wanted))
    if not wrong:
        return
    tied = wanted and float(scores[wrong[0]]) == float(scores[wanted[-1]])
    reason = "equal scores go by lower index" if tied else "the highest scores must be selected"
    raise ContractError(f"{where}: {reason}; neuron {wrong[0]} was selected out of turn")


def _check_layers_and_exclude(selector: Selector, stats: ActivationStatistics, where: str) -> None:
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


def _check_order_of_groups(selector: Selector, name: str) -> None:
    for title in ("ordinary", "mixture of experts"):
        stats = selector_tables()[title]
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
    stats = selector_tables()["ordinary"]
    positive, tokens = stats.positive.clone(), stats.tokens.clone()
    positive[1], tokens[1] = 0, 0
    uncounted = ActivationStatistics.from_counts(stats.space, stats.groups, positive, tokens, total=stats.total * 0)
    message = _refusal(lambda: selector.select(uncounted))
    _require(
        message is not None and stats.groups[1] in message,
        f"{name}: statistics in which no token of {stats.groups[1]} was counted must be refused with a SelectionError "
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


def _refusal(select: Callable[[], Any]) -> str | None:
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
    other = LAP(0.1)
    with _clause(f"combine with &, | and -, {name}"):
        mine, theirs = selector.select(stats), other.select(stats)
        combined: Mapping[str, tuple[Selector, Callable[[NeuronSet, NeuronSet], NeuronSet]]] = {
            "&": (selector & other, lambda a, b: a & b),
            "|": (selector | other, lambda a, b: a | b),
            "-": (selector - other, lambda a, b: a - b),
        }
        for symbol, (both, operation) in combined.items():
            for group, neurons in both.select(stats).items():
                _require(
                    neurons == operation(mine[group], theirs[group]),
                    f"{name}: selector {symbol} other must give each group the {symbol} of both sets",
                )


def _check_repr(selector: Selector, name: str, budgeted: bool) -> None:
    with _clause(f"repr, {name}"):
        text = repr(selector)
    _require(isinstance(selector, CombinedSelector) or name in text, f"{name}: repr must have the name; it is {text!r}")
    _require(" at 0x" not in text, f"{name}: repr must say the settings, not an address; it is {text!r}")
    if budgeted:
        with _clause(f"repr with another budget, {name}"):
            texts = {repr(_with(selector, count=count, fraction=None)) for count in (5, 6)}
        _require(len(texts) == 2, f"{name}: repr must tell different budgets apart; it is {text!r} for both")
    title = selector.select(selector_tables()["ordinary"]).selector
    _require(title == text, f"{name}: a selection must say how it was made, {text!r}; it says {title!r}")


def _tables(stats: ActivationStatistics) -> dict[str, Tensor]:
    names = ("positive", "tokens", "items", "routed", "total")
    return {name: getattr(stats, name).clone() for name in names if getattr(stats, name) is not None}


def _check_unchanged(stats: ActivationStatistics, before: Mapping[str, Tensor], what: str) -> None:
    for name, table in before.items():
        _require(
            torch.equal(getattr(stats, name), table), f"{what} must not write to the statistics; it changed {name!r}"
        )
