"""Masking two towers, apart and together: neurons of a domain in the vision tower, in the decoder, and in both.

    python examples/two_towers.py

The experiment of MMNeuron (Huo et al. 2024, arXiv 2406.11193): neurons that fire for one domain only, by the entropy of
their activation probabilities, are found in each tower and switched off. Counts of both towers come from one pass.
"""

import pandas as pd
import torch

import vlmneurons as vn


def main(size: int = 4) -> pd.DataFrame:
    """Change of each domain's margin (nats) without its own neurons of the vision tower, of the decoder, of both."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo()
    identify, evaluate = questions.group_by("category").at_least(4 * size).balanced(4 * size).split(0.5, seed=0)
    space = vn.NeuronSpace.join(model.space("language", "gate"), model.space("vision", "gate"))
    stats = vn.record(model, identify, space, condition="all", batch_size=32, progress=False)
    towers = {tower: vn.NeuronSet(space, space.restrict(towers=[tower])) for tower in space.towers}
    masks = {tower: vn.LAPE(0.05, exclude=~own).select(stats) for tower, own in towers.items()}
    masks["both"] = masks["language"] | masks["vision"]
    result = vn.knockout(model, evaluate, masks, batch_size=32, progress=False)
    table = result.table()
    return table[table["mask"] == table["group"]].pivot(index="selector", columns="group", values="margin")


if __name__ == "__main__":
    print(main().to_string(float_format="{:+.2f}".format))
