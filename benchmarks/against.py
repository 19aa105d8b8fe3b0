"""CPU time of recording, ablation and many masks, here and in another checkout, such as one of an older commit.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before

Each checkout runs in a process of its own, with the same interpreter, packages, weights and questions, through public
names alone; a second process of this checkout is the control. Each round asks the three processes in an order of its
own, one after the other. Processes differ by some percent for as long as they live (where their memory lies, which core
they are on), so each session starts new ones.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent


def jobs() -> dict[str, Callable[[], Any]]:
    """What is timed, on a LLaVA-NeXT of 8 layers, or the demo for many masks."""
    import measure
    import torch

    import vlmneurons as vn

    torch.set_num_threads(1)
    hf, processor = measure.llava()
    model = vn.VLM(hf, processor)
    asked = measure.questions(8)
    inputs = {**model.prepare(asked), "use_cache": False, "logits_to_keep": 1}
    space = model.space()
    chosen = torch.randperm(len(space), generator=torch.Generator().manual_seed(0))[: len(space) // 200]
    neurons = vn.NeuronSet(space, chosen.sort().values)
    recorder, ablation = vn.Recorder(model, space), vn.Ablation(model, neurons)
    demo, questions = vn.load_demo()
    questions = vn.QuestionSet(list(questions)[::20], answer=questions.answer)
    size = len(demo.space())
    masks = {
        f"set {k}": vn.NeuronSet(demo.space(), torch.randperm(size)[: size // 100].sort().values) for k in range(25)
    }

    def within(context: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(), context:
                model.hf(**inputs)

        return run

    def plain() -> None:
        with torch.inference_mode():
            model.hf(**inputs)

    return {
        "plain forward": plain,
        "Recorder": within(recorder),
        "zero ablation": within(ablation),
        "record, 40 questions": lambda: vn.record(model, measure.questions(40), condition="all", progress=False),
        "knockout, 25 masks": lambda: vn.knockout(demo, questions, masks, progress=False),
    }


def serve() -> None:
    """Time the jobs that are named on standard input."""
    known = jobs()
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        known[line.strip()]()
        print(json.dumps(time.process_time() - start), flush=True)


class Checkout:
    """A process that runs the jobs with the library of one checkout."""

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join([str(root / "src"), str(root / "benchmarks")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = self.said()

    def said(self) -> Any:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended with status {self.process.wait()}")
        return json.loads(line)

    def seconds(self, name: str) -> float:
        """CPU seconds that a job takes there."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self.said()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="in each session, after one to warm up")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    import measure
    import torch

    print(measure.about(torch.device("cpu")))
    taken: dict[str, dict[str, list[float]]] = {}
    generator = random.Random(0)
    for _ in range(given.sessions):
        roots = [("before", given.other.resolve()), ("now", HERE), ("control", HERE)]
        generator.shuffle(roots)
        checkouts = {name: Checkout(root) for name, root in roots}
        for number in range(-1, given.rounds):
            for job in checkouts["now"].names:
                order = list(checkouts)
                generator.shuffle(order)
                for name in order:
                    seconds = checkouts[name].seconds(job)
                    if number >= 0:
                        taken.setdefault(job, {}).setdefault(name, []).append(seconds)
        for checkout in checkouts.values():
            checkout.process.kill()
            checkout.process.wait()
    print(f"{given.sessions} sessions of {given.rounds} rounds; ratios of one round, median and quartiles")
    print(
        f"{'job':<24} {'before ms':>10} {'now / before':>13} {'quartiles':>15} {'control / now':>14} {'quartiles':>15}"
    )
    for job, times in taken.items():
        line = f"{job:<24} {1e3 * statistics.median(times['before']):>10.1f}"
        for above, below in (("now", "before"), ("control", "now")):
            low, middle, high = statistics.quantiles(
                [one / other for one, other in zip(times[above], times[below], strict=True)], n=4
            )
            line += f" {middle:>13.3f} {f'{low:.3f}–{high:.3f}':>15}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
