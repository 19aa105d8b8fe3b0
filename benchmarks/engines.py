"""Where the engines cross: CPU seconds a mask of the library's own hooks and of vLLM, on one core.

    python benchmarks/engines.py [--width 128 256 512 1024] [--layers 4] [--questions 48] [--masks 8] [--rounds 3]

In an environment with vLLM for CPUs (`.ci/vllm FOLDER` keeps one). Models are random Qwen2.5-VL of some hidden sizes in
float32, questions have pictures, answers are letters. Each round runs both engines, and the library's hooks a second
time, in an order of its own: the ratio of that second run to the first is the control, which a difference must exceed.
vLLM runs in this process, so that CPU seconds hold all that it does.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
from pathlib import Path

import measure
import numpy as np
import torch

import vlmneurons as vn
from vlmneurons.testing import tiny_image, tiny_model


def save_model(folder: Path, width: int, layers: int) -> None:
    """A random Qwen2.5-VL of a hidden size, with heads of 32 or 64 that vLLM's attention for CPUs knows."""
    model, processor = tiny_model("qwen2_5_vl")
    config = copy.deepcopy(model.config)
    text, head = config.text_config, 32 if width < 256 else 64
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 4 * width, layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = width // head, width // head, head
    text.layer_types = ["full_attention"] * layers
    text.rope_parameters["mrope_section"] = [head // 8, 3 * head // 16, 3 * head // 16]
    config.vision_config.hidden_size, config.vision_config.out_hidden_size = 64, width
    torch.manual_seed(0)
    made = type(model)(config).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)


def questions_of(n: int) -> vn.QuestionSet:
    """Questions of 4 to 24 words with pictures of several shapes."""
    words = ("food", "dish", "place", "country", "city", "people", "name", "word")
    options = ("one", "two", "three", "four")
    return vn.QuestionSet(
        [
            vn.Question(
                tiny_image(k, 24 + 8 * (k % 5), 24 + 8 * (k % 7)),
                " ".join(words[(k + j) % 8] for j in range(4 + k % 20)) + "?",
                options,
                k % 4,
                "AB"[k % 2],
                id=f"q{k}",
            )
            for k in range(n)
        ]
    )


def compared(width: int, given: argparse.Namespace) -> str:
    """A line of the table: both engines at one size."""
    questions, device = questions_of(given.questions), torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), width, given.layers)
        here = vn.VLM.from_pretrained(name, dtype=torch.float32)
        there = vn.VLM.from_pretrained(
            name, engine="vllm", dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_memory_bytes=2**28
        )
        space, generator = here.space(), torch.Generator().manual_seed(0)
        sets = [torch.randperm(len(space), generator=generator)[: len(space) // 50] for _ in range(given.masks)]
        masks = {f"m{n}": vn.NeuronSet(space, one) for n, one in enumerate(sets)}
        results: dict[str, vn.KnockoutResult] = {}

        def run(model: vn.VLM, label: str) -> None:
            results[label] = vn.knockout(model, questions, masks, batch_size=16, progress=False)

        runs = {"hooks": here, "again": here, "vllm": there}
        times: dict[str, list[float]] = {label: [] for label in runs}
        for label, model in runs.items():  # whatever is made once
            run(model, label)
        for round_ in range(given.rounds):
            for label in random.Random(round_).sample(sorted(runs), len(runs)):
                if label == "vllm":  # else its answers are in the prefix cache
                    _forget(there)
                times[label].append(measure.seconds(lambda label=label: run(runs[label], label), device))
        worst = np.abs(results["vllm"].margins - results["hooks"].margins).max()
        assert (results["vllm"].chosen == results["hooks"].chosen).all()
    each = {label: statistics.median(one) / (1 + given.masks) for label, one in times.items()}
    control = [b / a for a, b in zip(times["hooks"], times["again"], strict=True)]
    ratios = [b / a for a, b in zip(times["hooks"], times["vllm"], strict=True)]
    return (
        f"| {width} | {each['hooks']:.3f} | {each['vllm']:.3f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}–{max(ratios):.2f}) | {statistics.median(control):.2f} "
        f"({min(control):.2f}–{max(control):.2f}) | {worst:.0e} |"
    )


def _forget(model: vn.VLM) -> None:
    from vlmneurons.run.vllm.server import server_of

    server_of(model).llm.reset_prefix_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--masks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to where the table goes
    print(measure.about(measure.device_of("cpu")))
    print(f"{options.questions} questions, {options.masks} masks, {options.layers} layers, {options.rounds} rounds")
    print("| hidden size | hooks, CPU s a run | vLLM, CPU s a run | ratio | control | margins differ by |")
    print("|---|---|---|---|---|---|")
    for one in options.width:
        print(compared(one, options), flush=True)
