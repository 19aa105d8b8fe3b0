"""Neurons that are a group's under several conditions, such as languages, prompts or modalities (arXiv 2608.08772).

With ``z`` the z-scores of another rule (CAS) under each condition: ``score = mean(z) - penalty * std(z)`` (`CRFusion`),
``score = min(z)`` (`Overlap`), or the rule's own scores on the counts of all conditions together (`Joint`).
"""

import numbers
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.errors import SelectionError
from vlmneurons.selectors._base import Selector, Shared
from vlmneurons.selectors._scores import zscored
from vlmneurons.selectors.cas import CAS
from vlmneurons.statistics.conditions import Conditions
from vlmneurons.statistics.counts import ActivationStatistics


class _OverConditions(Selector[Conditions]):
    """What the three rules share: another rule, which is scored under each condition."""

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        of: Selector | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets.
            of: the rule whose scores are combined; `CAS` unless given. Its budget does not matter, and it can have no
                layers or exclusions: give them to this selector.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        rule = CAS() if of is None else of
        if not isinstance(rule, Selector) or not issubclass(ActivationStatistics, rule.reads):
            got = type(rule).__name__ if isinstance(rule, Selector) else repr(rule)
            raise SelectionError(f"{type(self).__name__}: of is a selector that scores ActivationStatistics; got {got}")
        if names := rule._explicit_settings("layers", "exclude", "per_layer"):
            raise SelectionError(
                f"{type(self).__name__}: of={rule!r} gives scores alone, whatever {', '.join(names)} it has: give that "
                f"to {type(self).__name__} itself"
            )
        self.of = rule
        self.contrastive = rule.contrastive

    def check_statistics(self, stats: Conditions) -> None:
        """Make sure that the rule can score every condition.

        Raises:
            SelectionError: it cannot; the message names the condition.
        """
        super().check_statistics(stats)
        for statistics in stats.statistics.values():
            self.of.check_statistics(statistics)

    @abstractmethod
    def score(self, stats: Conditions) -> Float64[Tensor, "group neuron"]:
        """See the class."""


def _zscores(rule: Selector, stats: Conditions) -> Iterator[np.ndarray]:
    """For each group the z-scores of its neurons ``[condition, neuron]``, one group at a time to save memory."""
    tables = [rule._evaluate(statistics)[0].numpy() for statistics in stats.statistics.values()]
    for rows in zip(*tables, strict=True):
        yield np.stack([zscored(row) for row in rows])


class CRFusion(_OverConditions):
    """Consistency-regularised fusion: scores that are high under all conditions, less their spread over conditions.

    ``score[c, n] = mean - penalty * std`` over conditions of neuron ``n``'s z-score, in standard deviations. Z-scores
    are over neurons, of the rule's scores for group ``c`` under one condition. The standard deviation over conditions
    is the population's (divided by their number).

    arXiv 2608.08772 fuses CAS scores over languages with a penalty of 0.3. That the z-scores are taken over neurons
    within each group and condition, and which standard deviation is meant, is our reading.

    Example:
        ``CRFusion(0.005).select({"English": english, "Hindi": hindi})``
    """

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        of: Selector | None = None,
        penalty: float | int = 0.3,
        **shared: Unpack[Shared],
    ) -> None:
        """Settings; see `Overlap`, which has the same ones.

        Args:
            fraction: share of the neurons that each group gets.
            of: the rule whose scores are fused; `CAS` unless given.
            penalty: weight of the spread over conditions.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, of=of, **shared)
        if isinstance(penalty, bool) or not isinstance(penalty, numbers.Real) or not 0 <= penalty < float("inf"):
            raise SelectionError(f"CRFusion: penalty is a number of at least 0; got {penalty!r}")
        self.penalty = penalty

    def score(self, stats: Conditions) -> Float64[Tensor, "group neuron"]:
        """Mean of the z-scores less the penalised spread, in standard deviations."""
        self.check_statistics(stats)
        fused = []
        for scores in _zscores(self.of, stats):
            left_out = np.isneginf(scores).any(0)  # by the rule, under some condition
            scores[:, left_out] = 0.0  # -inf less -inf would be NaN
            # Python's sum adds the conditions in order, whatever the machine; NumPy's may add them in another one.
            mean = sum(scores) / len(scores)
            spread = np.sqrt(sum((scores - mean) ** 2) / len(scores))
            fused.append(np.where(left_out, -np.inf, mean - spread * float(self.penalty)))
        return torch.from_numpy(np.stack(fused))


class Overlap(_OverConditions):
    """Neurons whose scores are high under *every* condition: ``score[c, n]`` is the lowest z-score over conditions.

    Z-scores are over neurons, for each group and condition. arXiv 2608.08772 (Overlap) takes those of CAS over
    languages.

    Example:
        ``Overlap(0.005).select({"English": english, "Hindi": hindi})``
    """

    def score(self, stats: Conditions) -> Float64[Tensor, "group neuron"]:
        """The lowest z-score over conditions."""
        self.check_statistics(stats)
        return torch.from_numpy(np.stack([scores.min(0) for scores in _zscores(self.of, stats)]))


class Joint(_OverConditions):
    """The rule on the counts of all conditions together: its ``score`` of the pooled statistics.

    Conditions weigh by their tokens. arXiv 2608.08772 (Joint) takes CAS, over languages.

    Example:
        ``Joint(0.005).select({"English": english, "Hindi": hindi})``
    """

    def score(self, stats: Conditions) -> Float64[Tensor, "group neuron"]:
        """The rule's scores on pooled counts, in the unit of that rule."""
        self.check_statistics(stats)
        return self.of.score(stats.pooled())

    def eligible(self, stats: Conditions, scores: Float[Tensor, "group neuron"]) -> Bool[Tensor, "group neuron"] | None:
        """What the rule finds eligible."""
        return self.of.eligible(stats.pooled(), scores)
