"""Open questions and graded answers: what is refused, what is scored, and studies whose value is the score."""

import contextlib
import functools
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import vlmneurons as vn
from helpers import picture, some_questions
from recompute_study import Study, check_effects, check_summary, check_table
from test_parts import apart, files, in_parts
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.files.folders import RunFolder
from vlmneurons.look.report import write_report
from vlmneurons.run.readers import Reading
from vlmneurons.run.scoring import score_of
from vlmneurons.study.protocol import Protocol, run_study

KNOCKOUT = ("manifest.json", "answers.parquet", "table.csv", "summary.csv", "knockout.json")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def vowels(text, question):
    """A score that a model of random weights has some of: the share of vowels in what it writes."""
    return sum(letter in "aeiouAEIOU" for letter in text) / max(len(text), 1)


def open_questions(n=24, groups="ABC", **how):
    items = [
        vn.Question(
            picture(i // 2), f"What is {i}?", answers=["Tea", "tea time"], group=groups[i % len(groups)], id=f"q{i}"
        )
        for i in range(n)
    ]
    how = {"answer": vn.Generate(3, scorer=vowels, threshold=0.1), **how}
    return vn.QuestionSet(items, **how)


# -- questions ---------------------------------------------------------------------------------------------------------


def test_an_open_question_has_answers_in_place_of_options():
    item = vn.Question(None, "What?", answers=["tea", "Tee"], group="A")
    assert (item.options, item.answer, item.answers, item.right) == ((), 0, ("tea", "Tee"), "tea")
    assert item.is_open
    assert not item.keeps_order
    assert replace(item, group="B").is_open
    assert item.id != vn.Question(None, "What?", answers=["tea"], group="A").id
    assert item != replace(item, answers=["tea"])
    mixed = vn.QuestionSet([item]).group_by(lambda one: one.answers[0])
    assert mixed.groups == ("tea",)
    assert len(vn.QuestionSet([item]).filter(answers=[("tea", "Tee")])) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"question 'q': a question has 2 to 26 options; got 0\. An open one has none, and answers=\[…\]"),
        ({"answers": []}, "2 to 26 options; got 0"),
        ({"answers": "tea"}, "question 'q': answers must be a list of names; got the single text 'tea'"),
        ({"answers": ["tea", " "]}, "question 'q': one of its answers is empty"),
        ({"answers": ["tea", None]}, "question 'q': answers must be a list of names; one is None"),
        ({"answers": ["tea"], "answer": 2}, "question 'q': an open question has no option 2: leave answer out"),
        ({"answers": ["tea"], "options": ["a"]}, "2 to 26 options; got 1"),
        ({"options": ["a", "b"]}, r"answer -1 is outside the options \(0–1\)"),
        ({"answers": ["te\ud800a"]}, "an answer holds half a character"),
    ],
)
def test_questions_without_options_or_answers_are_refused(fields, message, unchecked):
    with pytest.raises(QuestionError, match=message):
        vn.Question(None, "What?", group="A", id="q", **fields)


def test_open_questions_of_a_table():
    rows = [
        {"question": "What?", "group": "A", "id": "1", "people": ["tea", "tea", "tee"], "answer": "tea"},
        {"question": "Where?", "group": "B", "id": "2", "people": '["at home"]', "answer": None},
        {"question": "Who?", "group": "B", "id": "3", "people": [{"answer": "she", "answer_id": 1}], "answer": None},
    ]
    asked = vn.QuestionSet.from_rows(rows, columns={"answers": "people"})
    assert [item.answers for item in asked] == [("tea", "tea", "tee"), ("at home",), ("she",)]
    assert asked[0].metadata == {"answer": "tea"}  # nothing of a row is lost
    with pytest.raises(QuestionError, match="row 0: answers are texts that the question accepts, at least one; got"):
        vn.QuestionSet.from_rows([{**rows[0], "people": []}], columns={"answers": "people"})
    plain = {"question": "What?", "group": "A", "options": ["a", "b"], "answer": 0, "answers": ["x"]}
    assert vn.QuestionSet.from_rows([plain])[0].metadata == {"answers": ["x"]}  # as it was before


def test_options_for_a_whole_table():
    rows = [{"question": f"Is it {n}?", "group": "AB"[n % 2], "answer": ["yes", "no"][n % 2]} for n in range(4)]
    asked = vn.QuestionSet.from_rows(rows, options=("yes", "no"))
    assert [(item.options, item.right) for item in asked] == [(("yes", "no"), row["answer"]) for row in rows]
    with pytest.raises(QuestionError, match="are for every row, and the table has its own in 'options': leave one out"):
        vn.QuestionSet.from_rows([{**rows[0], "options": ["a", "b"]}], options=("yes", "no"))
    with pytest.raises(QuestionError, match="row 0: answer 'perhaps' is neither an index"):
        vn.QuestionSet.from_rows([{**rows[0], "answer": "perhaps"}], options=("yes", "no"))


def test_options_for_a_folder_and_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["Is it?", "Was it?"], "group": ["A", "B"], "answer": ["no", "yes"], "id": ["1", "2"]}
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    for asked in (
        vn.QuestionSet.from_folder(tmp_path, options=("yes", "no")),
        vn.QuestionSet.from_dataset(datasets.Dataset.from_dict(rows), options=("yes", "no")),
    ):
        assert [item.right for item in asked] == rows["answer"]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_before_anything_is_asked(model, monkeypatch):
    monkeypatch.setattr(type(model.hf), "forward", lambda *a, **k: pytest.fail("the model was run"))
    asked = open_questions(4)
    for answer, name in (("letters", "Letters"), ("text", "TextLikelihood"), ("generate", "Generate")):
        with pytest.raises(QuestionError, match=rf"question 'q0' is open, and {name}\(.* reads which option"):
            vn.record(model, asked, answer=answer)
    with pytest.raises(QuestionError, match=r"question 'q0' has options, and Generate.3, vowels, .* grades"):
        vn.record(model, some_questions(2), answer=asked.answer)
    with pytest.raises(QuestionError, match="question 'q0' has 2 answers; vqa_accuracy compares with ten people's"):
        vn.record(model, asked, answer=vn.Generate(scorer=vn.vqa_accuracy))
    with pytest.raises(QuestionError, match="gives no margin that could be derived"):
        vn.screen(model, asked, {"x": vn.NeuronSet(model.space("language", "post"), [1])})


def test_a_scorer_is_a_function(unchecked):
    with pytest.raises(QuestionError, match=r"scorer is a function \(text, question\) -> float; got 3"):
        vn.Generate(scorer=3)


def test_scorers_say_what_they_are_and_their_code_is_part_of_the_setting(model):
    from vlmneurons.run.identity import name_of_reader

    strict = functools.partial(vn.anls, threshold=0.9)
    assert repr(vn.Generate(5, scorer=strict)) == "Generate(5, anls(threshold=0.9), threshold=0.5)"
    assert repr(vn.Generate()) == "Generate(max_new_tokens=20)"
    made = [name_of_reader(vn.Generate(scorer=one)) for one in (strict, vn.anls, vowels, lambda text, question: 1.0)]
    assert len(set(made)) == 4


@pytest.mark.parametrize(
    ("score", "told"),
    [(math.nan, "nan"), (1.5, "1.5"), ("1", "'1'"), (None, "None"), (-0.1, "-0.1")],
)
def test_a_score_that_is_none_is_refused_with_the_question_and_what_was_done_is_kept(model, score, told):
    def grade(text, question):
        return score if question.id == "q9" else 0.5

    asked = open_questions(12, answer=vn.Generate(2, scorer=grade))
    with pytest.raises(
        QuestionError, match=f"question 'q9': the scorer grade gave {told}; a score is between 0 and 1"
    ) as caught:
        vn.knockout(
            model, asked, {"x": vn.NeuronSet(model.space(), [1])}, batch_size=4, progress=False, on_error="skip"
        )
    assert caught.value.partial.ids == tuple(f"q{n}" for n in range(8))
    np.testing.assert_array_equal(caught.value.partial.scores, np.full((2, 8), 0.5))


def test_a_scorer_that_fails_is_named_with_the_question_and_the_text(model):
    def grade(text, question):
        return {"q0": 1.0}[question.id]

    asked = open_questions(2, answer=vn.Generate(2, scorer=grade))
    with pytest.raises(QuestionError, match=r"question 'q1': the scorer grade failed on the text '.*': KeyError: 'q1'"):
        vn.knockout(model, asked, {"x": vn.NeuronSet(model.space(), [1])}, progress=False)


def test_a_scorer_states_its_own_range(model):
    def stars(text, question):
        return 5 - len(text) % 3

    stars.range = (0, 5)
    asked = open_questions(6, answer=vn.Generate(2, scorer=stars, threshold=4))
    result = vn.knockout(model, asked, {"x": vn.NeuronSet(model.space(), [1])}, progress=False)
    assert (result.scores >= 3).all()
    np.testing.assert_array_equal(result.correct, result.scores >= 4)
    stars.range = (0, 2)
    with pytest.raises(QuestionError, match=r"question 'q0': the scorer stars gave .*; a score is between 0 and 2"):
        vn.record(model, asked, progress=False)


# -- studies -----------------------------------------------------------------------------------------------------------


def switched_off(model, folder, part=None, **how):
    space = model.space()
    masks = {
        "CAS": vn.Selection({name: vn.NeuronSet(space, range(n, 200, 5)) for n, name in enumerate("ABC")}),
        "random": [vn.Selection({g: vn.NeuronSet(space, range(s, 200, 7)) for g in "ABC"}) for s in range(2)],
    }
    how = {"batch_size": 4, "progress": False, **how}
    return vn.knockout(model, open_questions(42), masks, folder=folder, part=part, **how)


def test_a_study_on_scores_killed_with_9_goes_on_joins_from_parts_and_is_recomputed(load, tmp_path, monkeypatch):
    model = load("llava_next_qwen2")
    whole = switched_off(model, tmp_path / "whole")
    written = []

    def dies(self, *args, kept=RunFolder.write):
        kept(self, *args)
        written.append(1)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        monkeypatch.setattr(RunFolder, "write", dies)
        switched_off(model, tmp_path / "killed")

    assert apart(killed) == -signal.SIGKILL
    assert len(list((tmp_path / "killed" / "parts").glob("batch-*"))) == 3
    asked = []
    read = vn.Generate.read

    def counts(self, model, questions, *args):
        asked.extend(item.id for item in questions)
        return read(self, model, questions, *args)

    monkeypatch.setattr(vn.Generate, "read", counts)
    again = switched_off(model, tmp_path / "killed")
    assert {f"q{n}" for n in range(12)}.isdisjoint(asked)  # of three batches of four
    parts = in_parts(switched_off, model, tmp_path)
    joined = vn.KnockoutResult.join(parts, tmp_path / "joined")
    for name in ("killed", "joined"):
        assert files(tmp_path / name, KNOCKOUT) == files(tmp_path / "whole", KNOCKOUT)
    for one in (again, joined):
        np.testing.assert_array_equal(one.scores, whole.scores)
    answers = pd.read_parquet(tmp_path / "whole" / "answers.parquet")
    by_hand = [vowels(text, None) for text in answers["text"]]
    np.testing.assert_array_equal(answers["score"], by_hand)
    np.testing.assert_array_equal(answers["correct"], np.array(by_hand) >= 0.1)
    study = Study(answers, set())
    check_table(study, pd.read_csv(tmp_path / "whole" / "table.csv"))
    check_summary(study, pd.read_csv(tmp_path / "whole" / "summary.csv"), "score")
    check_effects(study, whole.effects(), "score")
    assert (study.masked["graded"] != 0).mean() > 0.2


def test_tables_and_pages_of_scores_say_so(load, tmp_path):
    model = load("llava_next_qwen2")
    result = switched_off(model, None)
    assert result.measure == "score"
    np.testing.assert_array_equal(result.values("score"), result.scores)
    one = result.where("correct").select("CAS").at([2, 0])
    kept = np.flatnonzero(result.scores[0] >= 0.1)[[2, 0]]
    np.testing.assert_array_equal(one.scores, result.scores[:4][:, kept])
    with pytest.raises(MismatchError, match="value='margin': these answers have none"):
        result.effects(value="margin")
    with pytest.raises(MismatchError, match="value='score': these answers have no score; those of open questions do"):
        replace(result, scores=None).summary(value="score")
    own = result.summary(permutations=0).set_index(["selector", "group"])
    assert own.loc[("CAS", "A"), "clean"] == pytest.approx(result.scores[0][np.array(result.groups) == "A"].mean())
    page = write_report(result, tmp_path, permutations=20).read_text(encoding="utf-8")
    assert "The mean score under each mask less the clean one" in page
    assert "Effects over all groups, on right answers" in page
    assert f"<dt>Clean score</dt><dd>{result.scores[0].mean():.3f}</dd>" in page
    figure = result.plot_matrix("CAS")
    assert "Change of the score" in [axis.get_ylabel() for axis in figure.axes] + [
        axis.get_xlabel() for axis in figure.axes
    ]


def test_neurons_are_identified_on_answers_of_a_score_from_the_threshold_on(model):
    asked = open_questions(12)
    clean = vn.knockout(model, asked, {"none": vn.NeuronSet.empty(model.space())}, progress=False)
    for threshold in (0.0, 0.2, 1.0):
        how = {"answer": vn.Generate(3, scorer=vowels, threshold=threshold), "progress": False}
        stats = vn.record(model, asked, condition="correct", **how)
        by_group = pd.Series(clean.scores[0] >= threshold).groupby(list(clean.groups)).sum()
        assert stats.items.tolist() == by_group.tolist()


def test_a_whole_study_of_open_questions(load, tmp_path):
    model = load("llava_next_qwen2")
    settings = {"fractions": (), "alphas": (), "sizes": (), "conditions": (), "repeats": 1, "permutations": 0}
    protocol = Protocol(selectors=("CAS",), fraction=0.2, minimum=1, **settings)
    how = {"answer": vn.Generate(2, scorer=vowels, threshold=0.0)}
    done = run_study(model, open_questions(18, **how), tmp_path, protocol, progress=False)
    assert set(done.others) == {"blind"}
    assert done.knockout.measure == "score"
    assert done.knockout.provenance["chance"] is None
    answers = pd.read_parquet(tmp_path / "knockout" / "answers.parquet")
    check_table(Study(answers, set()), pd.read_csv(tmp_path / "knockout" / "table.csv"))


# -- running text ------------------------------------------------------------------------------------------------------

TEXTS = {
    "en": ["Every one has a right to rest.", "No one shall be held.", "All are born free and equal."],
    "de": ["Jeder hat ein Recht auf Ruhe.", "Niemand darf gehalten werden, nie und nirgends, von niemand.", "Alle."],
}


@torch.inference_mode()
def loss(hf, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")
    return hf(**ids, labels=ids["input_ids"], use_cache=False).loss.item()


def test_the_score_of_a_text_is_the_mean_log_likelihood_of_its_tokens_also_under_masks(paper_model, bare_model):
    texts = vn.QuestionSet.from_texts(TEXTS)
    neurons = vn.NeuronSet.from_indices(paper_model.space(), {1: range(0, 40, 3), 2: range(20)})
    result = vn.knockout(paper_model, texts, {"x": neurons}, batch_size=4, progress=False)
    tokenizer = paper_model.tokenizer

    def off(layer, own):
        def hook(module, args):
            changed = args[0].clone()
            changed[..., own] = 0
            return (changed,)

        return bare_model.model.language_model.layers[layer].mlp.down_proj.register_forward_pre_hook(hook)

    for row in (0, 1):
        handles = [off(layer, own) for layer, own in neurons.by_layer().items()] if row else []
        for place, item in enumerate(texts):
            assert result.scores[row, place] == pytest.approx(-loss(bare_model, tokenizer, item.question), abs=2e-5)
        for handle in handles:
            handle.remove()
    assert result.chosen.max() == 0  # without a threshold all count as right
    assert (result.measure, result.texts) == ("score", None)


def test_texts_of_a_base_model_without_a_chat_template():
    from transformers import MistralConfig, MistralForCausalLM

    from vlmneurons.testing.tiny import tiny_model

    tokenizer = tiny_model("llava_next_mistral")[1].tokenizer
    tokenizer.chat_template = None
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **sizes)).eval()
    model, texts = vn.VLM(hf, tokenizer), vn.QuestionSet.from_texts(TEXTS)
    stats = vn.record(model, texts, condition="all", progress=False)
    for row, group in enumerate(stats.groups):
        lengths = [len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS[group]]  # without what begins a text
        assert stats.tokens[row] == sum(lengths)
    result = vn.knockout(model, texts, {"none": vn.NeuronSet.empty(model.space())}, progress=False)
    expected = [-loss(hf, tokenizer, item.question) for item in texts]
    np.testing.assert_allclose(result.scores[0], expected, atol=2e-5)


def test_texts_are_named_refused_and_told_apart(model):
    texts = vn.QuestionSet.from_texts(TEXTS)
    assert texts.counts() == {"de": 3, "en": 3}
    assert texts[0].question == texts[0].right == TEXTS["en"][0]
    assert repr(vn.RunningText(-2)) == "RunningText(threshold=-2.0)"
    with pytest.raises(QuestionError, match=r"texts\['en'\] must be a list of names; got the single text"):
        vn.QuestionSet.from_texts({"en": "All are born free."})
    with pytest.raises(QuestionError, match="ids must be unique"):
        vn.QuestionSet.from_texts({"en": ["All.", "All."]})
    with pytest.raises(QuestionError, match=r"texts\['de'\] is empty, and the group would be missing: leave it out"):
        vn.QuestionSet.from_texts({"en": ["All are born free."], "de": []})
    with pytest.raises(QuestionError, match="one of its answers is empty"):
        vn.QuestionSet.from_texts({"en": [""]})
    with pytest.raises(QuestionError, match="has options, and RunningText"):
        vn.record(model, some_questions(2), answer="running")
    right = vn.record(model, texts, answer=vn.RunningText(-100.0), progress=False)
    wrong = vn.record(model, texts, answer=vn.RunningText(0.0), condition="wrong", progress=False)
    assert right.items.tolist() == wrong.items.tolist() == [3, 3]
    one = vn.QuestionSet.from_texts({"en": ["a"], "de": ["b"]})
    if not model.tokenizer("a")["input_ids"][1:]:  # this tokenizer begins texts with no token of its own
        with pytest.raises(QuestionError, match="a text of one token has no likelihood: nothing is before it"):
            vn.record(model, one, condition="all", progress=False)


@pytest.mark.parametrize("stated", [(0,), None, "ab", (2, 0), (0, float("nan")), 5, (0, 1, 2)])
def test_a_range_that_is_no_range_is_refused_before_anything_is_asked(stated):
    def grade(text, question):
        return 1.0

    grade.range = stated
    with pytest.raises(QuestionError, match="the range of a scorer is its lowest and highest score; got "):
        vn.Generate(scorer=grade)


def test_a_range_goes_for_a_function_with_bound_arguments_and_may_have_no_end():
    def length(text, question, unit):
        return -len(text) / unit

    asked = vn.Question(None, "?", answers=["tea"], group="A", id="q")
    length.range = (float("-inf"), 0)
    assert score_of(functools.partial(length, unit=2), "text", asked) == -2
    length.range = (-1, 1)
    with pytest.raises(QuestionError, match=r"'q': the scorer length\(unit=2\) gave -2.0; .* between -1 and 1"):
        score_of(functools.partial(length, unit=2), "text", asked)
    for score in (10**400, b"0.5", float("inf")):
        with pytest.raises(QuestionError, match=r"'q': the scorer <lambda> gave .*; a score is between 0 and 1"):
            score_of(lambda text, question, score=score: score, "text", asked)


class Gives(vn.AnswerReader):
    """A reader that gives what it is told, to three questions."""

    shows_options = False

    def __init__(self, reading, grades=False):
        self.reading, self.grades = reading, grades

    def read(self, model, questions, encoded, watch=None):
        with contextlib.nullcontext() if watch is None else watch(encoded, list(range(len(questions)))):
            model.hf(**encoded)
        return self.reading

    def __repr__(self):
        return "Gives()"


NONE, ZEROS = (None,) * 3, (0,) * 3
NAN = torch.nan
READINGS = {
    "a NaN score": (
        (NONE, None, None, torch.tensor([0.5, NAN, 1])),
        r"'q1': Gives\(\) gave the score nan, which is no",
    ),
    "an infinite score": ((NONE, None, None, torch.tensor([0.5, 0, torch.inf])), "'q2': .* the score inf, which is no"),
    "a score for two": ((NONE, None, None, torch.zeros(2)), r"gave graded of the shape \[2\] to 3 questions"),
    "a table of scores": ((NONE, None, None, torch.zeros(3, 1)), r"gave graded of the shape \[3, 1\] to 3 questions"),
    "a text too many": ((NONE, None, ("",) * 4, torch.zeros(3)), r"gave texts of the shape \[4\] to 3 questions"),
    "no scores": ((NONE,), r"grades answers, and gave no scores: Reading\(…, graded=a tensor \[question\]\)"),
    "nothing": (None, r"what Gives\(\) gives is a Reading; got None"),
    "two choices": (((0, 0),), r"gave chosen of the shape \[2\] to 3 questions: one for each is wanted"),
    "no option": (((0, 4, 0),), r"'q1': Gives\(\) gave the choice 4, and there are 0 to 3; None names no option"),
    "what stands for not asked": (((0, 0, -2),), r"'q2': Gives\(\) gave the choice -2, and there are 0 to 3; None"),
    "letters": ((("A", "B", "C"),), r"'q0': Gives\(\) gave a choice, which is a whole number; got 'A'"),
    "right or wrong": (((True,) * 3,), r"'q0': Gives\(\) gave a choice, which is a whole number; got True"),
    "three options": ((ZEROS, torch.zeros(3, 3)), r"'q0': .* the scores \[0.0, 0.0, 0.0\]: a number for each of 4 opt"),
    "NaN for an option": ((ZEROS, torch.tensor([[0.0] * 4] * 2 + [[0, 0, NAN, 0]])), "'q2': .* a number for each of 4"),
}


@pytest.mark.parametrize("name", READINGS)
def test_what_a_reader_of_ones_own_gives_is_looked_at(model, tmp_path, unchecked, name):
    given, told = READINGS[name]
    reading, grades = given and Reading(*given), given is not None and (len(given) == 4 or name == "no scores")
    asked = (open_questions if grades else some_questions)(3, groups="AB").asked(answer=Gives(reading, grades))
    for run in (
        lambda: vn.record(model, asked, progress=False),
        lambda: vn.record_items(model, asked, tmp_path, progress=False),
        lambda: vn.knockout(model, asked, {"x": vn.NeuronSet(model.space(), [1])}, progress=False),
    ):
        with pytest.raises(QuestionError, match=told):
            run()


def test_a_reader_of_ones_own_may_give_lists_numbers_of_numpy_and_minus_one_for_none(model, unchecked):
    asked = some_questions(3, groups="AB").asked(answer=Gives(Reading([0, np.int64(3), -1])))
    assert vn.knockout(model, asked, {"x": vn.NeuronSet(model.space(), [1])}, progress=False).chosen[0].tolist() == [
        0,
        3,
        -1,
    ]
    asked = open_questions(3, groups="AB").asked(answer=Gives(Reading([0, 1, 0], graded=[0.5, 0, 1]), grades=True))
    result = vn.knockout(model, asked, {"x": vn.NeuronSet(model.space(), [1])}, progress=False)
    assert result.scores.tolist() == [[0.5, 0, 1]] * 2
