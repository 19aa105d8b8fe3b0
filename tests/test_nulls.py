"""Shuffles, halves and resamples draw pictures with all their questions: by a table of designs, and against nothing."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vlmneurons as vn
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.files import tables as files
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import CAS, LAP, MAD, AveragePrecision
from vlmneurons.statistics.items import Item, ItemStatistics
from vlmneurons.trust.units import Units, units_to_draw

NEURONS = 24

# Each question is (group, pictures); what is written once stands for one picture.


def own(sizes: dict[str, list[int]]) -> list:
    """Pictures of a single group, with these numbers of questions."""
    return [
        (group, (f"{group}{picture}",))
        for group, numbers in sizes.items()
        for picture, number in enumerate(numbers)
        for _ in range(number)
    ]


def several(*pictures: str) -> list:
    """Pictures of several groups: a letter for each of their questions."""
    return [(group, (f"shared {n}",)) for n, groups in enumerate(pictures) for group in groups]


DESIGNS = {
    "1 question a picture": own({"A": [1] * 9, "B": [1] * 9}),
    "4 questions a picture": own({"A": [4] * 6, "B": [4] * 6, "C": [4] * 6}),
    "10 questions a picture": own({"A": [10] * 5, "B": [10] * 5}),
    "10, 4 and 1 in every group": own({group: [10, 10, 4, 4, 1, 1, 1] for group in "ABC"}),
    "unequal numbers of pictures": own({"A": [2] * 12, "B": [2] * 4, "C": [2] * 3}),
    "some pictures that none can be exchanged for": own({"A": [3] * 6 + [7], "B": [3] * 6 + [9]}),
    "no pictures at all": [(group, ()) for group in "AABBCC" * 5],
    "half of the questions without pictures": own({"A": [3] * 4, "B": [3] * 4}) + [(g, ()) for g in "ABABABABAB"],
    "pictures of all groups": several(*["ABC"] * 8),
    "pictures of all groups, several questions each": several(*["AABBCC"] * 6),
    "pictures of all groups, unequally": several(*["AAAB", "ABBB"] * 5),
    "pictures of two of three groups": several(*["AABB", "BBCC", "CCAA"] * 4),
    "pictures of one and of two groups": own({"A": [2] * 5, "B": [2] * 5}) + several(*["AB"] * 5),
    "one picture shared, the others not": own({"A": [2] * 6, "B": [2] * 6}) + several("AABB"),
    "a group with shared pictures alone": own({"A": [2] * 5, "B": [2] * 5}) + several(*["ABC"] * 5),
    "two pictures a question": [(g, (f"{n}", f"{n}'")) for n in range(12) for g in "AB"[n % 2]],
    "pictures chained by questions of two": [
        (group, shown)
        for n in range(12)
        for group in "AB"[n % 2]
        for shown in ((f"{n}",), (f"{n}", f"{n}'"), (f"{n}'",))
    ],
    "groups linked by questions of two pictures": [
        (group, shown)
        for n in range(8)
        for group, shown in (
            ("A", (f"{n}",)),
            ("B", (f"{n}",)),
            ("B", (f"{n}", f"{n}'")),
            ("A", (f"{n}", f"{n}'")),
            ("B", (f"{n}'",)),
        )
    ],
    "one picture named twice in a question": [(g, (f"{n}", f"{n}")) for n in range(14) for g in "AB"[n % 2]],
    "eight groups": own({group: [2, 1, 3] for group in "ABCDEFGH"}),
    "two pictures a group": own({group: [3, 3] for group in "ABCDE"}),
    "names of groups that are no letters": own({"日本": [2] * 5, "a b": [2] * 5, "nan": [2] * 5}),
    "a picture whose name is another's question": [
        *((g, (f"q{n}",)) for n in range(12) for g in "AB"[n % 2]),
        *((g, ()) for g in "ABAB"),
    ],
}


def recorded(folder, design, order=None, names=None, seed=0, accuracy=1.0, planted=None):
    """A recording of a design, whose counts hang on questions and pictures, and on groups only where planted."""
    rng = np.random.default_rng(seed)
    key = {name: number for number, name in enumerate(dict.fromkeys(p for _, shown in design for p in shown))}
    effect = rng.normal(0, 0.7, (len(key) + 1, NEURONS))
    logit = rng.normal(-1, 1, NEURONS) + rng.normal(0, 0.3, (len(design), NEURONS))
    for row, (group, shown) in enumerate(design):
        logit[row] += effect[[key[one] for one in shown] or [len(key)]].mean(0)
        if group == planted:
            logit[row, :4] += 4
    counts = rng.binomial(50, 1 / (1 + np.exp(-logit)))
    chosen = (rng.random(len(design)) > accuracy).astype(int)
    order = range(len(design)) if order is None else order
    items = [
        Item(f"q{row}", (names or {}).get(design[row][0], design[row][0]), 0, {}, tuple(design[row][1]))
        for row in order
    ]
    space = NeuronSpace.from_widths("language", "gate", [NEURONS // 2] * 2)
    made = ItemStatistics.create(folder, space, items, {}, ["positive"])
    rows = list(order)
    made.write(
        range(len(items)), chosen[rows].tolist(), [50] * len(rows), [0.0] * len(rows), {"positive": counts[rows]}
    )
    return made


def tables(items, rule, seed=3):
    """One of each table that draws."""
    return {
        "null": vn.null_distribution(items, rule, permutations=9, seed=seed),
        "halves": vn.stability(items, rule, method="halves", resamples=3, seed=seed),
        "bootstrap": vn.stability(items, rule, method="bootstrap", resamples=2, seed=seed),
        "pools": vn.stability(items, rule, method="pools", size=2, resamples=2, seed=seed),
        "sizes": vn.sample_sizes(items, rule, [2], repeats=2, seed=seed),
    }


@pytest.mark.parametrize("name", DESIGNS)
def test_nothing_hangs_on_the_order_of_the_questions_or_on_the_names_of_the_groups(tmp_path, name):
    design = DESIGNS[name]
    groups = sorted({group for group, _ in design})
    names = dict(zip(groups, [f"{len(groups) - n} {group}" for n, group in enumerate(groups)], strict=True))
    back = {new: old for old, new in names.items()}
    order = np.random.default_rng(1).permutation(len(design)).tolist()
    first = tables(recorded(tmp_path / "1", design), LAP(count=4))
    other = tables(recorded(tmp_path / "2", design, order, names), LAP(count=4))
    for title, table in first.items():
        keys = [column for column in ("size", "group") if column in table]
        renamed = other[title].assign(group=other[title]["group"].replace(back))
        one, two = (one.sort_values(keys).reset_index(drop=True) for one in (table, renamed))
        for column in table.columns.drop(keys):
            assert one[column].tolist() == pytest.approx(two[column].tolist(), abs=1e-12), (title, column)
    items = ItemStatistics.load(tmp_path / "1")
    again = vn.stability(items, LAP(count=4), method="halves", resamples=3, seed=4)
    assert not again.equals(first["halves"])


@pytest.mark.parametrize("name", DESIGNS)
def test_every_number_is_one_and_lies_where_it_must(tmp_path, name):
    found = tables(recorded(tmp_path / "run", DESIGNS[name]), MAD(count=4))
    n_groups = len({group for group, _ in DESIGNS[name]})
    for title, table in found.items():
        assert not table.isna().any().any(), (title, table)
        shares = [one for one in table.columns if one[:3] in ("jac", "bet", "cha", "mov") or one[:2] in ("p_", "p")]
        assert table[shares].ge(0).all().all(), title
        assert table[shares].le(1).all().all(), title
    null = found["null"]
    assert null["p"].mul(10).round(9).isin(range(1, 11)).all()
    assert (null["p_holm"] >= null["p"]).all()
    assert null["p_holm"].min() >= null["p_holm_least"].min() - 1e-12
    assert (null["p_holm_least"] >= n_groups / 10).all()
    assert null["questions"].tolist() == found["halves"]["questions"].tolist()[:-1]
    assert null["pictures"].tolist() == found["halves"]["pictures"].tolist()[:-1]


def by_hand(design):
    """The units of a design, by joining what shares a picture until nothing changes: sets of questions."""
    units = [({row}, set(shown)) for row, (_, shown) in enumerate(design)]
    while True:
        joined = next(
            ((a, b) for a, b in itertools.combinations(range(len(units)), 2) if units[a][1] & units[b][1]), None
        )
        if joined is None:
            return {frozenset(rows) for rows, _ in units}
        a, b = joined
        merged = (units[a][0] | units[b][0], units[a][1] | units[b][1])
        units = [one for n, one in enumerate(units) if n not in joined] + [merged]


@pytest.mark.parametrize("name", DESIGNS)
def test_units_are_what_shares_a_picture_and_are_drawn_as_wholes(tmp_path, name):
    design = DESIGNS[name]
    units = units_to_draw(recorded(tmp_path / "run", design), condition="all")
    rows, owner, unit = units.pool.rows, units.pool.owner, units.unit
    assert {frozenset(rows[unit == n].tolist()) for n in range(unit.max() + 1)} == by_hand(design)
    assert units.pictures.tolist() == [
        len({n for n in unit[owner == group].tolist()}) for group in range(len(units.pool.groups))
    ]
    rng = np.random.default_rng(0)
    first, second = units.halves(20, rng)
    again = units.resampled(20, rng)
    assert ((first + second) == 1).all()
    for weights in (first, second, again):
        for n in range(unit.max() + 1):
            assert (weights[:, unit == n] == weights[:, unit == n][:, :1]).all()
        assert all(weights[:, owner == group].any(1).all() for group in range(len(units.pool.groups)))
    single = [n for n in range(unit.max() + 1) if len(set(owner[unit == n].tolist())) == 1]
    for group in range(len(units.pool.groups)):
        # Pictures of one group fall in halves; where others share theirs, these cannot all be even.
        mine = [n for n in single if owner[unit == n][0] == group]
        if len(single) == unit.max() + 1:
            here = np.array([first[:, unit == n][:, 0] for n in mine]).sum(0)
            assert set(here.tolist()) <= {len(mine) // 2, -(-len(mine) // 2)}
            assert (np.array([again[:, unit == n][:, 0] for n in mine]).sum(0) == len(mine)).all()
    taken = units.first(3, 20, rng) if units.pool.items.min() >= 3 else units.first(1, 20, rng)
    for group in range(len(units.pool.groups)):
        mine = taken[:, owner == group]
        assert (mine.sum(1) == (3 if units.pool.items.min() >= 3 else 1)).all()
        for draw in mine:  # whole pictures, but for the last
            parts = [draw[unit[owner == group] == n] for n in set(unit[owner == group].tolist())]
            assert sum(0 < part.sum() < len(part) for part in parts) <= 1


@pytest.mark.parametrize("name", DESIGNS)
def test_a_shuffle_changes_nothing_but_whose_pictures_of_equally_many_questions_are(tmp_path, name):
    units = units_to_draw(recorded(tmp_path / "run", DESIGNS[name], accuracy=0.8), balanced=True)
    owner, unit = units.pool.owner, units.unit
    shown = [tuple(sorted(set(units.pool.recording.items[row].pictures))) or (int(row),) for row in units.pool.rows]
    owners = units.shuffled(20, np.random.default_rng(0))
    assert (np.sort(owners, 1) == np.sort(owner)).all()  # as many questions of every group
    mixed = {n for n in range(unit.max() + 1) if len(set(owner[unit == n].tolist())) > 1}
    for drawn in owners:
        sizes = {group: [] for group in range(len(units.pool.groups))}
        before = {group: [] for group in range(len(units.pool.groups))}
        for n in range(unit.max() + 1):
            labels = drawn[unit == n]
            if n in mixed:
                for one in set(itertools.compress(shown, unit == n)):
                    here = np.array([own == one for own in shown])
                    assert sorted(drawn[here]) == sorted(owner[here])
            else:
                assert (labels == labels[0]).all()
                sizes[int(labels[0])].append(len(labels))
                before[int(owner[unit == n][0])].append(len(labels))
        assert {group: sorted(one) for group, one in sizes.items()} == {g: sorted(one) for g, one in before.items()}
    assert len({tuple(drawn) for drawn in owners.tolist()}) > 1


def test_the_p_value_is_that_of_all_arrangements_counted_one_by_one(tmp_path):
    design = own({"A": [2, 2, 2, 1, 1], "B": [2, 2, 1, 1, 1]}) + several("AB", "AB")
    items = recorded(tmp_path / "run", design)
    counts = np.fromfile(items.folder / "positive.bin", dtype="<u2").reshape(len(items), -1).astype(float)

    def strength(labels):
        p = np.stack([counts[labels == group].sum(0) / (50 * (labels == group).sum()) for group in "AB"])
        return np.sort(np.abs(p - p.mean(0)), 1)[:, -3:].mean(1)

    pictures = {}
    for row, (_, shown) in enumerate(design):
        pictures.setdefault(shown, []).append(row)
    labels = np.array([group for group, _ in design])
    twos = [rows for shown, rows in pictures.items() if len(rows) == 2 and "shared" not in shown[0]]
    ones = [rows for rows in pictures.values() if len(rows) == 1]
    both = [rows for shown, rows in pictures.items() if "shared" in shown[0]]
    found = []
    for a in itertools.combinations(range(len(twos)), 3):
        for b in itertools.combinations(range(len(ones)), 2):
            for swaps in itertools.product((False, True), repeat=len(both)):
                here = np.full(len(labels), "B")
                for rows in [*(twos[n] for n in a), *(ones[n] for n in b)]:
                    here[rows] = "A"
                for rows, swap in zip(both, swaps, strict=True):
                    here[rows] = labels[rows][::-1] if swap else labels[rows]
                found.append(strength(here))
    assert len(found) == 10 * 10 * 4
    exact = (np.array(found) >= strength(labels) - 1e-12).mean(0)
    table = vn.null_distribution(items, MAD(count=3), permutations=250)
    assert table["strength"].tolist() == pytest.approx(strength(labels))
    assert np.abs(table["p"] - exact).max() < 4 * np.sqrt(0.25 / 250)
    assert table["movable"].tolist() == [6 / 7, 6 / 7]  # one of five pictures with two questions stays at once
    assert units_to_draw(items).arrangements == [400, 400]


def calibration():
    path = Path(__file__).parent.parent / "benchmarks" / "null_calibration.py"
    spec = importlib.util.spec_from_file_location("null_calibration", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["null_calibration"] = module
    spec.loader.exec_module(module)
    return module


def test_where_there_is_nothing_to_find_one_p_in_twenty_is_below_its_level():
    # A small sample of the table in docs/methods.md, which compares the first of these with null_distribution's own p.
    program = calibration()
    shares = {name: program.false_shares(name, 10, checked=0) for name in program.DESIGNS}
    for selector in program.SELECTORS:
        # 440 values; those of one study hang together, as if there were about half of them.
        assert 0.015 < np.mean([one[selector] for one in shares.values()]) < 0.09, selector
        assert max(one[selector] for one in shares.values()) <= 0.2, selector
    assert shares["4 questions a picture"]["by question"] > 0.5  # what a null by question says


def test_the_shuffles_of_the_calibration_are_those_of_the_null():
    program = calibration()
    program.SHUFFLES = 19
    program.false_shares("half of the pictures of several groups", 1, checked=1)


def test_the_demos_pictures_dealt_to_made_up_groups_have_nothing_to_find(tmp_path):
    model, questions = vn.load_demo()
    identify = questions.split(0.5, seed=0)[0].balanced(20, seed=0)
    items = vn.record_items(model, identify, tmp_path / "items", batch_size=64, progress=False)
    pictures = sorted({item.image_key for item in identify})
    small = []
    for seed in range(2):
        dealt = dict(zip(pictures, np.random.default_rng(seed).permutation(np.arange(len(pictures)) % 8), strict=True))
        labels = ["ABCDEFGH"[dealt[item.image_key]] for item in identify]
        table = vn.null_distribution(items, CAS(0.02), by=labels, permutations=19, seed=seed)
        small += (table["p"] <= 0.05).tolist()
    assert np.mean(small) < 0.3  # by question it was 0.72


def test_halves_agree_as_much_between_groups_as_within_where_groups_do_not_differ():
    program = calibration()
    within, between, chance = program.overlaps("4 questions a picture", 8)
    assert abs(within - between) < 0.05
    assert within > 5 * chance  # which is no reference: neurons that always fire are in every half's sets


def test_the_overlap_between_groups_is_that_of_the_one_half_with_the_others_of_the_other_half(tmp_path):
    items = recorded(tmp_path / "run", own({"A": [2] * 8, "B": [2] * 8, "C": [2] * 8}), planted="A")
    table = vn.stability(items, CAS(count=4), method="halves", resamples=6, seed=2).set_index("group")
    units = units_to_draw(items, minimum=2)
    first, second = units.halves(6, np.random.default_rng(2))
    within, between = [], []
    for one, other in zip(first, second, strict=True):
        a, b = (CAS(count=4).select(units.pool.taken(np.flatnonzero(half)).statistics) for half in (one, other))
        within.append(a["A"].jaccard(b["A"]))
        between.append([a["A"].jaccard(b["B"]), a["A"].jaccard(b["C"])])
    assert table.loc["A", "jaccard"] == pytest.approx(np.mean(within))
    assert table.loc["A", "jaccard"] > table.loc["A", "between_groups"] + 0.5
    assert table.loc["A", "between_groups"] == pytest.approx(np.mean(between))
    assert table.loc["A", "pictures"] == 8
    assert table.loc["all", "pictures"] == 24
    assert table.loc["all", "between_groups"] == pytest.approx(table["between_groups"].iloc[:3].mean())


def test_a_planted_difference_is_found_whatever_the_pictures(tmp_path):
    for number, name in enumerate(("10, 4 and 1 in every group", "pictures of all groups")):
        items = recorded(tmp_path / str(number), DESIGNS[name], planted="A")
        table = vn.null_distribution(items, CAS(count=4), permutations=99).set_index("group")
        assert table.loc["A", "p"] == 1 / 100, name
        assert table.loc["A", "p_holm"] == table.loc["A", "p_holm_least"] == pytest.approx(3 / 100)


def test_by_default_there_are_shuffles_enough_for_a_corrected_p_and_fewer_are_said(tmp_path):
    def tokens(questions, rule):
        return dict(zip(questions.groups, questions.tokens.tolist(), strict=True))

    items = recorded(tmp_path / "eight", DESIGNS["eight groups"])
    table = vn.null_distribution(items, LAP(count=4), measure=tokens)
    assert table["p"].tolist() == [1.0] * 8  # shuffles are equally strong, and count
    assert table["p_holm_least"].tolist() == pytest.approx([8 / 321] * 8)  # 40 a group
    few = vn.null_distribution(items, LAP(count=4), measure=tokens, permutations=150)
    assert few["p_holm_least"].gt(0.05).all()
    enough = vn.null_distribution(items, LAP(count=4), measure=tokens, permutations=160)
    assert enough["p_holm_least"].lt(0.05).all()
    three = recorded(tmp_path / "three", DESIGNS["4 questions a picture"])
    assert vn.null_distribution(three, LAP(count=4), measure=tokens)["p_holm_least"].to_numpy() == pytest.approx(
        3 / 201
    )
    # Few pictures bound p as few shuffles do: two of ten can be a group's in 45 ways.
    small = recorded(tmp_path / "small", DESIGNS["two pictures a group"])
    assert vn.null_distribution(small, LAP(count=4), measure=tokens)["p_holm_least"].to_numpy() == pytest.approx(5 / 45)


REFUSED = {
    "one picture for everything": (
        several("AAABBB"),
        {},
        r"at least 2 pictures a group are needed, which are drawn as wholes; fewer are in A \(1\), B \(1\): leave them",
    ),
    "a picture for each group": (own({"A": [5], "B": [5], "C": [5]}), {}, r"fewer are in A \(1\), B \(1\), C \(1\)"),
    "a group with one picture": (own({"A": [2] * 5, "B": [2] * 5, "C": [4]}), {}, r"fewer are in C \(1\)"),
    "other numbers of questions in each group": (
        own({"A": [10] * 6, "B": [4] * 6, "C": [1] * 6}),
        {},
        r"shuffled among pictures of equally many questions, and only 0% can change theirs \(A 0%, B 0%, C 0%\); a "
        "null needs half. Give every group as many questions a picture, by balanced=True or a number, or leave out",
    ),
    "too few that can be exchanged": (
        own({"A": [4] * 6 + [2] * 2, "B": [3] * 6 + [2] * 2}),
        {},
        r"only 25% can change theirs \(A 25%, B 25%\)",
    ),
    "one picture among many of the other's": (
        own({"A": [2] * 20, "B": [2] + [3] * 19}),
        {},
        r"only 5% can change theirs \(A 5%, B 5%\)",
    ),
    "groups linked, but by questions of their own pictures": (
        [(g, shown) for n in range(6) for g, shown in (("A", (f"{n}",)), ("A", (f"{n}", f"{n}'")), ("B", (f"{n}'",)))],
        {},
        r"only 0% can change theirs \(A 0%, B 0%\)",
    ),
    "too few pictures for any p": (
        own({"A": [3, 3], "B": [3, 3]}),
        {},
        r"the groups have so few pictures \(2, 2\) that no p can be below 0.17: record more",
    ),
    "one group": (own({"A": [2] * 5}), {}, "labels of one group cannot be shuffled; got only A"),
    "a unit that is none": (
        DESIGNS["two pictures a group"],
        {"unit": "image"},
        "unit='image' does not exist; choose from picture, question",
    ),
    "no shuffle": (DESIGNS["two pictures a group"], {"permutations": 0}, "permutations 0 is less than 1"),
    "shuffles of a half": (
        DESIGNS["two pictures a group"],
        {"permutations": 0.5},
        "permutations is a whole number; got 0.5",
    ),
    "thin groups": (
        DESIGNS["two pictures a group"],
        {"minimum": 7},
        r"at least 7 questions a group that were answered right are needed; fewer are in A \(6\), B \(6\)",
    ),
    "a measure without a group": (
        DESIGNS["eight groups"],
        {"measure": lambda questions, rule: {"A": 1.0}},
        "the measure gives no number for B, C, D, E, F, G, H",
    ),
    "a measure that is NaN": (
        DESIGNS["eight groups"],
        {"measure": lambda questions, rule: dict.fromkeys("ABCDEFGH", float("nan"))},
        "the measure gives no number for A, B",
    ),
    "a measure that is one number": (
        DESIGNS["eight groups"],
        {"measure": lambda questions, rule: 0.5},
        "what the measure gives is a dictionary of numbers by group; got 0.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_null_that_would_say_nothing_is_refused(tmp_path, name, unchecked):
    design, how, message = REFUSED[name]
    with pytest.raises(SelectionError, match=message):
        vn.null_distribution(recorded(tmp_path / "run", design), LAP(count=4), **how)


def test_halves_and_resamples_of_too_few_pictures_are_refused(tmp_path):
    items = recorded(tmp_path / "run", own({"A": [3] * 4, "B": [9]}))
    for draw in (
        lambda: vn.stability(items, LAP(count=4), method="halves"),
        lambda: vn.stability(items, LAP(count=4)),
        lambda: vn.resampled_selections(items, LAP(count=4)),
        lambda: vn.sample_sizes(items, LAP(count=4), [3]),
    ):
        with pytest.raises(SelectionError, match=r"at least 2 pictures a group are needed.* fewer are in B \(1\)"):
            draw()
    # Each of three groups has two pictures, and each picture is of two groups: no half has all three.
    triangle = recorded(tmp_path / "triangle", several("AB", "BC", "CA"))
    with pytest.raises(SelectionError, match=r"not all of them can be in both halves; the fewest has A \(2\): leave"):
        vn.stability(triangle, LAP(count=4), method="halves", resamples=3)


def test_unequal_pictures_by_group_can_be_compared_once_groups_are_cut_to_one_size(tmp_path):
    items = recorded(tmp_path / "run", own({"A": [10] * 12, "B": [4] * 12, "C": [1] * 12}))
    with pytest.raises(SelectionError, match="only 0% can change theirs"):
        vn.null_distribution(items, LAP(count=4))
    table = vn.null_distribution(items, LAP(count=4), balanced=True, permutations=19)
    assert table["questions"].tolist() == [12] * 3
    assert table["movable"].gt(0.6).all()


def test_recordings_of_earlier_releases_open_and_are_refused_by_whatever_draws_pictures(tmp_path):
    recorded(tmp_path / "run", DESIGNS["4 questions a picture"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    rest |= rest.pop("about")  # as version 1 had it
    rest["version"] = 1
    rest["items"] = [{name: item[name] for name in ("id", "group", "answer", "metadata")} for item in rest["items"]]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(files.sealed(rest)))
    items = ItemStatistics.load(tmp_path / "run", verify=True)
    assert items.items[0].pictures is None
    assert len(LAP(count=4).select(items)["A"]) == 4
    message = (
        "this recording keeps no pictures of its questions, being of an earlier release, and questions about one "
        "picture must be drawn together: record again with record_items into another folder, or give unit='question' "
        "if no two questions share a picture"
    )
    for draw in (
        lambda **how: vn.null_distribution(items, LAP(count=4), permutations=3, **how),
        lambda **how: vn.stability(items, LAP(count=4), resamples=2, **how),
        lambda **how: list(vn.resampled_selections(items, LAP(count=4), resamples=2, **how)),
        lambda **how: vn.sample_sizes(items, LAP(count=4), [2], repeats=2, **how),
    ):
        with pytest.raises(SelectionError, match=message):
            draw()
        draw(unit="question")
    with pytest.raises(MismatchError, match="was begun by an earlier release, which did not keep"):
        recorded(tmp_path / "run", DESIGNS["4 questions a picture"])


def test_by_question_is_what_it_was_and_asked_for_only_by_name(tmp_path):
    items = recorded(tmp_path / "run", DESIGNS["4 questions a picture"])
    table = vn.null_distribution(items, LAP(count=4), unit="question", permutations=19)
    assert table["pictures"].tolist() == table["questions"].tolist() == [24] * 3
    alone = Units.of(items.grouped(), "question")
    assert alone.questions.tolist() == np.eye(3, dtype=int)[alone.pool.owner].tolist()
    halves = vn.stability(items, LAP(count=4), method="halves", unit="question", resamples=3)
    assert halves["pictures"].tolist() == [24, 24, 24, 72]
    no_pictures = recorded(tmp_path / "none", [(group, ()) for group, _ in DESIGNS["4 questions a picture"]])
    by_picture = vn.stability(no_pictures, LAP(count=4), resamples=5)
    assert by_picture.equals(vn.stability(no_pictures, LAP(count=4), resamples=5, unit="question"))


def test_a_question_drawn_twice_is_one_unit_and_rules_of_single_questions_go_through(tmp_path):
    items = recorded(tmp_path / "run", [(group, ()) for group in "AAAABBBB"])
    twice = items.grouped().taken(np.array([0, 0, 1, 2, 3, 4, 4, 5, 6, 7]))
    assert units_to_draw(twice).pictures.tolist() == [4, 4]
    assert sorted(units_to_draw(twice).questions.sum(1).tolist()) == [1] * 6 + [2] * 2
    rule = AveragePrecision(count=4, on="probability")
    assert vn.null_distribution(twice, rule, permutations=3)["p"].between(0.25, 1).all()


def test_layers_are_counted_in_one_place():
    space = NeuronSpace((vn.Site("language", 1), vn.Site("vision", 1), vn.Site("language", 1, "experts.0")), (3, 4, 5))
    assert dict(space.tower_layers) == {("language", 1): (0, 2), ("vision", 1): (1,)}
    assert space.count_by_layer().tolist() == [8, 4]
    assert space.count_by_layer(torch.tensor([0, 2, 3, 11])).tolist() == [3, 1]
    assert space.count_by_layer(torch.tensor([], dtype=torch.int64)).tolist() == [0, 0]
