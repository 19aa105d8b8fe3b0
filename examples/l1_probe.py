"""A sparse probe as a selector: the neurons whose contributions tell wrong answers from right ones (H-neurons).

    python examples/l1_probe.py

A neuron's contribution at a token is how much of its MLP's output it writes, ``|z| * |W_down[:, n]| / |h|``
(arXiv 2512.01797). Its mean over each question is kept beside the counts by a function of one's own, and a logistic
regression with an L1 penalty on the standardised contributions says which neurons matter: those of positive weight.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor

import vlmneurons as vn


class L1Probe(vn.Selector[vn.GroupedItems]):
    """Positive weights of a logistic regression, a group against the others, by proximal gradient descent."""

    contrastive = True

    def __init__(
        self, fraction: float | None = None, *, penalty: float = 0.02, steps: int = 300, **shared: Any
    ) -> None:
        super().__init__(fraction, **shared)
        self.penalty, self.steps = penalty, steps

    def score(self, items: vn.GroupedItems) -> Tensor:
        """``[group, neuron]`` weights above zero; others are never selected."""
        x = torch.from_numpy(items.values("contribution", slice(0, len(items.space))))
        x = torch.nn.functional.pad((x - x.mean(0)) / x.std(0).clamp(min=1e-12), (0, 1), value=1.0)  # and an intercept
        step = 4 * len(x) / torch.linalg.matrix_norm(x, 2) ** 2
        y = torch.stack([torch.from_numpy(items.owner == group) for group in range(len(items.groups))], 1).double()
        weight = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
        for _ in range(self.steps):
            weight = weight - step * x.T @ (torch.sigmoid(x @ weight) - y) / len(x)
            weight[:-1] = torch.nn.functional.softshrink(weight[:-1], float(self.penalty * step))
        return torch.where(weight[:-1] > 0, weight[:-1], -torch.inf).T


def main(size: int = 12) -> vn.Selection:
    """Neurons of wrong and of right answers, of the demo's decoder."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo()

    def contribution(values: Tensor, counted: Tensor, site: vn.Site) -> Tensor:
        down = model.hf.model.language_model.layers[site.layer].mlp.down_proj
        share = values.abs() * down.weight.norm(dim=0) / down(values).norm(dim=-1, keepdim=True)
        return (share * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)

    with tempfile.TemporaryDirectory() as folder:
        how = {"statistic": {"contribution": contribution}, "batch_size": 32, "progress": False}
        items = vn.record_items(model, questions.balanced(size, seed=0), folder, model.space("language", "post"), **how)
        answered = items.grouped(lambda row: "right" if row["correct"] else "wrong", condition="all")
        found = L1Probe(0.02).select(answered)
    print(found)
    return found


if __name__ == "__main__":
    main()
