"""A selector from a paper as one's own: the entropy rule with a weight on how strong the strongest group is.

    python examples/entropy_rule.py

"Entropy with lambda" (arXiv 2505.21505): of a neuron's probabilities P over G groups, the entropy of their shares over
log G, less lambda times max P over the norm of P; the lower, the more particular, to the group of max P. The paper
searches lambda; with 0 the rule ranks as LAPE does.
"""

import math
from typing import Any

import torch
from torch import Tensor

import vlmneurons as vn


class EntropyRule(vn.Selector):
    """Neurons of low entropy and a dominant group: ``-(H / log G - weight * max P / |P|)``, for that group alone."""

    contrastive = True

    def __init__(self, fraction: float | None = None, *, weight: float = 0.5, **shared: Any) -> None:
        super().__init__(fraction, **shared)
        self.weight = weight

    def score(self, stats: vn.ActivationStatistics) -> Tensor:
        """``[group, neuron]``, higher is selected first; a neuron that never fires, or fires most elsewhere, never."""
        p = stats.probability
        shares = p / p.sum(0).clamp(min=1e-300)
        entropy = -torch.special.xlogy(shares, shares).sum(0) / math.log(len(p))
        rule = self.weight * p.amax(0) / p.norm(dim=0).clamp(min=1e-300) - entropy
        return torch.where((p == p.amax(0)) & (p > 0), rule, -torch.inf)


def main(size: int = 12) -> vn.Selection:
    """Check the rule against the contract, and find the organism's planted neurons with it."""
    vn.testing.check_selector(EntropyRule)
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    stats = vn.record(model, questions.balanced(size, seed=0), condition="all", batch_size=64, progress=False)
    truth, found = vn.demo_truth(), EntropyRule(weight=0.5, fraction=0.02).select(stats)
    print(f"{sum(len(found[group] & truth[group]) for group in truth)} of {sum(map(len, truth.values()))} planted")
    return found


if __name__ == "__main__":
    main()
