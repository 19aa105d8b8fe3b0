"""Scores of open answers, by hand and against independent computations."""

import math

import numpy as np
import pytest

import vlmneurons as vn
from vlmneurons.errors import QuestionError
from vlmneurons.run.scoring import _APOSTROPHES, _edits, accepted, anls, exact_match, score_of, vqa_accuracy, vqa_text


def question(*answers):
    return vn.Question(None, "What?", ("a", "b"), 0, "A", id="q7", metadata={"answers": list(answers)})


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Paris", ["Paris"], 1),
        ("  paris. ", ["Paris"], 1),
        ("Ｐａｒｉｓ", ["Paris"], 1),
        ("New  York", ["new york", "NYC"], 1),
        ("NYC!", ["new york", "NYC"], 1),
        ("Straße", ["STRASSE"], 1),
        ("东京。", ["东京"], 1),
        ("the Paris", ["Paris"], 0),
        ("Paris, France", ["Paris"], 0),
        ("", ["Paris"], 0),
        ("<think>Rome?</think>Paris", ["Paris"], 1),
        ("<think>Paris", ["Paris"], 0),
        ("I say <answer>Paris</answer>", ["Paris"], 1),
        ("\\boxed{Paris}", ["Paris"], 1),
        ("<answer>Paris</answer><answer>Rome</answer>", ["Paris"], 0),
    ],
)
def test_exact_match_forgives_case_spaces_and_punctuation_at_the_ends(text, answers, expected):
    assert exact_match(text, question(*answers)) == expected


@pytest.mark.parametrize(
    ("same", "expected"),
    # k of ten agree: k turns leave one of them out and see k - 1, the others see k
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_people(same, expected):
    asked = question(*["red"] * same, *[f"colour {n}" for n in range(10 - same)])
    assert vqa_accuracy("Red.", asked) == pytest.approx(expected)


def test_vqa_accuracy_is_the_mean_over_people_left_out_one_by_one():
    generator = np.random.default_rng(0)
    for _ in range(200):
        answers = [str(word) for word in generator.choice(["red", "blue", "green", "teal"], generator.integers(4, 12))]
        by_hand = []
        for left_out in range(len(answers)):
            others = answers[:left_out] + answers[left_out + 1 :]
            by_hand.append(min(1, others.count("blue") / 3))
        assert vqa_accuracy("blue", question(*answers)) == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red Car.", "red car"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("hed've", "he'd've"),
        ("he'dve", "he'd've"),
        ("oclock", "o'clock"),
        ("a/b", "b"),  # a space takes the stroke's place, and "a" is an article
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red-ish", "red ish"),
        ("red - ish", "red ish"),
        ("red -ish x-y", "red ish xy"),  # a mark that stands beside a space anywhere goes everywhere
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),
        ("3. 5.", "3 5"),
        ("U.S.A.", "usa"),
        ("\n yes \t", "yes"),
        ("what?!", "what"),
        ("an apple, the pear", "apple pear"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_texts_are_made_alike_as_the_challenge_makes_them(text, expected):
    assert vqa_text(text) == expected


def test_short_forms_lack_one_apostrophe_each():
    assert _APOSTROPHES["wont"] == "won't"
    assert _APOSTROPHES["shouldnt've"] == _APOSTROPHES["shouldn'tve"] == "shouldn't've"
    assert "shouldntve" not in _APOSTROPHES
    assert all(len(form) == len(short) + 1 and form.replace("'", "") == short.replace("'", "")
               for short, form in _APOSTROPHES.items())  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("hello", ["hello"], 1.0),
        ("Hello ", ["hello"], 1.0),
        ("hallo", ["hello"], 0.8),  # one edit of five
        ("helo", ["hello"], 0.8),
        ("hello!", ["hello"], 1 - 1 / 6),
        ("help", ["hello"], 0.6),  # two of five
        ("abcd", ["abxy"], 0.0),  # two of four are not below one half
        ("abcde", ["abcxy"], 0.6),
        ("goodbye", ["hello"], 0.0),
        ("hallo", ["goodbye", "hello"], 0.8),
        ("", ["hello"], 0.0),
        ("coca cola", ["cocacola"], 1 - 1 / 9),
        ("", [""], 1.0),
    ],
)
def test_anls_forgives_edits_of_fewer_than_half_of_the_letters(text, answers, expected):
    assert anls(text, question(*answers)) == pytest.approx(expected)


def test_the_threshold_is_the_users():
    assert anls("abcd", question("abxy"), threshold=0.6) == pytest.approx(0.5)
    assert anls("hello", question("hello"), threshold=0) == 0
    with pytest.raises(QuestionError, match=r"threshold 1.5 is outside of \[0, 1\]"):
        anls("a", question("a"), threshold=1.5)


def test_edits_are_those_of_a_full_table():
    generator = np.random.default_rng(1)
    for _ in range(150):
        one, other = ("".join(generator.choice(list("abc"), generator.integers(0, 9))) for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
        for i in range(1, len(one) + 1):
            for j in range(1, len(other) + 1):
                table[i, j] = min(
                    table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (one[i - 1] != other[j - 1])
                )
        assert _edits(one, other) == table[-1, -1]


def test_scores_lie_between_0_and_1_whatever_the_text():
    generator = np.random.default_rng(2)
    for _ in range(300):
        text = "".join(generator.choice(list("ab ,.'12?é中\n<"), generator.integers(0, 10)))
        for scorer in (exact_match, vqa_accuracy, anls):
            assert 0 <= score_of(scorer, text, question("a", "b", "1,2", "中")) <= 1


@pytest.mark.parametrize("given", [math.nan, -0.1, 1.01, math.inf, "1", None, [1], "right"])
def test_a_score_that_is_none_is_refused_with_the_question(given):
    def mine(text, question):
        return given

    with pytest.raises(QuestionError, match=r"question 'q7': the scorer mine gave .*; a score is between 0 and 1"):
        score_of(mine, "x", question("a"))


@pytest.mark.parametrize("given", [0, 1, 0.25, True, np.float32(0.5), np.int64(1)])
def test_numbers_of_every_kind_are_scores(given):
    assert score_of(lambda text, question: given, "x", question("a")) == float(given)


def test_a_question_without_answers_is_refused(unchecked):
    for metadata in ({}, {"answers": None}, {"answers": []}, {"answers": math.nan}):
        asked = vn.Question(None, "What?", ("a", "b"), 0, "A", id="q7", metadata=metadata)
        for scorer in (exact_match, vqa_accuracy, anls):
            with pytest.raises(QuestionError, match="question 'q7' has no answers that a text could be compared with"):
                scorer("x", asked)
    with pytest.raises(QuestionError, match="question 'q7': answers"):
        accepted(vn.Question(None, "What?", ("a", "b"), 0, "A", id="q7", metadata={"answers": [1, 2]}))
    with pytest.raises(QuestionError, match="question 'q7': answers"):
        accepted(vn.Question(None, "What?", ("a", "b"), 0, "A", id="q7", metadata={"answers": "red"}))
    with pytest.raises(QuestionError, match="question 'q7' has 2 answers; vqa_accuracy compares with ten people's"):
        vqa_accuracy("x", question("a", "b"))
