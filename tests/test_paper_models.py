"""The whole job on the paper's three models, saved to disk and loaded by name, through the public names alone."""

import numpy as np
import pytest
import torch

import vlmneurons as vn
from helpers import logits_of, plain_hooks, some_questions


def test_record_select_ablate_and_measure(paper_model, bare_model, tmp_path):
    questions = some_questions(24, groups="ABC")
    identify, evaluate = questions.split(0.5, seed=0)
    stats = vn.record(paper_model, identify, condition="all", tokens="content", batch_size=4, progress=False)
    assert stats.probability.shape == (3, 256)
    by_hand = {group: np.zeros(256) for group in "ABC"}
    tokens = dict.fromkeys("ABC", 0)
    for item in identify:
        inputs = paper_model.prepare(identify.with_items([item]))
        with plain_hooks(bare_model) as values, torch.inference_mode():
            bare_model(**inputs)
        counted = inputs.tokens.counted("content")[0]
        gates = torch.cat([values[f"language.layers.{layer}.mlp.gate"][0][0][counted] for layer in range(4)], 1)
        by_hand[item.group] += (gates > 0).sum(0).numpy()
        tokens[item.group] += int(counted.sum())
    for row, group in enumerate(stats.groups):
        np.testing.assert_array_equal(stats.probability[row].numpy(), by_hand[group] / tokens[group])

    selected = {"CAS": vn.CAS(0.05).select(stats), "random": vn.RandomNeurons(0.05).select(stats)}
    selected["CAS"].save(tmp_path / "cas.safetensors")
    selected["CAS"] = vn.Selection.load(tmp_path / "cas.safetensors")
    neurons = selected["CAS"]["A"]
    assert 0 < len(neurons) <= 13

    inputs = paper_model.prepare(evaluate)
    clean = logits_of(bare_model, inputs)
    with vn.Ablation(paper_model, neurons), plain_hooks(paper_model.hf) as values:
        assert not torch.equal(logits_of(paper_model.hf, inputs), clean)
    for layer, numbers in neurons.by_layer().items():
        assert (values[f"language.layers.{layer}.mlp.post"][0][..., numbers] == 0).all()
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)

    result = vn.knockout(paper_model, evaluate, selected, batch_size=6, progress=False)
    assert len(result.table()) == 2 * 3 * 3
    assert set(result.summary()["group"]) == {"A", "B", "C", "all"}
    result.save(tmp_path / "study")
    assert vn.KnockoutResult.load(tmp_path / "study").matrix("CAS").equals(result.matrix("CAS"))


def test_the_same_folder_gives_the_same_statistics_whoever_loads_it(paper_model, tiny_folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = str(tiny_folder(paper_model.test_name))
    processor = AutoProcessor.from_pretrained(folder)
    other = vn.VLM(AutoModelForImageTextToText.from_pretrained(folder), processor)
    questions = some_questions(6)
    how = {"condition": "all", "progress": False}
    assert vn.record(other, questions, **how) == vn.record(paper_model, questions, **how)
    with pytest.raises(OSError, match="nowhere"):
        vn.VLM.from_pretrained("/nowhere/at/all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_counted_exactly_as_hooks_see_it(paper_model, tiny_folder, dtype):
    model = vn.VLM.from_pretrained(str(tiny_folder(paper_model.test_name)), dtype=dtype)
    questions = some_questions(3, groups="A")
    expected = torch.zeros(256, dtype=torch.int64)
    for item in questions:
        inputs = model.prepare(questions.with_items([item]))
        with plain_hooks(model.hf) as values, torch.inference_mode():
            model.hf(**inputs)
        counted = inputs.tokens.counted("content")[0]
        expected += torch.cat([(values[f"language.layers.{n}.mlp.gate"][0][0][counted] > 0).sum(0) for n in range(4)])
    stats = vn.record(model, questions, condition="all", batch_size=1, magnitudes=True, progress=False)
    assert torch.equal(stats.positive[0], expected)
    assert stats.provenance["dtype"] == str(dtype)
    assert stats.total.dtype == torch.float64
    with vn.Ablation(model, vn.NeuronSet(model.space(), [5]), "replace", values=0.3, at="post"):
        assert logits_of(model.hf, inputs).dtype == dtype
