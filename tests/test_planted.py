"""The main job on a model whose neurons are known because they were written into its weights."""

import pytest
import torch

import vlmneurons as vn
from vlmneurons.errors import VLMNeuronsError
from vlmneurons.testing import plant_neurons


@pytest.fixture(scope="module")
def planted():
    return plant_neurons()


@pytest.fixture(scope="module")
def statistics(planted):
    return vn.record(planted.model, planted.questions, batch_size=24, progress=False)


def test_planted_neurons_fire_at_every_token_of_their_group_and_at_none_of_another(planted, statistics):
    for row, group in enumerate(statistics.groups):
        columns = planted.truth[group].indices
        own = statistics.probability[row, columns]
        others = statistics.probability[[n for n in range(len(statistics.groups)) if n != row]][:, columns]
        assert own.eq(1).all()
        assert others.eq(0).all()


def test_counts_are_of_image_and_question_tokens_alone(planted, statistics):
    # 4 patches of the base picture, 4 of the tile, 2 row ends; "Which country is this picture from?" is 7 tokens.
    assert statistics.tokens.tolist() == [17 * 12] * 8


@pytest.mark.parametrize("selector", [vn.CAS(count=5), vn.MAD(count=5), vn.LAPE(count=5)], ids=repr)
def test_selectors_recover_the_planted_neurons_exactly_among_decoys(planted, statistics, selector):
    selection = selector.select(statistics)
    assert {group: set(selection[group]) for group in selection} == {g: set(planted.truth[g]) for g in planted.truth}


def test_the_most_active_neurons_are_always_open_ones_not_planted_ones(planted, statistics):
    selection = vn.LAP(count=5).select(statistics)
    for group in selection:
        assert statistics.probability[:, selection[group].indices].eq(1).all()
        assert not set(selection[group]) & set(planted.truth[group])


def test_rare_neurons_have_no_entropy_and_mislead_lape_but_not_cas():
    planted = plant_neurons(decoys=("rare",), per_kind=60, seed=3)
    statistics = vn.record(planted.model, planted.questions, batch_size=24, progress=False)
    lape, cas = vn.LAPE(count=5).select(statistics), vn.CAS(count=5).select(statistics)
    assert all(set(cas[group]) == set(planted.truth[group]) for group in cas)
    assert set().union(*(set(lape[g]) for g in lape)) & set(planted.decoys["rare"])


@pytest.mark.parametrize("suppress", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_ablating_planted_neurons_has_the_effect_computed_on_paper(suppress, seed):
    planted = plant_neurons(suppress=suppress, seed=seed)
    statistics = vn.record(planted.model, planted.questions, batch_size=24, progress=False)
    masks = {
        "CAS": vn.CAS(count=5).select(statistics),
        "random": [vn.RandomNeurons(count=5, seed=number).select(statistics) for number in range(3)],
    }
    result = vn.knockout(planted.model, planted.questions, masks, batch_size=32, progress=False)
    assert result.accuracy == planted.expected_accuracy()
    effects = result.matrix("CAS", value="ablated")
    for group in planted.truth:
        assert effects.loc[group].to_dict() == planted.expected_accuracy(group)
    assert result.matrix("random").to_numpy().tolist() == torch.zeros(8, 8).tolist()


def test_questions_answered_by_planted_neurons_fail_without_the_picture(planted):
    questions = planted.questions
    black = next(item for item in questions if item.group == "Brazil").image.point(lambda _: 0)
    blind = vn.QuestionSet(
        [vn.Question(black, q.question, q.options, q.answer, q.group, id=q.id) for q in questions], answer="text"
    )
    result = vn.knockout(planted.model, blind, {"none": vn.NeuronSet.empty(planted.truth.space)}, progress=False)
    assert 0.1 < sum(result.accuracy.values()) / 8 < 0.4


THREE = ("Cello", "Violin", "Flute")


@pytest.mark.parametrize(("medium", "groups"), [("sound", THREE), ("video", None)], ids=["sound", "video"])
def test_neurons_of_sounds_and_videos_are_planted_as_those_of_pictures_are(medium, groups):
    planted = plant_neurons(medium=medium, **({} if groups is None else {"groups": groups}))
    questions, truth = planted.questions, planted.truth
    assert {item.n_media for item in questions} == {(0, 1, 0) if medium == "sound" else (0, 0, 1)}
    statistics = vn.record(planted.model, questions, batch_size=24, progress=False)
    assert statistics.items.tolist() == [12] * len(truth)  # all are answered right
    for row, group in enumerate(statistics.groups):
        own = statistics.probability[:, truth[group].indices]
        assert own[row].eq(1).all()
        assert own[[n for n in range(len(truth)) if n != row]].max() < 0.1  # at the first moments of a sound, at most
    selection = vn.CAS(count=5).select(statistics)
    assert {group: set(selection[group]) for group in truth} == {group: set(truth[group]) for group in truth}
    result = vn.knockout(planted.model, questions, {"CAS": selection}, batch_size=32, progress=False)
    assert result.accuracy == planted.expected_accuracy()
    effects = result.matrix("CAS", value="ablated")
    for group in truth:
        assert effects.loc[group].to_dict() == planted.expected_accuracy(group)


def test_impossible_plantings_are_refused():
    with pytest.raises(VLMNeuronsError, match="medium 'smell' does not exist; choose from picture, sound, video"):
        plant_neurons(medium="smell")
    with pytest.raises(VLMNeuronsError, match="3 to 27 different groups"):
        plant_neurons(groups=("A", "B"))
    with pytest.raises(VLMNeuronsError, match="decoy 'odd' does not exist; choose from always, shared, graded, rare"):
        plant_neurons(decoys=("odd",))
    with pytest.raises(VLMNeuronsError, match="more planted neurons and decoys than neurons"):
        plant_neurons(width=8)
