"""What is drawn at random: pictures with all their questions, because questions about one picture are not independent.

A *unit* is the questions about one picture. Where questions have several pictures, it is those that share one, directly
or through others; a question without a picture is a unit of its own. Every shuffle, half, bootstrap and sample of
`vlmneurons.trust` draws units. What is drawn hangs on the questions' ids and on who shares a picture with whom: not on
the order of the questions, nor on the names or the order of the groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb, prod

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlmneurons.checks import as_whole, check_choice
from vlmneurons.errors import SelectionError
from vlmneurons.statistics.items import GroupedItems, Grouping, Item, ItemStatistics

AS_RECORDED = "group"
"""The grouping that a recording was made with."""

UNITS = ("picture", "question")
"""What is drawn: pictures with all their questions, or questions as if each had a picture of its own."""


def units_of(
    items: ItemStatistics | GroupedItems,
    by: Grouping = AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 0,
    seed: int = 0,
    unit: str = "picture",
) -> "Units":
    """The questions to draw from, and which of them are drawn together.

    Args:
        items: a recording, or questions of one that are grouped already.
        by: the grouping; see `ItemStatistics.grouped`.
        condition: which questions enter.
        balanced: cut the pool to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group.
        seed: of the balanced pool.
        unit: ``"picture"``, or ``"question"`` for questions as if each had a picture of its own.

    Raises:
        SelectionError: no questions of a recording, thin groups, no such unit, or a recording without pictures.
    """
    as_whole("seed", seed, SelectionError, least=0)
    minimum = as_whole("minimum", minimum, SelectionError)
    check_choice("unit", unit, UNITS, SelectionError)
    if isinstance(items, ItemStatistics):
        pool = items.grouped(by, condition=condition, balanced=balanced, minimum=minimum, seed=seed)
    elif not isinstance(items, GroupedItems):
        raise SelectionError(f"questions are drawn from ItemStatistics or GroupedItems; got {type(items).__name__}")
    elif by != AS_RECORDED or condition != "correct":
        raise SelectionError("these questions are grouped already: leave by and condition out")
    else:
        items.check_size(minimum)
        pool = items if balanced is False else items.balanced(None if balanced is True else balanced, seed=seed)
    return Units.of(pool, unit)


@dataclass(frozen=True, eq=False)
class Units:
    """Questions, and which of them are drawn together.

    Attributes:
        pool: the questions, in an order that hangs on their ids and pictures alone.
        unit: ``[question]`` number of the unit of each; units are numbered in the order of the pool.
        alike: ``[question]`` equal numbers for questions of exactly the same pictures.
        kind: what a unit is: ``"picture"`` or ``"question"``.
    """

    pool: GroupedItems
    unit: np.ndarray
    alike: np.ndarray
    kind: str = "picture"

    @classmethod
    def of(cls, pool: GroupedItems, unit: str = "picture") -> "Units":
        """The units of questions.

        Args:
            pool: the questions.
            unit: see `units_of`.
        """
        items = [pool.recording.items[row] for row in pool.rows]
        component, alike = _components(items, pool.rows, unit)
        first: dict[int, str] = {}
        for number, item in zip(component.tolist(), items, strict=True):
            first[number] = min(first.setdefault(number, item.id), item.id)
        places = range(len(items))
        order = np.array(sorted(places, key=lambda n: (first[int(component[n])], items[n].id, int(pool.rows[n]))))
        order = order.astype(np.int64)
        number = {old: new for new, old in enumerate(dict.fromkeys(component[order].tolist()))}
        return cls(pool.taken(order), np.array([number[old] for old in component[order].tolist()]), alike[order], unit)

    @cached_property
    def questions(self) -> np.ndarray:
        """``[unit, group]`` numbers of questions."""
        counts = np.zeros((int(self.unit.max(initial=-1)) + 1, len(self.pool.groups)), dtype=np.int64)
        np.add.at(counts, (self.unit, self.pool.owner), 1)
        return counts

    @property
    def pictures(self) -> np.ndarray:
        """``[group]`` numbers of units that a group has questions of."""
        return (self.questions > 0).sum(0)

    @cached_property
    def _shared(self) -> np.ndarray:
        """``[unit]`` whether several groups have questions of it."""
        return (self.questions > 0).sum(1) > 1

    def check_pictures(self, least: int) -> None:
        """Make sure that every group has pictures enough.

        Args:
            least: number of units.

        Raises:
            SelectionError: some groups have fewer; the message names them.
        """
        counted = zip(self.pool.groups, self.pictures.tolist(), strict=True)
        thin = [f"{group} ({n})" for group, n in counted if n < least]
        if thin:
            raise SelectionError(
                f"at least {least} {self.kind}s a group are needed, which are drawn as wholes; fewer are in "
                f"{', '.join(thin)}: leave them out, or record more"
            )

    # -- shuffles ------------------------------------------------------------------------------------------------------

    @cached_property
    def _exchanged(self) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """What exchanges labels: for each set of places that do, their labels, and the questions of each place.

        Pictures of a single group exchange theirs if they have equally many questions: with more questions a picture
        weighs more in its group's counts, so that others are no fair comparison. A picture of several groups keeps
        their numbers of questions, and exchanges the labels of those of its questions that show the same pictures.
        """
        of_unit = np.split(np.arange(len(self.unit)), np.searchsorted(self.unit, np.arange(1, len(self.questions))))
        sizes = np.where(self._shared, 0, self.questions.sum(1))
        exchanged = []
        for size in np.unique(sizes[sizes > 0]):
            places = [of_unit[unit] for unit in np.flatnonzero(sizes == size)]
            exchanged.append((self.pool.owner[[place[0] for place in places]], places))
        for unit in np.flatnonzero(self._shared):
            for number in dict.fromkeys(self.alike[of_unit[unit]].tolist()):
                own = of_unit[unit][self.alike[of_unit[unit]] == number]
                exchanged.append((self.pool.owner[own], list(own[:, None])))
        return exchanged

    def shuffled(self, draws: int, generator: np.random.Generator) -> np.ndarray:
        """``[draw, question]`` numbers of groups, shuffled so that nothing but the groups' names is changed.

        Args:
            draws: how many shuffles.
            generator: where they come from.
        """
        owners = np.broadcast_to(self.pool.owner, (draws, len(self.unit))).copy()
        for labels, places in self._exchanged:
            if (labels != labels[0]).any():
                drawn = generator.permuted(np.broadcast_to(labels, (draws, len(labels))), axis=1)
                sizes = [len(place) for place in places]
                owners[:, np.concatenate(places)] = np.repeat(drawn, sizes, axis=1)
        return owners

    @cached_property
    def movable(self) -> tuple[np.ndarray, float]:
        """``[group]`` share of each group's pictures that a shuffle can give to others at once, and that of all.

        Of those that it could if all pictures had equally many questions: of 90 pictures against 10, it is 10.
        """
        n_groups = len(self.pool.groups)
        single = self.questions[~self._shared] > 0
        others = len(single) - single.sum(0)
        moved, most = np.zeros(n_groups), np.zeros(n_groups)
        by_unit: dict[int, set[int]] = {}
        for labels, places in self._exchanged:
            here = np.bincount(labels, minlength=n_groups)
            unit = int(self.unit[places[0][0]])
            if self._shared[unit]:
                by_unit.setdefault(unit, set()).update(np.flatnonzero((here > 0) & (here < len(labels))).tolist())
            else:
                moved += np.minimum(here, len(labels) - here)
                most += np.where(others > 0, np.minimum(here, others), here)
        for groups in by_unit.values():
            moved[list(groups)] += 1
        most += (self.questions[self._shared] > 0).sum(0)
        return moved / most, float(moved.sum() / most.sum())

    @property
    def arrangements(self) -> list[int]:
        """For each group how many sets of questions the shuffles can make its own."""
        return [
            prod(comb(len(labels), int((labels == group).sum())) for labels, _ in self._exchanged)
            for group in range(len(self.pool.groups))
        ]

    # -- resamples: how often each question counts, ``[draw, question]`` -----------------------------------------------

    def halves(self, draws: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint halves of the units, of each group's as nearly as pictures of several groups allow.

        Args:
            draws: how many times.
            generator: where they come from.

        Raises:
            SelectionError: groups have so few pictures that a half lacks one.
        """
        belongs = (self.questions > 0).astype(np.int64)

        def draw(n: int) -> np.ndarray:
            # Units in a random order, those of several groups first, each to the half where its groups have fewer.
            order = np.argsort(generator.random((n, len(belongs))) - self._shared, 1)
            coins = generator.integers(0, 2, (n, len(belongs)), dtype=bool)
            lead = np.zeros((n, belongs.shape[1]), dtype=np.int64)
            first = np.zeros((n, len(belongs)), dtype=np.int64)
            for place, unit in enumerate(order.T):
                ahead = (lead * belongs[unit]).sum(1)
                taken = (ahead < 0) | ((ahead == 0) & coins[:, place])
                lead += belongs[unit] * np.where(taken, 1, -1)[:, None]
                first[np.arange(n), unit] = taken
            return first

        def whole_groups(first: np.ndarray) -> np.ndarray:
            return (first @ belongs > 0) & ((1 - first) @ belongs > 0)

        first = self._until(draws, draw, whole_groups, "be in both halves")[:, self.unit]
        return first, 1 - first

    def resampled(self, draws: int, generator: np.random.Generator) -> np.ndarray:
        """Units drawn with replacement: those of one group among themselves, those of several among themselves.

        Args:
            draws: how many times.
            generator: where they come from.

        Raises:
            SelectionError: groups have so few pictures that some are in no resample.
        """
        belongs = self.questions > 0
        kind = np.where(self._shared, -1, belongs.argmax(1))
        parts = [np.flatnonzero(kind == number) for number in dict.fromkeys(kind.tolist())]

        def draw(n: int) -> np.ndarray:
            times = np.zeros((n, len(belongs)), dtype=np.int64)
            for part in parts:
                times[:, part] = generator.multinomial(len(part), np.full(len(part), 1 / len(part)), n)
            return times

        return self._until(draws, draw, lambda times: times @ belongs > 0, "be in a resample")[:, self.unit]

    def first(self, size: int, draws: int, generator: np.random.Generator) -> np.ndarray:
        """As many questions of every group, picture by picture; of the last picture as many as are still needed.

        Args:
            size: questions of each group.
            draws: how many times.
            generator: where they come from.
        """
        turn = np.argsort(np.argsort(generator.random((draws, len(self.questions))), 1), 1)[:, self.unit]
        turn = turn + generator.random((draws, len(self.unit)))
        counts = np.zeros(turn.shape, dtype=np.int64)
        for group in range(len(self.pool.groups)):
            own = np.flatnonzero(self.pool.owner == group)
            np.put_along_axis(counts, own[np.argsort(turn[:, own], 1)[:, :size]], 1, 1)
        return counts

    def _until(
        self,
        draws: int,
        draw: Callable[[int], np.ndarray],
        good: Callable[[np.ndarray], np.ndarray],
        what: str,
    ) -> np.ndarray:
        """Draws that are good for every group, none of which is without questions: the others are drawn again."""
        found = draw(draws)
        for _ in range(100):
            bad = np.flatnonzero(~good(found).all(1))
            if not len(bad):
                return found
            found[bad] = draw(len(bad))
        thin = min(zip(self.pictures.tolist(), self.pool.groups, strict=True))
        raise SelectionError(
            f"the groups share so few pictures that not all of them can {what}; the fewest has {thin[1]} ({thin[0]}): "
            "leave groups out, or record questions about more pictures"
        )


def _components(items: Sequence[Item], rows: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """``[question]`` numbers of units, and of sets of pictures."""
    if unit == "question":
        number = np.unique(rows, return_inverse=True)[1]
        return number, number
    if any(item.pictures is None for item in items):
        raise SelectionError(
            "this recording keeps no pictures of its questions, being of an earlier release, and questions about one "
            "picture must be drawn together: record again with record_items into another folder, or give "
            "unit='question' if no two questions share a picture"
        )
    # A question without a picture stands alone, and so does each row of the recording that is drawn several times.
    shown = [tuple(sorted(set(item.pictures or ()))) or int(row) for item, row in zip(items, rows, strict=True)]
    alike = {one: number for number, one in enumerate(dict.fromkeys(shown))}
    picture: dict[str | int, int] = {}
    edges = [
        (alike[one], picture.setdefault(key, len(picture)))
        for one in alike
        for key in (one if isinstance(one, tuple) else (one,))
    ]
    left, right = np.array(edges, dtype=np.int32).reshape(-1, 2).T  # of wider ones SciPy 1.11 makes nothing
    n = len(alike) + len(picture)
    graph = coo_array((np.ones(len(edges)), (left, right + len(alike))), shape=(n, n))
    number = np.array([alike[one] for one in shown], dtype=np.int64)
    return connected_components(graph, directed=False)[1][number], number
