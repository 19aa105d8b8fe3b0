"""One neuron's page: the questions at which it is highest, word by word, and where in the picture it fires.

python examples/inspect_neuron.py [--out out/inspect] [--questions 10]
"""

import argparse
from pathlib import Path

import torch

import vlmneurons as vn


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/inspect"), help="folder for the page and the picture")
    parser.add_argument("--questions", type=int, default=10, help="questions of each culture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, questions = vn.load_demo("organism")
    truth = vn.demo_truth()
    site, number = truth.space.locate(int(truth["Egypt"].indices[0]))
    shown = questions.filter(group={"Egypt", "Japan", "France"}).balanced(arguments.questions, seed=0)
    view = vn.inspect_neuron(model, shown, (site, number), k=2, batch_size=64)

    arguments.out.mkdir(parents=True, exist_ok=True)
    view.save(arguments.out / "neuron.html")
    view.save(arguments.out / "neuron.png")
    print(view.table()[["group", "value", "question", "top"]].to_string(index=False, float_format="{:+.3f}".format))
    print(f"planted for Egypt; mean over all questions: {view.mean}")
    print(f"The page is {arguments.out / 'neuron.html'}")


if __name__ == "__main__":
    main()
