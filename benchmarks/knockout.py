"""Many masks in one forward against one forward for each mask.

Run: ``python benchmarks/knockout.py``. The loop runs the model's own forward, as it is, on the same batch of
questions under the same masks: those that five selectors give for five groups at 1 %; the table says how far the
margins are apart at most, in nats, and how many chosen options differ. *Vision* is the share of a plain run's CPU time
that the vision tower and the projector take, *packed* the part of the batch's tokens that are computed, *begin* the
layer that a mask first touches, from 0, on average over the masks. From these three follows what is to be *expected*
where a token takes the same time in every pass; it takes a little less in small batches, whose activations stay in the
cache.

The small Qwen2.5-VL has the proportions of Qwen2.5-VL-7B looking at a picture of 1024 x 768: 28 layers, every width a
sixteenth, four of five tokens a picture's. Its vision tower has 12 layers, not 32: products of small matrices take
longer than their share of multiply-adds, and with 12 its share of the time is what the 7B model's is of multiply-adds.
What that is, and what one forward can spare at most under masks that all begin at the first layer, is worked out from
the 7B model's widths and printed first.
"""

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import measure
import numpy as np
import torch
from PIL import Image

import vlmneurons as vn
from vlmneurons.run.batching import batches
from vlmneurons.run.masked import read_masked
from vlmneurons.run.packing import Packing
from vlmneurons.run.readers import reader_of
from vlmneurons.run.replayable import structure_for


@dataclass(frozen=True)
class Sizes:
    """Widths of a Qwen2.5-VL; by default those of the 7B model."""

    layers: int = 28
    hidden: int = 3584
    keys: int = 512
    mlp: int = 18_944
    vision_layers: int = 32
    vision_hidden: int = 1280
    vision_mlp: int = 3420
    full_attention: int = 4
    window: int = 64
    """Patches in a window of the other layers' attention."""

    def vision(self, patches: int) -> float:
        """Multiply-adds of a picture's features."""
        hidden = self.vision_hidden
        products = self.vision_layers * (4 * hidden**2 + 3 * hidden * self.vision_mlp)
        seen = self.full_attention * patches + (self.vision_layers - self.full_attention) * self.window
        merger = (4 * hidden) ** 2 / 4 + 4 * hidden * self.hidden / 4
        return patches * (products + 2 * seen * hidden + merger)

    def layer(self, tokens: int) -> float:
        """Multiply-adds of one decoder layer."""
        products = 2 * self.hidden**2 + 2 * self.hidden * self.keys + 3 * self.hidden * self.mlp
        return tokens * (products + 2 * tokens * self.hidden)

    def last_layer(self, tokens: int) -> float:
        """Multiply-adds of the last layer where one token is looked at."""
        return tokens * 2 * self.hidden * self.keys


def bound(sizes: Sizes, n_masks: int, per_picture: int, patches: int, text: int) -> tuple[float, float]:
    """The vision tower's share of a plain run, and how much faster one forward for all masks can be at most.

    Args:
        sizes: the model.
        n_masks: masks, all of which touch the first layer.
        per_picture: questions about each picture.
        patches: of a picture; four make a token.
        text: tokens of the text; those of the system prompt, before the picture, are counted with the picture.
    """
    shared, tokens = patches // 4, patches // 4 + text
    vision = sizes.vision(patches)
    plain = vision + sizes.layers * sizes.layer(tokens)
    # Per question: the picture's part of a layer, and its own text's.
    packed = sizes.layer(tokens) * (shared / per_picture + text) / tokens
    last = sizes.last_layer(tokens) * (shared / per_picture + text) / tokens
    once = vision / per_picture + sizes.layers * packed
    masks = n_masks * ((sizes.layers - 2) * packed + last)
    return vision / plain, n_masks * plain / (once + masks)


def proportions() -> None:
    """Print what the 7B model's widths imply."""
    sizes, patches = Sizes(), (1036 // 14) * (756 // 14)  # 1024 x 768 in multiples of 28
    print(f"Qwen2.5-VL-7B, a picture of 1024 x 768: {patches:,} patches, {patches // 4} tokens, and 75 tokens of text")
    for per_picture in (1, 2):
        share, fastest = bound(sizes, 25, per_picture, patches, 75)
        print(
            f"  vision {share:.0%} of a plain run; 25 masks in one forward, {per_picture} question(s) a picture: at "
            f"most {fastest:.2f} times faster if each touches the first layer"
        )


def questions(n: int, per_picture: int, height: int, width: int) -> vn.QuestionSet:
    """Short questions about pictures of random colours, some about each."""
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for _ in range(-(-n // per_picture))
    ]
    return vn.QuestionSet(
        [
            vn.Question(
                pictures[k // per_picture],
                ("What is it?", "Where is it?", "Who made it?")[k % 3],
                ("Tea", "Rice", "Bread", "Soup"),
                k % 4,
                "ABCDE"[k % 5],
                id=f"q{k}",
            )
            for k in range(n)
        ],
        prompt=lambda item, options: item.question,
    )


def masks_of(model: vn.VLM, asked: vn.QuestionSet, fraction: float, n_masks: int) -> list[vn.Ablation]:
    """The masks that selectors give."""
    stats = vn.record(model, asked, condition="all", progress=False)
    selectors = [vn.CAS(fraction), vn.MAD(fraction), vn.LAP(fraction), vn.LAPE(fraction), vn.RandomNeurons(fraction)]
    sets = [neurons for selector in selectors for neurons in selector.select(stats).values()]
    step = len(sets) / n_masks
    return [vn.Ablation(model, sets[int(k * step)]) for k in range(n_masks)]


def vision_share(model: vn.VLM, batch: Any, device: torch.device) -> float:
    """CPU time of the picture's features over that of the forward."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    picture = {name: batch[name] for name in names if name in batch}
    pairs = measure.paired(
        lambda: model.hf(**batch, use_cache=False, logits_to_keep=1),
        {"vision": lambda: model.hf.model.get_image_features(**picture)},
        5,
        device,
        warm=1,
    )["vision"]
    return statistics.median(vision / whole for whole, vision in pairs)


def expected(vision: float, pictures: float, packed: float, starts: list[int], n_layers: int, last: float) -> float:
    """How much faster one forward for all masks is, if a token takes the same time in every pass.

    Args:
        vision: the vision tower's share of a plain run.
        pictures: how many pictures are computed, over how many the batch's rows show.
        packed: how many tokens are computed, over how many the batch has.
        starts: for each mask the layer that it first touches; the number of layers where it touches none.
        n_layers: layers of the decoder.
        last: the part of the last layer that is computed of tokens that nobody looks at.
    """
    layer = (1 - vision) * packed / n_layers
    once = vision * pictures + n_layers * layer
    masks = sum(layer * (n_layers - start - 2 + last) for start in starts if start < n_layers - 1)
    return len(starts) / (once + masks)


def header() -> None:
    """Print the columns' names."""
    print(
        f"{'model':<28} {'masks':>5} {'vision':>7} {'packed':>7} {'begin':>6} {'loop ms':>8} {'shared ms':>9} "
        f"{'expected':>9} {'faster':>7} {'range':>11} {'control':>11} {'apart':>8} {'differ':>7}"
    )


def compare(
    name: str, model: vn.VLM, asked: vn.QuestionSet, ablations: list[vn.Ablation], rounds: int, device: Any
) -> None:
    """Print one line."""
    reader = reader_of(asked.answer)
    encoded = reader.encode(model, asked)

    wanted = reader.wants(encoded)
    last = torch.tensor(sorted({place for row in wanted.positions for place in row}), device=device)

    def loop() -> None:
        for ablation in ablations:
            with ablation:
                model.hf(**wanted.batch, use_cache=False, logits_to_keep=last)

    def one_by_one() -> list[Any]:
        readings = []
        for ablation in ablations:
            with ablation:
                readings.append(reader.read(model, asked, encoded))
        return readings

    def shared() -> list[Any]:
        return list(read_masked(model, reader, asked, encoded, ablations))

    pairs = list(zip(one_by_one(), shared(), strict=True))
    apart = max(float((a.margins(asked) - b.margins(asked)).abs().max()) for a, b in pairs)
    differ = sum(x != y for a, b in pairs for x, y in zip(a.chosen, b.chosen, strict=True))
    times = measure.paired(loop, {"loop": loop, "shared": shared}, rounds, device, warm=0)
    control = [one / other for one, other in times["loop"]]
    faster = [one / other for one, other in times["shared"]]
    packing = Packing.of(wanted.batch, wanted.positions)
    packed = 1.0 if packing is None else packing.row.numel() / wanted.batch["input_ids"].numel()
    structure, (tower, shown) = structure_for(model, asked), (model.towers["language"], wanted.batch.pictures)
    n_layers = len(tower.layer_paths)
    starts = [min((site.layer for site in one.edits), default=n_layers) for one in ablations]
    weights = [
        sum(value.numel() for module in modules for value in module.parameters())
        for modules in ([structure.chain[-1]], structure.narrow)
    ]
    vision = vision_share(model, wanted.batch, device)
    pictures = 1.0 if shown is None else len(set(shown)) / len(shown)
    guess = expected(vision, pictures, packed, starts, n_layers, 1 - weights[1] / weights[0])
    loop_ms, shared_ms = (1e3 * statistics.median(column) for column in zip(*times["shared"], strict=True))
    print(
        f"{name:<28} {len(ablations):>5} {vision:>7.0%} {packed:>7.0%} {statistics.mean(starts):>6.1f} "
        f"{loop_ms:>8.0f} {shared_ms:>9.0f} {guess:>9.2f} {statistics.median(faster):>7.2f} "
        f"{f'{min(faster):.2f}–{max(faster):.2f}':>11} {f'{min(control):.2f}–{max(control):.2f}':>11} {apart:>8.0e} "
        f"{differ:>7}",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--masks", type=int, default=25)
    parser.add_argument("--models", nargs="+", default=["demo", "one", "two"], choices=["demo", "one", "two"])
    parser.add_argument("--device")
    options = parser.parse_args()
    device = measure.device_of(options.device)
    print(measure.about(device))
    proportions()
    print(f"batches of {options.batch} questions; {options.rounds} paired rounds")
    header()
    with torch.inference_mode():
        if "demo" in options.models:
            demo, asked = vn.load_demo()
            demo.hf.to(device)
            few = vn.QuestionSet(
                [item for group in asked.groups for item in [one for one in asked if one.group == group][:8]],
                answer=asked.answer,
            )
            batch = next(batches(asked, options.batch))
            ablations = masks_of(demo, few, 0.01, options.masks)
            compare("demo", demo, batch, ablations, options.rounds, device)
        kinds = [kind for kind in ("one", "two") if kind in options.models]
        if kinds:
            hf, processor = measure.qwen(
                28,
                224,
                1184,
                {"hidden_size": 80, "intermediate_size": 214, "depth": 12, "num_heads": 4},
                longest=120 * 128,
                heads=7,
                shared_heads=1,
            )
            model = vn.VLM(hf.to(device), processor)
            ablations = masks_of(model, questions(10, 2, 120, 128), 0.01, options.masks)
            for kind in kinds:
                per_picture = {"one": 1, "two": 2}[kind]
                asked = questions(options.batch, per_picture, 120, 128)
                name = f"Qwen2.5-VL / 16, {per_picture} a picture"
                compare(name, model, asked, ablations, options.rounds, device)


if __name__ == "__main__":
    main()
