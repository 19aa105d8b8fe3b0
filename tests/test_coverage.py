"""Intervals, tests and planning by simulation: a sample of ``benchmarks/coverage.py``, whose table is in the docs."""

import importlib.util

import numpy as np
import pytest
from scipy import stats as scipy_stats

import vlmneurons as vn
from vlmneurons.errors import MismatchError
from vlmneurons.study.effects import detectable
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult


@pytest.fixture(scope="module")
def coverage(request):
    path = request.config.rootpath / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "others", "questions", "pictures"),
    [("correct", 2, "4", 60), ("margin", None, "1–7", 14), ("margin", 2, "2", 30)],
)
def test_intervals_hold_the_truth_and_tests_find_nothing_where_nothing_is(coverage, value, others, questions, pictures):
    found = coverage.simulated(coverage.Design(5, pictures, questions, others), value, 80, 60, seed=7)
    print(value, others, questions, pictures, {name: tuple(np.round(one, 3)) for name, one in found.items()})
    for name in ("self", "cross", "gap"):
        share, given = found[name]
        assert given > 0.9 or (name == "cross" and value == "correct")
        assert 0.91 <= share <= 0.985 or given <= 0.9, name  # 400 intervals: two errors are 0.022
        share, given = found[f"{name} all"]
        assert given == 1, name
        assert share >= 0.86, name  # of 80 intervals
    assert found["bias"][0] < 3.5
    assert found["p"][0] <= 0.09


def planted(seed: int, effect: float, groups: int, pictures: int, questions: int, between: float) -> KnockoutResult:
    """Margins of two selectors on the same questions: in the first half of the groups the first does more harm.

    A question's change has standard deviation 1 and correlates with its picture's others by 0.3, and between selectors.
    """
    random = np.random.default_rng(seed)
    n = groups * pictures * questions
    picture = np.repeat(np.arange(groups * pictures), questions)
    names = [f"g{number}" for number in range(groups)]
    group = np.repeat(np.arange(groups), pictures * questions)

    def noise() -> np.ndarray:
        return np.sqrt(0.3) * random.normal(size=groups * pictures)[picture] + np.sqrt(0.7) * random.normal(size=n)

    common = noise()
    masks = [Mask(selector, 0, name, 5) for selector in ("CAS", "MAD") for name in names]
    rows = [np.zeros(n)]
    for mask in masks:
        own = group == names.index(mask.group)
        change = np.sqrt(between) * common + np.sqrt(1 - between) * noise()
        rows.append(np.where(own, change - effect * (mask.selector == "CAS") * (group < groups // 2), 0))
    margins = np.stack(rows)
    return KnockoutResult(
        tuple(f"q{number}" for number in range(n)),
        tuple(names[number] for number in group),
        np.zeros(n, dtype=np.int64),
        tuple(masks),
        np.zeros(margins.shape, dtype=np.int64),
        margins,
        pictures=tuple(map(str, picture)),
    )


def test_a_difference_is_found_with_the_power_that_detectable_says_and_no_others_are():
    design = {"pictures": 30, "questions": 2, "within": 0.3, "between": 0.5}
    effect = detectable(**design, groups=8, spread=1.0).set_index("effect").loc["difference", "one_group"]
    hits, alarms = [], []
    for seed in range(50):
        result = planted(seed, effect, 8, 30, 2, 0.5)
        table = result.difference("CAS", "MAD", value="margin", permutations=400)
        rows = table[(table["effect"] == "self_effect") & (table["group"] != "all")]
        found = (rows["p"] <= 0.05).to_numpy()
        hits.extend(found[:4])
        alarms.extend(found[4:])
    print(f"planted {effect:.3f} nats: found in {np.mean(hits):.3f} of {len(hits)}; none: {np.mean(alarms):.3f}")
    assert abs(np.mean(hits) - 0.8) <= 3 * np.sqrt(0.16 / len(hits)) + 0.02  # the formula is an approximation
    assert np.mean(alarms) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(alarms))


def test_what_is_detectable_by_hand():
    table = vn.detectable(40, questions=3, groups=10, k=4, spread=0.3, others=0.1, within=0.5, between=0.2, tests=10)
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
