"""Every bad input gets an error that says what was given and what is allowed, and nothing is lost by it."""

import numpy as np
import pytest
import torch
from torch import nn

import vlmneurons as vn
from helpers import language_blocks, logits_of, picture, some_questions
from vlmneurons.errors import (
    ActivationError,
    ArchitectureError,
    FileFormatError,
    GroupError,
    MismatchError,
    QuestionError,
    SelectionError,
    SiteError,
)

SPACE = vn.NeuronSpace.from_widths("language", "gate", [64] * 4)


def statistics(groups=("A", "B"), tokens=(10, 10), space=SPACE, **provenance) -> vn.ActivationStatistics:
    positive = np.random.default_rng(0).integers(0, 10, (len(groups), len(space)))
    positive = np.minimum(positive, np.array(tokens)[:, None])
    return vn.ActivationStatistics.from_counts(space, groups, positive, tokens, provenance=provenance)


def other_space(*widths: int) -> vn.NeuronSpace:
    return vn.NeuronSpace.from_widths("language", "gate", widths)


def question(**changes) -> vn.Question:
    fields = {"image": picture(), "question": "What?", "options": ("Tea", "Rice"), "answer": 0, "group": "A"}
    return vn.Question(**{**fields, "id": "q", **changes})


BAD = {
    "a model with no MLP": (
        lambda model: vn.VLM(nn.Linear(2, 2), model.processor),
        ArchitectureError,
        r"[Nn]o MLP",
    ),
    "a layer": (lambda model: model.language.layers[32], SiteError, r"layer 32 is not in tower 'language' \(0–3\)"),
    "a layer by name": (
        lambda model: model.site("language.layers.32.mlp.gate"),
        SiteError,
        r"layer 32 is not in tower 'language' \(0–3\)",
    ),
    "a site": (
        lambda model: model.site("language.layers.1.mlp.middle"),
        SiteError,
        "'language.layers.1.mlp.middle' is not the name of a site; a name looks like",
    ),
    "a tower": (
        lambda model: model.space("audio"),
        SiteError,
        "tower 'audio' does not exist; Qwen2_5_VLForConditionalGeneration has language, vision",
    ),
    "a group of statistics": (
        lambda model: statistics().select_groups(["C"]),
        GroupError,
        "group 'C' is not in these statistics; they have A, B",
    ),
    "a group of a selection": (
        lambda model: vn.CAS(0.1).select(statistics())["C"],
        GroupError,
        "'C'.*A, B",
    ),
    "neurons of another width": (
        lambda model: vn.Ablation(model, vn.NeuronSet(other_space(32), [1])),
        MismatchError,
        "these neurons are not of this model: language.layers.0.mlp.gate has 64 neurons here, 32 in their space",
    ),
    "neurons of a deeper model": (
        lambda model: vn.Ablation(model, vn.NeuronSet(other_space(*[64] * 9), [1])),
        MismatchError,
        r"these neurons are not of this model: layer 4 is not in tower 'language' \(0–3\)",
    ),
    "neurons of two models": (
        lambda model: vn.NeuronSet(SPACE, [1]) | vn.NeuronSet(other_space(32), [1]),
        MismatchError,
        "space",
    ),
    "statistics of two spaces": (
        lambda model: statistics() + statistics(space=other_space(32)),
        MismatchError,
        "space",
    ),
    "statistics of two models": (
        lambda model: statistics(model="one") + statistics(model="two"),
        MismatchError,
        "statistics with different 'model' cannot be added: 'one' and 'two'",
    ),
    "an answer outside the options": (
        lambda model: question(answer=2),
        QuestionError,
        r"question 'q': answer 2 is outside the options \(0–1\)",
    ),
    "an answer that is kept secret": (
        lambda model: question(answer=-1),
        QuestionError,
        "answer -1 is outside the options .* A label of -1 usually means that the dataset keeps its answers secret",
    ),
    "fewer than two groups to compare": (
        lambda model: vn.knockout(model, some_questions(2, groups="A"), {"x": vn.NeuronSet(model.space(), [1])}),
        QuestionError,
        "a knockout compares groups, and needs questions of at least two; got A",
    ),
    "fewer than two groups to select": (
        lambda model: vn.CAS(0.1).select(statistics(("A",), (10,))),
        SelectionError,
        "group",
    ),
    "a group with no counted item": (
        lambda model: vn.CAS(0.1).select(statistics(tokens=(10, 0))),
        SelectionError,
        "no token was counted for B: leave it out with select_groups, or record more items",
    ),
    "a picture that cannot be opened": (
        lambda model: vn.record(model, [question(), question(id="broken", image=b"?")], progress=False),
        QuestionError,
        r"question 'broken': the picture 'bytes' cannot be opened \(UnidentifiedImageError",
    ),
    "a file that is none": (
        lambda model: vn.KnockoutResult.load("/nowhere"),
        FileFormatError,
        "/nowhere does not hold a knockout result",
    ),
    **{
        f"a fraction of {fraction}": (
            lambda model, fraction=fraction: vn.CAS(fraction).select(statistics()),
            SelectionError,
            "fraction",
        )
        for fraction in (0.0, -0.1, 1.5, float("nan"))
    },
    "a fraction that yields no neuron": (
        lambda model: vn.CAS(0.0001).select(statistics()),
        SelectionError,
        "0.0001.*256",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_clear_error_of_the_library(model, what, unchecked):
    run, kind, message = BAD[what]
    inputs = model.prepare(question())
    before = logits_of(model.hf, inputs)
    with pytest.raises(kind, match=message) as caught:
        run(model)
    assert isinstance(caught.value, vn.VLMNeuronsError)
    assert torch.equal(logits_of(model.hf, inputs), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_name_their_layer_and_what_was_counted_is_kept(model, value):
    questions = some_questions(4)
    token = model.tokenizer.convert_tokens_to_ids("Z")
    bad = question(id="bad", question="Z?")
    embedding = model.hf.get_input_embeddings().weight
    kept = embedding[token].detach().clone()
    gate = language_blocks(model.hf)[0].mlp.gate_proj.weight
    assert torch.isfinite(gate).all()
    try:
        with torch.no_grad():
            embedding[token] = value
        with pytest.raises(
            ActivationError, match=r"NaN or infinite activations at language.layers.0.mlp.gate"
        ) as caught:
            vn.record(model, [*questions, bad], condition="all", batch_size=2, progress=False)
        assert "question 'bad'" in str(caught.value)
    finally:
        with torch.no_grad():
            embedding[token] = kept
    assert caught.value.partial == vn.record(model, questions, condition="all", progress=False)
