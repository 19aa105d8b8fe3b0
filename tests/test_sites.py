"""Which neurons exist, and how they are numbered."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

from vlmneurons.errors import FileFormatError, SiteError
from vlmneurons.neurons.sites import KINDS, NeuronSpace, Site


def untyped(function):
    """The function without the type checks that tests switch on: what a user who passes a wrong type meets."""
    return inspect.unwrap(function)


def test_spaces_of_two_towers_are_joined():
    towers = [
        NeuronSpace.from_widths(tower, kind, [3, 4]) for tower, kind in (("language", "gate"), ("vision", "post"))
    ]
    both = NeuronSpace.join(*towers)
    assert both.sites == towers[0].sites + towers[1].sites
    assert both.widths == (3, 4, 3, 4)
    assert both.locate(7) == (Site("vision", 0, "mlp", "post"), 0)
    assert both.restrict(towers=["vision"]).tolist() == list(range(7, 14))
    with pytest.raises(SiteError, match="a site stands twice in the space"):
        NeuronSpace.join(towers[0], towers[0])
    with pytest.raises(SiteError, match="a neuron space needs at least one site"):
        NeuronSpace.join()
    with pytest.raises(SiteError, match="space 1 is a NeuronSpace; got 'vision'"):
        untyped(NeuronSpace.join.__func__)(NeuronSpace, towers[0], "vision")


def untyped_site(*arguments) -> Site:
    site = object.__new__(Site)
    untyped(Site.__init__)(site, *arguments)
    return site


@pytest.fixture
def ragged() -> NeuronSpace:
    """Two language layers of different width, one of them a mixture of experts, and a vision layer."""
    return NeuronSpace(
        (
            Site("vision", 0, "mlp", "post"),
            Site("language", 0, "mlp", "post"),
            Site("language", 3, "mlp.experts.0", "post"),
            Site("language", 3, "mlp.experts.1", "post"),
        ),
        (3, 5, 2, 2),
    )


def test_a_site_and_its_name_are_inverse():
    for kind in KINDS:
        for mlp in ("mlp", "mlp.experts.7", "mlp.shared_expert"):
            site = Site("language", 12, mlp, kind)
            assert Site.parse(str(site)) == site
    assert str(Site("language", 3)) == "language.layers.3.mlp.gate"


@pytest.mark.parametrize(
    "name", ["", "language", "language.layers.x.mlp.gate", "language.layers.3.mlp", "language.layers.-1.mlp.gate",
             "language.layers.3.mlp.gate ", "language.layers.3.mlp.gate\n", "language.layers.²." "mlp.gate",
             "language.layers." + "9" * 5000 + ".mlp.gate", 7, None],
)  # fmt: skip
def test_what_is_not_the_name_of_a_site_is_refused_with_an_example_of_one(name):
    with pytest.raises(SiteError, match=r"a name looks like 'language\.layers\.3\.mlp\.gate'"):
        untyped(Site.parse)(Site, name) if not isinstance(name, str) else Site.parse(name)


def test_a_site_of_an_unknown_kind_is_refused():
    with pytest.raises(SiteError, match="'output' does not exist; the kinds are pre, gate, up, post"):
        Site("language", 0, "mlp", "output")


@pytest.mark.parametrize("layer", ["3", 3.0, True, None, [3]])
def test_a_layer_that_is_no_whole_number_is_refused(layer):
    with pytest.raises(SiteError, match="a layer's number is a whole number"):
        untyped_site("language", layer)


def test_a_site_made_with_a_numpy_layer_equals_and_hashes_as_the_plain_one():
    site = untyped_site("language", np.int64(3))
    assert site == Site("language", 3)
    assert hash(site) == hash(Site("language", 3))
    assert type(site.layer) is int


@pytest.mark.parametrize(("tower", "mlp"), [("", "mlp"), ("a b", "mlp"), ("language", ""), ("language", "mlp..x")])
def test_a_site_whose_name_could_not_be_read_back_is_refused(tower, mlp):
    with pytest.raises(SiteError, match="do not make a site name"):
        Site(tower, 0, mlp)
    with pytest.raises(SiteError, match="do not make a site name"):
        Site("language", -1)


def test_neurons_are_numbered_site_after_site(ragged):
    assert ragged.offsets == (0, 3, 8, 10, 12)
    assert len(ragged) == 12
    assert ragged.locate(0) == (Site("vision", 0, "mlp", "post"), 0)
    assert ragged.locate(7) == (Site("language", 0, "mlp", "post"), 4)
    assert ragged.locate(11) == (Site("language", 3, "mlp.experts.1", "post"), 1)
    assert ragged.flat("language.layers.3.mlp.experts.1.post", 1) == 11
    assert ragged.slice("language.layers.0.mlp.post") == slice(3, 8)
    assert ragged.site_of.tolist() == [0] * 3 + [1] * 5 + [2] * 2 + [3] * 2
    assert ragged.layer_of.tolist() == [0] * 8 + [3] * 4
    assert ragged.layers == (0, 3)


@pytest.mark.parametrize("index", [-1, 12, 2**70])
def test_a_flat_index_outside_the_space_is_refused_with_the_range(ragged, index):
    with pytest.raises(SiteError, match=rf"neuron {index} is not in this space \(0–11\)"):
        ragged.locate(index)


@pytest.mark.parametrize("index", [1.0, "1", True, None])
def test_an_index_that_is_no_whole_number_is_refused_rather_than_cut_off(ragged, index):
    with pytest.raises(SiteError, match="a neuron's number is a whole number"):
        untyped(NeuronSpace.locate)(ragged, index)
    with pytest.raises(SiteError, match="a neuron's number is a whole number"):
        untyped(NeuronSpace.flat)(ragged, ragged.sites[0], index)


def test_indices_may_be_numpy_integers_or_tensors_of_one_number(ragged):
    assert ragged.locate(np.int32(7)) == ragged.locate(torch.tensor(7)) == ragged.locate(7)


def test_a_missing_tower_layer_site_or_neuron_is_named_with_what_there_is(ragged):
    with pytest.raises(SiteError, match="tower 'audio' is not in this space; it has language, vision"):
        ragged.position("audio.layers.0.mlp.post")
    with pytest.raises(SiteError, match=r"layer 32 is not in tower 'language' \(0, 3\)"):
        ragged.position("language.layers.32.mlp.post")
    with pytest.raises(SiteError, match=r"layer 3 has language\.layers\.3\.mlp\.experts\.0\.post, language"):
        ragged.position("language.layers.3.mlp.post")
    with pytest.raises(SiteError, match=r"neuron 5 is not in site language\.layers\.0\.mlp\.post \(0–4\)"):
        ragged.flat("language.layers.0.mlp.post", 5)
    with pytest.raises(SiteError, match=r"neuron -1 is not in site"):
        ragged.flat("language.layers.0.mlp.post", -1)
    with pytest.raises(SiteError, match="a site is a Site or its name; got 3"):
        untyped(NeuronSpace.position)(ragged, 3)
    space = NeuronSpace.from_widths("language", "gate", [2] * 32)
    with pytest.raises(SiteError, match=r"layer 32 is not in tower 'language' \(0–31\)"):
        space.position("language.layers.32.mlp.gate")


def test_spaces_that_make_no_sense_are_refused():
    site = Site("language", 0)
    with pytest.raises(SiteError, match="at least one site"):
        NeuronSpace((), ())
    with pytest.raises(SiteError, match="1 sites were given with 2 widths"):
        NeuronSpace((site,), (1, 2))
    with pytest.raises(SiteError, match="stands twice"):
        NeuronSpace((site, site), (1, 2))
    with pytest.raises(SiteError, match=r"gate has width 0; a width is at least 1"):
        NeuronSpace((site,), (0,))
    with pytest.raises(SiteError, match="widths are whole numbers"):
        untyped(NeuronSpace.__init__)(object.__new__(NeuronSpace), (site,), (2.5,))
    with pytest.raises(SiteError, match="more than can be numbered"):
        NeuronSpace((site,), (2**63,))


def test_restricting_gives_the_neurons_of_the_towers_and_layers(ragged):
    assert ragged.restrict().tolist() == list(range(12))
    assert ragged.restrict(layers=[3]).tolist() == [8, 9, 10, 11]
    assert ragged.restrict(towers="vision").tolist() == [0, 1, 2]
    assert ragged.restrict(towers=["language"], layers=range(1)).tolist() == [3, 4, 5, 6, 7]
    assert ragged.restrict(layers=[]).tolist() == []
    with pytest.raises(SiteError, match=r"layer 2 is not in this space \(0, 3\)"):
        ragged.restrict(layers=[0, 2])
    with pytest.raises(SiteError, match="tower 'audio' is not in this space; it has language, vision"):
        ragged.restrict(towers=["audio"])
    with pytest.raises(SiteError, match=r"a layer's number is a whole number; got 0\.5"):
        untyped(NeuronSpace.restrict)(ragged, layers=[0.5])


def test_the_same_neurons_at_another_kind_are_another_space_that_says_so(ragged):
    gate = ragged.at("gate")
    assert gate != ragged
    assert gate.same_neurons(ragged)
    assert gate.at("post") == ragged
    assert (gate.kind, ragged.kind) == ("gate", "post")
    assert not ragged.same_neurons(NeuronSpace(ragged.sites, (3, 5, 2, 3)))
    with pytest.raises(SiteError, match="mixes the kinds gate, post"):
        NeuronSpace((Site("language", 0, "mlp", "gate"), Site("language", 0, "mlp", "post")), (2, 2)).kind  # noqa: B018


def test_json_gives_the_space_back(ragged):
    assert NeuronSpace.from_json(ragged.to_json()) == ragged


@pytest.mark.parametrize(
    "data",
    [None, [], 3, "x", {}, {"sites": [], "widths": []}, {"sites": None, "widths": []}, {"sites": [3], "widths": [3]},
     {"sites": ["language.layers.0.mlp.gate"], "widths": [2.0]}, {"sites": ["language.layers.0.mlp.gate"], "widths": 2},
     {"sites": ["language.layers.0.mlp.gate"], "widths": [True]}, {"sites": ["x"], "widths": [1]},
     {"sites": ["language.layers.0.mlp.gate"], "widths": [10**30]},
     {"sites": ["language.layers.0.mlp.gate"] * 2, "widths": [1, 1]},
     {"sites": ["language.layers.0.mlp.gate", "language.layers.00.mlp.gate"], "widths": [1, 1]},
     {"sites": ["language.layers." + "1" * 5000 + ".mlp.gate"], "widths": [1]}],
)  # fmt: skip
def test_json_that_is_no_space_is_refused_as_a_file_error(data):
    with pytest.raises(FileFormatError, match="not a neuron space"):
        NeuronSpace.from_json(data)


def test_the_fingerprint_is_fixed_for_ever_and_tells_spaces_apart(ragged):
    space = NeuronSpace.from_widths("language", "gate", [8, 8])
    assert space.fingerprint == NeuronSpace.from_widths("language", "gate", [8, 8]).fingerprint
    assert len({space.fingerprint, ragged.fingerprint, space.at("post").fingerprint}) == 3
    import hashlib

    text = "language.layers.0.mlp.gate:8;language.layers.1.mlp.gate:8"
    assert space.fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_space_survives_pickling_copying_and_use_as_a_key(ragged):
    len(ragged), ragged.site_of
    for other in (pickle.loads(pickle.dumps(ragged)), copy.deepcopy(ragged)):
        assert other == ragged
        assert {ragged: 1}[other] == 1


def test_the_repr_says_towers_layers_sites_and_widths(ragged):
    assert (
        repr(NeuronSpace.from_widths("language", "gate", [14336] * 32))
        == "NeuronSpace(language.gate: 32 layers x 14,336 = 458,752 neurons)"
    )
    assert repr(ragged) == "NeuronSpace(vision.post, language.post: 3 layers, 4 sites x 2–5 = 12 neurons)"


def test_layers_of_two_towers_are_two_and_each_has_the_places_of_its_sites(ragged):
    assert dict(ragged.tower_layers) == {("vision", 0): (0,), ("language", 0): (1,), ("language", 3): (2, 3)}
    assert ragged.towers == ("vision", "language")
