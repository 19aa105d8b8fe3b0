"""What each token of a prompt is: checked by hand on the templates of the three models."""

import numpy as np
import pytest
import torch

import vlmneurons as vn
from helpers import picture, some_questions
from vlmneurons.errors import QuestionError
from vlmneurons.model.tokens import TokenTable
from vlmneurons.study.controls import blind

FOUR = ("Tea", "Rice", "Bread", "Soup")
BEFORE = {
    "llava_next_mistral": "<s>[INST] <image>\n",
    "llava_next_qwen2": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"),
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>"
    ),
}
AFTER = {
    "llava_next_mistral": " [/INST]",
    "llava_next_qwen2": "<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_5_vl": "<|im_end|>\n<|im_start|>assistant\n",
}


def plainly(question, options):
    return question.question


def asked(text, image=True, **how):
    item = vn.Question(picture() if image else None, text, FOUR, 0, "A", id="q")
    return vn.QuestionSet([item], prompt=plainly, **how)


def squeezed(model, ids) -> str:
    """Decoded tokens, with a run of image placeholders written once."""
    text = model.tokenizer.decode(ids)
    for token in ("<image>", "<|image_pad|>"):
        while token + token in text:
            text = text.replace(token + token, token)
    return text


def parts(model, questions, rule, **how):
    batch = model.prepare(questions, **how)
    return squeezed(model, batch["input_ids"][0][batch.tokens.counted(rule)[0]])


TEXTS = [
    "What is this?",
    "Что это? 这是什么？ これは？",
    "ما هذا؟ שלום",
    "👩🏽‍🍳🍜 e\u0301 ﷽",
    "x",
    "Is [INST] or [/INST] a word? system\nuser\nassistant",
    "QUESTION TEXT GOES HERE",
    "A. Tea\nB. Rice\n\nAnswer with the option's letter.",
    "a\tb\r\nc\u2028d",
]


@pytest.mark.parametrize("text", TEXTS)
def test_content_is_the_picture_and_the_users_own_words_and_no_more(paper_model, text):
    name = paper_model.test_name
    questions = asked(text)
    batch = paper_model.prepare(questions)
    image = "<|image_pad|>" if name == "qwen2_5_vl" else "<image>"
    assert squeezed(paper_model, batch["input_ids"][0]) == BEFORE[name] + text + AFTER[name]
    # Mistral's template ends with a space that the tokenizer joins to nothing, or to the first word.
    assert parts(paper_model, questions, "text").strip(" ") == text.strip(" ")
    assert parts(paper_model, questions, "image") == image
    assert parts(paper_model, questions, "content").removeprefix(image).strip(" ") == text.strip(" ")
    n_image = int(batch.tokens.counted("image").sum())
    n_text = int(batch.tokens.counted("text").sum())
    assert int(batch.tokens.counted("content").sum()) == n_image + n_text
    last = batch.tokens.counted("last")
    assert last.sum() == 1
    assert last[0, -1]
    n_special = int(batch.tokens.special.sum()) - n_image
    assert n_special == {"llava_next_mistral": 1, "llava_next_qwen2": 5, "qwen2_5_vl": 7}[name]


@pytest.mark.parametrize("text", ["  spaces  ", "\nlines\n", " ", "", "\n", "  "])
def test_texts_that_begin_or_end_with_white_space_or_are_empty_count_their_own_tokens_only(paper_model, text):
    batch = paper_model.prepare(asked(text))
    ids = batch["input_ids"][0][batch.tokens.counted("text")[0]]
    counted = paper_model.tokenizer.decode(ids)
    whole = BEFORE[paper_model.test_name] + text + AFTER[paper_model.test_name]
    assert squeezed(paper_model, batch["input_ids"][0]) == whole
    # A token that lies across the border with the template is counted: no word of the user's is lost.
    assert text in counted
    assert len(counted) <= len(text) + 2
    assert "INST" not in counted
    assert "<" not in counted


def test_the_usual_prompt_is_counted_from_its_first_word_to_its_last(paper_model):
    questions = some_questions(1, shuffle=None)
    assert parts(paper_model, questions, "text").strip() == (
        "Question: What is this ?\n\nOptions: A. Tea\nB. Rice\nC. Bread\nD. Soup\n\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_padding_is_never_counted_and_the_last_token_is_the_prompts(paper_model):
    questions = vn.QuestionSet(
        vn.Question(picture(i), "What? " * (1 + 5 * i), FOUR, 0, "A", id=f"q{i}") for i in range(3)
    )
    for side in ("left", "right"):
        batch = paper_model.prepare(questions, padding_side=side)
        attention = batch["attention_mask"].bool()
        assert not attention.all()
        for rule in ("content", "image", "text", "last"):
            assert not (batch.tokens.counted(rule) & ~attention).any()
        real = [row.nonzero().flatten() for row in attention]
        assert batch.tokens.last.tolist() == [int(places[-1]) for places in real]
        assert (real[0][0] == 0) == (side == "right")


def test_no_beginning_of_text_is_doubled_or_lost(load):
    model = load("llava_next_mistral")
    batch = model.prepare(asked("What?"))
    assert batch["input_ids"][0].tolist().count(model.tokenizer.bos_token_id) == 1
    writes_it = vn.VLM(model.hf, model.processor, template=lambda text, n: "<s>" + "<image>" * n + f"Q: {text} A:")
    batch = writes_it.prepare(asked("What?"))
    assert batch["input_ids"][0].tolist().count(model.tokenizer.bos_token_id) == 1
    assert squeezed(model, batch["input_ids"][0]) == "<s><image>Q: What? A:"
    leaves_it = vn.VLM(model.hf, model.processor, template=lambda text, n: "<image>" * n + f"Q: {text} A:")
    batch = leaves_it.prepare(asked("What?"))
    assert squeezed(model, batch["input_ids"][0]) == "<s><image>Q: What? A:"
    assert parts(leaves_it, asked("What?"), "text").strip() == "What?"


@pytest.mark.parametrize("shape", ["{image}Q: {text} A:", "Q: {text} {image} A:", "{text}{image}"])
def test_a_template_of_ones_own_may_put_the_picture_before_or_after_the_text(paper_model, shape):
    image = "<|vision_start|><|image_pad|><|vision_end|>" if paper_model.test_name == "qwen2_5_vl" else "<image>"
    model = vn.VLM(
        paper_model.hf, paper_model.processor, template=lambda text, n: shape.format(image=image * n, text=text)
    )
    assert parts(model, asked("What is it?"), "text").strip() == "What is it?"


def test_special_tokens_within_a_text_are_not_counted(paper_model):
    eos = paper_model.tokenizer.eos_token
    assert eos not in parts(paper_model, asked(f"Is {eos} a word?"), "content")
    assert parts(paper_model, asked(f"Is {eos} a word?"), "text").split() == ["Is", "a", "word?"]


@pytest.mark.parametrize("where", ["question", "options"])
def test_an_image_placeholder_in_the_text_is_refused(paper_model, where):
    token = "<|image_pad|>" if paper_model.test_name == "qwen2_5_vl" else "<image>"
    text, options = ("What?", ("Tea", f"{token}!")) if where == "options" else (f"What is {token}?", FOUR)
    with pytest.raises(QuestionError, match="question 'q': its text holds the image placeholder"):
        paper_model.prepare(vn.Question(picture(), text, options, 0, "A", id="q"))


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_questions_without_a_picture_have_text_only(paper_model):
    questions = asked("What?", image=False)
    batch = paper_model.prepare(questions)
    assert "pixel_values" not in batch
    assert not batch.tokens.image.any()
    assert parts(paper_model, questions, "content").strip() == "What?"
    assert batch.vision == (0,)
    assert torch.isfinite(paper_model.hf(**batch).logits).all()


def test_questions_with_two_pictures_count_both(paper_model):
    one = paper_model.prepare(asked("What?"))
    item = vn.Question([picture(1), picture(2)], "What?", FOUR, 0, "A", id="two")
    questions = vn.QuestionSet([item], prompt=plainly)
    two = paper_model.prepare(questions)
    assert int(two.tokens.counted("image").sum()) == 2 * int(one.tokens.counted("image").sum())
    assert two.vision[0] == 2 * one.vision[0]
    assert parts(paper_model, questions, "text").strip() == "What?"
    assert torch.isfinite(paper_model.hf(**two).logits).all()
    space = paper_model.space("vision")
    stats = vn.record(paper_model, questions, space, condition="all", progress=False)
    assert int(stats.tokens[0]) > 0


def test_questions_with_and_without_pictures_are_recorded_apart(paper_model):
    items = [vn.Question(None if i % 2 else picture(i), f"What is {i}?", FOUR, 0, "A", id=f"q{i}") for i in range(5)]
    with pytest.raises(QuestionError, match="questions with and without a picture cannot share a batch"):
        paper_model.prepare(items)
    stats = vn.record(paper_model, items, condition="all", batch_size=2, progress=False)
    parts = [vn.record(paper_model, [item], condition="all", progress=False) for item in items]
    assert stats == sum(parts)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_and_one_pixel_are_encoded(model, mode):
    image = picture().convert("L").convert("I").point(lambda x: x) if mode == "I;16" else picture().convert(mode)
    batch = model.prepare(vn.Question(image, "What?", FOUR, 0, "A"))
    assert torch.isfinite(batch["pixel_values"]).all()
    dot = model.prepare(vn.Question(picture(0, 1, 1), "What?", FOUR, 0, "A"))
    assert torch.isfinite(dot["pixel_values"]).all()


# -- pictures that nobody would look at --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model():
    """A language model without a vision tower, and the processor of the model that it was taken from."""
    from transformers import AutoModelForCausalLM

    from vlmneurons.testing.tiny import tiny_model

    hf, processor = tiny_model("llava_next_qwen2")
    return AutoModelForCausalLM.from_config(hf.config.text_config), processor


NO_TOKENIZER = (
    r"the questions show pictures, and .*, the VLM's processor, takes none: VLM\(model, AutoProcessor\.from_pretrained"
    r"\(name\)\) gives it one that does; to ask without pictures: vlmneurons.study.controls.blind\(questions\)"
)
NO_MODEL = (
    r"the questions show pictures, and Qwen2ForCausalLM takes none: its forward has no argument for them and its "
    r"configuration no vision tower; to ask without pictures: vlmneurons.study.controls.blind\(questions\)"
)


@pytest.mark.parametrize("answer", ["letters", "text", "generate"])
@pytest.mark.parametrize("which", ["tokenizer", "text model", "both"])
def test_questions_with_pictures_are_refused_before_any_forward_by_what_takes_none(
    load, text_model, which, answer, tmp_path
):
    whole = load("llava_next_qwen2")
    hf, processor = text_model
    model = {
        "tokenizer": lambda: vn.VLM(whole.hf, whole.tokenizer),
        "text model": lambda: vn.VLM(hf, processor),
        "both": lambda: vn.VLM(hf, processor.tokenizer, template=lambda text, n: text),
    }[which]()
    forwards = []
    handle = model.hf.register_forward_pre_hook(lambda *_: forwards.append(1))
    questions = some_questions(4, answer=answer)
    mixed = vn.QuestionSet(
        [*(q for q in questions), vn.Question(None, "What?", FOUR, 0, "A", id="bare")], answer=answer
    )
    nothing = vn.NeuronSet(model.space(), [0])
    runs = {
        "prepare": lambda: model.prepare(questions),
        "record": lambda: vn.record(model, questions, condition="all", progress=False),
        "record, mixed": lambda: vn.record(model, mixed, condition="all", progress=False),
        "record_items": lambda: vn.record_items(model, questions, tmp_path, progress=False),
        "knockout": lambda: vn.knockout(model, questions, {"x": nothing}, progress=False),
    }
    try:
        for run in runs.values():
            with pytest.raises(QuestionError, match=NO_MODEL if which == "text model" else NO_TOKENIZER):
                run()
        assert not forwards
        stats = vn.record(model, blind(questions), condition="all", progress=False)
        assert int(stats.tokens.sum()) > 0
    finally:
        handle.remove()


def test_a_processor_that_makes_nothing_of_pictures_is_refused(model):
    class Forgetful(type(model.processor)):
        def __call__(self, images=None, **how):
            data = super().__call__(images=images, **how)
            return type(data)({name: data[name] for name in ("input_ids", "attention_mask")}, tensor_type="pt")

    own = object.__new__(Forgetful)
    vars(own).update(vars(model.processor))
    message = "Forgetful made nothing of the questions' pictures: it gave input_ids, attention_mask"
    with pytest.raises(QuestionError, match=message):
        vn.VLM(model.hf, own).prepare(some_questions(2))


# -- functions of one's own --------------------------------------------------------------------------------------------


def test_the_prompt_function_sees_the_question_and_its_options_as_shown(model):
    seen = []

    def prompt(question, options):
        seen.append((question.id, tuple(options)))
        return "Say it: " + "/".join(options)

    questions = vn.QuestionSet([vn.Question(picture(), "?", FOUR, 0, "A", id="q")], prompt=prompt, shuffle=3)
    shown = tuple(FOUR[index] for index in questions.order(questions[0]))
    assert parts(model, questions, "text") == "Say it: " + "/".join(shown)
    assert set(seen) == {("q", shown)}


def test_a_token_rule_of_ones_own_gets_the_table_and_never_counts_padding(model):
    batch = model.prepare(some_questions(3))
    table = batch.tokens
    assert isinstance(table, TokenTable)
    everything = table.counted(lambda table: torch.ones_like(table.attention))
    assert torch.equal(everything, table.attention)
    assert torch.equal(table.counted(lambda table: table.image), table.counted("image"))
    assert torch.equal(
        table.counted(lambda t: ~t.template | t.image) & ~table.special | table.image, table.counted("content")
    )


def test_a_processor_without_a_chat_template_asks_for_one(model, load, tiny_folder):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(tiny_folder("llava_next_mistral")))
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    bare = vn.VLM(load("llava_next_mistral").hf, processor)
    assert parts(bare, asked("What?"), "text").strip() == "What?"  # the tokenizer has one
    processor.tokenizer.chat_template = None
    with pytest.raises(QuestionError, match="the processor LlavaNextProcessor has no chat template; give VLM"):
        bare.prepare(some_questions(1))
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(QuestionError, match="the chat template does not show the question's text"):
        bare.prepare(some_questions(1))
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}"
        "{{ p['text'] }}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(QuestionError, match="the chat template shows the user's text 2 times; expected once"):
        bare.prepare(asked("What?", image=False))


def test_prompt_and_template_functions_that_forget_to_return_are_told_so(model, unchecked):
    questions = some_questions(1, prompt=lambda question, options: None)
    with pytest.raises(QuestionError, match="question 'q0': the prompt function gave NoneType, not a text"):
        model.prepare(questions)
    forgetful = vn.VLM(model.hf, model.processor, template=lambda text, n: None)
    with pytest.raises(QuestionError, match="the template function gave NoneType, not a text"):
        forgetful.prepare(some_questions(1))


def test_an_empty_list_cannot_be_encoded(model):
    with pytest.raises(QuestionError, match="there are no questions to encode"):
        model.prepare([])


def test_inputs_are_a_mapping_that_every_call_takes(model):
    batch = model.prepare(some_questions(2))
    assert set(batch) >= {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"}
    assert np.array_equal((batch["mm_token_type_ids"] == 1).numpy(), batch.tokens.image.numpy())
    assert model.hf.generate(**batch, max_new_tokens=1, do_sample=False).shape[0] == 2


# -- another family of tokenizers --------------------------------------------------------------------------------------


def metaspace_model(prepend: str) -> vn.VLM:
    """LLaVA with a tokenizer as SentencePiece makes them: spaces are ``▁``, unknown characters fall back to bytes."""
    import string

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import MistralConfig, PreTrainedTokenizerFast

    from vlmneurons.testing import tiny as _tiny

    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁.,:?'[]/\n", *string.ascii_letters]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *(f"▁{c}" for c in string.ascii_uppercase)])}
    merges = [("▁", letter) for letter in string.ascii_uppercase]
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if prepend == "normalizer":
        plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        plain.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend, split=False)
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    plain.add_special_tokens(special)
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    image = {"image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **roles, extra_special_tokens=image)
    config = MistralConfig(**_tiny._text_config(tokenizer, sliding_window=None))
    return vn.VLM(*_tiny._llava_next(tokenizer, config, _tiny.LLAVA_MISTRAL_TEMPLATE))


@pytest.mark.parametrize("prepend", ["normalizer", "always", "first", "never"])
def test_tokens_of_a_sentencepiece_tokenizer_are_told_apart_too(prepend):
    model = metaspace_model(prepend)
    for text in ("What is this?", "  two  ", "这是什么？ é", "", "A"):
        batch = model.prepare(asked(text))
        assert batch["input_ids"][0].tolist().count(1) == 1
        counted = model.tokenizer.convert_ids_to_tokens(batch["input_ids"][0][batch.tokens.counted("text")[0]])
        spelt = [f"<0x{byte:02X}>" for byte in text.encode()] if not text.isascii() else list(text.replace(" ", "▁"))
        assert [token for token in counted if token != "▁"] == [
            token for token in spelt if token not in ("▁", "<0x20>")
        ]
        assert counted.count("▁") == text.count(" ")
    stats = vn.record(model, some_questions(2), condition="all", progress=False)
    assert stats.items.tolist() == [1, 1]
