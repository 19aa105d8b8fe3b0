"""The first-order estimate is the derivative of the exact effect, and says so where there is none."""

import numpy as np
import pytest
import torch

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.testing import tiny as _tiny


@pytest.mark.parametrize("answer", ["letters", "text"])
def test_the_estimate_is_the_slope_of_the_exact_effect(load, answer):
    model = load("llava_next_qwen2")
    questions = some_questions(5)
    selection = vn.RandomNeurons(0.2, seed=1).select(
        vn.ActivationStatistics.from_counts(
            model.space(), ["A", "B"], np.zeros((2, len(model.space())), dtype=np.int64), [1, 1]
        )
    )
    estimate = vn.screen(model, questions, {"x": selection}, answer=answer, batch_size=2, progress=False)
    step = 3e-3  # beyond it another wrong option becomes the best one
    up, down = (
        vn.knockout(
            model, questions, {"x": selection}, answer=answer, mode="scale", factor=1 + side * step, progress=False
        ).table()["margin"]
        for side in (1, -1)
    )
    slope = (down - up) / (2 * step)  # from the neurons as they are towards zero
    np.testing.assert_allclose(estimate["estimate"], slope, rtol=0.02, atol=2e-3)
    assert estimate["estimate"].abs().max() > 0.05


def test_frozen_weights_give_the_same_estimate_and_no_weight_gets_a_gradient():
    hf, processor = _tiny.tiny_model("qwen2_5_vl")
    model = vn.VLM(hf, processor)
    questions = some_questions(3)
    masks = {"x": vn.NeuronSet(model.space(), torch.arange(0, len(model.space()), 3))}
    free = vn.screen(model, questions, masks, progress=False)
    assert all(parameter.grad is None for parameter in hf.parameters())
    hf.requires_grad_(False)
    np.testing.assert_allclose(
        vn.screen(model, questions, masks, progress=False)["estimate"], free["estimate"], rtol=1e-5
    )


def test_what_has_no_margin_or_is_not_in_the_decoder_is_refused(model):
    questions = some_questions(3)
    with pytest.raises(QuestionError, match="no margin"):
        vn.screen(model, questions, {"x": vn.NeuronSet.empty(model.space())}, answer="generate", progress=False)
    with pytest.raises(MismatchError, match="decoder's neurons"):
        vn.screen(model, questions, {"x": vn.NeuronSet.empty(model.space("vision"))}, progress=False)
    with pytest.raises(QuestionError, match="no questions"):
        vn.screen(model, [], {"x": vn.NeuronSet.empty(model.space())}, progress=False)
