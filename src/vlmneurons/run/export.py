"""An ablated copy of a checkpoint, for programs that take a folder: vLLM, evaluation harnesses, transformers by itself.

A neuron at ``post`` that is zero, or scaled, is the same as its column of the down projection being zero, or scaled.
So the columns are changed in a copy of the checkpoint's own files, tensor by tensor in their place: names, shards and
every other byte stay. Which tensor is which column is settled by the values of the model in memory, not by names alone,
as checkpoints keep names (and experts) otherwise than models do.
"""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlmneurons._version import __version__
from vlmneurons.checks import JSON, as_path, check_kind
from vlmneurons.errors import AblationError, FileFormatError, MismatchError
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.model.down import Down, down_of
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.run.ablation import Ablation

NOTE = "vlmneurons-export.json"
"""The file in an exported folder that says what was done."""


def export(
    model: VLM,
    neurons: NeuronSet,
    folder: "str | os.PathLike[str]",
    mode: str = "zero",
    *,
    factor: float | None = None,
) -> Path:
    """Write a checkpoint in which neurons are zero, or scaled, for good: an `Ablation` for every other program.

    The columns of the down projections (those of experts too) are changed in a copy of the checkpoint that the model
    was loaded from, one tensor in memory at a time; where the model in memory is not that checkpoint any more, or has
    none, it is saved first, by ``save_pretrained``. The processor is saved beside it, and ``vlmneurons-export.json``
    says what was done. In float32, zero is the same as the ablation bit for bit; else the two agree to rounding.

    Args:
        model: the model. Made with ``weights=False``, it is exported from its checkpoint without being loaded; tensors
            are then told by their names and shapes.
        neurons: the neurons, of any tower, at any kind of site.
        folder: where to write; it must be new, or empty.
        mode: ``"zero"`` or ``"scale"``. The other modes of `Ablation` add to the activations, which no weight of a
            projection without its own bias can.
        factor: of ``"scale"``: what the neurons are multiplied by.

    Returns:
        The folder, which loads as any other does, by ``VLM.from_pretrained(folder)``.

    Raises:
        AblationError: another mode, or one without what it needs; weights that several parts share, that are quantised,
            or that have an adapter; a factor that makes weights infinite.
        MismatchError: the neurons are not of this model.
        FileFormatError: the folder holds something; the checkpoint does not hold the columns as the model does.

    Example:
        ``vn.export(model, selection["Egypt"], "qwen-without-egypt")``
    """
    if mode not in ("zero", "scale"):
        raise AblationError(f"mode {mode!r} is not one of scaled columns: an export is 'zero' or 'scale'")
    checked = Ablation(model, neurons, mode, factor=factor)  # says what is wrong with them, and is never entered
    check_kind("neurons", neurons, NeuronSet, MismatchError, "one NeuronSet, such as selection['Egypt']")
    target = as_path("folder", folder, FileFormatError)
    place = target.resolve()  # a link stays, and what it leads to is written
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileFormatError(f"{target} exists already and is not empty: give a new folder")
    if place == Path.cwd():
        raise FileFormatError(f"{target} is where this process is, which cannot be put in its place: give a new folder")
    _refuse_changed(model.hf)
    wanted = {site: numbers for site, numbers in neurons.by_site().items() if len(numbers)}
    edits = [(mlp, _down(model.hf, mlp), wanted[site]) for site in wanted for mlp in [model.mlp_of(site)]]
    times = 0.0 if mode == "zero" else checked.factor
    place.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        source = _source(model)
        if source is None:
            if any(one.device.type == "meta" for one in model.hf.parameters()):
                raise FileFormatError(f"the weights of {model.name} are neither in memory nor in a checkpoint on disk")
            model.hf.save_pretrained(new)
        else:
            _copy(source, new)
        stored = _Stored(new)
        changed = _scaled(model.hf, stored, edits, times)
        if hasattr(model.processor, "save_pretrained"):
            model.processor.save_pretrained(new)
        note = {
            "vlmneurons": __version__,
            "model": model.name,
            "revision": model.revision,
            "from": "memory" if source is None else "checkpoint",
            "mode": mode,
            "factor": times,
            "neurons": {str(site): numbers.tolist() for site, numbers in wanted.items()},
            "tensors": changed,
        }
        (new / NOTE).write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in new.iterdir():
            path.chmod(0o644 if path.is_file() else 0o755)
        new.chmod(0o755)
        os.replace(new, place)  # whole, or not there
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def _refuse_changed(hf: nn.Module) -> None:
    """Refuse what the checkpoint's own tensors do not say."""
    for name, module in hf.named_modules():
        if hasattr(module, "base_layer"):
            raise AblationError(f"{name} has an adapter: merge it into the weights first (merge_and_unload)")
    if getattr(hf, "hf_quantizer", None) is not None or getattr(hf, "is_quantized", False):
        raise AblationError("the weights are quantised: load the model in its own dtype to export it")


def _down(hf: nn.Module, mlp: MLP) -> Down:
    """Where the columns are, if they are nobody else's."""
    down = down_of(hf, mlp)
    if down is None:
        raise AblationError(
            f"{mlp.path}.{mlp.layout.down} is not a plain matrix of floating-point numbers (nn.Linear, Conv1D, or a "
            "parameter of experts), so scaling its columns need not be the same as the ablation"
        )
    weight = hf.get_parameter(down.name)
    shared = [name for name, one in hf.named_parameters(remove_duplicate=False) if one is weight and name != down.name]
    if shared:
        raise AblationError(f"{down.name} is also {shared[0]}: scaled columns would change more than these neurons")
    return down


# -- the checkpoint ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file: where its bytes are."""

    file: Path
    start: int
    shape: tuple[int, ...]


class _Stored:
    """The tensors of a checkpoint's files, by name."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, _Tensor] = {}
        for file in _weight_files(folder):
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start = 8 + length + entry["data_offsets"][0]
                    self.tensors[name] = _Tensor(file, start, tuple(entry["shape"]))
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:  # experts' tensors are asked for once an expert
            with safe_open(self.tensors[name].file, "pt") as file:
                self._last = name, file.get_tensor(name)
        return self._last[1]

    def write(self, name: str, value: Tensor) -> None:
        """Put other values into a tensor's place."""
        place, self._last = self.tensors[name], None
        assert tuple(value.shape) == place.shape
        with place.file.open("r+b") as file:
            file.seek(place.start)
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def _source(model: VLM) -> Path | None:
    """The folder of the checkpoint, if it is on disk as safetensors and is what the model in memory holds."""
    folder = Path(model.name)
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.snapshot_download(model.name, revision=model.revision, local_files_only=True))
        except Exception:  # no name of the Hub, or nothing of it on this disk
            return None
    if not (folder / "config.json").is_file():
        return None
    stored = _Stored(folder)
    if not stored.tensors:
        return None
    held = model.hf.state_dict(keep_vars=True)
    if any(one.device.type == "meta" for one in held.values()):
        return folder  # there is nothing else to export
    if _settings(type(model.hf.config).from_pretrained(folder).to_dict()) != _settings(model.hf.config.to_dict()):
        return None
    alike, same = _by_tail(held), set()
    for name, tensor in stored.tensors.items():
        ours = _alike(name, alike)
        # Kept otherwise than in the model, it cannot be told whether it is still the same.
        if ours is None or tuple(held[ours].shape) != tensor.shape or not _equal(stored.read(name), held[ours]):
            return None
        same.add(ours)
    return folder if same >= {name for name, _ in model.hf.named_parameters()} else None


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load; a folder may hold the same weights once more in another form."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _settings(config: object) -> object:
    """A configuration without what does not change what is computed from the stored weights."""
    if not isinstance(config, dict):
        return config
    named = {name: value for name, value in config.items() if not str(name).startswith("_")}
    return {name: _settings(value) for name, value in named.items() if name not in ("dtype", "transformers_version")}


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """By every end that a dotted name has, the names that have it."""
    found: dict[str, list[str]] = {}
    for name in names:
        for tail in _tails(name):
            found.setdefault(tail, []).append(name)
    return found


def _tails(name: str) -> list[str]:
    """The ends of a dotted name, the longest first: ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _alike(name: str, by_tail: Mapping[str, list[str]]) -> str | None:
    """The name most like another: by its end, then by its other parts; None where there are several."""
    tail = next((tail for tail in _tails(name) if tail in by_tail), None)
    others = by_tail[tail] if tail else []
    common = [len(set(name.split(".")) & set(other.split("."))) for other in others]
    best = [other for other, count in zip(others, common, strict=True) if count == max(common)]
    exact = [other for other in best if other == name] or best
    return exact[0] if len(exact) == 1 else None


def _equal(stored: Tensor, ours: Tensor) -> bool:
    return torch.equal(stored.to(ours.dtype), ours.detach().cpu())


def _copy(source: Path, folder: Path) -> None:
    """Everything of a checkpoint but weights in another form."""
    weights, index = _weight_files(source), "model.safetensors.index.json"
    for path in source.iterdir():
        other = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        other |= path.name.endswith(".index.json") and path.name != index
        if path.is_file() and (path in weights or not other):
            shutil.copyfile(path, folder / path.name)


def _scaled(hf: nn.Module, stored: _Stored, edits: Sequence[tuple[MLP, Down, Tensor]], times: float) -> list[JSON]:
    """Scale the columns of some neurons where the checkpoint keeps them; gives what was changed, for the note."""
    by_numbers: dict[str, list[str]] = {}
    for name in stored.tensors:
        for number in set(_numbers(name)):
            by_numbers.setdefault(number, []).append(name)
    places: dict[str, list[tuple[int, int | None, Tensor]]] = {}
    for mlp, down, neurons in edits:
        numbers = _numbers(mlp.path)  # a projector stands alone, and has none
        likely = by_numbers.get(numbers[0], []) if numbers else list(stored.tensors)
        name, axis, expert = _place(hf, stored, likely, mlp, down)
        places.setdefault(name, []).append((axis, expert, neurons))
    for name, parts in places.items():
        whole = stored.read(name).clone()
        for axis, expert, neurons in parts:
            part = (whole if expert is None else whole[expert]).movedim(axis, 0)
            held = part[neurons]
            scaled = held * times if held.dtype == torch.float64 else (held.float() * times).to(held.dtype)
            if bool((scaled.isinf() & held.isfinite()).any()):
                raise AblationError(f"factor {times:g} makes weights of {name} larger than {held.dtype} holds")
            part[neurons] = 0 if times == 0 else scaled
        stored.write(name, whole)
    return [
        {"tensor": name, "expert": expert, "axis": axis, "neurons": len(neurons)}
        for name, parts in places.items()
        for axis, expert, neurons in parts
    ]


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def _place(hf: nn.Module, stored: _Stored, names: Sequence[str], mlp: MLP, down: Down) -> tuple[str, int, int | None]:
    """The tensor of a checkpoint that holds an MLP's columns, the axis of neurons, and the expert's slice of it.

    Raises:
        FileFormatError: none does, or more than one.
    """
    weight = hf.get_parameter(down.name).detach()
    ours = weight if down.expert is None else weight[down.expert]
    along = down.axis - (weight.ndim - ours.ndim)
    found: list[tuple[int, str, int, int | None]] = []
    for name in names:
        shape, rest = stored.tensors[name].shape, iter(_numbers(name))
        own = [] if down.expert is None or len(shape) != 2 else [str(down.expert)]
        if not all(number in rest for number in [*_numbers(mlp.path), *own]):
            continue
        for axis, expert in _ways(shape, tuple(ours.shape), along, down):
            tail = next((len(one) for one in _tails(name) if f".{down.name}".endswith(f".{one}")), 0)
            if weight.device.type == "meta":
                same = tail > 0 and axis == along
            else:
                there = stored.read(name) if expert is None else stored.read(name)[expert]
                same = _equal(there if axis == along else there.mT, ours)
            if same:
                found.append((tail, name, axis, expert))
    most = max((one[0] for one in found), default=0)
    best = [one for one in found if one[0] == most]
    if len(best) != 1:
        held = ", ".join(one[1] for one in best) or "none"
        raise FileFormatError(f"{down.name} should be one tensor of the checkpoint; those that fit: {held}")
    return best[0][1:]


def _ways(there: tuple[int, ...], ours: tuple[int, ...], along: int, down: Down) -> Iterator[tuple[int, int | None]]:
    """How a tensor of a shape may hold a matrix: the axis of neurons, and the slice for an expert among all."""
    if len(there) not in (2, 3):
        return
    expert = None if len(there) == 2 else down.expert
    if len(there) == 3 and (expert is None or expert >= there[0]):
        return
    if there[-2:] == ours:
        yield along, expert
    if there[-2:] == ours[::-1]:
        yield 1 - along, expert
