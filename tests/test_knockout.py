"""The study: every table follows from the kept answers, and masks are run as they should be."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

import vlmneurons as vn
from helpers import logits_of, picture, some_questions
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.files import tables as _files
from vlmneurons.run.readers import Letters, Reading
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult
from vlmneurons.trust.pvalues import holm


def selection(model, seed=0, size=20, groups="AB") -> vn.Selection:
    space = model.space()
    generator = np.random.default_rng(seed)
    return vn.Selection(
        {group: vn.NeuronSet(space, generator.choice(len(space), size, replace=False)) for group in groups},
        selector=f"test {seed}",
    )


@pytest.fixture(scope="module")
def study(load):
    """A result of real runs: three kinds of masks on three groups."""
    model = load("qwen2_5_vl")
    questions = some_questions(30, groups="ABC")
    masks = {
        "CAS": selection(model, 0, 60, "ABC"),
        "random": [selection(model, seed, 60, "ABC") for seed in (1, 2, 3)],
        "one set": vn.NeuronSet(model.space(), range(0, 256, 3)),
        "nothing": vn.NeuronSet.empty(model.space()),
    }
    return model, questions, masks, vn.knockout(model, questions, masks, batch_size=7, progress=False)


def made(correct: dict[str, list[list[bool]]], masks: list[Mask]) -> KnockoutResult:
    """A result with given right and wrong answers: ``correct[group][run][question]``, run 0 clean."""
    groups = tuple(group for group, runs in correct.items() for _ in runs[0])
    right = np.concatenate([np.array(runs) for runs in correct.values()], 1)
    answers = np.ones(len(groups), dtype=np.int64)
    return KnockoutResult(
        tuple(f"q{i}" for i in range(len(groups))),
        groups,
        answers,
        tuple(masks),
        np.where(right, 1, 2),
        np.where(right, 1.0, -1.0),
    )


# -- the runs ----------------------------------------------------------------------------------------------------------


def test_every_answer_equals_that_of_the_model_ablated_by_hand(study):
    model, questions, masks, result = study
    assert result.ids == tuple(item.id for item in questions)
    assert result.groups == tuple(item.group for item in questions)
    assert result.answers.tolist() == [item.answer for item in questions]
    assert [(mask.selector, mask.repeat, mask.group, mask.size) for mask in result.masks] == [
        *(("CAS", 0, group, 60) for group in "ABC"),
        *(("random", repeat, group, 60) for repeat in range(3) for group in "ABC"),
        ("one set", 0, "all", 86),
        ("nothing", 0, "all", 0),
    ]
    sets = [None, *masks["CAS"].values(), *(part for one in masks["random"] for part in one.values())]
    letters = [[model.tokenizer.convert_tokens_to_ids(form + letter) for form in ("", "Ġ")] for letter in "ABCD"]
    for run, neurons in enumerate(sets):
        for number, item in list(enumerate(questions))[::7]:
            inputs = model.prepare(questions[number : number + 1])
            if neurons is None:
                logits = logits_of(model.hf, inputs)
            else:
                with vn.Ablation(model, neurons):
                    logits = logits_of(model.hf, inputs)
            shown = logits[0, -1].log_softmax(-1)[torch.tensor(letters)].logsumexp(-1)
            order = questions.order(item)
            assert result.chosen[run, number] == order[int(shown.argmax())]
            scores = {index: float(shown[place]) for place, index in enumerate(order)}
            margin = scores.pop(item.answer) - max(scores.values())
            assert result.margins[run, number] == pytest.approx(margin, abs=1e-3)


def test_an_empty_mask_gives_the_clean_answers_and_full_masks_do_something(study):
    *_, result = study
    assert np.array_equal(result.chosen[-1], result.chosen[0])
    assert np.array_equal(result.margins[-1], result.margins[0])
    assert (result.chosen[1:-1] != result.chosen[0]).any()
    assert 0 < result.correct[0].mean() < 1


def test_equal_masks_run_once_and_the_clean_model_once(model):
    questions = some_questions(6)
    chosen = selection(model)
    empty = vn.NeuronSet.empty(model.space())
    masks = {
        "one": chosen,
        "same": vn.Selection(dict(chosen), selector="again"),
        "twice": [chosen, chosen],
        "single": chosen["A"],
        "nothing": empty,
    }
    forwards = []
    handle = model.hf.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        result = vn.knockout(model, questions, masks, batch_size=3, progress=False)
    finally:
        handle.remove()
    assert len(forwards) == 2 * (1 + 2)  # two batches, each clean and under two different sets
    rows = {(mask.selector, mask.repeat, mask.group): result.chosen[n + 1] for n, mask in enumerate(result.masks)}
    assert len(rows) == 2 + 2 + 4 + 1 + 1
    for name, repeat in (("same", 0), ("twice", 0), ("twice", 1)):
        assert np.array_equal(rows[name, repeat, "B"], rows["one", 0, "B"])
    assert np.array_equal(rows["single", 0, "all"], rows["one", 0, "A"])


def test_results_do_not_depend_on_the_batch_size_and_keep_the_order_of_the_questions(study):
    model, questions, masks, result = study
    mixed = [*questions[:5], vn.Question(None, "No picture?", ("Tea", "Rice"), 0, "A", id="bare"), *questions[5:9]]
    only = {"CAS": masks["CAS"]}
    one = vn.knockout(model, mixed, only, batch_size=4, progress=False)
    assert one.ids == tuple(item.id for item in mixed)
    kept = [n for n, name in enumerate(one.ids) if name != "bare"]
    assert np.array_equal(one.chosen[:, kept], result.chosen[:4, :9])
    two = vn.knockout(model, mixed, only, batch_size=1, progress=False)
    assert np.array_equal(one.chosen, two.chosen)


@pytest.mark.parametrize("how", [{"mode": "scale", "factor": 3.0}, {"mode": "replace", "values": 2.0, "at": "gate"}])
def test_other_interventions_are_passed_on(model, how):
    questions = some_questions(4)
    neurons = vn.NeuronSet(model.space(), range(100))
    result = vn.knockout(model, questions, {"x": neurons}, progress=False, **how)
    with vn.Ablation(model, neurons, **how):
        expected = vn.knockout(model, questions, {"x": vn.NeuronSet.empty(model.space())}, progress=False)
    np.testing.assert_allclose(result.margins[1], expected.margins[0])
    assert result.provenance["intervention"]["mode"] == how["mode"]


def test_generated_answers_count_failures(model):
    class Says(vn.AnswerReader):
        def read(self, model, questions, encoded, watch=None):
            with torch.inference_mode():
                clean = bool((model.hf(**encoded).logits == self.clean).all())
            return Reading(tuple(1 if clean else None for _ in questions), None, ("",) * len(questions))

    questions = some_questions(4)
    reader = Says()
    with torch.inference_mode():
        reader.clean = model.hf(**model.encoder(questions, padding_side="right")).logits
    neurons = vn.NeuronSet(model.space(), range(100))
    table = vn.knockout(model, questions, {"x": neurons}, answer=reader, progress=False).table()
    assert table["failures"].tolist() == [1.0, 1.0]
    assert table["flips"].tolist() == [1.0, 1.0]
    assert table["margin"].isna().all()
    assert table["ablated"].tolist() == [0.0, 0.0]
    result = vn.knockout(model, questions, {"x": selection(model)}, answer="generate", progress=False)
    assert result.matrix("x", value="margin").shape == (2, 2)
    assert np.isnan(result.summary()["self_margin"]).all()


# -- the tables --------------------------------------------------------------------------------------------------------


def test_the_table_equals_a_recomputation_with_pandas(study):
    *_, result = study
    long = pd.concat(
        pd.DataFrame(
            {
                "selector": mask.selector,
                "repeat": mask.repeat,
                "mask": mask.group,
                "group": result.groups,
                "answer": result.answers,
                "clean_choice": result.chosen[0],
                "choice": result.chosen[row],
                "margin": result.margins[row] - result.margins[0],
            }
        )
        for row, mask in enumerate(result.masks, start=1)
    )
    long["clean"] = long.clean_choice == long.answer
    long["ablated"] = long.choice == long.answer
    long["flips"] = long.choice != long.clean_choice
    long["right_to_wrong"] = long.clean & ~long.ablated
    long["wrong_to_right"] = ~long.clean & long.ablated
    long["wrong_to_wrong"] = ~long.clean & ~long.ablated & long.flips
    keys = ["selector", "repeat", "mask", "group"]
    names = ["clean", "ablated", "flips", "right_to_wrong", "wrong_to_right", "wrong_to_wrong", "margin"]
    expected = long.groupby(keys)[names].mean().sort_index()
    table = result.table().set_index(keys).sort_index()
    assert table.index.equals(expected.index)
    pd.testing.assert_frame_equal(table[names], expected, check_dtype=False)
    np.testing.assert_allclose(table["delta"], expected["ablated"] - expected["clean"])
    np.testing.assert_allclose(table["delta"], expected["wrong_to_right"] - expected["right_to_wrong"])
    assert set(table["n"]) == {10}
    assert (table["failures"] == 0).all()
    assert result.accuracy == long.groupby("group")["clean"].mean().to_dict()


def test_the_matrix_averages_repeats(study):
    *_, result = study
    table = result.table()
    for name in ("CAS", "random", "one set"):
        matrix = result.matrix(name)
        assert list(matrix.columns) == ["A", "B", "C"]
        for mask in matrix.index:
            for group in matrix.columns:
                cells = table[(table.selector == name) & (table["mask"] == mask) & (table["group"] == group)]
                assert matrix.loc[mask, group] == pytest.approx(cells["delta"].mean())
    assert list(result.matrix("one set", value="flips").index) == ["all"]
    with pytest.raises(MismatchError, match="there is no selector 'MAD' here; there are CAS, random, one set, nothing"):
        result.matrix("MAD")
    with pytest.raises(MismatchError, match="value 'accuracy' is not a numeric column of the table; it has neurons, n"):
        result.matrix("CAS", value="accuracy")


def test_effects_equal_the_published_definitions(study):
    *_, result = study
    summary = result.summary().set_index(["selector", "group"])
    assert list(dict.fromkeys(summary.index.get_level_values(0))) == ["CAS", "random", "one set", "nothing"]
    for group in "ABC":  # a set of no group has no self effect, but an effect on every group
        row = summary.loc["one set", group]
        assert np.isnan(row[["self_effect", "gap", "cross_caused", "p"]].astype(float)).all()
        assert row["cross_effect"] == pytest.approx(result.matrix("one set").loc["all", group])
    for name in ("CAS", "random"):
        delta = result.matrix(name).to_numpy()  # [mask, group], both sorted
        margin = result.matrix(name, value="margin").to_numpy()
        flips = result.matrix(name, value="flips").to_numpy()
        for c, group in enumerate("ABC"):
            others = [m for m in range(3) if m != c]
            row = summary.loc[name, group]
            assert row["self_effect"] == pytest.approx(delta[c, c])
            assert row["cross_effect"] == pytest.approx(np.mean([delta[m, c] for m in others]))
            assert row["cross_caused"] == pytest.approx(np.mean([delta[c, e] for e in others]))
            assert row["gap"] == pytest.approx(delta[c, c] - np.mean([delta[m, c] for m in others]))
            assert row["self_margin"] == pytest.approx(margin[c, c])
            assert row["cross_margin"] == pytest.approx(np.mean([margin[m, c] for m in others]))
            assert row["flips"] == pytest.approx(flips[c, c])
            assert row["n"] == 10
        overall = summary.loc[name, "all"]
        assert overall["self_effect"] == pytest.approx(np.diag(delta).mean())
        assert overall["gap"] == pytest.approx(summary.loc[name].loc[list("ABC"), "gap"].mean())
        assert overall["n"] == 30


def test_p_values_are_sign_flips_corrected_by_holm(study):
    *_, result = study
    summary = result.summary().set_index(["selector", "group"])
    expected = []
    for row, group in enumerate("ABC", start=1):
        own = np.array(result.groups) == group
        change = result.correct[row][own].astype(int) - result.correct[0][own]
        worse, better = int((change < 0).sum()), int((change > 0).sum())
        assert worse + better <= 10  # few enough that every flip is made: then it is McNemar's exact test
        tail = scipy_stats.binom.cdf(min(worse, better), worse + better, 0.5)
        expected.append(min(1.0, 2 * tail) if worse + better else 1.0)
        assert summary.loc[("CAS", group), "p"] == pytest.approx(expected[-1])
    order = np.argsort(expected, kind="stable")
    running, corrected = 0.0, [0.0] * 3
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (3 - rank) * expected[place]))
        corrected[place] = running
    assert summary.loc["CAS"].loc[list("ABC"), "p_holm"].tolist() == pytest.approx(corrected)
    assert summary.loc["random"].loc[list("ABC"), "p"].notna().all()
    assert np.isnan(summary.loc[("CAS", "all"), "p_holm"])
    assert result.summary(permutations=0)["p"].isna().all()


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9, float("nan"), 0.001]), [1.0, 1.0, float("nan"), 0.003])
    assert holm([]).shape == (0,)


def test_intervals_of_questions_that_stand_alone_are_students():
    generator = np.random.default_rng(0)
    clean = generator.random(200) < 0.8
    hurt = clean & (generator.random(200) < 0.5)
    other = generator.random(200) < 0.8
    result = made(
        {"A": [list(clean), list(hurt), list(clean)], "B": [list(other)] * 3},
        [Mask("CAS", 0, "A", 5), Mask("CAS", 0, "B", 5)],
    )
    summary = result.summary().set_index("group")
    change = hurt.astype(float) - clean
    row = summary.loc["A"]
    expected = scipy_stats.ttest_1samp(change, 0).confidence_interval(0.95)
    assert row["self_effect"] == pytest.approx(change.mean())
    assert [row["self_effect_low"], row["self_effect_high"]] == pytest.approx(list(expected))
    assert row["cross_effect"] == 0
    assert np.isnan([row["cross_effect_low"], row["cross_effect_high"]]).all()  # nothing changed: nothing to tell it by
    assert row["few"] == "cross_effect, cross_caused"
    assert summary.loc["all", "self_effect"] == pytest.approx(change.mean() / 2)
    narrow = result.summary(confidence=0.5).set_index("group").loc["A"]
    assert row["self_effect_low"] < narrow["self_effect_low"] < narrow["self_effect_high"] < row["self_effect_high"]
    pd.testing.assert_frame_equal(result.summary(seed=1), result.summary(seed=1))
    with pytest.raises(MismatchError, match=r"confidence 1 is outside \(0, 1\)"):
        result.summary(confidence=1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        clean, after = generator.random(100) < 0.9, generator.random(100) < 0.6
        result = made(
            {"A": [list(clean), list(after), list(clean)], "B": [[True] * 20] * 3},
            [Mask("x", 0, "A", 1), Mask("x", 0, "B", 1)],
        )
        row = result.summary(permutations=0).iloc[0]
        held += row["self_effect_low"] <= -0.3 <= row["self_effect_high"]
    assert held >= 51  # 95 % of 60 is 57


def test_flips_are_told_apart_by_hand():
    masks = [Mask("x", 0, "A", 1), Mask("x", 0, "B", 1)]
    result = KnockoutResult(
        tuple("abcdef"),
        ("A", "A", "A", "A", "A", "B"),
        np.zeros(6, dtype=np.int64),
        tuple(masks),
        np.array([[0, 0, 1, 1, 1, 0], [0, 2, 0, 2, 1, -1], [0] * 6]),
        np.zeros((3, 6)),
    )
    row = result.table().iloc[0]
    assert (row["clean"], row["ablated"]) == (0.4, 0.4)
    assert row["flips"] == 0.6
    assert (row["right_to_wrong"], row["wrong_to_right"], row["wrong_to_wrong"]) == (0.2, 0.2, 0.2)
    assert row["delta"] == pytest.approx(0.0)
    assert result.table().iloc[1]["failures"] == 1.0


def test_a_selection_of_one_group_only_has_no_cross_effect_on_itself(model):
    result = vn.knockout(model, some_questions(4), {"x": selection(model, groups="A")}, progress=False)
    row = result.summary().set_index("group").loc["A"]
    assert np.isnan(row["cross_effect"])
    assert np.isnan(row["gap"])
    assert np.isfinite(row["self_effect"])
    assert np.isfinite(row["cross_caused"])


# -- what is refused, and what is kept when something fails ------------------------------------------------------------


def test_studies_that_make_no_sense_are_refused_before_anything_runs(model, unchecked):
    questions, chosen = some_questions(4), selection(model)
    one_group = questions.filter(group="A")
    cases = [
        (one_group, {"x": chosen}, {}, QuestionError, "needs questions of at least two; got A"),
        ([], {"x": chosen}, {}, QuestionError, "needs questions of at least two; got none"),
        (questions, {}, {}, MismatchError, "masks are a mapping from names to selections"),
        (questions, chosen["A"], {}, MismatchError, "masks are a mapping from names to selections"),
        (
            questions,
            chosen,
            {},
            MismatchError,
            r'such as \{"CAS": selection\}; a bare Selection, without a name, was given',
        ),
        (
            questions,
            dict(chosen),
            {},
            MismatchError,
            r'each of the groups A, B, .*: give them under one name, \{"CAS": vn',
        ),
        (questions, {"x": 5}, {}, MismatchError, "mask 'x' is a int; give a Selection or a NeuronSet"),
        (questions, {"x": [5]}, {}, MismatchError, "mask 'x' is a int; give a Selection or a NeuronSet"),
        (
            questions,
            {"x": selection(model, groups="AZ")},
            {},
            MismatchError,
            "'x' has neurons of Z, but there are no q",
        ),
        (questions, {"x": chosen}, {"batch_size": 0}, QuestionError, "batch_size 0 is less than 1"),
        (questions, {"x": chosen}, {"on_error": "?"}, QuestionError, r"on_error='\?' does not exist"),
        (
            questions.group_by(lambda q: "all" if q.group == "A" else "B"),
            {"x": chosen},
            {},
            QuestionError,
            "named 'all'",
        ),
    ]
    space = vn.NeuronSpace.from_widths("language", "gate", [32, 32])
    for neurons in (vn.NeuronSet(space, [1]), vn.NeuronSet.empty(space)):
        cases.append((questions, {"x": neurons}, {}, MismatchError, "these neurons are not of this model: language.l"))
    for asked, masks, how, kind, message in cases:
        with pytest.raises(kind, match=message):
            vn.knockout(model, asked, masks, progress=False, **how)


def test_questions_that_cannot_be_asked_are_skipped_or_carry_the_partial_result(model):
    questions = some_questions(6)
    bad = vn.Question("missing.png", "Bad?", ("x", "y"), 0, "A", id="bad")
    spoiled = [*questions[:4], bad, *questions[4:]]
    masks = {"x": selection(model)}
    clean = vn.knockout(model, questions, masks, progress=False)
    with pytest.raises(QuestionError, match=r"question 'bad': the picture 'missing.png' cannot be opened") as caught:
        vn.knockout(model, spoiled, masks, batch_size=2, progress=False)
    partial = caught.value.partial
    assert partial.ids == ("q0", "q1", "q2", "q3")
    assert np.array_equal(partial.chosen, clean.chosen[:, :4])
    assert len(partial.summary()) == 3
    result = vn.knockout(model, spoiled, masks, batch_size=3, on_error="skip", progress=False)
    assert result.ids == clean.ids
    assert np.array_equal(result.chosen, clean.chosen)
    assert result.provenance["skipped"] == ["bad"]


def test_a_partial_result_without_questions_or_with_one_group_can_still_be_looked_at(model):
    bad = vn.Question("missing.png", "Bad?", ("x", "y"), 0, "B", id="bad")
    masks = {"x": selection(model)}
    for first in ([], [vn.Question(picture(), "What?", ("x", "y"), 0, "A", id="good")]):
        asked = [*first, bad, vn.Question(picture(), "What?", ("x", "y"), 0, "A", id="last")]
        with pytest.raises(QuestionError) as caught:
            vn.knockout(model, asked, masks, batch_size=1, progress=False)
        partial = caught.value.partial
        assert partial.ids == tuple(item.id for item in first)
        assert repr(partial).startswith("KnockoutResult(1 questions of 1" if first else "KnockoutResult(no questions")
        assert len(partial.table()) == 2 * len(first)
        assert len(partial.summary()) == (2 if first else 0)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_result_survives_its_files(study, tmp_path):
    *_, result = study
    result.save(tmp_path / "study")
    loaded = KnockoutResult.load(tmp_path / "study")
    assert (loaded.ids, loaded.groups, loaded.masks) == (result.ids, result.groups, result.masks)
    for name in ("answers", "chosen", "margins"):
        assert np.array_equal(getattr(loaded, name), getattr(result, name))
    assert dict(loaded.provenance) == json.loads(json.dumps(result.provenance))
    pd.testing.assert_frame_equal(loaded.summary(), result.summary())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "study" / "table.csv"), result.table(), check_dtype=False)
    assert repr(loaded) == repr(result)


def without(name):
    return lambda about: about.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("kind"), "does not hold a knockout result: 'kind'"),
        (without("masks"), "does not hold a knockout result: 'masks'"),
        (lambda about: about.update(kind="other"), "kind 'other', version 4"),
        (lambda about: about.update(version=5), "kind 'vlmneurons knockout', version 5"),
        (lambda about: about["ids"].pop(), r"answers of shape \(15, 30\) where the index says \(15, 29\)"),
        (lambda about: about["groups"].pop(), "30 questions with 29 groups"),
        (lambda about: about["masks"].pop(), r"where the index says \(14, 30\)"),
        (lambda about: about["masks"][0].update(size="many"), "does not hold a knockout result"),
        (lambda about: about.update(provenance=None), "does not hold a knockout result"),
    ],
)
def test_files_that_were_changed_are_refused(study, tmp_path, damage, message):
    *_, result = study
    result.save(tmp_path)
    about = json.loads((tmp_path / "knockout.json").read_text())
    del about["sha256"]
    damage(about)
    (tmp_path / "knockout.json").write_text(json.dumps(_files.sealed(about)))
    with pytest.raises(FileFormatError, match=message):
        KnockoutResult.load(tmp_path)


def test_an_answer_or_a_mask_that_was_changed_is_noticed(study, tmp_path):
    *_, result = study
    result.save(tmp_path)
    text = (tmp_path / "knockout.json").read_text()
    (tmp_path / "knockout.json").write_text(json.dumps(json.loads(text)))  # other white space, the same content
    assert KnockoutResult.load(tmp_path).masks == result.masks
    (tmp_path / "knockout.json").write_text(text.replace('"selector": "CAS"', '"selector": "LAP"', 1))
    with pytest.raises(FileFormatError, match="the content does not agree with its checksum"):
        KnockoutResult.load(tmp_path)
    (tmp_path / "knockout.json").write_text(text)
    table = pd.read_parquet(tmp_path / "answers.parquet")
    table.loc[3, "chosen"] += 1
    table.to_parquet(tmp_path / "answers.parquet", index=False)
    with pytest.raises(FileFormatError, match=r"answers\.parquet does not agree with its checksum in knockout\.json"):
        KnockoutResult.load(tmp_path)


def test_files_that_are_missing_cut_or_no_files_of_this_kind_are_refused(study, tmp_path):
    *_, result = study
    with pytest.raises(FileFormatError, match="does not hold a knockout result"):
        KnockoutResult.load(tmp_path / "nowhere")
    result.save(tmp_path)
    whole = (tmp_path / "answers.parquet").read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        (tmp_path / "answers.parquet").write_bytes(data)
        with pytest.raises(FileFormatError, match="does not hold a knockout result"):
            KnockoutResult.load(tmp_path)
    (tmp_path / "answers.parquet").write_bytes(whole)
    for text in ("", "[1, 2]", "null", "[" * 100_000, '"kind"'):
        (tmp_path / "knockout.json").write_text(text)
        with pytest.raises(FileFormatError, match="does not hold a knockout result"):
            KnockoutResult.load(tmp_path)


def test_the_matrix_is_drawn(study):
    *_, result = study
    figure = result.plot_matrix("CAS")
    assert len(figure.axes) >= 1


# -- results made by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("groups", ("A",) * 3, r"groups of 4 questions and 2 masks has the shape \(4,\); got the shape \(3,\)"),
        ("pictures", tuple("abcde"), r"pictures of .* has the shape \(4,\); got the shape \(5,\)"),
        ("answers", np.zeros(5, dtype=np.int64), r"answers of .* has the shape \(4,\); got the shape \(5,\)"),
        ("chosen", np.zeros((2, 4), dtype=np.int64), r"chosen of .* has the shape \(3, 4\); got the shape \(2, 4\)"),
        ("margins", np.zeros((3, 1)), r"margins of .* has the shape \(3, 4\); got the shape \(3, 1\)"),
        ("texts", np.full((3, 5), "A", dtype=object), r"texts of .* the shape \(3, 4\); got the shape \(3, 5\)"),
        ("scores", np.zeros(4), r"scores of .* has the shape \(3, 4\); got the shape \(4,\)"),
        ("asked", np.ones((3, 5), dtype=bool), r"asked is .* of shape \(3, 4\) .* got the shape \(3, 5\)"),
    ],
)
def test_a_result_whose_parts_are_not_of_one_length_is_refused(name, value, message):
    masks = [Mask("x", 0, group, 1) for group in "AB"]
    whole = made({"A": [[True, False]] * 3, "B": [[True, True]] * 3}, masks)
    with pytest.raises(MismatchError, match=message):
        replace(whole, **{name: value})


# -- margins that are infinite -----------------------------------------------------------------------------------------


class Certain(Letters):
    """The letters, read of a model that gives the wrong options of one question the probability 0."""

    def score(self, model, questions, encoded, logits):
        reading = super().score(model, questions, encoded, logits)
        scores = reading.scores.clone()
        for row, item in enumerate(questions):
            if item.id == "q1":
                scores[row, [n for n in range(len(item.options)) if n != item.answer]] = -torch.inf
        return replace(reading, scores=scores)


def test_an_option_of_probability_zero_is_counted_and_no_mean_is_taken_of_infinite_margins(model, tmp_path):
    questions = some_questions(8)
    chosen = selection(model, 0, 60)
    result = vn.knockout(model, questions, {"x": chosen}, answer=Certain(), progress=False)
    place, group = result.ids.index("q1"), "B"
    assert np.isposinf(result.margins[:, place]).all()
    assert np.isfinite(np.delete(result.margins, place, 1)).all()
    table, summary = result.table(), result.summary().set_index("group")
    of_group = table["group"] == group
    assert table["infinite"].tolist() == of_group.astype(int).tolist()
    assert table["margin"].isna().tolist() == of_group.tolist()
    assert summary["infinite"].to_dict() == {"A": int(group == "A"), "B": int(group == "B"), "all": 1}
    for name in ("self_margin", "cross_margin"):
        assert summary[name].isna().tolist() == (summary["infinite"] > 0).tolist()
    message = r"value='margin': 3 margins are infinite or undefined, of 1 of 8 questions \('q1'\), as an option has "
    for refused in (
        lambda: result.values("margin"),
        lambda: result.summary(value="margin"),
        lambda: result.effects(value="margin"),
        lambda: result.matrix("x", value="margin"),
        lambda: vn.compare({"one": result, "other": result}, value="margin"),
    ):
        with pytest.raises(MismatchError, match=message + "probability 0: no mean of them is a number. Measure value="):
            refused()
    # Without the question, all is as if it had never been asked.
    others = result.at([n for n in range(8) if n != place])
    plain = vn.knockout(model, questions, {"x": chosen}, progress=False).at([n for n in range(8) if n != place])
    pd.testing.assert_frame_equal(others.summary(value="margin"), plain.summary(value="margin"))
    pd.testing.assert_frame_equal(others.table(), plain.table())
    assert "infinite" not in others.summary()
    # Files keep them, and a report says why it has no effects on the margin.
    result.save(tmp_path / "result")
    loaded = vn.KnockoutResult.load(tmp_path / "result")
    np.testing.assert_array_equal(loaded.margins, result.margins)
    assert "infinite" in pd.read_csv(tmp_path / "result" / "summary.csv")
    page = loaded.report(tmp_path / "report").read_text(encoding="utf-8")
    assert "3 margins are infinite or undefined" in page


def test_infinite_margins_count_under_the_masks_that_they_were_met_under():
    masks = [Mask("x", 0, group, 1) for group in "AB"]
    result = made({"A": [[True, True]] * 3, "B": [[True, True]] * 3}, masks)
    margins = result.margins.copy()
    margins[2, 0] = -np.inf  # of A, under the mask of B
    margins[1, 3] = np.nan  # of B, under the mask of A: both options had probability 0
    result = replace(result, margins=margins)
    cells = result.table().set_index(["mask", "group"])
    assert cells["infinite"].to_dict() == {("A", "A"): 0, ("A", "B"): 1, ("B", "A"): 1, ("B", "B"): 0}
    assert cells["margin"].isna().to_dict() == (cells["infinite"] > 0).to_dict()
    assert result.summary().set_index("group")["infinite"].to_dict() == {"A": 1, "B": 1, "all": 2}
    with pytest.raises(MismatchError, match=r"2 margins are infinite or undefined, of 2 of 4 questions \('q0', 'q3'\)"):
        result.effects(value="margin")


def test_a_screen_of_an_infinite_margin_is_refused(model):
    masks = {"x": vn.NeuronSet.empty(model.space())}
    with pytest.raises(QuestionError, match=r"question 'q1' has the margin inf, as an option has probability 0"):
        vn.screen(model, some_questions(3), masks, answer=Certain(), progress=False)
