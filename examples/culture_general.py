"""Culture-general neurons: those that move the answers to questions about any culture, and not those to others.

    python examples/culture_general.py

After CULNIG (ICLR 2026): the attribution of a neuron is the highest over tokens of its value times the gradient, at
``pre``; from a culture's is taken that of a control data set. The authors' factor, the probability of the right answer,
is left out. Neurons of one culture are then those of ``Attribution(others=True)``, culture-general ones those of all
cultures together. The control here is questions about pictures that belong to no culture.
"""

import torch

import vlmneurons as vn


def main(size: int = 4) -> vn.Selection:
    """Neurons of each culture, and of culture in general, less those of the control."""
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    control = questions.filter(category={"nature", "sport"}).group_by(lambda item: "any")
    culture = questions.filter(category={"flag", "map", "place"}).balanced(size, seed=0)
    space = model.space("language", "pre")
    how = {"reduce": "max", "condition": "all", "progress": False}
    less = vn.attribute(model, control.balanced(4 * size, seed=0), space, **how)
    each = vn.attribute(model, culture, space, **how) - less
    general = vn.attribute(model, culture.group_by(lambda item: "general"), space, **how) - less
    found = {**vn.Attribution(0.02, others=True).select(each), **vn.Attribution(0.02).select(general)}
    return vn.Selection(found)


if __name__ == "__main__":
    print(main())
