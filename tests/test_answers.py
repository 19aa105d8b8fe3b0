"""How answers are read: parsing of generated texts, and the three readers against independent computations."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

import vlmneurons as vn
from helpers import picture, some_questions
from vlmneurons.errors import ActivationError, QuestionError
from vlmneurons.run.parsing import parse_answer
from vlmneurons.run.readers import Reading, letter_tokens, reader_of

CITIES = ["Cairo", "Paris", "Rome", "New Rome"]
DISHES = ["A dog", "A cat", "Bread and rice", "Rice"]
NUMBERS = ["2", "4", "6", "8"]
LOCAL = ["京都", "大阪", "パリ", "東京"]
NONE = None


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        # the letter alone, in any dress
        ("B", CITIES, 1),
        ("b", CITIES, 1),
        (" B\n", CITIES, 1),
        ("B.", CITIES, 1),
        ("b)", CITIES, 1),
        ("(b)", CITIES, 1),
        ("[C]", CITIES, 2),
        ("**D**", CITIES, 3),
        ("**D.**", CITIES, 3),
        ("'A'", CITIES, 0),
        ("\\boxed{B}", CITIES, 1),
        ("`C`", CITIES, 2),
        ("Ｂ", CITIES, 1),  # full width
        ("（Ｂ）", CITIES, 1),
        ("B。", CITIES, 1),
        # the letter and more
        ("B. Paris", CITIES, 1),
        ("B) Paris", CITIES, 1),
        ("(B) Paris", CITIES, 1),
        ("B: Paris", CITIES, 1),
        ("B. Rome", CITIES, NONE),  # the letter of one option, the text of another
        ("B, because of the tower", CITIES, 1),
        ("B - Paris", CITIES, 1),
        ("B — Paris", CITIES, 1),
        ("B\n\nThe tower is famous.", CITIES, 1),
        ("(B) because of the tower", CITIES, 1),
        ("B is correct", CITIES, 1),
        ("B is the answer, clearly.", CITIES, 1),
        # a sentence
        ("The answer is (B).", CITIES, 1),
        ("The answer is B", CITIES, 1),
        ("the answer is b.", CITIES, 1),
        ("The correct answer is: C.", CITIES, 2),
        ("The answer is **C**.", CITIES, 2),
        ("The answer is option (C)", CITIES, 2),
        ("Answer: D", CITIES, 3),
        ("Answer:\nD", CITIES, 3),
        ("Option C", CITIES, 2),
        ("option c.", CITIES, 2),
        ("Option B is correct, not option A.", CITIES, 1),
        ("I think option C is wrong. The answer is B.", CITIES, 1),
        ("My choice: A, because it is old.", CITIES, 0),
        ("It must be (D), I guess", CITIES, 3),
        ("答案：B", CITIES, 1),
        ("Respuesta: C", CITIES, 2),
        ("الإجابة: D", CITIES, 3),
        # articles and words are no letters
        ("A dog", DISHES, 0),
        ("A dog.", DISHES, 0),
        ("A cat", DISHES, 1),
        ("The answer is a cat.", DISHES, 1),
        ("Answer a question", CITIES, NONE),
        ("A lovely place", CITIES, NONE),
        ("A-frame house", CITIES, NONE),
        ("D-Day", CITIES, NONE),
        ("Definitely", CITIES, NONE),
        # numbers
        ("2", CITIES, 1),
        ("2.", CITIES, 1),
        ("(3)", CITIES, 2),
        ("Option 2", CITIES, 1),
        ("The answer is 4", CITIES, 3),
        ("٢", CITIES, 1),
        ("0", CITIES, NONE),
        ("5", CITIES, NONE),
        ("1990", CITIES, NONE),
        ("2 of them", CITIES, NONE),
        # options that are numbers: the number is the option, not its place
        ("4", NUMBERS, 1),
        ("4.", NUMBERS, 1),
        ("The answer is 4", NUMBERS, 1),
        ("Answer: 2", NUMBERS, 0),
        ("B", NUMBERS, 1),
        ("3", NUMBERS, 2),
        ("There are 8 of them", NUMBERS, 3),
        # an option's text
        ("Paris", CITIES, 1),
        ("  PARIS! ", CITIES, 1),
        ("It is Paris.", CITIES, 1),
        ("This is New Rome", CITIES, 3),  # the longer of two that contain each other
        ("This is Rome", CITIES, 2),
        ("Bread and rice", DISHES, 2),
        ("Parisian style", CITIES, NONE),
        ("It is not Paris", CITIES, NONE),
        ("It isn't Paris, it is Rome", CITIES, 2),
        ("It is not Paris but Rome.", CITIES, 2),
        ("Cairo or Paris", CITIES, NONE),
        ("B. A dog", ["A cat", "A dog"], 1),
        ("A. A dog", ["A cat", "A dog"], NONE),
        ("A. Cairo\nB. Paris\nC. Rome", CITIES, NONE),
        ("A) Cairo B) Paris", CITIES, NONE),
        ("(A) is wrong", CITIES, NONE),
        ("Not option A.", CITIES, NONE),
        ("答えは大阪です", LOCAL, 1),
        ("パリ", LOCAL, 2),
        ("पालक है", ["पाल", "आलू"], NONE),
        ("यह आलू है", ["पाल", "आलू"], 1),
        ("आलूा", ["पाल", "आलू"], NONE),  # a vowel sign makes it another word
        # nothing that can be told
        ("", CITIES, NONE),
        ("   ", CITIES, NONE),
        ("...", CITIES, NONE),
        ("E", CITIES, NONE),
        ("A or B", CITIES, NONE),
        ("(A) or (B)", CITIES, NONE),
        ("A, B", CITIES, NONE),
        ("A\nB\nC\nD", CITIES, NONE),
        ("Both A and B", CITIES, NONE),
        ("The answer is A or B.", CITIES, NONE),
        ("The answer is not B.", CITIES, NONE),
        ("Option A is incorrect.", CITIES, NONE),
        ("2\n3", CITIES, NONE),
        ("I do not know", CITIES, NONE),
        ("Yes", ["Yes", "yes!"], NONE),
    ],
)
def test_a_generated_text_names_the_option_that_a_careful_reader_would_take(text, options, expected):
    assert parse_answer(text, options) == expected


def test_no_text_however_odd_makes_the_parser_fail_or_take_long():
    generator = np.random.default_rng(0)
    alphabet = list("ABCDabcd()[]*.,:;!- \n\"'#?的ก\u0301\u200f12")
    for _ in range(2000):
        text = "".join(generator.choice(alphabet, generator.integers(0, 12)))
        assert parse_answer(text, CITIES) in (None, 0, 1, 2, 3)
    for text in ("answer " * 2000, "(" * 5000, " " * 5000 + "B", "A" * 5000, "not " * 2000 + "Paris"):
        assert parse_answer(text, CITIES) in (None, 1)


# -- the three readers -------------------------------------------------------------------------------------------------


def ask(model, questions, **how):
    """Reads the questions in one batch."""
    questions = questions.asked(**how)
    reader = reader_of(questions.answer)
    with torch.inference_mode():
        return reader.read(model, questions, reader.encode(model, questions))


def test_letters_are_the_sum_over_the_letters_own_tokens_at_the_last_position(paper_model, load_bare):
    bare = load_bare(paper_model.test_name)
    questions = some_questions(5, shuffle=4)
    reading = ask(paper_model, questions)
    vocabulary = paper_model.tokenizer.get_vocab()
    for row, item in enumerate(questions):
        with torch.inference_mode():
            logits = bare(**paper_model.prepare(questions[row : row + 1])).logits[0, -1].double()
        probability = logits.softmax(-1)
        order = questions.order(item)
        for place, index in enumerate(order):
            letter = "ABCD"[place]
            expected = float(torch.log(probability[vocabulary[letter]] + probability[vocabulary["Ġ" + letter]]))
            assert float(reading.scores[row, index]) == pytest.approx(expected, abs=1e-4)
        assert reading.chosen[row] == int(reading.scores[row].argmax())
    assert reading.texts is None


class Rigged:
    """A stand-in for `VLM.hf` that says one letter, whatever it is asked."""

    def __init__(self, hf, token):
        self.hf, self.token = hf, token

    def __enter__(self):
        def say(_, args, out):
            out = torch.full_like(out, -5.0)
            out[..., self.token] = 5.0
            return out

        self.handle = self.hf.lm_head.register_forward_hook(say)

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize("answer", ["letters", "generate"])
def test_a_letter_shown_is_mapped_back_to_the_questions_own_order(model, letter, answer):
    questions = some_questions(8, shuffle=9)
    token = model.tokenizer.convert_tokens_to_ids(letter)
    with Rigged(model.hf, token):
        reading = ask(model, questions, answer=vn.Generate(max_new_tokens=1) if answer == "generate" else answer)
    assert reading.chosen == tuple(questions.order(item)["ABCD".index(letter)] for item in questions)
    assert len(set(reading.chosen)) > 1
    if answer == "generate":
        assert reading.texts == (letter,) * 8


def test_questions_of_different_numbers_of_options_share_a_batch(model):
    items = [
        vn.Question(picture(n), "What?", tuple(f"option {i}" for i in range(n)), n - 1, "A", id=f"q{n}")
        for n in (2, 5, 3)
    ]
    questions = vn.QuestionSet(items)
    reading = ask(model, questions)
    assert torch.isnan(reading.scores).sum(1).tolist() == [3, 0, 2]
    assert all(choice < len(item.options) for choice, item in zip(reading.chosen, items))
    for row in range(3):
        (alone,) = ask(model, questions[row : row + 1]).chosen
        assert alone == reading.chosen[row]
    margins = reading.margins(questions)
    for row, item in enumerate(items):
        scores = reading.scores[row, : len(item.options)].tolist()
        right = scores.pop(item.answer)
        assert float(margins[row]) == pytest.approx(right - max(scores))


def test_the_margin_is_negative_exactly_where_the_answer_is_wrong(model):
    questions = some_questions(12)
    reading = ask(model, questions)
    right = [choice == item.answer for choice, item in zip(reading.chosen, questions)]
    assert (reading.margins(questions) > 0).tolist() == right
    generated = Reading((None,) * 12, None, ("",) * 12)
    assert torch.isnan(generated.margins(questions)).all()


OPEN_OPTIONS = [
    ("Tea", "Teapot", "Tea with milk and sugar", "Soup"),  # prefixes of each other, many tokens
    ("A", "B", "C", "D"),  # one token each
    ("Rice", "Rice cake", "Rice cakes", "日本のお茶"),
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("prefix", [" ", "\n", ""])
def test_the_likelihood_of_a_text_equals_teacher_forcing_one_option_at_a_time(
    paper_model, load_bare, per_token, prefix
):
    bare = load_bare(paper_model.test_name)
    reader = vn.TextLikelihood(prefix=prefix, per_token=per_token)
    items = [
        vn.Question(picture(n, 24 + 8 * n), "What? " * (n + 1), options, 1, "A", id=f"q{n}")
        for n, options in enumerate(OPEN_OPTIONS)
    ]
    questions = vn.QuestionSet(items, answer=reader)
    reading = ask(paper_model, questions)
    for row, item in enumerate(items):
        prompt = paper_model.encoder.render(item.question, 1)
        for index, option in enumerate(item.options):
            texts = [prompt, prompt + prefix + option]
            with torch.inference_mode():
                short, long = (
                    paper_model.processor(text=[text], images=[list(item.load_images())], return_tensors="pt")
                    for text in texts
                )
                logits = bare(**long).logits[0]
            n = short["input_ids"].shape[1]
            ids = long["input_ids"][0]
            assert torch.equal(ids[:n], short["input_ids"][0])
            steps = [float(log_softmax(logits[t - 1].double(), -1)[ids[t]]) for t in range(n, len(ids))]
            expected = np.mean(steps) if per_token else np.sum(steps)
            assert float(reading.scores[row, index]) == pytest.approx(expected, abs=1e-3)
        assert reading.chosen[row] == int(reading.scores[row].argmax())


def test_single_token_options_cost_one_row_a_question(model):
    questions = some_questions(3, prompt="open")
    letters = vn.QuestionSet(
        [vn.Question(picture(i), "What?", tuple("ABCD"), 0, "A", id=f"q{i}") for i in range(3)], answer="text"
    )
    assert vn.TextLikelihood().encode(model, letters).batch["input_ids"].shape[0] == 3
    assert vn.TextLikelihood().encode(model, questions).batch["input_ids"].shape[0] > 3


def test_a_prefix_that_merges_with_the_prompt_is_refused(load):
    model = load("llava_next_mistral")
    merging = vn.VLM(model.hf, model.processor, template=lambda text, n: "<image>" * n + text + " fo")
    question = vn.Question(picture(), "What?", ("od", "nd"), 0, "A", id="q")
    with pytest.raises(
        QuestionError, match="question 'q': the option 'od' does not continue the prompt token by token"
    ):
        vn.record(merging, [question], answer=vn.TextLikelihood(prefix=""), progress=False)


def test_generation_is_greedy_whatever_the_checkpoint_says_and_failures_are_none(paper_model, load_bare):
    bare = load_bare(paper_model.test_name)
    questions = some_questions(3)
    config = paper_model.hf.generation_config
    config.do_sample, config.num_beams, config.temperature, config.top_p = True, 3, 0.7, 0.5
    try:
        reading = ask(paper_model, questions, answer=vn.Generate(max_new_tokens=5))
    finally:
        config.do_sample, config.num_beams, config.temperature, config.top_p = False, 1, None, None
    for row, item in enumerate(questions):
        inputs = paper_model.prepare(questions[row : row + 1])
        ids = bare.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = paper_model.tokenizer.decode(ids, skip_special_tokens=True)
        assert reading.texts[row] == text
        order = questions.order(item)
        place = parse_answer(text, [item.options[index] for index in order])
        assert reading.chosen[row] == (None if place is None else order[place])
    assert reading.scores is None


def test_logits_that_are_nan_give_no_answer_but_an_error(model):
    questions = some_questions(2)
    handle = model.hf.lm_head.register_forward_hook(lambda _, args, out: out * float("nan"))
    try:
        for answer in ("letters", "text"):
            with pytest.raises(ActivationError, match="the logits of question 'q0' are NaN"):
                ask(model, questions, answer=answer)
    finally:
        handle.remove()


def test_a_tokenizer_without_single_token_letters_is_refused(model):
    assert letter_tokens(model, 4).shape == (4, 2)
    with pytest.raises(
        QuestionError, match=r"no single token for each of the letters ABCDEFGHIJKLMN.*use answer='text'"
    ):
        letter_tokens(type("Stub", (), {"tokenizer": type("T", (), {"get_vocab": lambda self: {"A": 1}})()})(), 14)


def test_a_reader_of_ones_own_needs_only_read(model):
    class First(vn.AnswerReader):
        def read(self, model, questions, encoded, watch=None):
            return Reading((0,) * len(questions))

    questions = some_questions(4)
    assert repr(First()) == "First()"
    assert repr(vn.TextLikelihood(prefix="", per_token=True)) == "TextLikelihood(prefix='', per_token=True)"
    result = vn.knockout(model, questions, {"x": vn.NeuronSet(model.space(), [1])}, answer=First(), progress=False)
    assert result.chosen.tolist() == [[0] * 4] * 2
    assert reader_of("generate") == vn.Generate(max_new_tokens=20)
    with pytest.raises(QuestionError, match="answer='chat' is not a way of reading answers; choose from letters, gen"):
        reader_of("chat")
