"""LAPE(variant="tang") against an independent reading of the published procedure, in NumPy and plain Python."""

import math

import numpy as np
import pytest

from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import LAPE
from vlmneurons.statistics.counts import ActivationStatistics


def published_sets(positive, tokens, top_rate=0.01, filter_rate=0.95, activation_bar_ratio=0.95):
    """The procedure of Tang et al. 2024, written neuron by neuron from its description: a list of sets of neurons."""
    classes, neurons = len(positive), len(positive[0])
    probability = [[positive[c][n] / tokens[c] for n in range(neurons)] for c in range(classes)]
    ascending = sorted(value for row in probability for value in row)
    top_value = ascending[round(len(ascending) * filter_rate) - 1]
    bar = ascending[round(len(ascending) * activation_bar_ratio) - 1]
    entropies = []
    for n in range(neurons):
        column = [probability[c][n] for c in range(classes)]
        if not any(value > top_value for value in column):
            entropies.append(math.inf)
            continue
        total = math.fsum(column)
        # Equal entropies may come out unequal in the last digits, depending on the order of the classes.
        entropies.append(round(math.log(total) - math.fsum(v * math.log(v) for v in column if v > 0) / total, 12) + 0.0)
    kept = sorted(range(neurons), key=lambda n: (entropies[n], n))[: round(neurons * top_rate)]
    return [{n for n in kept if probability[c][n] > bar} for c in range(classes)]


def random_table(seed: int):
    """Counts with, depending on the seed, ties, repeated neurons, dead neurons, and classes that get no neuron."""
    generator = np.random.default_rng(seed)
    classes, neurons = int(generator.integers(2, 9)), int(generator.integers(60, 900))
    tokens = generator.integers(1, [8, 60, 3000][seed % 3], classes)
    base = generator.beta(0.4, 2.0, neurons)
    rates = np.clip(base + generator.normal(0, 0.15, (classes, neurons)), 0, 1)
    positive = generator.binomial(tokens[:, None], rates)
    if seed % 4 == 1:  # whole columns twice: exact ties, also at the thresholds
        positive = positive[:, generator.integers(0, max(2, neurons // 10), neurons)]
    if seed % 5 == 2:  # dead neurons
        positive[:, generator.random(neurons) < 0.5] = 0
    if seed % 7 == 3:  # a class that hardly fires, and so gets no neuron; the last one every other time
        positive[-1 if seed % 2 else 0] = 0
    if seed % 11 == 4:  # neurons that fire for one class only: entropies of exactly 0
        alone = generator.random(neurons) < 0.2
        positive[1:, alone] = 0
    return positive, tokens


def statistics_of(positive, tokens) -> ActivationStatistics:
    neurons = positive.shape[1]
    first = neurons // 3
    space = NeuronSpace.from_widths("language", "gate", [first, neurons - first])
    return ActivationStatistics.from_counts(space, [f"class {c}" for c in range(len(tokens))], positive, tokens)


@pytest.mark.parametrize("block", range(10))
def test_the_sets_equal_the_published_procedure_on_random_tables(block):
    empty_classes = 0
    for seed in range(block * 20, block * 20 + 20):
        positive, tokens = random_table(seed)
        rates = [{}, {"top_rate": 0.1}, {"top_rate": 0.05, "filter_rate": 0.8, "activation_bar_ratio": 0.9},
                 {"top_rate": 0.3, "filter_rate": 0.98, "activation_bar_ratio": 0.6}][seed % 4]  # fmt: skip
        rates.setdefault("top_rate", 0.02)
        selection = LAPE(variant="tang", **rates).select(statistics_of(positive, tokens))
        expected = published_sets(positive.tolist(), tokens.tolist(), **rates)
        assert [set(neurons) for neurons in selection.values()] == expected, f"seed {seed}"
        empty_classes += sum(not neurons for neurons in expected)
    assert empty_classes  # the tables hold what the test is about


def test_the_defaults_are_those_of_the_authors_code():
    positive, tokens = random_table(8)
    selection = LAPE(variant="tang").select(statistics_of(positive, tokens))
    assert [set(neurons) for neurons in selection.values()] == published_sets(positive.tolist(), tokens.tolist())
    lape = LAPE(variant="tang")
    assert (lape.top_rate, lape.filter_rate, lape.activation_bar_ratio) == (0.01, 0.95, 0.95)


def test_a_table_by_hand():
    # 100 neurons, 2 classes. 95 % of the 200 probabilities: the 190th smallest. Ten values are above 0.1: neurons
    # 0-3 for class A alone, 4 and 5 for class B alone, 6 and 7 for both.
    positive = np.ones((2, 100), dtype=np.int64)
    positive[0, :4] = [90, 80, 70, 60]
    positive[1, 4:6] = [90, 50]
    positive[:, 6:8] = [[50, 90], [50, 90]]
    stats = ActivationStatistics.from_counts(
        NeuronSpace.from_widths("language", "gate", [50, 50]), ["A", "B"], positive, [100, 100]
    )
    assert dict(LAPE(variant="tang", top_rate=0.03).select(stats)) == {
        "A": NeuronSet(stats.space, [0, 1]),
        "B": NeuronSet(stats.space, [4]),
    }
    both = LAPE(variant="tang", top_rate=0.08).select(stats)
    assert both["A"].indices.tolist() == [0, 1, 2, 3, 6, 7]
    assert both["B"].indices.tolist() == [4, 5, 6, 7]


def test_a_trailing_class_without_neurons_keeps_its_place():
    positive = np.tile(np.arange(200) // 2, (3, 1))
    positive[2] = 0
    stats = statistics_of(positive, np.array([100, 100, 100]))
    selection = LAPE(variant="tang", top_rate=0.05).select(stats)
    assert selection.groups == ("class 0", "class 1", "class 2")
    assert len(selection["class 0"]) == 10
    assert len(selection["class 2"]) == 0
    assert selection.budget is None
    nested = selection.to_lape()
    assert len(nested) == 3
    assert dict(Selection.from_lape(nested, stats.space, selection.groups)) == dict(selection)


def test_scores_are_minus_the_entropy_where_a_class_passes_its_bar():
    positive, tokens = random_table(5)
    stats = statistics_of(positive, tokens)
    scores = LAPE(variant="tang").score(stats)
    probability = positive / tokens[:, None]
    bar = np.sort(probability.ravel())[round(probability.size * 0.95) - 1]
    assert ((scores > -math.inf).numpy() == (probability > bar)).all()


def test_layers_and_exclude_act_before_and_after_the_thresholds():
    positive, tokens = random_table(24)
    stats = statistics_of(positive, tokens)
    start = stats.space.offsets[1]
    lape = LAPE(variant="tang", top_rate=0.2, layers=[1])
    within = lape.select(stats)
    alone = published_sets(positive[:, start:].tolist(), tokens.tolist(), top_rate=0.2)
    assert [{n - start for n in neurons} for neurons in within.values()] == alone
    union = NeuronSet.empty(stats.space)
    for neurons in within.values():
        union |= neurons
    assert len(union)
    for exclude in (union, within):
        rest = LAPE(variant="tang", top_rate=0.2, layers=[1], exclude=exclude).select(stats)
        for group, neurons in rest.items():
            assert neurons.isdisjoint(exclude if isinstance(exclude, NeuronSet) else exclude[group])


def test_settings_that_belong_to_the_other_variant_are_refused():
    with pytest.raises(SelectionError, match="variant is 'class' or 'tang'; got 'Tang'"):
        LAPE(variant="Tang")
    with pytest.raises(SelectionError, match="has no budget per group; set top_rate instead"):
        LAPE(0.01, variant="tang")
    with pytest.raises(SelectionError, match="has no budget per group"):
        LAPE(count=5, variant="tang")
    with pytest.raises(SelectionError, match="belong to variant='tang'"):
        LAPE(top_rate=0.5)
    for rate in (0, -0.1, 1.1, float("nan"), True):
        with pytest.raises(SelectionError, match=r"LAPE: filter_rate is in \(0, 1\]"):
            LAPE(variant="tang", filter_rate=rate)


def test_rates_too_small_for_so_few_neurons_are_refused():
    stats = statistics_of(np.ones((2, 20), dtype=np.int64), np.array([2, 2]))
    with pytest.raises(SelectionError, match=r"top_rate=0\.01 of 20 neurons yields no neuron; use a larger top_rate"):
        LAPE(variant="tang").select(stats)
    with pytest.raises(SelectionError, match=r"filter_rate=0\.01 is less than one of 40 probabilities"):
        LAPE(variant="tang", top_rate=0.5, filter_rate=0.01).select(stats)


def test_the_repr_says_the_rates_that_differ_from_the_authors():
    assert repr(LAPE(variant="tang")) == "LAPE(variant='tang')"
    assert repr(LAPE(variant="tang", top_rate=0.02)) == "LAPE(variant='tang', top_rate=0.02)"
    assert repr(LAPE()) == "LAPE(fraction=0.005)"
