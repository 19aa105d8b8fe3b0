"""How a user's type checker sees the public names: checked by pyright (``pyright``, set up in pyproject.toml), not run.

Names of the package are loaded when they are first used; a type checker must see them all the same, with their types,
and must see a typing mistake.
"""

from pathlib import Path

import pandas as pd
from torch import Tensor
from typing_extensions import assert_type

import vlmneurons as vn


class Rare(vn.Selector):
    """A selector of one's own."""

    def score(self, stats: vn.ActivationStatistics) -> Tensor:
        """``[group, neuron]``."""
        return -stats.probability


def study(folder: Path) -> pd.DataFrame:
    """A whole study, every step with its type."""
    model, questions = vn.load_demo()
    assert_type(model, vn.VLM)
    assert_type(questions, vn.QuestionSet)
    identify, evaluate = questions.split(0.5, seed=0)
    assert_type(identify, vn.QuestionSet)

    stats = vn.record(model, identify, condition="correct", batch_size=8)
    assert_type(stats, vn.ActivationStatistics)
    assert_type(stats.groups, tuple[str, ...])
    assert_type(stats + stats, vn.ActivationStatistics)
    items = vn.record_items(model, identify, folder)
    assert_type(items, vn.ItemStatistics)
    assert_type(items.group_by("group"), vn.ActivationStatistics)

    selection = vn.CAS(fraction=0.01).select(stats)
    assert_type(selection, vn.Selection)
    assert_type(selection["Egypt"], vn.NeuronSet)
    assert_type(selection["Egypt"] & ~selection["Japan"], vn.NeuronSet)
    assert_type(selection.overlap(), pd.DataFrame)
    assert_type((vn.CAS(0.01) & vn.MAD(0.01)) - vn.LAPE(0.01), vn.Selector)
    assert_type(vn.CAS().zscore() * 0.7 + vn.MAD().zscore() * 0.3, vn.Selector)
    assert_type(vn.NeuronSet.load(folder / "neurons.safetensors"), vn.NeuronSet)
    assert_type(vn.Selection.load(str(folder)), vn.Selection)

    result = vn.knockout(model, evaluate, {"CAS": selection, "rare": Rare(0.01).select(stats)})
    assert_type(result, vn.KnockoutResult)
    with vn.Ablation(model, selection["Egypt"], "scale", factor=1.5):
        model.generate(**model.prepare(evaluate[0]), max_new_tokens=3)
    try:
        vn.testing.check_selector(Rare)
    except vn.testing.ContractError as error:
        raise vn.errors.SelectionError("no selector") from error
    print(vn.nonsense)  # pyright: ignore[reportAttributeAccessIssue]  (that this is needed is checked, too)
    return result.summary()
