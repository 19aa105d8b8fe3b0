"""Runs elsewhere, as far as nnsight's simulation of a server goes: every integer is that of the library's own hooks."""

import numpy as np
import pytest
import torch

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.errors import AblationError, MismatchError, QuestionError


def masks_of(model, size=40):
    space = model.space()
    generator = np.random.default_rng(0)
    sets = {group: vn.NeuronSet(space, generator.choice(len(space), size, replace=False)) for group in "AB"}
    return vn.Selection(sets, selector="some")


@pytest.mark.parametrize("tokens", ["content", "image", "text", "last"])
def test_counts_and_totals_of_a_remote_run_are_those_of_the_hooks(paper_model, tokens):
    questions = some_questions(7)
    how = {"tokens": tokens, "condition": "all", "batch_size": 3, "progress": False}
    here = vn.record(paper_model, questions, **how)
    there = vn.record(paper_model, questions, remote="local", **how)
    assert there == here
    assert int(here.positive.sum()) > 0
    assert there.provenance["remote"] == "local"
    assert there.provenance["dtype"] == here.provenance["dtype"] == "torch.float32"
