"""How recording's own cost grows with neurons, tokens, groups and items: its ratio to the plain forward stays put.

Run: ``python benchmarks/scaling.py``. Each line is one shape; ``plain`` is a never-wrapped model, its ratio to itself
the control.
"""

import argparse
import copy
import statistics
from typing import Any

import measure
import torch

import vlmneurons as vn
from vlmneurons.run.readers import Letters


def line(options: Any, device: torch.device, *, layers: int, width: int, words: int, batch: int, groups: int) -> None:
    """Print one shape's line."""
    bare, processor = measure.llava(layers, width, 256)
    bare = bare.to(device)
    model = vn.VLM(copy.deepcopy(bare), processor)
    inputs = Letters().encode(model, measure.questions(batch, words=words))
    recorder = vn.Recorder(model)
    names = [f"group {number}" for number in range(groups)]
    step = 0

    def plain() -> None:
        bare(**inputs, use_cache=False, logits_to_keep=1)

    def recorded() -> None:
        nonlocal step
        labels = [names[(step * batch + row) % groups] for row in range(batch)]
        step += 1
        with recorder, recorder.group(labels):
            model.hf(**inputs, use_cache=False, logits_to_keep=1)

    with torch.inference_mode():
        times = measure.paired(plain, {"control": plain, "recorder": recorded}, options.rounds, device)
    own, ours = ([two / one for one, two in times[name]] for name in ("control", "recorder"))
    low, middle, high = statistics.quantiles(ours, n=4)
    plain_ms = 1e3 * statistics.median(one for one, _ in times["recorder"])
    print(
        f"{layers:>6} {width:>7,} {inputs['input_ids'].shape[1]:>7} {batch:>6} {groups:>7} {plain_ms:>9.1f} "
        f"{statistics.median(own):>8.3f} {middle:>9.3f} {f'{low:.3f}–{high:.3f}':>13}",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device")
    options = parser.parse_args()
    device = measure.device_of(options.device)
    print(measure.about(device))
    print(f"hidden size 256, float32; {options.rounds} paired rounds")
    print(
        f"{'layers':>6} {'neurons':>7} {'tokens':>7} {'batch':>6} {'groups':>7} {'plain ms':>9} {'control':>8} "
        f"{'recorder':>9} {'quartiles':>13}"
    )
    base = {"layers": 4, "width": 1024, "words": 2, "batch": 4, "groups": 5}
    changes: list[dict[str, int]] = [{}, {"width": 4096}, {"layers": 12}, {"words": 30}, {"batch": 1}, {"groups": 25}]
    for change in changes:
        line(options, device, **{**base, **change})


if __name__ == "__main__":
    main()
