"""Every selector against an independent version in NumPy or plain Python; budgets, ties, arithmetic, the contract."""

import doctest
import importlib
import inspect
import math
import pkgutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import vlmneurons as vn
from vlmneurons import selectors
from vlmneurons.errors import GroupError, MismatchError, SelectionError, SiteError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.selectors import (
    CAS,
    CNA,
    LAP,
    LAPE,
    MAD,
    Attribution,
    AveragePrecision,
    ConAct,
    Conditions,
    CRFusion,
    IntegratedGradients,
    Joint,
    LayerMatchedRandom,
    MostActive,
    Overlap,
    RandomNeurons,
    Selector,
    universal_neurons,
)
from vlmneurons.selectors._base import budget_of, highest
from vlmneurons.selectors.average_precision import average_precision
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import Item, ItemStatistics
from vlmneurons.testing import ContractError, check_selector, selector_tables

TABLES = selector_tables()


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(selectors.__path__)])
def test_the_examples_in_docstrings_print_what_they_show(name):
    module = importlib.import_module(f"vlmneurons.selectors.{name}")
    assert doctest.testmod(module).failed == 0


def random_stats(seed, neurons=60, classes=None, ties=False):
    """Counts with dead neurons, repeated columns and groups of different size, depending on the seed."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 7)) if classes is None else classes
    tokens = rng.integers(1, 6 if ties else 900, classes)
    positive = rng.binomial(tokens[:, None], rng.beta(0.4, 1.5, (1, neurons)).clip(0, 1) * rng.random((classes, 1)))
    positive[:, rng.random(neurons) < 0.15] = 0
    if seed % 3 == 0:
        positive = positive[:, rng.integers(0, neurons, neurons)]
    total = rng.normal(size=positive.shape) * tokens[:, None]
    space = NeuronSpace.from_widths("language", "gate", [neurons // 3, neurons - neurons // 3])
    return ActivationStatistics.from_counts(space, [f"g{c}" for c in range(classes)], positive, tokens, total=total)


def probability(stats):
    return stats.positive.numpy() / stats.tokens.numpy()[:, None]


# -- independent versions ------------------------------------------------------------------------------------------


def numpy_cas(stats):
    p = probability(stats)
    scores = np.zeros_like(p)
    for n in range(p.shape[1]):
        order = sorted(range(len(p)), key=lambda c: -p[c, n])
        scores[order[0], n] = p[order[0], n] - p[order[1], n]
    return scores


def numpy_mad(stats, signed=False, others=False, table=None):
    p = probability(stats) if table is None else table
    scores = np.empty_like(p)
    for c in range(len(p)):
        rest = [p[d] for d in range(len(p)) if d != c or not others]
        scores[c] = p[c] - np.mean(rest, axis=0)
    return scores if signed else np.abs(scores)


def numpy_lape(stats):
    p = probability(stats)
    scores = np.full(p.shape, -np.inf)
    for n in range(p.shape[1]):
        if p[:, n].max() > 0:
            share = p[:, n] / p[:, n].sum()
            scores[p[:, n] == p[:, n].max(), n] = sum(x * math.log(x) for x in share if x > 0)
    return scores


def numpy_cna(stats, signed=False):
    total, tokens = stats.total.numpy(), stats.tokens.numpy()
    scores = np.empty_like(total)
    for c in range(len(total)):
        rest = [d for d in range(len(total)) if d != c]
        scores[c] = total[c] / tokens[c] - total[rest].sum(0) / tokens[rest].sum()
    return scores if signed else np.abs(scores)


INDEPENDENT = {
    "LAP": (LAP(), probability),
    "LAPE": (LAPE(), numpy_lape),
    "CAS": (CAS(), numpy_cas),
    "MAD": (MAD(), numpy_mad),
    "MAD signed": (MAD(signed=True), lambda s: numpy_mad(s, signed=True)),
    "MAD others": (MAD(others=True), lambda s: numpy_mad(s, others=True)),
    "MAD mean": (MAD(on="mean"), lambda s: numpy_mad(s, table=s.mean.numpy())),
    "MostActive": (MostActive(), lambda s: np.tile(probability(s).mean(0), (len(s.groups), 1))),
    "CNA": (CNA(anywhere=True), numpy_cna),
    "CNA signed": (CNA(anywhere=True, signed=True), lambda s: numpy_cna(s, signed=True)),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_scores_equal_an_independent_computation_on_random_tables(name):
    selector, version = INDEPENDENT[name]
    for seed in range(60):
        stats = random_stats(seed, ties=seed % 2 == 1)
        np.testing.assert_allclose(selector.score(stats).numpy(), version(stats), atol=2e-12, err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", ["LAP", "CAS", "MAD", "LAPE"])
def test_sets_are_the_first_ones_of_a_plain_sort(name):
    selector, _ = INDEPENDENT[name]
    for seed in range(40):
        stats = random_stats(seed, ties=True)
        scores = selector.score(stats).tolist()
        budget = 1 + seed % 20
        for row, neurons in zip(scores, selector.take(count=budget).select(stats).values(), strict=True):
            eligible = [n for n, s in enumerate(row) if s > (0 if name == "CAS" else -math.inf)]
            assert list(neurons) == sorted(sorted(eligible, key=lambda n: (-row[n], n))[:budget])


def test_cas_never_gives_a_neuron_to_two_groups_or_without_a_margin():
    for seed in range(30):
        stats = random_stats(seed, ties=True)
        selection = CAS(1.0).select(stats)
        assert sum(map(len, selection.values())) == len(set().union(*map(set, selection.values())))
        p = probability(stats)
        top = np.sort(p, axis=0)[::-1]
        assert set().union(*map(set, selection.values())) == set(np.flatnonzero(top[0] > top[1]).tolist())


def test_conact_is_cas():
    assert ConAct is CAS


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_equals_a_computation_item_by_item(seed):
    rng = np.random.default_rng(seed)
    few = seed < 8  # few items are compared two by two, many are sorted
    n_items, n_neurons = int(rng.integers(4, 30) if few else rng.integers(200, 260)), 9
    n_groups = int(rng.integers(2, 4))
    owner = np.concatenate([np.arange(n_groups), rng.integers(0, n_groups, n_items - n_groups)])
    values = rng.integers(0, 4 if seed % 2 else 1000, (n_neurons, n_items)).astype(float)
    result = average_precision(values, owner, n_groups)
    for neuron in range(n_neurons):
        for group in range(n_groups):
            # As scikit-learn defines it: sum over thresholds of (recall gained) x precision.
            expected, found = 0.0, 0
            for threshold in sorted(set(values[neuron]), reverse=True):
                inside = values[neuron] >= threshold
                hits = int((inside & (owner == group)).sum())
                expected += (hits - found) / (owner == group).sum() * hits / inside.sum()
                found = hits
            assert result[group, neuron] == pytest.approx(expected)


def made_items(folder, positive, groups, tokens, total=None, maximum=None, space=None):
    positive = np.asarray(positive)
    space = space or NeuronSpace.from_widths("language", "gate", [positive.shape[1]])
    tables = {"positive": positive, "total": total, "maximum": maximum}
    tables = {name: np.asarray(table) for name, table in tables.items() if table is not None}
    items = [Item(str(n), group, 0, {}) for n, group in enumerate(groups)]
    made = ItemStatistics.create(folder, space, items, {}, list(tables))
    made.write(range(len(items)), [0] * len(items), tokens, [0.0] * len(items), tables)
    return made


def test_average_precision_selects_from_single_questions_whatever_is_read(tmp_path):
    positive = [[9, 1, 5, 2], [8, 2, 5, 2], [1, 7, 5, 9], [0, 9, 5, 9]]
    total = [[1.0, 9, 2, -3], [2.0, 8, 2, -2], [30.0, 1, 2, -9], [4.0, 2, 2, -8]]
    maximum = [[0.5, 0.1, 2, 3], [0.4, 0.2, 2, 2], [0.3, 0.1, 2, 9], [0.2, 0.2, 2, 8]]
    # Questions of different length: the mean of the third is 30 / 100 = 0.3.
    items = made_items(tmp_path / "run", positive, "AABB", [10, 10, 100, 10], total, maximum)
    by_probability = AveragePrecision(on="probability").score(items.grouped())
    # Probabilities of neuron 3: 0.2, 0.2 | 0.09, 0.9: group B has the first of four and the last.
    assert by_probability[1, 3].item() == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert by_probability[0].tolist()[0] == 1.0
    by_mean = AveragePrecision(on="mean").score(items.grouped())
    # Means of neuron 0: 0.1, 0.2 | 0.3, 0.4.
    assert by_mean[:, 0].tolist() == pytest.approx([(1 / 3 + 2 / 4) / 2, 1.0])
    # And of neuron 2: 0.2, 0.2 | 0.02, 0.2: three of equal value come first, one of them B's.
    assert by_mean[:, 2].tolist() == pytest.approx([2 / 3, (1 / 3 + 2 / 4) / 2])
    assert AveragePrecision(on="maximum").score(items.grouped())[0, 0] == 1.0
    both = (AveragePrecision(count=1) | -AveragePrecision(count=1)).select(items)
    assert {group: list(neurons) for group, neurons in both.items()} == {"A": [0, 1], "B": [0, 1]}
    mixed = (CAS().zscore() + AveragePrecision().zscore()).take(count=2).select(items)
    assert mixed.budget == 2


def test_average_precision_without_what_it_needs_is_refused(tmp_path):
    items = made_items(tmp_path / "run", [[1, 2], [2, 1]], "AB", [4, 4])
    with pytest.raises(SelectionError, match=r"holds no mean of each question: record_items\(…, magnitudes=True\)"):
        AveragePrecision(count=1).select(items)
    with pytest.raises(SelectionError, match=r"holds no maximum of each question: record_items\(…, maxima=True\)"):
        AveragePrecision(count=1, on="maximum").select(items)
    with pytest.raises(SelectionError, match="AveragePrecision selects from GroupedItems; got ActivationStatistics"):
        AveragePrecision(count=1).select(TABLES["ordinary"])
    with pytest.raises(SelectionError, match="maximum, or a statistic; got 'the median'"):
        AveragePrecision(on="the median")
    with pytest.raises(SelectionError, match="on='median' does not exist; choose from mean, probability, maximum"):
        AveragePrecision(count=1, on="median").select(items)


# -- several conditions --------------------------------------------------------------------------------------------


def conditions(seed=0):
    return {name: random_stats(seed + 100 * n, classes=3) for n, name in enumerate(("English", "Hindi", "Swahili"))}


def zscored(table):
    spread = table.std(1, keepdims=True)
    return (table - table.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)


def test_fusion_overlap_and_joint_equal_their_formulas():
    given = conditions()
    z = np.stack([zscored(numpy_cas(stats)) for stats in given.values()])
    fused = CRFusion(penalty=0.3).score(Conditions(given)).numpy()
    np.testing.assert_allclose(fused, z.mean(0) - 0.3 * z.std(0), atol=1e-10)
    np.testing.assert_allclose(Overlap().score(Conditions(given)).numpy(), z.min(0), atol=1e-10)
    pooled = given["English"] + given["Hindi"] + given["Swahili"]
    np.testing.assert_allclose(Joint().score(Conditions(given)).numpy(), numpy_cas(pooled), atol=1e-12)
    assert dict(Joint(count=4).select(given)) == dict(CAS(count=4).select(pooled))
    assert repr(CRFusion()) == "CRFusion(fraction=0.005, of=CAS())"


def test_a_neuron_left_out_under_one_condition_is_left_out():
    given = conditions()
    lape = np.stack([LAPE().score(stats).numpy() for stats in given.values()])
    for rule in (CRFusion(of=LAPE()), Overlap(of=LAPE())):
        assert np.array_equal(np.isneginf(rule.score(Conditions(given)).numpy()), np.isneginf(lape).any(0))


def test_conditions_that_do_not_fit_are_refused():
    given = conditions()
    with pytest.raises(SelectionError, match="at least two are needed; got 1"):
        CRFusion(count=1).select({"English": given["English"]})
    with pytest.raises(MismatchError, match="condition 'b' has the groups g0, g1; the first has g0, g1, g2"):
        Conditions({"a": given["English"], "b": given["Hindi"].select_groups(["g0", "g1"])})
    with pytest.raises(MismatchError, match="different spaces"):
        Conditions({"a": given["English"], "b": random_stats(0, neurons=30, classes=3)})
    with pytest.raises(SelectionError, match="condition 'b' must be ActivationStatistics; got int"):
        Conditions({"a": given["English"], "b": 3})
    with pytest.raises(SelectionError, match="CRFusion selects from Conditions; got ActivationStatistics"):
        CRFusion(count=1).select(given["English"])
    with pytest.raises(SelectionError, match="CRFusion: penalty is a number of at least 0; got -1"):
        CRFusion(penalty=-1)
    with pytest.raises(SelectionError, match="of is a selector that scores ActivationStatistics; got AveragePrecision"):
        CRFusion(of=AveragePrecision())
    moved = Conditions({"a": given["English"], "b": given["Hindi"].select_groups(["g2", "g0", "g1"])})
    assert moved.groups == ("g0", "g1", "g2")
    assert moved.statistics["b"] == given["Hindi"]


# -- CNA -----------------------------------------------------------------------------------------------------------


def test_cna_reads_the_product_at_the_last_token_unless_told_otherwise():
    stats = random_stats(1)
    with pytest.raises(SelectionError, match=r"CNA reads the product at the last token; these statistics are of gate"):
        CNA(count=1).select(stats)
    post = NeuronSpace.from_widths("language", "post", stats.space.widths)
    kept = {"positive": stats.positive, "tokens": stats.tokens, "total": stats.total}
    made = ActivationStatistics.from_counts(post, stats.groups, **kept, provenance={"tokens": "last"})
    assert dict(CNA(count=3).select(made)).keys() == set(stats.groups)
    content = ActivationStatistics.from_counts(post, stats.groups, **kept, provenance={"tokens": "content"})
    with pytest.raises(SelectionError, match=r"are of post with tokens='content'"):
        CNA(count=1).select(content)
    with pytest.raises(SelectionError, match="hold no sums of activations"):
        CNA(count=1, anywhere=True).select(
            ActivationStatistics.from_counts(post, stats.groups, stats.positive, stats.tokens)
        )
    assert repr(CNA()) == "CNA(fraction=0.001)"


def test_universal_neurons_are_among_the_most_active_ones_on_most_questions(tmp_path):
    total = np.zeros((10, 20))
    total[:, 4] = 9.0
    total[:8, 7] = 8.0  # among the first two on exactly 80 % of the questions: not more than 80 %
    total[:9, 11] = 7.0
    items = made_items(tmp_path / "run", np.zeros((10, 20), dtype=int), "AB" * 5, [10] * 10, total)
    assert list(universal_neurons(items.grouped(), fraction=0.1, share=0.8)) == [4]
    assert list(universal_neurons(items.grouped(), fraction=0.15, share=0.8)) == [4, 11]
    with pytest.raises(SelectionError, match=r"universal_neurons: share is in \(0, 1\]; got 2"):
        universal_neurons(items.grouped(), share=2)


def test_universal_neurons_as_in_the_released_code_are_of_each_layer_and_of_either_sign(tmp_path):
    rng = np.random.default_rng(3)
    total = rng.normal(size=(20, 30)) * np.where(rng.random(30) < 0.2, 6, 1)
    space = NeuronSpace.from_widths("language", "post", [12, 18])
    positive = np.zeros((20, 30), dtype=int)
    items = made_items(tmp_path / "run", positive, "AB" * 10, [5] * 20, total, space=space)
    for share in (0.5, 0.8, 0.33):
        often = np.zeros(30, dtype=int)
        for row in np.abs(total):
            for start, stop in ((0, 12), (12, 30)):
                often[start + np.argsort(-row[start:stop])[:4]] += 1
        found = universal_neurons(items.grouped(), share=share, per_layer=4)
        assert list(found) == np.flatnonzero(often >= int(share * 20)).tolist()
    with pytest.raises(SelectionError, match="universal_neurons: per_layer 0 is less than 1"):
        universal_neurons(items.grouped(), per_layer=0)


def test_cna_leaves_out_layers_as_the_released_code_does():
    space = NeuronSpace.from_widths("language", "post", [100] * 4)
    total = np.random.default_rng(0).normal(size=(2, 400))
    stats = ActivationStatistics.from_counts(space, ["A", "B"], np.zeros((2, 400), dtype=int), [9, 9], total=total)
    difference = np.abs(total[0] / 9 - total[1] / 9)
    best = [n for n in np.argsort(-difference) if n >= 200]
    assert list(CNA(0.1, leave_out=(0, 1)).select(stats)["A"]) == sorted(best[:40])
    assert dict(CNA(0.1, leave_out=0, layers=[0, 3]).select(stats)) == dict(CNA(count=20, layers=[3]).select(stats))
    assert CNA(count=5, leave_out=1, per_layer=True).select(stats)["B"].per_layer() == {0: 5, 1: 0, 2: 5, 3: 5}
    assert repr(CNA(leave_out=(1, 0))) == "CNA(fraction=0.001, leave_out=[0, 1])"
    with pytest.raises(SiteError, match=r"layer 4 is not in this space \(0–3\)"):
        CNA(0.1, leave_out=4).select(stats)
    check_selector(CNA(0.01, anywhere=True, leave_out=0))


# -- budgets and ties ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 0.5, 2.0, np.inf])),
    st.integers(0, 50),
    st.data(),
)
def test_highest_takes_the_best_and_of_equal_ones_the_first(values, count, data):
    allowed = data.draw(hnp.arrays(np.bool_, len(values)) | st.none())
    chosen = highest(torch.from_numpy(values), count, None if allowed is None else torch.from_numpy(allowed)).tolist()
    candidates = [n for n in range(len(values)) if allowed is None or allowed[n]]
    assert chosen == sorted(sorted(candidates, key=lambda n: (-values[n], n))[:count])


# -- ties, whatever the groups are called ----------------------------------------------------------------------------

ORDERLESS = [
    LAP(count=4),
    LAPE(count=4),
    LAPE(variant="tang", top_rate=0.3, filter_rate=0.7, activation_bar_ratio=0.7),
    CAS(count=4),
    MAD(count=4),
    MAD(count=4, others=True, signed=True),
    MAD(count=4, on="mean"),
    MostActive(count=4),
    CNA(count=4, anywhere=True),
    CAS(count=4) + MAD(),
    CAS(count=4).zscore() + MAD().zscore(),
    (CAS() + LAPE()).take(count=4),
    LAP(count=4).where(MostActive() > 0.3),
    CAS(count=4) | MAD(count=4),
    MAD(count=1, per_layer=True),
]
"""Rules whose sets belong to the groups and not to their names or their order."""


@st.composite
def tied_counts(draw):
    """Tokens and counts small enough that many neurons tie exactly; with equal numbers of tokens, or different ones."""
    groups = draw(st.integers(2, 6))
    tokens = draw(st.lists(st.integers(1, 12), min_size=groups, max_size=groups))
    if draw(st.booleans()):
        tokens = [tokens[0]] * groups
    counts = [[draw(st.integers(0, most)) for _ in range(12)] for most in tokens]
    return tokens, counts


def counted(tokens, counts, names=None, total=None):
    space = NeuronSpace.from_widths("language", "gate", [5, len(counts[0]) - 5])
    names = [f"g{n}" for n in range(len(tokens))] if names is None else names
    total = np.asarray(counts) * 0.1 if total is None else total
    return ActivationStatistics.from_counts(space, names, counts, tokens, total=total)


@pytest.mark.parametrize("rule", ORDERLESS, ids=repr)
@settings(max_examples=25, deadline=None)
@given(tied_counts(), st.randoms(use_true_random=False))
def test_sets_go_with_their_groups_when_these_are_reordered_and_renamed(rule, table, random):
    tokens, counts = table
    stats = counted(tokens, counts)
    order = list(range(len(tokens)))
    random.shuffle(order)
    moved = counted([tokens[n] for n in order], [counts[n] for n in order], [f"other {n}" for n in order])
    selection, again = rule.select(stats), rule.select(moved)
    assert {f"other {name[1:]}": list(neurons) for name, neurons in selection.items()} == {
        name: list(neurons) for name, neurons in again.items()
    }


def exact_mad(p):
    mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
    return [[abs(x - m) for x, m in zip(row, mean, strict=True)] for row in p]


def exact_cas(p):
    ranked = [sorted(column, reverse=True) for column in zip(*p, strict=True)]
    return [[top[0] - top[1] if x == top[0] else 0 for x, top in zip(row, ranked, strict=True)] for row in p]


def exact_most_active(p):
    return [[sum(column) for column in zip(*p, strict=True)]] * len(p)


@pytest.mark.parametrize(
    ("rule", "exact"),
    [(MAD(), exact_mad), (CAS(), exact_cas), (MostActive(), exact_most_active), (LAP(), lambda p: p)],
    ids=["MAD", "CAS", "MostActive", "LAP"],
)
@settings(max_examples=150, deadline=None)
@given(tied_counts(), st.integers(1, 12))
def test_ties_are_those_of_fractions_and_are_broken_by_index(rule, exact, table, count):
    tokens, counts = table
    scores = exact([[Fraction(k, most) for k in row] for row, most in zip(counts, tokens, strict=True)])
    for row, neurons in zip(scores, rule.take(count=count).select(counted(tokens, counts)).values(), strict=True):
        allowed = [n for n in range(12) if row[n] > 0 or not isinstance(rule, CAS)]
        assert list(neurons) == sorted(sorted(allowed, key=lambda n: (-row[n], n))[:count])


def test_ties_of_many_groups_whose_numbers_of_tokens_share_nothing_are_those_of_fractions():
    # Last tokens of the questions that were answered right: few, and of every group another number.
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 25)
    counts = rng.binomial(tokens[:, None], 0.5, (25, 300))
    # Equal deviations by other fractions: a tenth of 40 more than a tenth of 50, where another group has less of both.
    tokens[:3] = 40, 50, 20
    counts[:, 150:] = counts[:, :150]
    counts[:3, :150], counts[:3, 150:] = np.array([[4], [10], [4]]), np.array([[4], [5], [6]])
    p = [[Fraction(int(k), int(most)) for k in row] for row, most in zip(counts, tokens, strict=True)]
    for rule, exact in ((MAD(count=40), exact_mad), (MostActive(count=40), exact_most_active)):
        for row, neurons in zip(exact(p), rule.select(counted(tokens, counts)).values(), strict=True):
            assert list(neurons) == sorted(sorted(range(300), key=lambda n: (-row[n], n))[:40])


def test_as_many_times_the_tokens_and_counts_give_the_same_scores():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 8, (5, 40))
    for rule in (LAP(), LAPE(), CAS(), MAD(), MAD(others=True), MostActive()):
        once = rule.score(counted([7] * 5, counts))
        assert torch.equal(once, rule.score(counted([7 * 6] * 5, counts * 6)))
        # A neuron that fires for other groups as another does for these is as concentrated.
        if isinstance(rule, LAPE):
            turned = rule.score(counted([7] * 5, counts[[3, 0, 4, 1, 2]]))
            assert torch.equal(once.amax(0), turned.amax(0))


def test_a_neuron_that_is_strongest_for_two_groups_is_a_lape_neuron_of_both():
    stats = counted([10, 10, 10], [[9, 5, 0, 0, 1, 0], [9, 0, 5, 0, 1, 0], [0, 0, 0, 5, 1, 0]])
    assert [list(neurons) for neurons in LAPE(count=2).select(stats).values()] == [[0, 1], [0, 2], [3, 4]]


class Given(Selector):
    """Scores as they are given."""

    def __init__(self, scores, **settings):
        super().__init__(**settings)
        self._table = torch.as_tensor(scores)

    def score(self, stats):
        return self._table


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_set_exceeds_its_budget_or_leaves_it_unused(data):
    widths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    size = sum(widths)
    scores = data.draw(hnp.arrays(np.float64, (2, size), elements=st.sampled_from([-np.inf, 0.0, 1.0, 2.0])))
    excluded = data.draw(st.lists(st.integers(0, size - 1)))
    count = data.draw(st.integers(1, min(widths)))
    per_layer = data.draw(st.booleans())
    space = NeuronSpace.from_widths("language", "gate", widths)
    stats = ActivationStatistics.from_counts(space, ["A", "B"], np.zeros((2, size), dtype=int), [1, 1])
    selector = Given(scores, count=count, per_layer=per_layer, exclude=NeuronSet(space, excluded))
    selection = selector.select(stats)
    parts = (
        [range(a, b) for a, b in zip(space.offsets, space.offsets[1:], strict=False)] if per_layer else [range(size)]
    )
    for row, neurons in zip(scores, selection.values(), strict=True):
        expected = []
        for part in parts:
            eligible = [n for n in part if row[n] > -np.inf and n not in excluded]
            expected += sorted(eligible, key=lambda n: (-row[n], n))[:count]
        assert list(neurons) == sorted(expected)
    assert selection.budget == count * len(parts)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**7), st.floats(1e-6, 1.0))
def test_a_budget_is_the_floor_of_the_share(size, fraction):
    budget = budget_of(fraction, size)
    assert budget <= size
    assert budget - 2e-6 <= fraction * size < budget + 1


def test_a_share_that_floats_put_just_below_a_whole_number_is_that_number():
    for percent in range(1, 101):
        assert budget_of(percent / 100, 100) == percent
        assert budget_of(percent / 100, 530_400) == percent * 5304


def test_layers_of_two_towers_are_two_layers_and_experts_of_one_layer_one():
    sites = [
        Site(tower, layer, f"mlp.experts.{e}") for tower in ("language", "vision") for layer in (0, 1) for e in (0, 1)
    ]
    space = NeuronSpace(tuple(sites), (10,) * 8)
    stats = ActivationStatistics.from_counts(space, ["A"], [list(range(80))], [100])
    selection = LAP(0.1, per_layer=True).select(stats)
    assert selection.budget == 8
    for tower in ("language", "vision"):
        assert selection["A"].per_layer(tower) == {0: 2, 1: 2}
    with pytest.raises(
        SelectionError, match=r"fraction=0\.04 of the 20 neurons of layer 0 of tower 'language' yields no"
    ):
        LAP(0.04, per_layer=True).select(stats)
    assert LAP(0.1, per_layer=True, layers=[1]).select(stats)["A"].per_layer("vision") == {0: 0, 1: 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAS(0), r"CAS: fraction is in \(0, 1\]; got 0"),
        (lambda: CAS(1.5), r"fraction is in \(0, 1\]; got 1\.5"),
        (lambda: CAS(float("nan")), r"fraction is in \(0, 1\]; got nan"),
        (lambda: CAS(count=0), "count is the number of neurons per group, at least 1; got 0"),
        (lambda: CAS(0.1, count=3), r"give fraction or count, not both; got 0\.1 and 3"),
        (lambda: CAS().take(0.1, count=3), r"give fraction or count, not both"),
        (lambda: CAS(layers=[]), "layers is empty"),
        (lambda: CAS(layers="3"), "layers are numbers; got the text '3'"),
        (lambda: MAD(on="sum"), "MAD: on is 'probability' or 'mean'; got 'sum'"),
        (lambda: LAPE(variant="tang", per_layer=True).select(TABLES["ordinary"]), "so none per layer"),
        (lambda: CAS(0.0001).select(TABLES["ordinary"]), "yields no neuron; the smallest fraction that yields one is"),
        (
            lambda: CAS(count=2401).select(TABLES["ordinary"]),
            "count=2401 neurons per group, but the space has only 2400",
        ),
        (lambda: CAS(count=1).select(TABLES["ordinary"].select_groups(["Peru"])), "needs at least two.*only Peru"),
        (lambda: CAS(count=1).select(), "CAS selects from ActivationStatistics; got nothing"),
        (lambda: CAS(count=1).select(TABLES["ordinary"], TABLES["many ties"]), "several were given"),
        (lambda: CAS(count=1).select(3), "CAS selects from ActivationStatistics; got int"),
        (lambda: CAS().zscore() * float("nan"), "scores cannot be multiplied by nan"),
        (lambda: CAS() / 0, "scores cannot be divided by 0"),
        (lambda: CAS(0.1) + MAD(0.2), r"the parts have different budgets \(0\.1, 0\.2\)"),
        (lambda: CAS(layers=[1]) + MAD(layers=[2]), "the parts have different layers"),
        (lambda: (CAS() & MAD()).zscore(), "combines sets and has no scores to calculate with"),
        (lambda: (CAS() & MAD()) > 0.1, "combines sets and has no scores to compare"),
        (lambda: CAS().where(0.1), "where.* takes a comparison such as LAP.* got float"),
        (lambda: 0.1 < LAP() < 0.9, "join conditions with &, | and ~"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(unchecked, make, message):
    with pytest.raises(SelectionError, match=message):
        make()


def test_layers_and_neurons_that_do_not_exist_are_refused():
    stats = TABLES["ordinary"]
    with pytest.raises(SiteError, match=r"layer 7 is not in this space \(0–2\)"):
        CAS(count=1, layers=[7]).select(stats)
    other = NeuronSpace.from_widths("language", "gate", [5])
    with pytest.raises(MismatchError, match="different spaces"):
        CAS(count=1, exclude=NeuronSet(other, [1])).select(stats)
    with pytest.raises(MismatchError, match="different spaces"):
        CAS(count=1).where(NeuronSet(other, [1])).select(stats)
    some = Selection({"Peru": NeuronSet(stats.space, [1])})
    with pytest.raises(MismatchError, match="exclude has no set for Egypt, Japan, Kenya; it has Peru"):
        CAS(count=1, exclude=some).select(stats)
    with pytest.raises(MismatchError, match="has no set for Egypt, Japan, Kenya; it has Peru"):
        CAS(count=1).where(some).select(stats)


# -- random controls -----------------------------------------------------------------------------------------------


def test_random_sets_depend_on_seed_and_group_alone_and_nest():
    stats = TABLES["ordinary"]
    one = RandomNeurons(0.1, seed=3).select(stats)
    assert dict(RandomNeurons(0.1, seed=3).select(TABLES["many ties"])) == dict(one)
    assert RandomNeurons(0.1, seed=3).select(stats.select_groups(["Kenya"]))["Kenya"] == one["Kenya"]
    assert RandomNeurons(0.1, seed=4).select(stats)["Kenya"] != one["Kenya"]
    assert RandomNeurons(0.05, seed=3).select(stats)["Kenya"] < one["Kenya"]
    assert one["Kenya"] != one["Peru"]
    # Pinned: random controls of a published study must be the same for ever, on every machine.
    assert RandomNeurons(count=5, seed=0).select(stats)["Egypt"].indices.tolist() == PINNED


PINNED = [55, 817, 1215, 1857, 2028]


def test_random_sets_are_uniform_over_the_space():
    space = NeuronSpace.from_widths("language", "gate", [30, 70])
    stats = ActivationStatistics.from_counts(space, ["A"], np.zeros((1, 100), dtype=int), [1])
    hits = np.zeros(100)
    for seed in range(2000):
        hits[RandomNeurons(count=10, seed=seed).select(stats)["A"].indices.numpy()] += 1
    expected, spread = 200, math.sqrt(2000 * 0.1 * 0.9)
    assert np.abs(hits - expected).max() < 4.5 * spread
    assert abs(hits[:30].sum() - 6000) < 5 * math.sqrt(2000 * 10 * 0.3 * 0.7)


def test_layer_matched_random_has_the_counts_of_the_other_selection_in_every_site(unchecked):
    stats = TABLES["mixture of experts"]
    like = CAS(0.02).select(stats)
    matched = LayerMatchedRandom(like, seed=1, exclude=like).select(stats)
    for group in stats.groups:
        assert torch.equal(matched[group].per_site(), like[group].per_site())
        assert matched[group].isdisjoint(like[group])
    assert matched.budget == like.budget
    full = Selection({group: NeuronSet.full(stats.space) for group in stats.groups})
    with pytest.raises(SelectionError, match=r"150 neurons wanted of site .*, but only 0 of its 150 are not excluded"):
        LayerMatchedRandom(full, exclude=full).select(stats)
    with pytest.raises(GroupError, match="Egypt"):
        LayerMatchedRandom(Selection({"Peru": like["Peru"]})).select(stats)
    with pytest.raises(SelectionError, match="like is a Selection; got CAS"):
        LayerMatchedRandom(CAS())
    with pytest.raises(SelectionError, match="seed is a whole number; got 'x'"):
        RandomNeurons(seed="x")


# -- sets and scores combine ---------------------------------------------------------------------------------------


def test_set_operations_are_those_of_the_sets():
    stats = TABLES["ordinary"]
    a, b, c = CAS(0.02), MAD(0.05), LAPE(0.01)
    sets = [selector.select(stats) for selector in (a, b, c)]
    for group in stats.groups:
        x, y, z = (selection[group] for selection in sets)
        assert ((a & b) | c).select(stats)[group] == (x & y) | z
        assert (a - (b & c)).select(stats)[group] == x - (y & z)
    assert repr((a & b) | c) == "(CAS(fraction=0.02) & MAD(fraction=0.05)) | LAPE(fraction=0.01)"
    assert ((a & b) | c).select(stats).budget is None
    with pytest.raises(SelectionError, match="combines sets and has no scores"):
        (a & b).score(stats)
    with pytest.raises(TypeError):
        a & 3


def test_arithmetic_on_scores_is_arithmetic():
    stats = random_stats(5, classes=3)
    cas, mad = numpy_cas(stats), numpy_mad(stats)
    rule = CAS().zscore() * 0.7 + MAD().zscore() * 0.3
    np.testing.assert_allclose(rule.score(stats).numpy(), 0.7 * zscored(cas) + 0.3 * zscored(mad), atol=1e-10)
    np.testing.assert_allclose((2 * CAS() / 4).score(stats).numpy(), cas / 2, atol=1e-12)
    np.testing.assert_array_equal((-LAP()).score(stats).numpy(), -probability(stats))
    signed = MAD(signed=True)
    np.testing.assert_allclose(abs(signed).score(stats).numpy(), mad, atol=1e-12)
    assert dict(abs(signed).take(0.2).select(stats)) == dict(MAD(0.2).select(stats))
    np.testing.assert_allclose(
        sum([CAS(), MAD(), LAP()]).score(stats).numpy(), cas + mad + probability(stats), atol=1e-12
    )
    ranks = LAP().rank().score(stats).numpy()
    assert 0 <= ranks.min() < ranks.max() <= 1
    assert (
        (ranks[:, :, None] > ranks[:, None, :]) == (probability(stats)[:, :, None] > probability(stats)[:, None, :])
    ).all()


def test_lowest_first_is_the_reverse_ranking():
    stats = TABLES["ordinary"]
    lowest = (-LAP(count=30)).select(stats)
    for row, group in zip(probability(stats), stats.groups, strict=True):
        assert list(lowest[group]) == sorted(sorted(range(len(row)), key=lambda n: (row[n], n))[:30])


def test_neurons_that_a_part_leaves_out_stay_out_whatever_is_done_to_scores():
    stats = random_stats(7, classes=3)
    out = np.isneginf(LAPE().score(stats).numpy())
    for rule in (-LAPE(), LAPE() * -2, LAPE().zscore(), LAPE().rank(), abs(LAPE()), LAPE() + LAP(), LAPE() * 0):
        scores = rule.score(stats).numpy()
        assert (np.isneginf(scores) == out).all()
        for neurons, row in zip(rule.take(1.0).select(stats).values(), out, strict=True):
            assert list(neurons) == np.flatnonzero(~row).tolist()


def test_zscores_of_equal_scores_are_zero():
    space = NeuronSpace.from_widths("language", "gate", [5])
    stats = ActivationStatistics.from_counts(space, ["A"], [[1, 1, 1, 1, 1]], [3])
    assert LAP().zscore().score(stats).tolist() == [[0.0] * 5]


def test_gates_choose_among_the_neurons_that_pass():
    stats = TABLES["ordinary"]
    p, cas = probability(stats), numpy_cas(stats)
    selection = CAS(0.02).where(LAP() > 0.3).select(stats)
    for row, group in enumerate(stats.groups):
        eligible = [n for n in range(len(stats.space)) if p[row, n] > 0.3 and cas[row, n] > 0]
        assert list(selection[group]) == sorted(sorted(eligible, key=lambda n: (-cas[row, n], n))[:48])
    mean = p.mean(0)
    gate = (LAP() >= 0.2) & ~(MostActive() > 0.5) | (MAD() < 0.001)
    wanted = (p >= 0.2) & ~(mean > 0.5) | (numpy_mad(stats) < 0.001)
    chosen = LAP(1.0).where(gate).select(stats)
    assert [list(neurons) for neurons in chosen.values()] == [np.flatnonzero(row).tolist() for row in wanted]
    only = NeuronSet(stats.space, range(100, 140))
    assert list(LAP(1.0).where(only).select(stats)["Peru"]) == list(only)
    assert dict(LAP(1.0).where(selection).select(stats)) == dict(selection)
    assert CAS().where(LAP() > 0.3).contrastive
    assert LAP().where(CAS() > 0.3).contrastive
    with pytest.raises(SelectionError, match="compares groups and needs at least two"):
        LAP().where(CAS() > 0.3).select(stats.select_groups(["Peru"]))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            CAS().zscore() * 0.7 + MAD().zscore() * 0.3,
            "(CAS().zscore() * 0.7 + MAD().zscore() * 0.3).take(fraction=0.005)",
        ),
        (CAS(0.01).where(LAP() > 0.1), "CAS().where(LAP() > 0.1).take(fraction=0.01)"),
        (
            CAS().where((LAP() > 0.1) & ~(LAP() > 0.9)),
            "CAS().where((LAP() > 0.1) & ~(LAP() > 0.9)).take(fraction=0.005)",
        ),
        (-LAP(count=3), "(-LAP()).take(count=3)"),
        (abs(MAD(signed=True)) / 2, "(abs(MAD(signed=True)) / 2).take(fraction=0.005)"),
        ((CAS() + MAD()) * 2, "((CAS() + MAD()) * 2).take(fraction=0.005)"),
        (CAS() + MAD() + LAP(), "(CAS() + MAD() + LAP()).take(fraction=0.005)"),
        ((-CAS()).rank(), "(-CAS()).rank().take(fraction=0.005)"),
        (CAS(layers=[2, 1], per_layer=True), "CAS(fraction=0.005, layers=[1, 2], per_layer=True)"),
        (RandomNeurons() + CAS(), "(RandomNeurons(seed=0) + CAS()).take(fraction=0.005)"),
        (MAD(signed=True, on="mean", count=4), "MAD(count=4, signed=True, on='mean')"),
        (
            (CAS(0.01).where(LAP() > 0.1) | MAD(0.01)) & LAP(0.1),
            "(CAS().where(LAP() > 0.1).take(fraction=0.01) | MAD(fraction=0.01)) & LAP(fraction=0.1)",
        ),
        (
            LAP(0.1) - (LAP(0.1).where((LAP() <= 0.9) & (LAP() >= 0.1)) - MAD(0.01)),
            "LAP(fraction=0.1) - (LAP().where((LAP() <= 0.9) & (LAP() >= 0.1)).take(fraction=0.1) - "
            "MAD(fraction=0.01))",
        ),
    ],
)
def test_reprs_say_what_is_selected_and_can_be_pasted_back(rule, text):
    assert repr(rule) == text
    again = eval(text, vars(vn.selectors))
    assert repr(again) == text
    stats = TABLES["ordinary"]
    assert dict(again.select(stats)) == dict(rule.select(stats))


def test_settings_can_be_changed_afterwards_without_changing_the_original():
    rule = CAS(0.01)
    other = rule.take(count=3, layers=[1], per_layer=True)
    assert repr(rule) == "CAS(fraction=0.01)"
    assert repr(other) == "CAS(count=3, layers=[1], per_layer=True)"
    assert repr(other.take(0.5)) == "CAS(fraction=0.5, layers=[1], per_layer=True)"


def test_a_default_that_cannot_be_compared_is_not_among_the_settings_shown():
    weights = torch.ones(3)

    class Weighted(Selector):
        def __init__(self, fraction=None, *, weights=weights, floor=float("nan"), **shared):
            super().__init__(fraction, **shared)
            self.weights, self.floor = weights, floor

        def score(self, stats):
            return stats.probability

    default = inspect.signature(Weighted.__init__).parameters["floor"].default
    assert repr(Weighted(0.1, floor=default)) == "Weighted(fraction=0.1)"
    assert repr(Weighted(0.1, floor=0.5)) == "Weighted(fraction=0.1, floor=0.5)"


def test_settings_of_a_combination_are_those_of_its_parts():
    stats = TABLES["ordinary"]
    both = CAS(0.02) | MAD(0.02)
    banned = LAP(0.01).select(stats)
    for changed in ({"fraction": 0.1}, {"count": 7}, {"layers": [1]}, {"exclude": banned}, {"per_layer": True}):
        one, other = CAS(0.02).take(**changed).select(stats), MAD(0.02).take(**changed).select(stats)
        taken = both.take(**changed).select(stats)
        assert all(taken[group] == one[group] | other[group] for group in stats.groups)
        assert dict(taken) != dict(both.select(stats))
    assert repr(both.take(count=3, layers=[2])) == "CAS(count=3, layers=[2]) | MAD(count=3, layers=[2])"
    deep = ((CAS() & (MAD() - LAP())).take(0.03) | -CAS(0.03)).take(layers=1)
    assert repr(deep).count("layers=[1]") == 4
    sizes = [len(both.take(fraction).select(stats)["Peru"]) for fraction in (0.001, 0.01, 0.1)]
    assert sizes[0] < sizes[1] < sizes[2]
    both.layers = (1,)
    with pytest.raises(SelectionError, match="by the settings of its parts, not by layers of its own"):
        both.select(stats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LAPE(variant="tang").take(0.1), "variant='tang' has no budget per group; set top_rate instead"),
        (lambda: (CAS() | LAPE(variant="tang")).take(count=3), "variant='tang' has no budget per group"),
        (lambda: LAPE(variant="tang").take(per_layer=True), "so none per layer"),
        (
            lambda: LayerMatchedRandom(CAS(0.1).select(TABLES["ordinary"])).take(0.1),
            "fraction cannot be given: as many",
        ),
        (lambda: LayerMatchedRandom(CAS(0.1).select(TABLES["ordinary"])).take(layers=[1]), "layers cannot be given"),
        (
            lambda: CRFusion(of=CAS(layers=[1])),
            r"of=CAS\(.*\) gives scores alone, whatever layers it has: give that to CRF",
        ),
        (lambda: CAS().where(LAP(0.1) > 0.2), r"LAP\(fraction=0\.1\) > 0\.2 compares .* whatever fraction it has"),
        (lambda: CAS().where(LAP(layers=[1]) > 0.2), "whatever layers it has"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(make, message):
    with pytest.raises(SelectionError, match=message):
        make()


def test_a_part_that_was_given_no_budget_has_none():
    assert repr(CAS(0.01) + MAD()) == "(CAS() + MAD()).take(fraction=0.01)"
    assert repr(CAS() + MAD(count=3)) == "(CAS() + MAD()).take(count=3)"
    with pytest.raises(SelectionError, match=r"different budgets \(count=4, 0\.1\)"):
        CAS(count=4) + MAD(0.1)


def test_what_a_rule_reads_is_said_once_where_it_is_made():
    from vlmneurons.statistics.attributions import AttributionStatistics
    from vlmneurons.statistics.evidence import Evidence
    from vlmneurons.statistics.items import GroupedItems

    class Mine(Selector[GroupedItems]):
        def score(self, stats):
            return torch.zeros(len(stats.groups), len(stats.space))

    class Older(Selector):
        reads = AttributionStatistics

        def score(self, stats):
            return stats.mean

    assert (Mine.reads, Older.reads, CAS.reads) == (GroupedItems, AttributionStatistics, ActivationStatistics)
    assert type("Further", (Mine,), {}).reads is GroupedItems
    assert isinstance(TABLES["ordinary"], Evidence)
    assert isinstance(Conditions(conditions()), Evidence)
    for wrong in (3, "statistics", None, CAS(0.1).select(TABLES["ordinary"])):
        assert not isinstance(wrong, Evidence)


def test_what_cannot_be_selected_from_is_named(unchecked):
    selection = CAS(0.1).select(TABLES["ordinary"])
    for wrong, name in ((3, "3"), (selection, "Selection"), (None, "None")):
        with pytest.raises(SelectionError, match=f"statistics, questions or attributions; got {name}"):
            (CAS() + MAD()).select(wrong)
    with pytest.raises(SelectionError, match="CAS selects from ActivationStatistics; got Selection"):
        CAS().select(selection)


def test_scores_that_are_no_table_of_floats_are_refused():
    stats = TABLES["ordinary"]
    shape = (4, 2400)
    for scores, message in [
        (torch.zeros(shape, dtype=torch.int64), r"must return a tensor of floats \[group, neuron\]; got torch.int64"),
        (torch.zeros(4, 3), r"must return \[group, neuron\] = \[4, 2400\]; got \[4, 3\]"),
        (torch.full(shape, float("nan")), r"is NaN for group 'Egypt', neuron 0 \(use -inf to leave out\)"),
        (1 / torch.ones(shape).index_fill(1, torch.tensor(7), 0), "is inf for group 'Egypt', neuron 7"),
    ]:
        with pytest.raises(SelectionError, match=message):
            Given(scores, count=1).select(stats)
    halves = Given(torch.arange(9600, dtype=torch.float64).reshape(shape).to(torch.bfloat16), count=2).select(stats)
    assert len(halves["Peru"]) == 2


# -- the contract --------------------------------------------------------------------------------------------------

EVERY = [
    CAS(),
    LAP(),
    LAPE(),
    LAPE(variant="tang"),
    MAD(),
    MAD(signed=True),
    MAD(others=True),
    MAD(on="mean"),
    MostActive(),
    RandomNeurons(0.01, seed=3),
    CNA(0.01, anywhere=True),
    CNA(0.01, anywhere=True, signed=True),
    AveragePrecision(),
    AveragePrecision(on="probability"),
    AveragePrecision(on="maximum"),
    CRFusion(),
    Overlap(),
    Joint(),
    Overlap(of=LAPE()),
    Attribution(),
    Attribution(others=True),
    IntegratedGradients(on="share"),
    CAS(0.01) & MAD(0.01),
    (CAS(0.01) | LAPE(variant="tang")) - LAP(0.01),
    CAS().zscore() * 0.7 + MAD().zscore() * 0.3,
    -LAP(),
    abs(MAD(signed=True)),
    CAS().where(LAP() > 0.1),
    CAS(per_layer=True),
    CAS(layers=[1]),
    CAS().rank() + AveragePrecision().rank(),
    CAS().zscore() + Attribution().zscore(),
]


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_every_selector_meets_the_contract(selector):
    check_selector(selector)


def test_a_new_selector_in_ten_lines_of_a_users_script_meets_the_contract():
    script = '''
import vlmneurons as vn

class Loudest(vn.Selector):
    """Neurons that fire for a group more often than for the quietest group."""
    contrastive = True

    def score(self, stats):
        probability = stats.probability
        return probability - probability.amin(dim=0)

vn.testing.check_selector(Loudest)
vn.testing.check_selector(Loudest(0.01) & vn.CAS(0.01))
'''
    exec(compile(script, "users_script.py", "exec"), {"__name__": "users_script"})


class _Broken(Selector):
    def score(self, stats):
        return stats.probability


def broken(**methods):
    return type("Broken", (_Broken,), methods)


def _renaming(self, fraction=None, *, power=2, **budget):
    Selector.__init__(self, fraction, **budget)
    self.exponent = power


def _counting():
    calls = []

    def score(self, stats):
        calls.append(1)
        return stats.probability + len(calls) % 2

    return score


def _late_ties(self, stats):
    table = stats.probability
    return table.round(decimals=1)


def _select_last_ties(self, *evidence):
    (stats,) = evidence
    flipped = self.score(stats).flip(1)
    size = self.count or int(self.fraction * len(stats.space))
    sets = {
        group: NeuronSet(
            stats.space, (len(stats.space) - 1 - row.sort(descending=True, stable=True).indices[:size]).tolist()
        )
        for group, row in zip(stats.groups, flipped, strict=True)
    }
    return Selection(sets, selector=repr(self))


def _select_changed(change):
    def select(self, *evidence):
        selection = Selector.select(self, *evidence)
        return change(self, selection, evidence[0])

    return select


def _rebuilt(selection, sets, selector=None):
    return Selection(sets, selector=selection.selector if selector is None else selector)


def _one_more(self, selection, stats):
    return _rebuilt(selection, {g: s | NeuronSet(stats.space, [0, 1, 2, 3]) for g, s in selection.items()})


def _without_last(self, selection, stats):
    return _rebuilt(selection, {g: NeuronSet(stats.space, list(s)[:-1]) for g, s in selection.items()})


def _drop_group(self, selection, stats):
    return _rebuilt(selection, dict(list(selection.items())[:-1]))


def _ignoring(*names):
    def select(self, *evidence):
        before = {name: vars(self).pop(name) for name in names if name in vars(self)}
        try:
            selection = Selector.select(self, *evidence)
        finally:
            vars(self).update(before)
        return Selection(dict(selection), selector=repr(self))

    return select


def _write_to_statistics(self, stats):
    stats.positive.mul_(1).add_(1).sub_(2).clamp_(min=0)
    return stats.positive.double()


def _order_matters(self, stats):
    return stats.probability + torch.arange(len(stats.groups), dtype=torch.float64)[:, None]


BROKEN = {
    "1 integers": (
        broken(score=lambda self, s: s.positive.clone()),
        "score must return floats; it returned torch.int64",
    ),
    "1 shape": (
        broken(score=lambda self, s: s.probability[:, 1:]),
        r"score must return \[group, neuron\] = \[4, 2400\]",
    ),
    "1 no tensor": (
        broken(score=lambda self, s: s.probability.numpy()),
        "score must return a tensor; it returned ndarray",
    ),
    "1 NaN": (broken(score=lambda self, s: s.probability / (s.probability > 0)), "score must not be NaN"),
    "1 inf": (broken(score=lambda self, s: 1 / s.probability.clamp(min=0)), "score must not be inf"),
    "1 raises": (broken(score=lambda self, s: 1 / 0), "this must work: score, .* it raised ZeroDivisionError"),
    "2 unsteady": (broken(score=_counting()), "score must be the same each time"),
    "2 writes": (broken(score=_write_to_statistics), "must not write to the statistics; it changed 'positive'"),
    "2 shares": (broken(score=lambda self, s: s.total), "a tensor of its own, not the statistics' table 'total'"),
    "3 drops a group": (broken(select=_select_changed(_drop_group)), "must give a set for every group in order"),
    "3 over budget": (broken(select=_select_changed(_one_more)), "a set must not exceed the budget"),
    "3 too few": (broken(select=_select_changed(_without_last)), "7 neurons must be selected"),
    "4 ties": (broken(score=_late_ties, select=_select_last_ties), "equal scores go by lower index"),
    "4 not the best": (
        broken(
            select=_select_changed(
                lambda self, x, s: _rebuilt(x, {g: NeuronSet(s.space, range(len(n))) for g, n in x.items()})
            )
        ),
        "the highest scores must be selected",
    ),
    "5 layers": (broken(select=_ignoring("layers")), r"layers=\[1\] was given, but group .* has neurons of"),
    "5 exclude": (broken(select=_ignoring("exclude")), "exclude was given as a NeuronSet, but group"),
    "5 per layer": (broken(select=_ignoring("per_layer")), "with per_layer and count=3, group .* the first 3 of each"),
    "6 order": (broken(score=_order_matters), "scores must not depend on the order of the groups"),
    "7 uncounted": (
        broken(
            score=lambda self, s: s.positive / s.tokens.clamp(min=1)[:, None],
            check_statistics=lambda self, s: None,
        ),
        "must be refused with a SelectionError that names it",
    ),
    "7 single": (
        broken(contrastive=True, check_statistics=lambda self, s: s.check_counted()),
        "a single group must be refused",
    ),
    "7 not said": (
        broken(score=lambda self, s: s.probability - s.probability[[1, 0, *range(2, len(s.groups))]]),
        "scores must not depend|single group",
    ),
    "8 combining": (broken(__and__=lambda self, other: other), "selector & other must give each group the & of both"),
    "9 name": (broken(__repr__=lambda self: f"mine({self.count}, {self.fraction})"), "repr must have the name"),
    "9 address": (broken(__repr__=lambda self: f"Broken at 0x12 {self.count} {self.fraction}"), "not an address"),
    "9 budget": (broken(__repr__=lambda self: "Broken"), "repr must tell different budgets apart"),
    "9 setting": (
        broken(__init__=_renaming),
        "repr cannot tell values of 'power' apart: Broken must keep it as self.power",
    ),
    "9 selection": (
        broken(select=_select_changed(lambda self, x, s: _rebuilt(x, dict(x), "?"))),
        "must say how it was made",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_contract_catches_a_selector_that_breaks_a_clause(unchecked, name):
    made, message = BROKEN[name]
    with pytest.raises(ContractError, match=message):
        check_selector(made)


def test_the_contract_says_what_is_no_selector_at_all(unchecked):
    with pytest.raises(ContractError, match="a selector is an instance of vlmneurons\\.Selector; got int"):
        check_selector(3)
    with pytest.raises(ContractError, match=r"LayerMatchedRandom\(\) makes a selector; it raised TypeError"):
        check_selector(LayerMatchedRandom)
    check_selector(broken(score=_order_matters), equivariant=False)
