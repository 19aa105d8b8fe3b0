"""Every function that asks takes the same options: each works, or is refused early with a text that says why."""

import inspect

import pytest
import torch

import vlmneurons as vn
from helpers import picture, some_questions
from vlmneurons.errors import QuestionError
from vlmneurons.run.ask import Options


@pytest.fixture
def model(load):
    return load("llava_next_qwen2")


def asked(name, model, tmp_path, questions=None, **how):
    """One of the functions, on a few questions; what it gives, in a form that can be compared."""
    questions = some_questions(6) if questions is None else questions
    masks = {"x": vn.NeuronSet(model.space("language", "post" if name == "screen" else "gate"), [0, 9])}
    if name == "record":
        return vn.record(model, questions, condition="all", **how).positive.tolist()
    if name == "record_items":
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return vn.record_items(model, questions, folder, **how).group_by(condition="all").positive.tolist()
    if name == "knockout":
        return vn.knockout(model, questions, masks, **how).chosen.tolist()
    if name == "attribute":
        return [round(one, 4) for one in vn.attribute(model, questions, condition="all", **how).total.sum(1).tolist()]
    if name == "screen":
        return [round(one, 4) for one in vn.screen(model, questions, masks, **how)["estimate"]]
    view = vn.inspect_neuron(model, questions, ("language.layers.1.mlp.gate", 3), **how)
    return [round(item.value, 4) for item in view.items]


NAMES = ("record", "record_items", "knockout", "attribute", "screen", "inspect_neuron")
WORKS = {
    "batch_size": (4, ("record", "record_items", "knockout", "screen", "inspect_neuron")),
    "by_length": (True, ("record", "record_items", "knockout", "screen", "inspect_neuron")),
    "prefetch": (2, ("record", "record_items", "knockout", "screen", "inspect_neuron")),
    "on_error": ("skip", NAMES),
    "progress": (False, NAMES),
    "distributed": (True, ("record", "record_items", "knockout", "attribute", "screen")),
    "remote": ("local", ("record", "record_items", "knockout")),
}
FUNCTIONS = {name: getattr(vn, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", WORKS)
def test_an_option_works_or_is_refused_early(name, option, model, tmp_path):
    value, works = WORKS[option]
    how = {"progress": False, option: value}
    has = option in inspect.signature(FUNCTIONS[name]).parameters
    if name in works:
        assert has
        assert asked(name, model, tmp_path, **how) == asked(name, model, tmp_path, progress=False)
    elif has:  # gradients, and values at every token, do not come back from elsewhere
        assert option == "remote"
        with pytest.raises(QuestionError, match="run the model here"):
            asked(name, model, tmp_path, **how)
    else:  # one question at a time has no batches; a page is one process's
        assert (name, option) in [
            ("attribute", "batch_size"),
            ("attribute", "by_length"),
            ("attribute", "prefetch"),
            ("inspect_neuron", "distributed"),
        ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"on_error": "ignore"}, "on_error='ignore' does not exist; choose from raise, skip"),
        ({"batch_size": 0}, "batch_size 0 is less than 1|batch_size=0"),
        ({"prefetch": -1}, "prefetch -1 is less than 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_any_forward(name, how, message, model, tmp_path, monkeypatch):
    if not set(how) <= set(inspect.signature(FUNCTIONS[name]).parameters):
        return
    monkeypatch.setattr(model.hf, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(QuestionError, match=message):
        asked(name, model, tmp_path, progress=False, **how)


@pytest.mark.parametrize("name", NAMES)
def test_a_question_that_cannot_be_asked_is_raised_by_name_or_skipped(name, model, tmp_path):
    good = some_questions(6)
    bad = vn.Question(tmp_path / "nowhere.png", "What?", ("Tea", "Rice", "Bread", "Soup"), 0, "A", id="bad")
    spoiled = vn.QuestionSet([*good[:3], bad, *good[3:]])
    with pytest.raises(QuestionError, match="question 'bad'"):
        asked(name, model, tmp_path, spoiled, progress=False)
    skipped = asked(name, model, tmp_path, spoiled, progress=False, on_error="skip")
    assert skipped == asked(name, model, tmp_path, good, progress=False)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "attribute"])
def test_a_batch_that_does_not_fit_into_memory_is_halved(name, model, tmp_path, monkeypatch):
    whole = asked(name, model, tmp_path, progress=False)
    forward = model.hf.forward

    def failing(*args, **kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.hf, "forward", failing)
    assert asked(name, model, tmp_path, progress=False) == whole


@pytest.mark.parametrize("name", ["record", "knockout", "attribute"])
def test_an_interrupt_leaves_what_was_finished(name, model, tmp_path, monkeypatch):
    questions = vn.QuestionSet([vn.Question(picture(i), "What?", ("a", "b"), 0, "AB"[i % 2]) for i in range(8)])
    asked(name, model, tmp_path, questions, progress=False)  # a study looks first at how the model is built
    calls, forward = 0, model.hf.forward

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.hf, "forward", interrupted)
    how = {} if name == "attribute" else {"batch_size": 1 if name == "record" else 2}
    with pytest.raises(KeyboardInterrupt) as caught:
        asked(name, model, tmp_path, questions, progress=False, **how)
    partial = caught.value.partial
    assert (len(partial.ids) if name == "knockout" else int(partial.items.sum())) > 0


def test_the_options_say_once_what_every_function_takes():
    fields = set(inspect.signature(Options).parameters)
    assert fields == {*WORKS, "part"}
    whole_only = {name for name, one in FUNCTIONS.items() if "part" not in inspect.signature(one).parameters}
    assert set(NAMES) - whole_only == {"record_items", "knockout"}  # what is kept in a folder; see test_parts
    for name, (_, works) in WORKS.items():
        for function in works:
            assert name in inspect.signature(FUNCTIONS[function]).parameters, (function, name)
