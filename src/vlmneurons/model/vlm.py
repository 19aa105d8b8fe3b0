"""A vision-language model with named MLP neurons, on top of nnsight.

`VLM` composes an nnsight model (it is `VLM.nnsight`; everything nnsight offers keeps working and can be called on the
VLM itself) and adds names: ``model.language.layers[3].mlp.gate`` is a value that a trace reads and writes, whatever the
model's own modules are called.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from nnsight import TransformersModel
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationMixin

from vlmneurons.checks import of_kind
from vlmneurons.errors import ArchitectureError, MismatchError, SiteError
from vlmneurons.model.architectures.find import find_towers
from vlmneurons.model.architectures.layout import MLP, Tower
from vlmneurons.model.encoder import Batch, Encoder
from vlmneurons.neurons.sites import KINDS, NeuronSpace, Site, ranges_of, site_of
from vlmneurons.questions.sets import Question, QuestionSet


class _Value(eproperty):
    """The values of one site inside a trace; where nnsight finds them depends on the MLP's layout.

    Reading waits until the model computes the site and gives the model's own tensor (or a view of it), so editing it
    in place reaches the model; assigning replaces it.
    """

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(key=kind, description=description)
        self.__doc__ = f"{description}: ``[..., neuron]``, readable and writable inside a trace."

    def _location(self, obj: "NamedMLP") -> str:  # type: ignore[override]
        place, end = obj._place(self.key)
        return f"{obj.path}.{place}.{end}"

    def __get__(self, obj: "NamedMLP | None", owner: Any = None) -> Any:  # type: ignore[override]
        if obj is None:
            return self
        raw = Mediator.value(self._location(obj))
        return obj._view(self.key, raw)

    def __set__(self, obj: "NamedMLP", value: Tensor) -> None:  # type: ignore[override]
        location = self._location(obj)
        layout = obj.mlp.layout
        if self.key == "gate" and obj._place("gate") == obj._place("pre"):
            raise SiteError(
                f"{obj.mlp.site('gate')} has no module of its own and cannot be assigned in a trace; assign "
                f"{obj.mlp.site('post')}, or use vn.Ablation(…, at='gate')"
            )
        if location.endswith(".input"):
            Mediator.swap(location, ((value,), {}))
        elif layout.fused is not None and self.key in ("pre", "up"):
            whole = Mediator.value(location).clone()
            layout.part(whole, self.key).copy_(value)
            Mediator.swap(location, whole)
        else:
            Mediator.swap(location, value)


class NamedMLP:
    """One MLP, or one expert, with its sites as values: ``.pre``, ``.gate``, ``.up`` and ``.post``.

    Every other attribute is that of nnsight's envoy of the same module (``.output``, ``.down_proj.input`` …).
    """

    pre = _Value("pre", "Input of the activation function")
    gate = _Value("gate", "Output of the activation function")
    up = _Value("up", "The other factor of a gated MLP")
    post = _Value("post", "Input of the down projection, gate times up")

    def __init__(self, envoy: Envoy, module: nn.Module, mlp: MLP) -> None:
        object.__setattr__(self, "envoy", envoy)
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "mlp", mlp)

    @property
    def path(self) -> str:
        """Location of the module in nnsight's tree."""
        return self.envoy.path

    @property
    def interleaver(self) -> Any:
        """nnsight's interleaver, which serves the values."""
        return self.envoy.interleaver

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.mlp.width

    def _place(self, kind: str) -> tuple[str, str]:
        """The module, relative to the MLP, and which end of it, where nnsight finds a site."""
        layout = self.mlp.layout
        if kind not in layout.kinds:
            self.mlp.site(kind)  # raises, naming what there is
        if self.mlp.expert is not None:
            raise SiteError(
                f"{self.mlp.site(kind)}: experts kept in one tensor have no module that a trace could stop at; "
                "record and ablate them with vn.Recorder and vn.Ablation"
            )
        if kind == "post" or (kind == "gate" and not layout.gated and layout.product is None):
            return layout.down, "input"
        if layout.activation is not None and kind in ("pre", "gate"):
            return layout.activation, "output" if kind == "gate" else "input"
        if layout.fused is not None:
            return layout.fused, "output"
        return (layout.up if kind == "up" else layout.gate), "output"  # type: ignore[return-value]

    def _view(self, kind: str, raw: Any) -> Float[Tensor, "*any neuron"]:
        layout = self.mlp.layout
        place, end = self._place(kind)
        if end == "input":
            args, kwargs = raw
            return args[0] if args else next(iter(kwargs.values()))
        if place == layout.fused:
            part = layout.part(raw, "up" if kind == "up" else "pre")
            return layout.gate_of(self.module, part) if kind == "gate" else part
        if kind == "gate" and place == layout.gate:
            return layout.gate_of(self.module, raw)
        return raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.envoy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in KINDS:
            getattr(type(self), name).__set__(self, value)
        else:
            _assign(self, self.envoy, name, value)

    def __repr__(self) -> str:
        where = f"{self.mlp.tower}.layers.{self.mlp.layer}.{self.mlp.name}"
        return f"<{where}: {', '.join(self.mlp.layout.kinds)} of {self.width:,} neurons>"


def _assign(owner: Any, envoy: Envoy, name: str, value: Any) -> None:
    """Assign one of nnsight's values of a module, such as ``output``. Any other assignment would silently be lost."""
    if not isinstance(getattr(type(envoy), name, None), eproperty):
        raise AttributeError(f"{owner!r} has no value {name!r} that could be assigned")
    setattr(envoy, name, value)


class _Branch:
    """A step of a path within a layer that is not itself an MLP, such as ``.experts`` of ``mlp.experts[7]``."""

    def __init__(self, layer: "NamedLayer", prefix: str) -> None:
        self._layer, self._prefix = layer, prefix

    def __getitem__(self, index: int) -> Any:
        return self._layer._part(f"{self._prefix}.{index}")

    def __len__(self) -> int:
        depth = self._prefix.count(".") + 1
        return len({name.split(".")[depth] for name in self._layer._mlps if name.startswith(f"{self._prefix}.")})

    def __getattr__(self, name: str) -> Any:
        return self._layer._part(f"{self._prefix}.{name}")

    def __repr__(self) -> str:
        return f"<{self._layer!r} {self._prefix}: {len(self)} parts>"


class NamedLayer:
    """One transformer block: its MLPs under their site names (``.mlp``), all else nnsight's envoy of the block."""

    def __init__(self, tower: "NamedTower", index: int, envoy: Envoy, mlps: Mapping[str, NamedMLP]) -> None:
        self._tower, self._index, self.envoy, self._mlps = tower, index, envoy, dict(mlps)

    def _part(self, name: str) -> Any:
        if name in self._mlps:
            return self._mlps[name]
        if any(other.startswith(f"{name}.") for other in self._mlps):
            return _Branch(self, name)
        has = ", ".join(self._mlps) or "no MLP"
        raise SiteError(f"layer {self._index} of tower {self._tower.name!r} has no {name!r}; it has {has}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "mlp" or name in self._mlps or any(other.startswith(f"{name}.") for other in self._mlps):
            return self._part(name)
        return getattr(self.envoy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "envoy":
            object.__setattr__(self, name, value)
        else:
            _assign(self, self.envoy, name, value)

    def __repr__(self) -> str:
        return f"<{self._tower.name}.layers.{self._index}: {', '.join(self._mlps) or 'no MLP'}>"


class NamedTower:
    """A stack of transformer blocks: ``tower.layers[i].mlp``."""

    def __init__(self, model: "VLM", tower: Tower) -> None:
        self.name, self.tower, self._model = tower.name, tower, model
        self.layers: tuple[NamedLayer, ...] = _Layers(self, tower)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return _describe(self.tower)


class _Layers(Sequence[NamedLayer]):
    """The layers of a tower; an index that does not exist says which do."""

    def __init__(self, owner: NamedTower, tower: Tower) -> None:
        self._owner, self._tower = owner, tower
        by_layer: dict[int, dict[str, NamedMLP]] = {index: {} for index in range(len(tower.layer_paths))}
        model = owner._model
        for mlp in tower.mlps:
            by_layer[mlp.layer][mlp.name] = NamedMLP(model.envoy(mlp.path), model.hf.get_submodule(mlp.path), mlp)
        self._layers = [
            NamedLayer(owner, index, model.envoy(path), by_layer[index]) for index, path in enumerate(tower.layer_paths)
        ]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._layers[index])
        if not -len(self) <= index < len(self):
            raise SiteError(f"layer {index} is not in tower {self._owner.name!r} (0–{len(self) - 1})")
        return self._layers[index]

    def __iter__(self) -> Iterator[NamedLayer]:
        return iter(self._layers)  # Sequence's own would go on until an IndexError

    def __repr__(self) -> str:
        return f"<{len(self)} layers of {self._owner.name}>"


_NEEDED = ("config", "device", "dtype")
"""What nnsight, transformers' pipelines and the records of what was run ask of any model."""


class VLM:
    """A vision-language model whose MLP neurons have names.

    Args:
        hf_model: a loaded transformers model, or a `transformers.PreTrainedModel` of your own. It is put into
            evaluation mode and wrapped once by nnsight.
        processor: its processor.
        template: a function ``(text, n_images) -> prompt`` to use in place of the processor's chat template; for
            questions with sounds or videos it is called with ``n_sounds=`` and ``n_videos=`` too.

    Attributes:
        nnsight: the nnsight model (`nnsight.TransformersModel`); its methods can be called on the VLM itself.
        hf: the transformers model, to call plainly: ``model.hf(**inputs)``.
        processor: the processor.
        towers: what was found, by name.

    Raises:
        ArchitectureError: the model's MLPs cannot be told for certain, or it is no transformers model.

    Example:
        ``model = VLM.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct", device_map="auto", dtype="auto")``
    """

    def __init__(
        self, hf_model: nn.Module, processor: Any, *, template: Callable[[str, int], str] | None = None
    ) -> None:
        if processor is None:
            raise ArchitectureError("a VLM needs its processor: VLM(model, AutoProcessor.from_pretrained(name))")
        if isinstance(processor, str | int | float | type):
            raise ArchitectureError(
                f"a processor makes inputs of texts and pictures; got {processor!r}. Make one with "
                "AutoProcessor.from_pretrained(name)"
            )
        if template is not None and not callable(template):
            raise ArchitectureError(f"template is a function (text, n_images) -> prompt; got {template!r}")
        if isinstance(hf_model, VLM) or not isinstance(hf_model, nn.Module):
            raise ArchitectureError(
                f"VLM wraps a loaded transformers model; got {type(hf_model).__name__}. "
                "To load by name use VLM.from_pretrained(name)"
            )
        self.hf = hf_model.eval()
        self.processor = processor
        self.template = template
        self.towers: dict[str, Tower] = find_towers(hf_model)
        absent = [name for name in _NEEDED if not hasattr(hf_model, name)]
        if absent:
            raise ArchitectureError(
                f"{type(hf_model).__name__} has no {', '.join(absent)}: VLM wraps a transformers model. Put yours into "
                "one: class MyVLM(transformers.PreTrainedModel) with config_class = a subclass of PreTrainedConfig, "
                "your module as an attribute, and a forward that returns transformers.modeling_outputs.CausalLMOutput"
            )
        offloaded = offloaded_to(hf_model)
        if offloaded is not None and not hasattr(hf_model, "hf_device_map"):
            # As `dispatch_model` leaves it: else transformers would try to move the weights, which are not there.
            hf_model.hf_device_map = {"": offloaded}
        self.nnsight = TransformersModel(hf_model, processor=processor, task="image-text-to-text")
        self.encoder = Encoder(self)
        self._named = {name: NamedTower(self, tower) for name, tower in self.towers.items()}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: "str | os.PathLike[str]",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        template: Callable[[str, int], str] | None = None,
        weights: bool = True,
        **hf_kwargs: Any,
    ) -> "VLM":
        """Load a model and its processor by name or from a folder.

        Args:
            name_or_path: a name on the Hub, or a folder.
            revision: branch, tag or commit, of model and processor alike.
            trust_remote_code: whether code from the repository may run.
            processor_kwargs: further arguments of ``AutoProcessor.from_pretrained``.
            template: see `VLM`.
            weights: False for a model without its weights, on the meta device: its sites have names, and it can run
                elsewhere (``remote=True``, see `vlmneurons.run.remote`).
            **hf_kwargs: arguments of ``AutoModelForImageTextToText.from_pretrained``: ``dtype``, ``device_map`` …

        Returns:
            The model in evaluation mode, its weights loaded.

        Raises:
            ArchitectureError: the MLPs cannot be told for certain; the message shows what was seen and what to
                register.
            OSError: transformers finds no such model or processor.
        """
        of_kind("name_or_path", name_or_path, (str, os.PathLike), ArchitectureError, "a name on the Hub, or a folder")
        name_or_path = os.fspath(name_or_path)
        shared = {"trust_remote_code": trust_remote_code, **({"revision": revision} if revision else {})}
        processor = AutoProcessor.from_pretrained(name_or_path, **shared, **(processor_kwargs or {}))
        if weights:
            hf_model = AutoModelForImageTextToText.from_pretrained(name_or_path, **shared, **hf_kwargs)
        else:
            if hf_kwargs:
                raise ArchitectureError(f"weights=False loads nothing that {', '.join(hf_kwargs)} could apply to")
            config = AutoConfig.from_pretrained(name_or_path, **shared)
            with torch.device("meta"):
                hf_model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
            hf_model.hf_device_map = {"": torch.device("meta")}  # else transformers would try to move the weights
        model = cls(hf_model, processor, template=template)
        model.nnsight.revision = revision  # names the model in a remote run
        return model

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name or folder that the model was loaded from; its class if it was not."""
        return str(getattr(self.hf.config, "_name_or_path", "") or type(self.hf).__name__)

    @property
    def revision(self) -> str | None:
        """Commit of the Hub repository that the model was loaded from, if it was."""
        return getattr(self.hf.config, "_commit_hash", None)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings."""
        try:
            weight = self.hf.get_input_embeddings().weight
        except (AttributeError, NotImplementedError):
            weight = next(self.hf.parameters())
        if weight.device.type != "meta":
            return weight.device
        # Offloaded weights lie on meta between forwards; accelerate knows where they come to for one. A model made
        # without weights runs elsewhere, and its inputs wait here.
        where = offloaded_to(self.hf) or torch.device(getattr(self.hf, "device", "cpu"))
        return torch.device("cpu") if where.type == "meta" else where

    @property
    def can_generate(self) -> bool:
        """Whether the model has ``generate``."""
        return isinstance(self.hf, GenerationMixin) or hasattr(self.hf, "generate")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder sees the question and a decoder gives the answer, as in Florence-2."""
        return bool(getattr(self.hf.config, "is_encoder_decoder", False))

    # -- sites ---------------------------------------------------------------------------------------------------------

    @property
    def language(self) -> NamedTower:
        """The text decoder.

        Raises:
            SiteError: the model has no such tower.
        """
        return self._tower("language")

    @property
    def vision(self) -> NamedTower:
        """The vision tower.

        Raises:
            SiteError: the model has no such tower.
        """
        return self._tower("vision")

    def _tower(self, name: str) -> NamedTower:
        if name not in self._named:
            raise SiteError(f"tower {name!r} does not exist; {type(self.hf).__name__} has {', '.join(self._named)}")
        return self._named[name]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the model, by tower and layer, in the order of computation within an MLP."""
        return tuple(site for tower in self.towers.values() for mlp in tower.mlps for site in mlp.sites)

    def space(self, tower: str | Sequence[str] = "language", kind: str = "gate") -> NeuronSpace:
        """The neurons of one tower (or several) at one kind of site, numbered.

        Args:
            tower: ``"language"``, ``"vision"``, or several in the order in which they are to be numbered.
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.

        Raises:
            SiteError: no such tower or kind, or an MLP of the tower has no such site.
        """
        if kind not in KINDS:
            raise SiteError(f"site kind {kind!r} does not exist; the kinds are {', '.join(KINDS)}")
        of_kind("tower", tower, (str, Sequence), SiteError, "the name of a tower, or a list of names")
        mlps = [mlp for name in ([tower] if isinstance(tower, str) else tower) for mlp in self._tower(name).tower.mlps]
        return NeuronSpace(tuple(mlp.site(kind) for mlp in mlps), tuple(mlp.width for mlp in mlps))

    @cached_property
    def _mlps(self) -> dict[tuple[str, int, str], MLP]:
        return {(mlp.tower, mlp.layer, mlp.name): mlp for tower in self.towers.values() for mlp in tower.mlps}

    def mlp_of(self, site: Site | str) -> MLP:
        """The MLP that a site belongs to.

        Args:
            site: a `Site`, or its name.

        Raises:
            SiteError: no such tower, layer, MLP or kind; the message says what there is.
        """
        site = site_of("site", site)
        tower = self._tower(site.tower).tower
        if site.layer >= len(tower):
            raise SiteError(f"layer {site.layer} is not in tower {site.tower!r} (0–{len(tower) - 1})")
        mlp = self._mlps.get((site.tower, site.layer, site.mlp))
        if mlp is None:
            here = [name for (where, layer, name) in self._mlps if (where, layer) == (site.tower, site.layer)]
            shown = ", ".join(here[:6]) or "no MLP"
            raise SiteError(f"layer {site.layer} of tower {site.tower!r} has no {site.mlp!r}; it has {shown}")
        mlp.site(site.kind)
        return mlp

    def site(self, name: Site | str) -> Any:
        """The value of a site by its name, inside a trace: ``model.site("language.layers.3.mlp.gate")``.

        Assign with ``model.set_site(name, value)``; editing the value in place works as well.

        Args:
            name: a `Site`, or its name.

        Raises:
            SiteError: no such site; the message says what there is.
        """
        site = site_of("name", name)
        return getattr(self._named_mlp(site), site.kind)

    def set_site(self, name: Site | str, value: Tensor) -> None:
        """Replace the value of a site inside a trace.

        Args:
            name: a `Site`, or its name.
            value: the new value ``[batch, token, neuron]``, of the shape of the old one.

        Raises:
            SiteError: no such site; the message says what there is.
        """
        site = site_of("name", name)
        setattr(self._named_mlp(site), site.kind, value)

    def _named_mlp(self, site: Site) -> NamedMLP:
        mlp = self.mlp_of(site)
        return self._named[site.tower].layers[site.layer]._mlps[mlp.name]

    def envoy(self, path: str) -> Envoy:
        """nnsight's envoy of a module of ``hf``, by the module's path.

        Args:
            path: the path of a module of ``hf``, such as ``"model.language_model.norm"``.
        """
        of_kind("path", path, str, SiteError, "the path of a module, such as 'model.language_model.norm'")
        envoy: Envoy = self.nnsight
        for part in path.split("."):
            children = envoy._child_map
            envoy = children[part] if part in children else getattr(envoy, part)
        return envoy

    # -- inputs --------------------------------------------------------------------------------------------------------

    def prepare(self, questions: Sequence[Question] | QuestionSet | Question, *, padding_side: str = "left") -> Batch:
        """Model inputs of questions, one row each: ``model.hf(**model.prepare(questions))``.

        Args:
            questions: a question, a list of them, or a set (whose prompt and option order are used).
            padding_side: ``"left"``, as generation needs, or ``"right"``.

        Returns:
            A mapping of tensors on the model's device; its ``tokens`` tell what each token is.

        Raises:
            QuestionError: see `vlmneurons.model.encoder.Encoder`.
        """
        if isinstance(questions, Question):
            questions = [questions]
        if not isinstance(questions, QuestionSet):
            questions = QuestionSet(questions)
        return self.encoder(questions, padding_side=padding_side)

    # -- the nnsight model ---------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that a VLM does not have: those are nnsight's (trace, generate, session, edit …) or
        # modules of the model. A bound method is handed out untouched, because a trace reads its caller's source.
        nnsight = self.__dict__.get("nnsight")
        if nnsight is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in self.__dict__.get("_named", {}):
            return self._named[name]
        try:
            return getattr(nnsight, name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, nor has its nnsight model or module"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        nnsight = self.__dict__.get("nnsight")
        if nnsight is not None and isinstance(getattr(type(nnsight), name, None), eproperty):
            setattr(nnsight, name, value)  # model.output = … inside a trace
        else:
            object.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.nnsight), *self._named})

    def __repr__(self) -> str:
        lines = [f"VLM({self.name}: {type(self.hf).__name__}, {self.hf.dtype}, {self.device})"]
        return "\n".join(lines + [f"  {_describe(tower)}" for tower in self.towers.values()])


def offloaded_to(hf_model: nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of a model that is offloaded, for a forward; None for any other model."""
    for module in hf_model.modules():
        hooks = getattr(module, "_hf_hook", None)
        for hook in getattr(hooks, "hooks", [hooks]):
            device = getattr(hook, "execution_device", None)
            if device is not None and getattr(hook, "offload", False):
                return torch.device(device)
    return None


def _describe(tower: Tower) -> str:
    """One line: layers, widths, kinds of sites."""
    names = list(dict.fromkeys(mlp.name.split(".experts.")[0] for mlp in tower.mlps))
    experts = sum(mlp.name.count(".experts.") for mlp in tower.mlps)
    widths = sorted(set(tower.widths))
    width = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,}–{widths[-1]:,}" if widths else "0"
    kinds = [kind for kind in KINDS if any(kind in mlp.layout.kinds for mlp in tower.mlps)]
    bare = sorted(set(range(len(tower))) - {mlp.layer for mlp in tower.mlps})
    text = f"{tower.name}: {len(tower)} layers"
    text += f", {experts} experts" if experts else ""
    text += f" x {width} = {sum(tower.widths):,} neurons; {', '.join(names)}.{{{','.join(kinds)}}} at {tower.path}"
    return text + (f"; no MLP in layers {ranges_of(bare)}" if bare else "")


def _named_parts(model: VLM) -> Iterator[NamedMLP]:
    """Every MLP of a model as a named value."""
    for tower in model._named.values():
        for layer in tower.layers:
            yield from layer._mlps.values()


def check_model(model: Any) -> None:
    """Refuse what is no `VLM`, such as transformers' model by itself.

    Raises:
        MismatchError: it is of another class.
    """
    of_kind("model", model, VLM, MismatchError, "a VLM, such as VLM.from_pretrained gives")
