"""The contract of models, as a check that anyone can run on a model of their own."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmneurons.checks import Keywords
from vlmneurons.model.architectures.find import find_towers
from vlmneurons.model.architectures.hooks import Handle, read, read_experts, write
from vlmneurons.model.architectures.inside import Removable
from vlmneurons.model.architectures.layout import MLP, Expression, Tower
from vlmneurons.model.vlm import VLM
from vlmneurons.testing.selectors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TowerReport:
    """What was found and checked in one tower.

    Attributes:
        name: name of the tower.
        path: path of its blocks in the model.
        layers: number of blocks.
        bare: the blocks without an MLP.
        mlps: number of MLPs, every expert counted.
        neurons: number of neurons.
        widths: each width that occurs, sorted.
        layouts: a line for each way in which MLPs compute, with the number of MLPs that do.
        ran: MLPs that the inputs reached, out of all.
        moved: MLPs whose zeroed neuron changed the logits, out of those tried.
        tried: MLPs in which a neuron was zeroed.
    """

    name: str
    path: str
    layers: int
    bare: tuple[int, ...]
    mlps: int
    neurons: int
    widths: tuple[int, ...]
    layouts: tuple[str, ...]
    ran: int = 0
    moved: int = 0
    tried: int = 0

    def __str__(self) -> str:
        width = f"{self.widths[0]:,}" if len(self.widths) == 1 else f"{self.widths[0]:,}–{self.widths[-1]:,}"
        bare = f", {len(self.bare)} of them without" if self.bare else ""
        lines = [
            f"{self.name}: {self.layers} layers{bare}, {self.mlps:,} MLPs x {width} = {self.neurons:,} neurons  "
            f"[{self.path}]"
        ]
        lines += [f"    {layout}" for layout in self.layouts]
        if self.tried:
            lines.append(
                f"    ran: {self.ran:,} of {self.mlps:,} MLPs; "
                f"a zeroed neuron moved the logits in {self.moved} of {self.tried}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class ArchitectureReport:
    """What `check_architecture` found; its text is meant to be read.

    Attributes:
        model: name of the model's class.
        towers: what there is in each tower.
        notes: what could not be checked, and why.
    """

    model: str
    towers: tuple[TowerReport, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join(
            [self.model, *(f"  {line}" for tower in self.towers for line in str(tower).splitlines()), *notes]
        )


def describe_architecture(model: VLM | nn.Module) -> ArchitectureReport:
    """What `find_towers` finds in a model, without running it.

    Args:
        model: a transformers model, on any device, or a `VLM`.

    Raises:
        ArchitectureError: the MLPs cannot be told for certain.
    """
    hf = cast("PreTrainedModel", getattr(model, "hf", model))
    return ArchitectureReport(type(hf).__name__, tuple(_report(tower) for tower in find_towers(hf).values()))


def check_architecture(
    model: VLM | nn.Module,
    processor: object = None,
    inputs: Keywords | None = None,
    *,
    logits: Callable[..., Tensor] | None = None,
) -> ArchitectureReport:
    """Make sure that the neurons of a model can be named, read and switched off as the rest of the library expects.

    1. Every layer of every tower has its MLPs named, or none; sites are told apart by their names.
    2. The values at every site equal those of plain PyTorch hooks, bit for bit; ``gate`` is what the layout makes of
       ``pre``, and ``post`` what it makes of ``gate`` and ``up``. Experts kept in one tensor see the tokens that the
       router chose for them, and values that an independent computation gives, up to rounding.
    3. Logits are the same bit for bit without hooks, while all sites are read, while nothing is changed, and after.
    4. Zeroing a neuron at ``gate`` and at ``post`` gives the same logits, bit for bit.
    5. A second search, and one in a model built anew from the configuration, number all neurons the same.

    Args:
        model: a transformers model with its weights, or a `VLM`.
        processor: makes an input with an image, if `inputs` is not given. A `VLM` has its own.
        inputs: keyword arguments of the model's forward. Without these and a processor, some text only.
        logits: what to compare, from what the model returns; ``output.logits`` by default.

    Returns:
        What was found, and what could not be checked.

    Raises:
        ContractError: a clause does not hold.
        ArchitectureError: the MLPs cannot be told for certain.

    Examples:
        >>> from vlmneurons.testing import check_architecture, tiny_inputs, tiny_model
        >>> model, processor = tiny_model("qwen2_5_vl")
        >>> print(check_architecture(model, inputs=tiny_inputs("qwen2_5_vl")))  # doctest: +SKIP
    """
    hf = cast("PreTrainedModel", getattr(model, "hf", model))
    processor = processor if processor is not None else getattr(model, "processor", None)
    notes: list[str] = []
    towers = find_towers(hf)
    _check_names(hf, towers)
    if inputs is None:
        inputs = _inputs(hf, processor, notes)
    training = hf.training
    hf.eval()
    try:
        run = _Runner(hf, inputs, logits or (lambda output: output.logits))
        reports = _check_values(run, towers, notes)
        _check_stable(hf, towers, notes)
    finally:
        hf.train(training)
    return ArchitectureReport(type(hf).__name__, tuple(reports), tuple(notes))


# --- every class that transformers maps ---

_ONE_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WRITTEN: dict[str, Keywords] = {
    "aya_vision": {"vision_config": {"hidden_size": 1152, "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGAZ": 4}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"sliding_attention": _ONE_ROPE, "full_attention": _ONE_ROPE}}
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    "emu3": {"vocabulary_map": {"<image>": 8711, "<|visual token 000000|>": 4, "<|extra_200|>": 5}},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]]},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024, "depth": 23},
        }
    },
    "qwen4_exp": {
        "text_config": {
            **{"indexer_budget": 2048, "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_head_dim": 256},
            "indexer_kv_heads": 1,
        }
    },
}
"""What must be said of those whose default configuration builds no model."""


_OPTIONAL = {
    ("nemotron_h_omni", "audio_config"): {
        "model_type": "parakeet_encoder",
        "projection_hidden_size": 2048,
        "projection_bias": False,
    }
}
"""The types of optional towers, where a configuration leaves them open."""


def mapped_types() -> tuple[str, ...]:
    """The model types in transformers' image-text-to-text mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def optional_parts(model_type: str) -> tuple[str, ...]:
    """The parts of a model of one of `mapped_types` that its default configuration leaves away.

    Args:
        model_type: the type, such as ``"gemma4"``.
    """
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(_WRITTEN.get(model_type, {})))
    return tuple(name for name in config.sub_configs if getattr(config, name, None) is None)


def mapped_model(model_type: str, *, default: bool = False, every_tower: bool = False) -> nn.Module:
    """A model of one of `mapped_types`, at the full size of its default configuration, on the meta device.

    Args:
        model_type: the type, such as ``"qwen2_5_vl"``.
        default: build it from the default configuration alone, and fail where that builds no model; otherwise add the
            few settings that are missing.
        every_tower: give it every tower that its configuration allows: parts that are None by default are built too.

    Raises:
        Exception: whatever transformers raises; some types need optional packages, such as timm.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    written = {} if default else _WRITTEN.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(written))
    for name, kind in config.sub_configs.items() if every_tower else ():
        if getattr(config, name, None) is None:
            setattr(
                config, name, kind.for_model(**_OPTIONAL[model_type, name]) if hasattr(kind, "for_model") else kind()
            )
    with torch.device("meta"):
        if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
            return transformers.AutoModelForImageTextToText.from_config(config).eval()
        return getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])(config).eval()


# --- running ---


class _Runner:
    """Runs the model on one input, and compares its logits with those it gave first."""

    def __init__(self, hf: nn.Module, inputs: Mapping[str, object], logits: Callable[..., Tensor]) -> None:
        self.hf, self.inputs, self.logits = hf, inputs, logits
        try:
            self.clean = self()
        except Exception as error:
            raise ContractError(
                f"{type(hf).__name__} does not run with these inputs, without any hook: {type(error).__name__}: {error}"
            ) from error
        if not torch.isfinite(self.clean).all():
            raise ContractError(f"{type(hf).__name__} gives logits that are not finite, without any hook")
        if not torch.equal(self.clean, self()):
            raise ContractError(
                f"{type(hf).__name__} gives other logits in a second run: it cannot be compared bit for bit"
            )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.logits(self.hf(**copy.copy(dict(self.inputs)))).detach().clone()

    def expect_clean(self, when: str) -> None:
        try:
            logits = self()
        except Exception as error:
            raise ContractError(
                f"{type(self.hf).__name__} does not run {when}: {type(error).__name__}: {error}"
            ) from error
        if not torch.equal(logits, self.clean):
            most = (logits - self.clean).abs().max().item()
            raise ContractError(f"{type(self.hf).__name__}: logits differ by up to {most:g} {when}")


def _inputs(hf: "PreTrainedModel", processor: Any, notes: list[str]) -> Keywords:
    """A question with a small image, if the processor can make one; else some text."""
    if processor is not None:
        from vlmneurons.testing.tiny import tiny_image

        content = [{"type": "image"}, {"type": "text", "text": "What is in this picture? A. food B. a place"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = processor(text=[text], images=[tiny_image(height=48, width=64)], return_tensors="pt")
        return {key: value.to(hf.device) if isinstance(value, Tensor) else value for key, value in made.items()}
    notes.append("text only: no processor and no inputs were given, so nothing ran in the towers that see")
    text = hf.config.get_text_config()
    ids = torch.arange(3, 19, device=hf.device)[None] % text.vocab_size
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(hf.config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids[:, :4]
    return made


# --- clause 1 ---


def _check_names(hf: nn.Module, towers: Mapping[str, Tower]) -> None:
    for tower in towers.values():
        sites = [site for mlp in tower.mlps for site in mlp.sites]
        if len(set(sites)) != len(sites):
            raise ContractError(f"tower {tower.name!r} names two sites alike")
        for mlp in tower.mlps:
            inside = mlp.path == tower.layer_paths[mlp.layer] or mlp.path.startswith(f"{tower.layer_paths[mlp.layer]}.")
            if not inside:
                raise ContractError(f"{mlp.path} is said to be in layer {mlp.layer}, {tower.layer_paths[mlp.layer]}")
        order = [mlp.layer for mlp in tower.mlps]
        if order != sorted(order):
            raise ContractError(f"tower {tower.name!r} does not list its MLPs by layer")


# --- clauses 2, 3 and 4 ---


def _check_values(run: _Runner, towers: Mapping[str, Tower], notes: list[str]) -> list[TowerReport]:
    run.expect_clean("between two runs without hooks")
    modules = [mlp for tower in towers.values() for mlp in tower.mlps if mlp.expert is None]
    tensors = [mlp for tower in towers.values() for mlp in tower.mlps if mlp.expert == 0]
    references = {mlp: _Reference(run.hf, mlp) for mlp in modules}
    values: dict[tuple[MLP, str], list[Tensor]] = {}
    rows: dict[tuple[MLP, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
    calls: dict[MLP, list[list[object]]] = {}
    with ExitStack() as stack:
        for mlp in modules:
            for kind in mlp.layout.kinds:
                kept = values.setdefault((mlp, kind), [])
                stack.enter_context(read(run.hf, mlp, kind, lambda rows, *_, kept=kept: kept.append(rows.clone())))
        for mlp in tensors:
            for kind in mlp.layout.kinds:
                kept = rows.setdefault((mlp, kind), [])
                keep = lambda part, experts, tokens, kept=kept: kept.append((part.clone(), experts, tokens))  # noqa: E731
                stack.enter_context(read_experts(run.hf, mlp.path, mlp.layout, kind, keep))
            stack.enter_context(_watch_calls(run.hf.get_submodule(mlp.path), calls.setdefault(mlp, [])))
        with ExitStack() as plain:
            for reference in references.values():
                plain.enter_context(reference)
            run.expect_clean("while every site is read")
    run.expect_clean("after reading")

    ran: dict[MLP, bool] = {}
    for mlp in modules:
        ran[mlp] = bool(values[mlp, "post"])
        references[mlp].compare({kind: values[mlp, kind] for kind in mlp.layout.kinds})
    for mlp in tensors:
        _compare_experts(run.hf, mlp, {kind: rows[mlp, kind] for kind in mlp.layout.kinds}, calls[mlp])
        for expert in (expert for tower in towers.values() for expert in tower.mlps if expert.path == mlp.path):
            ran[expert] = any((experts == expert.expert).any().item() for _, experts, _ in rows[mlp, "post"])

    reports = []
    _note_other_tokens(run, towers["language"], values, notes)
    for tower in towers.values():
        moved, tried = _zero(run, tower, ran)
        count = sum(ran[mlp] for mlp in tower.mlps)
        if count == 0:
            notes.append(f"{tower.name}: nothing ran with these inputs")
        elif tried and not moved:
            notes.append(f"{tower.name}: no zeroed neuron moved the logits; its output may not reach them")
        reports.append(_report(tower, ran=count, moved=moved, tried=tried))
    run.expect_clean("after everything was taken off")
    return reports


def _note_other_tokens(
    run: _Runner, tower: Tower, values: Mapping[tuple[MLP, str], Sequence[Tensor]], notes: list[str]
) -> None:
    """Notes a language tower that sees other tokens than the model is given: it may be another tower."""
    ids = run.inputs.get("input_ids")
    if not isinstance(ids, Tensor) or getattr(run.hf.config, "is_encoder_decoder", False):
        return
    for mlp in tower.mlps:
        n_rows = sum(rows.numel() // mlp.width for rows in values.get((mlp, "post"), ()))
        if n_rows and not mlp.routed and n_rows != ids.numel():
            notes.append(
                f"language: {mlp.path} sees {n_rows} rows where the input has {ids.numel()} tokens: is {tower.path} "
                "the text decoder? Its neurons cannot be counted by tokens"
            )
            return


class _Reference:
    """What plain hooks see of one MLP, put on without any help of `read`."""

    def __init__(self, hf: nn.Module, mlp: MLP) -> None:
        self.mlp, self.layout = mlp, mlp.layout
        self.module = hf.get_submodule(mlp.path)
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.handles: list[Removable] = []

    def __enter__(self) -> None:
        layout = self.layout
        for name in filter(None, (layout.down, layout.gate, layout.up, layout.fused, layout.activation)):
            inputs, outputs = self.inputs.setdefault(name, []), self.outputs.setdefault(name, [])

            def hook(
                _: nn.Module, args: tuple, kwargs: dict, output: Any, inputs: list = inputs, outputs: list = outputs
            ) -> None:
                inputs.append(_copied(args[0] if args else next(iter(kwargs.values()))))
                outputs.append(_copied(output))

            self.handles.append(self.module.get_submodule(name).register_forward_hook(hook, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def compare(self, values: Mapping[str, Sequence[Tensor]]) -> None:
        """Compares what `read` gave with what the hooks saw."""
        layout, mlp = self.layout, self.mlp
        runs = {len(self.inputs[name]) for name in self.inputs}
        if len(runs) > 1:
            ran = ", ".join(f"{name} {len(self.inputs[name])} times" for name in self.inputs)
            raise ContractError(
                f"{mlp.path} does not run each module that its layout names as often as the others: {ran}"
            )
        expected: dict[str, list[Tensor]] = {"post": self.inputs[layout.down]}
        if layout.fused is not None:
            whole = self.outputs[layout.fused]
            order = (0, 1) if layout.split in ("gate_up", "interleaved") else (1, 0)
            if layout.split in ("gate_up", "up_gate"):
                parts = [output.chunk(2, dim=-1) for output in whole]
            else:
                parts = [output.unflatten(-1, (-1, 2)).unbind(-1) for output in whole]
            expected["pre"] = [part[order[0]] for part in parts]
            expected["up"] = [part[order[1]] for part in parts]
        elif layout.up is not None:
            expected["up"] = self.outputs[layout.up]
        if layout.activation is not None:
            expected["pre"], expected["gate"] = self.inputs[layout.activation], self.outputs[layout.activation]
        elif layout.gate is not None:
            expected["pre"] = self.outputs[layout.gate]
        if "other" not in cast(Expression, layout.function).inputs:
            computed = [self._computed("gate", layout.gate_of, pre) for pre in expected["pre"]]
            self._same("gate", computed, expected.setdefault("gate", computed), str(layout.function))
        if layout.repeatable and not layout.normed and "gate" in expected:
            ups = expected.get("up", [None] * len(expected["gate"]))
            computed = [
                self._computed("post", layout.post_of, gate, up) for gate, up in zip(expected["gate"], ups, strict=True)
            ]
            post = layout.product if layout.product is not None else "gate * up" if layout.gated else "gate"
            self._same("post", computed, expected["post"], str(post))
        for kind in layout.kinds:
            if len(values[kind]) != len(self.inputs[layout.down]):
                raise ContractError(
                    f"{mlp.site(kind)} was read {len(values[kind])} times in {len(self.inputs[layout.down])} forwards"
                )
            for read_rows, hooked_rows in zip(values[kind], expected.get(kind, values[kind]), strict=True):
                width = read_rows.shape[-1]
                if width != mlp.width:
                    raise ContractError(f"{mlp.site(kind)} has {width} neurons; {mlp.width} were announced")
                if not torch.equal(read_rows.reshape(-1, width), hooked_rows.reshape(-1, width)):
                    raise ContractError(f"{mlp.site(kind)} differs from what a plain hook sees")

    def _computed(self, kind: str, compute: Callable[..., Tensor], *values: Tensor | None) -> Tensor:
        """What the layout makes of values that plain hooks saw."""
        try:
            with torch.no_grad():
                return compute(self.module, *values)
        except Exception as error:
            raise ContractError(
                f"{self.mlp.site(kind)} cannot be computed as the layout says: {type(error).__name__}: {error}"
            ) from error

    def _same(self, kind: str, computed: Sequence[Tensor], hooked: Sequence[Tensor], formula: str) -> None:
        """Refuses a layout by which the MLP would compute other values than it does."""
        for made, rows in zip(computed, hooked, strict=True):
            if made.shape[-1] != rows.shape[-1] or not torch.equal(made.reshape(rows.shape), rows):
                raise ContractError(
                    f"{self.mlp.site(kind)} is not {formula}, as the layout says: it names other projections than the "
                    "MLP computes with, or not all of them, or another function"
                )


def _copied(values: Tensor) -> Tensor:
    """A copy that lies in memory as the values do.

    An activation function takes the numbers of a row several at a time, and the rest of a row one by one, with other
    rounding. Where rows lie apart, as those of one half of a fused projection do, others are in the rest.
    """
    values = values.detach()
    if values.is_contiguous() or 0 in values.stride():  # what is expanded has one place for several numbers
        return values.clone()
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=values.device).copy_(values)


def _watch_calls(module: nn.Module, calls: list[list[object]]) -> Handle:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        calls.append(list(bound.arguments.values())[1:])

    return Handle([module.register_forward_pre_hook(hook, with_kwargs=True)])


def _compare_experts(
    hf: nn.Module,
    mlp: MLP,
    parts: Mapping[str, Sequence[tuple[Tensor, Tensor, Tensor]]],
    calls: Sequence[Sequence[Any]],
) -> None:
    """Compares the rows of experts with what each expert makes of the tokens that were sent to it."""
    module = hf.get_submodule(mlp.path)
    rows = {kind: _joined(calls_parts) for kind, calls_parts in parts.items()}
    if len(calls) != 1:
        return  # rows of several calls are not told apart here
    hidden, chosen = calls[0][0], next((value for value in calls[0][1:2] if value.dtype == torch.int64), None)
    # Weights are [expert, in, out] or [expert, out, in]. Where the module does not say which, their shapes do; and
    # where these fit both ways, as those of square ones do, all experts must compute one way or the other.
    ways = (bool(module.is_transposed),) if hasattr(module, "is_transposed") else (True, False)
    problems = [_misfit(module, mlp, rows, hidden, chosen, in_out) for in_out in ways]
    if all(problem is not None for problem in problems):
        raise ContractError(f"{mlp.path}: {max(filter(None, problems), key=lambda text: 'expert ' in text)}")


def _misfit(
    module: nn.Module,
    mlp: MLP,
    rows: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    hidden: Tensor,
    chosen: Tensor | None,
    in_out: bool,
) -> str | None:
    """Where the rows of experts are not what their weights make of their tokens, if weights lie like this."""
    layout, count = mlp.layout, getattr(module, mlp.layout.down).shape[0]
    routed = 0

    def times(name: str, states: Tensor, expert: int) -> Tensor:
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        output = states @ weight if in_out else F.linear(states, weight)
        return output if bias is None else output + bias[expert]

    for expert in range(count):
        if chosen is not None:
            tokens = (chosen == expert).any(-1).nonzero().flatten()
            states = hidden[tokens]
        else:
            laid = hidden.reshape(count, -1, hidden.shape[-1])[expert] if hidden.ndim == 2 else hidden.flatten(0, -2)
            tokens = laid.ne(0).any(-1).nonzero().flatten()
            states = laid[tokens]
        if not len(tokens):
            continue
        routed += len(tokens)
        if getattr(module, layout.first)[expert].shape[0 if in_out else 1] != states.shape[-1]:
            return "its weights do not fit the tokens, whichever of their axes is the input's"
        if layout.fused is not None:
            both = times(layout.fused, states, expert)
            pre, up = layout.part(both, "pre"), layout.part(both, "up")
        else:
            pre = times(layout.first, states, expert)
            up = None if layout.up is None else times(layout.up, states, expert)
        expected = {"pre": pre, "gate": layout.gate_of(module, pre)}
        if up is not None:
            expected["up"] = up
        if layout.repeatable:
            expected["post"] = layout.post_of(module, expected["gate"], up)
        for kind, value in expected.items():
            values, experts, places = rows[kind]
            chosen_rows = experts == expert
            if not torch.equal(places[chosen_rows].sort().values, tokens.sort().values):
                return f"expert {expert} was read on other tokens than were sent to it"
            read_rows = values[chosen_rows][places[chosen_rows].argsort()].float()
            made = value[tokens.argsort()].float()
            if not read_rows.shape[-1] == made.shape[-1] == mlp.width:
                return f"{kind} of expert {expert} has {read_rows.shape[-1]} neurons; {mlp.width} were announced"
            if not torch.allclose(read_rows, made, rtol=1e-3, atol=1e-3 * read_rows.abs().max().item()):
                return f"{kind} of expert {expert} is not what its weights make of its tokens"
    lengths = {kind: len(values) for kind, (values, _, _) in rows.items() if len(values) != routed}
    return next((f"{n} rows of {kind} were read; {routed} were routed" for kind, n in lengths.items()), None)


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    if not parts:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    values, experts, tokens = map(torch.cat, zip(*parts, strict=True))
    return values, experts, tokens


def _zero(run: _Runner, tower: Tower, ran: Mapping[MLP, bool]) -> tuple[int, int]:
    """Zeroes a neuron in some MLPs of a tower, at ``gate`` and at ``post``: how many moved the logits, of how many."""
    moved, tried = 0, 0
    for mlp in _some([mlp for mlp in tower.mlps if ran[mlp]]):
        neuron = min(5, mlp.width - 1)
        outcomes = []
        for kind in ("gate", "post"):
            if kind == "gate" and not mlp.layout.repeatable and mlp.layout.activation is None:
                continue  # what comes of another gate cannot be computed
            handle = write(run.hf, mlp, kind, lambda values, *_: None)
            with handle:
                run.expect_clean(f"when an edit of {mlp.site(kind)} changes nothing")

            def zero(values: Tensor, *_: object, neuron: int = neuron) -> Tensor:
                values = values.clone()
                values[..., neuron] = 0
                return values

            with write(run.hf, mlp, kind, zero):
                outcomes.append(run())
            run.expect_clean(f"after an edit of {mlp.site(kind)} was taken off")
        if len(outcomes) == 2 and not mlp.layout.normed and not torch.equal(*outcomes):
            raise ContractError(
                f"zeroing neuron {neuron} at {mlp.site('gate')} and at {mlp.site('post')} gives different logits "
                f"(by up to {(outcomes[0] - outcomes[1]).abs().max().item():g})"
            )
        tried += 1
        moved += not torch.equal(outcomes[-1], run.clean)
    return moved, tried


def _some(mlps: Sequence[MLP]) -> Iterator[MLP]:
    """The first, the middle and the last MLP of each layout."""
    groups: dict[object, list[MLP]] = {}
    for mlp in mlps:
        groups.setdefault((mlp.layout, mlp.expert is None), []).append(mlp)
    for group in groups.values():
        yield from dict.fromkeys((group[0], group[len(group) // 2], group[-1]))


# --- clause 5 ---


def _check_stable(hf: nn.Module, towers: Mapping[str, Tower], notes: list[str]) -> None:
    if find_towers(hf) != towers:
        raise ContractError(f"{type(hf).__name__}: a second search finds other MLPs")
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            twin = type(hf)(copy.deepcopy(hf.config))
    except Exception as error:  # wrapped, adapted and remote models cannot all be built from a configuration
        notes.append(f"numbering was not compared with a model built anew ({type(error).__name__})")
        return
    if {name: _numbering(tower) for name, tower in find_towers(twin).items()} != {
        name: _numbering(tower) for name, tower in towers.items()
    }:
        raise ContractError(
            f"{type(hf).__name__}: a model built anew from the same configuration numbers other neurons"
        )


def _numbering(tower: Tower) -> list[tuple[object, int]]:
    return [(site, mlp.width) for mlp in tower.mlps for site in mlp.sites]


# --- reports ---


def _report(tower: Tower, **counts: int) -> TowerReport:
    layouts: dict[str, int] = {}
    for mlp in tower.mlps:
        text = _layout(mlp)
        layouts[text] = layouts.get(text, 0) + 1
    return TowerReport(
        tower.name,
        tower.path,
        len(tower),
        tuple(sorted(set(range(len(tower))) - {mlp.layer for mlp in tower.mlps})),
        len(tower.mlps),
        sum(tower.widths),
        tuple(sorted(set(tower.widths))),
        tuple(f"{count:,} x {text}" for text, count in layouts.items()),
        **counts,
    )


def _layout(mlp: MLP) -> str:
    layout = mlp.layout
    name = mlp.name if mlp.expert is None else f"{mlp.name.rpartition('.')[0]}.*"
    first = f"{layout.fused} ({layout.split})" if layout.fused else layout.gate
    post = layout.product if layout.product is not None else "gate * up" if layout.gated else "gate"
    up = f", up = {layout.up}" if layout.up else ""
    normed = " (normalised before it leaves)" if layout.normed else ""
    return f"{name}: pre = {first}, gate = {layout.function}{up}, post = {post} -> {layout.down}{normed}"
