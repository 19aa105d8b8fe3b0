"""What recording, tracing and ablating cost beside the model's own forward, and what other libraries take.

Run: ``python benchmarks/overhead.py`` (``--layers 1 --width 18944 --hidden 3584 --batch 1`` is one layer of a 7B
model). Every variant runs the same weights on the same batch; the plain forward and plain hooks run on a model that was
never wrapped by anything. Peers that are not installed are left out.

Peers go into folders of their own that hold neither torch nor transformers, so that all run on the same: nnterp 1.3.0
with nnsight 0.7.0 into the folder that ``--nnterp`` names, TransformerLens 4.3.0 into one that is the last of
``PYTHONPATH`` (``pip install --no-deps --target FOLDER …`` for each and for what it says is missing).
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

import vlmneurons as vn
from vlmneurons.run.readers import Letters


def plain_hooks(hf: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Counting as researchers' scripts do it: ``(x > 0).sum`` in a hook on each activation function."""
    counts: dict[int, torch.Tensor] = {}

    def run() -> None:
        handles = []
        for number, layer in enumerate(hf.model.language_model.layers):

            def hook(module: Any, args: Any, output: torch.Tensor, number: int = number) -> None:
                counts[number] = counts.get(number, 0) + (output > 0).sum((0, 1))

            handles.append(layer.mlp.act_fn.register_forward_hook(hook))
        hf(**inputs)
        for handle in handles:
            handle.remove()

    return run


def plain_zeroing(hf: Any, inputs: dict[str, Any], columns: list[torch.Tensor]) -> Callable[[], None]:
    """Zeroing by hand, in hooks on the down projections."""

    def run() -> None:
        handles = []
        for layer, own in zip(hf.model.language_model.layers, columns, strict=True):

            def hook(module: Any, args: Any, own: torch.Tensor = own) -> tuple[torch.Tensor]:
                values = args[0].clone()
                values[..., own] = 0
                return (values,)

            handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
        hf(**inputs)
        for handle in handles:
            handle.remove()

    return run


def nnsight_alone(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """The same count in an nnsight trace of a model that only nnsight wraps."""
    import nnsight

    layers = len(model.model.language_model.layers)

    def run() -> None:
        with model.trace(**inputs):
            counts = nnsight.save([])
            for number in range(layers):
                counts.append((model.model.language_model.layers[number].mlp.act_fn.output > 0).sum((0, 1)))

    return run


def our_trace(model: vn.VLM, inputs: dict[str, Any]) -> Callable[[], None]:
    """The same count in a trace, by site names."""
    import nnsight

    layers = len(model.language)

    def run() -> None:
        with model.trace(**inputs):
            counts = nnsight.save([])
            for number in range(layers):
                counts.append((model.language.layers[number].mlp.gate > 0).sum((0, 1)))

    return run


class Nnterp:
    """The same count by nnterp, in a process of its own: it needs an nnsight older than ours.

    A call of `seconds` runs once there and gives the CPU time of that process.
    """

    def __init__(self, folder: str, hf: Any, inputs: dict[str, Any]) -> None:
        self.saved = tempfile.TemporaryDirectory()
        hf.save_pretrained(self.saved.name)
        torch.save(inputs, Path(self.saved.name) / "inputs.pt")
        script = Path(__file__).with_name("peer_nnterp.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), self.saved.name],
            env={**os.environ, "PYTHONPATH": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(self.process.stderr.read().strip().splitlines()[-1])
        return line

    def __call__(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        """Run once."""
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return float(self._answer())


def transformer_lens(hf: Any, processor: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """The same count in TransformerLens's hooks on the gate's projection, as its bridge names it."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:  # it asks a tokenizer where it was loaded from
        processor.tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            "llava-hf/llava-v1.6-mistral-7b-hf", hf_model=copy.deepcopy(hf), tokenizer=tokenizer
        )
    names = [f"blocks.{n}.mlp.gate.hook_out" for n in range(len(hf.model.language_model.layers))]
    counts: dict[str, Any] = {}

    def count(value: torch.Tensor, hook: Any) -> None:
        counts[hook.name] = counts.get(hook.name, 0) + (value > 0).sum((0, 1))

    ids, more = inputs["input_ids"], {key: value for key, value in inputs.items() if key != "input_ids"}

    def run() -> None:
        bridge.run_with_hooks(ids, fwd_hooks=[(name, count) for name in names], **more)

    with torch.inference_mode():
        run()
    if len(counts) != len(names):
        raise RuntimeError(f"its hooks fired at {len(counts)} of {len(names)} layers")
    return run


def peers(hf: Any, processor: Any, inputs: dict[str, Any], nnterp: str | None) -> dict[str, Callable[[], None]]:
    """Other libraries that can count in this very model; what they cannot do is printed."""
    found: dict[str, Callable[[], None]] = {}
    if nnterp:
        try:
            peer = Nnterp(nnterp, hf, inputs)
            found[f"{peer.version}, trace"] = peer
        except Exception as error:
            print(f"nnterp left out: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    else:
        print("nnterp left out: --nnterp FOLDER names no installation of it")
    if importlib.util.find_spec("transformer_lens"):
        try:
            run = transformer_lens(hf, processor, inputs)
            found[f"TransformerLens {importlib.metadata.version('transformer_lens')}, hooks"] = run
        except Exception as error:
            print(f"TransformerLens left out: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    else:
        print("TransformerLens left out: not installed")
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--nnterp", help="folder with nnterp and its nnsight")
    parser.add_argument("--only", nargs="+", help="only variants whose names hold one of these words")
    options = parser.parse_args()
    device, dtype = measure.device_of(options.device), getattr(torch, options.dtype)
    bare, processor = measure.llava(options.layers, options.width, options.hidden)
    bare = bare.to(device, dtype)
    bare.config.architectures = [type(bare).__name__]  # which peers look at
    model = vn.VLM(copy.deepcopy(bare), processor)
    asked = measure.questions(options.batch, words=options.words)
    reader = Letters()
    batch = reader.encode(model, asked)
    inputs = {**batch, "use_cache": False, "logits_to_keep": 1}
    space = model.space()
    chosen = torch.randperm(len(space), generator=torch.Generator().manual_seed(0))[: len(space) // 200]
    neurons = vn.NeuronSet(space, chosen.sort().values)
    columns = [
        (neurons.indices[(neurons.indices >= start) & (neurons.indices < end)] - start).to(device)
        for start, end in itertools.pairwise(space.offsets)
    ]
    recorder, ablation = vn.Recorder(model, space), vn.Ablation(model, neurons)
    nothing = vn.Ablation(model, vn.NeuronSet(space, neurons.indices[:0]))

    def within(context: Any) -> Callable[[], None]:
        def run() -> None:
            with context:
                model.hf(**inputs)

        return run

    variants: dict[str, Callable[[], Any]] = {
        "plain (control)": lambda: bare(**inputs),
        "wrapped model, plain call": lambda: model.hf(**inputs),
        "vlmneurons, Recorder": within(recorder),
        "vlmneurons, zero ablation": within(ablation),
        "vlmneurons, empty ablation": within(nothing),
        "vlmneurons, count in a trace": our_trace(model, inputs),
        "plain hooks, (x > 0).sum": plain_hooks(bare, inputs),
        "plain hooks, x[..., i] = 0": plain_zeroing(bare, inputs, columns),
    }
    if not options.no_peers:
        from nnsight import TransformersModel

        alone = TransformersModel(copy.deepcopy(bare), processor=processor, task="image-text-to-text")
        variants["nnsight, count in a trace"] = nnsight_alone(alone, inputs)
        variants |= peers(bare, processor, inputs, options.nnterp)
    if options.only:
        variants = {name: run for name, run in variants.items() if any(word in name for word in options.only)}
    print(measure.about(device))
    print(
        f"{options.layers} layers x {options.width:,} neurons (hidden size {options.hidden}), {options.dtype}, batch "
        f"{options.batch} x {batch['input_ids'].shape[1]} tokens; {options.rounds} interleaved rounds"
    )
    with torch.inference_mode():
        measure.ratios(measure.paired(lambda: bare(**inputs), variants, options.rounds, device))


if __name__ == "__main__":
    main()
