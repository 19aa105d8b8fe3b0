"""Neurons that are a group's under several conditions: languages, prompts, modalities."""

import functools
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
    """What the three rules share: another rule, scored under each condition."""

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
            of: the rule whose scores are combined; `CAS` unless given. Its own budget does not matter, and it can have
                no layers or exclusions: give them to this selector.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        rule = CAS() if of is None else of
        if not isinstance(rule, Selector) or not issubclass(ActivationStatistics, rule.reads):
            got = type(rule).__name__ if isinstance(rule, Selector) else repr(rule)
            raise SelectionError(f"{type(self).__name__}: of is a selector that scores ActivationStatistics; got {got}")
        if names := rule._was_given("layers", "exclude", "per_layer"):
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
        for one in stats.statistics.values():
            self.of.check_statistics(one)

    @abstractmethod
    def score(self, stats: Conditions) -> Float64[Tensor, "group neuron"]:
        """See the class."""


def _zscores(rule: Selector, stats: Conditions) -> Iterator[list[np.ndarray]]:
    """For each group its neurons' z-scores under each condition; row by row, which needs no further table."""
    tables = [rule._evaluate(one)[0].numpy() for one in stats.statistics.values()]
    for rows in zip(*tables, strict=True):
        yield [zscored(row) for row in rows]


class CRFusion(_OverConditions):
    """Consistency-regularised fusion: scores that are high under all conditions, less their spread over conditions.

    ``score[c, n] = mean - penalty * std`` over conditions of the z-scores, over neurons, of the rule's scores for group
    ``c``; in standard deviations. The standard deviation over conditions is the population's (divided by their number).

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
            # A neuron that the rule leaves out under some condition is left out (-inf less -inf is NaN).
            out = None if min(row.min() for row in scores) > -np.inf else np.isneginf(scores).any(0)
            if out is not None:
                for row in scores:
                    row[out] = 0.0
            mean = sum(scores[1:], scores[0].copy())
            mean /= len(scores)
            spread = np.zeros_like(mean)
            for row in scores:
                row -= mean
                row *= row
                spread += row
            spread /= len(scores)
            np.sqrt(spread, out=spread)
            spread *= float(self.penalty)
            mean -= spread
            if out is not None:
                mean[out] = -np.inf
            fused.append(torch.from_numpy(mean))
        return torch.stack(fused)


class Overlap(_OverConditions):
    """Neurons whose scores are high under *every* condition: ``score[c, n]`` is the lowest z-score over conditions.

    Z-scores are over neurons, for each group and condition. arXiv 2608.08772 (Overlap), there of CAS scores over
    languages.

    Example:
        ``Overlap(0.005).select({"English": english, "Hindi": hindi})``
    """

    def score(self, stats: Conditions) -> Float64[Tensor, "group neuron"]:
        """The lowest z-score over conditions."""
        self.check_statistics(stats)
        return torch.stack([torch.from_numpy(functools.reduce(np.minimum, rows)) for rows in _zscores(self.of, stats)])


class Joint(_OverConditions):
    """The rule on the counts of all conditions together: ``score`` is that of the pooled statistics.

    Conditions weigh by their tokens. arXiv 2608.08772 (Joint), there of CAS over languages.

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
