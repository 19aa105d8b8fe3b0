"""How far selections agree: of two selectors, and of two groups."""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from vlmneurons.checks import check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.neurons.selection import Selection
from vlmneurons.selectors import CombinedSelector, Readable, Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import added_up
from vlmneurons.trust.resampling import check_selector


def agreement(selections: Mapping[str, Selection]) -> pd.DataFrame:
    """How far selectors agree: for each pair and group the Jaccard overlap, and what chance would give.

    Selections of the same groups are compared group by group. Where their groups differ, such as languages and
    cultures, each group of the first is compared with each group of the second.

    Columns: ``first``, ``second``, ``group``, ``second_group`` (the second selection's group; mostly the same),
    ``jaccard``, ``chance`` (the overlap of two random sets of these sizes).

    Args:
        selections: selections over one space, by name.

    Raises:
        MismatchError: the selections are of different spaces.
    """
    check_kind("selections", selections, Mapping, MismatchError, "a dictionary of selections by name")
    for name, selection in selections.items():
        check_kind(f"selections[{name!r}]", selection, Selection, MismatchError)
    rows = []
    for (first, a), (second, b) in itertools.combinations(selections.items(), 2):
        for group, second_group in zip(a, a, strict=True) if set(a) == set(b) else itertools.product(a, b):
            neurons, second_neurons = a[group], b[second_group]
            overlap, chance = neurons.jaccard(second_neurons), neurons.expected_jaccard(second_neurons)
            rows.append((first, second, group, second_group, overlap, chance))
    return pd.DataFrame(rows, columns=["first", "second", "group", "second_group", "jaccard", "chance"])


def relatedness(evidence: Readable, selector: Selector) -> pd.DataFrame:
    """Whose neurons resemble whose? For each pair of groups, how alike their sets and their scores are.

    Args:
        evidence: what the selector selects from.
        selector: what selects. Rules that give a neuron to one group only (`CAS`, `LAPE`) have disjoint sets and
            scores that exclude each other; `MAD` or `LAP` show relations.

    Returns:
        A row for each pair with ``first``, ``second``, ``jaccard`` of their sets, ``chance`` (of two random sets of
        these sizes), ``spearman`` (rank correlation of the scores of all neurons; NaN for selectors without scores) and
        ``profile`` (correlation, over neurons, of the groups' activation probabilities less the mean over groups; NaN
        where there are no counts). With ``n`` unrelated groups the profiles correlate by ``-1 / (n - 1)``, not by 0.
    """
    check_selector(selector)
    selection = selector.select(evidence)
    ranks = score_ranks(selector, evidence)
    stats = added_up(evidence)
    profile = None
    if isinstance(stats, ActivationStatistics):
        profile = stats.probability.numpy()
        profile = _standardised(profile - profile.mean(0))
    rows = []
    for (n, (first, a)), (m, (second, b)) in itertools.combinations(enumerate(selection.items()), 2):
        spearman, correlation = (np.nan if table is None else float(table[n] @ table[m]) for table in (ranks, profile))
        rows.append((first, second, a.jaccard(b), a.expected_jaccard(b), spearman, correlation))
    return pd.DataFrame(rows, columns=["first", "second", "jaccard", "chance", "spearman", "profile"])


def score_ranks(selector: Selector, evidence: Readable) -> np.ndarray | None:
    """Standardised ranks of all neurons, ``[group, neuron]``: the product of two groups' is their rank correlation.

    Combinations of sets have no scores; for these it is None.

    Args:
        selector: what scores.
        evidence: statistics, or counts of single questions, that the selector reads.
    """
    if isinstance(selector, CombinedSelector):
        return None
    return _standardised(scipy_stats.rankdata(selector.score(selector.read(evidence)).numpy(), axis=1))


def _standardised(table: np.ndarray) -> np.ndarray:
    """Rows less their mean, of length 1: the product of two is their correlation. A constant row becomes zero."""
    table = table - table.mean(1, keepdims=True)
    length = np.linalg.norm(table, axis=1, keepdims=True)
    return np.divide(table, length, out=np.zeros_like(table), where=length > 0)
