"""The nnsight model stays an nnsight model: what its traces, edits and sessions offer, on named sites."""

import nnsight
import pytest
import torch

import vlmneurons as vn
from helpers import language_blocks, logits_of, plain_hooks, some_questions


@pytest.fixture
def inputs(paper_model):
    return paper_model.prepare(some_questions(2))


def test_loops_over_layers_and_helpers_work_inside_a_trace(paper_model, inputs):
    def strongest(values):
        return values.abs().amax((0, 1))

    with plain_hooks(paper_model.hf) as plain, torch.no_grad():
        paper_model.hf(**inputs)
    with torch.no_grad(), paper_model.trace(**inputs):
        best = [].save()
        for layer in paper_model.language.layers:
            best.append(strongest(layer.mlp.gate))
        last = paper_model.language.layers[-1].mlp.post.save()
    for number, value in enumerate(best):
        assert torch.equal(value, strongest(plain[f"language.layers.{number}.mlp.gate"][0]))
    assert torch.equal(last, plain["language.layers.3.mlp.post"][0])


def test_reads_out_of_order_are_refused_by_nnsight_and_nothing_stays_behind(paper_model, inputs):
    clean = logits_of(paper_model.hf, inputs)
    with (  # noqa: PT012
        pytest.raises(Exception, match="was requested but the model already ran past it"),
        torch.no_grad(),
        paper_model.trace(**inputs),
    ):
        post = paper_model.language.layers[2].mlp.post.save()
        gate = paper_model.language.layers[1].mlp.gate.save()
        assert post is not gate
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)


def test_envoys_beside_the_named_sites_are_read_and_edited(paper_model, inputs):
    blocks = language_blocks(paper_model.hf)
    handle = blocks[1].self_attn.register_forward_hook(lambda _, args, out: (out[0] * 2, *out[1:]))
    expected = logits_of(paper_model.hf, inputs)
    handle.remove()
    with torch.no_grad(), paper_model.trace(**inputs):
        paper_model.language.layers[1].self_attn.output[0][:] *= 2
        inside = paper_model.language.layers[1].output.save()
        down = paper_model.language.layers[2].mlp.down_proj.output.save()
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert isinstance(inside, torch.Tensor | tuple)
    assert down.shape[-1] == 32
    with torch.no_grad(), paper_model.trace(**inputs):
        paper_model.lm_head.output = paper_model.lm_head.output * 0 + 3
        result = paper_model.output.save()
    assert (result.logits == 3).all()


def test_assigning_the_output_of_a_layer_an_mlp_or_the_model_reaches_the_model(paper_model, inputs):
    blocks = language_blocks(paper_model.hf)
    clean = logits_of(paper_model.hf, inputs)
    handles = [
        blocks[1].mlp.register_forward_hook(lambda _, args, out: out * 2),
        blocks[2].register_forward_hook(lambda _, args, out: out * 0.5),
    ]
    expected = logits_of(paper_model.hf, inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), paper_model.trace(**inputs):
        paper_model.language.layers[1].mlp.output = paper_model.language.layers[1].mlp.output * 2
        paper_model.language.layers[2].output = paper_model.language.layers[2].output * 0.5
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)
    with torch.no_grad(), paper_model.trace(**inputs):
        paper_model.output = {"mine": paper_model.lm_head.output}
        result = paper_model.output.save()
    assert list(result) == ["mine"]
    assert torch.equal(result["mine"], clean)
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)


def test_assigning_a_misspelt_value_raises_instead_of_being_lost(paper_model, inputs):
    layer = paper_model.language.layers[1]
    with pytest.raises(AttributeError, match="has no value 'gaet' that could be assigned"):
        layer.mlp.gaet = 1
    with pytest.raises(AttributeError, match=r"<language.layers.1: mlp> has no value 'outputs' that could be assigned"):
        layer.outputs = 1
    with pytest.raises(ValueError, match="outside of interleaving"):
        layer.mlp.gate  # noqa: B018  (there are no values outside a trace)


def test_values_are_written_in_each_step_of_generate(paper_model, inputs):
    down = language_blocks(paper_model.hf)[1].mlp.down_proj
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}

    def lift(_, args):
        return (args[0] + 5.0,)

    handle = down.register_forward_pre_hook(lift)
    expected = paper_model.hf.generate(**inputs, **how, return_dict_in_generate=True)
    handle.remove()
    with paper_model.generate(**inputs, **how, return_dict_in_generate=True) as tracer:
        for _ in tracer.iter[:3]:
            paper_model.language.layers[1].mlp.post += 5.0
        result = tracer.result.save()
    for one, other in zip(result.logits, expected.logits, strict=True):
        assert torch.equal(one, other)


def test_only_the_steps_that_are_named_are_written(paper_model, inputs):
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with paper_model.generate(**inputs, **how) as tracer:
        posts = [].save()
        for step in tracer.iter[:3]:
            if step == 1:
                paper_model.language.layers[1].mlp.gate[:] = 0
            posts.append(paper_model.language.layers[1].mlp.post.clone())
    assert [bool((post == 0).all()) for post in posts] == [False, True, False]


def test_gradients_flow_through_a_gate(paper_model, inputs):
    last = int(inputs.tokens.last[0])
    activation = language_blocks(paper_model.hf)[1].mlp.act_fn
    kept = {}

    def keep(_, args, out):
        out.retain_grad()
        kept["gate"] = out

    handle = activation.register_forward_hook(keep)
    paper_model.hf(**inputs).logits[0, last, 7].backward()
    handle.remove()
    expected = kept["gate"].grad
    paper_model.hf.zero_grad()
    with paper_model.trace(**inputs):
        gate = paper_model.language.layers[1].mlp.gate
        score = paper_model.lm_head.output[0, last, 7]
        with score.backward():
            gradient = gate.grad.save()
    paper_model.hf.zero_grad()
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gradient, expected)


def test_sites_of_both_towers_are_reached_by_name(paper_model, inputs):
    with torch.no_grad(), paper_model.trace(**inputs):
        one = paper_model.site("vision.layers.1.mlp.gate").save()
        two = paper_model.site(vn.Site("language", 2, "mlp", "gate")).save()
    with plain_hooks(paper_model.hf) as plain, torch.no_grad():
        paper_model.hf(**inputs)
    assert torch.equal(one, plain["vision.layers.1.mlp.gate"][0])
    assert torch.equal(two, plain["language.layers.2.mlp.gate"][0])


def test_each_invoke_of_a_trace_sees_and_writes_its_own_rows(paper_model):
    with torch.no_grad(), paper_model.trace() as tracer:
        with tracer.invoke("What is this?"):
            one = paper_model.language.layers[0].mlp.gate.save()
            paper_model.language.layers[0].mlp.post = paper_model.language.layers[0].mlp.post * 0
        with tracer.invoke("And what is this long long text?"):
            two = paper_model.language.layers[0].mlp.gate.save()
        with tracer.invoke():
            both = paper_model.language.layers[0].mlp.output.save()
    assert one.shape[0] == two.shape[0] == 1
    assert both.shape[0] == 2
    assert (both[0] == 0).all()
    assert (both[1] != 0).any()


def test_an_edit_is_a_model_of_its_own_and_leaves_the_original_alone(model):
    inputs = model.prepare(some_questions(1))
    clean = logits_of(model.hf, inputs)
    with model.edit() as (_, edited):
        model.language.layers[0].mlp.post[:] = 0
    with torch.no_grad(), edited.trace(**inputs):
        changed = edited.lm_head.output.save()
    with torch.no_grad(), model.trace(**inputs):
        same = model.lm_head.output.save()
    assert torch.equal(same, clean)
    assert not torch.equal(changed, clean)
    neurons = vn.NeuronSet.from_indices(model.space(), {0: range(64)})
    with vn.Ablation(model, neurons):
        assert torch.equal(changed, logits_of(model.hf, inputs))


def test_scan_gives_shapes_without_running(model):
    # Without a picture: a vision tower's number of patches depends on data, which fake tensors do not have.
    inputs = model.prepare(vn.Question(None, "What?", ("Tea", "Rice"), 0, "A"))
    with model.scan(**inputs):
        shape = nnsight.save(tuple(model.language.layers[0].mlp.gate.shape))
    assert tuple(shape) == (1, inputs["input_ids"].shape[1], 64)


def test_a_session_runs_several_traces(model):
    inputs = model.prepare(some_questions(1))
    with torch.no_grad(), model.session():
        with model.trace(**inputs):
            gate = model.language.layers[0].mlp.gate.save()
        with model.trace(**inputs):
            model.language.layers[0].mlp.gate = gate * 0
            post = model.language.layers[0].mlp.post.save()
    assert (gate != 0).any()
    assert (post == 0).all()


def test_traces_work_inside_methods_closures_and_loops(model):
    inputs = model.prepare(some_questions(1))

    class Study:
        def __init__(self, model):
            self.model = model

        def gates(self, factor):
            values = []
            for number in range(2):
                with torch.no_grad(), self.model.trace(**inputs):
                    self.model.language.layers[0].mlp.gate *= factor
                    values.append(self.model.language.layers[number].mlp.post.save())
            return values

    plain, doubled = Study(model).gates(1.0), Study(model).gates(2.0)
    torch.testing.assert_close(doubled[0], plain[0] * 2)
    assert not torch.equal(doubled[1], plain[1])


def test_the_nnsight_model_is_at_hand_with_all_it_offers(model):
    assert isinstance(model.nnsight, nnsight.TransformersModel)
    assert model.tokenizer is model.processor.tokenizer
    for name in ("trace", "generate", "scan", "edit", "session"):
        assert callable(getattr(model, name))
    assert {"trace", "generate", "language", "vision", "hf", "prepare"} <= set(dir(model))
    assert model.lm_head.path.endswith("lm_head")
