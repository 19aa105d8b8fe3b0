"""Many masks in one forward against one forward for each mask.

Run: ``python benchmarks/knockout.py``. Both ways read the same batch of questions under the same masks (0.5 % of the
decoder's neurons each, drawn at random from all layers); the table says how far the margins are apart at most, in nats,
and how many chosen options differ. *Vision share* is the part of a plain run that the vision tower and the projector
take.
"""

import argparse
import statistics
from typing import Any

import measure
import torch

import vlmneurons as vn
from vlmneurons.answers import reader_of
from vlmneurons.masked import read_masked


def vision_share(model: vn.VLM, batch: Any, device: torch.device) -> float:
    """CPU time of the picture's features over that of the forward."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    picture = {name: batch[name] for name in names if name in batch}
    pairs = measure.paired(
        lambda: model.hf(**batch, use_cache=False, logits_to_keep=1),
        {"vision": lambda: model.hf.model.get_image_features(**picture)},
        5,
        device,
    )["vision"]
    return statistics.median(vision / whole for whole, vision in pairs)


def compare(name: str, model: vn.VLM, questions: vn.QuestionSet, n_masks: int, rounds: int, device: Any) -> None:
    """Print one line."""
    reader = reader_of(questions.answer)
    space = model.space()
    ablations = []
    for seed in range(n_masks):
        order = torch.randperm(len(space), generator=torch.Generator().manual_seed(seed))
        ablations.append(vn.Ablation(model, vn.NeuronSet(space, order[: max(1, len(space) // 200)].sort().values)))
    encoded = reader.encode(model, questions)

    def loop() -> list[Any]:
        readings = []
        for ablation in ablations:
            with ablation:
                readings.append(reader.read(model, questions, encoded))
        return readings

    def shared() -> list[Any]:
        return list(read_masked(model, reader, questions, encoded, ablations))

    pairs = list(zip(loop(), shared(), strict=True))
    apart = max(float((a.margins(questions) - b.margins(questions)).abs().max()) for a, b in pairs)
    differ = sum(x != y for a, b in pairs for x, y in zip(a.chosen, b.chosen, strict=True))
    times = measure.paired(loop, {"loop": loop, "shared": shared}, rounds, device)
    control = [one / other for one, other in times["loop"]]
    faster = [one / other for one, other in times["shared"]]
    low, middle, high = statistics.quantiles(faster, n=4)
    batch = reader.wants(encoded).batch
    loop_ms, shared_ms = (1e3 * statistics.median(column) for column in zip(*times["shared"], strict=True))
    print(
        f"{name:<32} {n_masks:>5} {vision_share(model, batch, device):>7.0%} {loop_ms:>10.0f} {shared_ms:>10.0f} "
        f"{middle:>7.2f} {f'{low:.2f}–{high:.2f}':>11} "
        f"{f'{min(control):.2f}–{max(control):.2f}':>11} {apart:>8.0e} {differ:>7}",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["demo", "qwen"], choices=["demo", "qwen"])
    parser.add_argument("--device")
    options = parser.parse_args()
    device = measure.device_of(options.device)
    print(measure.about(device))
    print(f"batches of {options.batch} questions; {options.rounds} paired rounds")
    print(
        f"{'model':<32} {'masks':>5} {'vision':>7} {'loop ms':>10} {'shared ms':>10} {'faster':>7} {'quartiles':>11} "
        f"{'control':>11} {'apart':>8} {'differ':>7}"
    )
    with torch.inference_mode():
        if "demo" in options.models:
            demo, asked = vn.load_demo()
            demo.hf.to(device)
            for n_masks in (5, 25):
                compare("demo", demo, asked[: options.batch], n_masks, options.rounds, device)
        if "qwen" in options.models:
            pictures = measure.questions(options.batch, words=2, height=64, width=80)
            for layers, hidden, width in ((4, 256, 1024), (12, 192, 768)):
                hf, processor = measure.qwen(layers, hidden, width)
                model = vn.VLM(hf.to(device), processor)
                name = f"Qwen2.5-VL, {layers} layers x {width:,}"
                compare(name, model, pictures, 25, options.rounds, device)


if __name__ == "__main__":
    main()
