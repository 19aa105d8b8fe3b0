"""A vision-language model with named MLP neurons, on top of nnsight.

`VLM` composes an nnsight model (it is `VLM.nnsight`; everything nnsight offers keeps working and can be called on the
VLM itself) and adds names: ``model.language.layers[3].mlp.gate`` is a value that a trace reads and writes, whatever the
model's own modules are called.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmneurons.checks import Keywords, check_choice, check_kind
from vlmneurons.errors import ArchitectureError, MismatchError, SiteError
from vlmneurons.model.architectures.find import find_towers
from vlmneurons.model.architectures.hooks import ComputedGate
from vlmneurons.model.architectures.layout import MLP, Tower
from vlmneurons.model.encoder import Batch, Encoder
from vlmneurons.model.identity import configuration_of
from vlmneurons.model.loading import HUB_ARGUMENTS, of_first_class, pipeline_of, refuse_copies, without_class_names
from vlmneurons.model.named import NamedMLP, NamedTower, describe
from vlmneurons.model.prompts import Processor, Prompts, Template
from vlmneurons.model.tracing import TracedModel
from vlmneurons.model.travel import PART
from vlmneurons.neurons.sites import KINDS, NeuronSpace, Site, site_of
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet

_NEEDED = ("config", "device", "dtype")
"""What nnsight, transformers' pipelines and the records of what was run ask of any model."""
_OF_THE_MODULE = ("eval", "train", "to", "cpu", "cuda", "float", "half", "double", "bfloat16", "requires_grad_")
"""Methods by which a module changes itself and gives itself back: a VLM gives itself."""


if TYPE_CHECKING:

    class HFModel(PreTrainedModel):
        """What a type checker sees in a model of transformers; ``generate`` is there where `VLM.can_generate`."""

        hf_device_map: dict[str, torch.device]

        def generate(self, *args: object, **kwargs: object) -> Tensor: ...


class VLM:
    """A vision-language model whose MLP neurons have names.

    Args:
        hf_model: a loaded transformers model, or a `transformers.PreTrainedModel` of your own. It is put into
            evaluation mode and wrapped once by nnsight.
        processor: its processor.
        template: what takes the place of the processor's chat template: a function ``(text, n_images) -> prompt`` (for
            questions with sounds or videos it is called with ``n_sounds=`` and ``n_videos=`` too), or ``"plain"``: the
            question's text after its pictures' placeholders and no more, as for a base model.
        template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        rename: further names of modules for your traces, as nnsight's ``rename=``.

    Attributes:
        nnsight: the nnsight model (`nnsight.TransformersModel`); its methods can be called on the VLM itself.
        hf: the transformers model, to call plainly: ``model.hf(**inputs)``.
        processor: the processor; a tokenizer for a model of text alone.
        prompts: how questions become prompts.
        towers: the towers that were found, by name.
        engine: the program that runs the model where questions are asked: ``"transformers"``, or ``"vllm"``.
        engine_options: the options that it is started with.
        engine_configuration: a digest of the configuration that it is started with.

    Raises:
        ArchitectureError: the model's MLPs cannot be told for certain, or it is no transformers model.

    Example:
        ``model = VLM.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct", device_map="auto", dtype="auto")``
    """

    def __init__(
        self,
        hf_model: nn.Module,
        processor: object,
        *,
        template: Template | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        rename: Mapping[str, object] | None = None,
    ) -> None:
        if processor is None:
            raise ArchitectureError("a VLM needs its processor: VLM(model, AutoProcessor.from_pretrained(name))")
        if isinstance(processor, str | int | float | type):
            raise ArchitectureError(
                f"a processor makes inputs of texts and pictures; got {processor!r}. Make one with "
                "AutoProcessor.from_pretrained(name)"
            )
        self.prompts = Prompts(processor, template, template_kwargs)
        if isinstance(hf_model, VLM) or not isinstance(hf_model, nn.Module):
            raise ArchitectureError(
                f"VLM wraps a loaded transformers model; got {type(hf_model).__name__}. "
                "To load by name use VLM.from_pretrained(name)"
            )
        refuse_copies(hf_model)
        self.hf = cast("HFModel", hf_model.eval())  # or has what it needs of one: that is checked below
        self.processor: Processor = cast(Processor, processor)
        self.towers: dict[str, Tower] = find_towers(hf_model)
        missing = [name for name in _NEEDED if not hasattr(hf_model, name)]
        if missing:
            raise ArchitectureError(
                f"{type(hf_model).__name__} has no {', '.join(missing)}: VLM wraps a transformers model. Put yours "
                "into one: class MyVLM(transformers.PreTrainedModel) with config_class = a subclass of "
                "PreTrainedConfig, your module as an attribute, and a forward that returns "
                "transformers.modeling_outputs.CausalLMOutput"
            )
        offloaded = offloaded_to(hf_model)
        if offloaded is not None and not hasattr(hf_model, "hf_device_map"):
            # As `dispatch_model` leaves it: else transformers would try to move the weights, which are not there.
            self.hf.hf_device_map = {"": offloaded}
        self._rename = rename
        computed = [
            ComputedGate.of(hf_model.get_submodule(mlp.path), mlp.layout)
            for tower in self.towers.values()
            for mlp in tower.mlps
            if mlp.expert is None and mlp.place("gate").computed
        ]
        options = {} if rename is None else {"rename": dict(rename)}
        with without_class_names():
            self.nnsight = TracedModel(hf_model, self, computed, **pipeline_of(processor), **options)
        self.encoder = Encoder(self)
        self._named = {name: NamedTower(self, tower) for name, tower in self.towers.items()}
        self.engine: str = "transformers"
        self.engine_options: Keywords = {}
        self.engine_configuration: str = ""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: "str | os.PathLike[str]",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        processor_kwargs: Mapping[str, object] | None = None,
        template: Template | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        rename: Mapping[str, object] | None = None,
        weights: bool = True,
        engine: str = "transformers",
        **hf_kwargs: Any,
    ) -> "VLM":
        """Load a model and its processor by name or from a folder.

        A model of text alone is loaded with its tokenizer.

        Args:
            name_or_path: a name on the Hub, or a folder.
            revision: branch, tag or commit, of model and processor alike.
            trust_remote_code: whether code from the repository may run.
            processor_kwargs: further arguments of ``AutoProcessor.from_pretrained``.
            template: see `VLM`.
            template_kwargs: see `VLM`.
            rename: see `VLM`.
            weights: False for a model without its weights, on the meta device: its sites have names, and it can run
                elsewhere (``remote=True``, see `vlmneurons.run.remote`).
            engine: ``"vllm"`` for a model that vLLM holds: nothing but names is loaded here, and vLLM is started when
                the model is first asked. `record`, `record_items` and `knockout` run there; see
                `vlmneurons.run.vllm.engine`.
            **hf_kwargs: arguments of the model's ``from_pretrained``: ``dtype``, ``device_map`` …; where files
                come from (``token``, ``cache_dir``, ``local_files_only``, ``subfolder`` …) is told to both. With
                ``engine="vllm"``: ``dtype``, and arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.

        Returns:
            The model in evaluation mode, its weights loaded.

        Raises:
            ArchitectureError: the MLPs cannot be told for certain; the message shows what was seen and what to
                register.
            OSError: transformers finds no such model or processor.
        """
        check_kind(
            "name_or_path", name_or_path, (str, os.PathLike), ArchitectureError, "a name on the Hub, or a folder"
        )
        name_or_path = os.fspath(name_or_path)
        source = {name: hf_kwargs.pop(name) for name in HUB_ARGUMENTS if name in hf_kwargs}
        shared = {"trust_remote_code": trust_remote_code, **({"revision": revision} if revision else {}), **source}
        check_choice("engine", engine, ("transformers", "vllm"), ArchitectureError)
        if engine == "vllm" and source.get("subfolder"):
            raise ArchitectureError("engine='vllm' knows no subfolder=: vLLM would take what lies above it, unsaid")
        if engine != "vllm" and hf_kwargs and not weights:
            raise ArchitectureError(f"weights=False loads nothing that {', '.join(hf_kwargs)} could apply to")
        processor = AutoProcessor.from_pretrained(name_or_path, **{**shared, **(processor_kwargs or {})})
        if weights and engine == "transformers":
            hf_model = of_first_class(
                AutoModelForImageTextToText, lambda auto: auto.from_pretrained(name_or_path, **shared, **hf_kwargs)
            )
        else:
            dtype = hf_kwargs.pop("dtype", "auto")
            hf_model = _without_weights(name_or_path, dtype, shared)
        model = cls(hf_model, processor, template=template, template_kwargs=template_kwargs, rename=rename)
        model.nnsight.revision = revision  # names the model in a remote run
        if engine == "vllm":
            options = {
                "trust_remote_code": trust_remote_code,
                "mm_processor_kwargs": dict(processor_kwargs or {}),
                "hf_token": source.get("token"),
                "download_dir": source.get("cache_dir"),
                "code_revision": source.get("code_revision"),
            }
            options = {name: value for name, value in options.items() if value}
            model.engine, model.engine_options = engine, {**options, **hf_kwargs}
            model.engine_configuration = configuration_of(model)
            hf_model.register_forward_pre_hook(_refuse_to_run)
            vars(hf_model)["generate"] = _refuse_to_run
        return model

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def template(self) -> Template | None:
        """What takes the place of the chat template; None where it is used."""
        return self.prompts.template

    @property
    def name(self) -> str:
        """The name or folder that the model was loaded from; its class if it was not."""
        return str(getattr(self.hf.config, "_name_or_path", "") or type(self.hf).__name__)

    @property
    def revision(self) -> str | None:
        """Commit of the Hub repository that the model was loaded from, if it was."""
        return getattr(self.hf.config, "_commit_hash", None)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings."""
        try:
            weight = cast(Tensor, self.hf.get_input_embeddings().weight)
        except (AttributeError, NotImplementedError):
            weight = next(self.hf.parameters())
        if weight.device.type != "meta":
            return weight.device
        # Offloaded weights lie on meta between forwards; accelerate knows where it brings them for one. A model made
        # without weights runs elsewhere, and its inputs wait here.
        device = offloaded_to(self.hf) or torch.device(getattr(self.hf, "device", "cpu"))
        return torch.device("cpu") if device.type == "meta" else device

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
        return self.tower("language")

    @property
    def vision(self) -> NamedTower:
        """The vision tower.

        Raises:
            SiteError: the model has no such tower.
        """
        return self.tower("vision")

    def tower(self, name: str) -> NamedTower:
        """The tower with this name.

        Args:
            name: such as ``"language"``.

        Raises:
            SiteError: the model has no such tower.
        """
        if name not in self._named:
            raise SiteError(f"tower {name!r} does not exist; {type(self.hf).__name__} has {', '.join(self._named)}")
        return self._named[name]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site of the model, in the order of computation: towers before the text decoder, layers, sites."""
        towers = sorted(self.towers.values(), key=lambda tower: tower.name == "language")
        return tuple(site for tower in towers for mlp in tower.mlps for site in mlp.sites)

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
        check_kind("tower", tower, (str, Sequence), SiteError, "the name of a tower, or a list of names")
        mlps = [mlp for name in ([tower] if isinstance(tower, str) else tower) for mlp in self.tower(name).tower.mlps]
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
        tower = self.tower(site.tower).tower
        if site.layer >= len(tower):
            raise SiteError(f"layer {site.layer} is not in tower {site.tower!r} (0–{len(tower) - 1})")
        mlp = self._mlps.get((site.tower, site.layer, site.mlp))
        if mlp is None:
            names = [mlp.name for mlp in tower.mlps if mlp.layer == site.layer]
            has = ", ".join(names[:6]) or "no MLP"
            raise SiteError(f"layer {site.layer} of tower {site.tower!r} has no {site.mlp!r}; it has {has}")
        mlp.site(site.kind)
        return mlp

    def check_space(self, space: NeuronSpace) -> None:
        """Refuse a space that is of another model.

        Args:
            space: the neurons.

        Raises:
            SiteError: a site that this model has not.
            MismatchError: a site that has another number of neurons here.
        """
        for site, width in zip(space.sites, space.widths, strict=True):
            if self.mlp_of(site).width != width:
                raise MismatchError(
                    f"{site} has {self.mlp_of(site).width} neurons in this model; the space has {width}"
                )

    def site(self, name: Site | str) -> Tensor:
        """The value of a site by its name, inside a trace: ``model.site("language.layers.3.mlp.gate")``.

        It is ``[row, token, neuron]``, or what the model's own code has there. Assign with
        ``model.set_site(name, value)``; editing the value in place works as well.

        Args:
            name: a `Site`, or its name.

        Raises:
            SiteError: no such site; the message says what there is.
        """
        site = site_of("name", name)
        return getattr(self.named(site), site.kind)

    def set_site(self, name: Site | str, value: Tensor) -> None:
        """Replace the value of a site inside a trace.

        Args:
            name: a `Site`, or its name.
            value: the new value ``[batch, token, neuron]``, of the shape of the old one.

        Raises:
            SiteError: no such site; the message says what there is.
        """
        site = site_of("name", name)
        setattr(self.named(site), site.kind, value)

    def named(self, site: Site | str) -> NamedMLP:
        """The MLP of a site as traces see it: ``model.language.layers[3].mlp``.

        Args:
            site: a `Site`, or its name.

        Raises:
            SiteError: no such site; the message says what there is.
        """
        site = site_of("site", site)
        mlp = self.mlp_of(site)
        return self._named[site.tower].layers[site.layer].mlps[mlp.name]

    def envoy(self, path: str) -> Envoy:
        """nnsight's envoy of a module of ``hf``, by the module's path.

        Args:
            path: the path of a module of ``hf``, such as ``"model.language_model.norm"``.
        """
        check_kind("path", path, str, SiteError, "the path of a module, such as 'model.language_model.norm'")
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

    def with_nnsight(self, nnsight: TracedModel) -> "VLM":
        """The same model, and the same modules, with another nnsight model of them, such as an edited one.

        Args:
            nnsight: the nnsight model, such as a block of nnsight's ``edit`` gives.
        """
        model = object.__new__(type(self))
        model.__dict__.update({**self.__dict__, "nnsight": nnsight})
        return model

    def get(self, path: str) -> Any:
        """What a dotted path leads to, as nnsight's ``get``: a part of the model or, in a trace, a value.

        Args:
            path: such as ``"language.layers.3.mlp.gate"`` or ``"lm_head.output"``.
        """
        part: Any = self
        for step in path.split("."):
            part = part[int(step)] if step.isdigit() else getattr(part, step)
        return part

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """The model's output, as that of a plain call of ``hf``."""
        return self.nnsight(*args, **kwargs)

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self.nnsight)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if isinstance(name, str) else self.nnsight[name]

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that a VLM does not have: those are nnsight's (trace, generate, session, edit …) or
        # modules of the model. A bound method is handed out untouched, because a trace reads its caller's source.
        nnsight = self.__dict__.get("nnsight")
        if nnsight is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in self.__dict__.get("_named", {}):
            return self._named[name]
        if name in _OF_THE_MODULE:
            return functools.partial(self._change, name)
        try:
            return getattr(nnsight, name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, nor has its nnsight model or module"
            ) from None

    def _change(self, method: str, *args: object, **kwargs: object) -> Any:
        result = getattr(self.hf, method)(*args, **kwargs)
        return self if result is self.hf else result

    def __setattr__(self, name: str, value: object) -> None:
        nnsight = self.__dict__.get("nnsight")
        if nnsight is None:
            object.__setattr__(self, name, value)
        elif name == "hf":
            raise ArchitectureError("a VLM wraps one model for good; for another one make another: VLM(hf, processor)")
        elif isinstance(value, nn.Module) or isinstance(getattr(type(nnsight), name, None), eproperty):
            setattr(nnsight, name, value)  # model.output = … inside a trace; model.adapter = a module of your own
        else:
            object.__setattr__(self, name, value)

    def __copy__(self) -> "VLM":
        return self.with_nnsight(self.nnsight)

    def __deepcopy__(self, memo: dict[int, object]) -> "VLM":
        # The library's hooks stay with their model: a copy made inside an ablation is of the untouched model.
        hf = copy.deepcopy(self.hf, memo)
        processor = copy.deepcopy(self.processor, memo)
        options = {"template": self.template, "template_kwargs": self.prompts.arguments, "rename": self._rename}
        model = memo[id(self)] = type(self)(hf, processor, **options)
        model.nnsight.revision, model.nnsight._edits = self.nnsight.revision, list(self.nnsight._edits)
        model.engine, model.engine_options = self.engine, dict(self.engine_options)
        model.engine_configuration = self.engine_configuration
        return model

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # Into a remote trace, by nnsight. Elsewhere it fails: a model is kept by save_pretrained.
        return PART, (self.nnsight, dict(self._named), {})

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.nnsight), *self._named})

    def __repr__(self) -> str:
        lines = [f"VLM({self.name}: {type(self.hf).__name__}, {self.hf.dtype}, {self.device})"]
        return "\n".join(lines + [f"  {describe(tower)}" for tower in self.towers.values()])


def _without_weights(name_or_path: str, dtype: "str | torch.dtype", shared: Keywords) -> nn.Module:
    """A model on the meta device, of the configuration that a name or a folder has."""
    config = AutoConfig.from_pretrained(name_or_path, **shared)
    with torch.device("meta"):
        hf_model = of_first_class(
            AutoModelForImageTextToText,
            lambda auto: auto.from_config(config, trust_remote_code=shared["trust_remote_code"]),
        )
    # Else transformers would try to move the weights.
    vars(hf_model)["hf_device_map"] = {"": torch.device("meta")}
    if dtype != "auto":
        hf_model.to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    with contextlib.suppress(OSError):  # it says where a text ends
        vars(hf_model)["generation_config"] = GenerationConfig.from_pretrained(name_or_path, **shared)
    return hf_model


def _refuse_to_run(*_: object, **__: object) -> None:
    """Stands in the way of the forward of a model that an engine holds: it has no weights here."""
    raise MismatchError(
        "this model is held by engine='vllm', where record, record_items and knockout run; for traces, plain calls and "
        "generate load it here, without engine="
    )


def offloaded_to(hf_model: nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of a model that is offloaded, for a forward; None for any other model."""
    for module in hf_model.modules():
        hooks = getattr(module, "_hf_hook", None)
        for hook in getattr(hooks, "hooks", [hooks]):
            device = getattr(hook, "execution_device", None)
            if device is not None and getattr(hook, "offload", False):
                return torch.device(device)
    return None


def refuse_unobeyed(model: VLM) -> None:
    """Refuse what a run of the library's own would not obey: a model's standing edits, and autocast around the call.

    Edits of ``model.edit`` act in traces only; under autocast the counts would be those of another precision than the
    weights', and depend on where the call stands.

    Raises:
        MismatchError: the model has edits, or autocast is on for one of its devices.
    """
    if model.nnsight._edits:
        raise MismatchError(
            "this model has standing edits of model.edit(…), which act in traces and nowhere else: this run would not "
            "obey them. Take them off with model.clear_edits(), or use vn.Ablation, which acts everywhere"
        )
    for kind in sorted({"cpu", *(weight.device.type for weight in model.hf.parameters())} - {"meta"}):
        if torch.is_autocast_enabled(kind):
            raise MismatchError(
                "torch.autocast is on around this call, which runs in the precision of the weights "
                f"({model.hf.dtype}): leave it, or turn it off with torch.autocast({kind!r}, enabled=False). Else load "
                f"the model in it, as VLM.from_pretrained(…, dtype={torch.get_autocast_dtype(kind)}) does; a "
                "vn.Recorder counts under autocast what the model used"
            )


def check_model(model: object) -> None:
    """Refuse anything but a `VLM`, such as transformers' model by itself.

    Raises:
        MismatchError: ``model`` is of another class.
    """
    check_kind("model", model, VLM, MismatchError, "a VLM, such as VLM.from_pretrained gives")
