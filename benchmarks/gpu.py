"""One command for one GPU: is everything right on it, and what does it cost with models of 7B.

    python benchmarks/cuda.py                        # on a card with 40 GiB or more, about five minutes
    python benchmarks/cuda.py --device cpu --small   # the same steps with small models

Needs no network: Qwen2.5-VL-7B and LLaVA-NeXT-Mistral-7B are built on the card at full size in bfloat16 with random
weights, beside real processors with a small vocabulary. First the demo in float32 is held against a CPU and against
itself with zeroed columns; a line that says WRONG ends the run with status 1. Then for each model: what identity,
recording and ablation take beside the plain forward, counts against hooks that compare in float64, how often the host
waits for the card in a forward, knockout with 25 masks (all of them and two others a question), reading ahead, halving
when memory runs out, and vLLM's recording and knockout where vLLM is installed. Each part stands alone: one that fails
is printed with its traceback, and the next begins.
"""

import argparse
import copy
import logging
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import knockout
import measure
import numpy as np
import overhead
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

import vlmneurons as vn
from vlmneurons.errors import MismatchError
from vlmneurons.model.identity import digest_of_weights
from vlmneurons.run.readers import reader_of
from vlmneurons.run.vllm.server import installed_version, server_of
from vlmneurons.testing import tiny_model


@dataclass
class Findings:
    """What was found wrong; a run without any ends with status 0."""

    device: torch.device
    wrong: list[str] = field(default_factory=list)

    def check(self, what: str, right: bool, said: str = "") -> None:
        """Print one comparison."""
        print(f"  {'right' if right else 'WRONG'}: {what}{f' ({said})' if said else ''}", flush=True)
        if not right:
            self.wrong.append(what)

    def part(self, title: str, run: Callable[[], None]) -> None:
        """Run one part, say what it took, and go on if it fails."""
        print(f"\n{title}", flush=True)
        start = time.perf_counter()
        try:
            run()
        except Exception:
            traceback.print_exc()
            self.wrong.append(f"{title} stopped")
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            torch.cuda.empty_cache()
        print(f"  [{time.perf_counter() - start:.0f} s]", flush=True)


def on(device: torch.device, build: Callable[[], Any]) -> Any:
    """A model built on a device in bfloat16, with the weights that its class begins with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            torch.manual_seed(0)
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def qwen(device: torch.device, small: bool) -> vn.VLM:
    """Qwen2.5-VL-7B; its processor makes 256 tokens of a picture of 448 x 448."""
    hf, processor = tiny_model("qwen2_5_vl")
    config, part = hf.config, 8 if small else 1
    layers, depth = (3, 4) if small else (28, 32)
    text = {
        "hidden_size": 3584 // part,
        "intermediate_size": 18_944 // part,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "num_attention_heads": 7 if small else 28,
        "num_key_value_heads": 1 if small else 4,
        "vocab_size": 152_064 // part,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [8, 12, 12] if small else [16, 24, 24],
        },
    }
    vision = {
        "hidden_size": 1280 // part,
        "intermediate_size": 3420 // part,
        "depth": depth,
        "num_heads": 16 // part,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [(step + 1) * depth // 4 - 1 for step in range(4)],
    }
    for name, value in text.items():
        setattr(config.text_config, name, value)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    processor.image_processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}
    return vn.VLM(on(device, lambda: Qwen2_5_VLForConditionalGeneration(config)), processor)


def llava(device: torch.device, small: bool) -> vn.VLM:
    """LLaVA-NeXT-Mistral-7B; its processor makes some 2,900 tokens of a picture of 448 x 448."""
    from transformers import LlavaNextForConditionalGeneration

    hf, processor = tiny_model("llava_next_mistral")
    config, part = hf.config, 8 if small else 1
    text = {
        "hidden_size": 4096 // part,
        "intermediate_size": 14_336 // part,
        "num_hidden_layers": 3 if small else 32,
        "num_attention_heads": 32 // part,
        "num_key_value_heads": 8 // part,
        "head_dim": 128,
        "vocab_size": 32_064 // part,
        "max_position_embeddings": 32_768,
    }
    vision = {
        "hidden_size": 1024 // part,
        "intermediate_size": 4096 // part,
        "num_hidden_layers": 4 if small else 24,
        "num_attention_heads": 16 // part,
        "image_size": 112 if small else 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    for name, value in text.items():
        setattr(config.text_config, name, value)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    edge = vision["image_size"]
    config.image_grid_pinpoints = [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge]]
    images = processor.image_processor
    images.image_grid_pinpoints, images.size = config.image_grid_pinpoints, {"shortest_edge": edge}
    images.crop_size, processor.patch_size = {"height": edge, "width": edge}, 14
    return vn.VLM(on(device, lambda: LlavaNextForConditionalGeneration(config)), processor)


def questions(n: int, groups: int, edge: int = 448) -> vn.QuestionSet:
    """Questions of some groups, each about a picture of random colours of its own."""
    generator = np.random.default_rng(0)
    return vn.QuestionSet(
        vn.Question(
            Image.fromarray(generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8)),
            ("What is this called?", "Where is it from?", "Who made it?", "When is it eaten?")[k % 4],
            ("Tea", "Rice", "Bread", "Soup"),
            k % 4,
            f"group {k % groups:02d}",
            id=f"q{k}",
        )
        for k in range(n)
    )


def random_selection(space: vn.NeuronSpace, groups: list[str], share: float) -> vn.Selection:
    """A random set of neurons for each group."""
    generator = torch.Generator().manual_seed(0)
    size = max(1, int(share * len(space)))
    return vn.Selection(
        {
            group: vn.NeuronSet(space, torch.randperm(len(space), generator=generator)[:size].sort().values)
            for group in groups
        }
    )


def demo_is_right(findings: Findings) -> None:
    """Counts, answers and zeroing on the device against a CPU and against zeroed weight columns."""
    here, asked = vn.load_demo("organism")
    there, _ = vn.load_demo("organism")
    there.hf.to(findings.device)
    asked = vn.QuestionSet(list(asked)[::5], answer=asked.answer)
    findings.check("the digest of the weights is the CPU's", digest_of_weights(here.hf) == digest_of_weights(there.hf))
    mine, other = (vn.record(model, asked, condition="all", progress=False) for model in (here, there))
    differ = int((mine.positive != other.positive).sum())
    findings.check(
        "counts of the demo are the CPU's but for rounding",
        differ <= mine.positive.numel() // 1000,
        f"{differ} of {mine.positive.numel():,} differ, by {int((mine.positive - other.positive).abs().max())} at most",
    )
    truth = vn.demo_truth()
    results = [vn.knockout(model, asked, {"planted": truth}, progress=False) for model in (here, there)]
    tables = [result.answer_table() for result in results]
    same = int((tables[0]["chosen"] == tables[1]["chosen"]).sum())
    findings.check(
        "answers with and without the planted neurons are the CPU's",
        same >= 0.999 * len(tables[0]),
        f"{same} of {len(tables[0])}",
    )
    neurons = next(iter(truth.values()))
    twin = copy.deepcopy(there.hf)
    layout = there.towers["language"]
    for layer, neuron in neurons.to_pairs():
        twin.get_submodule(layout.layer_paths[layer]).mlp.down_proj.weight.data[:, neuron] = 0
    batch = there.prepare(asked[:16])
    with torch.inference_mode():
        before = there.hf(**batch).logits
        with vn.Ablation(there, neurons):
            ablated = there.hf(**batch).logits
            written = there.generate(**batch, max_new_tokens=3, do_sample=False)
        after = there.hf(**batch).logits
        zeroed = twin(**batch).logits
        findings.check("zeroing equals zeroed columns, bit for bit", bool(torch.equal(ablated, zeroed)))
        findings.check("what was done is undone, bit for bit", bool(torch.equal(before, after)))
        alike = torch.equal(written, twin.generate(**batch, max_new_tokens=3, do_sample=False))
        findings.check("generating, too", bool(alike))


class Within:
    """Times the model's forward inside a context, and not what entering takes."""

    def __init__(self, context: Any, run: Callable[[], Any], device: torch.device) -> None:
        self.context, self.run, self.device = context, run, device

    def __call__(self) -> None:
        with self.context:
            self.run()

    def seconds(self) -> float:
        """See `measure.seconds`."""
        with self.context:
            return measure.seconds(self.run, self.device)


def identity(model: vn.VLM, device: torch.device) -> None:
    """The digest of all weights, beside the way of the same bytes to the host."""
    size = sum(one.numel() * one.element_size() for one in model.hf.state_dict().values())

    def copied() -> None:
        for tensor in model.hf.state_dict().values():
            tensor.cpu()

    for name, run in {"copy to the host (control)": copied, "digest": lambda: digest_of_weights(model.hf)}.items():
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        print(f"  {name:<28} {min(taken):.2f} s, {size / 2**30 / min(taken):.1f} GiB/s of {size / 2**30:.2f} GiB")


def beside(model: vn.VLM, asked: vn.QuestionSet, rounds: int, findings: Findings) -> None:
    """What stands beside the plain forward, in time and memory; and how often the host waits for the card."""
    device, space = findings.device, model.space()
    batch = reader_of(asked.answer).encode(model, asked)
    inputs = {**batch, "use_cache": False, "logits_to_keep": 1}
    neurons = next(iter(random_selection(space, ["x"], 0.005).values()))

    def plain() -> None:
        model.hf(**inputs)

    contexts = {
        "vlmneurons, Recorder": vn.Recorder(model, space),
        "vlmneurons, zero ablation": vn.Ablation(model, neurons),
        "vlmneurons, scaling at gate": vn.Ablation(model, neurons, mode="scale", factor=0.5, at="gate"),
    }
    variants: dict[str, Callable[[], Any]] = {
        "plain (control)": plain,
        "plain hooks, (x > 0).sum": overhead.plain_hooks(model.hf, inputs),
    }
    variants |= {name: Within(context, plain, device) for name, context in contexts.items()}
    print(f"  batch of {len(asked)} x {batch['input_ids'].shape[1]} tokens; {rounds} interleaved rounds")
    with torch.inference_mode():
        measure.ratios(measure.paired(plain, variants, rounds, device, warm=1))
        if device.type != "cuda":
            return
        print(f"  {'what':<34} {'host waits':>10} {'peak MiB beside the weights':>28}")
        start = torch.cuda.memory_allocated(device)
        for name, context in {"plain (control)": None, **contexts}.items():
            run = plain
            with context if context is not None else warnings.catch_warnings():
                run()
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    try:
                        run()
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                waits = sum("synchroniz" in str(one.message) for one in caught)
                peak = (torch.cuda.max_memory_allocated(device) - start) / 2**20
            print(f"  {name:<34} {waits:>10} {peak:>28.0f}")


def counting(model: vn.VLM, asked: vn.QuestionSet, findings: Findings) -> None:
    """Counts against hooks on the activation functions that compare in float64."""
    batch = reader_of(asked.answer).encode(model, asked)
    image = getattr(model.hf.config, "image_token_id", None) or model.hf.config.image_token_index
    counted = batch["input_ids"] == image
    wanted: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        wanted.append((output.double() > 0)[counted].sum(0).cpu())

    recorder = vn.Recorder(model, tokens="image")
    with torch.inference_mode(), recorder:
        model.hf(**batch, use_cache=False, logits_to_keep=1)
    handles = [layer.mlp.act_fn.register_forward_hook(hook) for layer in model.hf.model.language_model.layers]
    with torch.inference_mode():
        model.hf(**batch, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    got, right = recorder.statistics.positive[0], torch.cat(wanted)
    findings.check(
        "counts equal hooks that compare in float64",
        bool(torch.equal(got.long().cpu(), right.long())),
        f"{int((got.cpu() != right).sum())} of {right.numel():,} differ; {int(counted.sum()):,} tokens",
    )


def recording(model: vn.VLM, asked: vn.QuestionSet, batch_size: int) -> None:
    """``record`` as a whole with and without reading ahead, beside asking alone."""
    reader = reader_of(asked.answer)

    def asking() -> None:
        with torch.inference_mode():
            for start in range(0, len(asked), batch_size):
                part = asked[start : start + batch_size]
                reader.read(model, part, reader.encode(model, part))

    runs = {
        "asked without recording": asking,
        "record, prefetch=0": lambda: vn.record(model, asked, batch_size=batch_size, prefetch=0, progress=False),
        "record, prefetch=2": lambda: vn.record(model, asked, batch_size=batch_size, prefetch=2, progress=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        print(f"  {name:<28} {min(seconds):>6.2f} s, {len(asked) / min(seconds):>6.1f} questions a second")


def masks(model: vn.VLM, asked: vn.QuestionSet, batch: int, n_masks: int, rounds: int, device: torch.device) -> None:
    """25 masks: a loop of forwards against one shared forward, then whole studies with all and with two others.

    The loop runs each mask once a round.
    """
    chosen = random_selection(model.space(), asked.groups, 0.01)
    many = random_selection(model.space(), [f"mask {k}" for k in range(n_masks)], 0.01)
    ablations = [vn.Ablation(model, neurons) for neurons in many.values()]
    knockout.header()
    with torch.inference_mode():
        knockout.compare("random masks of 1 %", model, asked[:batch], ablations, rounds, device)
    for others in (None, 2):
        start = time.perf_counter()
        result = vn.knockout(model, asked, {"random": chosen}, others=others, batch_size=batch, progress=False)
        seconds, runs = time.perf_counter() - start, len(result.answer_table())
        name = "all others" if others is None else f"others={others}"
        print(
            f"  knockout, {len(asked)} questions of {len(asked.groups)} groups, {name}: {seconds:.1f} s, {runs:,} "
            f"answers, {1e3 * seconds / runs:.1f} ms an answer",
            flush=True,
        )


def halving(model: vn.VLM, asked: vn.QuestionSet, findings: Findings) -> None:
    """Memory is made to run out in a batch of 16, and recording has to go on with less."""
    device = findings.device
    if device.type != "cuda":
        print("  (memory of a CPU cannot be bounded here)")
        return
    logging.getLogger("vlmneurons").setLevel(logging.ERROR)
    asked = asked[:16]
    whole = vn.record(model, asked, condition="all", batch_size=4, progress=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    kept = torch.cuda.memory_allocated(device)
    vn.record(model, asked[:4], condition="all", batch_size=4, progress=False)
    four = torch.cuda.max_memory_allocated(device) - kept
    if four < 2**27:
        print("  (a model so small does not run out of memory)")
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (kept + 2.2 * four) / total), device)
    less = vn.record(model, asked, condition="all", batch_size=16, progress=False)
    halved = less.provenance.get("halved", [])
    apart = (less.positive - whole.positive).abs()
    differ, most = float((apart > 0).float().mean()), int(apart.max())
    findings.check("out of memory halves the batch", bool(halved), f"{[(one['from'], one['to']) for one in halved]}")
    findings.check(
        "and every question is counted once",
        bool(torch.equal(less.tokens, whole.tokens)),
        f"by the batches' rounding {differ:.1%} of counts differ, by {most} of {int(whole.tokens.max()):,} at most",
    )


def beside_vllm(model: vn.VLM, asked: vn.QuestionSet, batch: int, rounds: int, device: torch.device) -> None:
    """The same recording and knockout by vLLM, where it is installed; the checkpoint is written for it."""
    try:
        print(f"  vllm {installed_version()}, which holds {model.hf.dtype} weights a second time")
    except MismatchError as error:
        print(f"  not measured: {error}")
        return
    if not isinstance(model.hf, Qwen2_5_VLForConditionalGeneration):
        print("  not measured: transformers 5 saves CLIP towers under names that vLLM 0.32 does not read")
        return
    with tempfile.TemporaryDirectory() as folder:
        size = sum(one.numel() * one.element_size() for one in model.hf.parameters())
        if shutil.disk_usage(folder).free < 1.2 * size:
            print(f"  not measured: {size / 2**30:.0f} GiB of weights have no place in {folder}")
            return
        model.hf.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        memory = {"gpu_memory_utilization": 0.45} if device.type == "cuda" else {"kv_cache_memory_bytes": 2**28}
        there = vn.VLM.from_pretrained(folder, engine="vllm", dtype="bfloat16", max_model_len=4096, **memory)
        selection = random_selection(model.space(), asked.groups, 0.01)
        engines, results = {"here": model, "vLLM": there}, {}
        works: dict[str, Callable[[vn.VLM], Any]] = {
            "record": lambda one: vn.record(one, asked, condition="all", batch_size=batch, progress=False),
            "knockout, others=2": lambda one: vn.knockout(
                one, asked, {"random": selection}, others=2, batch_size=batch, progress=False
            ),
        }
        for what, work in works.items():
            taken: dict[str, list[float]] = {name: [] for name in engines}
            for turn in range(1 + rounds):  # in the first, vLLM starts and proves itself
                for name, one in engines.items():
                    if name == "vLLM" and turn:  # else its prompts are in the cache
                        server_of(there).llm.reset_prefix_cache()
                    start = time.perf_counter()
                    results[what, name] = work(one)
                    taken[name] += [time.perf_counter() - start] if turn else []
            for name, seconds in taken.items():
                rate = len(asked) / statistics.median(seconds)
                print(f"  {what:<20} {name:<5} {statistics.median(seconds):>7.2f} s, {rate:>6.1f} questions a second")
        ours, theirs = (results["knockout, others=2", name] for name in engines)
        apart = np.nanmedian(np.abs(ours.margins - theirs.margins))
        effect = np.nanmedian(np.abs(ours.margins[1:] - ours.margins[0]))
        same = int((ours.chosen == theirs.chosen).sum())
        print(f"  {same} of {ours.chosen.size} choices alike; margins apart by {apart:.1e}, effects {effect:.1e} nats")
        del there, one, engines


def main() -> None:
    """Run every part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="by default the GPU if there is one")
    parser.add_argument("--small", action="store_true", help="narrow models of few layers")
    parser.add_argument("--models", nargs="+", choices=["qwen", "llava"], default=["qwen", "llava"])
    parser.add_argument("--parts", nargs="+", default=[""], help="words of the titles of parts; by default all")
    parser.add_argument("--rounds", type=int, help="of timings; by default 7, small 2")
    given = parser.parse_args()
    device = measure.device_of(given.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    findings, rounds = Findings(device), given.rounds or (2 if given.small else 7)
    print(measure.about(device))

    def wanted(title: str) -> bool:
        return any(word.lower() in title.lower() for word in given.parts)

    if wanted("The demo, in float32"):
        findings.part("The demo, in float32", lambda: demo_is_right(findings))
    for name in given.models:
        start = time.perf_counter()
        model = {"qwen": qwen, "llava": llava}[name](device, given.small)
        many = sum(one.numel() for one in model.hf.parameters())
        built = time.perf_counter() - start
        title = f"{type(model.hf).__name__}, {many / 1e9:.2f}e9 weights in {model.hf.dtype}"
        print(f"\n== {title}, built in {built:.0f} s: {model!r}")
        batch = 4 if given.small or name == "llava" else 8
        groups, pictures = (5, 2) if given.small else (25, 12) if name == "qwen" else (9, 4)
        asked = questions(groups * pictures, groups, 112 if given.small else 448)
        few = asked[:batch]
        n_masks, loops = (5, 1) if given.small else (25, 1)
        parts = {
            "Identity": lambda model: identity(model, device),
            "Beside the forward": lambda model, few=few: beside(model, few, rounds, findings),
            "Counting": lambda model, few=few: counting(model, few, findings),
            "Recording": lambda model, asked=asked, batch=batch: recording(model, asked[:48], batch),
            "Masks": lambda model, asked=asked, sizes=(batch, n_masks, loops): masks(model, asked, *sizes, device),
            "Out of memory": lambda model, asked=asked: halving(model, asked, findings),
            "vLLM beside it": lambda model, asked=asked, size=4 * batch: beside_vllm(
                model, asked[:48], size, 1 if given.small else 2, device
            ),
        }
        for title, run in parts.items():
            if wanted(title):
                findings.part(title, lambda run=run, model=model: run(model))
        del model
    print(f"\n{len(findings.wrong)} wrong{': ' if findings.wrong else ''}{'; '.join(findings.wrong)}")
    raise SystemExit(bool(findings.wrong))


if __name__ == "__main__":
    main()
