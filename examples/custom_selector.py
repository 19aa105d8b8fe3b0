"""A selector of one's own: written, checked against the contract, and compared with CAS at the same budget.

python examples/custom_selector.py [--questions 20]
"""

import argparse

import torch
from torch import Tensor

import vlmneurons as vn


class WorstRival(vn.Selector):
    """By how many standard errors a neuron fires more often for a group than for its strongest rival.

    The margin of CAS, over the error of a difference of two proportions: a margin counts for more where more tokens
    were seen. (Tokens of one picture are not independent, so this is a ranking, not a test.)
    """

    contrastive = True

    def score(self, stats: vn.ActivationStatistics) -> Tensor:
        """``[group, neuron]``, higher is selected first; 0 or less is never selected."""
        p, n = stats.probability, stats.tokens.to(torch.float64)[:, None]
        error = (p * (1 - p) / n).clamp(min=1e-12)
        score = torch.full_like(p, torch.inf)
        for rival in range(len(p)):
            margin = (p - p[rival]) / (error + error[rival]).sqrt()
            margin[rival] = torch.inf
            score = torch.minimum(score, margin)
        return torch.where(score > 0, score, -torch.inf)


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=20, help="questions of each culture")
    size = parser.parse_args().questions

    vn.testing.check_selector(WorstRival)
    print("WorstRival meets the contract of a selector")

    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    identify, _ = questions.split(0.5, seed=0)
    stats = vn.record(model, identify.balanced(size, seed=0), condition="all", batch_size=64, progress=False)
    truth = vn.demo_truth()
    for selector in (vn.CAS(count=12), WorstRival(count=12), vn.RandomNeurons(count=12)):
        selection = selector.select(stats)
        found = sum(len(selection[group] & truth[group]) for group in truth)
        print(f"{selector!r}: {found} of the {sum(map(len, truth.values()))} planted neurons")


if __name__ == "__main__":
    main()
