"""What is drawn at random: pictures with all their questions, because questions about one picture are not independent.

A *unit* is the questions about one picture. Where questions have several pictures, a unit is the questions that share
one, directly or through others; a question without a picture is a unit of its own. Every shuffle, half, bootstrap and
sample of `vlmneurons.trust` draws units. What is drawn depends on the questions' ids and on which of them share a
picture, and neither on the order of the questions nor on the names or the order of the groups.
"""

import itertools
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


def units_to_draw(
    items: ItemStatistics | GroupedItems,
    by: Grouping = AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 0,
    seed: int = 0,
    unit: str = "picture",
    least: int = 0,
) -> "Units":
    """The questions to draw from, and which of them are drawn together.

    Every function of `vlmneurons.trust` that draws questions takes these arguments and hands them on to this one.

    Args:
        items: a recording, or questions of one that are grouped already.
        by: the grouping; see `ItemStatistics.grouped`.
        condition: which questions enter.
        balanced: cut the pool to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group that the user asks for.
        seed: of the balanced pool.
        unit: ``"picture"``, or ``"question"`` for questions as if each had a picture of its own.
        least: least number that the function itself needs, whatever ``minimum`` is.

    Raises:
        SelectionError: no questions of a recording, a group of too few questions or of a single picture, no such unit,
            or a recording without pictures.
    """
    as_whole("seed", seed, SelectionError, least=0)
    minimum = max(least, as_whole("minimum", minimum, SelectionError))
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
    units = Units.of(pool, unit)
    thin = [f"{group} ({n})" for group, n in zip(pool.groups, units.pictures.tolist(), strict=True) if n < 2]
    if thin:
        raise SelectionError(
            f"at least 2 {unit}s a group are needed, which are drawn as wholes; fewer are in {', '.join(thin)}: leave "
            "them out, or record more"
        )
    return units


@dataclass(frozen=True, eq=False)
class Units:
    """Questions, and which of them are drawn together.

    Attributes:
        pool: the questions, in an order that depends on their ids and pictures alone.
        unit: ``[question]`` number of the unit of each; units are numbered in the order of the pool.
        alike: ``[question]`` equal numbers for questions that show exactly the same pictures.
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
            unit: see `units_to_draw`.
        """
        items = [pool.recording.items[row] for row in pool.rows]
        component, alike = _components(items, pool.rows, unit)
        first_id: dict[int, str] = {}
        for number, item in zip(component.tolist(), items, strict=True):
            first_id[number] = min(first_id.setdefault(number, item.id), item.id)

        def rank(place: int) -> tuple[str, str, int]:
            """Units by the least of their ids, and the questions of a unit by theirs."""
            return first_id[int(component[place])], items[place].id, int(pool.rows[place])

        order = np.array(sorted(range(len(items)), key=rank), dtype=np.int64)
        ordered = component[order].tolist()
        number_of = {component: number for number, component in enumerate(dict.fromkeys(ordered))}
        return cls(pool.taken(order), np.array([number_of[component] for component in ordered]), alike[order], unit)

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

    # -- shuffles ------------------------------------------------------------------------------------------------------

    @cached_property
    def _exchanged(self) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Sets of parts that exchange their labels among themselves: the labels, and the questions of each part.

        A picture of a single group is one part. It exchanges its label with pictures that have equally many questions:
        with more questions a picture weighs more in its group's counts, so that others are no fair comparison. Of a
        picture of several groups, each question is a part. It exchanges its label with questions of that picture that
        show the same pictures, so that the picture keeps its number of questions of each group.
        """
        of_unit = np.split(np.arange(len(self.unit)), np.searchsorted(self.unit, np.arange(1, len(self.questions))))
        sizes = np.where(self._shared, 0, self.questions.sum(1))
        exchanged = []
        for size in np.unique(sizes[sizes > 0]):
            parts = [of_unit[unit] for unit in np.flatnonzero(sizes == size)]
            exchanged.append((self.pool.owner[[part[0] for part in parts]], parts))
        for unit in np.flatnonzero(self._shared):
            for number in dict.fromkeys(self.alike[of_unit[unit]].tolist()):
                questions = of_unit[unit][self.alike[of_unit[unit]] == number]
                exchanged.append((self.pool.owner[questions], list(questions[:, None])))
        return exchanged

    def shuffled(self, draws: int, generator: np.random.Generator) -> np.ndarray:
        """``[draw, question]`` numbers of groups, shuffled so that nothing but the groups' names is changed.

        Args:
            draws: how many shuffles.
            generator: draws them.
        """
        owners = np.broadcast_to(self.pool.owner, (draws, len(self.unit))).copy()
        for labels, parts in self._exchanged:
            if (labels != labels[0]).any():
                drawn = generator.permuted(np.broadcast_to(labels, (draws, len(labels))), axis=1)
                owners[:, np.concatenate(parts)] = np.repeat(drawn, list(map(len, parts)), axis=1)
        return owners

    @cached_property
    def movable(self) -> tuple[np.ndarray, float]:
        """``[group]`` share of each group's pictures that a shuffle can give to others at once, and that of all.

        It is a share of those that could be given away if all pictures had equally many questions: of 90 pictures
        against 10, these are 10.
        """
        n_groups = len(self.pool.groups)
        of_single_groups = self.questions[~self._shared] > 0
        others = len(of_single_groups) - of_single_groups.sum(0)
        moved, most = np.zeros(n_groups), np.zeros(n_groups)
        changing: dict[int, set[int]] = {}  # of a picture of several groups: those that can change in it
        for labels, parts in self._exchanged:
            counts = np.bincount(labels, minlength=n_groups)
            unit = int(self.unit[parts[0][0]])
            if self._shared[unit]:
                changing.setdefault(unit, set()).update(np.flatnonzero((counts > 0) & (counts < len(labels))).tolist())
            else:
                moved += np.minimum(counts, len(labels) - counts)
                most += np.where(others > 0, np.minimum(counts, others), counts)
        for groups in changing.values():
            moved[list(groups)] += 1
        most += (self.questions[self._shared] > 0).sum(0)
        return moved / most, float(moved.sum() / most.sum())

    @property
    def arrangements(self) -> list[int]:
        """For each group how many different sets of questions the shuffles can give it."""
        return [
            prod(comb(len(labels), int((labels == group).sum())) for labels, _ in self._exchanged)
            for group in range(len(self.pool.groups))
        ]

    # -- resamples: how often each question counts, ``[draw, question]`` -----------------------------------------------

    def halves(self, draws: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint halves of the units: of each group's units, as nearly as pictures of several groups allow.

        Args:
            draws: how many times.
            generator: draws them.

        Raises:
            SelectionError: groups have so few pictures that a half lacks one.
        """
        belongs = (self.questions > 0).astype(np.int64)

        def draw(n: int) -> np.ndarray:
            # Units come in a random order, those of several groups first; each goes to the half where its groups have
            # fewer units so far, and by a coin where they have as many in either.
            order = np.argsort(generator.random((n, len(belongs))) - self._shared, 1)
            coins = generator.integers(0, 2, (n, len(belongs)), dtype=bool)
            lead = np.zeros((n, belongs.shape[1]), dtype=np.int64)  # units of the first half less those of the second
            in_first = np.zeros((n, len(belongs)), dtype=np.int64)
            for place, unit in enumerate(order.T):
                ahead = (lead * belongs[unit]).sum(1)
                to_first = (ahead < 0) | ((ahead == 0) & coins[:, place])
                lead += belongs[unit] * np.where(to_first, 1, -1)[:, None]
                in_first[np.arange(n), unit] = to_first
            return in_first

        def in_both(in_first: np.ndarray) -> np.ndarray:
            return (in_first @ belongs > 0) & ((1 - in_first) @ belongs > 0)

        in_first = self._until(draws, draw, in_both, "be in both halves")[:, self.unit]
        return in_first, 1 - in_first

    def resampled(self, draws: int, generator: np.random.Generator) -> np.ndarray:
        """Units drawn with replacement: those of one group among themselves, those of several among themselves.

        Args:
            draws: how many times.
            generator: draws them.

        Raises:
            SelectionError: groups have so few pictures that some are in no resample.
        """
        belongs = self.questions > 0
        stratum = np.where(self._shared, -1, belongs.argmax(1))
        strata = [np.flatnonzero(stratum == number) for number in dict.fromkeys(stratum.tolist())]

        def draw(n: int) -> np.ndarray:
            times = np.zeros((n, len(belongs)), dtype=np.int64)
            for units in strata:
                times[:, units] = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), n)
            return times

        return self._until(draws, draw, lambda times: times @ belongs > 0, "be in a resample")[:, self.unit]

    def first(self, size: int, draws: int, generator: np.random.Generator) -> np.ndarray:
        """As many questions of every group, picture by picture; of the last picture as many as are still needed.

        Args:
            size: questions of each group.
            draws: how many times.
            generator: draws them.
        """
        # Each unit has a turn, a whole number; its questions follow in an order of their own, by the part after it.
        turn = np.argsort(np.argsort(generator.random((draws, len(self.questions))), 1), 1)[:, self.unit]
        turn = turn + generator.random((draws, len(self.unit)))
        counts = np.zeros(turn.shape, dtype=np.int64)
        for group in range(len(self.pool.groups)):
            members = np.flatnonzero(self.pool.owner == group)
            np.put_along_axis(counts, members[np.argsort(turn[:, members], 1)[:, :size]], 1, 1)
        return counts

    def _until(
        self,
        draws: int,
        draw: Callable[[int], np.ndarray],
        serves: Callable[[np.ndarray], np.ndarray],
        goal: str,
    ) -> np.ndarray:
        """Draws that serve every group; those that leave a group without questions are drawn again.

        Args:
            draws: how many.
            draw: makes a number of draws, ``[draw, unit]``.
            serves: ``[draw, group]`` whether a draw serves a group.
            goal: what every group must do, in the words of the error.

        Raises:
            SelectionError: a hundred tries were not enough.
        """
        drawn = draw(draws)
        for _ in range(100):
            bad = np.flatnonzero(~serves(drawn).all(1))
            if not len(bad):
                return drawn
            drawn[bad] = draw(len(bad))
        fewest, group = min(zip(self.pictures.tolist(), self.pool.groups, strict=True))
        raise SelectionError(
            f"the groups share so few pictures that not all of them can {goal}; the fewest has {group} ({fewest}): "
            "leave groups out, or record questions about more pictures"
        )


def _components(items: Sequence[Item], rows: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """``[question]`` numbers of units, and of sets of pictures: equal where exactly the same pictures are shown."""
    if unit == "question":
        number = np.unique(rows, return_inverse=True)[1]
        return number, number
    if any(item.pictures is None for item in items):
        raise SelectionError(
            "this recording keeps no pictures of its questions, being of an earlier release, and questions about one "
            "picture must be drawn together: record again with record_items into another folder, or give "
            "unit='question' if no two questions share a picture"
        )
    # A question without a picture is alone in its unit: the row of the recording, a number, stands for its picture.
    shown = [tuple(sorted(set(item.pictures or ()))) or (int(row),) for item, row in zip(items, rows, strict=True)]
    set_number = {pictures: number for number, pictures in enumerate(dict.fromkeys(shown))}
    picture_number = {picture: number for number, picture in enumerate(dict.fromkeys(itertools.chain(*set_number)))}
    # Sets and their pictures are the nodes of a graph; what hangs together is a unit.
    edges = [(number, picture_number[picture]) for pictures, number in set_number.items() for picture in pictures]
    left, right = np.array(edges, dtype=np.int32).reshape(-1, 2).T  # of wider ones SciPy 1.11 makes nothing
    n = len(set_number) + len(picture_number)
    graph = coo_array((np.ones(len(edges)), (left, right + len(set_number))), shape=(n, n))
    number = np.array([set_number[pictures] for pictures in shown], dtype=np.int64)
    return connected_components(graph, directed=False)[1][number], number
