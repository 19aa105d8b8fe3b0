"""Runs elsewhere, as far as they can be tested without NDIF.

Two stand-ins: nnsight's own simulation (``remote="local"``), and a process of its own that has a model but not this
library. With both, every integer is that of the library's own hooks.
"""

import numpy as np
import pytest
import torch

import vlmneurons as vn
from helpers import some_questions
from remote_server import Host
from vlmneurons.errors import AblationError, ArchitectureError, MismatchError, QuestionError
from vlmneurons.run.intervention import Intervention
from vlmneurons.run.readers import Letters
from vlmneurons.run.remote import edits_of, stop


def masks_of(model, size=100):
    space = model.space()
    generator = np.random.default_rng(0)
    sets = {group: vn.NeuronSet(space, generator.choice(len(space), size, replace=False)) for group in "AB"}
    return vn.Selection(sets, selector="some")


def assert_same_answers(there, here):
    assert there.ids == here.ids
    assert there.masks == here.masks
    assert np.array_equal(there.chosen, here.chosen)
    np.testing.assert_allclose(there.margins, here.margins, atol=1e-4)  # here masks share a forward: rounding differs
    assert np.abs(there.margins[1] - there.margins[0]).max() > 0.01


# -- nnsight's simulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["content", "last"])
def test_counts_and_totals_of_a_remote_run_are_those_of_the_hooks(paper_model, tokens):
    how = {"tokens": tokens, "condition": "correct", "batch_size": 3, "progress": False}
    here = vn.record(paper_model, some_questions(12), **how)
    there = vn.record(paper_model, some_questions(12), remote="local", **how)
    assert there == here
    assert int(here.positive.sum()) > 0
    assert 0 < int(here.items.sum()) < 12
    assert there.provenance["remote"] == "local"
    assert there.provenance["dtype"] == here.provenance["dtype"] == "torch.float32"


@pytest.mark.parametrize("kind", ["pre", "up", "post"])
def test_every_kind_of_site_can_be_counted_with_its_magnitudes(model, kind):
    space = model.space("language", kind)
    how = {"condition": "all", "batch_size": 4, "magnitudes": True, "progress": False}
    here = vn.record(model, some_questions(5), space, **how)
    assert vn.record(model, some_questions(5), space, remote="local", **how) == here


def test_pictures_are_counted_question_by_question(paper_model):
    space = paper_model.space(["language", "vision"])
    how = {"condition": "all", "batch_size": 3, "magnitudes": True, "progress": False}
    here = vn.record(paper_model, some_questions(4), space, **how)
    assert vn.record(paper_model, some_questions(4), space, remote="local", **how) == here
    blind = vn.QuestionSet([vn.Question(None, "What?", ("a", "b"), 0, "A", id="blind")])
    assert vn.record(paper_model, blind, space, remote="local", **how) == vn.record(paper_model, blind, space, **how)


def test_counts_of_every_question_are_kept_as_they_are_here(model, tmp_path):
    how = {"batch_size": 3, "magnitudes": True, "maxima": True, "progress": False}
    here = vn.record_items(model, some_questions(7), tmp_path / "here", **how)
    there = vn.record_items(model, some_questions(7), tmp_path / "there", remote="local", **how)
    assert there.complete
    for name in here.tables:
        assert np.array_equal(there._files.table(name), here._files.table(name)), name
    assert there.group_by(condition="all") == here.group_by(condition="all")
    assert there._files.records["chosen"].tolist() == here._files.records["chosen"].tolist()
    with pytest.raises(
        MismatchError, match="its engine is 'transformers through nnsight', not 'transformers'"
    ):  # files from here and there are not mixed
        vn.record_items(model, some_questions(7), tmp_path / "there", **how)


@pytest.mark.parametrize("answer", ["letters", "text"])
def test_answers_under_every_mask_are_those_of_the_ablations(paper_model, answer):
    chosen = masks_of(paper_model)
    masks = {
        "zero": chosen,
        "none": vn.NeuronSet.empty(paper_model.space()),
        "half": Intervention(chosen, "scale", factor=0.5),
        "gate": Intervention(chosen, "add", factor=2.0, values=0.5, at="gate"),
        "set": Intervention(chosen["A"], "replace", values=1.0, at="post"),
        "pictures": vn.NeuronSet(paper_model.space("vision"), range(0, 64, 2)),
    }
    how = {"batch_size": 4, "answer": answer, "progress": False}
    here = vn.knockout(paper_model, some_questions(6), masks, **how)
    there = vn.knockout(paper_model, some_questions(6), masks, remote="local", **how)
    assert_same_answers(there, here)
    assert there.provenance["remote"] == "local"


def test_the_demo_answers_alike_and_its_neurons_count_alike(tmp_path):
    model, questions = vn.load_demo("organism")
    few = questions.filter(group={"Egypt", "Japan"}).balanced(6, seed=0)
    truth = vn.demo_truth()
    masks = {"truth": vn.Selection({group: truth[group] for group in ("Egypt", "Japan")}, selector="truth")}
    how = {"batch_size": 4, "progress": False}
    here = vn.knockout(model, few, masks, **how)
    there = vn.knockout(model, few, masks, remote="local", folder=tmp_path / "run", **how)
    assert_same_answers(there, here)
    assert there.summary().equals(vn.knockout(model, few, masks, remote="local", **how).summary())
    assert vn.record(model, few, remote="local", **how) == vn.record(model, few, **how)
    assert_same_answers(vn.KnockoutResult.load(tmp_path / "run"), here)


def test_a_reader_of_ones_own_gets_the_logits_it_wants(model):
    class Shouted(Letters):
        """The letters again, by a score of its own: what Letters says of its tokens does not go for it."""

        def score(self, model, questions, encoded, logits):
            assert all(len(row) == 1 and torch.isfinite(row).all() for row in logits)
            return super().score(model, questions, encoded, [row * 2 for row in logits])

    how = {"batch_size": 4, "progress": False}
    there = vn.knockout(model, some_questions(6), {"m": masks_of(model)}, answer=Shouted(), remote="local", **how)
    assert_same_answers(there, vn.knockout(model, some_questions(6), {"m": masks_of(model)}, answer=Shouted(), **how))


# -- a process without this library ------------------------------------------------------------------------------------


@pytest.fixture
def host(tiny_folder, tmp_path, monkeypatch):
    from nnsight.modeling.mixins.remotable import Remotable

    host = Host(tiny_folder("qwen2_5_vl"), tmp_path)
    monkeypatch.setattr(Remotable, "_remote_backend", lambda self, *_: host)
    yield host
    host.close()


def test_a_model_without_weights_is_counted_and_ablated_in_a_process_without_this_library(host, load, tiny_folder):
    whole, bare = load("qwen2_5_vl"), vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"), weights=False)
    assert {weight.device.type for weight in bare.hf.parameters()} == {"meta"}
    assert bare.space() == whole.space()
    assert bare.device.type == "cpu"
    how = {"batch_size": 4, "progress": False}
    here = vn.record(whole, some_questions(6), **how)
    there = vn.record(bare, some_questions(6), remote=True, **how)
    assert there == here
    assert host.jobs == 2
    masks = {"some": masks_of(whole), "steered": Intervention(masks_of(whole), "scale", factor=1.5)}
    before = host.received
    answers = vn.knockout(bare, some_questions(6), masks, remote=True, **how)
    assert host.jobs == 4  # one for each batch, with all its masks
    assert host.received - before < 40_000  # a few numbers of each answer, not a vocabulary
    assert_same_answers(answers, vn.knockout(whole, some_questions(6), masks, **how))


# -- what cannot be sent is refused ------------------------------------------------------------------------------------


def test_what_a_trace_cannot_do_is_refused_before_anything_is_sent(model, load, monkeypatch):
    questions, masks = some_questions(2), {"m": masks_of(model)}
    with pytest.raises(QuestionError, match=r"a remote run is one forward, and Generate.* needs more; read answers by"):
        vn.record(model, questions, answer="generate", remote="local", progress=False)
    with pytest.raises(QuestionError, match="a remote run is one forward"):
        vn.knockout(model, questions, masks, answer="generate", remote="local", progress=False)
    with pytest.raises(MismatchError, match="remote='NDIF' is no place to run; choose from False, True, 'local'"):
        vn.record(model, questions, remote="NDIF", progress=False)
    with pytest.raises(AblationError, match="one set of neurons for each row cannot be sent"):
        edits_of(model, vn.Ablation(model, [masks["m"]["A"], masks["m"]["B"]]))


def test_a_model_without_weights_does_not_run_here(tiny_folder):
    bare = vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"), weights=False)
    for remote in (False, "local"):
        with pytest.raises(MismatchError, match="was made without its weights and cannot run here: pass remote=True"):
            vn.record(bare, some_questions(2), remote=remote, progress=False)
    with pytest.raises(MismatchError, match="was made without its weights"):
        vn.knockout(bare, some_questions(2), {"m": masks_of(bare)}, progress=False)
    with pytest.raises(ArchitectureError, match="weights=False loads nothing that dtype could apply to"):
        vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"), weights=False, dtype="bfloat16")


def test_sites_of_experts_and_sites_without_a_module_are_refused():
    from vlmneurons.testing import tiny as _tiny

    refused = {}
    for name in _tiny.tiny_names(processor=False):
        hf, _ = _tiny.tiny_model(name) if "moe" in name else (None, None)
        if hf is None:
            continue
        model = vn.VLM(hf, _Nothing())
        for site in model.space():
            try:
                stop(model, site)
            except MismatchError as error:
                refused[name] = str(error)
    assert refused
    assert all("run the model here" in text for text in refused.values())
    assert any("belongs to an expert, which sees only the tokens" in text for text in refused.values())


class _Nothing:
    """A processor for a model that is never asked anything."""

    tokenizer = None


def test_layers_that_run_twice_are_refused():
    from test_unusual_models import Looped, Processor, own_model, template

    model = vn.VLM(own_model(Looped), Processor(), template=template)
    assert vn.record(model, some_questions(2), condition="all", progress=False).routed is not None  # here it is counted
    with pytest.raises(MismatchError, match=r"computes language.layers.0.mlp.\w+ 2 times in one forward"):
        vn.record(model, some_questions(2), remote="local", progress=False)


def test_values_that_are_not_finite_are_found_there_as_here(load):
    model = load("qwen2_5_vl")
    weight = model.hf.model.language_model.layers[1].mlp.gate_proj.weight
    with torch.no_grad():
        kept, weight[0, 0] = weight[0, 0].clone(), torch.nan
    try:
        with pytest.raises(vn.errors.ActivationError, match=r"at language.layers.1.mlp.gate, question 'q0'"):
            vn.record(model, some_questions(2), remote="local", progress=False)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept
