"""What it takes to know a model: the digest of every byte of its weights, read at the start of every run.

    python benchmarks/identity.py [--small]

The model is Qwen2.5-VL-7B at full size in bfloat16 with random weights (15 GiB of memory; ``--small`` takes a fifth).
Printed: the time of the digest, and of the whole setting, as multiples of the time that the same thread takes to read
the same bytes once (a control), and the memory that they need beside the model.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import measure
import torch

import vlmneurons as vn
from vlmneurons.model.identity import digest_of_weights
from vlmneurons.run.identity import setting_of_run
from vlmneurons.testing import tiny_model


def full_size(small: bool) -> torch.nn.Module:
    """The 7B model without a checkpoint: its configuration's sizes, random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 2 if small else 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).random_(0, 2**15 - 1)
    return model


def read_once(model: torch.nn.Module) -> None:
    """The control: every byte of the weights is read and added up, by the same thread."""
    for tensor in model.parameters():
        tensor.detach().view(torch.int16).reshape(-1).view(torch.int64).sum()


def wall(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure in turn, and print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    network = full_size(given.small)
    size = sum(one.numel() * one.element_size() for one in network.parameters())
    print(measure.about(torch.device("cpu")))
    print(f"{size / 2**30:.2f} GiB in {len(list(network.parameters()))} tensors")
    model = vn.VLM(network, tiny_model("qwen2_5_vl")[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {"read once": [], "digest of weights": [], "whole setting": []}
    for _ in range(given.rounds):
        times["read once"].append(wall(lambda: read_once(network)))
        times["digest of weights"].append(wall(lambda: digest_of_weights(network)))
        times["whole setting"].append(wall(lambda: setting_of_run(model)))
    control = statistics.median(times["read once"])
    print("| what | median s | least | most | GiB/s | times the control |\n|---|--:|--:|--:|--:|--:|")
    for name, taken in times.items():
        middle = statistics.median(taken)
        rate = size / 2**30 / middle
        print(f"| {name} | {middle:.2f} | {min(taken):.2f} | {max(taken):.2f} | {rate:.1f} | {middle / control:.2f} |")
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"memory beside the model: {more:.0f} MiB at most")


if __name__ == "__main__":
    main()
