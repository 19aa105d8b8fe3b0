"""What the benchmarks share: models of realistic proportions, paired timing, and the line that says what ran where.

Timings are CPU time (on CUDA the time that the GPU is busy) of interleaved rounds: each round runs every variant once,
in an order of its own, and each beside a plain run of its own, before or after it, by which it is divided. Whatever
else the machine does falls on both. The plain model is a variant as well: the spread of its ratio to itself is what a
difference must exceed.
"""

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import nnsight
import numpy as np
import torch
import transformers
from PIL import Image

import vlmneurons as vn
from vlmneurons.testing import tiny as _tiny


def about(device: torch.device) -> str:
    """Device and versions, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{name}, torch threads {torch.get_num_threads()}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, nnsight {nnsight.__version__}, vlmneurons "
        f"{vn.__version__}"
    )


def device_of(name: str | None) -> torch.device:
    """The device that was asked for, or the best there is; on a CPU one thread."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What one call takes: CPU time of this process, or the time that a GPU is busy with it.

    A function with an attribute ``seconds`` runs in another process, and says itself what it took.
    """
    if hasattr(run, "seconds"):
        return run.seconds()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def paired(
    base: Callable[[], Any],
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    warm: int = 2,
) -> dict[str, list[tuple[float, float]]]:
    """For every variant and round the seconds of a base run, and of the variant's run right after or before it.

    ``warm`` rounds more are run first and thrown away.
    """
    order: list[str] = list(variants)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    generator = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(-warm, rounds):
            generator.shuffle(order)
            for name in order:
                if generator.random() < 0.5:
                    first, second = seconds(base, device), seconds(variants[name], device)
                else:
                    second, first = seconds(variants[name], device), seconds(base, device)
                if number >= 0:
                    times[name].append((first, second))
    finally:
        gc.enable()
    return times


def ratios(times: Mapping[str, list[tuple[float, float]]]) -> None:
    """Print each variant's median time and its ratio to the base: median, quartiles, and the median's 95 % interval."""
    print(f"{'variant':<34} {'median ms':>10} {'ratio':>7} {'quartiles':>15} {'95 % of median':>16}")
    for name, pairs in times.items():
        ratio = [variant / base for base, variant in pairs]
        low, middle, high = statistics.quantiles(ratio, n=4)
        draws = np.median(np.random.default_rng(0).choice(ratio, (2000, len(ratio))), axis=1)
        bounds = np.percentile(draws, [2.5, 97.5])
        print(
            f"{name:<34} {1e3 * statistics.median(variant for _, variant in pairs):>10.1f} {middle:>7.3f} "
            f"{f'{low:.3f}–{high:.3f}':>15} {f'{bounds[0]:.3f}–{bounds[1]:.3f}':>16}",
            flush=True,
        )


def llava(layers: int = 8, width: int = 1792, hidden: int = 512) -> tuple[Any, Any]:
    """A LLaVA-NeXT with a Mistral decoder of that size, and its processor; equal on every call."""
    from transformers import LlavaNextForConditionalGeneration

    hf, processor = _tiny.tiny_model("llava_next_mistral")
    config = hf.config
    for name, value in {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(4, hidden // 64),
        "num_key_value_heads": max(2, hidden // 128),
        "head_dim": hidden // max(4, hidden // 64),
    }.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).eval(), processor


def qwen(
    layers: int = 4,
    hidden: int = 256,
    width: int = 1024,
    vision: Mapping[str, int] | None = None,
    longest: int = 12_800,
    heads: int = 8,
    shared_heads: int = 2,
) -> tuple[Any, Any]:
    """A Qwen2.5-VL of that size, whose pictures have up to ``longest`` pixels in patches of 4 x 4."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    hf, processor = _tiny.tiny_model("qwen2_5_vl")
    config = hf.config
    sizes = {"hidden_size": 96, "intermediate_size": 256, "depth": 4, "num_heads": 4, **(vision or {})}
    fourths = [(part + 1) * sizes["depth"] // 4 - 1 for part in range(4)]
    for name, value in {**sizes, "out_hidden_size": hidden, "fullatt_block_indexes": fourths}.items():
        setattr(config.vision_config, name, value)
    for name, value in {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared_heads,
    }.items():
        setattr(config.text_config, name, value)
    half = hidden // heads // 2
    config.text_config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
    }
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": longest}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def questions(n: int, *, words: int = 12, height: int = 96, width: int = 128, groups: str = "ABCDE") -> vn.QuestionSet:
    """Questions of nearly equal length with pictures of random colours."""
    generator = np.random.default_rng(0)
    return vn.QuestionSet(
        vn.Question(
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            f"Which dish is this{' and which place' * (words + number % 2)}?",
            ("Tea", "Rice", "Bread", "Soup"),
            number % 4,
            groups[number % len(groups)],
            id=f"q{number}",
        )
        for number in range(n)
    )
