"""The nnsight model stays an nnsight model: what its traces, edits and sessions offer, on named sites."""

import copy
import pickle
import sys

import nnsight
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlmneurons as vn
from helpers import language_blocks, logits_of, plain_hooks, some_questions
from remote_server import Host
from vlmneurons.errors import AblationError, ArchitectureError, MismatchError, SiteError
from vlmneurons.testing import tiny_inputs, tiny_model, tiny_names, tiny_template


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


# -- what nnsight would pass over without a word -----------------------------------------------------------------------


def skipped_no_grad(model, inputs):
    with model.trace(**inputs), torch.no_grad():
        model.lm_head.output.save()


def skipped_ablation(model, inputs):
    with model.trace(**inputs), vn.Ablation(model, vn.NeuronSet(model.space(), [1])):
        model.lm_head.output.save()


def skipped_after_generate(model, inputs):
    with model.generate(**inputs, max_new_tokens=1), torch.inference_mode():
        model.lm_head.output.save()


def skipped_over_several_lines(model, inputs):
    with (
        model.trace(
            **inputs,
        ) as tracer,
        torch.no_grad(),
    ):
        tracer.result.save()


def skipped_between_two(model, inputs):
    with torch.no_grad(), model.trace(**inputs), vn.Recorder(model):
        model.lm_head.output.save()


def skipped_in_a_session(model, inputs):
    with model.session(), torch.no_grad():
        first = model.trace(**inputs)
        with first:
            model.lm_head.output.save()


def skipped_within_a_session(model, inputs):
    with torch.no_grad(), model.session():
        inputs = dict(inputs)
        with model.trace(**inputs), vn.Recorder(model):
            model.lm_head.output.save()


def skipped_after_an_edit(model, inputs):
    with model.edit() as (_, edited), torch.no_grad():
        edited.language.layers[0].mlp.post[:] = 0


def skipped_after_a_scan(model, inputs):
    with model.scan(**inputs), torch.no_grad():
        nnsight.save(model.language.layers[0].mlp.gate.shape)


def skipped_after_an_invoke(model, inputs):
    with model.trace() as tracer:  # noqa: SIM117
        with tracer.invoke("What?"), torch.no_grad():
            model.lm_head.output.save()


def skipped_after_a_name(model, inputs):
    trace = model.trace(**inputs)
    with trace, torch.no_grad():
        model.lm_head.output.save()


def skipped_on_the_nnsight_model(model, inputs):
    with model.nnsight.trace(**inputs), torch.no_grad():
        model.lm_head.output.save()


def skipped_on_an_edited_model(model, inputs):
    with model.edit() as (_, edited):
        edited.language.layers[0].mlp.post[:] = 0
    with edited.trace(**inputs), torch.no_grad():
        edited.lm_head.output.save()


SKIPPED = [value for name, value in list(globals().items()) if name.startswith("skipped_")]


@pytest.mark.parametrize("function", SKIPPED, ids=lambda function: function.__name__)
def test_what_stands_after_a_trace_in_one_with_is_refused(model, function):
    inputs = model.prepare(some_questions(1))
    clean = logits_of(model.hf, inputs)
    with pytest.raises(
        SiteError, match=r"stands after the trace in one `with`, where nnsight would skip it: it would d"
    ):
        function(model, inputs)
    assert torch.equal(logits_of(model.hf, inputs), clean)
    with torch.no_grad(), model.trace(**inputs):
        assert torch.equal(model.lm_head.output.save(), clean)


def test_a_trace_that_is_last_in_its_with_is_taken_however_it_is_written(model):
    inputs = model.prepare(some_questions(1))
    neurons = vn.NeuronSet(model.space(), range(64))
    trace = model.trace(**inputs)
    with torch.no_grad(), trace:
        one = model.language.layers[0].mlp.post.save()
    with (
        torch.no_grad(),
        vn.Ablation(model, neurons),
        model.trace(**inputs) as tracer,
    ):
        two = model.language.layers[0].mlp.post.save()
        logits = tracer.result.logits.save()
    with torch.no_grad(), \
         model.trace(**inputs):  # fmt: skip
        three = model.lm_head.output.save()
    assert (one != 0).any()
    assert (two == 0).all()
    assert not logits.requires_grad
    assert not three.requires_grad


# fmt: off
def generated(model, inputs):
    """`generate`, written in many ways; the last three are what a ``with`` enters, and traced."""
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    neurons = vn.NeuronSet(model.space(), range(200))
    answers = {}
    with vn.Ablation(model, neurons): answers["on the line of a with"] = model.generate(**inputs, **how)  # noqa: E701
    with vn.Ablation(model, neurons):
        answers["on a line of its own"] = model.generate(**inputs, **how)
    with vn.Ablation(model, neurons): answers["over two lines"] = (  # noqa: E701
        model.generate(**inputs, **how))
    with vn.Ablation(model, neurons): (answers["in a list"],) = [model.generate(**inputs, **how) for _ in "x"]  # noqa: E701
    with vn.Ablation(model, neurons): answers["in a call"] = torch.clone(model.generate(**inputs, **how))  # noqa: E701
    with vn.Ablation(model, neurons), torch.no_grad(): answers["of two"] = model.generate(**inputs, **how)  # noqa: E701
    call = lambda: model.generate(**inputs, **how)  # noqa: E731
    with vn.Ablation(model, neurons): answers["in a lambda"] = call()  # noqa: E701
    generate = model.generate
    with vn.Ablation(model, neurons): answers["by another name"] = generate(**inputs, **how)  # noqa: E701
    with vn.Ablation(model, neurons): answers["of nnsight's"] = model.nnsight.generate(**inputs, **how)  # noqa: E701
    with vn.Ablation(model, neurons), model.generate(**inputs, **how) as tracer:
        answers["traced"] = tracer.result.save()
    with vn.Ablation(model, neurons), generate(**inputs, **how) as tracer:
        answers["traced by another name"] = tracer.result.save()
    with (
        vn.Ablation(model, neurons),
        model.generate(
            **inputs,
            **how,
        ) as tracer,
    ):
        answers["traced over several lines"] = tracer.result.save()
    return answers
# fmt: on


def test_generate_generates_wherever_it_is_called_and_is_traced_where_a_with_enters_it(model):
    inputs = model.prepare(some_questions(2))
    neurons = vn.NeuronSet(model.space(), range(200))
    with vn.Ablation(model, neurons):
        expected = model.hf.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    answers = generated(model, inputs)
    assert len(answers) == 12
    for how, answer in answers.items():
        assert isinstance(answer, torch.Tensor), how
        assert torch.equal(answer, expected), how


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="there a with begins in other codes, and columns are always known"
)
def test_without_columns_a_with_is_told_by_the_code_after_the_call_and_its_parts_by_their_names(model, monkeypatch):
    # As in Python 3.10, which keeps lines only.
    monkeypatch.setattr("vlmneurons.model.tracing._position", lambda frame: None)
    inputs = model.prepare(some_questions(1))
    answers = {}
    with torch.no_grad(): answers["one line"] = model.generate(**inputs, max_new_tokens=1)  # noqa: E701  # fmt: skip
    another = model.generate
    with torch.no_grad(), another(**inputs, max_new_tokens=1) as tracer:
        answers["by another name"] = tracer.result.save()
    assert torch.equal(answers["one line"], answers["by another name"])
    with model.generate(**inputs, max_new_tokens=1) as tracer:
        answers["traced"] = tracer.result.save()
    assert torch.equal(answers["one line"], answers["traced"])
    with pytest.raises(SiteError, match=r"torch.no_grad\(\) stands after the trace in one `with`"):
        skipped_no_grad(model, inputs)
    with torch.no_grad(), model.trace(**inputs):
        logits = model.lm_head.output.save()
    assert not logits.requires_grad


def test_runs_that_do_not_obey_standing_edits_refuse_them(model):
    questions = some_questions(4)
    chosen = {"some": vn.Selection({group: vn.NeuronSet(model.space(), [3]) for group in "AB"}, selector="some")}
    with model.edit() as (_, edited):
        edited.language.layers[0].mlp.post[:] = 0
    runs = [
        lambda one: vn.record(one, questions, progress=False),
        lambda one: vn.record(one, questions, progress=False, remote="local"),
        lambda one: vn.knockout(one, questions, chosen, progress=False),
        lambda one: vn.attribute(one, questions, progress=False),
        lambda one: vn.screen(one, questions, chosen, progress=False),
        lambda one: vn.inspect_neuron(one, questions, 3),
    ]
    for run in runs:
        with pytest.raises(
            MismatchError, match=r"has standing edits of model.edit\(…\), which act in traces and nowhere else"
        ):
            run(edited)
    assert vn.record(model, questions, condition="all", progress=False).tokens.sum() > 0  # the original has none


# -- copies, and what is done to a model -------------------------------------------------------------------------------


def own_copy(name="qwen2_5_vl"):
    return vn.VLM(*tiny_model(name))


def test_a_copy_of_a_vlm_is_independent_and_complete():
    model = own_copy()
    inputs = model.prepare(some_questions(1))
    clean = logits_of(model.hf, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.hf.parameters():
            weight.zero_()
    assert torch.equal(logits_of(model.hf, inputs), clean)
    with torch.no_grad(), other.trace(**inputs):
        gate = other.language.layers[0].mlp.gate.save()
    assert (gate == 0).all()
    assert other.sites == model.sites
    with torch.no_grad(), copy.copy(model).trace(**inputs):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, clean)


def test_a_part_of_a_model_is_not_copied_without_it(model):
    experts = own_copy("qwen3_vl_moe").language.layers[0].mlp.experts
    for part in (model.language, model.language.layers[1], model.language.layers[1].mlp, experts, experts[0]):
        assert copy.copy(part) is part
        with pytest.raises(SiteError, match="is a view of its model: copy the model, and take the same"):
            copy.deepcopy(part)
    with pytest.raises(Exception, match=r"pickle|local object"):
        pickle.dumps(model)


@pytest.mark.parametrize("at", ["gate", "post"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_a_copy_made_inside_an_ablation_and_a_recorder_is_of_the_untouched_model(name, at):
    model = own_copy(name)
    inputs = tiny_inputs(name)
    clean = logits_of(model.hf, inputs)
    with vn.Ablation(model, ~vn.NeuronSet.empty(model.space()), at=at), vn.Recorder(model) as recorder:
        bare, whole = copy.deepcopy(model.hf), copy.deepcopy(model)
        ablated = logits_of(model.hf, inputs)
        assert torch.equal(logits_of(bare, inputs), clean)
        assert torch.equal(logits_of(whole.hf, inputs), clean)
    assert not torch.equal(ablated, clean)
    assert int(recorder.statistics.items.sum()) == 1  # the copies' runs were none of its business
    assert torch.equal(logits_of(bare, inputs), clean)


def test_a_model_is_not_saved_while_it_is_ablated(tmp_path):
    model = own_copy()
    neurons = vn.NeuronSet(model.space(), [1])
    with vn.Ablation(model, neurons), vn.Ablation(model, neurons):
        for save in (model.save_pretrained, model.hf.save_pretrained):
            with pytest.raises(AblationError, match="being ablated, and an ablation is no part of its weights"):
                save(tmp_path / "ablated")
        copy.deepcopy(model.hf).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "ablated").exists()
    model.save_pretrained(tmp_path / "clean")
    assert (tmp_path / "clean" / "config.json").exists()
    assert (tmp_path / "copy" / "config.json").exists()


def test_what_changes_a_module_gives_the_vlm_back():
    model = own_copy()
    for change in ("eval", "float", "double", "half", "bfloat16", "cpu"):
        assert getattr(model, change)() is model, change
    assert model.to(torch.float32) is model
    assert model.train().hf.training
    assert model.eval().requires_grad_(False) is model
    assert not any(weight.requires_grad for weight in model.hf.parameters())
    with pytest.raises(ArchitectureError, match="a VLM wraps one model for good"):
        model.hf = tiny_model("qwen2_5_vl")[0]


def test_modules_of_ones_own_are_attached_to_the_model_a_layer_or_an_mlp():
    model = own_copy()
    inputs = model.prepare(some_questions(1))
    for owner in (model, model.language.layers[1], model.language.layers[1].mlp):
        owner.adapter = nn.Linear(64, 64, bias=False)
        nn.init.eye_(owner.adapter.weight)
        with torch.no_grad(), model.trace(**inputs):
            gate = model.language.layers[1].mlp.gate
            model.language.layers[1].mlp.gate = owner.adapter(gate, hook=True) * 0
            post = model.language.layers[1].mlp.post.save()
        assert (post == 0).all()
    assert sum(name.endswith("adapter") for name, _ in model.hf.named_modules()) == 3


def test_names_and_paths_lead_to_parts_and_values(model):
    inputs = model.prepare(some_questions(1))
    assert model.get("language.layers.1.mlp") is model.language.layers[1].mlp
    assert model["lm_head"].path == model.lm_head.path
    assert [child.path for child in model] == [child.path for child in model.nnsight]
    with torch.no_grad(), model.trace(**inputs):
        one = model.get("language.layers.1.mlp.gate").save()
        two = model.get("lm_head.output").save()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, two)
    assert one.shape[-1] == 64


def test_modules_can_be_given_further_names():
    hf, processor = tiny_model("qwen2_5_vl")
    model = vn.VLM(hf, processor, rename={"model.language_model.layers": "blocks"})
    with torch.no_grad(), model.trace(**model.prepare(some_questions(1))):
        one = model.blocks[1].mlp.act_fn.output.clone().save()
        two = model.language.layers[1].mlp.up.save()
    assert one.shape == two.shape


def test_the_module_of_all_experts_is_at_hand_by_its_name():
    model = own_copy("qwen3_vl_moe")
    inputs, kept = tiny_inputs("qwen3_vl_moe"), []
    layer = model.hf.model.language_model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        model.hf(**inputs)
    handle.remove()
    with torch.no_grad(), model.trace(**inputs):
        found = model.language.layers[0].mlp.output
        found = (found[0] if isinstance(found, tuple) else found).save()
    assert torch.equal(found, kept[0][0] if isinstance(kept[0], tuple) else kept[0])
    assert model.language.layers[0].mlp.experts[1].path.endswith("mlp.experts")
    with torch.no_grad(), pytest.raises(SiteError, match="experts kept in one tensor have no module"):  # noqa: SIM117
        with model.trace(**inputs):
            model.language.layers[0].mlp.experts[1].gate.save()
    with pytest.raises(SiteError, match=r"has no 'mlp.gate'; it has mlp.experts.0"):
        model.language.layers[0].mlp.gate  # noqa: B018


@pytest.mark.parametrize("name", tiny_names(processor=False))
def test_a_loop_over_the_sites_of_any_model_works_in_a_trace(name):
    hf, processor = tiny_model(name)
    model = vn.VLM(hf, processor, template=tiny_template(name))
    sites = [site for site in model.sites if model.mlp_of(site).expert is None and not model.mlp_of(site).routed]
    sites = [site for site in sites if site.tower != "projector"]  # some run between the layers of a tower
    with torch.no_grad(), model.trace(**tiny_inputs(name)):
        widths = [].save()
        for site in sites:
            widths.append(model.site(site).shape[-1])
    assert widths == [model.mlp_of(site).width for site in sites]
    assert len(widths) > 5


# -- a gate that no module computes ------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = like.gate_proj, like.up_proj, like.down_proj

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(Functional):
    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up)


class Fused(nn.Module):
    def __init__(self, like):
        super().__init__()
        width, hidden = like.gate_proj.weight.shape
        self.gate_up_proj, self.down_proj = nn.Linear(hidden, 2 * width, bias=False), like.down_proj
        with torch.no_grad():
            self.gate_up_proj.weight.copy_(torch.cat([like.gate_proj.weight, like.up_proj.weight]))

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@pytest.fixture(params=[Functional, UpFirst, Fused], scope="module")
def functional(request):
    hf, processor = tiny_model("llava_next_mistral")
    for layer in hf.model.language_model.layers:
        layer.mlp = request.param(layer.mlp)
    return vn.VLM(hf, processor)


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
@pytest.mark.parametrize("how", ["in place", "a slice", "assigned", "augmented"])
def test_a_gate_that_is_a_function_is_written_as_an_ablation_writes_it(functional, how, mode):
    inputs = functional.prepare(some_questions(2))
    neurons = vn.NeuronSet.from_pairs(functional.space(), [(1, number) for number in range(64)])
    around = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with vn.Ablation(functional, neurons, at="gate"), around():
        expected = functional.hf(**inputs).logits
    with (
        around(),
        vn.Recorder(functional, tokens=lambda table: table.attention) as recorder,
        functional.trace(**inputs),
    ):
        mlp = functional.language.layers[1].mlp
        if how == "in place":
            mlp.gate[:] = 0
        elif how == "a slice":
            mlp.gate[..., :32] = 0
            mlp.gate[..., 32:] *= 0
        elif how == "assigned":
            mlp.gate = mlp.gate * 0
        else:
            mlp.gate *= 0
        again = mlp.gate.save()
        post = mlp.post.save()
        logits = functional.lm_head.output.save()
    assert (again == 0).all()
    assert (post == 0).all()
    assert torch.equal(logits, expected)
    fired = recorder.statistics.positive[0]
    assert (fired[64:128] == 0).all()  # what the model used, and not what it would have
    assert (fired[:64] > 0).any()


def test_what_is_written_to_pre_after_the_gate_was_read_is_what_the_model_computes_with(functional):
    inputs = functional.prepare(some_questions(1))
    with functional.trace(**inputs):
        gate = functional.language.layers[1].mlp.gate.save()
        functional.language.layers[1].mlp.pre[:] = 0
        post = functional.language.layers[1].mlp.post.save()
    assert (post == 0).all()
    assert (gate != 0).any()


def test_a_gate_that_is_a_function_is_written_in_every_step_and_left_alone_afterwards(functional):
    inputs = functional.prepare(some_questions(1))
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    neurons = vn.NeuronSet.from_pairs(functional.space(), [(1, number) for number in range(64)])
    clean = logits_of(functional.hf, inputs)
    with vn.Ablation(functional, neurons):
        expected = functional.generate(**inputs, **how)
    with functional.generate(**inputs, **how) as tracer:
        for _ in tracer.iter[:3]:
            functional.language.layers[1].mlp.gate[:] = 0
        ids = tracer.result.save()
    assert torch.equal(ids, expected)
    assert torch.equal(logits_of(functional.hf, inputs), clean)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_names_of_a_vlm_work_where_this_library_is_not(tiny_folder, tmp_path):
    model = vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"))
    # A session names its inputs: plain ones, as what `prepare` gives is of this library.
    inputs, host = dict(model.prepare(some_questions(2))), Host(tiny_folder("qwen2_5_vl"), tmp_path)
    mlp = model.language.layers[1].mlp
    try:
        with model.trace(**inputs, backend=host):
            mlp.post[..., 3:9] = 0
            model.language.layers[2].mlp.gate = model.site("language.layers.2.mlp.gate") * 2
            ups = [].save()
            for layer in model.language.layers[3:]:
                ups.append(layer.mlp.up)
            depth = nnsight.save(len(model.vision.layers))
            logits = model.lm_head.output.save()
        with torch.no_grad(), model.trace(**inputs):
            mlp.post[..., 3:9] = 0
            model.language.layers[2].mlp.gate = model.site("language.layers.2.mlp.gate") * 2
            up = model.language.layers[3].mlp.up.save()
            here = model.lm_head.output.save()
        with model.session(backend=host):
            with model.trace(**inputs):
                gate = model.language.layers[0].mlp.gate
            with model.trace(**inputs):
                model.set_site("language.layers.0.mlp.gate", gate * 0)
                post = model.language.layers[0].mlp.post.save()
        with model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, backend=host) as tracer:
            for _ in tracer.iter[:2]:
                model.language.layers[1].mlp.post[:] = 0
            ids = tracer.result.save()
    finally:
        host.close()
    assert depth == 3
    assert torch.equal(logits, here)
    assert torch.equal(ups[0], up)
    assert (post == 0).all()
    neurons = vn.NeuronSet.from_pairs(model.space(), [(1, number) for number in range(64)])
    with vn.Ablation(model, neurons):
        expected = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert torch.equal(ids, expected)


def test_a_gate_that_is_a_function_is_refused_where_this_library_is_not(functional, tmp_path):
    functional.hf.save_pretrained(tmp_path)
    part = functional.language.layers[1].mlp.__reduce_ex__(4)
    far = part[0](*part[1])
    with pytest.raises(
        ValueError, match=r"language.layers.1.mlp.gate has no module of its own that a remote trace could"
    ):
        far.gate  # noqa: B018
