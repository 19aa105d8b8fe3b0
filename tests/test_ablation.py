"""Ablation: equal to hand-written hooks in every way of running the model, and gone without a trace afterwards."""

import itertools
import threading

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import vlmneurons as vn
from helpers import language_blocks, logits_of, plain_edit, plain_hooks, some_questions
from vlmneurons.errors import AblationError, MismatchError, SelectionError
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.testing import tiny_inputs, tiny_model, tiny_template

CHOSEN = {0: [3, 40], 2: [0, 1, 2, 63], 3: [17]}


def neurons_of(model, chosen=None) -> vn.NeuronSet:
    return vn.NeuronSet.from_indices(model.space(), CHOSEN if chosen is None else chosen)


def other_neurons(model) -> vn.NeuronSet:
    return neurons_of(model, {1: [5, 6], 2: [2, 30]})


def by_hand(mode: str, columns: list[int], values: torch.Tensor | None, factor: float | None):
    """What happens to one site's values, one neuron at a time."""

    def changed(old, value):
        if mode == "zero":
            return torch.zeros_like(old)
        if mode == "scale":
            return old * factor
        return old + factor * value if mode == "add" else value.expand_as(old)

    def edit(x):
        for place, column in enumerate(columns):
            x[..., column] = changed(x[..., column].clone(), None if values is None else values[place])
        return x

    return edit


MODES = [
    {"mode": "zero", "at": "post"},
    {"mode": "zero", "at": "gate"},
    {"mode": "scale", "factor": 1.5, "at": "post"},
    {"mode": "scale", "factor": -1.0, "at": "gate"},
    *(
        {"mode": mode, "at": at, "values": True, **more}
        for mode, more in (("mean", {}), ("replace", {}), ("add", {"factor": 0.7}))
        for at in ("gate", "post")
    ),
]


@pytest.mark.parametrize("how", MODES, ids=lambda how: f"{how['mode']}-{how['at']}")
def test_every_mode_equals_a_hand_written_hook_exactly(paper_model, bare_model, how):
    how = dict(how)
    neurons = neurons_of(paper_model)
    numbers = torch.linspace(-2, 2, len(neurons)) if how.pop("values", None) else None
    edits, at = {}, 0
    for layer, columns in CHOSEN.items():
        part = None if numbers is None else numbers[at : at + len(columns)]
        edits[layer] = by_hand(how["mode"], columns, part, how.get("factor"))
        at += len(columns)
    inputs = paper_model.prepare(some_questions(3))
    with plain_edit(bare_model, how["at"], edits):
        expected = logits_of(bare_model, inputs)
    with vn.Ablation(paper_model, neurons, **how, values=numbers):
        ablated = logits_of(paper_model.hf, inputs)
    clean = logits_of(bare_model, inputs)
    assert torch.equal(ablated, expected)
    assert not torch.equal(ablated, clean)
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)


def test_values_may_be_a_number_one_per_neuron_or_one_per_neuron_of_the_space(model):
    neurons = neurons_of(model)
    inputs = model.prepare(some_questions(1))
    whole = torch.full((len(model.space()),), 9.0)
    whole[neurons.indices] = 0.5
    results = []
    for values in (0.5, torch.full((len(neurons),), 0.5), whole, torch.tensor(0.5, dtype=torch.float16)):
        with vn.Ablation(model, neurons, "replace", values=values, at="gate"):
            results.append(logits_of(model.hf, inputs))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_mean_may_be_taken_from_statistics(model):
    questions = some_questions(4)
    stats = vn.record(model, questions, condition="all", magnitudes=True, progress=False)
    neurons = neurons_of(model)
    inputs = model.prepare(questions)
    mean = (stats.total.sum(0) / stats.tokens.sum())[neurons.indices]
    with vn.Ablation(model, neurons, "mean", values=mean, at="gate"):
        expected = logits_of(model.hf, inputs)
    with vn.Ablation(model, neurons, "mean", values=stats, at="gate"):
        assert torch.equal(logits_of(model.hf, inputs), expected)
    with pytest.raises(MismatchError, match=r"the means are of .*gate.*, the ablation acts at post"):
        vn.Ablation(model, neurons, "mean", values=stats, at="post")
    counts = ActivationStatistics.from_counts(model.space(), ["A"], torch.zeros(1, 256, dtype=torch.int64), [1])
    with pytest.raises(SelectionError, match="hold no sums of activations"):
        vn.Ablation(model, neurons, "mean", values=counts, at="gate")
    with pytest.raises(
        AblationError, match="mode 'replace' takes a number or a tensor; statistics are for mode 'mean'"
    ):
        vn.Ablation(model, neurons, "replace", values=stats, at="gate")


@pytest.mark.parametrize("at", ["gate", "post"])
@pytest.mark.parametrize(("mode", "more"), [("zero", {}), ("scale", {"factor": 2.0}), ("replace", {"values": 0.3})])
def test_each_row_of_a_batch_can_have_neurons_of_its_own(paper_model, bare_model, at, mode, more):
    rows = [neurons_of(paper_model), other_neurons(paper_model), vn.NeuronSet.empty(paper_model.space())]
    edits = {}
    for layer in range(4):

        def edit(x, layer=layer):
            for row, own in enumerate(rows):
                columns = own.by_layer().get(layer, torch.zeros(0)).tolist()
                values = torch.full((len(columns),), more.get("values", 0.0))
                part = by_hand(mode, columns, values, more.get("factor"))(x[row].clone())
                x[row] = part
            return x

        edits[layer] = edit
    inputs = paper_model.prepare(some_questions(3))
    with plain_edit(bare_model, at, edits):
        expected = logits_of(bare_model, inputs)
    with vn.Ablation(paper_model, rows, mode, at=at, **more):
        ablated = logits_of(paper_model.hf, inputs)
    assert torch.equal(ablated, expected)
    assert torch.equal(ablated[2], logits_of(bare_model, inputs)[2])


def test_as_many_sets_are_needed_as_the_batch_has_rows(model):
    inputs = model.prepare(some_questions(3))
    with (
        vn.Ablation(model, [neurons_of(model)] * 2),
        pytest.raises(
            AblationError, match=r"2 sets of neurons were given, one for each row, but language.layers.0.mlp"
        ),
    ):
        logits_of(model.hf, inputs)
    vision = vn.NeuronSet(model.space("vision"), [0])
    with (
        vn.Ablation(model, [vision] * 3),
        pytest.raises(AblationError, match="the rows of a vision tower are patches, not questions"),
    ):
        logits_of(model.hf, inputs)
    assert torch.isfinite(logits_of(model.hf, inputs)).all()


def test_vision_neurons_are_ablated(paper_model):
    inputs = paper_model.prepare(some_questions(2))
    neurons = vn.NeuronSet(paper_model.space("vision"), [0, 50, 100])
    with vn.Ablation(paper_model, neurons), plain_hooks(paper_model.hf) as values:
        logits = logits_of(paper_model.hf, inputs)
    assert (values["vision.layers.1.mlp.post"][0][..., 2] == 0).all()
    assert not torch.equal(logits, logits_of(paper_model.hf, inputs))


# -- every way of running the model ------------------------------------------------------------------------------------


def test_it_acts_at_every_step_of_generate_however_generate_is_called(paper_model, bare_model):
    neurons = neurons_of(paper_model)
    inputs = paper_model.prepare(some_questions(2))
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    edits = {layer: by_hand("zero", columns, None, None) for layer, columns in CHOSEN.items()}
    with plain_edit(bare_model, "post", edits), plain_hooks(bare_model) as expected:
        ids = bare_model.generate(**inputs, **how)
    expected_posts = expected["language.layers.2.mlp.post"]
    assert len(expected_posts) == 4
    assert all((step[..., [0, 1, 2, 63]] == 0).all() for step in expected_posts)

    with vn.Ablation(paper_model, neurons):
        with plain_hooks(paper_model.hf) as seen:
            assert torch.equal(paper_model.hf.generate(**inputs, **how), ids)
        with paper_model.generate(**inputs, **how) as tracer:
            posts = [].save()
            for _ in tracer.iter[:4]:
                posts.append(paper_model.language.layers[2].mlp.post)
            traced = tracer.result.save()
    assert torch.equal(traced, ids)
    for one, two, three in zip(seen["language.layers.2.mlp.post"], posts, expected_posts, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(two, three)


def test_per_row_neurons_act_at_every_step_of_generate(model):
    rows = [neurons_of(model), other_neurons(model)]
    inputs = model.prepare(some_questions(2))
    with vn.Ablation(model, rows), plain_hooks(model.hf) as seen:
        model.hf.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for step in seen["language.layers.2.mlp.post"]:
        assert (step[0][..., [0, 1, 2, 63]] == 0).all()
        assert (step[1][..., [2, 30]] == 0).all()
        assert (step[1][..., [0, 1, 63]] != 0).all()


def test_a_trace_runs_ablated_and_reads_the_ablated_post_and_its_own_writes_win(paper_model, bare_model):
    neurons = neurons_of(paper_model)
    inputs = paper_model.prepare(some_questions(2))
    edits = {layer: by_hand("zero", columns, None, None) for layer, columns in CHOSEN.items()}
    with plain_edit(bare_model, "post", edits):
        expected = logits_of(bare_model, inputs)
    with vn.Ablation(paper_model, neurons), torch.no_grad(), paper_model.trace(**inputs):
        post = paper_model.language.layers[0].mlp.post.save()
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert (post[..., [3, 40]] == 0).all()
    assert (post[..., 4] != 0).any()
    with vn.Ablation(paper_model, neurons, at="gate"), torch.no_grad(), paper_model.trace(**inputs):
        post = paper_model.language.layers[0].mlp.post.save()
        logits = paper_model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert (post[..., [3, 40]] == 0).all()
    with vn.Ablation(paper_model, neurons), torch.no_grad(), paper_model.trace(**inputs):
        paper_model.language.layers[0].mlp.post[..., 3] = 1.0
        paper_model.language.layers[0].mlp.post[..., 40] = 1.0
        logits = paper_model.lm_head.output.save()
    edits[0] = by_hand("replace", CHOSEN[0], torch.ones(2), None)
    with plain_edit(bare_model, "post", edits):
        assert torch.equal(logits, logits_of(bare_model, inputs))


def test_an_ablation_entered_inside_no_trace_acts_on_gradients_too(model):
    inputs = model.prepare(some_questions(1))
    down = language_blocks(model.hf)[0].mlp.down_proj
    with vn.Ablation(model, vn.NeuronSet(model.space(), [7])):
        model.hf(**inputs).logits.sum().backward()
    assert (down.weight.grad[:, 7] == 0).all()
    assert (down.weight.grad[:, 8] != 0).any()
    model.hf.zero_grad()


# -- nesting and leaving -----------------------------------------------------------------------------------------------


def test_nested_ablations_act_together_and_come_off_in_any_order(paper_model):
    inputs = paper_model.prepare(some_questions(2))
    space = paper_model.space()
    sets = [neurons_of(paper_model), other_neurons(paper_model), vn.NeuronSet(space, [250])]
    clean = logits_of(paper_model.hf, inputs)

    def union(active):
        merged = vn.NeuronSet.empty(space)
        for number in active:
            merged = merged | sets[number]
        with vn.Ablation(paper_model, merged):
            return logits_of(paper_model.hf, inputs)

    for order in itertools.permutations(range(3)):
        ablations = [vn.Ablation(paper_model, one, at=at) for one, at in zip(sets, ("post", "gate", "post"))]
        for ablation in ablations:
            ablation.__enter__()
        left = {0, 1, 2}
        for number in order:
            ablations[number].__exit__(None, None, None)
            left.discard(number)
        assert not left
        assert torch.equal(logits_of(paper_model.hf, inputs), clean)
    first, second = vn.Ablation(paper_model, sets[0]), vn.Ablation(paper_model, sets[1])
    with first:
        with second:
            assert torch.equal(logits_of(paper_model.hf, inputs), union([0, 1]))
        assert torch.equal(logits_of(paper_model.hf, inputs), union([0]))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits_of(paper_model.hf, inputs), union([1]))
    second.__exit__(None, None, None)
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)


def test_ablations_of_the_same_neurons_act_in_the_order_of_entering(model):
    inputs = model.prepare(some_questions(1))
    one = vn.NeuronSet(model.space(), [7])
    with vn.Ablation(model, one, "replace", values=2.0, at="post"), vn.Ablation(model, one, "scale", factor=3.0):
        both = logits_of(model.hf, inputs)
    with vn.Ablation(model, one, "replace", values=6.0, at="post"):
        assert torch.equal(both, logits_of(model.hf, inputs))


class Stop(Exception):
    pass


def test_an_exception_anywhere_inside_nested_ablations_restores_bit_for_bit(paper_model):
    inputs = paper_model.prepare(some_questions(2))
    clean = logits_of(paper_model.hf, inputs)
    outer, inner = (
        vn.Ablation(paper_model, neurons_of(paper_model)),
        vn.Ablation(paper_model, other_neurons(paper_model)),
    )

    with pytest.raises(Stop), outer, inner:
        raise Stop
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)

    def fail(*_):
        raise Stop

    handle = language_blocks(paper_model.hf)[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(Stop), outer, inner:
        logits_of(paper_model.hf, inputs)
    handle.remove()
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)

    with outer, inner, torch.no_grad(), paper_model.trace(**inputs) as tracer:
        post = paper_model.language.layers[1].mlp.post.save()
        tracer.stop()
    assert (post[..., [5, 6]] == 0).all()
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)

    with pytest.raises(Exception, match="size of the tensor"), outer, torch.no_grad(), paper_model.trace(**inputs):
        paper_model.language.layers[1].mlp.post[:] = torch.zeros(5)
    assert torch.equal(logits_of(paper_model.hf, inputs), clean)
    with outer:  # and it can be entered again
        assert not torch.equal(logits_of(paper_model.hf, inputs), clean)


def test_an_empty_set_changes_not_a_bit(paper_model, bare_model):
    inputs = paper_model.prepare(some_questions(3))
    empty = vn.NeuronSet.empty(paper_model.space())
    with vn.Ablation(paper_model, empty), vn.Ablation(paper_model, [empty] * 3):
        assert torch.equal(logits_of(paper_model.hf, inputs), logits_of(bare_model, inputs))


def test_one_ablation_cannot_be_entered_twice_at_once(model):
    ablation = vn.Ablation(model, neurons_of(model))
    with ablation:
        with pytest.raises(AblationError, match="already in force; make another one to apply it twice"):
            ablation.__enter__()
        with vn.Ablation(model, neurons_of(model)):
            pass


# -- threads -----------------------------------------------------------------------------------------------------------


def in_thread(function) -> list:
    """What a function gives, or raises, in a thread called 'other'."""
    result = []

    def run():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    return result


@pytest.mark.parametrize("empty", [False, True])
def test_a_second_thread_can_neither_ablate_nor_run_a_model_that_is_being_ablated(model, load, empty):
    inputs = model.prepare(some_questions(1))
    neurons = vn.NeuronSet.empty(model.space()) if empty else neurons_of(model)

    def enter():
        with vn.Ablation(model, neurons):
            return "entered"

    with vn.Ablation(model, neurons):
        (error,) = in_thread(enter)
        assert isinstance(error, AblationError)
        assert "this model is being ablated in thread 'MainThread'; its ablations would act on the runs" in str(error)
        (error,) = in_thread(lambda: logits_of(model.hf, inputs))
        assert isinstance(error, AblationError)
        assert "being ablated in thread 'MainThread', and ran in another one" in str(error)
        other = load("llava_next_mistral")  # another model is another matter
        assert in_thread(lambda: vn.Ablation(other, neurons_of(other)).__enter__().__exit__()) == [None]
        assert torch.isfinite(logits_of(model.hf, inputs)).all()
    assert in_thread(enter) == ["entered"]
    assert torch.equal(in_thread(lambda: logits_of(model.hf, inputs))[0], logits_of(model.hf, inputs))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mode": "off"}, "mode 'off' does not exist; choose from zero, scale, mean, add, replace"),
        ({"mode": "scale"}, "mode 'scale' needs factor="),
        ({"mode": "zero", "factor": 2.0}, "mode 'zero' takes no factor"),
        ({"mode": "replace", "values": 1.0}, "mode 'replace' differs between the sites: say at='gate' or at='post'"),
        ({"mode": "mean", "at": "post"}, "mode 'mean' needs values="),
        ({"mode": "zero", "values": 1.0}, "mode 'zero' takes no values"),
        ({"at": "pre"}, "at='pre': an ablation acts at 'gate' or at 'post'"),
        ({"mode": "scale", "factor": float("inf")}, "factor inf is not finite"),
        ({"mode": "add", "values": float("nan"), "at": "post"}, "values hold NaN or infinity"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(model, how, message):
    with pytest.raises(AblationError, match=message):
        vn.Ablation(model, neurons_of(model), **how)


def test_neurons_and_values_of_another_model_are_refused(model, unchecked):
    def space(*widths, tower="language"):
        return vn.NeuronSpace.from_widths(tower, "gate", widths)

    cases = [
        (
            vn.NeuronSet(space(64, 64, 64, 64, 64), [1]),
            r"are not of this model: layer 4 is not in tower 'language' \(0–3",
        ),
        (vn.NeuronSet(space(32, 32), [1]), "language.layers.0.mlp.gate has 64 neurons here, 32 in their space"),
        (vn.NeuronSet.empty(space(32)), "has 64 neurons here, 32 in their space"),
        (vn.NeuronSet(space(64, tower="audio"), [1]), "tower 'audio' does not exist"),
        ([vn.NeuronSet(space(64), [1]), vn.NeuronSet(space(64, 64), [1])], "the rows' neurons are of different spaces"),
    ]
    for neurons, message in cases:
        with pytest.raises(MismatchError, match=message):
            vn.Ablation(model, neurons)
    with pytest.raises(MismatchError, match=r"of shape \[7\] or \[256\]; got \[3\]"):
        vn.Ablation(model, neurons_of(model), "replace", values=torch.zeros(3), at="post")
    with pytest.raises(MismatchError, match=r"of shape \[256\]; got \[7\]"):
        vn.Ablation(model, [neurons_of(model)] * 2, "replace", values=torch.zeros(7), at="post")
    for neurons, message in [
        ([], "an empty sequence of neuron sets was given"),
        ("abc", "neurons are a NeuronSet, or a sequence of them; got str"),
        (5, "neurons are a NeuronSet, or a sequence of them; got int"),
        ([neurons_of(model), 5], "neurons are a NeuronSet, or a sequence of them; one is a int"),
        (
            vn.Selection({"A": neurons_of(model)}, selector="x"),
            r"a Selection has a set .* such as selection\['Egypt'\]",
        ),
    ]:
        with pytest.raises(AblationError, match=message):
            vn.Ablation(model, neurons)


def test_its_repr_says_what_it_does(model):
    assert repr(vn.Ablation(model, neurons_of(model))) == "Ablation(7 neurons, 'zero', at='post')"
    scaled = vn.Ablation(model, [neurons_of(model)] * 2, "scale", factor=1.5, at="gate")
    assert repr(scaled) == "Ablation(2 rows, 'scale', factor=1.5, at='gate')"


# -- the order: what changes a value, what a trace writes, what looks at it --------------------------------------------

MODELS = ["llava_next_qwen2", "qwen2_5_vl", "gemma3", "molmo2", "llama4", "florence2"]
"""Gated with modules, ungated vision towers, fused projections, experts beside dense layers, an encoder-decoder."""


def functional_model():
    """A model whose activation is a function."""
    hf, processor = tiny_model("llava_next_mistral")

    class Functional(nn.Module):
        def __init__(self, like):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = like.gate_proj, like.up_proj, like.down_proj

        def forward(self, x):
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    for layer in hf.model.language_model.layers:
        layer.mlp = Functional(layer.mlp)
    return hf, processor


@pytest.fixture(scope="module", params=[*MODELS, "functional"])
def any_model(request):
    name = request.param
    hf, processor = functional_model() if name == "functional" else tiny_model(name)
    known = "llava_next_mistral" if name == "functional" else name
    return vn.VLM(hf, processor, template=tiny_template(known)), tiny_inputs(known)


def one_site(model, tower, at):
    """The first site of a tower that a trace can stop at, and all of its neurons."""
    space = model.space(tower, at)
    position = next(n for n, site in enumerate(space.sites) if model.mlp_of(site).expert is None)
    start = space.offsets[position]
    return space.sites[position], vn.NeuronSet(space, range(start, start + space.widths[position]))


@pytest.mark.parametrize("recorder_first", [True, False])
@pytest.mark.parametrize("at", ["gate", "post"])
@pytest.mark.parametrize("tower", ["language", "vision"])
def test_a_trace_reads_the_ablated_value_its_writes_win_and_a_recorder_counts_what_is_used(
    any_model, tower, at, recorder_first
):
    model, inputs = any_model
    site, neurons = one_site(model, tower, at)
    clean = logits_of(model.hf, inputs)
    ablation = vn.Ablation(model, neurons, "replace", values=2.0, at=at)
    with ablation:
        ablated = logits_of(model.hf, inputs)

    def run(write):
        recorder = vn.Recorder(model, model.space(tower, at), tokens="image" if tower == "vision" else "content")
        order = (recorder, ablation) if recorder_first else (ablation, recorder)
        with order[0], order[1], torch.no_grad():
            seen, logits = traced(model, inputs, site, write)
        share = recorder.statistics.probability[0][neurons.indices]
        return seen, logits, share

    seen, logits, share = run(None)
    assert (seen == 2).all()
    assert torch.equal(logits, ablated)
    assert (share == 1).all()
    for write in ("in place", "assigned"):
        seen, logits, share = run(write)
        assert (seen == -1).all(), write
        assert (share == 0).all(), write
        with vn.Ablation(model, neurons, "replace", values=-1.0, at=at):
            assert torch.equal(logits, logits_of(model.hf, inputs)), write
    assert torch.equal(logits_of(model.hf, inputs), clean)


def traced(model, inputs, site, write):
    with model.trace(**inputs) as tracer:
        if write == "in place":
            model.site(site)[:] = -1.0
        elif write == "assigned":
            model.set_site(site, torch.full_like(model.site(site), -1.0))
        seen = model.site(site).clone().save()
        logits = tracer.result.logits.save()
    return seen, logits


def test_a_cache_keeps_what_the_ablation_left_at_gate_and_at_post(model):
    inputs = model.prepare(some_questions(1))
    for at in ("gate", "post"):
        neurons = vn.NeuronSet(model.space("language", at), range(64, 128))
        mlp = model.language.layers[1].mlp
        with (
            vn.Ablation(model, neurons, "replace", values=5.0, at=at),
            torch.no_grad(),
            model.trace(**inputs) as tracer,
        ):
            cache = tracer.cache(modules=[mlp.act_fn, mlp.down_proj], include_inputs=True)
        seen = cache[mlp.act_fn.path].output if at == "gate" else cache[mlp.down_proj.path].input
        assert (seen == 5).all()


def test_an_ablation_at_gate_stays_when_a_trace_opens_the_source_of_the_activation(model):
    inputs = model.prepare(some_questions(1))
    neurons = vn.NeuronSet(model.space(), range(64, 128))
    mlp = model.language.layers[1].mlp
    for _ in range(2):
        with vn.Ablation(model, neurons, at="gate"), torch.no_grad(), model.trace(**inputs):
            assert mlp.act_fn.source is not None
            gate = mlp.gate.save()
            post = mlp.post.save()
        assert (gate == 0).all()
        assert (post == 0).all()
    with torch.no_grad(), model.trace(**inputs):
        gate = mlp.gate.save()
    assert (gate != 0).any()


# -- interrupts --------------------------------------------------------------------------------------------------------


def interrupted_at(module, end):
    """Ctrl-C as a module begins, runs or ends."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    if end == "run":
        forward = module.__dict__.get("forward")
        object.__setattr__(module, "forward", stop)
        restore = (lambda: module.__dict__.pop("forward")) if forward is None else None
        return restore or (lambda: object.__setattr__(module, "forward", forward))
    hook = module.register_forward_pre_hook if end == "begin" else module.register_forward_hook
    return hook(stop).remove


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, how) for name in ("qwen3_vl_moe", "glm4v_moe") for how in ("eager", "grouped_mm")),
        *((name, None) for name in ("llama4", "functional", "qwen2_5_vl")),
    ],
)
def test_an_interrupt_in_any_module_leaves_the_model_as_it_was(name, implementation):
    hf, processor = functional_model() if name == "functional" else tiny_model(name)
    known = "llava_next_mistral" if name == "functional" else name
    model, inputs = vn.VLM(hf, processor, template=tiny_template(known)), tiny_inputs(known)
    if implementation is not None:
        hf.set_experts_implementation(implementation)
    clean, space = logits_of(hf, inputs), model.space()
    decoder = hf.get_submodule(model.towers["language"].layer_paths[1])
    places = [decoder, *(module for name, module in decoder.named_modules() if "mlp" in name or "feed_forward" in name)]
    entered = [
        lambda: vn.Recorder(model),
        lambda: vn.Ablation(model, vn.NeuronSet(space, range(0, len(space), 2)), at="gate"),
    ]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules())
    tried = 0
    for enter in entered:
        with enter(), torch.no_grad():
            expected = hf(**inputs).logits
        for module in places:
            for end in ("begin", "run", "end"):
                restore = interrupted_at(module, end)
                again = None
                try:
                    with enter(), torch.no_grad():
                        try:
                            hf(**inputs)
                        except KeyboardInterrupt:
                            tried += 1
                        restore()
                        again = hf(**inputs).logits  # within, as if nothing had been
                finally:
                    restore()
                assert torch.equal(again, expected)
                assert not _get_current_function_mode_stack()
                assert not any("_apply_gate" in vars(module) for module in hf.modules())
                assert torch.equal(logits_of(hf, inputs), clean)
    assert tried >= 20
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules())
