"""What nnsight's documentation offers, on named sites: each feature alike to nnsight's own raw path, or refused early.

Every function of `FEATURES` is run twice on models with equal weights: by raw paths on a model that nnsight alone has
wrapped, and by named sites on a `VLM`. What they return must be equal, errors included.
"""

import warnings
from typing import Any

import nnsight
import pytest
import torch
import torch.nn.functional as F
from nnsight import TransformersModel
from torch import nn

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.testing import tiny_model

KINDS = ("pre", "gate", "up", "post")
STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


class Access:
    """A model, and its neurons by raw paths or by names."""

    def __init__(self, model: Any, named: bool, inputs: Any, text: Any) -> None:
        self.m, self.named, self.x, self.text = model, named, dict(inputs), dict(text)
        self.last = int(inputs.tokens.last[0])

    def layer(self, number: int) -> Any:
        return self.m.language.layers[number] if self.named else self.m.model.language_model.layers[number]

    def mlp(self, number: int) -> Any:
        return self.layer(number).mlp

    def get(self, number: int, kind: str) -> Any:
        mlp = self.mlp(number)
        if self.named:
            return getattr(mlp, kind)
        if kind in ("pre", "gate"):
            return mlp.act_fn.input if kind == "pre" else mlp.act_fn.output
        return mlp.up_proj.output if kind == "up" else mlp.down_proj.input

    def put(self, number: int, kind: str, value: Any) -> None:
        mlp = self.mlp(number)
        if self.named:
            setattr(mlp, kind, value)
        elif kind == "pre":
            mlp.act_fn.input = value
        elif kind == "gate":
            mlp.act_fn.output = value
        elif kind == "up":
            mlp.up_proj.output = value
        else:
            mlp.down_proj.input = value

    def vision_post(self) -> Any:
        if self.named:
            return self.m.vision.layers[1].mlp.post
        inner = self.m.model
        if hasattr(inner._module, "visual"):
            return inner.visual.blocks[1].mlp.down_proj.input
        return inner.vision_tower.encoder.layers[1].mlp.fc2.input


# -- the features ------------------------------------------------------------------------------------------------------


def read_each_kind(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = [].save()
        for kind in KINDS:
            found.append(a.get(1, kind))
    return found


def read_every_layer_in_a_loop(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = nnsight.save([])
        for number in range(4):
            found.append(a.get(number, "gate").abs().amax((0, 1)))
    return found


def read_in_a_comprehension(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = nnsight.save([a.get(number, "post").sum() for number in range(4)])
    return found


def read_in_a_helper(a):
    def highest(values):
        return values.topk(3, -1).indices

    with torch.no_grad(), a.m.trace(**a.x):
        found = highest(a.get(2, "gate")).save()
    return found


def read_a_slice(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = a.get(2, "post")[:, -1, 3:9].save()
    return found


def read_twice(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = (a.get(1, "gate") - a.get(1, "gate")).save()
    return found


def read_into_a_dict(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = {}.save()
        found["gate"] = a.get(0, "gate")
        found["up"] = a.get(0, "up")
    return found


def read_a_vision_site(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = a.vision_post().save()
    return found


def read_shape_and_dtype(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = nnsight.save((tuple(a.get(0, "gate").shape), str(a.get(0, "post").dtype)))
    return found


def read_under_inference_mode(a):
    with torch.inference_mode(), a.m.trace(**a.x):
        found = a.get(3, "gate").clone().save()
    return found


def read_from_arguments_given_one_by_one(a):
    inputs = dict(a.text)
    ids = inputs.pop("input_ids")
    with torch.no_grad(), a.m.trace(ids, **inputs):
        found = a.get(0, "gate").save()
    return found


def read_a_text_given_as_a_text(a):
    with torch.no_grad(), a.m.trace("What is this?"):
        found = a.get(0, "gate").save()
    return found


def branch_on_a_value(a):
    with torch.no_grad(), a.m.trace(**a.x):
        if a.get(0, "gate").sum() > -1e9:
            a.get(1, "post")[:] = 0
        logits = a.m.lm_head.output.save()
    return logits


def _edited(kind):
    def edit_in_place(a):
        with torch.no_grad(), a.m.trace(**a.x):
            a.get(1, kind)[..., 3:9] = 0.5
            logits = a.m.lm_head.output.save()
        return logits

    def assign(a):
        with torch.no_grad(), a.m.trace(**a.x):
            a.put(1, kind, a.get(1, kind) * 1.5)
            logits = a.m.lm_head.output.save()
        return logits

    def read_after_assigning(a):
        with torch.no_grad(), a.m.trace(**a.x):
            a.put(1, kind, a.get(1, kind) + 1)
            found = a.get(1, kind).save()
        return found

    def gradient(a):
        with a.m.trace(**a.x):
            values = a.get(1, kind)
            score = a.m.lm_head.output[0, a.last, 7]
            with score.backward():
                found = values.grad.save()
        return found

    def edit_a_gradient(a):
        with a.m.trace(**a.x):
            early, values = a.get(0, kind), a.get(1, kind)
            score = a.m.lm_head.output[0, a.last, 7]
            with score.backward():
                values.grad = values.grad * 2
                found = early.grad.save()
        return found

    def assign_in_each_step(a):
        with a.m.generate(**a.x, **STEPS) as tracer:
            for _ in tracer.iter[:3]:
                a.put(1, kind, a.get(1, kind) * 0)
            found = tracer.result.save()
        return found

    made = (edit_in_place, assign, read_after_assigning, gradient, edit_a_gradient, assign_in_each_step)
    for function in made:
        function.__name__ = f"{function.__name__}_{kind}"
    return made


def edit_some_tokens(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(1, "gate")[0, 2:5] = 0
        logits = a.m.lm_head.output.save()
    return logits


def edit_by_a_list_of_neurons(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(1, "post")[..., [1, 5, 60]] = -1
        logits = a.m.lm_head.output.save()
    return logits


def edit_by_a_mask(a):
    with torch.no_grad(), a.m.trace(**a.x):
        values = a.get(1, "gate")
        values[values < 0] = 0
        logits = a.m.lm_head.output.save()
    return logits


def edit_by_augmented_assignment(a):
    with torch.no_grad(), a.m.trace(**a.x):
        values = a.get(1, "up")
        values *= 2
        values += 1
        logits = a.m.lm_head.output.save()
    return logits


def edit_by_methods_in_place(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(1, "gate").clamp_(min=0).mul_(3)
        logits = a.m.lm_head.output.save()
    return logits


def edit_and_keep_the_value_from_before(a):
    with torch.no_grad(), a.m.trace(**a.x):
        before = a.get(1, "gate").clone().save()
        a.get(1, "gate")[:] = 0
        after = a.get(1, "post").save()
    return [before, after]


def edit_several_layers(a):
    with torch.no_grad(), a.m.trace(**a.x):
        for number in range(4):
            a.get(number, "post")[..., number] = 9
        logits = a.m.lm_head.output.save()
    return logits


def edit_a_vision_site(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.vision_post()[:] = 0
        logits = a.m.lm_head.output.save()
    return logits


def patch_from_another_trace(a):
    with torch.no_grad(), a.m.trace(**a.x):
        other = a.get(2, "gate").flip(0).save()
    with torch.no_grad(), a.m.trace(**a.x):
        a.put(2, "gate", other)
        logits = a.m.lm_head.output.save()
    return logits


def write_a_wrong_shape(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(1, "post")[:] = torch.zeros(5)
    return None


def read_out_of_order(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(2, "post").sum()
        a.get(1, "gate").sum()
    return None


def read_after_the_model(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.m.output  # noqa: B018
        a.get(1, "gate").sum()
    return None


def read_outside_of_a_trace(a):
    return a.get(1, "gate")


def raise_within(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(1, "gate").sum()
        raise KeyError("mine")
    return None


def forget_to_save(a):
    with torch.no_grad(), a.m.trace(**a.x):
        unsaved_value = a.get(1, "gate")
    return unsaved_value


def save_a_module_value_beside(a):
    with torch.no_grad(), a.m.trace(**a.x):
        gate = a.get(1, "gate").save()
        down = a.mlp(1).down_proj.output.save()
        out = a.mlp(1).output.save()
    return [gate, out, down]


def input_and_inputs_of_an_mlp(a):
    with torch.no_grad(), a.m.trace(**a.x):
        first = a.mlp(1).input.save()
        args = nnsight.save(list(a.mlp(2).inputs[0]))
    return [first, args]


def output_of_a_layer(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = a.layer(1).output
        found = (found[0] if isinstance(found, tuple) else found).save()
    return found


def assign_the_output_of_an_mlp(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.mlp(1).output = a.mlp(1).output * 0
        logits = a.m.lm_head.output.save()
    return logits


def skip_an_mlp(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.mlp(1).skip(a.mlp(1).input * 0)
        logits = a.m.lm_head.output.save()
    return logits


def skip_the_activation(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.mlp(1).act_fn.skip(a.mlp(1).act_fn.input * 0 + 1)
        found = a.get(1, "gate").save()
        logits = a.m.lm_head.output.save()
    return [found, logits]


def source_of_an_mlp(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = a.mlp(1).source.self_act_fn_0.output.save()
        post = a.get(1, "post").save()
    return [found, post]


def stop_early(a):
    with torch.no_grad(), a.m.trace(**a.x) as tracer:
        found = a.get(1, "gate").save()
        tracer.stop()
    return found


def cache_modules(a):
    with torch.no_grad(), a.m.trace(**a.x) as tracer:
        cache = tracer.cache(modules=[a.mlp(1), a.mlp(2).act_fn], include_inputs=True)
        a.get(1, "gate")[:] = 0
    paths = (a.mlp(1).path, a.mlp(2).act_fn.path)
    return [(path, cache[path].output, cache[path].input) for path in paths]


def cache_everything(a):
    with torch.no_grad(), a.m.trace(**a.x) as tracer:
        cache = tracer.cache()
        a.get(2, "post")[:] = 0
    return [cache[a.m.lm_head.path].output, cache[a.mlp(3).path].output]


def result_of_a_trace(a):
    with torch.no_grad(), a.m.trace(**a.x) as tracer:
        a.get(1, "post")[:] = 0
        found = tracer.result.logits.save()
    return found


def trace_without_a_block(a):
    with torch.no_grad():
        return a.m.trace(**a.x, trace=False).logits


def call_the_model(a):
    with torch.no_grad():
        return a.m(**a.x).logits


def apply_a_module_to_a_value(a):
    with torch.no_grad(), a.m.trace(**a.x):
        early = a.m.lm_head(a.mlp(1).input).save()
        logits = a.m.lm_head.output.save()
    return [early, logits]


def apply_an_mlp_to_a_value(a):
    with torch.no_grad(), a.m.trace(**a.x):
        again = a.mlp(1)(a.mlp(1).input * 2).save()
        gate = a.get(1, "gate").save()
    return [again, gate]


def generate_plainly(a):
    return a.m.generate(**a.x, **STEPS)


def generate_in_a_trace(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        first = a.get(1, "gate").save()
        found = tracer.result.save()
    return [first, found]


def iterate_over_all_steps(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        found = [].save()
        for _ in tracer.iter[:3]:
            found.append(a.get(1, "gate"))
            found.append(a.get(1, "post"))
    return found


def iterate_over_some_steps(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        found = [].save()
        for _ in tracer.iter[1:3]:
            found.append(a.get(2, "post"))
    return found


def iterate_over_one_step(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        for _ in tracer.iter[1]:
            a.get(1, "gate")[:] = 0
        found = tracer.result.save()
    return found


def iterate_over_listed_steps(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        found = [].save()
        for _ in tracer.iter[[0, 2]]:
            found.append(a.get(1, "up"))
    return found


def iterate_over_everything(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        found = [].save()
        for _ in tracer.all():
            found.append(a.get(1, "gate").sum())
    return found


def edit_by_the_number_of_a_step(a):
    with a.m.generate(**a.x, **STEPS) as tracer:
        for step in tracer.iter[:3]:
            if step == 1:
                a.get(1, "post")[:] = 0
        found = tracer.result.save()
    return found


def two_invokes(a):
    with torch.no_grad(), a.m.trace() as tracer:
        with tracer.invoke("What is this?"):
            one = a.get(0, "gate").save()
            a.get(1, "post")[:] = 0
        with tracer.invoke("And what is this long long text?"):
            two = a.get(1, "post").save()
    return [one, two]


def assign_in_one_of_two_invokes(a):
    with torch.no_grad(), a.m.trace() as tracer:
        with tracer.invoke("What is this?"):
            a.put(1, "gate", a.get(1, "gate") * 0)
        with tracer.invoke("And what is this long long text?"):
            pass
        with tracer.invoke():
            logits = a.m.lm_head.output.save()
    return logits


def an_invoke_of_the_whole_batch(a):
    with torch.no_grad(), a.m.trace() as tracer:
        with tracer.invoke("What is this?"):
            a.get(1, "gate")[:] = 0
        with tracer.invoke():
            both = a.get(1, "post").save()
    return both


def a_barrier_between_invokes(a):
    with torch.no_grad(), a.m.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke("What is this?"):
            taken = a.get(1, "gate")
            barrier()
        with tracer.invoke("What was that?"):
            barrier()
            a.put(1, "gate", taken)
            found = a.get(1, "post").save()
    return found


def several_invokes_with_pictures(a):
    with torch.no_grad(), a.m.trace() as tracer:
        with tracer.invoke(**a.x):
            a.get(0, "gate").sum()
        with tracer.invoke(**a.x):
            a.get(0, "gate").sum()
    return None


def a_trace_without_input(a):
    with torch.no_grad(), a.m.trace():
        a.get(0, "gate").sum()
    return None


def a_session_that_passes_a_value_on(a):
    with torch.no_grad(), a.m.session():
        with a.m.trace(**a.x):
            gate = a.get(1, "gate")
        with a.m.trace(**a.x):
            a.put(1, "gate", gate * 0.5)
            logits = a.m.lm_head.output.save()
    return logits


def a_loop_of_traces_in_a_session(a):
    with torch.no_grad(), a.m.session():
        found = [].save()
        for number in range(3):
            with a.m.trace(**a.x):
                a.get(number, "post")[:] = 0
                found.append(a.m.lm_head.output.sum())
    return found


def a_trace_in_a_trace(a):
    with torch.no_grad(), a.m.trace(**a.x):
        a.get(0, "gate").sum()
        with a.m.trace(**a.x):
            a.get(0, "gate").sum()
    return None


def an_edited_copy(a):
    with a.m.edit() as (_, edited):
        a.get(1, "post")[:] = 0
    with torch.no_grad(), edited.trace(**a.x):
        changed = edited.lm_head.output.save()
    with torch.no_grad(), a.m.trace(**a.x):
        same = a.m.lm_head.output.save()
    return [changed, same]


def an_edit_in_place(a):
    with a.m.edit(inplace=True):
        a.get(1, "gate")[:] = 0
    try:
        with torch.no_grad(), a.m.trace(**a.x):
            changed = a.get(1, "post").save()
        with torch.no_grad():
            plain = a.m.trace(**a.x, trace=False).logits
    finally:
        a.m.clear_edits()
    with torch.no_grad(), a.m.trace(**a.x):
        same = a.get(1, "post").save()
    return [changed, plain, same]


def an_edit_of_every_step(a):
    with a.m.edit(inplace=True) as tracer:
        for _ in tracer.iter[:]:
            a.get(1, "post")[:] = 0
    try:
        return a.m.generate(**a.x, **STEPS)
    finally:
        a.m.clear_edits()


def scan_shapes(a):
    with a.m.scan(**a.text):
        found = nnsight.save([tuple(a.get(1, kind).shape) for kind in KINDS])
    return found


def a_trace_sent_away(a):
    # By the model's own modules: raw paths and names travel.
    with torch.no_grad(), a.m.trace(**a.x, remote="local"):
        a.get(1, "post")[..., 3] = 0
        found = a.get(2, "gate").save()
    return found


def a_module_of_ones_own(a):
    a.m.adapter = nn.Linear(64, 64, bias=False)
    nn.init.eye_(a.m.adapter.weight)
    try:
        with torch.no_grad(), a.m.trace(**a.x):
            a.put(1, "gate", a.m.adapter(a.get(1, "gate")) * 0)
            logits = a.m.lm_head.output.save()
        return logits
    finally:
        del (a.m.hf if a.named else a.m._module).adapter


def a_path_at_run_time(a):
    with torch.no_grad(), a.m.trace(**a.x):
        found = a.m.get("lm_head.output").save()
    return [found, a.m.get("model.language_model.layers.0").path]


def the_children(a):
    return [child.path for child in a.m], [name for name, _ in a.m.named_modules()][:3], a.m["lm_head"].path


def _is_feature(name: str, value: Any) -> bool:
    code = getattr(value, "__code__", None)
    return code is not None and not name.startswith("_") and code.co_varnames[:1] == ("a",)


FEATURES = [one for kind in KINDS for one in _edited(kind)]
FEATURES += [value for name, value in list(globals().items()) if _is_feature(name, value)]


# -- alike -------------------------------------------------------------------------------------------------------------


class FunctionalMLP(nn.Module):
    """The same MLP with an activation that is a function, as Lfm2's: `gate` then has no module of its own."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = like.gate_proj, like.up_proj, like.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture(scope="module", params=["modules", "functions"])
def pair(request: pytest.FixtureRequest) -> tuple[Access, Access]:
    """The same model twice: as nnsight alone has it, and as a VLM, whose activations are modules or functions."""
    name = "qwen2_5_vl" if request.param == "modules" else "llava_next_mistral"
    (hf, processor), (plain_hf, plain_processor) = tiny_model(name), tiny_model(name)
    if request.param == "functions":
        for layer in hf.model.language_model.layers:
            layer.mlp = FunctionalMLP(layer.mlp)
    named = vn.VLM(hf, processor)
    plain = TransformersModel(plain_hf.eval(), processor=plain_processor, task="image-text-to-text")
    inputs = named.prepare(some_questions(2))
    text = named.prepare(vn.Question(None, "What?", ("Tea", "Rice"), 0, "A"))
    return Access(plain, False, inputs, text), Access(named, True, inputs, text)


def outcome(feature: Any, access: Access) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was never reached")  # how a loop over all steps ends
            return ("gives", feature(access))
    except Exception as error:
        return ("raises", type(error).__name__)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
def test_a_named_site_is_served_as_nnsight_serves_its_own_path(pair, feature):
    if feature in OF_THE_ACTIVATION and not hasattr(pair[1].mlp(1), "act_fn"):
        pytest.skip("there is no such module")
    plain, named = (outcome(feature, access) for access in pair)
    assert same(plain, named), (plain, named)
    assert plain[0] == "gives" or feature in RAISING
    for access in pair:
        (access.m.hf if access.named else access.m._module).zero_grad()


OF_THE_ACTIVATION = {skip_the_activation, source_of_an_mlp, cache_modules}

RAISING = {
    write_a_wrong_shape, read_out_of_order, read_after_the_model, read_outside_of_a_trace, raise_within, forget_to_save,
    several_invokes_with_pictures, a_trace_without_input, a_trace_in_a_trace,
}  # fmt: skip
"""What nnsight itself refuses: by the same error."""


def test_the_table_has_at_least_forty_features():
    assert len({feature.__name__ for feature in FEATURES}) == len(FEATURES) >= 40
