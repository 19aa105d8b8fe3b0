"""Intervals, tests and planning by simulation: samples of ``benchmarks/coverage.py`` and
``power.py``, whose tables are in the docs. In ``.ci/nightly``, all of them.
"""

import importlib.util
import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

import vlmneurons as vn
from helpers import often
from vlmneurons.errors import MismatchError


def benchmark(request, name):
    path = request.config.rootpath / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def coverage(request):
    return benchmark(request, "coverage")


@pytest.fixture(scope="module")
def power(request):
    return benchmark(request, "power")


USUAL = [("correct", 2, "4", 60), ("margin", None, "1–7", 14), ("margin", 2, "2", 30), ("margin", 2, "1", 12)]
NIGHTLY = [*itertools.product(("correct", "margin"), (None, 2), ("1", "2", "4", "1–7"), (12, 33, 100))]


@pytest.mark.parametrize(("value", "others", "questions", "pictures"), often(USUAL, NIGHTLY))
def test_intervals_hold_the_truth_and_tests_find_nothing_where_nothing_is(coverage, value, others, questions, pictures):
    design = coverage.Design(often(5, 8), pictures, questions, others)
    found = coverage.simulated(design, value, often(80, 600), often(60, 1000), seed=7)
    print(*coverage.HEAD, coverage.row(value, others, questions, pictures, found), sep="\n")
    if (value, questions, pictures) != ("correct", "1", 12):  # nothing but the mean over groups has an interval there
        assert found["gap all"].share > 0.9
        assert np.isfinite(found["gap all"].number)
    names = ("self", "cross", "gap", "self all", "cross all")
    assert value == "correct" or all(found[name].share == 1 and np.isfinite(found[name].number) for name in names)
    assert coverage.outside(found, errors=3) == {}
    assert found["bias"].number < 4
    assert found["p"].number <= 0.05 + 3 * found["p"].error
    p = coverage.null_p(design, value, often(60, 1000), seed=8)[:, 0, 0]
    # p of answers have few values, and are large rather than small; those of margins are uniform.
    how = {"alternative": "greater"} if value == "correct" else {}
    assert scipy_stats.kstest(p, "uniform", **how).pvalue > 1e-3


@pytest.mark.parametrize(
    ("value", "pictures", "questions", "between", "target"),
    often(
        [("margin", 30, 2, 0.5, 0.8), ("correct", 60, 1, 0.0, 0.8)],
        [
            (*design, target)
            for design in [
                ("margin", 30, 2, 0.5),
                ("margin", 15, 1, 0.5),
                ("correct", 60, 1, 0.0),
                ("correct", 30, 4, 0.0),
            ]
            for target in (0.5, 0.8, 0.95)
        ],
    ),
)
def test_a_difference_is_found_with_the_power_that_detectable_says_and_no_others_are(
    power, value, pictures, questions, between, target
):
    effect = power.effect_of(value, pictures, questions, between, target)
    found = power.found(value, pictures, questions, between, effect, often(40, 200))
    shares = {name: one.mean() for name, one in found.items()}
    print(f"{value} {pictures} x {questions}, planted {effect:.3f} at power {target}: {shares}")
    # The formula is an approximation: a sign flip test is not quite a t test.
    assert abs(shares["planted"] - target) <= 3 * np.sqrt(target * (1 - target) / found["planted"].size) + 0.02
    for name in ("self", "cross", "any self", "any cross"):  # of "any", p are corrected
        assert shares[name] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / found[name].size)


def test_what_is_detectable_by_hand():
    how = {"questions": 3, "groups": 10, "k": 4, "spread": 0.3, "others": 0.1, "within": 0.5, "between": 0.2}
    table = vn.detectable(40, **how, tests=10, value="margin")
    quantiles = scipy_stats.t.ppf([1 - 0.05 / 20, 0.8], 39).sum(), scipy_stats.t.ppf([1 - 0.05 / 20, 0.8], 390).sum()
    variances = {
        "self_effect": 0.09,
        "cross_effect": 0.01 * (0.2 + 0.8 / 4),
        "gap": 0.09 + 0.004 - 2 * 0.2 * 0.3 * 0.1,
        "difference": 2 * 0.8 * 0.09,
    }
    for row in table.itertuples():
        error = np.sqrt(variances[row.effect] * (1 + 2 * 0.5) / 120)
        assert row.one_group == pytest.approx(quantiles[0] * error)
        assert row.all_groups == pytest.approx(quantiles[1] * error / np.sqrt(10))
    # Answers move in steps, and more than the effect of them must change: here an effect of 0.18 does, whose changes
    # have at least the variance that a share of 0.18 has.
    answers = vn.detectable(40, **how, tests=10).set_index("effect")
    steps = {"cross_effect": 480, "gap": 480}
    for row in table[table["effect"].isin(steps)].itertuples():
        found = answers.loc[row.effect]
        assert found["one_group"] == pytest.approx(row.one_group + 1 / steps[row.effect])
        assert found["all_groups"] == pytest.approx(row.all_groups + 1 / (10 * steps[row.effect]))
    effect = answers.loc["self_effect", "one_group"]
    assert effect * (1 - effect) > 0.09
    assert effect == pytest.approx(quantiles[0] * np.sqrt(effect * (1 - effect) * 2 / 120) + 1 / 120)
    full = vn.detectable(40, groups=10)
    assert full.equals(vn.detectable(40, groups=10, k=9))
    assert (vn.detectable(80, groups=10)["one_group"] < full["one_group"]).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pictures": 1}, "pictures 1 is less than 2"),
        ({"pictures": 9, "k": 8}, "k=8 other masks are more than 8 groups have; at most 7"),
        ({"pictures": 9, "k": 0}, "k 0 is less than 1"),
        ({"pictures": 9, "power": 1}, r"power 1 is outside \(0, 1\)"),
        ({"pictures": 9, "value": "nats"}, "value='nats' is not among those .*: correct, margin, score"),
        (
            {"pictures": 9, "spread": -1},
            "spread and others are standard deviations, and not below 0; got -1.0 and -1.0",
        ),
        ({"pictures": 9, "within": 2}, "within and between are correlations from 0 to 1; got 2.0 and 0.0"),
        ({"pictures": 9, "spread": float("nan")}, "spread nan is not finite"),
    ],
)
def test_designs_that_make_no_sense_are_refused(how, message):
    with pytest.raises(MismatchError, match=message):
        vn.detectable(**how)
