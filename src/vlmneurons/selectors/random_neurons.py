"""Random neurons, with which every selection must be compared: ``score[c, n]`` is a uniform random number."""

import hashlib
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.checks import as_whole
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet, check_same_space
from vlmneurons.selectors._base import Selector, Shared, highest, provenance_of
from vlmneurons.selectors._evidence import Readable
from vlmneurons.statistics.counts import ActivationStatistics


class RandomNeurons(Selector[ActivationStatistics]):
    """A control: a uniform random set for each group, independent of the other groups' sets and of all counts.

    The set depends on the seed, the group's name and the size of the space only: it is the same on every machine, and
    whatever other groups there are. With the same seed, the set of a smaller fraction lies within that of a larger one.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [50])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY"], torch.zeros(1, 50, dtype=torch.int64), [1])
        >>> RandomNeurons(0.1, seed=0).select(stats)["EGY"].indices
        tensor([ 3,  8, 27, 33, 36])
    """

    _always_shown = ("seed",)

    def __init__(
        self,
        fraction: float | int | None = None,
        seed: SupportsIndex = 0,
        **shared: Unpack[Shared],
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets.
            seed: any integer.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        self.seed = as_whole("RandomNeurons: seed", seed, SelectionError)

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """Independent uniform numbers from 0 to 1."""
        self.check_statistics(stats)
        return torch.stack([uniform(len(stats.space), "RandomNeurons", self.seed, group) for group in stats.groups])


class LayerMatchedRandom(Selector[ActivationStatistics]):
    """Random neurons, as many in each site (of each layer) as another selection has there.

    Uniform random neurons are spread over all layers, while selections crowd in a few, whose neurons may matter more
    or less for anything: only a control with as many neurons in each layer tells the two apart (arXiv 2406.14144 shows
    that uniform random neurons flatter results). The neurons of a site are equally likely, those of ``like`` among them
    unless they are excluded: ``LayerMatchedRandom(like, exclude=like)``. The sets depend on the seed, the group's name
    and the numbers of neurons only.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [50, 50])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY"], torch.zeros(1, 100, dtype=torch.int64), [1])
        >>> like = Selection({"EGY": NeuronSet(space, [1, 2, 3, 99])}, selector="by hand")
        >>> LayerMatchedRandom(like).select(stats)["EGY"].per_layer()
        {0: 3, 1: 1}
    """

    _always_shown = ("seed",)

    def __init__(
        self, like: Selection, seed: SupportsIndex = 0, *, exclude: NeuronSet | Selection | None = None
    ) -> None:
        """Settings.

        Args:
            like: the selection to match; it must have every group of the statistics.
            seed: any integer.
            exclude: neurons never to choose.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        if not isinstance(like, Selection):
            raise SelectionError(f"LayerMatchedRandom: like is a Selection; got {type(like).__name__}")
        self.fraction = None
        super().__init__(exclude=exclude)
        self.like = like
        self.seed = as_whole("LayerMatchedRandom: seed", seed, SelectionError)

    def _check_settings(self) -> None:
        super()._check_settings()
        if names := self._explicit_settings("fraction", "count", "layers", "per_layer"):
            raise SelectionError(
                f"LayerMatchedRandom: {', '.join(names)} cannot be given: as many neurons are drawn of each site as "
                "`like` has there; give it to the selector that made `like`"
            )

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """Independent uniform numbers from 0 to 1; in each site the highest are chosen."""
        self.check_statistics(stats)
        return torch.stack(
            [uniform(len(stats.space), "LayerMatchedRandom", self.seed, group) for group in stats.groups]
        )

    def select(self, *evidence: Readable) -> Selection:
        """For each group random neurons, as many in each site as ``like`` has.

        Raises:
            SelectionError: a group without counted tokens, or more neurons wanted of a site than are not excluded.
            MismatchError: ``like`` or ``exclude`` is of another space.
            GroupError: ``like`` lacks a group.
        """
        stats = self._checked_table(evidence)
        space = stats.space
        check_same_space(self.like.space, space)
        excluded = self._excluded_masks(stats)
        sets = {}
        for group in stats.groups:
            counts = self.like[group].per_site()
            scores = uniform(len(space), "LayerMatchedRandom", self.seed, group)
            parts = [torch.empty(0, dtype=torch.int64)]
            for position in counts.nonzero().flatten().tolist():
                wanted, columns = int(counts[position]), slice(space.offsets[position], space.offsets[position + 1])
                allowed = ~excluded[group][columns] if group in excluded else None
                chosen = highest(scores[columns], wanted, allowed)
                if len(chosen) < wanted:
                    raise SelectionError(
                        f"group {group!r}: {wanted} neurons wanted of site {space.sites[position]}, but only "
                        f"{len(chosen)} of its {space.widths[position]} are not excluded"
                    )
                parts.append(chosen + space.offsets[position])
            sets[group] = NeuronSet._of(space, torch.cat(parts))
        return Selection(sets, selector=repr(self), budget=self.like.budget, provenance=provenance_of(stats))


def uniform(size: int, *key: object) -> Float64[Tensor, " neuron"]:
    """Uniform numbers in [0, 1) that depend on the key only: the same on every machine, for ever.

    A hash of the key is the key of a counter-based bit generator (Philox). Its raw output is used because NumPy keeps
    streams of bits fixed for ever, but not what its distributions make of them.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64)).mul_(2.0**-53)
