"""A model over several devices, as accelerate places one: here the memory and the disk stand for two of them."""

import warnings

import pytest
import torch

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.model.identity import digest_of_weights

HALVES = {
    "llava_next_mistral": ("model.vision_tower", "model.multi_modal_projector", "model.image_newline"),
    "qwen2_5_vl": ("model.visual",),
}


@pytest.fixture(scope="module", params=HALVES)
def both(request, tmp_path_factory):
    """One checkpoint, loaded whole and loaded over two places."""
    name, root = request.param, tmp_path_factory.mktemp("placed")
    hf, processor = vn.testing.tiny_model(name)
    hf.save_pretrained(root / "checkpoint")
    processor.save_pretrained(root / "checkpoint")
    language = "model.language_model"
    places = dict.fromkeys([*HALVES[name], f"{language}.embed_tokens", f"{language}.rotary_emb"], "cpu")
    places |= {f"{language}.layers.{n}": "disk" if n in (1, 3) else "cpu" for n in range(4)}
    places |= {f"{language}.norm": "disk", "lm_head": "cpu"}
    how = {"device_map": places, "offload_folder": str(root / "disk")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following device_map keys do not match")  # a parameter of its own
        return tuple(vn.VLM.from_pretrained(root / "checkpoint", dtype=torch.float32, **more) for more in ({}, how))


def test_the_placed_model_has_parts_that_are_not_in_memory(both):
    whole, placed = both
    assert not any(one.device.type == "meta" for one in whole.hf.parameters())
    assert sum(one.device.type == "meta" for one in placed.hf.parameters()) >= 2 * 9
    assert digest_of_weights(whole.hf) == digest_of_weights(placed.hf)


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_counts_are_those_of_the_model_in_one_place(both, tower):
    tables = [
        vn.record(one, some_questions(6), one.space(tower), condition="all", magnitudes=True, progress=False)
        for one in both
    ]
    assert torch.equal(tables[0].positive, tables[1].positive)
    assert torch.equal(tables[0].total, tables[1].total)
    assert tables[0].positive.sum() > 0


def test_so_are_the_answers_under_masks(both):
    results = []
    for one in both:
        masks = {f"set {n}": vn.NeuronSet(one.space(), range(n, 256, 5)) for n in range(5)}
        results.append(vn.knockout(one, some_questions(6), masks, progress=False).answer_table())
    assert results[0].equals(results[1])
    assert results[0].groupby("selector", observed=True)["margin"].sum().nunique() == 6  # each mask has its own effect


def test_so_is_what_is_generated_under_an_ablation(both):
    written = []
    for one in both:
        batch = one.prepare(some_questions(3))
        plain = one.generate(**batch, max_new_tokens=8, do_sample=False)
        with vn.Ablation(one, vn.NeuronSet(one.space(), range(0, 256, 2)), mode="scale", factor=-30.0):
            ablated = one.generate(**batch, max_new_tokens=8, do_sample=False)
        assert not torch.equal(plain, ablated)
        assert torch.equal(plain, one.generate(**batch, max_new_tokens=8, do_sample=False))
        written.append(ablated)
    assert torch.equal(*written)


def test_so_are_named_sites_in_a_trace(both):
    seen = []
    for one in both:
        with torch.no_grad(), one.trace(**one.prepare(some_questions(2))):
            seen.append([layer.mlp.gate.save() for layer in one.language.layers])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
