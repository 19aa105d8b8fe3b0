"""Stability, null distributions and profiles, against brute force and on data with nothing in it."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

import vlmneurons as vn
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import CAS, LAPE, MAD, AveragePrecision
from vlmneurons.statistics.items import Item, ItemStatistics
from vlmneurons.trust.pvalues import holm


def made_items(folder, counts, groups, tokens=50, chosen=0, pictures=None):
    """Item statistics of counts that were never recorded, of questions without pictures unless they are given."""
    space = NeuronSpace.from_widths("language", "gate", [counts.shape[1] // 2, counts.shape[1] - counts.shape[1] // 2])
    shown = [()] * len(groups) if pictures is None else pictures
    items = [Item(str(n), group, 0, {"n": n}, shown[n]) for n, group in enumerate(groups)]
    made = ItemStatistics.create(folder, space, items, {"model": "made"}, ["positive"])
    rows = range(len(items))
    made.write(rows, [chosen] * len(items), [tokens] * len(items), [0.0] * len(items), {"positive": counts})
    return made


@pytest.fixture
def noise(tmp_path):
    rng = np.random.default_rng(0)
    return made_items(tmp_path / "noise", rng.binomial(50, 0.3, (60, 40)), [("A", "B", "C")[n % 3] for n in range(60)])


def brute_force(items, weights, owners):
    counts = np.fromfile(items.folder / "positive.bin", dtype="<u2").reshape(len(items), -1).astype(np.int64)
    positive = np.zeros((3, counts.shape[1]), dtype=np.int64)
    tokens = np.zeros(3, dtype=np.int64)
    for row in range(len(items)):
        positive[owners[row]] += int(weights[row]) * counts[row]
        tokens[owners[row]] += int(weights[row]) * 50
    return positive, tokens


def test_drawn_statistics_equal_sums_by_hand(noise):
    from vlmneurons.trust.resampling import drawn_items

    sample = noise.grouped(condition="all")
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    fixed = np.broadcast_to(sample.owner, weights.shape)
    shuffled = np.stack([rng.permutation(sample.owner) for _ in range(5)])
    for owners in (fixed, shuffled):
        for draw, one in enumerate(drawn_items(sample, owners, weights)):
            stats = one.statistics
            assert stats == sample.taken(one.rows, one.owner).statistics  # rows are those of the pool, in order
            positive, tokens = brute_force(noise, weights[draw], owners[draw])
            assert np.array_equal(stats.positive.numpy(), positive)
            assert stats.tokens.tolist() == tokens.tolist()


def test_stability_is_perfect_where_every_question_is_alike_and_near_chance_in_noise(tmp_path, noise):
    counts = np.zeros((30, 40), dtype=np.int64)
    for n in range(30):
        counts[n, [n % 3, 10 + n % 3]] = 40
    alike = made_items(tmp_path / "alike", counts, [("A", "B", "C")[n % 3] for n in range(30)])
    table = vn.stability(alike, CAS(count=2), resamples=10)
    assert table["jaccard"].eq(1).all()
    assert table["spearman"].round(12).eq(1).all()
    halves = vn.stability(noise, MAD(count=4), resamples=60, method="halves").set_index("group").loc["all"]
    assert halves["jaccard_low"] <= halves["chance"] <= halves["jaccard_high"]
    assert abs(halves["jaccard"] - halves["chance"]) < 0.06
    assert halves["questions"] == 60


def test_stability_gives_the_same_numbers_for_the_same_seed_and_others_for_another(noise):
    tables = [vn.stability(noise, MAD(count=4), resamples=5, seed=seed) for seed in (0, 0, 1)]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_rank_correlation_equals_scipys(noise):
    from vlmneurons.trust.agreement import score_ranks

    one, other = noise.group_by(condition="all"), noise.group_by(lambda row: "ABC"[row["n"] // 20], condition="all")
    ours = score_ranks(CAS(), one) @ score_ranks(CAS(), other).T
    for row, column in itertools.product(range(3), range(3)):
        theirs = scipy.stats.spearmanr(CAS().score(one)[row], CAS().score(other)[column]).statistic
        assert ours[row, column] == pytest.approx(theirs)


def test_p_values_of_data_without_groups_are_uniform(tmp_path):
    values, families = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        # Continuous-looking counts, so that ties do not make the test conservative.
        counts = rng.binomial(5000, 0.3, (24, 30))
        items = made_items(tmp_path / str(seed), counts, [("A", "B")[n % 2] for n in range(24)], tokens=5000)
        table = vn.null_distribution(items, CAS(count=3), permutations=39, seed=seed, condition="all")
        values.extend(table["p"])
        families.append(table["p_holm"].min() <= 0.05)
    # 120 values on the grid k/40; Kolmogorov-Smirnov at 0.1 % (the two groups of a table are not independent).
    assert scipy.stats.kstest(np.array(values[::2]) - 1 / 80, "uniform").pvalue > 0.001
    assert scipy.stats.kstest(np.array(values[1::2]) - 1 / 80, "uniform").pvalue > 0.001
    assert np.mean(families) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)


def test_a_planted_difference_has_the_smallest_p_value_there_is(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.binomial(50, 0.3, (40, 30))
    counts[::2, :3] = 45
    items = made_items(tmp_path / "planted", counts, [("A", "B")[n % 2] for n in range(40)])
    table = vn.null_distribution(items, CAS(count=3), permutations=99, condition="all").set_index("group")
    assert table.loc["A", "p"] == 0.01
    assert table.loc["A", "p_holm"] == 0.02
    assert table.loc["A", "strength"] > table.loc["A", "null_high"]


def test_sample_sizes_reach_full_overlap_with_all_questions(noise):
    table = vn.sample_sizes(noise, MAD(count=4), [5, 20], repeats=4, condition="all")
    overlap = table.groupby("size")["jaccard"].mean()
    assert overlap[20] == 1.0
    assert overlap[5] < 1.0


def test_thin_groups_are_named(noise):
    with pytest.raises(SelectionError, match=r"at least 30 questions a group are needed; fewer are in A \(20\), B"):
        vn.sample_sizes(noise, MAD(count=4), [30], condition="all")
    with pytest.raises(SelectionError, match="method='thirds' does not exist"):
        vn.stability(noise, MAD(count=4), method="thirds")


def test_agreement_compares_every_pair_with_chance(noise):
    stats = noise.group_by(condition="all")
    selections = {
        "MAD": MAD(count=4).select(stats),
        "CAS": CAS(count=4).select(stats),
        "again": CAS(count=4).select(stats),
    }
    table = vn.agreement(selections).set_index(["first", "second", "group"])
    assert table.loc[("CAS", "again", "A"), "jaccard"] == 1.0
    assert len(table) == 9
    expected = selections["MAD"]["B"].expected_jaccard(selections["CAS"]["B"])
    assert table.loc[("MAD", "CAS", "B"), "chance"] == expected
    assert (table["second_group"] == table.index.get_level_values("group")).all()


def test_selections_of_other_groups_are_compared_group_with_group():
    space = NeuronSpace.from_widths("language", "gate", [50, 50])
    languages = vn.Selection({"de": vn.NeuronSet(space, range(10)), "fr": vn.NeuronSet(space, range(20, 30))})
    cultures = vn.Selection({name: vn.NeuronSet(space, range(5 * n, 5 * n + 10)) for n, name in enumerate("XYZ")})
    table = vn.agreement({"language": languages, "culture": cultures})
    assert table[["group", "second_group"]].to_numpy().tolist() == [[a, b] for a in ("de", "fr") for b in "XYZ"]
    pairs = table.set_index(["group", "second_group"])
    assert pairs.loc[("de", "Y"), "jaccard"] == 5 / 15
    assert pairs.loc[("fr", "X"), "jaccard"] == 0
    assert pairs.loc[("de", "X"), "chance"] == languages["de"].expected_jaccard(cultures["X"])


def test_layer_profile_tells_a_crowded_layer_from_a_uniform_choice():
    space = NeuronSpace.from_widths("language", "gate", [100] * 4)
    crowded = vn.NeuronSet(space, range(100, 120))
    spread = vn.NeuronSet(space, range(0, 400, 20))
    table = vn.layer_profile(vn.Selection({"crowded": crowded, "spread": spread})).set_index("group")
    assert table.loc["crowded", "gini"] == pytest.approx(0.75)
    assert table.loc["crowded", "entropy"] == 0.0
    assert table.loc["crowded", "top_layer"] == 1
    assert table.loc["crowded", "gini"] > table.loc["crowded", "gini_uniform_high"]
    assert table.loc["spread", "gini"] == 0.0
    assert table.loc["spread", "entropy"] == pytest.approx(np.log(4))
    overlap = vn.overlap_by_layer(crowded, spread)
    assert overlap["both"].tolist() == [0, 1, 0, 0]
    assert overlap["expected"].tolist() == [0, 20 * 5 / 100, 0, 0]


def test_holm_equals_a_computation_by_hand_and_keeps_nan():
    assert holm([0.01, 0.04, 0.03, np.nan]).tolist()[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(holm([0.01, np.nan])[1])
    assert torch.equal(torch.tensor(holm([0.6, 0.7])), torch.tensor([1.0, 1.0], dtype=torch.float64))


def test_every_function_takes_balanced_pools_and_names_thin_groups(noise):
    labels = ["thin" if n < 6 else "AB"[n % 2] for n in range(60)]
    table = vn.stability(noise, MAD(count=4), by=labels, condition="all", balanced=True, resamples=3)
    assert table["questions"].tolist() == [6, 6, 6, 18]
    table = vn.null_distribution(noise, MAD(count=4), by=labels, condition="all", balanced=5, permutations=3)
    assert table["questions"].tolist() == [5, 5, 5]
    for function, how in (
        (vn.stability, {"resamples": 2}),
        (vn.null_distribution, {"permutations": 2}),
        (lambda *a, **k: list(vn.resampled_selections(*a, **k)), {"resamples": 2}),
    ):
        with pytest.raises(SelectionError, match=r"at least 10 questions a group are needed; fewer are in thin \(6\)"):
            function(noise, MAD(count=4), by=labels, condition="all", minimum=10, **how)
    pool = noise.grouped(labels, condition="all", balanced=5)
    given = vn.stability(pool, MAD(count=4), resamples=3)
    assert given["questions"].tolist() == [5, 5, 5, 15]
    with pytest.raises(SelectionError, match="are grouped already: leave by and condition out"):
        vn.stability(pool, MAD(count=4), by=labels)


def test_pools_of_two_seeds_overlap_by_chance_in_noise_and_wholly_where_all_questions_are_alike(tmp_path, noise):
    counts = np.zeros((30, 40), dtype=np.int64)
    for n in range(30):
        counts[n, [n % 3, 10 + n % 3]] = 40
    alike = made_items(tmp_path / "alike", counts, [("A", "B", "C")[n % 3] for n in range(30)])
    assert vn.stability(alike, CAS(count=2), method="pools", size=3, resamples=5)["jaccard"].eq(1).all()
    table = vn.stability(noise, MAD(count=4), method="pools", size=4, resamples=40).set_index("group").loc["all"]
    assert table["jaccard"] < 0.4
    with pytest.raises(SelectionError, match="size belongs to method='pools'; 'halves' takes none"):
        vn.stability(noise, MAD(count=4), method="halves", size=3)
    with pytest.raises(SelectionError, match="at least 30 questions a group"):
        vn.stability(noise, MAD(count=4), method="pools", size=30)


def test_rules_that_look_at_single_questions_go_through_everything(noise):
    rule = AveragePrecision(count=4, on="probability")
    assert vn.stability(noise, rule, resamples=3)["jaccard"].between(0, 1).all()
    table = vn.null_distribution(noise, rule, permutations=19, condition="all")
    assert table["p"].between(0.05, 1).all()
    both = (CAS().zscore() + AveragePrecision(on="probability").zscore()).take(count=4)
    assert vn.stability(noise, both, resamples=3)["spearman"].between(-1, 1).all()
    combined = CAS(count=4) | rule
    assert vn.stability(noise, combined, resamples=3)["spearman"].isna().all()


def test_a_group_for_which_nothing_is_selected_is_the_weakest(tmp_path):
    counts = np.zeros((8, 6), dtype=np.int64)
    counts[::2, 0] = 40  # group A leads at neuron 0, B nowhere
    items = made_items(tmp_path / "one-sided", counts, ["A", "B"] * 4)
    strength = vn.selection_strength(items, CAS(count=1))
    assert strength == {"A": pytest.approx(0.8), "B": -np.inf}
    table = vn.null_distribution(items, LAPE(count=1), permutations=19).set_index("group")
    assert table.loc["B", "p"] == 1.0


def test_the_family_error_of_many_groups_is_at_most_nominal(tmp_path):
    families, values = [], []
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        items = made_items(
            tmp_path / str(seed), rng.binomial(3000, 0.2, (30, 24)), ["ABCDEF"[n % 6] for n in range(30)], tokens=3000
        )
        table = vn.null_distribution(items, MAD(count=3, signed=True), permutations=59, seed=seed)
        families.append(table["p_holm"].min() <= 0.1)
        values.append(table["p"].to_numpy())
    assert np.mean(families) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 40)
    assert scipy.stats.kstest(np.array(values)[:, 0] - 1 / 120, "uniform").pvalue > 0.001


def test_related_groups_are_told_from_unrelated_ones(tmp_path):
    rng = np.random.default_rng(0)
    rate = rng.uniform(0.2, 0.6, (4, 300))
    rate[1] = 0.8 * rate[0] + 0.2 * rate[1]  # B is much like A
    counts = np.concatenate([rng.binomial(200, rate[g], (10, 300)) for g in range(4)])
    items = made_items(tmp_path / "related", counts, ["ABCD"[n // 10] for n in range(40)], tokens=200)
    table = vn.relatedness(items, MAD(count=30, signed=True)).set_index(["first", "second"])
    assert len(table) == 6
    others = table.drop(("A", "B"))
    for column in ("jaccard", "spearman", "profile"):
        assert table.loc[("A", "B"), column] > others[column].max() + 0.2, column
    p = items.group_by().probability.numpy()
    p = p - p.mean(0)
    assert table.loc[("A", "C"), "profile"] == pytest.approx(np.corrcoef(p[0], p[2])[0, 1])
    scores = MAD(signed=True).score(items.group_by())
    assert table.loc[("B", "D"), "spearman"] == pytest.approx(scipy.stats.spearmanr(scores[1], scores[3]).statistic)


def test_layers_are_counted_against_a_uniform_choice_by_hand():
    space = NeuronSpace.from_widths("language", "gate", [100, 300])
    selection = vn.Selection(
        {"A": vn.NeuronSet(space, [*range(15), 150, 151, 152, 153, 154]), "B": vn.NeuronSet.empty(space)}
    )
    table = vn.layer_counts(selection).set_index(["group", "layer"])
    assert table.loc[("A", 0), ["neurons", "expected", "ratio"]].tolist() == [15, 5.0, 3.0]
    assert table.loc[("A", 1), ["neurons", "expected"]].tolist() == [5, 15.0]
    # 20 of 400 neurons, 100 of them in layer 0: 2.5 % and 97.5 % of the hypergeometric distribution.
    frozen = scipy.stats.hypergeom(400, 100, 20)
    assert frozen.cdf(table.loc[("A", 0), "low"] - 1) < 0.025 <= frozen.cdf(table.loc[("A", 0), "low"])
    assert frozen.cdf(table.loc[("A", 0), "high"] - 1) < 0.975 <= frozen.cdf(table.loc[("A", 0), "high"])
    assert table.loc[("B", 0), "expected"] == 0
    assert np.isnan(table.loc[("B", 0), "ratio"])


def test_layers_of_two_towers_are_told_apart():
    space = NeuronSpace((vn.Site("language", 0), vn.Site("vision", 0)), (50, 50))
    inside = vn.NeuronSet(space, range(10))
    table = vn.layer_counts(vn.Selection({"A": inside}))
    assert table[["tower", "neurons"]].to_numpy().tolist() == [["language", 10], ["vision", 0]]
    assert vn.layer_profile(vn.Selection({"A": inside}))["gini"].tolist() == [0.5]
    assert vn.overlap_by_layer(inside, inside)["both"].tolist() == [10, 0]


def test_resampled_selections_give_an_interval_of_the_concentration(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.binomial(50, 0.3, (40, 60))
    counts[::2, :8] += 12  # A's neurons lie in the first of two layers
    items = made_items(tmp_path / "crowded", counts, ["A", "B"] * 20)
    rule = CAS(count=6)
    again = list(vn.resampled_selections(items, rule, resamples=30, seed=1))
    assert [dict(one) for one in vn.resampled_selections(items, rule, resamples=30, seed=1)] == [dict(x) for x in again]
    table = vn.layer_profile(rule.select(items), resampled=again).set_index("group")
    assert table.loc["A", "gini_low"] == table.loc["A", "gini"] == 0.5
    assert table.loc["A", "gini_uniform_high"] <= 0.5
    assert table.loc["B", "gini_low"] < 0.5
