"""Prompts: chat templates of every kind, what is shown of a question, and where the answer begins."""

import copy

import pytest
import torch

import vlmneurons as vn
from helpers import picture
from vlmneurons.errors import ArchitectureError, QuestionError
from vlmneurons.model.identity import processor_of
from vlmneurons.model.prompts import Prompts
from vlmneurons.testing import tiny_model

PARTS = (
    "{% for m in messages %}<user>{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
    "{% endfor %}</user>{% endfor %}"
)
STRINGS = {
    "trimmed": "{% for m in messages %}{{ '<user>' + m['content'] | trim + '</user>' }}{% endfor %}",
    "set": "{% for m in messages %}{% set c = '<user>' + m['content'] | trim + '</user>' %}{{ c }}{% endfor %}",
    "written": "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}",
    "attribute": "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}",
    "added": "{% for m in messages %}{{ '<user>' + m['content'] + '</user>' }}{% endfor %}",
    "json": "{% for m in messages %}<user>{{ m['content'] | string }}</user>{% endfor %}",
    "replaced": "{% for m in messages %}<user>{{ m['content'].strip() }}</user>{% endfor %}",
    "last": "<user>{{ messages[-1]['content'] }}</user>",
    "first": "<user>{{ messages[0].content | trim }}</user>",
    "if string": "{% for m in messages if m['content'] is string %}<user>{{ m['content'] }}</user>{% endfor %}",
    "parts": PARTS,
}
TEXTS = [
    "What is the capital?",
    "What's the capital?",
    'Say "yes".',
    "A {b} {{c}} {% d %}",
    "  two  ",
    "[{'type': 'text'}]",
]


@pytest.fixture(scope="module")
def causal():
    """A text-only decoder and a tokenizer without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, processor = tiny_model("llava_next_qwen2")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def wrapped(causal, chat_template=None, **how):
    hf, tokenizer = causal
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return vn.VLM(hf, tokenizer, **how)


def asked(text, **how):
    question = vn.Question(None, text, ("Cairo", "Paris"), 0, "Egypt", id="q")
    return vn.QuestionSet([question], prompt=lambda question, options: question.question, **how)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", STRINGS)
def test_a_template_that_wants_a_string_gets_one_and_shows_the_question_as_it_is(causal, name, text):
    model = wrapped(causal, STRINGS[name])
    batch = model.prepare(asked(text))
    shown = model.tokenizer.decode(batch["input_ids"][0])
    assert shown.strip() in (f"<user>{text}</user>", f"<user>{text.strip()}</user>")
    counted = model.tokenizer.decode(batch["input_ids"][0][batch.tokens.counted("text")[0]])
    assert text.strip() in counted
    assert "user" not in counted


def test_a_template_that_wants_a_string_has_no_place_for_pictures():
    hf, processor = tiny_model("llava_next_qwen2")
    for name in ("trimmed", "written", "added"):
        processor.chat_template = STRINGS[name]
        model = vn.VLM(hf, processor)
        with pytest.raises(
            QuestionError, match=r"expects a string, so it has no place for pictures|refuses a question"
        ):
            model.prepare(vn.Question(picture(), "What?", ("a", "b"), 0, "A"))


@pytest.mark.parametrize("name", ["got_ocr2", "llava", "qwen2_5_vl"])
def test_a_template_that_drops_a_questions_pictures_is_refused(name):
    hf, processor = tiny_model(name)
    processor.chat_template = PARTS
    with pytest.raises(
        QuestionError, match=r"question 'q': .*(no placeholder for its pictures|tokens in the prompts sho)"
    ):
        vn.VLM(hf, processor).prepare(vn.Question(picture(), "What?", ("a", "b"), 0, "A", id="q"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}<user>{{ m['content'] | upper }}</user>{% endfor %}",
            "changes the question's text: 'What",
        ),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not show the question's text"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "shows the user's text 2 times"),
        ("{% for m in messages %}{{ m.content.nothing.there }}{% endfor %}", "refuses a question"),
        ("{{ raise_exception('no') }}", "refuses a question"),
        ("{% for m in messages %}<user>{{ m.content[:25] }}</user>{% endfor %}", "changes the question's text"),
    ],
)
def test_a_template_that_does_not_show_the_question_is_refused(causal, template, message):
    with pytest.raises(QuestionError, match=message):
        wrapped(causal, template).prepare(asked("What is the capital of all the world?"))


@pytest.mark.usefixtures("unchecked")
def test_a_base_model_is_asked_plainly(causal):
    with pytest.raises(
        QuestionError, match=r"has no chat template; give VLM.*or template='plain', which shows the text"
    ):
        wrapped(causal).prepare(asked("What?"))
    model = wrapped(causal, template="plain")
    batch = model.prepare(asked("What? Answer:"))
    assert model.tokenizer.decode(batch["input_ids"][0]) == "What? Answer:"
    assert bool(batch.tokens.counted("text").all())
    assert vn.record(model, asked("What?"), condition="all", progress=False).items.tolist() == [1]
    hf, processor = tiny_model("llava_next_qwen2")
    plain = vn.VLM(hf, processor, template="plain")
    assert plain.encoder.render("What?", 2) == "<image><image>What?"

    class Bare:
        chat_template = None

    with pytest.raises(QuestionError, match="template='plain': Bare names no image placeholder; give"):
        Prompts(Bare(), "plain", None).render("What?", 1)
    with pytest.raises(ArchitectureError, match=r"template is a function .* or 'plain'; got 'chatml'"):
        wrapped(causal, template="chatml")


# -- functions in a template's place -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_a_function_that_cannot_be_called_with_a_text_and_a_number_is_no_template(causal):
    for function in (lambda text: text, lambda text, n, more: text, lambda *, text, n_images: text):
        with pytest.raises(ArchitectureError, match=r"template is a function \(text, n_images\) -> prompt, or 'plain'"):
            wrapped(causal, template=function)
    for function in ("{} {}".format, lambda *values, **_: values[0], max):  # Python knows no signature of some
        assert wrapped(causal, template=function).template is function


@pytest.mark.parametrize(
    ("media", "message"),
    [
        (
            (0, 1, 0),
            r"questions' sounds \(got an unexpected keyword argument 'n_sounds'\).*function\(text, n_images, n_s",
        ),
        ((1, 2, 0), r"questions' sounds .*'n_sounds'.*to ask without sounds: vlmneurons.study.controls.blind"),
        ((0, 0, 1), r"questions' videos .*'n_videos'.*function\(text, n_images, n_videos=…\) puts their placeholders"),
        ((0, 1, 1), r"questions' sounds and videos .*function\(text, n_images, n_sounds=…, n_videos=…\) puts"),
    ],
)
def test_a_function_without_room_for_what_a_question_shows_is_refused(media, message):
    def two(text, n_images):
        return "<image>" * n_images + text

    _, processor = tiny_model("llava_next_qwen2")
    prompts = Prompts(processor, two, None)
    for ask in (lambda: prompts.render("What?", *media), lambda: prompts.frame(*media)):
        with pytest.raises(QuestionError, match=f"the template function has no place for the {message}"):
            ask()
    assert prompts.render("What?", 2) == "<image><image>What?"
    assert prompts.render("What?", 0) == "What?"


def test_a_function_with_room_for_all_is_given_what_a_question_shows_and_no_more():
    def all_of_it(text, n_images, **streams):
        return f"{n_images} {sorted(streams.items())} {text}"

    prompts = Prompts(tiny_model("llava_next_qwen2")[1], all_of_it, None)
    assert prompts.render("What?", 1) == "1 [] What?"
    assert prompts.render("What?", 1, 2, 3) == "1 [('n_sounds', 2), ('n_videos', 3)] What?"


def test_a_template_set_anew_on_the_processor_is_tried_anew_and_the_old_one_is_remembered(causal):
    model = wrapped(causal, STRINGS["added"])
    for name in ("added", "parts", "added"):
        model.tokenizer.chat_template = STRINGS[name]
        assert model.encoder.render("What?", 0) == "<user>What?</user>"


# -- thought -----------------------------------------------------------------------------------------------------------

TURN = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<assistant>"
OPENED = [
    "<think>", "<think>\n", "<think>\n\n", "\n<think>\n", "<thinking>", "<thought>", "<reasoning>", "[THINK]",
    "◁think▷", "<seed:think>", "<reflection>", "</think><think>",
    "<THINK>", "<think></think><think>", "<think> ", "Sure.<think>",
]  # fmt: skip
CLOSED = ["", "\n", "<think></think>", "<think>\n\n</think>\n\n", "</think>", "[THINK][/THINK]", "Answer:", "<thinks>"]
QWEN3 = TURN + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN35 = TURN + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
DEEPSEEK = TURN + "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}"
GRANITE = TURN + "{% if thinking %}<think>{% endif %}"


@pytest.mark.parametrize("answer", ["letters", "text"])
@pytest.mark.parametrize("opened", OPENED)
def test_options_are_not_read_where_a_thought_begins(causal, opened, answer):
    model = wrapped(causal, TURN + opened)
    with pytest.raises(
        QuestionError, match=r"opens a thought .* where the answer would begin.*template=function\) that"
    ):
        vn.record(model, asked("What?", answer=answer), condition="all", progress=False)
    assert model.prepare(asked("What?"))["input_ids"].shape[0] == 1  # to generate from, as the user likes


@pytest.mark.parametrize("closed", CLOSED)
def test_a_prompt_without_an_open_thought_is_read(causal, closed):
    model = wrapped(causal, TURN + closed)
    assert vn.record(model, asked("What?"), condition="all", progress=False).items.tolist() == [1]


@pytest.mark.parametrize(("template", "switch"), [(QWEN3, "enable_thinking"), (QWEN35, "enable_thinking")])
def test_a_model_that_may_think_is_read_once_the_user_has_said_whether(causal, template, switch):
    with pytest.raises(QuestionError, match=rf"template_kwargs={{'{switch}': False}}\), or read answers by generation"):
        vn.record(wrapped(causal, template), asked("What?"), condition="all", progress=False)
    quiet = wrapped(causal, template, template_kwargs={switch: False})
    assert quiet.encoder.render("What?", 0).endswith("</think>" + "\n\n" * (template is QWEN3))
    assert vn.record(quiet, asked("What?"), condition="all", progress=False).items.tolist() == [1]
    assert processor_of(quiet)["template_arguments"] == {switch: False}
    loud = wrapped(causal, template, template_kwargs={switch: True})
    if template is QWEN3:  # the model itself begins to think, or not: the user wants to know
        assert vn.record(loud, asked("What?"), condition="all", progress=False).items.tolist() == [1]
    else:
        with pytest.raises(QuestionError, match="opens a thought"):
            vn.record(loud, asked("What?"), condition="all", progress=False)


@pytest.mark.parametrize("template", [DEEPSEEK, GRANITE])
def test_a_model_that_thinks_only_when_told_is_read(causal, template):
    assert vn.record(wrapped(causal, template), asked("What?"), condition="all", progress=False).items.tolist() == [1]


def test_what_was_generated_within_a_thought_is_no_answer(causal):
    class Said(vn.Generate):
        pass

    def chosen(template, text):
        model = wrapped(causal, template)
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt = model.prepare(asked("What?"))["input_ids"]
        model.hf.generate = lambda **_: torch.cat([prompt, ids], 1)  # what a model would say
        try:
            questions = asked("What?")
            reader = Said()
            return reader.read(model, questions, reader.encode(model, questions)).chosen[0] is None
        finally:
            del model.hf.generate

    assert chosen(TURN + "<think>", "The answer is B.")
    assert not chosen(TURN, "The answer is B.")
    assert not chosen(TURN + "<think>", "It may be A.</think>The answer is B.")


def test_tags_of_thought_that_are_special_tokens_still_end_it(causal):
    hf, tokenizer = causal
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = TURN
    from vlmneurons.run.readers import _decoded

    model = vn.VLM(hf, tokenizer)
    ids = tokenizer(f"<think>A</think>B{tokenizer.eos_token}", add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "AB"
    assert _decoded(model, ids) == ("<think>A</think>B",)


# -- template arguments ------------------------------------------------------------------------------------------------


def test_template_arguments_reach_the_template_of_a_processor_and_of_a_tokenizer(causal):
    template = "{% for m in messages %}<{{ mood }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    hf, processor = tiny_model("qwen2_5_vl")
    processor.chat_template = template
    model = vn.VLM(hf, processor, template_kwargs={"mood": "calm"})
    assert model.encoder.render("What?", 0) == "<calm>What?"
    processor.chat_template, processor.tokenizer.chat_template = None, template
    assert vn.VLM(hf, processor, template_kwargs={"mood": "calm"}).encoder.render("What?", 0) == "<calm>What?"
    assert wrapped(causal, template, template_kwargs={"mood": "calm"}).encoder.render("What?", 0) == "<calm>What?"


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        ({"enable_thiking": False}, {}, "the chat template of .* does not look at 'enable_thiking'"),
        ({"tokenize": True}, {}, "'tokenize' is set by the library"),
        ({"add_generation_prompt": False}, {}, "'add_generation_prompt' is set by the library"),
        ({"mood": 1}, {"template": "plain"}, "'mood' is for a chat template, and template= replaces it"),
        (["mood"], {}, r"template_kwargs are a mapping of names to values; got \['mood'\]"),
    ],
)
def test_template_arguments_that_would_be_lost_are_refused(causal, given, how, message, unchecked):
    with pytest.raises(ArchitectureError, match=message):
        wrapped(causal, TURN, template_kwargs=given, **how)


def test_a_copy_of_a_model_prompts_as_the_model_does(causal):
    for how in (
        {"chat_template": QWEN3, "template_kwargs": {"enable_thinking": False}},
        {"template": "plain"},
        {"template": lambda text, n: f"Q: {text}"},
    ):
        model = wrapped(causal, **how)
        for copied in (copy.deepcopy(model), copy.copy(model)):
            assert copied.encoder.render("What?", 0) == model.encoder.render("What?", 0)
            assert processor_of(copied) == processor_of(model)


def test_what_prompts_depend_on_is_told_and_changes_with_it(causal):
    settings = [
        processor_of(wrapped(causal, TURN)),
        processor_of(wrapped(causal, QWEN3)),
        processor_of(wrapped(causal, QWEN3, template_kwargs={"enable_thinking": False})),
        processor_of(wrapped(causal, template="plain")),
        processor_of(wrapped(causal, template=lambda text, n: f"Q: {text}")),
        processor_of(wrapped(causal, template=lambda text, n: f"A: {text}")),
    ]
    assert all(first != second for n, first in enumerate(settings) for second in settings[:n])
    assert settings[0] == processor_of(wrapped(causal, TURN))


# -- options that say where they stand ---------------------------------------------------------------------------------

PLACED = [
    ("A. Cairo", "B. Paris"), ("(A) Cairo", "(B) Paris"), ("a) x", "b) y"), ("1. x", "2. y"), ("A: x", "B: y"),
    ("Cairo", "Both A and B"), ("Cairo", "None of the above"), ("Cairo", "All of the above"), ("x", "A and B"),
    ("x", "A & B"), ("x", "Option A"), ("x", "Neither A nor B"), ("x", "以上都不是"), ("x", "Todas las anteriores"),
    ("x", "Toutes les réponses ci-dessus"), ("x", "Todas as opções acima"), ("x", "none of the above"),
    ("x", "上記のすべて"), ("x", "Semua di atas"), ("x", "उपरोक्त सभी"),
]  # fmt: skip
FREE = [
    ("A", "B"), ("Cairo", "Paris"), ("A cat", "A dog"), ("A. Merkel", "Paris"), ("Vitamin A", "Vitamin B"), ("2", "4"),
    ("2.5", "3.5"), ("10:30", "11:30"), ("The man above the tree", "x"), ("both a cat and a dog", "x"), ("all", "none"),
    ("answer a call", "x"), ("None", "Both"), ("B. Obama", "A. Merkel", "x"), ("either way", "x"),
]  # fmt: skip


@pytest.mark.parametrize("options", PLACED)
def test_options_that_say_where_they_stand_are_shown_so(options):
    assert vn.Question(None, "What?", options, 0, "A").keeps_order
    for seed in range(5):
        questions = vn.QuestionSet([vn.Question(None, "?", options, 0, "A", id=str(i)) for i in range(5)], shuffle=seed)
        assert all(questions.order(item) == tuple(range(len(options))) for item in questions)


@pytest.mark.parametrize("options", FREE)
def test_other_options_are_shuffled(options):
    assert not vn.Question(None, "What?", options, 0, "A").keeps_order
    questions = vn.QuestionSet([vn.Question(None, "?", options, 0, "A", id=str(i)) for i in range(40)], shuffle=1)
    assert len({questions.order(item) for item in questions}) > 1
