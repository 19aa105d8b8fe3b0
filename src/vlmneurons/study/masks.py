"""What a study switches off: masks, other interventions, and the names of a sweep's settings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmneurons.checks import as_plain
from vlmneurons.errors import MismatchError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.run.intervention import Intervention

One = Selection | NeuronSet | Intervention
Masks = Mapping[str, One | Sequence[One]]


@dataclass(frozen=True)
class Mask:
    """One set of neurons that was switched off.

    Attributes:
        selector: name under which the mask was given.
        repeat: number of the selection among several given under one name, such as the seeds of a random control.
        group: the group that the neurons were selected for; ``"all"`` for a set that is not of a group.
        size: number of neurons.
        intervention: what was done to them.
        layers: number of neurons in each layer of the space, in order of the space; see
            ``KnockoutResult.provenance["layers"]`` for their names.
    """

    selector: str
    repeat: int
    group: str
    size: int
    intervention: str = "zero"
    layers: tuple[int, ...] = ()


# -- names of settings -------------------------------------------------------------------------------------------------


def setting_name(selector: str, axis: str, value: float) -> str:
    """The name of a selector's masks under one setting of a sweep, which `KnockoutResult.curve` finds again.

    Args:
        selector: the name before the setting.
        axis: what is varied, such as ``"r"``.
        value: the setting.

    Examples:
        >>> setting_name("CAS", "r", 0.005)
        'CAS [r=0.005]'
    """
    return f"{selector} [{axis}={as_plain(value)!r}]"  # NumPy's own repr could not be read again


def split_setting(name: str) -> tuple[str, tuple[str, float] | None]:
    """The selector's bare name and its setting, if it has one.

    Examples:
        >>> split_setting("CAS [r=0.005]"), split_setting("CAS")
        (('CAS', ('r', 0.005)), ('CAS', None))
    """
    found = re.fullmatch(r"(.+) \[(\w+)=([^\[\]=]+)\]", name)
    if not found:
        return name, None
    try:
        return found[1], (found[2], float(found[3]))
    except ValueError:
        return name, None


# -- masks as they are given -------------------------------------------------------------------------------------------


def listed_masks(masks: Masks, groups: Sequence[str], default: Intervention) -> list[tuple[Mask, Intervention]]:
    """Every mask with its neurons, one by one.

    Args:
        masks: as `vlmneurons.knockout` takes them.
        groups: the groups that questions are of.
        default: what is done to neurons that are given bare; its own neurons do not matter.

    Raises:
        MismatchError: something that is no mask or has no name, or a selection only some of whose groups have
            questions (one of other groups altogether has effects on them, and no self effect).
    """
    if isinstance(masks, NeuronSet | Selection) or not isinstance(masks, Mapping) or not masks:
        got = f"a bare {type(masks).__name__}, without a name," if isinstance(masks, NeuronSet | Selection) else "none"
        raise MismatchError(
            f'masks are a mapping from names to selections, such as {{"CAS": selection}}; {got} was given'
        )
    if all(name in groups and isinstance(one, NeuronSet) for name, one in masks.items()):
        raise MismatchError(
            f"these masks are a set for each of the groups {', '.join(masks)}, and would pass for as many selectors: "
            'give them under one name, {"CAS": vn.Selection(masks)}'
        )
    listed: list[tuple[Mask, Intervention]] = []
    for name, given in masks.items():
        if not isinstance(name, str) or not name:
            raise MismatchError(f"a mask's name is a text that is not empty; got {name!r}")
        repeats = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        if not repeats:
            raise MismatchError(f"mask {name!r} is an empty list; give a Selection or a NeuronSet")
        for repeat, one in enumerate(repeats):
            how = one if isinstance(one, Intervention) else default
            neurons = one.neurons if isinstance(one, Intervention) else one
            if isinstance(neurons, NeuronSet):
                sets: Mapping[str, NeuronSet] = {"all": neurons}
            elif isinstance(neurons, Selection):
                sets = neurons
                missing = [group for group in neurons if group not in groups]
                # Other groups altogether, such as languages for questions about countries, are what is meant.
                if 0 < len(missing) < len(neurons):
                    raise MismatchError(
                        f"selection {name!r} has neurons of {', '.join(missing[:5])}, but there are no questions of "
                        f"it; the questions are of {', '.join(groups)}"
                    )
                if "all" in missing:
                    raise MismatchError(f"selection {name!r} has a group 'all', a name that tables use for no group")
            else:
                raise MismatchError(f"mask {name!r} is a {type(neurons).__name__}; give a Selection or a NeuronSet")
            for group, part in sets.items():
                mask = Mask(str(name), repeat, group, len(part), how.name, tuple(per_layer(part).values()))
                listed.append((mask, Intervention(part, how.mode, how.factor, how.values, how.at)))
    return listed


def per_layer(neurons: NeuronSet) -> dict[str, int]:
    """Number of neurons in each layer of each tower: ``{"language 0": 12, …}``, in the order of the space."""
    space: NeuronSpace = neurons.space
    names = [f"{site.tower} {site.layer}" for site in space.sites]
    counts = dict.fromkeys(names, 0)
    site = np.searchsorted(np.asarray(space.offsets), neurons.indices.numpy(), side="right") - 1
    for name, n in zip(names, np.bincount(site, minlength=len(names)).tolist(), strict=False):
        counts[name] += n
    return counts
