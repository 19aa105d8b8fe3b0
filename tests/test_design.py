"""Which questions meet which masks, and what is not asked is missing everywhere."""

import json
import os
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import vlmneurons as vn
from helpers import some_questions
from test_effects import random_result, shared
from test_knockout import selection
from vlmneurons.errors import FileFormatError, MismatchError, SelectionError
from vlmneurons.files import tables as _files
from vlmneurons.run.intervention import Intervention
from vlmneurons.study import result as result_module
from vlmneurons.study.controls import random_controls
from vlmneurons.study.design import crossing
from vlmneurons.study.masks import Mask, listed_masks
from vlmneurons.study.result import KnockoutResult

NAMES = [f"g{n}" for n in range(6)]


def asked_about(units: int = 13, groups=NAMES, order: int | None = None) -> vn.QuestionSet:
    """Questions: pictures of each group have one, two or three; two groups share some of theirs."""
    items = [
        vn.Question(
            None, "?", ("a", "b"), 0, group, id=f"{group}-{unit}-{n}",
            image_id=f"both-{unit}" if group in ("g0", "g1") and unit < 4 else f"{group}-{unit}",
        )
        for group in groups for unit in range(units) for n in range(1 + unit % 3)
    ]  # fmt: skip
    if order is not None:
        random.Random(order).shuffle(items)
    return vn.QuestionSet(items)


def masks_of(selector: str, groups, repeats: int = 1) -> list[Mask]:
    return [Mask(selector, repeat, group, 5) for repeat in range(repeats) for group in groups]


STUDY = [
    *masks_of("CAS", NAMES),
    *masks_of("random", NAMES, 3),
    Mask("one set", 0, "all", 5),
    *masks_of("languages", ("x", "y", "z")),
    *masks_of("two", NAMES[:2]),
]


def test_every_question_meets_its_own_mask_and_k_others_and_shares_them_with_its_picture():
    questions = asked_about()
    design = crossing(questions, STUDY, others=3, seed=4)
    for number, item in enumerate(questions):
        met = [mask for mask, row in zip(STUDY, design.meets[:, number], strict=True) if row]
        count = Counter((mask.selector, mask.repeat) for mask in met)
        assert count["CAS", 0] == 4
        assert count["languages", 0] == 3  # there are no more
        assert count["one set", 0] == 1
        assert count["two", 0] == 2
        own = {mask.group for mask in met if mask.selector == "CAS"}
        assert item.group in own
        for repeat in range(3):  # one plan for all selectors of the same groups, and for their repeats
            assert {m.group for m in met if (m.selector, m.repeat) == ("random", repeat)} == own
    by_unit = {}
    for number, item in enumerate(questions):
        by_unit.setdefault((item.group, item.image_id), set()).add(design.meets[:, number].tobytes())
    assert all(len(met) == 1 for met in by_unit.values())
    assert crossing(questions, STUDY, others=None).meets.all()


def test_masks_are_dealt_evenly_and_each_meets_each_picture_equally_often():
    questions = asked_about()
    first = {}
    for number, item in enumerate(questions):
        first.setdefault((item.group, item.image_id), number)
    rows, columns = np.array(list(first.values())), np.array([NAMES.index(group) for group, _ in first])
    times = np.zeros((6, len(questions)))
    for seed in range(300):
        meets = crossing(questions, masks_of("CAS", NAMES), others=2, seed=seed).meets
        times += meets
        units = np.stack([meets[:, rows[columns == n]].sum(1) for n in range(6)], 1)
        assert (np.diag(units) == 13).all()
        cross = units[~np.eye(6, dtype=bool)].reshape(6, 5)
        off = np.array([np.delete(units[:, n], n) for n in range(6)])
        assert (off.max(1) - off.min(1) <= 2).all()
        assert cross.sum() == 6 * 13 * 2
    own = np.array([[item.group == name for item in questions] for name in NAMES])
    shares = times[~own] / 300
    assert abs(shares.mean() - 2 / 5) < 1e-9
    assert abs(shares - 2 / 5).max() < 5 * np.sqrt(0.4 * 0.6 / 300)  # of 1,500 or so


def test_a_plan_does_not_hang_on_the_order_of_questions_or_masks():
    one, other = asked_about(order=1), asked_about(order=2)
    design, again = crossing(one, STUDY, others=2), crossing(other, STUDY[::-1], others=2)
    assert design.digest == again.digest != "full"
    place = {item.id: number for number, item in enumerate(other)}
    columns = [place[item.id] for item in one]
    assert np.array_equal(design.meets, again.meets[::-1][:, columns])
    assert crossing(one, STUDY, others=2, seed=1).digest != design.digest
    assert crossing(one, STUDY, others=3).digest != design.digest
    assert crossing(one, STUDY).digest == "full"
    assert crossing(one, [*STUDY, *masks_of("MAD", NAMES)], others=2).digest == design.digest


def test_designs_that_cannot_be_are_refused_before_anything_is_asked():
    with pytest.raises(
        MismatchError, match="others=6, but a question has at most 5 masks of other groups; give as many"
    ):
        crossing(asked_about(), masks_of("CAS", NAMES), others=6)
    with pytest.raises(MismatchError, match="others 0 is less than 1"):
        crossing(asked_about(), STUDY, others=0)
    few = asked_about(2)
    message = (
        "others=2 masks for each of the 2 pictures of 'g0' reach 4 of its 5 other masks, and the rest would meet no "
        "question of it: give others=3 or more, at least 3 pictures, or leave the group out"
    )
    with pytest.raises(MismatchError, match=message):
        crossing(few, masks_of("CAS", NAMES), others=2)
    assert crossing(few, masks_of("CAS", NAMES), others=3).meets.sum(0).tolist() == [4] * len(few)
    # A control group needs no mask in particular, and adds none to those of others.
    general = vn.QuestionSet([vn.Question(None, "?", ("a", "b"), 0, "general", id="x")])
    with pytest.raises(MismatchError, match="others=6, but a question has at most 5 masks"):
        crossing(asked_about() + general, masks_of("CAS", NAMES), others=6, controls=("general",))
    design = crossing(asked_about() + general, masks_of("CAS", NAMES), others=2, controls=("general",))
    assert design.meets[:, -1].sum() == 2


@pytest.mark.usefixtures("unchecked")
def test_a_design_that_cannot_be_is_refused_before_any_forward_and_nothing_is_lost(model, tmp_path, monkeypatch):
    questions = some_questions(16, groups="ABCD")
    masks = {"CAS": selection(model, groups="ABCD")}
    run, study = tmp_path / "run", tmp_path / "study"
    how = {"batch_size": 4, "progress": False}
    vn.knockout(model, questions, masks, folder=run, others=1, **how)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(model.hf, "forward", lambda *_, **__: 1 / 0)
    few = questions.with_items([item for item in questions if item.group != "A" or item.id in ("q0", "q4")])
    for asked, others, message in (
        (questions, 4, "others=4, but a question has at most 3 masks of other groups"),
        (few, 1, "others=1 masks for each of the 2 pictures of 'A' reach 2 of its 3 other masks, and the rest would"),
    ):
        for folder in (run, tmp_path / "new"):
            with pytest.raises(MismatchError, match=message):
                vn.knockout(model, asked, masks, folder=folder, others=others, **how)
    for others, message in (
        (4, "others=4, but a question has at most 3"),
        (1, "others=1 masks for each of the 2 pict"),
    ):
        with pytest.raises(MismatchError, match=message):
            vn.run_study(model, questions, study, vn.Protocol(others=others, minimum=1), progress=False)
    assert kept == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not study.exists()
    assert not (tmp_path / "new").exists()


def test_a_mask_reaches_every_group_as_soon_as_its_pictures_suffice():
    for units in range(1, 8):
        for others in range(1, 6):
            questions = vn.QuestionSet(
                [vn.Question(None, "?", ("a", "b"), 0, g, id=f"{g}{n}") for g in NAMES for n in range(units)]
            )
            if units * others < 5:
                with pytest.raises(MismatchError, match="the rest would meet no question"):
                    crossing(questions, masks_of("CAS", NAMES), others=others)
            else:
                meets = crossing(questions, masks_of("CAS", NAMES), others=others).meets
                groups = np.array([item.group for item in questions])
                assert all(meets[:, groups == name].any(1).all() for name in NAMES)


# -- what was not asked ------------------------------------------------------------------------------------------------


def partly(seed: int = 0) -> KnockoutResult:
    """A result in which each question met its own mask and one other, and no question of EGY met the mask of BRA."""
    result = random_result(seed, repeats=2)
    random_numbers = np.random.default_rng(seed)
    groups = np.array(result.groups)
    asked = np.array([random_numbers.random(len(groups)) < 0.4 for _ in range(1 + len(result.masks))])
    for row, mask in enumerate(result.masks, start=1):
        asked[row] |= groups == mask.group
        if mask.group == "BRA":
            asked[row] &= groups != "EGY"
    asked[0] = True
    return replace(result, asked=asked)


def test_what_was_not_asked_is_missing_from_every_table_and_never_zero():
    result = partly()
    table = result.table().set_index(["selector", "mask", "group"]).sort_index()
    cell = table.loc[[("CAS", "BRA", "EGY")]].squeeze(axis=0)  # one row; the index is not unique, as controls repeat
    assert cell["n"] == 0
    assert cell[["clean", "ablated", "delta", "flips", "failures", "margin"]].isna().all()
    assert np.isnan(result.matrix("CAS").loc["BRA", "EGY"])
    assert np.isnan(result.matrix("CAS", value="margin").loc["BRA", "EGY"])
    effects = result.effects("CAS").set_index(["mask", "group"]).sort_index()
    row = effects.loc[("BRA", "EGY")]
    assert (row["n"], row["units"], row["few"]) == (0, 0, False)
    assert row[["effect", "low", "high", "p", "p_bh"]].isna().all()
    assert np.isnan(result.pairs("CAS").set_index(["mask", "group"]).sort_index().loc[("BRA", "EGY"), "excess"])
    summary = result.summary().set_index(["selector", "group"]).sort_index()
    assert summary.loc[("CAS", "BRA"), "cross_groups"] == 2
    assert summary.loc[("CAS", "EGY"), "cross_groups"] == 3
    answers = result.answer_table()
    assert len(answers) == result.asked.sum()
    assert not ((answers["mask"] == "BRA") & (answers["group"] == "EGY")).any()
    assert (result.chosen[~result.asked] == -2).all()
    assert np.isnan(result.margins[~result.asked]).all()
    assert np.isnan(result.values()[~result.asked]).all()
    # What stands where nothing was asked changes nothing.
    noise = np.where(result.asked, result.chosen, 3)
    assert replace(result, chosen=noise).summary().equals(result.summary())
    figure = result.plot_matrix("CAS")
    assert "nan" not in " ".join(text.get_text() for text in figure.axes[0].texts)


def test_effects_of_an_incomplete_crossing_are_means_over_the_masks_that_a_question_met():
    result = partly(1)
    groups = np.array(result.groups)
    values = result.values()
    rows = {mask.group: row for row, mask in enumerate(result.masks, start=1) if mask.selector == "CAS"}
    summary = result.summary().set_index(["selector", "group"])
    for group in rows:
        own, cross = [], []
        for question in np.flatnonzero(groups == group):
            own.append(values[rows[group], question] - values[0, question])
            met = [values[row, question] - values[0, question] for name, row in rows.items() if name != group]
            cross.append(np.mean([one for one in met if one == one]) if any(one == one for one in met) else np.nan)
        assert summary.loc[("CAS", group), "self_effect"] == pytest.approx(np.mean(own))
        assert summary.loc[("CAS", group), "cross_effect"] == pytest.approx(np.nanmean(cross))
        assert summary.loc[("CAS", group), "gap"] == pytest.approx(np.nanmean(np.array(own) - cross))


def test_an_incomplete_result_survives_its_files_and_an_old_one_opens(tmp_path):
    result = partly()
    texts = np.array([[f"{n} {m}" for m in range(len(result.ids))] for n in range(len(result.chosen))], object)
    result = replace(result, texts=texts)
    result.save(tmp_path / "part")
    loaded = KnockoutResult.load(tmp_path / "part")
    for name in ("asked", "chosen", "texts"):
        assert np.array_equal(getattr(loaded, name), getattr(result, name))
    assert np.array_equal(loaded.margins, result.margins, equal_nan=True)
    pd.testing.assert_frame_equal(loaded.summary(), result.summary())
    some = loaded.at(range(30)).select("random")
    assert some.asked.shape == (9, 30)
    assert replace(result, asked=np.ones_like(result.asked)).asked is None
    whole = random_result(n=12)
    whole.save(tmp_path / "old")
    about = json.loads((tmp_path / "old" / "knockout.json").read_text())
    about.pop("sha256")
    about["version"] = 3
    (tmp_path / "old" / "knockout.json").write_text(json.dumps(_files.sealed(about)))
    assert np.array_equal(KnockoutResult.load(tmp_path / "old").chosen, whole.chosen)
    about = json.loads((tmp_path / "part" / "knockout.json").read_text())
    about.pop("sha256")
    about["version"] = 3
    (tmp_path / "part" / "knockout.json").write_text(json.dumps(_files.sealed(about)))
    with pytest.raises(FileFormatError, match="answers of shape"):  # which had no missing answers
        KnockoutResult.load(tmp_path / "part")


def test_a_table_of_what_was_asked_that_cannot_be_is_refused():
    result = random_result(n=12)
    with pytest.raises(MismatchError, match=r"of shape \(53, 48\) as the answers.*got the shape \(2, 48\)"):
        replace(result, asked=np.ones((2, 48), dtype=bool), **cut(result, 48))
    missing = np.ones((53, 48), dtype=bool)
    missing[0, :3] = False
    with pytest.raises(MismatchError, match="and 3 questions without a clean answer"):
        replace(result, asked=missing, **cut(result, 48))


def cut(result: KnockoutResult, n: int) -> dict:
    """The fields of a result of its first questions, with 53 runs."""
    part = result.at(range(n))
    runs = np.resize(np.arange(len(part.chosen)), 53)
    masks = tuple(part.masks[(row - 1) % len(part.masks)] for row in range(1, 53))
    return {
        "ids": part.ids, "groups": part.groups, "answers": part.answers, "pictures": part.pictures, "masks": masks,
        "chosen": part.chosen[runs], "margins": part.margins[runs],
    }  # fmt: skip


# -- saving over an older result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(13))
def test_a_save_that_fails_or_is_killed_at_any_step_leaves_one_of_the_two_results_whole(tmp_path, monkeypatch, step):
    old, new = random_result(0, n=12), random_result(1, n=12)
    old.save(tmp_path)
    steps = iter(range(20))

    def failing(function):
        def run(*arguments):
            if next(steps) == step:
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(result_module, "write_parquet", failing(result_module.write_parquet))
        patch.setattr(result_module, "write_text", failing(result_module.write_text))
        patch.setattr(result_module.os, "replace", failing(os.replace))
        try:
            new.save(tmp_path)
            failed = False
        except OSError:
            failed = True
    kept = KnockoutResult.load(tmp_path)
    assert np.array_equal(kept.chosen, old.chosen) or np.array_equal(kept.chosen, new.chosen)
    assert failed or np.array_equal(kept.chosen, new.chosen)
    third = random_result(2, n=12)
    third.save(tmp_path)
    assert np.array_equal(KnockoutResult.load(tmp_path).chosen, third.chosen)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.parquet", "knockout.json", "summary.csv", "table.csv",
    ]  # fmt: skip


def test_a_second_save_killed_in_its_middle_after_a_killed_first_loses_nothing(tmp_path, monkeypatch):
    old, new, third = (random_result(seed, n=12) for seed in range(3))
    old.save(tmp_path)

    def dies_at_the_answers(source, target):
        if target == tmp_path / "answers.parquet":
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(result_module.os, "replace", dies_at_the_answers)
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path)
    assert np.array_equal(KnockoutResult.load(tmp_path).chosen, new.chosen)
    with monkeypatch.context() as patch:
        patch.setattr(result_module, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            third.save(tmp_path)
    assert np.array_equal(KnockoutResult.load(tmp_path).chosen, new.chosen)


# -- ordinary things that are no selection of the questions' groups ----------------------------------------------------


def test_sets_of_no_group_and_selections_of_other_groups_have_effects_and_no_self_effect(model):
    questions = some_questions(30, groups="ABC")
    space = model.space()
    languages = vn.Selection({"German": vn.NeuronSet(space, range(60)), "Telugu": vn.NeuronSet(space, range(60, 120))})
    masks = {"everybody": vn.NeuronSet(space, range(0, 256, 3)), "languages": languages}
    result = vn.knockout(model, questions, masks, progress=False)
    effects = result.effects()
    assert effects[["mask", "kind"]].drop_duplicates().to_numpy().tolist() == [
        ["all", "none"], ["German", "other"], ["Telugu", "other"],
    ]  # fmt: skip
    summary = result.summary()
    assert summary["selector"].tolist() == ["everybody"] * 4 + ["languages"] * 4
    assert summary["self_effect"].isna().all()
    matrix = result.matrix("languages")
    cross = summary[summary["selector"] == "languages"].set_index("group")["cross_effect"]
    assert cross[list("ABC")].tolist() == pytest.approx(matrix.mean().tolist())
    assert result.pairs("languages")["delta"].tolist() == pytest.approx(matrix.to_numpy().reshape(-1).tolist())
    difference = result.difference("everybody", "languages").set_index(["effect", "group"])
    assert difference.loc[("cross_effect", "A"), "difference"] == pytest.approx(
        result.matrix("everybody").loc["all", "A"] - matrix["A"].mean()
    )
    assert np.isnan(difference.loc[("gap", "all"), "difference"])


def test_a_report_of_a_set_for_everybody_is_written(model, tmp_path):
    masks = {"everybody": vn.NeuronSet(model.space(), range(0, 256, 3))}
    result = vn.knockout(model, some_questions(30, groups="ABC"), masks, progress=False)
    assert "everybody" in result.report(tmp_path, permutations=20).read_text(encoding="utf-8")


def test_masks_that_would_pass_for_selectors_are_refused(model):
    chosen = selection(model)
    zero = Intervention(vn.NeuronSet.empty(model.space()), "zero")
    with pytest.raises(
        MismatchError, match=r'such as \{"CAS": selection\}; a bare Selection, without a name, was given'
    ):
        listed_masks(chosen, ["A", "B"], zero)
    with pytest.raises(MismatchError, match=r"a set for each of the groups A, B, and would pass for as many selectors"):
        listed_masks(dict(chosen), ["A", "B", "C"], zero)
    with pytest.raises(MismatchError, match="'x' has neurons of B, but there are no questions of it"):
        listed_masks({"x": chosen}, ["A", "C"], zero)
    assert [mask.group for mask, _ in listed_masks({"x": chosen}, ["C", "D"], zero)] == ["A", "B"]
    strange = vn.Selection({"all": chosen["A"]})
    with pytest.raises(MismatchError, match="'x' has a group 'all', a name that tables use for no group"):
        listed_masks({"x": strange}, ["C", "D"], zero)


def test_answers_under_their_own_mask_are_found_by_comparing_two_columns():
    table = random_result(n=12).answer_table()
    own = table[table["mask"] == table["group"]]
    assert (own["mask"].astype(str) == own["group"].astype(str)).all()
    assert len(own) == (table["mask"].astype(str) == table["group"].astype(str)).sum() > 0


def test_one_uniform_set_a_seed_serves_all_groups_and_layer_matched_ones_are_each_groups_own():
    space = vn.NeuronSpace.from_widths("language", "gate", [50, 50])
    counts = np.random.default_rng(0).integers(0, 9, (3, 100))
    stats = vn.ActivationStatistics.from_counts(space, ["A", "B", "C"], counts, [9] * 3)
    controls = random_controls(stats, {"CAS": vn.CAS(count=10).select(stats)}, repeats=3)
    for one in controls["random"]:
        assert one["A"] == one["B"] == one["C"]
        assert len(one["A"]) == 10
    assert len({one["A"] for one in controls["random"]}) == 3
    assert any(one["A"] != one["B"] for one in controls["layer-matched CAS"])
    fewer = vn.ActivationStatistics.from_counts(space, ["B", "C"], counts[1:], [9] * 2)
    again = random_controls(fewer, {"CAS": vn.CAS(count=10).select(fewer)}, repeats=3)
    assert again["random"][1]["B"] == controls["random"][1]["A"]  # whatever groups there are


@pytest.mark.parametrize(
    ("like", "repeats", "told"),
    [
        (lambda one: {}, 2, "like is a dictionary of one selection or more by name, such as {"),
        (lambda one: one, 2, "like is a dictionary of one selection or more by name"),
        (lambda one: {"CAS": one["A"]}, 2, r"like\['CAS'\] is a Selection; got NeuronSet"),
        (
            lambda one: {"random": one},
            2,
            "a selection is called 'random', as its control would be: give it an",
        ),
        (lambda one: {"layer-matched CAS": one}, 2, "a selection is called 'layer-matched CAS', as its control"),
        (lambda one: {"CAS": one}, 0, "repeats 0 is less than 1"),
        (lambda one: {"CAS": one}, 1.5, "repeats is a whole number; got 1.5"),
    ],
)
def test_controls_that_cannot_be_or_would_take_a_selections_name_are_refused(unchecked, like, repeats, told):
    space = vn.NeuronSpace.from_widths("language", "gate", [50])
    stats = vn.ActivationStatistics.from_counts(space, ["A", "B"], np.arange(100).reshape(2, 50) % 7, [9] * 2)
    one = vn.Selection({name: vn.NeuronSet(space, [1, 2]) for name in "AB"})
    with pytest.raises(SelectionError, match=told):
        random_controls(stats, like(one), repeats=repeats)


# -- what was looked at ------------------------------------------------------------------------------------------------


def test_settings_of_a_sweep_are_marked_and_counted_beside_every_corrected_p():
    result = random_result(n=15)
    for table in (result.summary(), result.effects()):
        swept = table["selector"].str.contains("r=")
        assert table["exploratory"].equals(swept)
        assert set(table[swept]["settings"]) == {4}
        assert set(table[table["selector"] == "CAS"]["settings"]) == {4}
        assert set(table[table["selector"] == "MAD"]["settings"]) == {1}
    assert set(result.pairs("CAS")["settings"]) == {4}
    assert set(result.curve("CAS", "r")["settings"]) == {4}
    told = replace(result, provenance={"selections": dict.fromkeys(result.selectors, "")})
    assert set(told.select("CAS").summary()["settings"]) == {4}  # a part of a study does not forget the rest


def test_two_groups_of_one_picture_are_told_from_two_pictures():
    names = {g: [f"both{n}" for n in range(30)] for g in "AB"}
    together, apart = (
        shared({"A": [3] * 30, "B": [3] * 30}, names=one).summary(value="margin") for one in (names, None)
    )
    assert together["pictures"].tolist() == [30, 30, 30]
    assert apart["pictures"].tolist() == [30, 30, 60]
    assert together.iloc[0]["self_effect_low"] == apart.iloc[0]["self_effect_low"]
    assert together.iloc[2]["self_effect_low"] != apart.iloc[2]["self_effect_low"]
