"""Counts do not depend on what stands around the call; what cannot be made harmless is refused."""

import contextlib
import functools
import inspect
import os
import signal
import threading

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import vlmneurons as vn
from helpers import picture, plain_hooks, some_questions
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.files import stopping
from vlmneurons.run.ablation import ablations_in_force
from vlmneurons.run.masked import read_ragged


@pytest.fixture
def model(tiny_folder):
    return vn.VLM.from_pretrained(tiny_folder("llava_next_qwen2"))


@contextlib.contextmanager
def training(hf):
    hf.train()
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    try:
        yield
    finally:
        hf.eval()


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


AROUND = {
    "autocast that is off": lambda hf: torch.autocast("cpu", dtype=torch.bfloat16, enabled=False),
    "a default dtype of float64": lambda hf: default_dtype(torch.float64),
    "a default dtype of bfloat16": lambda hf: default_dtype(torch.bfloat16),
    "training": training,
    "gradients": lambda hf: torch.enable_grad(),
    "no gradients": lambda hf: torch.no_grad(),
    "inference mode": lambda hf: torch.inference_mode(),
    "two threads": lambda hf: threads(2),
    "a random seed": lambda hf: torch.random.fork_rng(),
    "determinism": lambda hf: contextlib.nullcontext(torch.use_deterministic_algorithms(True)),
    "anomaly detection": lambda hf: torch.autograd.graph.save_on_cpu(),
}
DOES = {
    "record": lambda model, asked: vn.record(model, asked, condition="all", progress=False).positive,
    "knockout": lambda model, asked: torch.tensor(
        vn.knockout(model, asked, {"x": vn.NeuronSet(model.space(), range(20))}, progress=False).chosen
    ),
}


@pytest.mark.parametrize("what", DOES)
@pytest.mark.parametrize("around", AROUND)
def test_the_integers_are_the_same_whatever_is_around(model, around, what):
    asked = some_questions(5)
    alone = DOES[what](model, asked)
    flags = [module.training for module in model.hf.modules()]
    try:
        with AROUND[around](model.hf):
            inside = [module.training for module in model.hf.modules()]
            assert torch.equal(DOES[what](model, asked), alone)
            assert [module.training for module in model.hf.modules()] == inside  # as the user had it
    finally:
        torch.use_deterministic_algorithms(False)
    assert [module.training for module in model.hf.modules()] == flags


@pytest.mark.parametrize("what", ["record", "record_items", "knockout", "attribute", "screen", "inspect_neuron"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_that_would_not_obey_it_is_refused_before_anything_is_done(model, tmp_path, dtype, what):
    asked, kind = some_questions(5), "post" if what == "screen" else "gate"
    masks = {"x": vn.NeuronSet(model.space("language", kind), range(20))}
    call = {
        "record": lambda: vn.record(model, asked),
        "record_items": lambda: vn.record_items(model, asked, tmp_path / "items"),
        "knockout": lambda: vn.knockout(model, asked, masks, folder=tmp_path / "knockout"),
        "attribute": lambda: vn.attribute(model, asked),
        "screen": lambda: vn.screen(model, asked, masks),
        "inspect_neuron": lambda: vn.inspect_neuron(model, asked, ("language.layers.1.mlp.gate", 3)),
    }[what]
    with torch.autocast("cpu", dtype=dtype), pytest.raises(MismatchError, match="autocast is on around this call"):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_recorder_under_autocast_counts_what_the_model_used(model, dtype):
    batch = model.prepare(some_questions(4))
    mask = batch.tokens.attention
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        with plain_hooks(model.hf) as values:
            model.hf(**batch)
        with vn.Recorder(model, tokens=lambda table: table.attention) as recorder:
            model.hf(**batch)
    gates = [values[str(site)][0] for site in model.space().sites]
    by_hand = torch.cat([((gate > 0) & mask[..., None]).sum((0, 1)) for gate in gates])
    assert torch.equal(recorder.statistics.positive[0], by_hand)
    assert recorder.statistics.provenance["dtype"] == f"torch.float32, autocast {dtype}"


# -- threads -----------------------------------------------------------------------------------------------------------


def test_two_threads_that_record_on_one_model_are_refused(model):
    asked, problems, begun, wait = some_questions(4), [], threading.Event(), threading.Event()

    def slow():
        begun.set()
        wait.wait(10)
        return picture(1)

    first = vn.QuestionSet([vn.Question(slow, "What?", ("a", "b"), 0, "A", id="slow")])
    results = []
    thread = threading.Thread(
        target=lambda: results.append(vn.record(model, first, condition="all", batch_size=2, progress=False))
    )

    def trying(what, match):
        with pytest.raises(MismatchError, match=match):
            what()
        problems.append(what)

    with vn.Recorder(model):  # in this thread; the other one is refused at once
        other = threading.Thread(target=trying, args=(lambda: vn.record(model, asked, progress=False), "recorded in"))
        other.start()
        other.join()
        run = threading.Thread(
            target=trying, args=(lambda: model.hf(**model.prepare(asked)), "recorded in .*would have been counted")
        )
        run.start()
        run.join()
    assert len(problems) == 2
    wait.set()
    thread.start()
    thread.join()
    assert int(results[0].items.sum()) == 1


def test_a_run_of_another_thread_that_began_before_a_recorder_was_entered_is_not_counted(model):
    inputs, first = model.prepare(some_questions(2)), model.hf.get_submodule(model.towers["language"].mlps[0].path)
    with vn.Recorder(model) as alone:
        model.hf(**inputs)
    begun, entered, ended, problems = threading.Event(), threading.Event(), threading.Event(), []

    def meet(*_):
        """Each thread's run stops at the first layer, until the other one is where its counts could be mixed up."""
        if threading.current_thread() is thread:
            begun.set()
            assert entered.wait(60)
        else:
            entered.set()
            assert ended.wait(60)

    def run():
        try:
            model.hf(**inputs)
        except MismatchError as error:
            problems.append(str(error))
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="early")
    with first.register_forward_pre_hook(meet):
        thread.start()
        assert begun.wait(60)
        with vn.Recorder(model) as recorder:
            model.hf(**inputs)
        thread.join()
    assert recorder.statistics == alone.statistics
    (problem,) = problems
    assert problem == (
        "this model is being recorded in thread 'MainThread', and ran in another one: that run would have been "
        "counted. Wait for that to end, or give each a model of its own"
    )


# -- generations -------------------------------------------------------------------------------------------------------

N = 5


def written(model, inputs, **how):
    """Counts of a recorder around a generation, and those of one forward over the prompt and all that was written."""
    with vn.Recorder(model, tokens=lambda table: table.attention) as recorder:
        ids = model.hf.generate(**inputs, max_new_tokens=N, min_new_tokens=N, do_sample=False, **how)
    attention = torch.cat([inputs["attention_mask"], torch.ones(len(ids), N - 1, dtype=torch.int64)], 1)
    with vn.Recorder(model, tokens=lambda table: table.attention) as whole:
        model.hf(**{**inputs, "input_ids": ids[:, :-1], "attention_mask": attention})
    return recorder.statistics, whole.statistics


@pytest.mark.parametrize(
    "how", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"return_dict_in_generate": False}]
)
def test_every_token_of_a_generation_is_counted_once(model, how):
    inputs = model.prepare(some_questions(3))
    if "cache_implementation" in how:  # which compiles where it can
        how = {**how, "disable_compile": True}
    steps, whole = written(model, inputs, **how)
    assert steps.tokens.tolist() == whole.tokens.tolist() == [int(inputs["attention_mask"].sum()) + 3 * (N - 1)]
    assert steps.items.tolist() == [3]
    differ = (steps.positive != whole.positive).float().mean()
    assert differ < 0.02  # a cache adds in another order: within rounding of 0


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_several_continuations_of_a_row_are_refused(model, how):
    inputs = model.prepare(some_questions(2))
    with vn.Recorder(model), pytest.raises(QuestionError, match=r"4 continuations of 2 rows .beams, or several"):
        model.hf.generate(**inputs, max_new_tokens=3, **{"do_sample": False, **how})
    assert "generate" not in vars(model.hf)


@pytest.mark.parametrize("name", ["llava_next_qwen2", "qwen2_5_vl"])
def test_tokens_that_a_generation_may_take_back_are_refused(name, tiny_folder):
    model = vn.VLM.from_pretrained(tiny_folder(name))
    inputs = model.prepare(some_questions(1))
    with vn.Recorder(model), pytest.raises(QuestionError, match="looked ahead by an assistant, by prompt lookup"):
        model.hf.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)
    assert "generate" not in vars(model.hf)


def test_a_mask_given_by_position_is_read_like_one_given_by_name(model):
    inputs = model.prepare(some_questions(3, groups="A").filter(lambda item: True))
    words = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    words["input_ids"] = words["input_ids"].clone()
    words["input_ids"][words["input_ids"] == model.hf.config.image_token_id] = 5
    with vn.Recorder(model, tokens=lambda table: table.attention) as named:
        model.hf(**words)
    parameters = list(inspect.signature(type(model.hf).forward).parameters)[1:]
    place = parameters.index("attention_mask")
    arguments = [None] * (place + 1)
    arguments[parameters.index("input_ids")], arguments[place] = words["input_ids"], words["attention_mask"]
    with vn.Recorder(model, tokens=lambda table: table.attention) as positional:
        model.hf(*arguments)
    assert named.statistics == positional.statistics


def test_a_mask_from_which_padding_cannot_be_told_is_refused(model):
    inputs = dict(model.prepare(some_questions(2)))
    n = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(2, 1, n, n, dtype=torch.bool).tril()
    with vn.Recorder(model), pytest.raises(QuestionError, match=r"gives \[2, 1, .* from which padding cannot be told"):
        model.hf(**inputs)


# -- padding -----------------------------------------------------------------------------------------------------------


def test_left_padding_shifts_no_position_of_a_decoder_that_learned_them():
    from transformers import GPT2Config, LlavaConfig, LlavaForConditionalGeneration

    from vlmneurons.testing import tiny_model

    small, processor = tiny_model("llava")
    text = GPT2Config(
        vocab_size=small.config.text_config.vocab_size, n_positions=512, n_embd=32, n_layer=2, n_head=4, pad_token_id=0
    )
    text.tie_word_embeddings = False
    config = LlavaConfig(
        vision_config=small.config.vision_config,
        text_config=text,
        image_token_index=small.config.image_token_id,
        vision_feature_layer=small.config.vision_feature_layer,
        vision_feature_select_strategy=small.config.vision_feature_select_strategy,
        image_seq_length=small.config.image_seq_length,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    hf = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    model = vn.VLM(hf, processor)
    asked = vn.QuestionSet(
        [vn.Question(picture(n), "What " + "is " * (5 * n), ("a", "b"), 0, "G", id=str(n)) for n in range(3)]
    )
    for side in ("left", "right"):
        batch = model.prepare(asked, padding_side=side)
        with torch.no_grad():
            logits = model.hf(**batch).logits
            for row in range(3):
                alone = model.hf(**model.prepare(asked[row])).logits[0, -1]
                torch.testing.assert_close(logits[row, batch.tokens.last[row]], alone, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.trace(**model.prepare(asked)):
        gate = model.language.layers[1].mlp.gate.save()
    with torch.no_grad(), model.trace(**model.prepare(asked[0])):
        alone = model.language.layers[1].mlp.gate.save()
    torch.testing.assert_close(gate[0, -alone.shape[1] :], alone[0], rtol=1e-4, atol=1e-4)
    texts = [asked[n : n + 1] for n in range(3)]
    one_by_one = [model.generate(**model.prepare(one), max_new_tokens=3)[0, -3:].tolist() for one in texts]
    together = model.generate(**model.prepare(asked), max_new_tokens=3)[:, -3:].tolist()
    assert together == one_by_one


# -- readers of the user's own -----------------------------------------------------------------------------------------


class Silent(vn.AnswerReader):
    """Runs the model, and tells nobody."""

    def read(self, model, questions, encoded, watch=None):
        model.hf(**encoded)
        return vn.Letters().read(model, questions, encoded)


class Elsewhere(vn.AnswerReader):
    """Enters `watch` and runs the model outside of it."""

    def read(self, model, questions, encoded, watch=None):
        if watch is not None:
            with watch(encoded, list(range(len(questions)))):
                pass
        return vn.Letters().read(model, questions, encoded)


@pytest.mark.parametrize(
    ("reader", "message"), [(Silent(), "entered `watch` 0 times"), (Elsewhere(), "no forward was run")]
)
def test_a_reader_that_shows_nobody_its_run_is_refused(model, reader, message):
    with pytest.raises(MismatchError, match=message):
        vn.record(model, some_questions(2), answer=reader, condition="all", progress=False)


def hooks_of(hf):
    return [
        hook
        for module in hf.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]


def in_ablation(model, questions):
    with vn.Ablation(model, vn.NeuronSet(model.space(), range(0, 200, 7))):
        model.hf(**model.prepare(questions))


def in_recorder(model, questions):
    with vn.Recorder(model, model.space()):
        model.hf(**model.prepare(questions))


def in_knockout(model, questions):
    vn.knockout(model, questions, {"x": vn.NeuronSet(model.space(), range(50))}, progress=False)


def in_inspection(model, questions):
    vn.inspect_neuron(model, questions, 3, k=1, answers=False)


def in_writes(model, questions):
    vn.neuron_writes(model, vn.NeuronSet(model.space(), [3]))


def in_kinds_of_masks(model, questions):
    """A generated answer to each question, one under a zeroing mask and one under an amplifying one, in one run."""
    neurons = vn.NeuronSet(model.space(), range(0, 200, 7))
    ablations = [vn.Ablation(model, neurons), vn.Ablation(model, neurons, "scale", factor=2.0)]
    reader = vn.Generate(max_new_tokens=1)
    encoded = reader.encode(model, questions)
    assert len(list(read_ragged(model, reader, questions, encoded, ablations, [[0], [1]]))) == 2


@pytest.fixture
def interruptible():
    """Processes of pytest-xdist do not listen to ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def strike_everywhere(model, work, monkeypatch, put_on, taken_off):
    """Ctrl-C right after each call of a function that puts something on, and right before each that takes it off."""
    questions, moments = some_questions(2), {"now": 0, "fire": -1}
    with torch.no_grad():
        before = model.hf(**model.prepare(questions)).logits
        work(model, questions)  # nnsight's own hooks are put on, and what is looked at once is known
        known = hooks_of(model.hf)

        def strike():
            moments["now"] += 1
            if moments["now"] == moments["fire"]:
                os.kill(os.getpid(), signal.SIGINT)

        def put(function, *args, **kwargs):
            result = function(*args, **kwargs)
            strike()
            return result

        def take(function, *args, **kwargs):
            strike()
            return function(*args, **kwargs)

        for around, (kind, name) in [(put, put_on), (take, taken_off)]:
            monkeypatch.setattr(kind, name, functools.partialmethod(functools.partial(around, getattr(kind, name))))
        work(model, questions)
        total = moments["now"]
        assert total
        for fire in range(1, total + 1, max(1, total // 20)):
            moments.update(now=0, fire=fire)
            with contextlib.suppress(KeyboardInterrupt):
                work(model, questions)
                raise AssertionError("nothing was interrupted")
            assert hooks_of(model.hf) == known
            assert not list(ablations_in_force(model.hf))
        assert torch.equal(model.hf(**model.prepare(questions)).logits, before)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        work(model, questions)  # nobody has it any more


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("work", [in_ablation, in_recorder, in_knockout, in_inspection, in_writes, in_kinds_of_masks])
def test_ctrl_c_while_hooks_are_put_on_or_taken_off_leaves_none_of_them(model, monkeypatch, work):
    strike_everywhere(
        model, work, monkeypatch, put_on=(RemovableHandle, "__init__"), taken_off=(RemovableHandle, "remove")
    )


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_between_masks_of_several_kinds_leaves_none_of_them(model, monkeypatch):
    strike_everywhere(
        model, in_kinds_of_masks, monkeypatch, put_on=(vn.Ablation, "__enter__"), taken_off=(vn.Ablation, "__exit__")
    )


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", ["before they come off", "while they come off"])
def test_a_second_ctrl_c_leaves_no_hook_on_either(monkeypatch, moment):
    module, entered = nn.Linear(2, 2), []

    class Struck(stopping.Undivided):
        """Ctrl-C comes again when hooks are to come off."""

        def __enter__(self):
            entered.append(self)
            if len(entered) == 2 and moment == "before they come off":
                raise KeyboardInterrupt
            super().__enter__()
            if len(entered) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stopping, "Undivided", Struck)
    hooks = (module.register_forward_hook(lambda *_: None) for _ in range(3))
    with pytest.raises(KeyboardInterrupt), stopping.hooked(hooks):
        assert len(module._forward_hooks) == 3
    assert len(entered) == 2
    assert not module._forward_hooks


@pytest.mark.parametrize(
    "make",
    [lambda model: vn.Recorder(model), lambda model: vn.Ablation(model, vn.NeuronSet(model.space(), range(0, 200, 7)))],
)
def test_ctrl_c_right_before_something_is_left_leaves_no_hook_on(model, monkeypatch, make):
    work = make(model)
    with work:
        pass  # what is looked at once is known
    before, entered = hooks_of(model.hf), []

    class Struck(stopping.Undivided):
        """The first time ctrl-C comes right before it begins."""

        def __enter__(self):
            entered.append(self)
            if len(entered) == 1:
                raise KeyboardInterrupt
            super().__enter__()

    work.__enter__()
    assert hooks_of(model.hf) != before
    monkeypatch.setattr(stopping, "Undivided", Struck)
    with pytest.raises(KeyboardInterrupt):
        work.__exit__(None, None, None)
    assert entered
    assert hooks_of(model.hf) == before
    with make(model):
        pass  # nobody has the model any more
