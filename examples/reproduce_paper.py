"""The study of "Finding Culture-Sensitive Neurons in Vision-Language Models" (arXiv 2510.24942), redone and extended.

On a GPU node, with a labelled copy of CVQA (the public one keeps its answers secret):

    python examples/reproduce_paper.py --model Qwen/Qwen2.5-VL-7B-Instruct --data cvqa.parquet --out run-qwen
    python examples/reproduce_paper.py --model llava-hf/llava-v1.6-mistral-7b-hf --data cvqa.parquet --out run-llava
    python examples/reproduce_paper.py --model neulab/Pangea-7B-hf --data cvqa.parquet --out run-pangea

On several GPUs, each with the whole model: ``torchrun --nproc-per-node 4 examples/reproduce_paper.py …``. On a laptop,
in minutes: ``python examples/reproduce_paper.py --model demo --data demo --out run-demo``. Runs that were killed, or
told to end (SLURM's SIGTERM), go on where they stopped when the same command is given again.
"""

import argparse
import logging
import os

from vlmneurons.cli import exit_status, open_model, open_questions
from vlmneurons.study.protocol import Protocol, run_study


def main() -> None:
    """Read the arguments, run the study, and print its main table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model on the Hub, a folder, or demo")
    parser.add_argument("--revision", help="commit of the model: name it in your paper")
    parser.add_argument("--data", default="demo", help="a labelled copy of CVQA, a folder with a table, or demo")
    parser.add_argument("--language", default="english", choices=["english", "local"])
    parser.add_argument("--min-items", type=int, default=50, help="cultures with fewer questions are left out")
    parser.add_argument("--per-group", type=int, help="questions of every culture, sampled by the seed")
    parser.add_argument("--general", help="questions that measure general ability")
    parser.add_argument("--out", default="run", help="folder of the run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")

    model = open_model(given.model, revision=given.revision)
    questions = open_questions(
        given.data,
        language=given.language,
        min_items=given.min_items,
        per_group=given.per_group,
        seed=given.seed,
        on_error="skip",
    )
    general = None if given.general is None else open_questions(given.general)

    # The paper: probabilities of correctly answered questions, one mask size for every culture, zero ablation,
    # disjoint questions to identify and to evaluate. The rest (sweeps, random controls, blind questions, tests) is what
    # a reviewer will ask for.
    protocol = Protocol(
        selectors=("LAP", "LAPE", "MAD", "CAS"),
        fraction=0.005,
        fractions=(0.001, 0.002, 0.005, 0.01, 0.02),
        alphas=(-1.0, -0.5, 0.5, 1.0),
        sizes=(5, 10, 25, 50, 100),
        repeats=5,
        on_error="skip",
        batch_size=given.batch_size,
        seed=given.seed,
    )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    study = run_study(model, questions, given.out, protocol, general=general, distributed=several)
    if study.page is not None:
        summary = study.knockout.summary(seed=given.seed)
        main_table = summary[(summary["group"] == "all") & summary["selector"].isin(protocol.selectors)]
        print(main_table[["selector", "clean", "self_effect", "cross_effect", "gap", "gap_p"]].to_string(index=False))
        print(f"report: {study.page}")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
