"""How far selections agree: of two selectors, and of two groups."""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats as scipy_stats

from vlmneurons.checks import check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.neurons.selection import Selection
from vlmneurons.selectors import CombinedSelector, Readable, Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import added_up
from vlmneurons.trust.resampling import check_selector

if TYPE_CHECKING:
    import pandas as pd


def agreement(selections: Mapping[str, Selection]) -> "pd.DataFrame":
    """How far selectors agree: for each pair and group the Jaccard overlap, and what chance would give.

    Selections of the same groups are compared group by group. Where the groups are others, such as languages against
    cultures, each group of the one is compared with each of the other.

    Columns: ``first``, ``second``, ``group``, ``second_group`` (of the second; mostly the same), ``jaccard``,
    ``chance``.

    Args:
        selections: selections over one space, by name.

    Raises:
        MismatchError: the selections are of different spaces.
    """
    import pandas as pd

    check_kind("selections", selections, Mapping, MismatchError, "a dictionary of selections by name")
    for name, one in selections.items():
        check_kind(f"selections[{name!r}]", one, Selection, MismatchError)
    names = list(selections)
    rows: list[dict[str, object]] = []
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            a, b = selections[first], selections[second]
            same = set(a) == set(b)
            for group, other in [(group, group) for group in a] if same else itertools.product(a, b):
                row: dict[str, object] = {"first": first, "second": second, "group": group, "second_group": other}
                row |= {"jaccard": a[group].jaccard(b[other]), "chance": a[group].expected_jaccard(b[other])}
                rows.append(row)
    return pd.DataFrame(rows, columns=["first", "second", "group", "second_group", "jaccard", "chance"])


def relatedness(evidence: Readable, selector: Selector) -> "pd.DataFrame":
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
    import pandas as pd

    check_selector(selector)
    selection = selector.select(evidence)
    ranks = score_ranks(selector, evidence)
    stats = added_up(evidence)
    profile = None
    if isinstance(stats, ActivationStatistics):
        profile = stats.probability.numpy()
        profile -= profile.mean(0)
        profile -= profile.mean(1, keepdims=True)
        length = np.linalg.norm(profile, axis=1, keepdims=True)
        profile = np.divide(profile, length, out=np.zeros_like(profile), where=length > 0)
    rows = []
    for n, first in enumerate(selection.groups):
        for m, second in enumerate(selection.groups[n + 1 :], start=n + 1):
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "jaccard": selection[first].jaccard(selection[second]),
                    "chance": selection[first].expected_jaccard(selection[second]),
                    "spearman": float("nan") if ranks is None else float(ranks[n] @ ranks[m]),
                    "profile": float("nan") if profile is None else float(profile[n] @ profile[m]),
                }
            )
    return pd.DataFrame(rows, columns=["first", "second", "jaccard", "chance", "spearman", "profile"])


def score_ranks(selector: Selector, evidence: Readable) -> np.ndarray | None:
    """Standardised ranks of all neurons, ``[group, neuron]``, whose products are rank correlations.

    None for combinations of sets, which have no scores.

    Args:
        selector: what scores.
        evidence: statistics, or counts of single questions, that the selector reads.
    """
    if isinstance(selector, CombinedSelector):
        return None
    scores = selector.score(selector.read(evidence)).numpy()
    ranks = scipy_stats.rankdata(scores, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)
