"""Modality neurons: those that fire at the tokens of the picture, or of the text, of the same questions.

    python examples/modality_neurons.py

The groups are the kinds of tokens, not of questions (MINER, Huang et al. 2024, arXiv 2410.04819), and both are counted
in one pass. Their neurons are then switched off for everybody.
"""

import pandas as pd
import torch

import vlmneurons as vn


def main(size: int = 8) -> pd.DataFrame:
    """How many neurons of each layer are of each kind, and the change of the margin (nats) without them."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo()
    identify, evaluate = questions.balanced(size, seed=0).split(0.5, seed=0)
    kinds = {"picture": "image", "text": "text"}
    stats = vn.record(model, identify, condition="all", tokens=kinds, batch_size=32, progress=False)
    selection = vn.CAS(0.05).select(stats)
    result = vn.knockout(model, evaluate, dict(selection.items()), batch_size=32, progress=False)
    change = {name: result.matrix(name, value="margin").mean(axis=None) for name in selection}
    return selection.table().assign(change=pd.Series(change))


if __name__ == "__main__":
    print(main().to_string())
