"""An ablated copy of a checkpoint, for programs that take a folder: vLLM, evaluation harnesses, transformers by itself.

A neuron at ``post`` that is zero, or scaled, is the same as its column of the down projection being zero, or scaled.
So the columns are changed in a copy of the checkpoint's own files, tensor by tensor in their place: names, shards and
every other byte stay. The values of the model in memory, and not names alone, decide which tensor holds which columns,
because checkpoints may keep names (and experts) otherwise than models do.
"""

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlmneurons._version import __version__
from vlmneurons.checks import JSON, as_path, check_kind
from vlmneurons.errors import AblationError, FileFormatError, MismatchError
from vlmneurons.files.locks import locked
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.model.down import Down, down_of, is_plain
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.run.ablation import Ablation, ablations_in_force

NOTE = "vlmneurons-export.json"
"""The file in an exported folder that says what was done."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a checkpoint's weights are called: in one file, and in several that an index names."""

_LOCKS = (".lock", ".lock-marker")
"""Files of `vlmneurons.files.locks.locked`, which are no part of the checkpoint."""


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
    was loaded from, one tensor in memory at a time. Where the model in memory is not that checkpoint any more, or has
    none, it is saved first, by ``save_pretrained``. The processor is saved beside it, and ``vlmneurons-export.json``
    says what was done. In float32, zero is the same as the ablation bit for bit; otherwise the two agree to rounding.
    The folder is there when it is whole; what a killed export left beside it, the next one to the same folder clears.

    Args:
        model: the model. Made with ``weights=False``, it is exported from its checkpoint without being loaded; tensors
            are then found by their names and shapes.
        neurons: the neurons, of any tower, at any kind of site.
        folder: where to write; it must be new, or empty.
        mode: ``"zero"`` or ``"scale"``. The other modes of `Ablation` add to the activations, which no weight of a
            projection without its own bias can.
        factor: of ``"scale"``: what the neurons are multiplied by.

    Returns:
        The folder, which loads as any other does, by ``VLM.from_pretrained(folder)``.

    Raises:
        AblationError: another mode, or one without what it needs; a model that is being ablated; weights that several
            parts share, that are quantised, or that have an adapter; a factor that makes weights infinite.
        MismatchError: the neurons are not of this model; another process is exporting to this folder.
        FileFormatError: the folder holds something; the checkpoint does not hold the columns as the model does; without
            all weights in memory, the checkpoint is not on disk, or the model differs from it.

    Example:
        ``vn.export(model, selection["Egypt"], "qwen-without-egypt")``
    """
    if mode not in ("zero", "scale"):
        raise AblationError(f"mode {mode!r} is not one of scaled columns: an export is 'zero' or 'scale'")
    ablation = Ablation(model, neurons, mode, factor=factor)  # says what is wrong with them, and is never entered
    check_kind("neurons", neurons, NeuronSet, MismatchError, "one NeuronSet, such as selection['Egypt']")
    target = as_path("folder", folder, FileFormatError)
    place = target.resolve()  # a link stays, and what it leads to is written
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileFormatError(f"{target} exists already and is not empty: give a new folder")
    if place == Path.cwd():
        raise FileFormatError(f"{target} is where this process is, which cannot be put in its place: give a new folder")
    _refuse_changed(model.hf)
    by_site = {site: columns for site, columns in neurons.by_site().items() if len(columns)}
    edits = [(mlp, _down(model.hf, mlp), by_site[site]) for site in by_site for mlp in [model.mlp_of(site)]]
    _refuse_shared(model.hf, [down for _, down, _ in edits])
    times = 0.0 if mode == "zero" else ablation.factor
    with _written_whole(place) as new:
        source = _source(model)
        if source is not None:
            _copy(source, new)
        elif any(parameter.device.type == "meta" for parameter in model.hf.parameters()):
            raise FileFormatError(
                f"the weights of {model.name} are neither in memory nor in a checkpoint on disk that is as the model "
                "is now: load the model whole"
            )
        else:
            model.hf.save_pretrained(new)
        scaled_tensors = _scale(model.hf, _Stored(new), edits, times)
        if hasattr(model.processor, "save_pretrained"):
            model.processor.save_pretrained(new)
        note = {
            "vlmneurons": __version__,
            "model": model.name,
            "revision": model.revision,
            "from": "memory" if source is None else "checkpoint",
            "mode": mode,
            "factor": times,
            "neurons": {str(site): columns.tolist() for site, columns in by_site.items()},
            "tensors": scaled_tensors,
        }
        (new / NOTE).write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


@contextlib.contextmanager
def _written_whole(place: Path) -> Iterator[Path]:
    """A folder beside ``place`` to write to, which takes its place in one step when the block ends.

    It has the same name each time, so that what a killed export left there goes before the next one writes.

    Raises:
        MismatchError: another process is writing it.
        FileFormatError: something was written to ``place`` meanwhile.
    """
    new = place.with_name(f".{place.name}-unfinished")
    if new.is_symlink():
        new.unlink()  # what it leads to is nobody's leftover
    new.mkdir(parents=True, exist_ok=True)
    with locked(new):
        try:
            for leftover in [path for path in new.iterdir() if path.name not in _LOCKS]:
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            yield new
            for file in filter(Path.is_file, new.iterdir()):
                file.chmod(new.stat().st_mode & 0o666)  # as the user's umask has it: safetensors makes private files
            try:
                os.replace(new, place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise FileFormatError(f"{place} was written to by another process: give a new folder") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
    for name in _LOCKS:
        (place / name).unlink(missing_ok=True)


def _refuse_changed(hf: nn.Module) -> None:
    """Refuse a model that computes with more than the tensors that a checkpoint holds."""
    if ablations_in_force(hf):
        raise AblationError(
            "this model is being ablated, and an ablation is no part of its weights: export it outside of the "
            "ablation, and give all the neurons"
        )
    for name, module in hf.named_modules():
        if hasattr(module, "base_layer"):
            raise AblationError(f"{name} has an adapter: merge it into the weights first (merge_and_unload)")
    if getattr(hf, "hf_quantizer", None) is not None or getattr(hf, "is_quantized", False):
        raise AblationError("the weights are quantised: load the model in its own dtype to export it")


def _down(hf: nn.Module, mlp: MLP) -> Down:
    """Where an MLP's columns are."""
    down = down_of(hf, mlp)
    if down is None:
        raise AblationError(
            f"{mlp.path}.{mlp.layout.down} is not a plain matrix of floating-point numbers (nn.Linear, Conv1D, or a "
            "parameter of experts), so scaling its columns need not be the same as the ablation"
        )
    return down


def _refuse_shared(hf: nn.Module, downs: Iterable[Down]) -> None:
    """Refuse columns that other parts of the model use too: one parameter of two names, or two of the same memory."""
    names_at: dict[int, list[str]] = {}
    parameters = dict(hf.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names_at.setdefault(_memory(parameter), []).append(name)
    for down in downs:
        for name in names_at[_memory(parameters[down.name])]:
            if name != down.name:
                raise AblationError(f"{down.name} is also {name}: scaled columns would change more than these neurons")


def _memory(parameter: Tensor) -> int:
    """Where a parameter is in memory; another number for each that has no memory (on "meta") or hides it."""
    return (parameter.data_ptr() if is_plain(parameter) else 0) or id(parameter)


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
        if self._last is None or self._last[0] != name:  # a tensor of all experts is asked for once for each expert
            with safe_open(self.tensors[name].file, "pt") as file:
                self._last = name, file.get_tensor(name)
        return self._last[1]

    def write(self, name: str, value: Tensor) -> None:
        """Overwrite a tensor's values in the file."""
        tensor, self._last = self.tensors[name], None
        assert tuple(value.shape) == tensor.shape
        with tensor.file.open("r+b") as file:
            file.seek(tensor.start)
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def _source(model: VLM) -> Path | None:
    """The folder of the checkpoint, if it is on disk as safetensors and the model in memory does not differ from it."""
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
    stored_config = type(model.hf.config).from_pretrained(folder)
    if not stored.tensors or _settings(stored_config.to_dict()) != _settings(model.hf.config.to_dict()):
        return None
    parameters = dict(model.hf.named_parameters())
    if all(parameter.device.type == "meta" for parameter in parameters.values()):
        return folder  # no weight in memory can differ
    held = model.hf.state_dict(keep_vars=True)
    by_tail, matched_names = _by_tail(held), set()
    for stored_name, tensor in stored.tensors.items():
        name = _most_alike(stored_name, by_tail)
        # A tensor that the model keeps in another form cannot be told to be still the same.
        if name is None or tuple(held[name].shape) != tensor.shape:
            return None
        if held[name].device.type != "meta" and not _equal(stored.read(stored_name), held[name]):
            return None
        matched_names.add(name)
    return folder if matched_names >= set(parameters) else None


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load, if all are there; the folder may hold the weights in further forms."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    shards = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return shards if all(shard.is_file() for shard in shards) else []


def _settings(config: object) -> object:
    """A configuration without what does not change what is computed from the stored weights."""
    if not isinstance(config, dict):
        return config
    public = {name: value for name, value in config.items() if not str(name).startswith("_")}
    return {name: _settings(value) for name, value in public.items() if name not in ("dtype", "transformers_version")}


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """By every end that a dotted name has, the names that have it."""
    by_tail: dict[str, list[str]] = {}
    for name in names:
        for tail in _tails(name):
            by_tail.setdefault(tail, []).append(name)
    return by_tail


def _tails(name: str) -> list[str]:
    """The ends of a dotted name, the longest first: ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _most_alike(name: str, by_tail: Mapping[str, list[str]]) -> str | None:
    """The name most like another: by its end, then by its other parts; None where there are several."""
    if name in by_tail.get(name, ()):
        return name
    tail = next((tail for tail in _tails(name) if tail in by_tail), None)
    candidates = by_tail[tail] if tail else []
    n_common = [len(set(name.split(".")) & set(candidate.split("."))) for candidate in candidates]
    best = [candidate for candidate, n in zip(candidates, n_common, strict=True) if n == max(n_common)]
    return best[0] if len(best) == 1 else None


def _equal(stored: Tensor, held: Tensor) -> bool:
    return torch.equal(stored.to(held.dtype), held.detach().cpu())


def _copy(source: Path, folder: Path) -> None:
    """Copy everything of a checkpoint but weights in another form."""
    weights = _weight_files(source)
    kept = [*weights, *([] if weights == [source / _SINGLE] else [source / _INDEX])]
    for path in source.iterdir():
        of_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
        of_weights |= path.name.endswith(".index.json")
        if path.is_file() and (path in kept or not of_weights):
            shutil.copyfile(path, folder / path.name)


def _scale(hf: nn.Module, stored: _Stored, edits: Sequence[tuple[MLP, Down, Tensor]], times: float) -> list[JSON]:
    """Scale the columns of some neurons where the checkpoint keeps them.

    Returns:
        What was changed, for the note.
    """
    names_by_number: dict[str, list[str]] = {}
    for name in stored.tensors:
        for number in set(_numbers(name)):
            names_by_number.setdefault(number, []).append(name)
    places: dict[str, list[tuple[int, int | None, Tensor]]] = {}
    for mlp, down, columns in edits:
        numbers = _numbers(mlp.path)  # a projector stands alone, and has none
        candidates = names_by_number.get(numbers[0], []) if numbers else list(stored.tensors)
        name, axis, expert = _place(hf, stored, candidates, mlp, down)
        places.setdefault(name, []).append((axis, expert, columns))
    for name, slices in places.items():
        whole = stored.read(name).clone()
        for axis, expert, columns in slices:
            matrix = (whole if expert is None else whole[expert]).movedim(axis, 0)
            before = matrix[columns]
            scaled = before * times if before.dtype == torch.float64 else (before.float() * times).to(before.dtype)
            if bool((scaled.isinf() & before.isfinite()).any()):
                raise AblationError(f"factor {times:g} makes weights of {name} larger than {before.dtype} holds")
            matrix[columns] = 0 if times == 0 else scaled
        stored.write(name, whole)
    return [
        {"tensor": name, "expert": expert, "axis": axis, "neurons": len(columns)}
        for name, slices in places.items()
        for axis, expert, columns in slices
    ]


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def _place(hf: nn.Module, stored: _Stored, names: Sequence[str], mlp: MLP, down: Down) -> tuple[str, int, int | None]:
    """The tensor of a checkpoint that holds an MLP's columns, the axis of neurons, and the expert's slice of it.

    Raises:
        FileFormatError: none does, or more than one.
    """
    weight = hf.get_parameter(down.name).detach()
    held = weight if down.expert is None else weight[down.expert]
    neuron_axis = down.axis - (weight.ndim - held.ndim)
    fits: list[tuple[int, str, int, int | None]] = []
    for name in names:
        shape, rest = stored.tensors[name].shape, iter(_numbers(name))
        expert_number = [] if down.expert is None or len(shape) != 2 else [str(down.expert)]
        # Layer and expert have to stand in the name, in this order; `in` goes on in `rest` behind what it came to.
        if not all(number in rest for number in [*_numbers(mlp.path), *expert_number]):
            continue
        for axis, expert in _ways(shape, tuple(held.shape), neuron_axis, down):
            # A parameter of all experts has no ".weight" in its name, and a tensor of one expert has.
            bare_names = name.removesuffix(".weight"), down.name.removesuffix(".weight")
            n_alike = max(_n_alike(name, down.name), _n_alike(*bare_names))
            if weight.device.type == "meta":
                same = n_alike > 0 and axis == neuron_axis
            else:
                matrix = stored.read(name) if expert is None else stored.read(name)[expert]
                same = _equal(matrix if axis == neuron_axis else matrix.mT, held)
            if same:
                fits.append((n_alike, name, axis, expert))
    most_alike = max((n_alike for n_alike, *_ in fits), default=0)
    best = [place for place in fits if place[0] == most_alike]
    if len(best) != 1:
        listed = ", ".join(name for _, name, *_ in best) or "none"
        raise FileFormatError(f"{down.name} should be one tensor of the checkpoint; those that fit: {listed}")
    return best[0][1:]


def _n_alike(a: str, b: str) -> int:
    """How many characters the longest end of whole parts has that two dotted names share."""
    return next((len(tail) for tail in _tails(a) if f".{b}".endswith(f".{tail}")), 0)


def _ways(
    stored: tuple[int, ...], held: tuple[int, ...], neuron_axis: int, down: Down
) -> Iterator[tuple[int, int | None]]:
    """How a tensor of one shape may hold a matrix of another: the axis of neurons, and the slice for its expert."""
    if len(stored) not in (2, 3):
        return
    expert = None if len(stored) == 2 else down.expert
    if len(stored) == 3 and (expert is None or expert >= stored[0]):
        return
    if stored[-2:] == held:
        yield neuron_axis, expert
    if stored[-2:] == held[::-1]:
        yield 1 - neuron_axis, expert
