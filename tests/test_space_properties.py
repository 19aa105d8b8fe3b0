"""What holds for every space and every set of neurons, tried on drawn ones against Python's own sets."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmneurons import NeuronSet, NeuronSpace, Site
from vlmneurons.neurons.sites import KINDS

OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


PLACES = st.lists(
    st.tuples(
        st.sampled_from(["language", "vision"]),
        st.integers(0, 5),
        st.sampled_from(["mlp", "mlp.experts.0", "mlp.experts.1", "mlp.shared_expert"]),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda place: place[:3],
)
"""Tower, layer, MLP and width of one to eight sites. Spaces are made in the tests: type checkers draw numbers too."""
KIND = st.sampled_from(KINDS)
NUMBERS = st.sets(st.integers(0, 95))


def space_of(places, kind="gate") -> NeuronSpace:
    return NeuronSpace(tuple(Site(*place[:3], kind) for place in places), tuple(place[3] for place in places))


def sets_of(space, *numbers):
    """Sets of neurons as Python's, within the space, and the library's."""
    plain = [{number % len(space) for number in one} for one in numbers]
    return plain, [NeuronSet(space, one) for one in plain]


@OFTEN
@given(PLACES, KIND)
def test_every_neuron_has_one_place_and_every_place_one_number(places, kind):
    space = space_of(places, kind)
    numbers = []
    for site, width in zip(space.sites, space.widths, strict=True):
        for neuron in range(width):
            index = space.flat(site, neuron)
            assert space.locate(index) == (site, neuron)
            assert space.site_of[index] == space.position(str(site))
            assert space.layer_of[index] == site.layer
            numbers.append(index)
        assert space.slice(site) == slice(numbers[-width], numbers[-1] + 1)
    assert numbers == list(range(len(space)))


@OFTEN
@given(PLACES, KIND, KIND)
def test_a_space_survives_json_and_another_kind_numbers_the_same(places, own, kind):
    space = space_of(places, own)
    again = NeuronSpace.from_json(space.to_json())
    assert again == space
    assert again.fingerprint == space.fingerprint
    other = space.at(kind)
    assert other.same_neurons(space)
    assert (other == space) == (kind == space.kind)
    assert (other.fingerprint == space.fingerprint) == (kind == space.kind)


@OFTEN
@given(PLACES, st.data())
def test_restricting_keeps_exactly_the_neurons_of_the_given_towers_and_layers(places, data):
    space = space_of(places)
    towers = data.draw(st.sets(st.sampled_from(sorted({site.tower for site in space})), min_size=1))
    layers = data.draw(st.sets(st.sampled_from(space.layers), min_size=1))
    kept = [
        index
        for index in range(len(space))
        if space.locate(index)[0].tower in towers and space.locate(index)[0].layer in layers
    ]
    assert space.restrict(towers=towers, layers=layers).tolist() == kept


@OFTEN
@given(PLACES, NUMBERS, NUMBERS)
def test_the_algebra_of_neuron_sets_is_that_of_pythons_sets(places, first, second):
    space = space_of(places)
    (x, y), (a, b) = sets_of(space, first, second)
    everything = set(range(len(space)))
    for made, plain in ((a & b, x & y), (a | b, x | y), (a - b, x - y), (a ^ b, x ^ y), (~a, everything - x)):
        assert made.indices.tolist() == sorted(plain)
        assert made.space == space
        assert len(made) == len(plain)
        assert made == NeuronSet(space, plain)
    assert [a <= b, a < b, a >= b, a > b, a == b] == [x <= y, x < y, x >= y, x > y, x == y]
    assert a.isdisjoint(b) == x.isdisjoint(y)
    assert [n in a for n in everything] == [n in x for n in everything]
    assert (hash(a) == hash(b) and a.fingerprint == b.fingerprint) or x != y
    assert a.jaccard(b) == pytest.approx(len(x & y) / len(x | y) if x | y else 1.0)


@OFTEN
@given(PLACES, NUMBERS, NUMBERS, NUMBERS)
def test_the_laws_of_sets_hold(places, first, second, third):
    _, (a, b, c) = sets_of(space_of(places), first, second, third)
    assert ~(a & b) == ~a | ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert a - b == a & ~b
    assert ~~a == a
    assert (a ^ b) ^ b == a
    assert (a | b) - (a & b) == a ^ b


@OFTEN
@given(PLACES, NUMBERS)
def test_every_way_of_writing_a_set_down_gives_it_back(places, numbers):
    space = space_of(places)
    plain, (a,) = sets_of(space, numbers)
    by_site = a.by_site()
    assert NeuronSet.from_indices(space, by_site) == a
    assert NeuronSet.from_indices(space, {str(site): numbers for site, numbers in by_site.items()}) == a
    assert NeuronSet.from_mask(space, a.mask()) == a
    assert NeuronSet(space, torch.tensor(sorted(plain[0]), dtype=torch.int64)) == a
    assert a.per_site().tolist() == [len(by_site.get(site, ())) for site in space.sites]
    for tower in {site.tower for site in space}:
        assert sum(a.per_layer(tower).values()) == sum(len(n) for site, n in by_site.items() if site.tower == tower)
