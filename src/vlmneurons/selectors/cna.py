"""CNA, the neurons whose mean at the last token differs most between a group and the others (arXiv 2605.12290).

``score[c, n] = abs(mean over the questions of c of a[n] - mean over all other questions of a[n])``, where ``a`` is the
neuron's value at the input of the down projection.
"""

from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.checks import as_number, as_whole, check_kind
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.selectors._base import Selector, Shared, budget_of, check_flags, highest, layer_numbers, layer_parts
from vlmneurons.selectors._exact import sum_over_groups
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import GroupedItems


class CNA(Selector[ActivationStatistics]):
    """Contrastive neuron attribution: the difference of mean activations between a group's questions and the others'.

    ``score[c, n] = abs(mean over the questions of c - mean over all other questions)`` of the product
    ``gate * up`` (the input of the down projection, site kind ``"post"``) at the last token of the prompt, in units of
    the activation. Record with ``record(…, space=model.space("language", "post"), tokens="last", magnitudes=True)``.
    The default share is 0.1 % of the neurons.

    arXiv 2605.12290 (Contrastive Neuron Attribution). There, one set of prompts is contrasted with one other, and
    neurons among the highest 0.1 % on more than 80 % of unrelated prompts are removed first: give those of
    `universal_neurons` as ``exclude``. With several groups, the other set is all other groups' questions together (each
    question counting the same): ours. In a mixture of experts, means are over the questions whose last token reached
    the expert, and 0 where none did. The authors' code (NousResearch/neural-steering) leaves out layers 0 and 1 by
    default, which ``leave_out`` does, and does not itself remove the universal neurons that it finds.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "post", [3])
        >>> total = [[4.0, 1.0, 0.0], [0.0, 1.0, -1.0]]
        >>> stats = ActivationStatistics.from_counts(space, ["EGY", "SGP"], [[2, 2, 0], [0, 2, 0]], [2, 2], total=total)
        >>> CNA(count=1).score(stats)
        tensor([[2.0000, 0.0000, 0.5000],
                [2.0000, 0.0000, 0.5000]], dtype=torch.float64)
    """

    fraction = 0.001
    contrastive = True

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        signed: bool = False,
        anywhere: bool = False,
        leave_out: Iterable[SupportsIndex] | SupportsIndex | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets; 0.001 unless given.
            signed: rank by the signed difference, so that only neurons that are *more* active for the group come first.
            anywhere: also accept statistics of other sites and tokens than the paper's.
            leave_out: numbers of layers never to choose from, though their neurons count in the share (with ``layers``
                they do not). The default of the authors' code is layers 0 and 1: ``leave_out=(0, 1)``.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        check_flags(self, signed=signed, anywhere=anywhere)
        self.signed, self.anywhere = signed, anywhere
        self.leave_out = None if leave_out is None else layer_numbers(leave_out)

    def check_statistics(self, stats: ActivationStatistics) -> None:
        """Make sure that the statistics are sums of the product at the last token.

        Raises:
            SelectionError: they are not, or see `Selector.check_statistics`.
        """
        super().check_statistics(stats)
        if self.anywhere:
            return
        kinds = {site.kind for site in stats.space.sites}
        rule = stats.provenance.get("tokens", "last")
        if kinds != {"post"} or rule != "last":
            raise SelectionError(
                f"CNA reads the product at the last token; these statistics are of {', '.join(sorted(kinds))} with "
                f"tokens={rule!r}: record(…, space=model.space('language', 'post'), tokens='last', magnitudes=True), "
                "or say CNA(anywhere=True)"
            )

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """The difference of mean activations: its size, or with its sign."""
        self.check_statistics(stats)
        mean = stats.mean  # refuses statistics without sums
        assert stats.total is not None
        total = sum_over_groups(stats.total)
        # Each group's tokens at each site; in a mixture of experts only those that reached the expert.
        tokens = stats.reached.to(torch.float64)
        widths = torch.tensor(stats.space.widths)
        for row, group_total, group_tokens in zip(mean, stats.total, tokens, strict=True):
            other_tokens = torch.repeat_interleave((tokens.sum(0) - group_tokens).clamp_(min=1), widths)
            row -= (total - group_total).div_(other_tokens)
        return mean if self.signed else mean.abs_()

    def eligible(
        self, stats: ActivationStatistics, scores: Float[Tensor, "group neuron"]
    ) -> Bool[Tensor, "group neuron"] | None:
        """All neurons but those of the layers left out.

        Raises:
            SiteError: a layer that the space does not have.
        """
        if self.leave_out is None:
            return None
        return torch.ones_like(scores, dtype=torch.bool).index_fill_(1, stats.space.restrict(layers=self.leave_out), 0)


def universal_neurons(
    items: GroupedItems, *, fraction: float = 0.001, share: float = 0.8, per_layer: SupportsIndex | None = None
) -> NeuronSet:
    """The neurons that are among the most active ones whatever is asked, such as to exclude them from a selection.

    A neuron is universal if it is among the ``fraction`` of neurons with the highest mean activations for more than
    ``share`` of the questions (arXiv 2605.12290: the highest 0.1 % on more than 80 % of diverse prompts). The authors'
    code does otherwise: see ``per_layer``.

    Args:
        items: questions of many kinds, recorded with ``magnitudes=True``.
        fraction: share of the neurons that counts as most active.
        share: share of the questions.
        per_layer: the rule of the released code, in place of ``fraction``: this many neurons of *each layer* (there
            50), with the highest *absolute* mean activations, for *at least* ``int(share * questions)`` questions
            (there 16 of 20).

    Raises:
        SelectionError: a number outside (0, 1], sums were not recorded, or ``per_layer`` is less than 1.
    """
    check_kind("items", items, GroupedItems, SelectionError, "GroupedItems, which ItemStatistics.grouped gives")
    for name, number in (("fraction", fraction), ("share", share)):
        as_number(f"universal_neurons: {name}", number, SelectionError)
        if not 0 < number <= 1:
            raise SelectionError(f"universal_neurons: {name} is in (0, 1]; got {number!r}")
    size, n_items = len(items.space), len(items.rows)
    if per_layer is None:
        parts, quota = [torch.arange(size)], max(1, budget_of(fraction, size))
    else:
        parts = [part for _, part in layer_parts(items.space)]
        quota = as_whole("universal_neurons: per_layer", per_layer, SelectionError, least=1)
    times = np.zeros(size, dtype=np.int64)  # for how many questions each neuron is among the most active
    for place in range(n_items):
        values = torch.from_numpy(items.taken(np.array([place])).values("mean", slice(0, size))[0])
        for part in parts:
            part_values = values[part] if per_layer is None else values[part].abs()
            times[part[highest(part_values, quota)].numpy()] += 1
    enough = times > share * n_items if per_layer is None else times >= int(share * n_items)
    return NeuronSet.from_mask(items.space, torch.from_numpy(enough))
