"""What a study switches off: masks, other interventions, and the names of a sweep's settings."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmneurons.checks import as_plain
from vlmneurons.errors import MismatchError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.run.intervention import Intervention
from vlmneurons.study.effects import NO_GROUP

Masks = Mapping[str, Selection | NeuronSet | Intervention | Sequence[Selection | NeuronSet | Intervention]]
"""What a study switches off, by name; a sequence is of repeats under one name, such as the seeds of a control."""


@dataclass(frozen=True)
class Mask:
    """One set of neurons that was switched off.

    Attributes:
        selector: name under which the mask was given.
        repeat: number of the selection among several given under one name, such as the seeds of a random control.
        group: the group that the neurons were selected for; ``"all"`` for a set that is of no group.
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
    """The selector's bare name, and the axis and value of its setting, if it has one; see `setting_name`.

    Examples:
        >>> split_setting("CAS [r=0.005]"), split_setting("CAS")
        (('CAS', ('r', 0.005)), ('CAS', None))
    """
    match = re.fullmatch(r"(.+) \[(\w+)=([^\[\]=]+)\]", name)
    if match:
        with contextlib.suppress(ValueError):
            return match[1], (match[2], float(match[3]))
    return name, None


# -- masks as they are given -------------------------------------------------------------------------------------------


def listed_masks(masks: Masks, groups: Sequence[str], default: Intervention) -> list[tuple[Mask, Intervention]]:
    """Every mask with its neurons, one by one.

    Args:
        masks: as `vlmneurons.knockout` takes them.
        groups: the groups that questions are of.
        default: what is done to neurons that are not given as an `Intervention`; its neurons do not matter.

    Raises:
        MismatchError: something that is not a mask or has no name, or a selection of which only some groups have
            questions (a selection of other groups altogether has effects on the questions, and no self effect).
    """
    if isinstance(masks, NeuronSet | Selection) or not isinstance(masks, Mapping) or not masks:
        got = f"a bare {type(masks).__name__}, without a name," if isinstance(masks, NeuronSet | Selection) else "none"
        raise MismatchError(
            f'masks are a mapping from names to selections, such as {{"CAS": selection}}; {got} was given'
        )
    if all(name in groups and isinstance(neurons, NeuronSet) for name, neurons in masks.items()):
        raise MismatchError(
            f"these masks are a set for each of the groups {', '.join(masks)}, and would pass for as many selectors: "
            'give them under one name, {"CAS": vn.Selection(masks)}'
        )
    listed: list[tuple[Mask, Intervention]] = []
    for name, entry in masks.items():
        if not isinstance(name, str) or not name:
            raise MismatchError(f"a mask's name is a text that is not empty; got {name!r}")
        repeats = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
        if not repeats:
            raise MismatchError(f"mask {name!r} is an empty list; give a Selection or a NeuronSet")
        for number, repeat in enumerate(repeats):
            action = repeat if isinstance(repeat, Intervention) else default
            neurons = repeat.neurons if isinstance(repeat, Intervention) else repeat
            for group, part in _sets_by_group(name, neurons, groups).items():
                layers = tuple(part.space.count_by_layer(part.indices).tolist())
                mask = Mask(str(name), number, group, len(part), action.name, layers)
                listed.append((mask, Intervention(part, action.mode, action.factor, action.values, action.at)))
    return listed


def _sets_by_group(name: str, neurons: object, groups: Sequence[str]) -> Mapping[str, NeuronSet]:
    """The neurons of a mask, or of each mask of a selection, by their group."""
    if isinstance(neurons, NeuronSet):
        return {NO_GROUP: neurons}
    if not isinstance(neurons, Selection):
        raise MismatchError(f"mask {name!r} is a {type(neurons).__name__}; give a Selection or a NeuronSet")
    missing = [group for group in neurons if group not in groups]
    # A selection of other groups altogether, such as languages for questions about countries, is meant so.
    if 0 < len(missing) < len(neurons):
        raise MismatchError(
            f"selection {name!r} has neurons of {', '.join(missing[:5])}, but there are no questions of it; the "
            f"questions are of {', '.join(groups)}"
        )
    if NO_GROUP in missing:
        raise MismatchError(f"selection {name!r} has a group 'all', a name that tables use for no group")
    return neurons
