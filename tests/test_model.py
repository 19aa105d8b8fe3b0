"""The VLM: what it finds, what its values are, and that it leaves the model's own results alone."""

import pytest
import torch
from torch import nn

import vlmneurons as vn
from helpers import logits_of, plain_edit, plain_hooks, some_questions
from vlmneurons.errors import ArchitectureError, SiteError
from vlmneurons.model.architectures.hooks import read, write
from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.architectures.layout import MLP, MLPLayout, SitePlace


def test_a_model_loaded_by_name_shows_its_towers_layers_and_widths(paper_model):
    lines = repr(paper_model).splitlines()
    vision_path = "visual.blocks" if paper_model.test_name == "qwen2_5_vl" else "vision_tower.encoder.layers"
    vision_kinds = "pre,gate,up,post" if paper_model.test_name == "qwen2_5_vl" else "pre,gate,post"
    assert paper_model.test_name in lines[0]
    assert lines[0].endswith("torch.float32, cpu)")
    assert lines[1] == (
        "  language: 4 layers x 64 = 256 neurons; mlp.{pre,gate,up,post} at model.language_model.layers"
    )
    assert lines[2] == f"  vision: 3 layers x 48 = 144 neurons; mlp.{{{vision_kinds}}} at model.{vision_path}"
    assert repr(paper_model.language) == lines[1].strip()
    assert repr(paper_model.language.layers[1].mlp) == "<language.layers.1.mlp: pre, gate, up, post of 64 neurons>"
    assert len(paper_model.language) == len(paper_model.language.layers) == 4


def test_sites_and_spaces_name_every_neuron(paper_model):
    names = [str(site) for site in paper_model.sites]
    first = names.index("language.layers.0.mlp.pre")  # pictures are computed first
    assert {name.split(".")[0] for name in names[:first]} <= {"vision", "projector"}
    assert names[first : first + 4] == [f"language.layers.0.mlp.{kind}" for kind in ("pre", "gate", "up", "post")]
    assert names[first + 4] == "language.layers.1.mlp.pre"
    assert len(paper_model.space()) == len(paper_model.space("language", "post")) == 4 * 64
    assert len(paper_model.space("vision")) == 3 * 48
    assert len(paper_model.space(["language", "vision"], "post")) == 4 * 64 + 3 * 48
    assert str(paper_model.space("vision", "post").sites[2]) == "vision.layers.2.mlp.post"


def test_logits_of_a_wrapped_model_equal_those_of_one_never_wrapped_bit_for_bit(paper_model, bare_model):
    for side in ("left", "right"):
        inputs = paper_model.prepare(some_questions(3), padding_side=side)
        assert torch.equal(logits_of(paper_model.hf, inputs), logits_of(bare_model, inputs))
    with torch.no_grad(), paper_model.trace(**inputs):
        traced = paper_model.lm_head.output.save()
    assert torch.equal(traced, logits_of(bare_model, inputs))


def test_every_value_in_a_trace_equals_that_of_plain_hooks_on_a_bare_model(paper_model, bare_model):
    inputs = paper_model.prepare(some_questions(3))
    with plain_hooks(bare_model) as plain, torch.no_grad():
        bare_model(**inputs)
    kinds = ("pre", "gate", "up", "post") if paper_model.test_name == "qwen2_5_vl" else ("pre", "gate", "post")
    with torch.no_grad(), paper_model.trace(**inputs):
        seen = {}.save()
        for layer in paper_model.vision.layers:
            for kind in (kind for kind in kinds if kind != "up"):
                seen[f"{layer.mlp.mlp.site(kind)}"] = getattr(layer.mlp, kind)
        for layer in paper_model.language.layers:
            seen[str(layer.mlp.mlp.site("pre"))] = layer.mlp.pre
            seen[str(layer.mlp.mlp.site("gate"))] = layer.mlp.gate
            seen[str(layer.mlp.mlp.site("up"))] = layer.mlp.up
            seen[str(layer.mlp.mlp.site("post"))] = layer.mlp.post
    assert len(seen) == 3 * 3 + 4 * 4
    for name, value in seen.items():
        assert torch.equal(value, plain[name][0]), name


def test_values_read_in_every_step_of_generate_equal_those_of_plain_hooks(paper_model, bare_model):
    inputs = paper_model.prepare(some_questions(2))
    with plain_hooks(bare_model) as plain:
        plain_ids = bare_model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with paper_model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        steps = [].save()
        for _ in tracer.iter[:3]:
            steps.append(paper_model.language.layers[1].mlp.gate)
            steps.append(paper_model.language.layers[1].mlp.post)
        ids = tracer.result.save()
    assert torch.equal(ids, plain_ids)
    for step in range(3):
        assert torch.equal(steps[2 * step], plain["language.layers.1.mlp.gate"][step])
        assert torch.equal(steps[2 * step + 1], plain["language.layers.1.mlp.post"][step])


@pytest.mark.parametrize("at", ["gate", "post"])
def test_editing_in_place_and_assigning_reach_the_logits_as_a_hand_written_hook_does(paper_model, bare_model, at):
    inputs = paper_model.prepare(some_questions(2))

    def edit(values):
        values[..., 3:9] = 0.25
        return values * 1.5

    with plain_edit(bare_model, at, {1: edit, 2: edit}):
        expected = logits_of(bare_model, inputs)
    with torch.no_grad(), paper_model.trace(**inputs):
        for number in (1, 2):
            value = getattr(paper_model.language.layers[number].mlp, at)
            value[..., 3:9] = 0.25
            setattr(paper_model.language.layers[number].mlp, at, value * 1.5)
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)
    with torch.no_grad(), paper_model.trace(**inputs):
        for number in (1, 2):
            name = f"language.layers.{number}.mlp.{at}"
            paper_model.site(name)[..., 3:9] = 0.25
            paper_model.set_site(name, paper_model.site(name) * 1.5)
        again = paper_model.lm_head.output.save()
    assert torch.equal(again, expected)
    assert not torch.equal(expected, logits_of(bare_model, inputs))


def test_vision_values_can_be_written(paper_model, bare_model):
    inputs = paper_model.prepare(some_questions(2))
    from helpers import down_of, vision_blocks

    mlp = vision_blocks(bare_model)[0].mlp
    handle = down_of(mlp).register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    expected = logits_of(bare_model, inputs)
    handle.remove()
    with torch.no_grad(), paper_model.trace(**inputs):
        paper_model.vision.layers[0].mlp.post[:] = 0
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, logits_of(bare_model, inputs))


def test_assigning_pre_and_up_recomputes_all_that_follows(paper_model, bare_model):
    inputs = paper_model.prepare(some_questions(1))
    mlp = bare_model.model.language_model.layers[2].mlp
    handles = [
        mlp.gate_proj.register_forward_hook(lambda _, args, out: out + 1),
        mlp.up_proj.register_forward_hook(lambda _, args, out: out * 2),
    ]
    expected = logits_of(bare_model, inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), paper_model.trace(**inputs):
        paper_model.language.layers[2].mlp.pre = paper_model.language.layers[2].mlp.pre + 1
        paper_model.language.layers[2].mlp.up = paper_model.language.layers[2].mlp.up * 2
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)


# -- what does not exist -----------------------------------------------------------------------------------------------


def test_towers_layers_sites_and_kinds_that_do_not_exist_are_named_with_what_does(model):
    cases = [
        (lambda: model.site("language.layers.32.mlp.gate"), r"layer 32 is not in tower 'language' \(0–3\)"),
        (lambda: model.language.layers[4], r"layer 4 is not in tower 'language' \(0–3\)"),
        (
            lambda: model.site("audio.layers.0.mlp.gate"),
            "tower 'audio' does not exist; Qwen2_5_VLFor.* has language, v",
        ),
        (lambda: model.site("language.layers.0.mlp.out"), "'language.layers.0.mlp.out' is not the name of a site"),
        (lambda: model.site("language.layers.0.ffn.gate"), "layer 0 of tower 'language' has no 'ffn'; it has mlp"),
        (lambda: model.space("audio"), "tower 'audio' does not exist"),
        (lambda: model.space("language", "output"), "site kind 'output' does not exist; the kinds are pre, gate, up"),
    ]
    for ask, message in cases:
        with pytest.raises(SiteError, match=message):
            ask()
    with pytest.raises(LookupError):
        model.site("language.layers.32.mlp.gate")


def test_an_ungated_mlp_has_no_up(load):
    model = load("llava_next_mistral")
    with pytest.raises(SiteError, match=r"vision.layers.0.mlp has no 'up'; it has pre, gate, post"):
        model.site("vision.layers.0.mlp.up")
    with pytest.raises(SiteError, match=r"vision.layers.0.mlp has no 'up'; it has pre, gate, post"):
        model.space("vision", "up")


@pytest.mark.parametrize("path", ["", "language", "language.layers[0]", "language.layers[0].mlp"])
def test_a_misspelt_attribute_raises_and_is_never_none(model, path):
    owner = eval(f"model.{path}") if path else model
    with pytest.raises(AttributeError, match="gaet"):
        owner.gaet  # noqa: B018
    assert not hasattr(owner, "gaet")


def test_what_is_no_vision_language_model_is_refused(model, unchecked):
    with pytest.raises(ArchitectureError, match="a VLM needs its processor"):
        vn.VLM(model.hf, None)
    with pytest.raises(ArchitectureError, match=r"VLM wraps a loaded transformers model; got str. To load by name use"):
        vn.VLM("Qwen/Qwen2.5-VL-7B-Instruct", model.processor)
    with pytest.raises(ArchitectureError, match="VLM wraps a loaded transformers model; got VLM"):
        vn.VLM(model, model.processor)
    with pytest.raises(ArchitectureError, match=r"[Nn]o MLP"):
        vn.VLM(nn.Sequential(nn.Linear(2, 2)), model.processor)


# -- prepare -----------------------------------------------------------------------------------------------------------


def test_prepare_takes_a_question_a_list_or_a_set(model):
    questions = some_questions(2, shuffle=3)
    one = model.prepare(questions[0])
    assert one["input_ids"].shape[0] == 1
    assert torch.equal(model.prepare([questions[0]])["input_ids"], one["input_ids"])
    assert torch.equal(model.prepare(questions, padding_side="right")["attention_mask"][:, 0], torch.ones(2).long())
    same = model.prepare(list(questions))["input_ids"]
    assert not torch.equal(model.prepare(questions)["input_ids"], same)  # another order of the options
    assert model.name.rsplit("/", 1)[-1].startswith("qwen2_5_vl")
    assert model.revision is None
    assert model.device == torch.device("cpu")


# -- where a site is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "pre", "up"),
    [
        ("gate_up", [0, 1, 2], [3, 4, 5]),
        ("up_gate", [3, 4, 5], [0, 1, 2]),
        ("interleaved", [0, 2, 4], [1, 3, 5]),
        ("interleaved_up", [1, 3, 5], [0, 2, 4]),
    ],
)
def test_the_place_of_a_site_in_a_fused_projection_is_its_columns(split, pre, up):
    layout = MLPLayout("down", function=nn.functional.silu, fused="both", split=split)
    values = torch.arange(12.0).reshape(2, 6)
    for kind, columns in (("pre", pre), ("up", up)):
        place = layout.place(kind, 3)
        assert (place.module, place.end, place.computed) == ("both", "output", False)
        assert torch.equal(place.part(values), values[:, columns])
        assert place.part(values).data_ptr() == values[:, columns[0] :].data_ptr()  # a view
        assert torch.equal(layout.part(values, kind), values[:, columns])
    gate = layout.place("gate", 3)
    assert gate.computed
    assert torch.equal(gate.part(values), values[:, pre])
    assert layout.place("post", 3) == SitePlace("down", "input")


def test_the_place_of_a_site_is_where_the_layout_has_a_module_for_it():
    gated = MLPLayout("down", activation="act", gate="gate", up="up")
    assert [gated.place(kind, 8) for kind in ("pre", "gate", "up", "post")] == [
        SitePlace("act", "input"),
        SitePlace("act", "output"),
        SitePlace("up", "output"),
        SitePlace("down", "input"),
    ]
    plain = MLPLayout("fc2", function=nn.functional.gelu, gate="fc1")
    assert plain.place("pre", 8) == SitePlace("fc1", "output")
    assert plain.place("gate", 8) == plain.place("post", 8) == SitePlace("fc2", "input")
    fused = MLPLayout("down", activation="act", fused="both", split="gate_up")
    assert fused.place("gate", 8) == SitePlace("act", "output")
    order = MLP("language", 0, "mlp", "layers.0.mlp", fused, 8).sites
    assert [site.kind for site in order] == ["up", "pre", "gate", "post"]  # both halves come before the activation
    with pytest.raises(SiteError, match=r"language.layers.0.mlp has no 'up'; it has pre, gate, post"):
        MLP("language", 0, "mlp", "layers.0.mlp", plain, 8).place("up")


@pytest.mark.parametrize("kind", ["pre", "gate", "up", "post"])
def test_hooks_of_every_kind_are_seen_as_hooks(model, kind):
    mlp = model.language.layers[1].mlp.mlp
    modules = list(model.hf.get_submodule(mlp.path).modules())
    assert not any(map(is_watched, modules))
    for put in (read, write):
        with put(model.hf, mlp, kind, lambda values: None):
            assert any(map(is_watched, modules))
        assert not any(map(is_watched, modules))
    handle = modules[0].register_forward_hook(lambda *_: None)
    assert is_watched(modules[0])
    handle.remove()
