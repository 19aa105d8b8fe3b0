"""Numbers of different settings or content are never mixed: not by adding, and not by going on with a folder."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from enum import Enum

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import vlmneurons as vn
from helpers import picture
from vlmneurons.errors import MismatchError
from vlmneurons.files.digests import digest_of_code
from vlmneurons.files.folders import RunFolder
from vlmneurons.model.identity import digest_of_weights
from vlmneurons.questions.identity import content_of
from vlmneurons.run.readers import Generate, Letters
from vlmneurons.statistics.identity import Setting


@pytest.fixture
def model(tiny_folder):
    return vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"))


def plain_prompt(item, options):
    return f"{item.question} {' '.join(options)}"


def made_of(folder, n=6, **change):
    """Questions about pictures in a folder; ``change`` replaces fields of the first one."""
    folder.mkdir(exist_ok=True)
    items = []
    for i in range(n):
        path = folder / f"{i}.png"
        if not path.exists():
            picture(i).save(path)
        fields = {"image": str(path), "question": "What?", "options": ("Tea", "Rice", "Fish"), "answer": i % 3}
        fields |= {"group": "AB"[i % 2], "id": f"q{i}", **(change if i == 0 else {})}
        items.append(vn.Question(**fields))
    return vn.QuestionSet(items, prompt=plain_prompt)


# -- settings: each changes what must be equal to add ------------------------------------------------------------------


@contextlib.contextmanager
def weight_by_data(model, **_):
    model.hf.get_output_embeddings().weight.data[7, 3] += 0.5  # no version counter sees it
    yield {}


@contextlib.contextmanager
def weight_by_numpy(model, **_):
    model.hf.get_output_embeddings().weight.detach().numpy()[5, 5] += 0.5
    yield {}


@contextlib.contextmanager
def weight_in_the_middle(model, **_):
    weight = next(w for name, w in model.hf.named_parameters() if "layers.1.mlp.down_proj.weight" in name)
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 2] *= 1.001
    yield {}


@contextlib.contextmanager
def a_buffer(model, **_):
    buffer = next(b for name, b in model.hf.named_buffers() if "inv_freq" in name)
    buffer.mul_(1.0001)
    yield {}


@contextlib.contextmanager
def an_ablation(model, **_):
    with vn.Ablation(model, vn.NeuronSet(model.space(), [1, 2])):
        yield {}


@contextlib.contextmanager
def a_hook(model, **_):
    vector = torch.full((1,), 0.01)
    layer = model.hf.get_decoder().layers[0]
    handle = layer.mlp.register_forward_hook(lambda module, args, output: output + vector)
    try:
        yield {}
    finally:
        handle.remove()


@contextlib.contextmanager
def half_precision(model, tiny_folder, **_):
    yield {"model": vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"), dtype=torch.bfloat16)}


@contextlib.contextmanager
def an_adapter(tiny_folder, **_):
    from peft import LoraConfig, get_peft_model

    base = vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of transformers
        adapted = vn.VLM(get_peft_model(base.hf, config), base.processor)
    yield {"model": adapted}


@contextlib.contextmanager
def a_template(model, **_):
    frame = model.encoder.render("MARK", 1)
    yield {"model": vn.VLM(model.hf, model.processor, template=lambda text, n: frame.replace("MARK", f"{text}!"))}


@contextlib.contextmanager
def the_processors_pixels(model, **_):
    model.processor.image_processor.size = {**dict(model.processor.image_processor.size), "longest_edge": 28 * 28 * 64}
    yield {}


@contextlib.contextmanager
def a_prompt_of_the_same_name(questions, **_):
    def plain_prompt(item, options):
        return f"{item.question}? {' '.join(options)}"

    plain_prompt.__qualname__ = "plain_prompt"
    yield {"questions": questions.asked(prompt=plain_prompt)}


@contextlib.contextmanager
def a_prompts_closure(questions, **_):
    def prompt(end):
        return lambda item, options: plain_prompt(item, options) + end

    yield {"questions": questions.asked(prompt=prompt(" Now!"))}


@contextlib.contextmanager
def another_token_rule(**_):
    yield {"tokens": "image"}


@contextlib.contextmanager
def a_token_rule_of_the_user(**_):
    def rule(table):
        return table.counted("content") & ~table.image

    yield {"tokens": rule}


@contextlib.contextmanager
def another_reader(**_):
    yield {"answer": "text"}


class Third(Letters):
    def __init__(self, place):
        object.__setattr__(self, "place", place)


@contextlib.contextmanager
def a_reader_of_the_user(**_):
    yield {"answer": Third(3)}


@contextlib.contextmanager
def a_run_elsewhere(**_):
    yield {"remote": "local"}


SETTINGS = {
    "its weights is": [weight_by_data, weight_by_numpy, weight_in_the_middle, a_buffer],
    "its weights is|its dtype is": [half_precision],
    "its adapters is": [an_adapter],
    "its in_force is": [an_ablation, a_hook],
    r"its processor\.template is": [a_template],
    r"its processor\.image_processor": [the_processors_pixels],
    "its prompt is": [a_prompt_of_the_same_name, a_prompts_closure],
    "its tokens is": [another_token_rule, a_token_rule_of_the_user],
    "its answer is": [another_reader, a_reader_of_the_user],
    "its engine is": [a_run_elsewhere],
}


@pytest.mark.parametrize(("message", "change"), [(text, one) for text, changes in SETTINGS.items() for one in changes])
def test_another_setting_is_refused_with_what_differs(model, tiny_folder, tmp_path, message, change):
    questions = made_of(tmp_path / "pictures")
    quiet = {"condition": "all", "progress": False}
    before = vn.record(model, questions, **quiet)
    vn.record_items(model, questions, tmp_path / "items", progress=False)
    masks = {"x": vn.NeuronSet(model.space(), [0, 9])}
    vn.knockout(model, questions, masks, folder=tmp_path / "study", progress=False)
    with change(model=model, questions=questions, tiny_folder=tiny_folder) as how:
        other, asked = how.pop("model", model), how.pop("questions", questions)
        after = vn.record(other, asked, **quiet, **how)
        with pytest.raises(MismatchError, match=f"of different settings cannot be added: of the second, .*{message}"):
            before + after
        with pytest.raises(MismatchError, match=f"holds another run: .*{message}"):
            vn.record_items(other, asked, tmp_path / "items", progress=False, **how)
        if "tokens" not in how:  # a study counts none
            masks = {"x": vn.NeuronSet(other.space(), [0, 9])}
            with pytest.raises(MismatchError, match=f"holds another run: .*{message}"):
                vn.knockout(other, asked, masks, folder=tmp_path / "study", progress=False, **how)
    assert before + before is not None


# -- content: what must be equal to go on ------------------------------------------------------------------------------

CONTENT = {
    "text": {"question": "Which?"},
    "options": {"options": ("Tea", "Rice", "Soup")},
    "order of options": {"options": ("Rice", "Tea", "Fish")},
    "answer": {"answer": 2},
    "group": {"group": "B"},
    "no picture": {"image": None},
    "two pictures": {"image": (picture(0), picture(1))},
    "another picture": {"image": picture(9)},
}


@pytest.mark.parametrize("change", CONTENT.values(), ids=CONTENT)
def test_another_question_under_the_same_name_is_refused(model, tmp_path, change):
    questions, other = made_of(tmp_path / "pictures"), made_of(tmp_path / "pictures", **change)
    assert content_of(questions)["q1"] == content_of(other)["q1"]
    vn.record_items(model, questions, tmp_path / "items", progress=False)
    masks = {"x": vn.NeuronSet(model.space(), [0, 9])}
    vn.knockout(model, questions, masks, folder=tmp_path / "study", progress=False)
    message = "question 'q0' had another text, options, answer, group or picture there"
    with pytest.raises(MismatchError, match=message):
        vn.record_items(model, other, tmp_path / "items", progress=False)
    with pytest.raises(MismatchError, match=message):
        vn.knockout(model, other, masks, folder=tmp_path / "study", progress=False)


def test_a_picture_that_was_overwritten_is_another_picture(model, tmp_path):
    questions = made_of(tmp_path / "pictures")
    vn.record_items(model, questions, tmp_path / "items", progress=False)
    picture(40).save(tmp_path / "pictures" / "2.png")
    with pytest.raises(MismatchError, match="question 'q2' had another"):
        vn.record_items(model, made_of(tmp_path / "pictures"), tmp_path / "items", progress=False)


def test_palettes_tell_pictures_apart():
    one = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    other = one.copy()
    other.putpalette([255 - value for value in one.getpalette()])
    asked = [vn.QuestionSet([vn.Question(image, "What?", ("a", "b"), 0, "A", id="q")]) for image in (one, other)]
    assert content_of(asked[0]) != content_of(asked[1])


def test_values_of_a_sound_tell_it_apart_from_another_of_the_same_length():
    sounds = [{"array": np.full(160, value, dtype=np.float32), "sampling_rate": 16_000} for value in (0.0, 0.5)]
    asked = [vn.QuestionSet([vn.Question(None, "What?", ("a", "b"), 0, "A", id="q", audio=one)]) for one in sounds]
    told = [content_of(questions)["q"] for questions in asked]
    assert told[0] != told[1]
    assert not any("?" in one for one in told)


def test_the_same_content_elsewhere_and_in_another_order_is_gone_on_with(model, tmp_path):
    questions = made_of(tmp_path / "pictures")
    vn.record_items(model, questions, tmp_path / "items", progress=False)
    masks = {"x": vn.NeuronSet(model.space(), [0, 9])}
    whole = vn.knockout(model, questions, masks, folder=tmp_path / "study", progress=False)
    shutil.copytree(tmp_path / "pictures", tmp_path / "elsewhere")
    moved = made_of(tmp_path / "elsewhere")
    turned = vn.QuestionSet(list(moved)[::-1], prompt=plain_prompt)
    again = vn.record_items(model, turned, tmp_path / "items", progress=False)
    assert again.complete
    assert [item.id for item in again.items] == [item.id for item in questions]
    result = vn.knockout(model, turned, masks, folder=tmp_path / "study", progress=False)
    assert result.ids == whole.ids


def test_a_study_stopped_and_gone_on_with_in_another_order_is_the_same_study(model, tmp_path, monkeypatch):
    questions = made_of(tmp_path / "pictures")
    masks = {"x": vn.NeuronSet(model.space(), [0, 9])}
    whole = vn.knockout(model, questions, masks, batch_size=2, progress=False)
    write = RunFolder.write

    def stopping(self, name, table):
        if name == "batch-000001":
            raise KeyboardInterrupt
        write(self, name, table)

    monkeypatch.setattr(RunFolder, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        vn.knockout(model, questions, masks, batch_size=2, folder=tmp_path / "study", progress=False)
    monkeypatch.undo()
    assert list((tmp_path / "study" / "parts").glob("*.parquet"))
    turned = vn.QuestionSet(list(questions)[::-1], prompt=plain_prompt)
    result = vn.knockout(model, turned, masks, batch_size=2, folder=tmp_path / "study", progress=False)
    assert result.ids == whole.ids
    assert (result.chosen == whole.chosen).all()


def test_a_saved_result_is_no_run_that_could_be_gone_on_with(model, tmp_path):
    questions = made_of(tmp_path / "pictures")
    masks = {"x": vn.NeuronSet(model.space(), [0, 9])}
    vn.knockout(model, questions, masks, progress=False).save(tmp_path / "saved")
    with pytest.raises(MismatchError, match="holds a result that was saved there, and not a run"):
        vn.knockout(model, questions, masks, folder=tmp_path / "saved", progress=False)


# -- tables that have no setting, or one that is not known -------------------------------------------------------------


def test_counts_of_ones_own_add_up_and_are_not_added_to_a_recording(model, tmp_path):
    stats = vn.record(model, made_of(tmp_path / "pictures"), condition="all", progress=False)
    own = vn.ActivationStatistics.from_counts(stats.space, stats.groups, stats.positive, stats.tokens)
    assert (own + own).tokens.tolist() == (2 * stats.tokens).tolist()
    with pytest.raises(MismatchError, match="one was recorded by the library, the other has no setting"):
        own + stats


def test_a_recording_of_an_earlier_release_is_read_and_selected_from_but_not_added_to(model, tmp_path):
    stats = vn.record(model, made_of(tmp_path / "pictures"), condition="all", progress=False)
    old = stats.with_provenance({name: value for name, value in stats.provenance.items() if name != "setting"})
    old.save(tmp_path / "old.safetensors")
    old = vn.ActivationStatistics.load(tmp_path / "old.safetensors")
    assert len(vn.CAS(0.01).select(old)["A"])
    for one, other in ((old, old), (old, stats), (stats, old)):
        with pytest.raises(MismatchError, match=r"recorded by an earlier release.*record it again"):
            one + other


def test_a_selection_carries_the_setting_of_its_counts_into_a_results_provenance(model, tmp_path):
    questions = made_of(tmp_path / "pictures")
    stats = vn.record(model, questions, condition="all", progress=False)
    selection = vn.CAS(0.02).select(stats)
    assert Setting.from_json(selection.provenance["statistics"]["setting"]) == Setting.from_json(
        stats.provenance["setting"]
    )


# -- the parts of an identity ------------------------------------------------------------------------------------------


def test_the_digest_of_weights_is_of_every_byte_and_ties(model):
    before = digest_of_weights(model.hf)
    for name, tensor in [*model.hf.named_parameters(), *model.hf.named_buffers()][::7]:
        flat = tensor.data.view(-1)
        place = int(torch.randint(len(flat), (1,), generator=torch.Generator().manual_seed(len(flat))))
        kept = flat[place].clone()
        flat[place] = kept + 1
        assert digest_of_weights(model.hf) != before, name
        flat[place] = kept
    assert digest_of_weights(model.hf) == before


def test_weights_that_are_not_here_are_of_another_kind():
    with torch.device("meta"):
        network = nn.Linear(3, 3)
    here = nn.Linear(3, 3)
    assert digest_of_weights(network) != digest_of_weights(here)


def one_way(x):
    # a comment
    return x + OFFSET


OFFSET = 1


def test_code_is_told_apart_by_what_it_does_and_refers_to(monkeypatch):
    before = digest_of_code(one_way)
    monkeypatch.setitem(globals(), "OFFSET", 2)
    assert digest_of_code(one_way) != before
    monkeypatch.setitem(globals(), "OFFSET", 1)
    assert digest_of_code(one_way) == before
    assert digest_of_code(lambda x: x + 1) != digest_of_code(lambda x: x + 2)
    first, second = (lambda x: x + 1), (lambda x: x + 2)  # two on one line have no source of their own
    assert digest_of_code(first) != digest_of_code(second)
    assert digest_of_code(Third(3)) != digest_of_code(Third(4))
    assert digest_of_code(Generate(5)) != digest_of_code(Generate(6))
    assert "of vlmneurons" in digest_of_code(Letters)

    def made(end):
        def inner(x, y=end):
            return x + y

        return inner

    assert digest_of_code(made(1)) != digest_of_code(made(2))
    assert digest_of_code(made(1)) == digest_of_code(made(1))
    namespace: dict = {}
    exec("def f(x):\n    return x + 1", namespace)
    other: dict = {}
    exec("def f(x):\n    return x + 2", other)
    assert digest_of_code(namespace["f"]) != digest_of_code(other["f"])


def holding(thing):
    """A function of the user's that refers to a thing."""

    def function(text, question):
        return thing

    return function


def linear(weight):
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.fill_(weight), network.bias.zero_()
    return network


def series(order, numbers=(1, 2)):
    return pd.Series(list(numbers), index=list(order))


A, B = [1], [2]
DIFFERENT = {
    "the method that is called": ((lambda v: v.sum(1)), (lambda v: v.amax(1))),  # on one line: neither has a source
    "a function of NumPy": ((lambda v: np.mean(v)), (lambda v: np.median(v))),
    "the weights of a probe": (holding(linear(1.0)), holding(linear(2.0))),
    "the middle of a long table": (
        holding(pd.DataFrame({"a": range(300)})),
        holding(pd.DataFrame({"a": [*range(299), 7]})),
    ),
    "the labels of a column": (holding(series("ab")), holding(series("ba"))),
    "objects in an array": (holding(np.array(["a", None], object)), holding(np.array(["b", None], object))),
    "which of two stands twice": (holding((A, B, A)), holding((A, B, B))),
    "the pattern of a method": (holding(re.compile("a").search), holding(re.compile("b").search)),
    "members of an enumeration": (holding(Enum("Kind", "one two").one), holding(Enum("Kind", "one two").two)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_functions_refer_to_tells_them_apart(name):
    first, second = map(digest_of_code, DIFFERENT[name])
    assert first != second


def test_a_function_of_a_module_of_the_users_is_told_by_its_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_metrics.py").write_text("def f1(text):\n    return 1\n\ndef unused():\n    return 1\n")
    import their_metrics

    namespace = {"their_metrics": their_metrics}
    exec("def scorer(text, question):\n    return their_metrics.f1(text)", namespace)
    scorer = namespace["scorer"]
    before = digest_of_code(scorer)
    their_metrics.unused = lambda: 2
    assert digest_of_code(scorer) == before
    their_metrics.f1 = lambda text: 2
    assert digest_of_code(scorer) != before


def test_code_is_told_alike_in_every_process():
    script = """
import re, sys
from enum import Enum
import numpy as np, pandas as pd, torch
from vlmneurons.files.digests import digest_of_code
def holding(thing):
    def function(text, question):
        return thing
    return function
things = [{"a", "b", "c"}, pd.Series(["a", "b"]), pd.DataFrame({"a": ["x", None]}), np.array(["a", None], object),
          re.compile("a").match, Enum("Kind", "one two").one, torch.zeros(2, dtype=torch.bfloat16), torch.nn.Identity()]
print([digest_of_code(holding(one)) for one in things], digest_of_code(lambda text, _: text in {"a", "b", "c"}))
"""
    told = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
