"""Counts per group: exact merging against NumPy, probabilities by hand, hostile tables, files that are checked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlmneurons.errors import FileFormatError, GroupError, MismatchError, SelectionError
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.tables import MUST_AGREE

SPACE = NeuronSpace.from_widths("language", "gate", [3, 2])
EXPERTS = NeuronSpace((Site("language", 0, "mlp.experts.0"), Site("language", 0, "mlp.experts.1")), (3, 2))


def made(groups=("A", "B"), positive=((4, 0, 1, 2, 3), (1, 0, 3, 3, 6)), tokens=(4, 6), space=SPACE, **more):
    return ActivationStatistics.from_counts(space, groups, positive, tokens, **more)


@st.composite
def statistics(draw):
    """Arguments of `made`: a few neurons of experts, with or without routing.

    Not the statistics themselves: the type checker draws random numbers, which strategies must not.
    """
    names = draw(st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=4, unique=True))
    routed = draw(st.booleans())
    tokens = draw(hnp.arrays(np.int64, len(names), elements=st.integers(0, 2**40)))
    reach = (
        np.stack([draw(hnp.arrays(np.int64, 2, elements=st.integers(0, int(n)))) for n in tokens])
        if routed
        else np.repeat(tokens[:, None], 2, 1)
    )
    limit = np.repeat(reach, (3, 2), axis=1)
    share = draw(hnp.arrays(np.float64, limit.shape, elements=st.floats(0, 1)))
    positive = np.minimum((limit * share).astype(np.int64), limit)
    return dict(
        groups=names,
        positive=positive,
        tokens=tokens,
        space=EXPERTS,
        items=draw(hnp.arrays(np.int64, len(names), elements=st.integers(0, 100))),
        routed=reach if routed else None,
        # Whole numbers, so that sums in another order are the same to the last bit.
        total=draw(hnp.arrays(np.int64, limit.shape, elements=st.integers(-(2**20), 2**20))).astype(float),
    )


def as_dictionary(stats):
    """For each group its counts as plain Python numbers."""
    tables = (stats.positive, stats.tokens, stats.items, stats.reached, stats.total)
    return {group: tuple(table[n].tolist() for table in tables) for n, group in enumerate(stats.groups)}


def added(one, other):
    return tuple(
        [a + b for a, b in zip(x, y, strict=True)] if isinstance(x, list) else x + y
        for x, y in zip(one, other, strict=True)
    )


# -- merging -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(statistics(), statistics())
def test_adding_equals_addition_of_every_number_by_group(one, other):
    one, other = made(**one), made(**other)
    first, second, both = as_dictionary(one), as_dictionary(other), as_dictionary(one + other)
    assert list(both) == list(dict.fromkeys([*first, *second]))
    for group, numbers in both.items():
        parts = [side[group] for side in (first, second) if group in side]
        assert numbers == (parts[0] if len(parts) == 1 else added(*parts))


@settings(max_examples=40, deadline=None)
@given(statistics(), statistics(), statistics())
def test_adding_is_associative_and_commutative_but_for_the_order_of_groups(one, other, third):
    one, other, third = made(**one), made(**other), made(**third)
    assert (one + other) + third == one + (other + third)
    assert as_dictionary(one + other) == as_dictionary(other + one)
    assert sum([one, other, third]) == one + other + third


@settings(max_examples=40, deadline=None)
@given(statistics(), st.data())
def test_pooling_groups_equals_addition_of_their_numbers(stats, data):
    stats = made(**stats)
    names = data.draw(st.permutations(stats.groups))
    members = names[: data.draw(st.integers(1, len(names)))]
    pooled = as_dictionary(stats.merge_groups({"pool": members}))
    before = as_dictionary(stats)
    expected = before[members[0]]
    for group in members[1:]:
        expected = added(expected, before[group])
    assert pooled["pool"] == expected
    assert {group: pooled[group] for group in pooled if group != "pool"} == {
        group: before[group] for group in before if group not in members
    }


@settings(max_examples=40, deadline=None)
@given(statistics(), st.data())
def test_selecting_groups_keeps_their_numbers_in_the_given_order(stats, data):
    stats = made(**stats)
    names = data.draw(st.permutations(stats.groups))
    part = stats.select_groups(names)
    assert part.groups == tuple(names)
    assert as_dictionary(part) == {group: as_dictionary(stats)[group] for group in names}


@settings(max_examples=15, deadline=None)
@given(statistics())
def test_files_give_back_the_same_statistics(tmp_path_factory, stats):
    stats = made(**stats)
    path = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    stats.save(path)
    again = ActivationStatistics.load(path)
    assert again == stats
    assert again.space == stats.space


def test_counts_beyond_what_floats_hold_add_up_exactly():
    big = 2**53 + 1
    one = made(["A"], np.array([[big] * 5]), np.array([big]))
    assert (one + one).positive[0].tolist() == [2 * big] * 5


def test_adding_leaves_both_sides_as_they_were():
    one, other = made(), made(("B", "C"))
    before = one.positive.clone(), other.positive.clone()
    summed = one + other
    summed.positive.zero_()
    assert torch.equal(one.positive, before[0])
    assert torch.equal(other.positive, before[1])


@pytest.mark.parametrize("key", MUST_AGREE)
def test_statistics_under_other_rules_are_not_added(key):
    one, other = made(provenance={key: "this"}), made(provenance={key: "that"})
    with pytest.raises(MismatchError, match=f"statistics with different '{key}' cannot be added: 'this' and 'that'"):
        one + other
    with pytest.raises(MismatchError, match=f"different '{key}'"):
        one + made()


def test_side_matters_that_differ_are_all_kept_in_order():
    one, other = made(provenance={"seed": 1}), made(provenance={"seed": 2, "note": "x"})
    assert (one + other).provenance == {"seed": {"several": [1, 2]}, "note": "x"}
    assert (one + other + one).provenance["seed"] == {"several": [1, 2]}


def test_statistics_that_do_not_fit_are_not_added():
    with pytest.raises(MismatchError, match="the neurons are of different spaces"):
        made() + made(space=EXPERTS)
    with pytest.raises(MismatchError, match=r"the neurons are of different spaces.*they number the same neurons"):
        made() + made(space=SPACE.at("post"))
    with pytest.raises(MismatchError, match="only one of the statistics holds sums of activations"):
        made() + made(total=np.zeros((2, 5)))
    with pytest.raises(TypeError):
        made() + 1


# -- probabilities -------------------------------------------------------------------------------------------------


def test_probabilities_and_means_by_hand():
    stats = made(total=np.array([[4.0, -2, 0, 1, 2], [6, 3, 0, -3, 12]]))
    assert stats.probability.tolist() == [[1, 0, 0.25, 0.5, 0.75], [1 / 6, 0, 0.5, 0.5, 1]]
    assert stats.mean.tolist() == [[1, -0.5, 0, 0.25, 0.5], [1, 0.5, 0, -0.5, 2]]


def test_probabilities_of_experts_are_over_the_tokens_that_reached_them():
    stats = made(positive=[[2, 1, 0, 0, 0], [1, 0, 3, 2, 1]], tokens=[10, 10], space=EXPERTS, routed=[[4, 0], [3, 2]])
    assert stats.probability.tolist() == [[0.5, 0.25, 0, 0, 0], [1 / 3, 0, 1, 1, 0.5]]
    assert stats.table()["mean probability"].tolist() == pytest.approx([0.15, (1 / 3 + 1 + 1 + 0.5) / 5])


def test_groups_without_counted_tokens_are_named_before_anything_is_divided():
    stats = made(positive=np.zeros((2, 5), dtype=int), tokens=[0, 3])
    with pytest.raises(SelectionError, match="no token was counted for A: leave it out with select_groups"):
        stats.probability  # noqa: B018
    assert np.isnan(stats.table().loc["A", "mean probability"])
    with pytest.raises(SelectionError, match="no token was counted for A, B: leave them out"):
        made(positive=np.zeros((2, 5), dtype=int), tokens=[0, 0]).check_counted()
    with pytest.raises(SelectionError, match=r"hold no sums of activations \(total\)"):
        made().mean  # noqa: B018


# -- hostile tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": [[1, 2], [3, 4]]}, r"positive must be \[group, neuron\] = \[2, 5\] for 2 groups"),
        ({"tokens": [4]}, r"tokens must be \[group\] = \[2\]"),
        ({"items": [1, 2, 3]}, r"items must be \[group\] = \[2\]"),
        ({"positive": -np.ones((2, 5), dtype=int)}, "positive has negative counts"),
        ({"positive": np.full((2, 5), 0.5)}, "positive has fractions; counts are whole numbers"),
        ({"positive": np.full((2, 5), np.nan)}, "positive has NaN or infinite values; counts are whole numbers"),
        ({"positive": np.full((2, 5), 2.0**24, dtype=np.float32)}, "floats of 16777216 or more.*count in int64"),
        ({"positive": torch.full((2, 5), 2048.0, dtype=torch.float16)}, "floats of 2048 or more"),
        ({"positive": torch.ones(2, 5, dtype=torch.bool)}, "positive must be whole numbers; got torch.bool"),
        ({"positive": [["a"] * 5] * 2}, "positive is no table of numbers"),
        ({"positive": [[1, 2, 3, 4, 5], [1]]}, "positive is no table of numbers"),
        ({"positive": np.full((2, 5), 2**63, dtype=np.uint64)}, "values that do not fit in int64"),
        ({"total": np.full((2, 5), np.inf)}, "total has NaN or infinite values; a sum of activations is finite"),
        ({"groups": ("A", "A")}, "a group's name may stand once; A stands twice"),
        ({"groups": ("A", "")}, "a group's name is a text that is not empty; got ''"),
        ({"groups": "AB"}, "groups must be a list of names; got the single text 'AB'"),
        ({"groups": ()}, "statistics need at least one group; none was given"),
        ({"provenance": {"x": object()}}, "provenance must be plain values that JSON can hold"),
        ({"provenance": {"x": float("nan")}}, "provenance must be plain values"),
    ],
)
def test_impossible_tables_are_refused_with_what_is_wrong(unchecked, change, message):
    with pytest.raises(Exception, match=message) as caught:
        made(**change)
    assert type(caught.value).__module__ == "vlmneurons.errors"


def test_a_neuron_that_fired_more_often_than_tokens_were_counted_is_named():
    with pytest.raises(
        MismatchError,
        match=r"group 'B': neuron 1 of language\.layers\.1\.mlp\.gate fired for 7 tokens, but only 6 were",
    ):
        made(positive=[[4, 0, 1, 2, 3], [1, 0, 3, 3, 7]])
    with pytest.raises(MismatchError, match="fired for 2 tokens, but only 1 were counted there"):
        made(positive=[[2, 0, 0, 0, 0]] * 2, tokens=[9, 9], space=EXPERTS, routed=[[1, 9], [9, 9]])


def test_tables_are_copied_so_that_nobody_changes_them_from_outside():
    counts, tokens = np.array([[4, 0, 1, 2, 3], [1, 0, 3, 3, 6]]), torch.tensor([4, 6])
    stats = made(positive=counts, tokens=tokens)
    counts[:], tokens[:] = 0, 0
    assert stats.positive[0].tolist() == [4, 0, 1, 2, 3]
    assert stats.tokens.tolist() == [4, 6]


def test_the_constructor_takes_only_what_it_can_keep_as_it_is(unchecked):
    good = made()
    with pytest.raises(MismatchError, match=r"positive must be a torch\.int64 tensor in main memory; got torch\.int32"):
        ActivationStatistics(SPACE, ("A", "B"), good.positive.int(), good.tokens, good.items)
    with pytest.raises(MismatchError, match=r"positive must be a torch\.int64 tensor in main memory; got ndarray"):
        ActivationStatistics(SPACE, ("A", "B"), good.positive.numpy(), good.tokens, good.items)
    with pytest.raises(MismatchError, match="provenance is a dictionary; got list"):
        ActivationStatistics(SPACE, ("A", "B"), good.positive, good.tokens, good.items, provenance=[1])


def test_groups_that_do_not_exist_or_clash_are_refused():
    stats = made()
    with pytest.raises(GroupError, match="group 'C' is not in these statistics; they have A, B"):
        stats.index("C")
    with pytest.raises(GroupError, match="group 'C'"):
        stats.select_groups(["A", "C"])
    with pytest.raises(MismatchError, match="A stands twice"):
        stats.select_groups(["A", "A"])
    with pytest.raises(MismatchError, match="at least one group"):
        stats.select_groups([])
    with pytest.raises(MismatchError, match="got the single text 'A'"):
        stats.select_groups("A")
    with pytest.raises(MismatchError, match="merged group 'B' would have the name of another group"):
        stats.merge_groups({"B": ["A"]})
    with pytest.raises(MismatchError, match="group 'A' is merged twice, into 'x' and 'y'"):
        stats.merge_groups({"x": ["A"], "y": ["A"]})
    with pytest.raises(MismatchError, match="merged group 'x' has no members"):
        stats.merge_groups({"x": []})
    assert stats.merge_groups({"B": ["A", "B"]}).groups == ("B",)


# -- files ---------------------------------------------------------------------------------------------------------


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    made(provenance={"model": "m"}).save(path)
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 1
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(FileFormatError, match="broken"):
            ActivationStatistics.load(tmp_path / "broken")
    NeuronSet(SPACE, [1]).save(tmp_path / "set")
    with pytest.raises(FileFormatError, match="this file holds a NeuronSet, not a ActivationStatistics"):
        ActivationStatistics.load(tmp_path / "set")
    with pytest.raises(FileNotFoundError):
        ActivationStatistics.load(tmp_path / "nowhere")


def test_the_repr_and_the_table_say_what_was_counted():
    stats = made(items=[3, 1])
    assert repr(stats) == (
        "ActivationStatistics: 2 groups, NeuronSpace(language.gate: 2 layers x 2–3 = 5 neurons)\n"
        "  A  3 items, 4 tokens\n"
        "  B  1 items, 6 tokens"
    )
    assert stats.table().to_dict("index")["A"] == {
        "items": 3, "tokens": 4, "active neurons": 4, "mean probability": 0.5
    }  # fmt: skip
    many = made([f"g{n}" for n in range(60)], np.ones((60, 5), dtype=int), [2] * 60)
    assert "  … 20 more" in repr(many)
