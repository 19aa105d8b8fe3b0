"""The command line: ``python -m vlmneurons study|record|select|report``, each thin over one public function.

Made for batch systems: progress and log go to standard error, results to files and standard output, and the exit
status is 0 if all is well, 1 for an error of the data, the model or the settings, which is told in one line. A run that
is told to end (SIGTERM, as SLURM sends it, or ctrl-C) says so and gives 143 or 130; its folder can be gone on with.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlmneurons.errors import VLMNeuronsError
from vlmneurons.files.stopping import Stopped, stopped_by_signals
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.cvqa import LANGUAGES, load_cvqa
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.recording.items import record_items
from vlmneurons.statistics.items import ItemStatistics
from vlmneurons.study.protocol import SELECTORS, Protocol, run_study
from vlmneurons.study.result import KnockoutResult

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if given.verbose else logging.INFO, format="%(asctime)s %(name)s: %(message)s"
    )
    for name in ("matplotlib", "PIL", "httpx", "urllib3", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return exit_status(lambda: given.run(given))


def exit_status(work: Callable[[], None]) -> int:
    """Do some work, and give the exit status of a program that did it: what went wrong is told in one line.

    Example:
        ``raise SystemExit(exit_status(main))`` at the end of a script that a batch system runs.
    """
    try:
        with stopped_by_signals():
            work()
    except VLMNeuronsError as error:
        log.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    except Stopped as stop:
        log.debug("where it happened", exc_info=True)
        sys.stderr.write(f"\nstopped by {stop}: what is finished is kept; the same command goes on from there\n")
        return 128 + stop.signal
    return 0


def open_model(
    name: str, *, revision: str | None = None, dtype: str | None = None, device_map: str | None = None
) -> VLM:
    """A model by its name on the Hub, its folder, or ``"demo"`` and ``"demo:organism"`` for the embedded ones.

    Where several processes share a machine's GPUs, each takes its own, unless ``device_map`` says otherwise.
    """
    if name.partition(":")[0] == "demo" and not os.path.isdir(name):
        from vlmneurons.demo import load_demo

        return load_demo(name.partition(":")[2] or "natural")[0]
    import torch

    how: dict[str, Any] = {"dtype": dtype or "auto"}
    if device_map is not None:
        how["device_map"] = device_map
    elif torch.cuda.is_available():
        how["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))} if _processes() > 1 else "auto"
    return VLM.from_pretrained(name, revision=revision, **how)


def open_questions(source: str, **how: Any) -> QuestionSet:
    """Questions by where they are: the demo's, a folder with a table (`QuestionSet.from_folder`), or `load_cvqa`.

    Args:
        source: ``"demo"``; a folder that holds a ``.csv``, ``.tsv`` or ``.jsonl`` table; or what `load_cvqa` takes.
        **how: further arguments of `load_cvqa`; those that choose groups are applied to the other sources as well.
    """
    if source.partition(":")[0] == "demo" and not os.path.exists(source):
        from vlmneurons.demo import load_demo

        questions = load_demo(source.partition(":")[2] or "natural")[1]
    elif os.path.isdir(source) and any(path.suffix in (".csv", ".tsv", ".jsonl") for path in Path(source).iterdir()):
        questions = QuestionSet.from_folder(source)
    else:
        return load_cvqa(source, **how)
    if how.get("group_by") not in (None, "country", "group"):
        questions = questions.group_by(how["group_by"])
    questions = questions.at_least(how.get("min_items", 1))
    per_group = how.get("per_group")
    return questions if per_group is None else questions.balanced(per_group, seed=how.get("seed", 0))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


# -- the commands ------------------------------------------------------------------------------------------------------


def _study(given: argparse.Namespace) -> None:
    settings = {
        name.name: getattr(given, name.name) for name in fields(Protocol) if getattr(given, name.name, None) is not None
    }
    protocol = Protocol(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    )
    model, questions = _model(given), _questions(given)
    general = None if given.general is None else open_questions(given.general, group_by=given.general_by)
    Path(given.out).mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) == 0:
        handler = logging.FileHandler(Path(given.out) / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logging.getLogger("vlmneurons").addHandler(handler)
    log.info("%s on %s", model.name, questions)
    study = run_study(
        model,
        questions,
        given.out,
        protocol,
        general=general,
        distributed=_processes() > 1,
        progress=not given.quiet,
        remote=given.remote,
    )
    if study.page is not None:
        summary = study.knockout.summary()
        shown = ["selector", "n", "clean", "self_effect", "cross_effect", "gap", "gap_p", "flips"]
        sys.stdout.write(summary[summary["group"] == "all"][shown].to_string(index=False) + f"\n{study.page}\n")


def _record(given: argparse.Namespace) -> None:
    model, questions = _model(given), _questions(given)
    if given.part != "all":
        first, second = questions.split(given.share or 0.5, seed=given.seed or 0)
        questions = first if given.part == "identify" else second
    if given.answer is not None:
        questions = questions.asked(answer=given.answer)
    items = record_items(
        model,
        questions,
        given.out,
        tokens=given.tokens,
        batch_size=given.batch_size or 8,
        progress=not given.quiet,
        remote=given.remote,
        distributed=_processes() > 1,
    )
    sys.stdout.write(f"{items!r}\n")


def _select(given: argparse.Namespace) -> None:
    items = ItemStatistics.load(given.items)
    if not items.complete:
        raise VLMNeuronsError(f"{given.items} is not recorded to its end: run `record` again to go on with it")
    stats = items.group_by(given.group_by or "group", condition=given.condition)
    selection = SELECTORS[given.selector](given.fraction).select(stats)
    selection.save(given.out)
    sys.stdout.write(f"{selection!r}\n")


def _report(given: argparse.Namespace) -> None:
    run = Path(given.run_folder)
    whole = run / "knockout" if (run / "knockout").is_dir() else run
    others = {
        name: KnockoutResult.load(run / folder)
        for name, folder in (("blind", "blind"), ("options only", "options-only"))
        if (run / folder / "knockout.json").exists()
    }
    page = KnockoutResult.load(whole).report(given.out or run / "report", main=given.main, others=others)
    sys.stdout.write(f"{page}\n")


# -- their arguments ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlmneurons",
        description="Find the neurons of a vision-language model that carry a group of inputs, and switch them off.",
    )
    parser.add_argument("--verbose", action="store_true", help="log everything, and where errors come from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    study = commands.add_parser("study", help="the whole study: record, select, switch off, report")
    _add_model_and_data(study)
    study.add_argument("--out", required=True, help="folder of the run; the same command goes on where it was stopped")
    study.add_argument("--general", help="questions that measure general ability, as for --data")
    study.add_argument("--general-by", help="column that groups them")
    study.add_argument("--selectors", nargs="+", choices=list(SELECTORS))
    study.add_argument("--main", choices=list(SELECTORS), help="the selector that is swept and controlled")
    study.add_argument("--fraction", type=float, help="share of all neurons in each mask")
    study.add_argument("--fractions", type=float, nargs="*", help="shares of the sweep")
    study.add_argument("--alphas", type=float, nargs="*", help="strengths of the sweep")
    study.add_argument("--sizes", type=int, nargs="*", help="numbers of identification questions of the sweep")
    study.add_argument("--conditions", nargs="*", help="other identification conditions: all, wrong")
    study.add_argument("--repeats", type=int, help="random masks of each kind")
    study.add_argument("--permutations", type=int, help="label shuffles of the selection's null; 0 for none")
    study.add_argument("--minimum", type=int, help="identification questions a group must have")
    study.add_argument("--on-error", choices=["raise", "skip"])
    _add_asking(study)
    study.set_defaults(run=_study)

    record = commands.add_parser("record", help="count how often neurons fire, question by question")
    _add_model_and_data(record)
    record.add_argument("--out", required=True, help="folder of the recording")
    record.add_argument("--part", choices=["all", "identify", "evaluate"], default="all")
    _add_asking(record)
    record.set_defaults(run=_record)

    select = commands.add_parser("select", help="choose neurons from a recording")
    select.add_argument("--items", required=True, help="folder that `record` wrote")
    select.add_argument("--selector", choices=list(SELECTORS), default="CAS")
    select.add_argument("--fraction", type=float, default=0.005)
    select.add_argument("--condition", choices=["correct", "wrong", "all"], default="correct")
    select.add_argument("--group-by", help="a column of the recording")
    select.add_argument("--out", required=True, help="file of the selection (.safetensors)")
    select.set_defaults(run=_select)

    report = commands.add_parser("report", help="write a run's report again")
    report.add_argument("--run", dest="run_folder", required=True, help="folder of a study or of a knockout")
    report.add_argument("--main", help="the selector that per-group figures are of")
    report.add_argument("--out", help="folder of the report (default: report/ in the run)")
    report.set_defaults(run=_report)
    return parser


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="name on the Hub, folder, demo or demo:organism")
    parser.add_argument("--revision", help="of the model")
    parser.add_argument("--dtype", help="of the weights (default: as they are stored)")
    parser.add_argument("--device-map", help="where the weights go (default: the GPUs, if there are any)")
    parser.add_argument(
        "--remote",
        nargs="?",
        const=True,
        default=False,
        help="run the model elsewhere by nnsight: on its own host, that of a URL, or local for a simulation",
    )
    parser.add_argument("--data", required=True, help="demo, a folder with a table, or CVQA: Hub name, file or folder")
    parser.add_argument("--data-revision", help="of a dataset on the Hub")
    parser.add_argument("--language", choices=list(LANGUAGES), default="english")
    parser.add_argument("--group-by", default="country", help="country, subset, category, or any column")
    parser.add_argument("--min-items", type=int, default=1, help="leave out groups with fewer questions")
    parser.add_argument("--per-group", type=int, help="questions of every group, sampled by the seed")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answer", choices=["letters", "generate", "text"], help="how answers are read")
    parser.add_argument("--tokens", choices=["content", "image", "text", "last"], default="content")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--share", type=float, help="share of the questions that neurons are identified on")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _model(given: argparse.Namespace) -> VLM:
    if given.remote not in (False, "local"):
        return VLM.from_pretrained(given.model, revision=given.revision, weights=False)
    return open_model(given.model, revision=given.revision, dtype=given.dtype, device_map=given.device_map)


def _questions(given: argparse.Namespace) -> QuestionSet:
    how: dict[str, Any] = {
        "group_by": given.group_by,
        "min_items": given.min_items,
        "per_group": given.per_group,
        "seed": given.seed or 0,
        "on_error": getattr(given, "on_error", None) or "raise",
    }
    return open_questions(given.data, language=given.language, revision=given.data_revision, **how)
