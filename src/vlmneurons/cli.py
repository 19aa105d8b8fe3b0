"""The command line: ``vlmneurons study|record|select|knockout|join|report|compare|explore|check``, thin over functions.

Made for batch systems: progress and log go to standard error, results to files and standard output. The exit status is
0 if all is well, 1 for an error of the data, the model or the settings, and 2 for a command that is written wrongly;
either is told in a line. What can be refused is refused before the model is loaded. A run that is told to end (SIGTERM,
as SLURM sends it, or ctrl-C) says so and gives 143 or 130; its folder can be gone on with.

A new command is one function, named in the last lines: its parameters are the options, its docstring is the help. What
takes seconds to import is imported within the functions, so that help and refusals come at once.
"""

import dataclasses
import difflib
import functools
import inspect
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import vlmneurons as vn
from vlmneurons.checks import Keywords, as_whole, nearest_name
from vlmneurons.errors import ArchitectureError, FileFormatError, QuestionError, VLMNeuronsError
from vlmneurons.files.atomic import write_json
from vlmneurons.questions.cvqa import LANGUAGES

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
T = TypeVar("T")

SELECTORS = ("LAP", "LAPE", "MAD", "CAS")
STUDIED = (*SELECTORS, "MAD-mean")
TOKENS = ("content", "image", "audio", "video", "text", "last")
CONDITIONS = ("correct", "wrong", "all")

app = typer.Typer(
    help="Find the neurons of a vision-language model that carry a group of inputs, and switch them off.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        return command.main(_joined(given), prog_name="vlmneurons", standalone_mode=False) or 0
    except typer.TyperException as error:
        known = [name for name in given if name in _COMMANDS][:1]
        usage = f" (vlmneurons {' '.join([*known, '--help'])} lists what there is)" if given else ""
        told = re.sub(r" \(Possible options: (.+)\)$", r" Did you mean \1?", error.format_message())
        sys.stderr.write(f"{'error: ' if given else ''}{told}{usage}\n")
        return error.exit_code


def exit_status(work: Callable[[], object]) -> int:
    """Do some work, and give the exit status of a program that did it: what went wrong is told in one line.

    Example:
        ``raise SystemExit(exit_status(main))`` at the end of a script that a batch system runs.
    """
    from vlmneurons.files.stopping import Stopped, stopped_by_signals

    try:
        with stopped_by_signals():
            status = work()
    except (VLMNeuronsError, OSError) as error:
        log.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    except Stopped as stop:
        log.debug("where it happened", exc_info=True)
        sys.stderr.write(f"\nstopped by {stop}: what is finished is kept; the same command goes on from there\n")
        return 128 + stop.signal
    return status if isinstance(status, int) else 0


def open_model(
    name: str, *, revision: str | None = None, dtype: str | None = None, device_map: str | None = None, **vllm: object
) -> "vn.VLM":
    """A model by its name on the Hub, its folder, or ``"demo"`` and ``"demo:organism"`` for the embedded ones.

    Where several processes share a machine's GPUs, each takes its own, unless ``device_map`` says otherwise. With
    ``engine="vllm"`` nothing is loaded here, and further arguments are vLLM's.

    Raises:
        ArchitectureError: there is no such model, or it cannot be loaded so.
    """
    _check_model(name, revision=revision, dtype=dtype, device_map=device_map)
    if _is_demo(name):
        return vn.load_demo(name.partition(":")[2] or "natural")[0]
    import torch

    how: Keywords = {"dtype": dtype or "auto", **vllm}
    if vllm:
        pass  # it finds its own GPUs
    elif device_map is not None:
        how["device_map"] = device_map
    elif torch.cuda.is_available():
        how["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))} if _processes() > 1 else "auto"
    return _loaded(name, lambda: vn.VLM.from_pretrained(name, revision=revision, **how))


def open_questions(source: str, **how: Any) -> "vn.QuestionSet":
    """Questions by where they are: the demo's, a folder with a table (`QuestionSet.from_folder`), or `load_cvqa`.

    Args:
        source: ``"demo"``; a folder that holds a ``.csv``, ``.tsv`` or ``.jsonl`` table; or what `load_cvqa` takes.
        **how: further arguments of `load_cvqa`; those that choose groups are applied to the other sources as well.

    Raises:
        QuestionError: there are no such questions, or they have no such language or revision.
    """
    table = os.path.isdir(source) and any(path.suffix in (".csv", ".tsv", ".jsonl") for path in Path(source).iterdir())
    if not (table or _is_demo(source)):
        if _is_path(source) and not os.path.exists(source):
            raise QuestionError(f"--data {source}: there is no such file or folder")
        return vn.load_cvqa(source, **how)
    if how.get("language", "english") != "english" or how.get("revision") is not None:
        raise QuestionError(f"--data {source} is not CVQA: it has one language and no revision")
    if table:
        questions = vn.QuestionSet.from_folder(source)
    else:
        questions = vn.load_demo(source.partition(":")[2] or "natural")[1]
    if how.get("group_by") not in (None, "country", "group"):
        questions = questions.group_by(how["group_by"])
    questions = questions.at_least(how.get("min_items", 1))
    per_group = how.get("per_group")
    return questions if per_group is None else questions.balanced(per_group, seed=how.get("seed", 0))


def _is_demo(name: str) -> bool:
    return name.partition(":")[0] == "demo" and not os.path.exists(name)


def _is_path(name: str) -> bool:
    """Whether a name can be meant as a path only: those of the Hub have one slash at most and no dot before it."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _check_model(name: str, *, revision: str | None, dtype: str | None, device_map: str | None) -> None:
    """Refuse what can be known without loading anything large."""
    if _is_demo(name):
        given = {"--revision": revision, "--dtype": dtype, "--device-map": device_map}
        unused = [option for option, value in given.items() if value is not None]
        if unused:
            raise ArchitectureError(f"{name} is on the CPU, in float32, and has no revision: leave out {unused[0]}")
    if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ArchitectureError(f"--model {name} exists, but is no folder with a config.json, as save_pretrained makes")
    if _is_path(name) and not os.path.exists(name):
        raise ArchitectureError(f"--model {name}: there is no such folder")
    if dtype not in (None, "auto"):
        import torch

        kinds = [kind for kind, value in vars(torch).items() if getattr(value, "is_floating_point", False) is True]
        if dtype not in kinds:
            raise ArchitectureError(f"--dtype {dtype!r} does not exist{_meant(dtype, kinds)}")


def _loaded(name: str, load: Callable[[], T]) -> T:
    """What transformers loads, or one line on why it does not: anything from a missing file to a missing package."""
    try:
        return load()
    except VLMNeuronsError:
        raise
    except Exception as error:
        raise ArchitectureError(f"{name} cannot be loaded. {type(error).__name__}: {error}") from error


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


# -- values of options -------------------------------------------------------------------------------------------------


def _meant(given: str, names: Iterable[str]) -> str:
    """The end of a message: which of the names is like what was given."""
    like = nearest_name(given, names)
    return f"; did you mean {like}?" if like else ""


def _one_of(*names: str) -> Callable[[str], str]:
    """A value out of several."""

    def read(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is none of {', '.join(names)}{_meant(text, names)}")
        return text

    return read


def _several(read: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """Values with spaces or commas between them, as many as there are: ``--fractions 0.1 0.2``."""

    def split(text: str) -> tuple[object, ...]:
        try:
            return tuple(read(one) for one in re.split(r"[\s,]+", text) if one)
        except ValueError as error:
            raise typer.BadParameter(f"{error} (a list of numbers, such as 1 2)") from error

    return split


def _option(read: Callable[[str], object], shown: str, help: str) -> object:
    return typer.Option(parser=read, metavar=shown, help=help)


def _choice(*names: str, help: str) -> object:
    return _option(_one_of(*names), "|".join(names), help)


def _list(read: Callable[[str], object], shown: str, help: str) -> object:
    return _option(_several(read), f"[{shown} …]", help)


def _where(text: str) -> bool | str:
    """Where a model runs: ``--remote`` alone is nnsight's own host."""
    return text or True


_MANY = ("--selectors", "--fractions", "--alphas", "--sizes", "--conditions", "--remote")
"""The options that take any number of values, also none."""


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments, the values of such options put into one: ``--sizes 1 2`` is ``--sizes=1 2`` to the parser."""
    found: list[str] = []
    many = ""
    for one in arguments:
        if many and not re.match(r"-(?![\d.])", one):
            if many == "--selection":  # whose values are files, with spaces perhaps
                found += ["--selection", one] if found[-1] != "--selection" else [one]
                continue
            found[-1] += f" {one}" if found[-1][-1] != "=" else one
            continue
        many = one if one in (*_MANY, "--selection") else ""
        found.append(f"{one}=" if one in _MANY else one)
    return found


# -- the commands ------------------------------------------------------------------------------------------------------

_COMMANDS: list[str] = []


def _command(work: Callable[..., object], *shared: Callable[..., object]) -> Callable[..., object]:
    """Make a function a command of its name; its errors become one line and the exit status.

    Args:
        work: its parameters are the options.
        shared: functions whose parameters are options too, which the command takes as ``**given``.
    """
    parts = [inspect.signature(one).parameters.values() for one in (work, *shared)]
    options = [one for part in parts for one in part if one.kind != one.VAR_KEYWORD]

    @functools.wraps(work)
    def run(**given: object) -> None:
        raise typer.Exit(exit_status(lambda: work(**given)))

    keywords = [one.replace(kind=one.KEYWORD_ONLY) for one in options]
    vars(run)["__signature__"] = inspect.Signature(keywords)
    run.__annotations__ = {one.name: one.annotation for one in options}
    _COMMANDS.append(work.__name__)
    app.command(work.__name__)(run)
    return work


def _version(asked: bool) -> bool:
    if asked:
        sys.stdout.write(f"vlmneurons {vn.__version__}\n")
        raise typer.Exit()
    return asked


@app.callback()
def _start(
    verbose: Annotated[bool, typer.Option("--verbose", help="log everything, and where errors come from")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="of this library")
    ] = False,
) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what fails there is raised, and told in our words
    for name in ("matplotlib", "PIL", "httpx", "urllib3", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


_Revision = Annotated[str | None, typer.Option(help="of the model")]
_Dtype = Annotated[str | None, typer.Option(help="of the weights (default: as they are stored)")]
_Device = Annotated[str | None, typer.Option(help="where the weights go (default: the GPUs, if there are any)")]


_Tokens = Annotated[str, _choice(*TOKENS, help="which tokens count")]
_Side = Annotated[str, _choice("all", "identify", "evaluate", help="which side of the split is asked")]
_Images = Annotated[str, _choice("thumbnails", "none", help="none: of pictures that may not be shared")]
_Part = Annotated[str | None, typer.Option(metavar="N/COUNT", help="of the batches, to `join` with the others")]
_Others = Annotated[int | None, typer.Option(help="masks of other groups a question meets (default: all)")]


def _asking(
    model: Annotated[str, typer.Option(help="name on the Hub, folder, demo or demo:organism")],
    data: Annotated[str, typer.Option(help="demo, a folder with a table, or CVQA: Hub name, file or folder")],
    out: Annotated[Path, typer.Option(help="folder of the run; the same command goes on where it was stopped")],
    answer: Annotated[str | None, _choice("letters", "generate", "text", help="how answers are read")] = None,
    batch_size: Annotated[int, typer.Option(help="questions a forward")] = 8,
    share: Annotated[float, typer.Option(help="share of the questions that neurons are identified on")] = 0.5,
    seed: Annotated[int, typer.Option(help="of the split, the random masks, and all sampling")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device_map: _Device = None,
    remote: Annotated[Any, _option(_where, "[URL|local]", "run it elsewhere by nnsight; local: a simulation")] = None,
    engine: Annotated[str, _choice("transformers", "vllm", help="what runs the model; vllm: all GPUs at once")] = (
        "transformers"
    ),
    tensor_parallel_size: Annotated[int | None, typer.Option(help="of --engine vllm: GPUs that share a layer")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="of --engine vllm: tokens of the longest question")] = None,
    data_revision: Annotated[str | None, typer.Option(help="of a dataset on the Hub")] = None,
    language: Annotated[str, _choice(*LANGUAGES, help="of CVQA's questions")] = "english",
    group_by: Annotated[str, typer.Option(help="country, subset, category, or any column")] = "country",
    min_items: Annotated[int, typer.Option(help="leave out groups with fewer questions")] = 1,
    per_group: Annotated[int | None, typer.Option(help="questions of every group, sampled by the seed")] = None,
) -> None:
    """The options of every command that asks a model questions."""


_COMMAND = "command.json"
"""In a study's folder: the options that say what was asked of what."""


_ELSEWHERE = {"remote", "engine", "tensor_parallel_size", "max_model_len"}
"""Options that say where a model runs: pages of neurons are made of one that runs here."""


def _asking_again(**given: object) -> None:
    """The options of a command about a study that ran: none has to be given, for the study's own hold."""


_kept = [one for one in inspect.signature(_asking).parameters.values() if one.name not in ("out", "quiet", "share")]
vars(_asking_again)["__signature__"] = inspect.Signature([one.replace(default=None) for one in _kept])


def study(
    general: Annotated[str | None, typer.Option(help="questions that measure general ability, as for --data")] = None,
    general_by: Annotated[str | None, typer.Option(help="column that groups them")] = None,
    selectors: Annotated[Any, _list(_one_of(*STUDIED), "|".join(STUDIED), "whose neurons are switched off")] = None,
    main: Annotated[str | None, _choice(*STUDIED, help="the selector that is swept and controlled")] = None,
    fraction: Annotated[float | None, typer.Option(help="share of all neurons in each mask")] = None,
    fractions: Annotated[Any, _list(float, "FLOAT", "shares of the sweep")] = None,
    alphas: Annotated[Any, _list(float, "FLOAT", "strengths of the sweep")] = None,
    sizes: Annotated[Any, _list(int, "INTEGER", "numbers of identification questions of the sweep")] = None,
    conditions: Annotated[Any, _list(_one_of(*CONDITIONS), "all|wrong", "other identification conditions")] = None,
    others: _Others = None,
    repeats: Annotated[int | None, typer.Option(help="random masks of each kind")] = None,
    permutations: Annotated[int | None, typer.Option(help="label shuffles of the selection's null; 0 for none")] = None,
    minimum: Annotated[int | None, typer.Option(help="identification questions a group must have")] = None,
    on_error: Annotated[str | None, _choice("raise", "skip", help="on a question that cannot be asked")] = None,
    tokens: _Tokens = "content",
    images: _Images = "thumbnails",
    **given: Any,
) -> None:
    """The whole study: record, select, switch off, report."""
    given |= locals()
    settings = {field.name: given[field.name] for field in dataclasses.fields(vn.Protocol)}
    protocol = vn.Protocol(**{name: value for name, value in settings.items() if value is not None})
    if general_by is not None and general is None:
        raise QuestionError("--general-by groups the questions of --general, which is not given")
    questions, load = _opened(given)
    further = None if general is None else open_questions(general, group_by=general_by)
    identify, _ = questions.split(protocol.share, seed=protocol.seed)
    thin = [f"{group} ({n})" for group, n in identify.counts().items() if n < protocol.minimum]
    if thin:  # run_study looks again, but by then the model is loaded
        few = ", ".join(thin)
        raise QuestionError(f"at least {protocol.minimum} questions a group identify neurons; fewer in {few}")
    out = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) == 0:
        handler = logging.FileHandler(out / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logging.getLogger("vlmneurons").addHandler(handler)
    model = load()
    log.info("%s on %s", model.name, questions)
    how = {"distributed": _processes() > 1, "progress": not given["quiet"], "remote": given["remote"] or False}
    how["images"] = images == "thumbnails"
    done = vn.run_study(model, questions, out, protocol, general=further, **how)
    if int(os.environ.get("RANK", "0")) == 0:
        asked = {*inspect.signature(_asking_again).parameters, "general", "general_by"} - _ELSEWHERE
        kept = {name: given[name] for name in asked}
        for name in ("model", "data", "general"):  # a path is found from another folder too
            kept[name] = os.path.abspath(kept[name]) if os.path.exists(kept[name] or "") else kept[name]
        write_json(out / _COMMAND, kept, indent=1)
    if done.page is not None:
        summary = done.knockout.summary()
        shown = ["selector", "n", "clean", "self_effect", "cross_effect", "gap", "gap_p", "flips"]
        sys.stdout.write(summary.loc[summary["group"] == "all", shown].to_string(index=False) + f"\n{done.page}\n")


def record(tokens: _Tokens = "content", side: _Side = "identify", part: _Part = None, **given: Any) -> None:
    """Count how often neurons fire, question by question."""
    vn.Protocol(tokens=tokens, batch_size=given["batch_size"], share=given["share"], seed=given["seed"])
    how = _checked(given, part)
    questions, load = _opened(given)
    items = vn.record_items(load(), _sided(questions, side, given), given["out"], tokens=tokens, **how)
    sys.stdout.write(f"{items!r}\n")


def knockout(
    selection: Annotated[list[str], typer.Option(metavar="NAME=FILE …", help="what is switched off (of `select`)")],
    others: _Others = None,
    side: _Side = "evaluate",
    part: _Part = None,
    **given: Any,
) -> None:
    """Ask questions with the model as it is and with each selection's neurons switched off."""
    from vlmneurons.study.design import crossing
    from vlmneurons.study.masks import listed_masks

    vn.Protocol(batch_size=given["batch_size"], share=given["share"], seed=given["seed"])
    how = _checked(given, part) | {"others": others, "seed": given["seed"]}
    masks: dict[str, vn.Selection] = {}
    for one in selection:
        name, equals, file = one.partition("=")
        if not (name and equals and file) or name in masks:
            wrong = f"{name!r} is there twice" if name in masks else "no name and file"
            raise FileFormatError(f"--selection {one}: {wrong}; give NAME=FILE, such as CAS=cas.safetensors, each once")
        masks[name] = vn.Selection.load(file)
    questions, load = _opened(given)
    questions = _sided(questions, side, given)
    zero = vn.Intervention(vn.NeuronSet.empty(next(iter(masks.values())).space), "zero")
    listed = listed_masks(masks, questions.groups, zero)  # the call below looks again, but with the model loaded
    crossing(questions, [mask for mask, _ in listed], others=others, seed=given["seed"])
    result = vn.knockout(load(), questions, masks, folder=given["out"], **how)
    sys.stdout.write(f"{result!r}\n")


def join(
    out: Annotated[Path, typer.Argument(help="folder of the whole")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART…", help="folders of all the parts")],
) -> None:
    """Put the parts of a recording or of a knockout together: the files are those of an undivided run."""
    from vlmneurons.files.parts import kind_in

    kind: type[vn.ItemStatistics | vn.KnockoutResult]
    kind = vn.ItemStatistics if kind_in(parts[0]) == "vlmneurons items" else vn.KnockoutResult
    sys.stdout.write(f"{kind.join(parts, out)!r}\n")


def _checked(given: Keywords, part: str | None) -> Keywords:
    """How questions are asked, if they can be."""
    from vlmneurons.run.ask import Options

    how = {"batch_size": given["batch_size"], "part": part, "distributed": _processes() > 1}
    how |= {"progress": not given["quiet"], "remote": given["remote"] or False}
    if part is not None:  # processes that share a run find each other only when the model is there
        Options(**how)
    return how


def _sided(questions: "vn.QuestionSet", side: str, given: Keywords) -> "vn.QuestionSet":
    """The questions of one side of the split, read as the command says."""
    if side != "all":
        whole, place = len(questions), ("identify", "evaluate").index(side)
        questions = questions.split(given["share"], seed=given["seed"])[place]
        log.info("%d of %d questions: the side to %s on; --side all takes all", len(questions), whole, side)
    return questions if given["answer"] is None else questions.asked(answer=given["answer"])


def select(
    items: Annotated[Path, typer.Option(help="folder that `record` wrote")],
    out: Annotated[Path, typer.Option(help="file of the selection (.safetensors)")],
    selector: Annotated[str, _choice(*SELECTORS, help="the rule")] = "CAS",
    fraction: Annotated[float, typer.Option(help="share of all neurons in each set")] = 0.005,
    condition: Annotated[str, _choice(*CONDITIONS, help="which questions count")] = "correct",
    group_by: Annotated[str | None, typer.Option(help="a column of the recording")] = None,
) -> None:
    """Choose neurons from a recording."""
    rule = getattr(vn, selector)(fraction)
    recording = vn.ItemStatistics.load(items)
    if recording.part is not None:
        raise FileFormatError(f"{items} is part {recording.part} of a recording: `join` it with the others first")
    if not recording.complete:
        raise FileFormatError(f"{items} is not recorded to its end: run `record` again to go on with it")
    selection = rule.select(recording.group_by(group_by or "group", condition=condition))
    selection.save(out)
    sys.stdout.write(f"{selection!r}\n")


def report(
    run: Annotated[Path, typer.Option(help="folder of a study or of a knockout")],
    main: Annotated[str | None, typer.Option(help="the selector that per-group figures are of")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the report (default: report/ in the run)")] = None,
    images: _Images = "thumbnails",
) -> None:
    """Write a run's report again."""
    import json

    import pandas as pd

    from vlmneurons.study.protocol import NULL, told_of

    whole = run / "knockout" if (run / "knockout").is_dir() else run
    result = vn.KnockoutResult.load(whole)
    if "part" in result.provenance:
        raise FileFormatError(f"{whole} is part {result.provenance['part']} of a run: `join` it with the others first")
    others = {
        name: vn.KnockoutResult.load(run / folder)
        for name, folder in (("blind", "blind"), ("options only", "options-only"))
        if (run / folder / "knockout.json").exists()
    }
    how: Keywords = {"others": others, "images": images == "thumbnails"}
    paths = sorted((run / "selections").glob("*.safetensors"))
    how["selections"] = {path.stem: vn.Selection.load(path) for path in paths}
    null = run / "report" / "tables" / f"{NULL.replace(' ', '-')}.csv"
    how["tables"] = {NULL: pd.read_csv(null, float_precision="round_trip")} if null.exists() else {}
    if (run / "protocol.json").exists():
        kept = json.loads((run / "protocol.json").read_text(encoding="utf-8"))["protocol"]
        settings: Keywords = {name: tuple(one) if isinstance(one, list) else one for name, one in kept.items()}
        how["settings"], main = told_of(vn.Protocol(**settings)), main or settings["main"]
    try:
        how["questions"] = _asked_in(run)
    except (VLMNeuronsError, OSError) as error:
        sys.stderr.write(f"the report shows no questions: {error}\n")
    sys.stdout.write(f"{result.report(out or run / 'report', main=main, **how)}\n")


def _asked_in(run: Path) -> "vn.QuestionSet":
    """The questions of a study, from where it had them."""
    import json

    if not (run / _COMMAND).exists():
        raise QuestionError(f"{run} does not say what was asked, as studies of the command line do")
    kept = json.loads((run / _COMMAND).read_text(encoding="utf-8"))
    how = {name: kept[name] for name in ("language", "group_by", "min_items", "per_group", "seed")}
    questions = open_questions(kept["data"], revision=kept["data_revision"], on_error="skip", **how)
    if kept["general"] is None:
        return questions
    return questions + open_questions(kept["general"], group_by=kept["general_by"])


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="folders of studies or knockouts")],
    out: Annotated[Path, typer.Option(help="folder of the page")] = Path("out/compare"),
    name: Annotated[list[str] | None, typer.Option(help="of each model, in order (default: of its folder)")] = None,
    main: Annotated[str | None, typer.Option(help="the selector that per-group figures are of")] = None,
    value: Annotated[str | None, _choice("correct", "margin", "score", help="what effects are measured on")] = None,
) -> None:
    """Put the studies of several models side by side: a page with tables and figures."""
    names = name or [run.resolve().name for run in runs]
    if len(names) != len(runs) or len(set(names)) < len(names):
        raise FileFormatError(f"{len(runs)} runs with the names {', '.join(names)}: give each one of its own, --name")
    comparison = vn.compare(dict(zip(names, runs, strict=True)), value=value)
    for note in comparison.notes:
        sys.stderr.write(f"{note}\n")
    table = comparison.table()[
        ["selector", "model", "groups", "n", "clean", "self_effect", "cross_effect", "gap", "gap_p"]
    ]
    sys.stdout.write(table.to_string(index=False) + f"\n{comparison.report(out, main=main)}\n")


def explore(
    run: Annotated[Path, typer.Argument(help="folder of a study; what it asked is asked again, unless options differ")],
    out: Annotated[Path | None, typer.Option(help="folder of the explorer (default: explorer/ in the study)")] = None,
    general: Annotated[str | None, typer.Option(help="the study's, as for --data")] = None,
    general_by: Annotated[str | None, typer.Option(help="column that groups them")] = None,
    strongest: Annotated[int, typer.Option(help="neurons of each group with pictures and words")] = 50,
    images: _Images = "thumbnails",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    **given: Any,
) -> None:
    """Write a study's explorer: effects, changed answers, neurons, pictures and words, to click through."""
    import json

    from vlmneurons.look.explorer import write_explorer
    from vlmneurons.study.protocol import SELECTORS as RULES

    if given["remote"] is not None or given["engine"] not in (None, "transformers"):
        elsewhere = "--engine vllm" if given["remote"] is None else "--remote"
        raise ArchitectureError(f"{elsewhere}: values at every token do not come back; run the model here")
    kept = json.loads((run / _COMMAND).read_text(encoding="utf-8")) if (run / _COMMAND).exists() else {}
    usual = {name: one.default for name, one in inspect.signature(_asking).parameters.items()}
    given |= {"general": general, "general_by": general_by}
    given = dict.fromkeys(given) | usual | kept | {name: value for name, value in given.items() if value is not None}
    if inspect.Parameter.empty in (given["model"], given["data"]):
        raise QuestionError(
            f"{run} does not say what was asked, as studies of the command line do: give --model and --data"
        )
    result = vn.KnockoutResult.load(run / "knockout")
    if "part" in result.provenance:
        raise FileFormatError(f"{run} is part {result.provenance['part']} of a study: `join` it with the others first")
    settings = json.loads((run / "protocol.json").read_text(encoding="utf-8"))["protocol"]
    selectors = {name: RULES[name](settings["fraction"]) for name in settings["selectors"]}
    selections = {name: vn.Selection.load(run / "selections" / f"{name}.safetensors") for name in selectors}
    items = vn.ItemStatistics.load(run / "items")
    stats = items.group_by("group", condition="correct", balanced=True, seed=settings["seed"])
    questions, load = _opened(given)
    if given["general"] is not None:
        questions = questions + open_questions(given["general"], group_by=given["general_by"])
    answer = given["answer"] or settings["answer"]
    page = write_explorer(
        result,
        out or run / "explorer",
        questions if answer is None else questions.asked(answer=answer),
        selections,
        model=load(),
        stats=stats,
        items=items,
        selectors=selectors,
        main=settings["main"],
        strongest=strongest,
        images=images == "thumbnails",
        batch_size=given["batch_size"],
        progress=not quiet,
    )
    sys.stdout.write(f"{page}\n")


def check(
    name: Annotated[str, typer.Argument(help="a model on the Hub, a folder, or a model type such as qwen2_5_vl")],
    run: Annotated[bool, typer.Option("--run", help="load the weights and check the whole contract")] = False,
    revision: _Revision = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights with --run (default: as they are stored)")] = None,
    device_map: Annotated[str | None, typer.Option(help="where the weights go with --run, such as auto")] = None,
) -> int:
    """Which neurons a model has, and whether the library can read and ablate them.

    Without --run only the configuration is read: the model is built at full size without weights, in seconds. With it,
    vlmneurons.testing.check_architecture is run on a question with an image. The exit status is 0 if all is well, 1 if
    the contract is broken, 2 if nothing was checked.
    """
    from vlmneurons.testing.architectures import check_architecture, describe_architecture, mapped_types

    if not run and (dtype, device_map) != (None, None):
        raise typer.BadParameter("--dtype and --device-map are of the weights, which only --run loads")
    start = time.perf_counter()
    try:
        how = {"dtype": dtype or "auto", "device_map": device_map}
        model, processor = _loaded(name, lambda: _weighed(name, revision, **how) if run else _meta(name, revision))
    except ArchitectureError as error:
        like = difflib.get_close_matches(re.sub(r"\W", "_", name).lower(), mapped_types(), n=1, cutoff=0.8)
        hint = f"Is the model type {like[0]} meant? " if like and not os.path.isdir(name) else ""
        sys.stderr.write(f"{str(error).replace('loaded. ', f'loaded. {hint}', 1)}\n")
        return 2
    built = time.perf_counter()
    try:
        told = check_architecture(model, processor) if run else describe_architecture(model)
    except VLMNeuronsError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    took = f"model built in {built - start:.1f} s, looked through in {time.perf_counter() - built:.1f} s"
    verdict = "The contract holds" if run else "Found without weights; --run checks the values"
    sys.stdout.write(f"{told}\n{verdict} ({took}).\n")
    return 0


def _meta(name: str, revision: str | None) -> "tuple[nn.Module, None]":
    """The model without weights."""
    from vlmneurons.testing.architectures import mapped_model, mapped_types

    if name in mapped_types() and not os.path.isdir(name):
        return mapped_model(name), None
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config), None


def _weighed(name: str, revision: str | None, **how: object) -> "tuple[nn.Module, Any]":
    """The model with its weights, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmneurons.testing.architectures import mapped_types

    if name in mapped_types() and not os.path.isdir(name):
        raise ValueError("a model type has no weights; give a model on the Hub or a folder, or leave out --run")
    model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, **how)
    return model.eval(), AutoProcessor.from_pretrained(name, revision=revision)


def _opened(given: Keywords) -> "tuple[vn.QuestionSet, Callable[[], vn.VLM]]":
    """The questions of a command, and how to load its model, once all that is cheap to refuse was."""
    name, revision = given["model"], given["revision"]
    elsewhere = given["remote"] not in (None, "local")
    how = {"revision": revision, "dtype": given["dtype"], "device_map": given["device_map"]}
    if elsewhere and (given["dtype"], given["device_map"]) != (None, None):
        raise ArchitectureError("--dtype and --device-map are for a model that is loaded here, not for --remote")
    _check_model(name, **how)
    vllm = _vllm_options(given)
    questions = open_questions(
        given["data"],
        language=given["language"],
        revision=given["data_revision"],
        group_by=given["group_by"],
        min_items=given["min_items"],
        per_group=given["per_group"],
        seed=given["seed"],
        on_error=given.get("on_error") or "raise",
    )
    if elsewhere:
        return questions, lambda: _loaded(name, lambda: vn.VLM.from_pretrained(name, revision=revision, weights=False))
    return questions, lambda: open_model(name, **how, **vllm)


def _vllm_options(given: Keywords) -> Keywords:
    """What `open_model` is told of an engine that is not the model's own code; refuses what vLLM would not obey."""
    told = {name: given[name] for name in ("tensor_parallel_size", "max_model_len") if given[name] is not None}
    if given["engine"] != "vllm":
        for name in told:
            raise ArchitectureError(f"--{name.replace('_', '-')} is of --engine vllm, which is not given")
        return {}
    from vlmneurons.run.vllm.server import installed_version

    if _is_demo(given["model"]):
        raise ArchitectureError(f"{given['model']} is embedded and runs here: leave out --engine")
    for name, why in {
        "device_map": "vLLM places the weights itself, on as many GPUs as --tensor-parallel-size says",
        "remote": "a model is held by one of the two",
    }.items():
        if given[name] is not None:
            raise ArchitectureError(f"--{name.replace('_', '-')} with --engine vllm: {why}; leave one out")
    if _processes() > 1:
        raise ArchitectureError("--engine vllm starts its own processes: start one, without torchrun, or use --part")
    for name, value in told.items():
        as_whole(f"--{name.replace('_', '-')}", value, ArchitectureError, least=1)
    installed_version()
    return {"engine": "vllm", **told}


for _work in (study, record, knockout):
    _command(_work, _asking)
_command(explore, _asking_again)
for _work in (select, join, report, compare, check):
    _command(_work)
