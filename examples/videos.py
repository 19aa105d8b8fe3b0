"""The same study of videos: which neurons answer for what changes over time, and for nothing that one frame shows?

    python examples/videos.py

Needs no network, no decoder of video files and no GPU, and takes seconds. The model is a small Qwen2.5-VL that answers
through five planted neurons for each of three events: all colours fade, or red grows while the others fade, or green
does. As a control each video is replaced by its second frame, shown four times.
"""

import argparse
from dataclasses import replace

import torch

import vlmneurons as vn
from vlmneurons.testing import plant_neurons

EVENTS = ("Dusk", "Ember", "Leaf")


def main() -> None:
    """Command line: see the head of this file."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    planted = plant_neurons(medium="video", groups=EVENTS, n_questions=16)
    model, truth, questions = planted.model, planted.truth, planted.questions
    (frames,) = questions[0].load_videos()
    print(f"{model!r}\n{questions!r}\na video: {frames.shape} {frames.dtype}, mean by frame {frames.mean((1, 2, 3))}")

    identify, evaluate = questions.split(0.5, seed=0)  # no video on both sides
    how = {"batch_size": 16, "progress": False}
    stats = vn.record(model, identify, condition="correct", tokens="video", **how)
    cas = vn.CAS(count=5).select(stats)
    random = [vn.LayerMatchedRandom(cas, seed=seed).select(stats) for seed in range(3)]
    print(
        f"CAS found {sum(len(cas[group] & truth[group]) for group in truth)} of {sum(map(len, truth.values()))} planted"
    )

    result = vn.knockout(model, evaluate, {"CAS": cas, "random": random}, **how)
    summary = result.summary()
    shown = ["selector", "group", "n", "clean", "self_effect", "cross_effect"]
    print(summary[shown].to_string(index=False, float_format="{:+.2f}".format))

    # As many frames, all alike: what a question's answer owes to change, and to nothing that one frame shows.
    still = vn.QuestionSet(
        [replace(item, video=item.video[1:2].repeat(len(item.video), 0)) for item in evaluate], answer="text"
    )
    clean = vn.knockout(model, still, {"none": vn.NeuronSet.empty(truth.space)}, **how)
    print(f"right of stills: {sum(clean.accuracy.values()) / len(clean.accuracy):.2f} (chance 0.33) {clean.accuracy}")


if __name__ == "__main__":
    main()
