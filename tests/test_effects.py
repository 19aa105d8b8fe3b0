"""The statistics of a study against SciPy, statsmodels and sums by hand."""

import itertools
import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

import vlmneurons as vn
from helpers import picture
from recompute_study import generator_for
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files import tables as _files
from vlmneurons.study.controls import random_controls, strength_sweep
from vlmneurons.study.effects import estimates, excess, question_effects
from vlmneurons.study.masks import Mask, setting_name, split_setting
from vlmneurons.study.result import KnockoutResult
from vlmneurons.trust.pvalues import benjamini_hochberg, holm, mcnemar

CODES = ("BRA", "EGY", "JPN", "SGP")


def random_result(seed: int = 0, n: int = 40, repeats: int = 5, controls: int = 30) -> KnockoutResult:
    """Answers drawn at random: two selectors, a random control with repeats, a sweep, and a control group."""
    generator = np.random.default_rng(seed)
    sizes = [n - 3 * place for place in range(len(CODES))]
    groups = np.repeat(np.array([*CODES, "general"]), [*sizes, controls])
    order = generator.permutation(len(groups))
    groups = groups[order]
    answers = generator.integers(0, 4, len(groups))

    def asked(right: np.ndarray) -> np.ndarray:
        wrong = (answers + generator.integers(1, 4, len(groups))) % 4
        chosen = np.where(right, answers, wrong)
        return np.where(generator.random(len(groups)) < 0.02, -1, chosen)

    clean = generator.random(len(groups)) < 0.7
    masks, rows = [], [asked(clean)]
    plan = [("CAS", 0, 0.5), ("MAD", 0, 0.7), *(("random", k, 0.05) for k in range(repeats))]
    plan += [(setting_name("CAS", "r", r), 0, r * 20) for r in (0.01, 0.001, 0.02)]
    for selector, repeat, strength in plan:
        for group in CODES:
            harmed = generator.random(len(groups)) < np.where(groups == group, strength, strength / 8)
            masks.append(Mask(selector, repeat, group, 10))
            rows.append(asked(np.where(harmed, False, np.where(generator.random(len(groups)) < 0.05, ~clean, clean))))
    chosen = np.stack(rows)
    margins = np.where(chosen == answers, 1.0, -1.0) * generator.random(chosen.shape)
    ids = tuple(f"q{number}" for number in range(len(groups)))
    return KnockoutResult(
        ids, tuple(groups.tolist()), answers, tuple(masks), chosen, margins, controls=("general",) if controls else ()
    )


@pytest.fixture(scope="module")
def result():
    return random_result()


@pytest.fixture(scope="module")
def kept(result, tmp_path_factory) -> pd.DataFrame:
    """What is on disk, read by pandas alone: all that the independent computations below are given."""
    folder = tmp_path_factory.mktemp("result")
    result.save(folder)
    table = pd.read_parquet(folder / "answers.parquet")
    clean = table[table["run"] == 0].set_index("id")
    table = table[table["run"] > 0].astype({"selector": str, "mask": str, "group": str, "id": str})
    table["clean"] = clean["correct"].reindex(table["id"]).to_numpy()
    table["clean_chosen"] = clean["chosen"].reindex(table["id"]).to_numpy()
    table["change"] = table["correct"].astype(int) - table["clean"].astype(int)
    return table


def test_kept_answers_hold_every_answer_of_every_run(result, kept):
    assert len(kept) == len(result.masks) * len(result.ids)
    assert len(result.answer_table()) == (1 + len(result.masks)) * len(result.ids)
    assert (kept["correct"] == (kept["chosen"] == kept["answer"])).all()
    assert set(kept["chosen"]) == {-1, 0, 1, 2, 3}


def test_tables_and_effects_follow_from_the_kept_answers_by_pandas(result, kept):
    delta = kept.groupby(["selector", "repeat", "mask", "group"], observed=True)["change"].mean()
    table = result.table().set_index(["selector", "repeat", "mask", "group"])
    np.testing.assert_allclose(table["delta"], delta.reindex(table.index))
    failures = (kept["chosen"] < 0).groupby([kept["selector"], kept["repeat"], kept["mask"], kept["group"]]).mean()
    np.testing.assert_allclose(table["failures"], failures.reindex(table.index))
    mean = delta.groupby(["selector", "mask", "group"]).mean()
    summary = result.summary(permutations=10).set_index(["selector", "group"])
    for selector in result.selectors:
        for group in CODES:
            row, others = summary.loc[selector, group], [code for code in CODES if code != group]
            cross = np.mean([mean[selector, other, group] for other in others])
            assert row["self_effect"] == pytest.approx(mean[selector, group, group])
            assert row["cross_effect"] == pytest.approx(cross)
            assert row["cross_caused"] == pytest.approx(np.mean([mean[selector, group, other] for other in others]))
            assert row["gap"] == pytest.approx(mean[selector, group, group] - cross)
            assert row["control_effect"] == pytest.approx(mean[selector, group, "general"])


def test_mcnemar_holm_and_bh_equal_statsmodels(result, kept):
    summary = result.summary().set_index(["selector", "group"])
    for row, group in enumerate(CODES, start=1):
        own = kept[(kept["selector"] == "CAS") & (kept["mask"] == group) & (kept["group"] == group)]
        counts = [[0, (own["change"] > 0).sum()], [(own["change"] < 0).sum(), 0]]
        here = np.array(result.groups) == group
        ours = mcnemar(result.correct[0][here], result.correct[row][here])
        assert ours == pytest.approx(statsmodels_mcnemar(counts, exact=True).pvalue)
        # Sign flips of questions that stand alone are that test by Monte Carlo.
        assert summary.loc[("CAS", group), "p"] == pytest.approx(ours, abs=0.02)
    for selector in ("CAS", "MAD"):
        rows = summary.loc[selector].loc[list(CODES)]
        for name in ("p", "cross_p", "gap_p"):
            np.testing.assert_allclose(rows[f"{name}_holm"], multipletests(rows[name], method="holm")[1])
            np.testing.assert_allclose(rows[f"{name}_bh"], multipletests(rows[name], method="fdr_bh")[1])
            assert np.isnan(summary.loc[(selector, "all"), f"{name}_holm"])
    pairs = result.pairs("CAS")
    assert len(pairs) == 16
    own = pairs["mask"] == pairs["group"]
    for family in (pairs[own], pairs[~own]):  # self effects are one family of tests, the others another
        np.testing.assert_allclose(family["p_holm"], multipletests(family["p"], method="holm")[1])
        np.testing.assert_allclose(family["p_bh"], multipletests(family["p"], method="fdr_bh")[1])
    for row in pairs.itertuples():
        own = kept[(kept["selector"] == "CAS") & (kept["mask"] == row.mask) & (kept["group"] == row.group)]
        assert row.delta == pytest.approx(own["change"].mean())


def test_sign_flips_equal_scipys_permutation_test(result, kept):
    summary = result.summary(permutations=20_000).set_index(["selector", "group"])
    for selector in ("MAD", "random"):
        for group in CODES:
            here = kept[(kept["selector"] == selector) & (kept["group"] == group)]
            by_mask = here.groupby(["mask", "id"], observed=True)["change"].mean().unstack("mask")
            gap = by_mask[group] - by_mask[[code for code in CODES if code != group]].mean(axis=1)
            for values, name in ((by_mask[group], "p"), (gap, "gap_p")):
                expected = scipy_stats.permutation_test(
                    (values.to_numpy(),),
                    lambda x, axis: x.mean(axis=axis),
                    permutation_type="samples",
                    n_resamples=20_000,
                    **generator_for(scipy_stats.permutation_test, 1),
                ).pvalue
                assert summary.loc[(selector, group), name] == pytest.approx(expected, abs=0.015)


def test_a_sign_flip_test_of_one_mask_is_mcnemars_test():
    generator = np.random.default_rng(3)
    before = generator.random((6, 30)) < 0.6
    after = np.where(generator.random((6, 30)) < 0.3, ~before, before)
    change = after.astype(float) - before
    p = estimates(change, [np.arange(30)]).pvalues(40_000, [3])
    np.testing.assert_allclose(p[:, 0], mcnemar(before, after), atol=0.01)
    np.testing.assert_allclose(p[:, 1], mcnemar(before, after), atol=0.01)


def test_sign_flips_are_right_as_often_as_they_say_under_the_null():
    generator = np.random.default_rng(5)
    changes = generator.choice([-1.0, 0.0, 0.0, 1.0], (400, 60))
    members = [np.arange(20), np.arange(20, 60)]
    p = estimates(changes, members).pvalues(500, [5])
    for values in p.T:
        assert 0.02 <= (values <= 0.05).mean() <= 0.08
    assert p.min() >= 1 / 501


def test_intervals_are_those_of_a_regression_on_a_constant_clustered_by_picture():
    result = shared({"A": [4] * 20, "B": [1, 2, 3, 6] * 6})
    summary = result.summary(confidence=0.9).set_index("group")
    change = (result.chosen[1:] == 1).astype(float) - (result.chosen[0] == 1)
    groups, pictures = np.array(result.groups), np.array(result.pictures)
    for row, group in enumerate("AB"):
        here = groups == group
        for name, values in (("self_effect", change[row]), ("gap", change[row] - change[1 - row])):
            units = np.unique(pictures[here], return_inverse=True)[1]
            fit = sm.OLS(values[here], np.ones(here.sum())).fit(
                cov_type="cluster", cov_kwds={"groups": units}, use_t=True
            )
            ours = summary.loc[group, [name, f"{name}_low", f"{name}_high"]].astype(float)
            np.testing.assert_allclose(ours, [fit.params[0], *fit.conf_int(0.1)[0]], atol=1e-12)


def test_an_interval_needs_twelve_pictures_and_twenty_changed_answers():
    for pictures, questions, few in ((11, 8, True), (12, 8, False)):
        result = shared({"A": [questions] * pictures, "B": [8] * 30})
        row = result.effects("CAS").set_index(["mask", "group"]).loc["A", "A"]
        assert (row["units"], row["few"], bool(np.isnan(row["low"]))) == (pictures, few, few)
        assert np.isfinite(row["p"])  # of a self effect, at any number: there are all flips
        assert np.isnan(result.effects("CAS").set_index(["mask", "group"]).loc[("B", "A"), "p"]) == few
        assert ("self_effect" in result.summary().iloc[0]["few"]) == few
    result = random_result(n=40)
    table = result.effects("CAS")
    assert table["few"].equals((table["units"] < 12) | (table["changed"] < 20))
    assert table["low"].isna().equals(table["few"])
    assert not result.effects("CAS", value="margin")["few"].any()
    same = replace(result, chosen=np.where(np.arange(len(result.chosen))[:, None] == 0, result.answers, -1))
    assert same.effects("CAS")["few"].all()  # every answer turned wrong: nothing to tell a spread from
    margins = np.where(np.arange(len(result.chosen))[:, None] % 3 == 1, -1 / 3, 0.0)
    third = replace(result, margins=np.broadcast_to(margins, result.margins.shape))
    assert third.summary(value="margin")["few"].str.contains("cross_effect").any()  # equal but for rounding


def test_conditions_keep_the_questions_that_the_clean_model_answers_right_or_wrong(result, kept):
    for condition, clean in (("correct", True), ("wrong", False)):
        part = kept[(kept["clean"] == clean) & (kept["selector"] == "CAS")]
        expected = part.groupby(["mask", "group"], observed=True)["change"].mean()
        matrix = result.matrix("CAS", condition=condition)
        for mask in CODES:
            for group in (*CODES, "general"):
                assert matrix.loc[mask, group] == pytest.approx(expected[mask, group])
        summary = result.summary(condition=condition, permutations=10)
        assert (summary["self_effect"] * (1 if clean else -1) <= 0).all()
    with pytest.raises(MismatchError, match="condition='easy' does not exist; choose from all, correct, wrong"):
        result.table(condition="easy")


def test_control_groups_stand_apart(result):
    assert result.group_names == CODES
    assert result.control_names == ("general",)
    assert list(result.matrix("CAS").columns) == [*CODES, "general"]
    with_controls = result.summary(permutations=20)
    without = random_result()
    places = [n for n, group in enumerate(without.groups) if group != "general"]
    plain = without.at(places).summary(permutations=20)
    shared = [name for name in plain.columns if not name.startswith("control_effect") and name != "few"]
    pd.testing.assert_frame_equal(with_controls[shared], plain[shared])


def test_random_repeats_are_a_distribution(result, kept):
    found = result.against_random("CAS", "random").set_index(["group", "effect"])
    own = kept[kept["mask"] == kept["group"]]
    delta = own.groupby(["selector", "repeat", "group"], observed=True)["change"].mean()
    for group in CODES:
        random = [delta["random", repeat, group] for repeat in range(5)]
        row = found.loc[group, "self_effect"]
        assert row["value"] == pytest.approx(delta["CAS", 0, group])
        assert row["control_mean"] == pytest.approx(np.mean(random))
        assert row["control_sd"] == pytest.approx(np.std(random, ddof=1))
        assert (row["control_low"], row["control_high"]) == (pytest.approx(min(random)), pytest.approx(max(random)))
        assert row["p"] == (1 + sum(value <= delta["CAS", 0, group] for value in random)) / 6
        assert row["repeats"] == 5
    whole = [np.mean([delta["random", repeat, group] for group in CODES]) for repeat in range(5)]
    assert found.loc[("all", "self_effect"), "control_mean"] == pytest.approx(np.mean(whole))
    with pytest.raises(MismatchError, match="'random' has 5 repeats of groups; a selector is compared as one"):
        result.against_random("random", "CAS")


def test_curves_are_in_the_order_of_their_setting(result):
    curve = result.curve("CAS", "r", permutations=20)
    assert curve["r"].tolist() == [r for r in (0.001, 0.01, 0.02) for _ in range(5)]
    assert set(curve["selector"]) == {"CAS"}
    summary = result.summary(permutations=20).set_index(["selector", "group"])
    assert curve.iloc[-1]["self_effect"] == summary.loc[("CAS [r=0.02]", "all"), "self_effect"]
    with pytest.raises(MismatchError, match="there is no sweep of 'CAS' over 'alpha' here"):
        result.curve("CAS", "alpha")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("CAS", ("CAS", None)),
        ("CAS [r=0.005]", ("CAS", ("r", 0.005))),
        ("layer-matched CAS [alpha=-0.5]", ("layer-matched CAS", ("alpha", -0.5))),
        ("CAS [r=many]", ("CAS [r=many]", None)),
        ("[r=1]", ("[r=1]", None)),
        ("CAS [a] [items=5]", ("CAS [a]", ("items", 5.0))),
    ],
)
def test_names_of_settings_are_read_back(name, parts):
    assert split_setting(name) == parts
    if parts[1] is not None:
        assert split_setting(setting_name(parts[0], *parts[1])) == parts


def test_settings_may_be_numpys_numbers_and_are_a_sweep_all_the_same(unchecked):
    for number in (np.float64(0.1), np.float32(0.5), np.int64(3), torch.tensor(0.5)):
        assert split_setting(setting_name("CAS", "r", number)) == ("CAS", ("r", number.item()))
    space = vn.NeuronSpace.from_widths("language", "gate", [9])
    one = vn.Selection({"A": vn.NeuronSet(space, [1])})
    assert list(strength_sweep("CAS", one, np.array([-1, 0.5]))) == ["CAS [alpha=-1.0]", "CAS [alpha=0.5]"]


def test_excess_takes_out_what_a_mask_does_to_all_and_what_harms_a_group_always():
    generator = np.random.default_rng(0)
    own, receives = generator.normal(size=6), generator.normal(size=6)
    delta = own[:, None] + receives[None, :]
    np.fill_diagonal(delta, -5.0)
    own = np.eye(6, dtype=bool)
    left = excess(delta, own)
    assert np.isnan(np.diag(left)).all()
    np.testing.assert_allclose(left[~np.eye(6, dtype=bool)], 0, atol=1e-12)
    delta[1, 4] -= 1.0
    left = excess(delta, own)
    assert np.nanargmin(left) == 1 * 6 + 4
    np.testing.assert_allclose(np.nansum(left, 0), 0, atol=1e-9)
    np.testing.assert_allclose(np.nansum(left, 1), 0, atol=1e-9)


def test_excess_weighs_cells_by_their_questions_and_leaves_out_what_says_nothing():
    delta = np.array([[np.nan, -0.2, 0.1, np.nan], [-0.1, np.nan, 0.3, np.nan], [0.0, -0.4, np.nan, -0.9]])
    n = np.array([[0, 4, 9, 0], [7, 0, 2, 0], [5, 3, 0, 6]])
    left = excess(delta, np.eye(3, 4, dtype=bool), n)
    rows, columns = np.nonzero(n)
    design = np.zeros((len(rows), 7))
    design[range(len(rows)), rows] = design[range(len(rows)), 3 + columns] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularMatrixWarning)  # which says what this design is; older releases do not
        fit = sm.WLS(delta[rows, columns], design, weights=n[rows, columns].astype(float)).fit()
    free = ~((rows == 2) & (columns == 3))  # the only cell of its group: whatever it is, it is fitted
    np.testing.assert_allclose(left[rows, columns][free], fit.resid[free], atol=1e-12)
    assert np.isnan(left[2, 3])
    assert np.isfinite(left).sum() == free.sum()


def test_effects_of_questions_by_hand():
    change = np.array([[-1.0, 0.0, 1.0, np.nan], [0.0, -1.0, np.nan, 1.0], [-1.0, -1.0, 0.0, 0.0]])
    found = question_effects(change, ["A", "B", "C"], ["A", "A", "B", "D"])
    np.testing.assert_allclose(found[0], [-1, 0, np.nan, np.nan])  # the third was not asked under its own mask
    np.testing.assert_allclose(found[1], [-0.5, -1, 0.5, 0.5])
    np.testing.assert_allclose(found[2], [-0.5, 1, np.nan, np.nan])
    found = question_effects(change[:2], ["A", "all"], ["A", "A", "B", "D"])  # a set of no group is no other group's
    np.testing.assert_allclose(found[1], [np.nan, np.nan, 1, np.nan])
    found = question_effects(change[:1], ["all"], ["A", "A", "B", "D"])
    np.testing.assert_allclose(found[1], change[0])
    assert np.isnan(found[0]).all()


def test_a_question_effect_over_all_groups_weighs_groups_alike():
    values = np.array([[1.0, 0.0, 1.0, 0.0, 4.0, 2.0, np.nan]])
    found = estimates(values, [np.arange(4), np.arange(4, 7)], np.array([0, 0, 1, 1, 2, 3, 3]))
    np.testing.assert_allclose(found.value, [[0.5, 3.0, 1.75]])
    assert found.n.tolist() == [[4, 2, 6]]
    assert found.units.tolist() == [[2, 2, 4]]
    assert found.changed.tolist() == [[2, 2, 4]]
    # The first group's pictures are alike; the second's sums are 1 from their mean: 2 / 1 * (1 + 1) / 2 ** 2.
    np.testing.assert_allclose(found.variance, [[0, 1, 0.25]])
    np.testing.assert_allclose(found.freedom[0, [0, 1]], 1)


def test_corrections_leave_unknown_values_unknown():
    values = [0.01, float("nan"), 0.04, 0.03]
    known = [0.01, 0.04, 0.03]
    for correct, method in ((holm, "holm"), (benjamini_hochberg, "fdr_bh")):
        corrected = correct(values)
        assert np.isnan(corrected[1])
        np.testing.assert_allclose(corrected[[0, 2, 3]], multipletests(known, method=method)[1])
    assert benjamini_hochberg([]).shape == (0,)


def test_texts_controls_and_layers_survive_the_files(tmp_path):
    result = random_result(n=12)
    masks = tuple(Mask(m.selector, m.repeat, m.group, m.size, "scale 1.5", (3, 7)) for m in result.masks)
    texts = np.array(
        [[f"text {n} {m}\t\u0000é" for m in range(len(result.ids))] for n in range(1 + len(masks))], object
    )
    whole = KnockoutResult(
        result.ids, result.groups, result.answers, masks, result.chosen, result.margins, {}, texts, ("general",)
    )
    whole.save(tmp_path)
    loaded = KnockoutResult.load(tmp_path)
    assert loaded.texts.tolist() == texts.tolist()
    assert (loaded.masks, loaded.controls) == (masks, ("general",))


def test_random_controls_match_the_selection_in_size_and_layers():
    import vlmneurons as vn

    space = vn.NeuronSpace.from_widths("language", "gate", [50, 50])
    stats = vn.ActivationStatistics.from_counts(
        space, ["A", "B"], np.random.default_rng(0).integers(0, 9, (2, 100)), [9, 9]
    )
    chosen = {"CAS": vn.CAS(count=10).select(stats)}
    controls = random_controls(stats, chosen, repeats=6)
    assert {name: len(given) for name, given in controls.items()} == {"random": 6, "layer-matched CAS": 6}
    assert len({given["A"] for given in controls["random"]}) == 6
    for given in controls["layer-matched CAS"]:
        assert all(given[group].per_layer() == chosen["CAS"][group].per_layer() for group in "AB")


# -- questions that share a picture ------------------------------------------------------------------------------------


def shared(sizes: dict[str, list[int]], seed: int = 0, names: dict[str, list[str]] | None = None) -> KnockoutResult:
    """A result of two masks in which questions about one picture fare alike: ``sizes[group]`` questions a picture."""
    random = np.random.default_rng(seed)
    groups, pictures, right = [], [], []
    for group, counts in sizes.items():
        for number, size in enumerate(counts):
            clean, ablated = random.random() < 0.8, random.random((2,)) < 0.5
            for _ in range(size):
                noise = random.random(2) < 0.15
                right.append([clean, *(ablated ^ noise)])
                groups.append(group)
                pictures.append(names[group][number] if names else f"{group}{number}")
    chosen = np.where(np.array(right).T, 1, 2)
    masks = tuple(Mask("CAS", 0, group, 5) for group in ("A", "B"))
    ids = tuple(f"q{n}" for n in range(len(groups)))
    return KnockoutResult(
        ids,
        tuple(groups),
        np.ones(len(groups), dtype=np.int64),
        masks,
        chosen,
        np.where(chosen == 1, 1.0, -1.0),
        pictures=tuple(pictures),
    )


def drawn_by_hand(result: KnockoutResult, effect: str, resamples: int = 4000) -> np.ndarray:
    """Effects in resamples of pictures, one resample at a time, with lists: no code of the library."""
    random = np.random.default_rng(99)
    change = (result.chosen[1:] == 1).astype(float) - (result.chosen[0] == 1)
    of_picture: dict[str, list[int]] = {}
    for place, name in enumerate(result.pictures):
        of_picture.setdefault(name, []).append(place)
    groups = {name: sorted({result.groups[place] for place in places}) for name, places in of_picture.items()}
    strata = [
        [of_picture[name] for name in of_picture if groups[name] == ["A"]],
        [of_picture[name] for name in of_picture if groups[name] == ["B"]],
        [of_picture[name] for name in of_picture if groups[name] == ["A", "B"]],
    ]
    own = np.array(result.groups)
    found = []
    for _ in range(resamples):
        places = [
            place
            for stratum in strata
            if stratum
            for picture in random.integers(0, len(stratum), len(stratum))
            for place in stratum[picture]
        ]
        in_a, in_b = (np.array([place for place in places if own[place] == group]) for group in "AB")
        if not len(in_a) or not len(in_b):
            continue
        selves = change[0, in_a].mean(), change[1, in_b].mean()
        others = change[1, in_a].mean(), change[0, in_b].mean()
        each = [one if effect == "self_effect" else one - other for one, other in zip(selves, others, strict=True)]
        found.append([*each, np.mean(each)])
    return np.array(found)


@pytest.mark.parametrize(
    "result",
    [
        shared({"A": [4] * 20, "B": [1, 2, 3, 6] * 6}),
        shared({"A": [3] * 15, "B": [3] * 15}, names={g: [f"both{n}" for n in range(15)] for g in "AB"}),
        shared(
            {"A": [2] * 16, "B": [3] * 14},
            names={"A": [f"p{n}" for n in range(16)], "B": [f"p{n + 8}" for n in range(14)]},
        ),
    ],
    ids=["within groups", "all pictures in both groups", "some pictures in both groups"],
)
def test_intervals_are_as_wide_as_resampling_pictures_with_all_their_questions(result):
    summary = result.summary(value="margin", confidence=0.5).set_index("group")  # too narrow for skewness to matter
    for effect in ("self_effect", "gap"):
        by_hand = 2 * drawn_by_hand(result, effect).std(0)  # a right answer has margin 1, a wrong one -1
        for place, group in enumerate(["A", "B", "all"]):
            units = summary.loc[group, "pictures"]
            reach = summary.loc[group, f"{effect}_high"] - summary.loc[group, effect]
            error = reach / scipy_stats.t.ppf(0.75, units - 1)
            assert error == pytest.approx(by_hand[place] * np.sqrt(units / (units - 1)), rel=0.12), f"{effect} {group}"
    pairs, summary = result.pairs("CAS", value="margin"), result.summary(value="margin").set_index("group")
    pairs = pairs.set_index(["mask", "group"])
    assert pairs.loc[("A", "A"), "delta_low"] == pytest.approx(summary.loc["A", "self_effect_low"], abs=1e-12)


def test_questions_about_one_picture_make_an_interval_wider_than_as_many_pictures_would():
    result = shared({"A": [8] * 12, "B": [8] * 12})
    by_picture = result.summary().set_index("group")
    by_question = result.summary(cluster="question").set_index("group")

    def width(table):
        return (table["self_effect_high"] - table["self_effect_low"]).loc["A"]

    assert width(by_picture) > 1.5 * width(by_question)
    assert by_picture.loc["A", ["n", "pictures"]].tolist() == [96, 12]
    assert by_picture.loc["all", "pictures"] == 24
    assert by_picture.loc["A", "gap_p"] >= by_question.loc["A", "gap_p"]
    with pytest.raises(MismatchError, match="cluster='image' does not exist; choose from picture, question"):
        result.summary(cluster="image")


def test_where_every_question_has_its_own_picture_nothing_changes():
    result = shared({"A": [1] * 30, "B": [1] * 25})
    unknown = replace(result, pictures=None)
    for condition in ("all", "correct"):
        ours, before = result.summary(condition=condition), unknown.summary(condition=condition)
        assert ours.equals(before)
        assert ours.equals(result.summary(condition=condition, cluster="question"))
        assert result.pairs("CAS", condition=condition).equals(unknown.pairs("CAS", condition=condition))


def test_sign_flips_of_pictures_are_those_of_every_possible_flip():
    changes = np.array([[-1.0, -1, 0, 1, -1, -1, 0, -1]])
    clusters = np.array([0, 0, 1, 1, 2, 3, 3, 0])  # picture 0 and 3 are of both groups
    members = [np.array([0, 1, 2, 3, 5]), np.array([4, 6, 7])]
    (p,) = estimates(changes, members, clusters).pvalues(20_000, [0])
    flips = list(itertools.product([-1, 1], repeat=4))

    def exact(weight):
        sums = [sum(weight[n] * changes[0, n] * signs[clusters[n]] for n in range(8)) for signs in flips]
        observed = sum(weight * changes[0])
        return np.mean([abs(value) >= abs(observed) - 1e-12 for value in sums])

    weights = [np.isin(np.arange(8), own) / len(own) for own in members]
    assert p[:2] == pytest.approx([exact(weight) for weight in weights], abs=0.01)
    assert p[2] == pytest.approx(exact(sum(weights)), abs=0.01)


def test_the_study_knows_the_pictures_of_its_questions_and_keeps_them(model, tmp_path):
    items = [
        vn.Question(picture(n // 2), f"Which {n}?", ("Tea", "Rice"), n % 2, "AB"[n // 4], id=f"q{n}") for n in range(8)
    ]
    items.append(vn.Question(None, "Blind?", ("Tea", "Rice"), 0, "A", id="blind"))
    items.append(vn.Question(lambda: (tmp_path / "none").read_bytes(), "Broken?", ("Tea", "Rice"), 0, "A", id="broken"))
    masks = {"m": vn.NeuronSet.empty(model.space())}
    result = vn.knockout(model, items, masks, on_error="skip", progress=False)
    names = dict(zip(result.ids, result.pictures, strict=True))
    assert len(set(names.values())) == 5
    assert all(names[f"q{n}"] == names[f"q{n + 1}"] for n in (0, 2, 4, 6))
    result.save(tmp_path / "saved")
    assert vn.KnockoutResult.load(tmp_path / "saved").pictures == result.pictures
    table = pd.read_parquet(tmp_path / "saved" / "answers.parquet")
    assert table[table["run"] == 0]["picture"].tolist() == list(result.pictures)
    replace(result, pictures=None).save(tmp_path / "saved")  # then every question counts as one of its own
    assert vn.KnockoutResult.load(tmp_path / "saved").pictures is None
    about = json.loads((tmp_path / "saved" / "knockout.json").read_text())
    del about["sha256"]
    about["pictures"] = ["one"]
    (tmp_path / "saved" / "knockout.json").write_text(json.dumps(_files.sealed(about)))
    with pytest.raises(FileFormatError, match="9 questions with 1 pictures"):
        vn.KnockoutResult.load(tmp_path / "saved")
