"""Where the MLPs are in a model: its towers, their blocks and the MLPs in them, as they are found or registered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from vlmneurons.checks import check_kind
from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.layout import MLPLayout, Tower
from vlmneurons.model.architectures.search import LISTS, Block, Search
from vlmneurons.model.architectures.towers import common_path, named_towers


@dataclass(frozen=True)
class Architecture:
    """What a user knows about a model that its structure does not tell. Whatever is not given is found.

    Attributes:
        towers: name of each tower, and the path of its list of blocks (several paths, for stages). If given, there are
            no others.
        mlps: path of each MLP relative to its block (``""`` for the block itself), and its layout. If given, no others
            are looked for; blocks that lack a path have no such MLP. Where towers differ, for each tower's name such a
            mapping: those of a tower without one are found.
        names: what an MLP at such a path is to be called in the names of sites; chosen by itself if not given.

    Examples:
        >>> from torch.nn.functional import silu
        >>> from vlmneurons.model.architectures import Architecture, MLPLayout, register_architecture
        >>> register_architecture(
        ...     "MyVLMForConditionalGeneration",
        ...     Architecture(
        ...         towers={"language": "model.text.blocks", "vision": "model.eye.blocks"},
        ...         mlps={"language": {"ff": MLPLayout(gate="w1", up="w3", down="w2", function=silu)}},
        ...     ),
        ... )
    """

    towers: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    mlps: Mapping[str, MLPLayout | Mapping[str, MLPLayout]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_tower = [name for name, value in self.mlps.items() if not isinstance(value, MLPLayout)]
        if by_tower and len(by_tower) < len(self.mlps):
            raise ArchitectureError("mlps= has either a layout for each path, or such a mapping for each tower's name")
        for name in by_tower:
            of_tower = self.mlps[name]
            if not isinstance(of_tower, Mapping) or not all(
                isinstance(layout, MLPLayout) for layout in of_tower.values()
            ):
                raise ArchitectureError(
                    "mlps= has an MLPLayout for each path, or a mapping from paths to layouts for each tower's name; "
                    f"got {of_tower!r} for {name!r}"
                )
        strange = [name for name in by_tower if name not in self.towers]
        if strange:
            raise ArchitectureError(
                f"mlps= is of {', '.join(map(repr, strange))}, and towers= gives no path to such a tower; it has "
                f"{', '.join(map(repr, self.towers)) or 'none'}"
            )

    def layouts(self, tower: str | None = None) -> Mapping[str, MLPLayout]:
        """The layouts that are known of a tower's MLPs, by their paths in a block; none if they are to be found.

        Args:
            tower: its name; None where towers are not known by name.
        """
        if any(isinstance(value, MLPLayout) for value in self.mlps.values()):
            return cast("Mapping[str, MLPLayout]", self.mlps)
        return cast("Mapping[str | None, Mapping[str, MLPLayout]]", self.mlps).get(tower, {})


_REGISTERED: list[tuple[str | Callable[[nn.Module], bool], Architecture]] = []


def register_architecture(which: str | Callable[[nn.Module], bool], architecture: Architecture) -> None:
    """Makes `find_towers` follow an `Architecture` instead of finding everything itself.

    Args:
        which: name of the model's class, or a function that tells of a model whether the architecture is meant for it.
        architecture: what is known about such models. What was registered last is asked first.

    Raises:
        ArchitectureError: neither a name nor a function, or no `Architecture`.
    """
    if not isinstance(which, str) and (not callable(which) or isinstance(which, type)):
        raise ArchitectureError(f"an architecture is registered for a class's name or a function; got {which!r}")
    check_kind("architecture", architecture, Architecture, ArchitectureError)
    _REGISTERED.insert(0, (which, architecture))


def find_towers(hf_model: nn.Module) -> dict[str, Tower]:
    """The towers of a model, ``"language"`` first, with every MLP in them.

    Args:
        hf_model: a transformers model, on any device, meta included. It is only looked at.

    Returns:
        The towers by name, of which ``"language"`` is the text decoder and ``"vision"`` the first image tower; a text
            encoder is ``"encoder"``, an audio tower ``"audio"``. The MLPs that make the decoder's vectors of what these
        give are ``"projector"`` (or ``"audio_projector"``), each a layer. What else there is goes by its own name.
            The order and every number in it depend on nothing but the model's class and configuration.

    Raises:
        ArchitectureError: the MLPs cannot be told for certain; says what was seen, and how to register what is known.
            Also for a compiled model.
    """
    check_kind("hf_model", hf_model, nn.Module, ArchitectureError, "a loaded transformers model")
    if hasattr(hf_model, "_orig_mod"):
        raise ArchitectureError(
            f"{type(hf_model._orig_mod).__name__} was given wrapped by torch.compile, whose code does not see hooks "
            "that come later; give the model itself (compiled._orig_mod)"
        )
    if getattr(hf_model, "_compiled_call_impl", None) is not None:
        raise ArchitectureError(
            f"{type(hf_model).__name__} is compiled (model.compile()), and its code sees no hooks that come later; "
            "give the model as it was before torch.compile"
        )
    registered = next(
        (
            architecture
            for which, architecture in _REGISTERED
            if (type(hf_model).__name__ == which if isinstance(which, str) else which(hf_model))
        ),
        Architecture(),
    )
    search = Search(hf_model, registered.layouts())
    stacks = _registered_towers(search, registered) if registered.towers else named_towers(search)
    for path, blocks in {} if registered.towers else search.passed_over.items():
        _refuse_doubts(search, blocks, f"the list {path} holds what may be MLPs")
    if not any(block.mlps for _, blocks in stacks.values() for block in blocks):
        raise search.refusal("no MLP was found in any list of blocks")
    stacks = {name: (path, search.settled(blocks)) for name, (path, blocks) in stacks.items()}
    towers = {}
    for name, (path, blocks) in stacks.items():
        _refuse_doubts(search, blocks, f"the blocks of tower {name!r} hold what may be an MLP")
        mlps = [mlp for layer, block in enumerate(blocks) for mlp in search.named(name, layer, block, registered.names)]
        towers[name] = Tower(name, path, tuple(block.path for block in blocks), tuple(mlps))
    if "language" not in towers:
        raise search.refusal(f"no language model was told among {', '.join(towers)}")
    return towers


def _refuse_doubts(search: Search, blocks: Sequence[Block], problem: str) -> None:
    """Refuses blocks in which something may be an MLP that was not recognised: it would silently be left out."""
    doubts = [doubt for block in blocks for doubt in search.doubts(block)]
    if doubts:
        raise search.refusal(problem, doubts)


# --- what was registered ---


def _registered_towers(search: Search, registered: Architecture) -> dict[str, tuple[str, list[Block]]]:
    """The towers of a registered architecture."""
    towers: dict[str, tuple[str, list[Block]]] = {}
    tower_of: dict[str, str] = {}
    for name, places in registered.towers.items():
        paths = (places,) if isinstance(places, str) else tuple(places)
        blocks = []
        for path in paths:
            try:
                module = search.model.get_submodule(path)
            except AttributeError:
                problem = f"the Architecture has tower {name!r} at {path!r}, which does not exist"
                raise search.refusal(problem) from None
            # A list is a block for each of its modules; any other module, such as a projector, is one block itself.
            listed = {f"{path}.{key}": child for key, child in module._modules.items()}
            for place, child in (listed if isinstance(module, LISTS) else {path: module}).items():
                if place in tower_of:
                    problem = f"the Architecture has {place} in tower {name!r}, and in {tower_of[place]!r} already"
                    raise search.refusal(problem)
                tower_of[place] = name
                blocks.append(search.block(place, cast(nn.Module, child), registered.layouts(name)))
        towers[name] = (common_path(paths), blocks)
    _check_paths(search, registered, towers)
    return towers


def _check_paths(search: Search, registered: Architecture, towers: Mapping[str, tuple[str, list[Block]]]) -> None:
    """Refuses an architecture that names an MLP which no block has."""
    for_all = any(isinstance(value, MLPLayout) for value in registered.mlps.values())
    for names in [list(towers)] if for_all else [[name] for name in towers]:
        held = {mlp.inner for name in names for block in towers[name][1] for mlp in block.mlps}
        absent = set(registered.layouts(names[0])) - held
        if absent:
            where = ", ".join(map(repr, names))
            raise search.refusal(f"the Architecture names an MLP at {min(absent)!r}, which no block of {where} has")
