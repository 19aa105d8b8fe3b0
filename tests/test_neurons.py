"""Sets of neurons, and one set per group."""

import copy
import inspect
import json
import pickle
import struct
import time
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlmneurons.errors import FileFormatError, GroupError, MismatchError, SelectionError, SiteError, VLMNeuronsError
from vlmneurons.neurons.selection import Selection, in_parentheses
from vlmneurons.neurons.sets import NeuronSet, expected_jaccard
from vlmneurons.neurons.sites import NeuronSpace, Site

SPACE = NeuronSpace.from_widths("language", "gate", [20, 10, 30])
TOWERS = NeuronSpace(
    (
        Site("vision", 0),
        Site("language", 0),
        Site("language", 1, "mlp.experts.0"),
        Site("language", 1, "mlp.experts.1"),
    ),
    (4, 6, 5, 5),
)


def untyped(function):
    """The function without the type checks that tests switch on: what a user who passes a wrong type meets."""
    return inspect.unwrap(function)


def make(*indices: int) -> NeuronSet:
    return NeuronSet(SPACE, indices)


# ---------------------------------------------------------------------------------------------------- NeuronSet


@pytest.mark.parametrize(
    "indices",
    [[5, 3, 5], (5, 3), {3, 5}, range(3, 6, 2), iter([3, 5]), np.array([5, 3], dtype=np.int32), torch.tensor([5, 3, 3]),
     np.array([3, 5], dtype=np.uint64), torch.tensor([3, 5], dtype=torch.uint8), [np.int64(3), torch.tensor(5)],
     np.array([5, 4, 3])[::2], np.array([5, 3], dtype=">i4").astype("i4")],
)  # fmt: skip
def test_indices_in_any_form_give_the_sorted_set(indices):
    neurons = NeuronSet(SPACE, indices)
    assert neurons.indices.tolist() == [3, 5]
    assert neurons.indices.dtype == torch.int64


@pytest.mark.parametrize(
    ("indices", "text"),
    [([60], r"neuron 60 is not in this space \(0–59\)"), ([-1], "neuron -1 is not in this space"),
     ([2.0], "whole numbers"), (torch.tensor([1.5]), "whole numbers; got torch.float32"), ([True], "from_mask"),
     (torch.ones(60, dtype=torch.bool), "from_mask"), ([[1, 2]], "whole numbers"),
     (torch.zeros(2, 2, dtype=torch.int64), "one-dimensional"), (["3"], "whole numbers"), (3, "whole numbers"),
     (None, "whole numbers"), ([2**70], "whole numbers"), (np.array(["a"]), "whole numbers"),
     (np.array([2**64 - 1], dtype=np.uint64), "not in this space"), (make(1), "already a set")],
)  # fmt: skip
def test_indices_that_are_no_neurons_are_refused(indices, text, unchecked):
    with pytest.raises(SiteError, match=text):
        NeuronSet(SPACE, indices)


@pytest.mark.parametrize("empty", [[], (), torch.tensor([]), np.array([]), iter(())])
def test_nothing_gives_the_empty_set(empty):
    assert NeuronSet(SPACE, empty) == NeuronSet.empty(SPACE)
    assert len(NeuronSet.empty(SPACE)) == 0
    assert not NeuronSet.empty(SPACE)


def test_a_set_cannot_be_changed_through_what_went_in_or_what_comes_out():
    given = torch.tensor([3, 5])
    array = np.array([3, 5])
    sets = [NeuronSet(SPACE, given), NeuronSet(SPACE, array), make(3, 5)]
    given[0] = array[0] = 9
    for neurons in sets:
        neurons.indices[0] = 7
        neurons.mask()[:] = True
        neurons.by_site()[SPACE.sites[0]][0] = 11
        neurons.per_site()[0] = 11
        assert neurons.indices.tolist() == [3, 5]
        with pytest.raises(AttributeError, match="immutable"):
            neurons._indices = given
        with pytest.raises(AttributeError, match="immutable"):
            neurons.indices = given
        with pytest.raises(AttributeError, match="immutable"):
            del neurons._space
        with pytest.raises(AttributeError):
            neurons.other = 1


def test_membership_is_by_flat_index_or_by_site_and_number():
    neurons = make(3, 25)
    assert 3 in neurons
    assert np.int64(25) in neurons
    assert torch.tensor(3) in neurons
    assert ("language.layers.1.mlp.gate", 5) in neurons
    assert (Site("language", 0), 3) in neurons
    assert (Site("language", 0), 4) not in neurons
    for other in (4, 59, 60, -1, 2**80, 3.0, "3", None, True):
        assert other not in neurons
    with pytest.raises(SiteError, match="layer 7 is not in tower"):
        assert ("language.layers.7.mlp.gate", 5) in neurons
    assert 3 not in NeuronSet.empty(SPACE)


def test_iteration_gives_plain_sorted_ints():
    assert list(make(9, 2)) == [2, 9]
    assert all(type(neuron) is int for neuron in make(9, 2))


def test_sets_are_made_of_layers_sites_or_names():
    neurons = NeuronSet.from_indices(SPACE, {2: [1, 0], "language.layers.0.mlp.gate": (7,), Site("language", 1): []})
    assert neurons.indices.tolist() == [7, 30, 31]
    assert NeuronSet.from_indices(SPACE, {}) == NeuronSet.empty(SPACE)
    assert NeuronSet.from_indices(SPACE, [1, 2]) == make(1, 2)
    assert NeuronSet.from_indices(SPACE, {np.int64(1): np.array([9])}) == make(29)


@pytest.mark.parametrize(
    ("indices", "text"),
    [({3: [0]}, r"layer 3 is not in tower 'language' \(0–2\)"), ({-1: [0]}, "layer -1 does not exist"),
     ({1: [10]}, r"neuron 10 is not in site language\.layers\.1\.mlp\.gate \(0–9\)"), ({1: [-1]}, "neuron -1 is not"),
     ({1.0: [0]}, "no layer's number"), ({True: [0]}, "no layer's number"), ({1: 4}, "whole numbers"),
     ({None: [0]}, "no layer's number")],
)  # fmt: skip
def test_layers_and_neurons_that_do_not_exist_are_refused(indices, text, unchecked):
    with pytest.raises(SiteError, match=text):
        NeuronSet.from_indices(SPACE, indices)


def test_a_layer_with_several_sites_must_be_named_by_site():
    with pytest.raises(SiteError, match=r"layer 1 has 2 sites .*: name the site instead of the layer"):
        NeuronSet.from_indices(TOWERS, {1: [0]})
    neurons = NeuronSet.from_indices(TOWERS, {"language.layers.1.mlp.experts.1.gate": [0, 4]})
    assert neurons.indices.tolist() == [15, 19]
    assert {str(site): part.tolist() for site, part in neurons.by_site().items()} == {
        "language.layers.1.mlp.experts.1.gate": [0, 4]
    }
    for call in (neurons.by_layer, neurons.to_pairs):
        with pytest.raises(SiteError, match=r"has several sites .* use by_site\(\)"):
            call()


def test_pairs_and_sets_are_inverse(unchecked):
    pairs = [(0, 3), (1, 0), (2, 29)]
    assert NeuronSet.from_pairs(SPACE, pairs[::-1]).to_pairs() == pairs
    assert NeuronSet.from_pairs(SPACE, []) == NeuronSet.empty(SPACE)
    assert NeuronSet.from_pairs(SPACE, [("language.layers.1.mlp.gate", 4)]) == make(24)
    for bad in ([3], [(1, 2, 3)], [([0], 1)]):
        with pytest.raises(SiteError, match="is not a pair of a layer and a neuron's number"):
            NeuronSet.from_pairs(SPACE, bad)


def test_a_mask_and_a_set_are_inverse():
    neurons = make(0, 59)
    assert NeuronSet.from_mask(SPACE, neurons.mask()) == neurons
    assert NeuronSet.from_mask(SPACE, neurons.mask().numpy()) == neurons
    with pytest.raises(
        MismatchError, match=r"one value per neuron of the space \(60\); got torch.bool of shape \(59,\)"
    ):
        NeuronSet.from_mask(SPACE, neurons.mask()[1:])
    with pytest.raises(MismatchError, match="a mask is boolean"):
        NeuronSet.from_mask(SPACE, neurons.mask().long())


def test_algebra_by_hand():
    a, b = make(1, 2, 3, 40), make(3, 4, 40, 59)
    assert (a & b) == make(3, 40)
    assert (a | b) == make(1, 2, 3, 4, 40, 59)
    assert (a - b) == make(1, 2)
    assert (a ^ b) == make(1, 2, 4, 59)
    assert len(~a) == 56
    assert ~~a == a
    assert not a.isdisjoint(b)
    assert a.isdisjoint(make(5))
    assert make(1) <= a
    assert make(1) < a
    assert a >= a
    assert not a > a
    assert not a <= b
    assert a != b
    assert a != {1, 2, 3, 40}
    assert hash(a) == hash(make(40, 3, 2, 1))
    assert len({a, make(40, 3, 2, 1), b}) == 2


@pytest.mark.parametrize("operation", ["__and__", "__or__", "__sub__", "__xor__", "isdisjoint", "__le__", "jaccard",
                                       "expected_jaccard", "__lt__", "__ge__"])  # fmt: skip
def test_sets_of_different_spaces_do_not_mix_and_the_message_says_how_they_would(operation):
    other = NeuronSet(SPACE.at("post"), [1])
    advice = r"language\.gate.*language\.post.*they number the same neurons, so \.at\('gate'\)"
    with pytest.raises(MismatchError, match=advice):
        getattr(make(1), operation)(other)
    with pytest.raises(MismatchError, match=r"different spaces: NeuronSpace\(language\.gate: 3 layers") as caught:
        getattr(make(1), operation)(NeuronSet(NeuronSpace.from_widths("language", "gate", [60]), [1]))
    assert ".at(" not in str(caught.value)
    assert make(1) != other
    assert make(1).at("post") == other
    assert other.at("gate") & make(1) == make(1)


def test_sets_do_not_combine_with_other_types():
    for symbol in ("&", "|", "-", "^", "<=", "<", ">", ">="):
        with pytest.raises(TypeError):
            eval(f"a {symbol} b", {"a": make(1), "b": {1}})


def test_counts_per_site_and_layer_hold_zeros():
    assert make(0, 19, 30).per_layer() == {0: 2, 1: 0, 2: 1}
    assert make(0, 19, 30).per_site().tolist() == [2, 0, 1]
    assert NeuronSet.empty(SPACE).per_layer() == {0: 0, 1: 0, 2: 0}
    assert NeuronSet.full(SPACE).per_layer() == {0: 20, 1: 10, 2: 30}
    assert {layer: part.tolist() for layer, part in make(0, 19, 30).by_layer().items()} == {0: [0, 19], 2: [0]}


def test_counts_per_layer_of_several_towers_ask_for_the_tower():
    neurons = NeuronSet.full(TOWERS)
    assert neurons.per_layer("language") == {0: 6, 1: 10}
    assert neurons.per_layer("vision") == {0: 4}
    assert neurons.per_site().tolist() == [4, 6, 5, 5]
    with pytest.raises(SiteError, match=r"has the towers vision, language: say which, or use per_site\(\)"):
        neurons.per_layer()
    with pytest.raises(SiteError, match="tower 'audio' is not in this space; it has vision, language"):
        neurons.per_layer("audio")


def test_jaccard_by_hand():
    assert make(1, 2, 3).jaccard(make(3, 4)) == 1 / 4
    assert make(1).jaccard(make(2)) == 0.0
    assert make(1).jaccard(make(1)) == 1.0
    assert NeuronSet.empty(SPACE).jaccard(NeuronSet.empty(SPACE)) == 1.0
    assert NeuronSet.empty(SPACE).jaccard(make(1)) == 0.0


def exact_expected_jaccard(a: int, b: int, n: int) -> Fraction:
    if a == b == 0:
        return Fraction(1)
    return sum(
        (Fraction(comb(a, x) * comb(n - a, b - x), comb(n, b)) * Fraction(x, a + b - x))
        for x in range(max(0, a + b - n), min(a, b) + 1)
    )


def test_the_chance_level_equals_exact_fractions_for_all_small_sizes():
    for n in range(1, 13):
        for a in range(n + 1):
            for b in range(n + 1):
                assert expected_jaccard(a, b, n) == pytest.approx(float(exact_expected_jaccard(a, b, n)), rel=1e-13)


@pytest.mark.parametrize(
    ("a", "b"),
    [(2652, 2652), (2652, 300000), (500000, 400000), (530432, 530432), (1, 530432), (265216, 265216)],
)
def test_the_chance_level_of_a_7b_model_equals_scipys_hypergeometric(a, b):
    from scipy.stats import hypergeom

    n = 530432
    x = np.arange(max(0, a + b - n), min(a, b) + 1)
    expected = float((hypergeom(n, a, b).pmf(x) * (x / (a + b - x))).sum())
    assert expected_jaccard(a, b, n) == pytest.approx(expected, rel=1e-7)
    assert expected_jaccard(a, b, n) == expected_jaccard(b, a, n) or a != b


def test_the_chance_level_agrees_with_random_sets():
    generator = torch.Generator().manual_seed(0)
    drawn = [NeuronSet(SPACE, torch.randperm(60, generator=generator)[:12]) for _ in range(4000)]
    mean = np.mean([a.jaccard(b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)])
    assert drawn[0].expected_jaccard(drawn[1]) == pytest.approx(mean, abs=0.005)


def test_a_chance_level_of_impossible_sizes_is_refused():
    for sizes in ((5, 1, 4), (-1, 1, 4), (0, 5, 4)):
        with pytest.raises(MismatchError, match="cannot be drawn from 4"):
            expected_jaccard(*sizes)


def test_a_set_survives_pickling_and_copying():
    for other in (pickle.loads(pickle.dumps(make(1, 9))), copy.copy(make(1, 9)), copy.deepcopy(make(1, 9))):
        assert other == make(1, 9)


def test_the_fingerprint_of_a_set_depends_on_its_space_and_neurons_only():
    assert make(1, 9).fingerprint == make(9, 1).fingerprint
    assert len({make(1).fingerprint, make(2).fingerprint, make(1).at("post").fingerprint}) == 3


def test_the_repr_of_a_set_says_its_size_and_space():
    assert repr(make(1, 2, 3)) == (
        "NeuronSet(3 of 60 neurons, 0.05 of NeuronSpace(language.gate: 3 layers x 10–30 = 60 neurons))"
    )


# ---------------------------------------------------------------------------------------------------- Selection


@pytest.fixture
def selection() -> Selection:
    return Selection(
        {"Egypt": make(1, 2, 3), "Japan": make(3, 45), "Peru": make()},
        selector="CAS(fraction=0.05)",
        budget=3,
        provenance={"statistics": {"model": "tiny"}, "tokens": {"Egypt": 4}},
    )


def test_a_selection_is_a_mapping_in_the_order_of_its_groups(selection):
    assert list(selection) == ["Egypt", "Japan", "Peru"]
    assert selection.groups == ("Egypt", "Japan", "Peru")
    assert len(selection) == 3
    assert selection["Japan"] == make(3, 45)
    assert "Egypt" in selection
    assert "egypt" not in selection
    assert ["Egypt"] not in selection
    assert selection.get("Kenya") is None
    assert dict(selection)["Peru"] == make()
    assert selection.space == SPACE
    assert (selection.selector, selection.budget) == ("CAS(fraction=0.05)", 3)


def test_an_unknown_group_is_a_key_error_that_reads_as_a_sentence(selection):
    with pytest.raises(GroupError) as caught:
        selection["Kenya"]
    assert str(caught.value) == "group 'Kenya' is not in this selection; it has Egypt, Japan, Peru"
    assert isinstance(caught.value, KeyError)
    with pytest.raises(GroupError):
        untyped(Selection.__getitem__)(selection, ["Egypt"])


def test_a_selection_cannot_be_changed(selection):
    given = {"a": make(1)}
    made = Selection(given, provenance=(provenance := {"deep": [1]}))
    given["b"] = make(2)
    provenance["deep"].append(2)
    made.provenance["deep"].append(3)
    assert made.groups == ("a",)
    assert made.provenance == {"deep": [1]}
    for name in ("budget", "_sets", "other"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(selection, name, None)
    with pytest.raises(AttributeError, match="immutable"):
        del selection._sets
    with pytest.raises(TypeError):
        selection["Egypt"] = make(1)


def test_selections_that_make_no_sense_are_refused():
    with pytest.raises(SelectionError, match="at least one group"):
        Selection({})
    with pytest.raises(SelectionError, match="group 'a' must have a NeuronSet; got list"):
        untyped(Selection.__init__)(object.__new__(Selection), {"a": [1]})
    with pytest.raises(SelectionError, match="a group's name is a text that is not empty; got 3"):
        untyped(Selection.__init__)(object.__new__(Selection), {3: make(1)})
    with pytest.raises(MismatchError, match="different spaces"):
        Selection({"a": make(1), "b": make(1).at("post")})
    with pytest.raises(SelectionError, match="group 'a' has 2 neurons, more than the budget of 1"):
        Selection({"a": make(1, 2)}, budget=1)
    with pytest.raises(VLMNeuronsError, match="provenance must be plain values"):
        Selection({"a": make(1)}, provenance={"x": make(1)})
    with pytest.raises(VLMNeuronsError, match="provenance must be plain values"):
        Selection({"a": make(1)}, provenance={"x": float("nan")})


def test_selections_combine_group_by_group(selection):
    other = Selection({"Peru": make(7), "Japan": make(45), "Egypt": make(2, 9)}, selector="LAP(fraction=0.05)")
    both, either, rest, one = selection & other, selection | other, selection - other, selection ^ other
    assert dict(both) == {"Egypt": make(2), "Japan": make(45), "Peru": make()}
    assert dict(either) == {"Egypt": make(1, 2, 3, 9), "Japan": make(3, 45), "Peru": make(7)}
    assert dict(rest) == {"Egypt": make(1, 3), "Japan": make(3), "Peru": make()}
    assert dict(one) == {"Egypt": make(1, 3, 9), "Japan": make(3), "Peru": make(7)}
    assert both.groups == selection.groups
    assert both.selector == "CAS(fraction=0.05) & LAP(fraction=0.05)"
    assert ((both) | other).selector == "(CAS(fraction=0.05) & LAP(fraction=0.05)) | LAP(fraction=0.05)"
    assert both.budget is None
    assert both.provenance == {"combined": [selection.provenance, {}]}
    assert (selection & selection).provenance == selection.provenance


def test_selections_of_other_groups_or_spaces_do_not_combine(selection):
    with pytest.raises(MismatchError, match="Japan, Kenya are only in one of them"):
        selection & Selection({"Egypt": make(1), "Kenya": make(1), "Peru": make(1)})
    with pytest.raises(MismatchError, match=r"number the same neurons, so \.at"):
        selection | selection.at("post")
    with pytest.raises(TypeError):
        selection & make(1)


def test_parentheses_go_around_what_has_several_parts_only():
    assert in_parentheses("CAS(fraction=0.01)") == "CAS(fraction=0.01)"
    assert in_parentheses("A() & B()") == "(A() & B())"
    assert in_parentheses("(A() & B())") == "(A() & B())"
    assert in_parentheses("(A() & B()) - C()") == "((A() & B()) - C())"
    assert in_parentheses("L(like=<A() & B()>)") == "L(like=<A() & B()>)"


def test_the_table_counts_groups_by_layers(selection):
    table = selection.table()
    assert table.index.tolist() == ["Egypt", "Japan", "Peru"]
    assert table.columns.tolist() == [0, 1, 2]
    assert table.to_numpy().tolist() == [[3, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert (table.index.name, table.columns.name) == ("group", "layer")
    towers = Selection({"a": NeuronSet(TOWERS, [0, 4, 10, 15])}).table()
    assert towers.columns.tolist() == [("vision", 0), ("language", 0), ("language", 1)]
    assert towers.to_numpy().tolist() == [[1, 1, 2]]


def test_the_overlap_table_has_jaccard_and_its_chance_level(selection):
    overlap = selection.overlap()
    assert overlap["jaccard"].loc["Egypt", "Japan"] == 1 / 4
    assert overlap["jaccard"].loc["Egypt", "Egypt"] == 1.0
    assert overlap["chance"].loc["Egypt", "Japan"] == pytest.approx(float(exact_expected_jaccard(3, 2, 60)))
    assert overlap["chance"].shape == (3, 3)


def test_the_overlap_of_five_hundred_groups_is_that_of_each_pair_and_takes_no_time():
    space = NeuronSpace.from_widths("language", "gate", [18944] * 28)
    generator = torch.Generator().manual_seed(0)
    sets = {f"g{n:03}": torch.randint(0, len(space), (n * 5,), generator=generator) for n in range(499)}
    many = Selection({group: NeuronSet(space, indices) for group, indices in sets.items()} | {"none": NeuronSet(space)})
    began = time.process_time()
    overlap = many.overlap()
    assert time.process_time() - began < 60
    for first, second in (("g000", "none"), ("g000", "g001"), ("g480", "g498"), ("g377", "g377"), ("g498", "g480")):
        assert overlap["jaccard"].loc[first, second] == many[first].jaccard(many[second])
        assert overlap["chance"].loc[first, second] == many[first].expected_jaccard(many[second])


def test_the_repr_of_a_selection_shows_sizes_and_where_too_few_were_eligible(selection):
    assert repr(selection) == (
        "Selection CAS(fraction=0.05): 3 groups, NeuronSpace(language.gate: 3 layers x 10–30 = 60 neurons)\n"
        "  Egypt  3 neurons\n"
        "  Japan  2 neurons (of 3 asked for: no more were eligible)\n"
        "  Peru   0 neurons (of 3 asked for: no more were eligible)"
    )


def test_a_selection_survives_pickling_and_copying(selection):
    for other in (pickle.loads(pickle.dumps(selection)), copy.deepcopy(selection), copy.copy(selection)):
        assert other == selection
        assert (other.selector, other.budget, other.provenance) == (
            selection.selector,
            selection.budget,
            selection.provenance,
        )


# ------------------------------------------------------------------------------------------------- another model


def test_neurons_are_carried_to_another_model_by_layer_and_number(selection):
    both = NeuronSpace((*(Site("vision", n) for n in range(2)), *SPACE.sites), (7, 7, *SPACE.widths))
    for neurons in selection.values():
        assert [(s.layer, part.tolist()) for s, part in neurons.on(both).by_site().items()] == [
            (s.layer, part.tolist()) for s, part in neurons.by_site().items()
        ]
        assert neurons.on(both).on(SPACE) == neurons
    turned = NeuronSpace(SPACE.sites[::-1], SPACE.widths[::-1])
    assert make(0, 20, 59).on(turned).indices.tolist() == [29, 30, 40]
    text = NeuronSpace.from_widths("decoder", "gate", SPACE.widths)  # the only tower, whatever it is called
    carried = selection.on(text)
    assert {group: list(neurons) for group, neurons in carried.items()} == {g: list(n) for g, n in selection.items()}
    assert (carried.selector, carried.budget) == (selection.selector, selection.budget)
    assert carried.provenance == {**selection.provenance, "carried_from": SPACE.fingerprint}
    assert NeuronSet.empty(TOWERS).on(SPACE) == NeuronSet.empty(SPACE)


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (
            NeuronSpace.from_widths("language", "gate", [20, 11, 30]),
            "has 11 neurons in mlp of layer 1, not 10",
        ),
        (NeuronSpace.from_widths("language", "gate", [20, 10]), "has none in mlp of layer 2, not 30 neurons"),
        (NeuronSpace.from_widths("language", "gate", [20, 10, 30, 4]), "has 4 neurons in mlp of layer 3, not none"),
        (SPACE.at("post"), r"has sites of kind post, not gate: \.at\('post'\) comes first"),
        (NeuronSpace((Site("vision", 0), Site("audio", 0)), (20, 20)), "tower 'language' has no site there"),
    ],
)
def test_neurons_are_not_carried_to_a_model_of_another_shape(space, text):
    with pytest.raises(MismatchError, match=text):
        make(3).on(space)
    with pytest.raises(MismatchError, match="cannot be those of"):
        Selection({"a": make(3)}).on(space)


# ---------------------------------------------------------------------------------------- the LAPE authors' format


def test_the_lape_format_is_a_list_per_class_of_a_long_tensor_per_layer(selection, tmp_path):
    nested = selection.to_lape(tmp_path / "masks.pth")
    assert [[layer.tolist() for layer in group] for group in nested] == [
        [[1, 2, 3], [], []],
        [[3], [], [15]],
        [[], [], []],
    ]
    assert all(layer.dtype == torch.int64 for group in nested for layer in group)
    for source in (nested, tmp_path / "masks.pth", str(tmp_path / "masks.pth")):
        back = Selection.from_lape(source, SPACE, selection.groups)
        assert dict(back) == dict(selection)
    assert back.selector == f"from_lape({tmp_path / 'masks.pth'})"


def test_layers_missing_from_the_space_are_empty_in_the_lape_format():
    space = NeuronSpace((Site("language", 2), Site("language", 0)), (4, 4))
    nested = Selection({"a": NeuronSet(space, [1, 6])}).to_lape()
    assert [layer.tolist() for layer in nested[0]] == [[2], [], [1]]
    assert Selection.from_lape(nested, space, ["a"])["a"] == NeuronSet(space, [1, 6])
    nested[0][1] = torch.tensor([0])
    with pytest.raises(FileFormatError, match=r"layer 1 is not in tower 'language' \(0, 2\)"):
        Selection.from_lape(nested, space, ["a"])


def test_the_lape_format_cannot_tell_experts_apart():
    with pytest.raises(SiteError, match="the LAPE format has one list per layer"):
        Selection({"a": NeuronSet(TOWERS, [1])}).to_lape()
    with pytest.raises(SiteError, match="the LAPE format has one list per layer"):
        Selection.from_lape([[]], TOWERS, ["a"])


def longs(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(
    ("nested", "text"),
    [([], "one list for each of 2 groups; got 0 lists"), ({"a": 1}, "got a dict"), (7, "got a int"),
     ([[longs()] * 3], "got 1 lists"), ([[longs()] * 3, [longs()] * 2], "group 'b' needs 3 layers .* got 2 layers"),
     ([[longs()] * 3, longs(1)], "group 'b' needs 3 layers as the space has; got a Tensor"),
     ([[longs()] * 3, [longs(20), longs(), longs()]], r"group 'b': neuron 20 is not in site .* \(0–19\)"),
     ([[longs()] * 3, [longs(-1), longs(), longs()]], "group 'b': neuron -1"),
     ([[longs()] * 3, [torch.tensor([1.5]), longs(), longs()]], "group 'b': indices must be whole numbers"),
     ([[longs()] * 3, [torch.tensor([[1]]), longs(), longs()]], "one-dimensional"),
     ([[longs()] * 3, [None, longs(), longs()]], "group 'b'"),
     ([[longs()] * 3, [torch.tensor(3), longs(), longs()]], "group 'b'")],
)  # fmt: skip
def test_nested_lists_that_do_not_fit_are_refused(nested, text, tmp_path):
    with pytest.raises(FileFormatError, match=text):
        Selection.from_lape(nested, SPACE, ["a", "b"])
    torch.save(nested, tmp_path / "x.pth")
    with pytest.raises(FileFormatError, match=text):
        Selection.from_lape(tmp_path / "x.pth", SPACE, ["a", "b"])


def test_a_released_file_that_holds_a_list_less_than_its_readme_names_is_refused_with_the_reason():
    nested = [[longs()] * 3, [longs()] * 3]
    reason = (
        r"each of 3 groups; got 2 lists\. The authors' code leaves out a last group .*\(BLOOM, LLaMA-2-70B, Mistral"
    )
    with pytest.raises(FileFormatError, match=reason):
        Selection.from_lape(nested, SPACE, ["en", "fr", "zh"])
    with pytest.raises(FileFormatError, match=r"got 2 lists$"):
        Selection.from_lape(nested, SPACE, ["en"])
    assert Selection.from_lape(nested, SPACE, ["en", "fr"]).groups == ("en", "fr")


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('/tmp/vlmneurons_was_here').touch()",)


def test_a_lape_file_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path):
    from pathlib import Path

    path = tmp_path / "evil.pth"
    torch.save([Evil()], path)
    with pytest.raises(FileFormatError, match="not a file of neuron lists"):
        Selection.from_lape(path, SPACE, ["a"])
    path.write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(FileFormatError, match="not a file of neuron lists"):
        Selection.from_lape(path, SPACE, ["a"])
    assert not Path("/tmp/vlmneurons_was_here").exists()


def test_a_damaged_lape_file_is_refused(selection, tmp_path):
    path = tmp_path / "masks.pth"
    selection.to_lape(path)
    whole = path.read_bytes()
    for size in [0, 1, 10, *range(50, len(whole) - 1, 97)]:
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError):
            Selection.from_lape(path, SPACE, selection.groups)
    with pytest.raises(FileNotFoundError):
        Selection.from_lape(tmp_path / "missing.pth", SPACE, ["a"])
    with pytest.raises(FileFormatError, match="a group is named twice"):
        Selection.from_lape([[longs()] * 3] * 2, SPACE, ["a", "a"])


# ---------------------------------------------------------------------------------------------------- files


def test_sets_and_selections_come_back_from_their_files(selection, tmp_path):
    for neurons in (make(), make(0, 59), NeuronSet.full(TOWERS)):
        neurons.save(tmp_path / "set.safetensors")
        assert NeuronSet.load(tmp_path / "set.safetensors") == neurons
    selection.save(str(tmp_path / "selection.safetensors"))
    back = Selection.load(str(tmp_path / "selection.safetensors"))
    assert back == selection
    assert (back.groups, back.selector, back.budget, back.provenance, back.space) == (
        selection.groups,
        selection.selector,
        selection.budget,
        selection.provenance,
        selection.space,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["selection.safetensors", "set.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(selection, tmp_path, monkeypatch):
    path = tmp_path / "selection.safetensors"
    selection.save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("vlmneurons.files.tables.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        selection.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["selection.safetensors"]


def test_a_file_of_another_kind_is_refused_by_name(selection, tmp_path):
    selection.save(tmp_path / "a")
    make(1).save(tmp_path / "b")
    with pytest.raises(FileFormatError, match="this file holds a Selection, not a NeuronSet"):
        NeuronSet.load(tmp_path / "a")
    with pytest.raises(FileFormatError, match="this file holds a NeuronSet, not a Selection"):
        Selection.load(tmp_path / "b")
    save_file({"indices": longs(1)}, tmp_path / "c")
    with pytest.raises(FileFormatError, match="not one that vlmneurons wrote"):
        NeuronSet.load(tmp_path / "c")
    (tmp_path / "d").write_text("{}")
    with pytest.raises(FileFormatError, match="not a readable NeuronSet file"):
        NeuronSet.load(tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        NeuronSet.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        NeuronSet.load(tmp_path)


@pytest.mark.parametrize("kind", ["set", "selection"])
def test_every_truncation_and_every_flipped_bit_is_noticed(kind, selection, tmp_path):
    path = tmp_path / "file"
    thing = make(1, 2, 40) if kind == "set" else selection
    thing.save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError):
            type(thing).load(path)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            loaded = type(thing).load(path)
        except FileFormatError:
            continue
        # Only white space of the header can change without a change of meaning.
        assert loaded == thing, f"byte {place} was changed unnoticed"


def forge(path, kind: str, tensors: dict, data, **changes):
    """A file with a right checksum but any content: what damage cannot make, but somebody's program can."""
    from vlmneurons.files import tables as _files

    text = data if isinstance(data, str) else json.dumps(data)
    metadata = {"format": "vlmneurons", "kind": kind, "version": "1", "data": text}
    metadata.update(changes)
    metadata["sha256"] = _files._digest(kind, metadata["version"], text, tensors)
    save_file(tensors, path, metadata=metadata)


SET_DATA = {"space": SPACE.to_json()}


@pytest.mark.parametrize(
    ("tensors", "data", "text"),
    [({"indices": longs(60)}, SET_DATA, "outside the space of 60"), ({"indices": longs(-1)}, SET_DATA, "outside"),
     ({"indices": longs(2, 1)}, SET_DATA, "not sorted"), ({"indices": longs(1, 1)}, SET_DATA, "stand twice"),
     ({"indices": longs(5, 70, 6)}, SET_DATA, "not sorted"),
     ({"indices": longs(1)[None]}, SET_DATA, "outside the space"),
     ({"indices": torch.tensor(1)}, SET_DATA, "outside the space"),
     ({"indices": torch.tensor([1], dtype=torch.int32)}, SET_DATA, "is I32; a NeuronSet file has I64"),
     ({"indices": torch.tensor([1.0])}, SET_DATA, "is F32"), ({"x": longs(1)}, SET_DATA, "this one holds x"),
     ({"indices": longs(1), "x": longs(1)}, SET_DATA, "holds indices, x"),
     ({"indices": longs(1)}, {}, "not a neuron space"),
     ({"indices": longs(1)}, [], "no dictionary"), ({"indices": longs(1)}, "null", "no dictionary"),
     ({"indices": longs(1)}, "{", "not a readable NeuronSet file"),
     ({"indices": longs(1)}, "[" * 100_000, "not a readable"),
     ({"indices": longs(1)}, {"space": {"sites": ["language.layers.0.mlp.gate"], "widths": [10**40]}},
      "not a neuron space")],
)  # fmt: skip
def test_forged_neuron_files_are_refused(tensors, data, text, tmp_path):
    forge(tmp_path / "file", "NeuronSet", tensors, data)
    with pytest.raises(FileFormatError, match=text):
        NeuronSet.load(tmp_path / "file")


@pytest.mark.parametrize("version", ["2", "999999", "0", "-1", "", "1.0", "١", "9" * 5000])
def test_files_of_other_versions_are_refused(version, tmp_path):
    forge(tmp_path / "file", "NeuronSet", {"indices": longs(1)}, SET_DATA, version=version)
    with pytest.raises(FileFormatError, match=r"reads up to 1; update vlmneurons|is not a version"):
        NeuronSet.load(tmp_path / "file")


GOOD = {"space": SPACE.to_json(), "groups": ["a", "b"], "selector": "x", "budget": None, "provenance": {}}


@pytest.mark.parametrize(
    ("changes", "indices", "sizes"),
    [({"groups": "ab"}, longs(1, 2), longs(1, 1)), ({"groups": ["a", "a"]}, longs(1, 2), longs(1, 1)),
     ({"groups": ["a", 3]}, longs(1, 2), longs(1, 1)), ({"groups": []}, longs(), longs()),
     ({"groups": ["a", ""]}, longs(1, 2), longs(1, 1)), ({"selector": None}, longs(1, 2), longs(1, 1)),
     ({"budget": True}, longs(1, 2), longs(1, 1)), ({"budget": 0}, longs(1, 2), longs(1, 1)),
     ({"budget": 1.5}, longs(1, 2), longs(1, 1)), ({"provenance": []}, longs(1, 2), longs(1, 1)),
     ({}, longs(1, 2), longs(1, 2)), ({}, longs(1, 2), longs(3, -1)), ({}, longs(1, 2), longs(2)),
     ({}, longs(1, 60), longs(1, 1)), ({}, longs(2, 1), longs(2, 0)), ({}, longs(1, 2), longs(1, 1)[None])],
)  # fmt: skip
def test_forged_selection_files_are_refused(changes, indices, sizes, tmp_path):
    forge(tmp_path / "good", "Selection", {"indices": longs(1, 2), "sizes": longs(1, 1)}, GOOD)
    assert Selection.load(tmp_path / "good")["b"] == make(2)
    forge(tmp_path / "file", "Selection", {"indices": indices, "sizes": sizes}, {**GOOD, **changes})
    with pytest.raises(FileFormatError):
        Selection.load(tmp_path / "file")


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    header = json.dumps({"indices": {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(FileFormatError, match="not a readable NeuronSet file"):
        NeuronSet.load(tmp_path / "file")
    (tmp_path / "file").write_bytes(struct.pack("<Q", 2**62) + b"\0" * 64)
    with pytest.raises(FileFormatError, match="not a readable NeuronSet file"):
        NeuronSet.load(tmp_path / "file")
