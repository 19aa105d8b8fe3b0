"""Neurons of the vision tower: counted over patches, selected and switched off like those of the decoder.

    python examples/vision_neurons.py [--questions 12]

A vision tower sees no words, so its neurons are of what the *pictures* of a group look like: a weak reading of
"culture", and a control for claims about the decoder.
"""

import argparse

import torch

import vlmneurons as vn


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=12, help="questions of each culture")
    size = parser.parse_args().questions
    torch.set_num_threads(1)
    model, questions = vn.load_demo()
    identify, evaluate = questions.split(0.5, seed=0)
    space = model.space("vision", "post")  # CLIP's MLPs have no gate of their own: post is what they compute
    how = {"tokens": "image", "condition": "all", "batch_size": 64, "progress": False}
    stats = vn.record(model, identify.balanced(size, seed=0), space, **how)
    selection = vn.CAS(0.02).select(stats)
    control = vn.LayerMatchedRandom(selection, seed=0).select(stats)
    print(selection.table().to_string())
    asked = evaluate.balanced(max(size // 4, 2), seed=0)
    result = vn.knockout(model, asked, {"CAS": selection, "random": control}, batch_size=64, progress=False)
    summary = result.summary()
    shown = ["selector", "clean", "self_effect", "cross_effect", "self_margin", "cross_margin"]
    print(summary[summary["group"] == "all"][shown].to_string(index=False, float_format="{:+.3f}".format))


if __name__ == "__main__":
    main()
