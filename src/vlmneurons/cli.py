"""The command line: ``vlmneurons study|record|select|knockout|join|report|compare|explore|check``, thin over functions.

It is made for batch systems: progress and log go to standard error, results to files and standard output. The exit
status is 0 if all is well, 1 for an error of the data, the model or the settings, and 2 for a command that is written
wrongly; either error is one line. What can be refused is refused before the model is loaded. A run that is stopped
(SIGTERM, as SLURM sends it, or ctrl-C) says so and gives 143 or 130; the same command goes on with its folder.

A new command is one function with the decorator ``@_command()``: its parameters are the options, its docstring is the
help. What takes seconds to import is imported within the functions, so that help and refusals come at once.
"""

import dataclasses
import difflib
import functools
import inspect
import json
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
    import pandas as pd
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
    """Run one command, and give the exit status.

    Args:
        arguments: the words after the program's name; by default those that the process was started with.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        return command.main(_joined(arguments), prog_name="vlmneurons", standalone_mode=False) or 0
    except typer.TyperException as error:
        if not arguments:  # no error: the message is the help
            sys.stderr.write(f"{error.format_message()}\n")
            return error.exit_code
        names = {registered.name for registered in app.registered_commands}
        usage = " ".join(["vlmneurons", *[word for word in arguments if word in names][:1], "--help"])
        message = re.sub(r" \(Possible options: (.+)\)$", r" Did you mean \1?", error.format_message())
        sys.stderr.write(f"error: {message} ({usage} lists what there is)\n")
        return error.exit_code


def exit_status(work: Callable[[], object]) -> int:
    """Do some work, and give the exit status of a program that did it; an error is written in one line.

    Args:
        work: a function without arguments; a whole number that it returns is the exit status.

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

    options: Keywords = {"dtype": dtype or "auto", **vllm}
    if device_map is not None:
        options["device_map"] = device_map
    elif torch.cuda.is_available() and not vllm:  # vLLM finds its own GPUs
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))} if _processes() > 1 else "auto"
    return _loaded(name, lambda: vn.VLM.from_pretrained(name, revision=revision, **options))


def open_questions(
    source: str,
    *,
    language: str = "english",
    revision: str | None = None,
    group_by: str | None = "country",
    min_items: int = 1,
    per_group: int | None = None,
    seed: int = 0,
    on_error: str = "raise",
) -> "vn.QuestionSet":
    """Questions by where they are: the demo's, a folder with a table (`QuestionSet.from_folder`), or `load_cvqa`.

    Args:
        source: ``"demo"``; a folder that holds a ``.csv``, ``.tsv`` or ``.jsonl`` table; or what `load_cvqa` takes.
        language: of CVQA's questions; other sources have one.
        revision: of CVQA on the Hub; other sources have none.
        group_by: the column that groups the questions; None or ``"country"`` for the usual groups.
        min_items: leave out groups with fewer questions.
        per_group: take so many questions of every group; None for all.
        seed: of that choice.
        on_error: what to do with a row of CVQA that is no question: ``"raise"`` or ``"skip"``.

    Raises:
        QuestionError: there are no such questions, or they have no such language or revision.
    """
    in_folder = os.path.isdir(source) and any(
        path.suffix in (".csv", ".tsv", ".jsonl") for path in Path(source).iterdir()
    )
    if not (in_folder or _is_demo(source)):
        if _is_path(source) and not os.path.exists(source):
            raise QuestionError(f"--data {source}: there is no such file or folder")
        choice: Keywords = {"min_items": min_items, "per_group": per_group, "seed": seed, "on_error": on_error}
        return vn.load_cvqa(source, language=language, group_by=group_by or "country", revision=revision, **choice)
    if language != "english" or revision is not None:
        raise QuestionError(f"--data {source} is not CVQA: it has one language and no revision")
    if in_folder:
        questions = vn.QuestionSet.from_folder(source)
    else:
        questions = vn.load_demo(source.partition(":")[2] or "natural")[1]
    if group_by not in (None, "country", "group"):
        questions = questions.group_by(group_by)
    questions = questions.at_least(min_items)
    return questions if per_group is None else questions.balanced(per_group, seed=seed)


def _is_demo(name: str) -> bool:
    return name.partition(":")[0] == "demo" and not os.path.exists(name)


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: names on the Hub have one slash at most, and do not begin with a dot."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _check_model(name: str, *, revision: str | None, dtype: str | None, device_map: str | None) -> None:
    """Refuse a model that cannot be loaded so, as far as that can be told without loading anything large."""
    if _is_demo(name):
        for option, value in (("--revision", revision), ("--dtype", dtype), ("--device-map", device_map)):
            if value is not None:
                raise ArchitectureError(f"{name} is on the CPU, in float32, and has no revision: leave out {option}")
    if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ArchitectureError(f"--model {name} exists, but is no folder with a config.json, as save_pretrained makes")
    if _is_path(name) and not os.path.exists(name):
        raise ArchitectureError(f"--model {name}: there is no such folder")
    if dtype not in (None, "auto"):
        import torch

        dtypes = [name for name, value in vars(torch).items() if getattr(value, "is_floating_point", False) is True]
        if dtype not in dtypes:
            raise ArchitectureError(f"--dtype {dtype!r} does not exist{_did_you_mean(dtype, dtypes)}")


def _loaded(name: str, load: Callable[[], T]) -> T:
    """What transformers loads; its errors, from a missing file to a missing package, become one of the library's."""
    try:
        return load()
    except VLMNeuronsError:
        raise
    except Exception as error:
        raise ArchitectureError(f"{name} cannot be loaded. {type(error).__name__}: {error}") from error


def _processes() -> int:
    """How many processes share the work, as ``torchrun`` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


# -- options -----------------------------------------------------------------------------------------------------------


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about a misspelt name."""
    nearest = nearest_name(name, names)
    return f"; did you mean {nearest}?" if nearest else ""


def _one_of(*names: str) -> Callable[[str], str]:
    """The parser of an option that has one of these names as its value."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is none of {', '.join(names)}{_did_you_mean(text, names)}")
        return text

    return parse


def _several(parse_value: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """The parser of an option that has any number of values, with spaces or commas between them."""

    def parse(text: str) -> tuple[object, ...]:
        try:
            return tuple(parse_value(part) for part in re.split(r"[\s,]+", text) if part)
        except ValueError as error:
            raise typer.BadParameter(f"{error} (a list of numbers, such as 1 2)") from error

    return parse


def _option(parse: Callable[[str], object], shown: str, help: str) -> object:
    return typer.Option(parser=parse, metavar=shown, help=help)


def _choice(*names: str, help: str) -> object:
    return _option(_one_of(*names), "|".join(names), help)


def _list(parse_value: Callable[[str], object], shown: str, help: str) -> object:
    return _option(_several(parse_value), f"[{shown} …]", help)


def _remote(text: str) -> bool | str:
    """Where a model runs: ``--remote`` alone is nnsight's own host."""
    return text or True


_MANY = ("--selectors", "--fractions", "--alphas", "--sizes", "--conditions", "--remote")
"""The options that take any number of values, also none."""


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments as typer takes them, which knows options of one value only.

    ``--sizes 1 2`` becomes ``--sizes=1 2``, for `_several` to split, and ``--selection A=a B=b``, whose files may have
    spaces in their names, ``--selection A=a --selection B=b``.
    """
    joined: list[str] = []
    option = ""  # whose values come next
    for argument in arguments:
        if not option or re.match(r"-(?![\d.])", argument):  # another option, and no number below zero
            option = argument if argument in (*_MANY, "--selection") else ""
            joined.append(f"{argument}=" if argument in _MANY else argument)
        elif option == "--selection":
            joined += [argument] if joined[-1] == option else [option, argument]
        else:
            joined[-1] += argument if joined[-1].endswith("=") else f" {argument}"
    return joined


def _command(*shared: Callable[..., object]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make a function a command of its name; its errors become one line and the exit status.

    Args:
        shared: functions whose parameters are options of the command too, which it takes as keywords.
    """

    def register(work: Callable[..., T]) -> Callable[..., T]:
        every = [each for source in (work, *shared) for each in inspect.signature(source).parameters.values()]
        parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in every if each.kind != each.VAR_KEYWORD]

        @functools.wraps(work)
        def run(**options: object) -> None:
            raise typer.Exit(exit_status(lambda: work(**options)))

        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(work.__name__)(run)
        return work

    return register


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
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what fails there is raised here
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
    remote: Annotated[Any, _option(_remote, "[URL|local]", "run it elsewhere by nnsight; local: a simulation")] = None,
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


def _asking_again(**options: object) -> None:
    """The options of a command about a study that ran: none has to be given, for the study's own hold."""


_kept = [each for each in inspect.signature(_asking).parameters.values() if each.name not in ("out", "quiet", "share")]
vars(_asking_again)["__signature__"] = inspect.Signature([each.replace(default=None) for each in _kept])

_COMMAND = "command.json"
"""In a study's folder: the options that say what was asked of which model."""

_PLACES = {"remote", "engine", "tensor_parallel_size", "max_model_len"}
"""Options that say where a model runs, which a study's folder does not keep: an explorer needs one that runs here."""


def _write_command(folder: Path, options: Keywords) -> None:
    """Keep in a study's folder what was asked of which model, for `report` and `explore`."""
    names = {*inspect.signature(_asking_again).parameters, "general", "general_by"} - _PLACES
    kept = {name: options[name] for name in sorted(names)}
    for name in ("model", "data", "general"):  # so that a path is found from another working folder too
        kept[name] = os.path.abspath(kept[name]) if os.path.exists(kept[name] or "") else kept[name]
    write_json(folder / _COMMAND, kept, indent=1)


def _read_command(folder: Path) -> Keywords:
    """The options that `_write_command` kept; none where it did not."""
    path = folder / _COMMAND
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise FileFormatError(f"{path} is damaged: {error}") from error


# -- the commands ------------------------------------------------------------------------------------------------------


@_command(_asking)
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
    **options: Any,
) -> None:
    """The whole study: record, select, switch off, report."""
    options |= locals()
    settings = {field.name: options[field.name] for field in dataclasses.fields(vn.Protocol)}
    protocol = vn.Protocol(**{name: value for name, value in settings.items() if value is not None})
    if general_by is not None and general is None:
        raise QuestionError("--general-by groups the questions of --general, which is not given")
    questions, load = _opened(options)
    further = None if general is None else open_questions(general, group_by=general_by)
    identify, _ = questions.split(protocol.share, seed=protocol.seed)
    thin = [f"{group} ({n})" for group, n in identify.counts().items() if n < protocol.minimum]
    if thin:  # run_study looks again, but by then the model is loaded
        few = ", ".join(thin)
        raise QuestionError(f"at least {protocol.minimum} questions a group identify neurons; fewer in {few}")
    out = options["out"]
    out.mkdir(parents=True, exist_ok=True)
    if _is_first_process():
        handler = logging.FileHandler(out / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logging.getLogger("vlmneurons").addHandler(handler)
    model = load()
    log.info("%s on %s", model.name, questions)
    run = {"distributed": _processes() > 1, "progress": not options["quiet"], "remote": options["remote"] or False}
    done = vn.run_study(model, questions, out, protocol, general=further, images=images == "thumbnails", **run)
    if _is_first_process():
        _write_command(out, options)
    if done.page is not None:
        summary = done.knockout.summary()
        columns = ["selector", "n", "clean", "self_effect", "cross_effect", "gap", "gap_p", "flips"]
        sys.stdout.write(f"{_as_text(summary.loc[summary['group'] == 'all', columns])}\n{done.page}\n")


@_command(_asking)
def record(tokens: _Tokens = "content", side: _Side = "identify", part: _Part = None, **options: Any) -> None:
    """Count how often neurons fire, question by question."""
    vn.Protocol(tokens=tokens, batch_size=options["batch_size"], share=options["share"], seed=options["seed"])
    asking = _asking_options(options, part)
    questions, load = _opened(options)
    items = vn.record_items(load(), _one_side(questions, side, options), options["out"], tokens=tokens, **asking)
    sys.stdout.write(f"{items!r}\n")


@_command(_asking)
def knockout(
    selection: Annotated[list[str], typer.Option(metavar="NAME=FILE …", help="what is switched off (of `select`)")],
    others: _Others = None,
    side: _Side = "evaluate",
    part: _Part = None,
    **options: Any,
) -> None:
    """Ask questions with the model as it is and with each selection's neurons switched off."""
    from vlmneurons.study.design import crossing
    from vlmneurons.study.masks import listed_masks

    vn.Protocol(batch_size=options["batch_size"], share=options["share"], seed=options["seed"])
    asking = _asking_options(options, part) | {"others": others, "seed": options["seed"]}
    masks: dict[str, vn.Selection] = {}
    for pair in selection:
        name, equals, file = pair.partition("=")
        if not (name and equals and file) or name in masks:
            wrong = f"{name!r} is there twice" if name in masks else "no name and file"
            raise FileFormatError(
                f"--selection {pair}: {wrong}; give NAME=FILE, such as CAS=cas.safetensors, each once"
            )
        masks[name] = vn.Selection.load(file)
    questions, load = _opened(options)
    questions = _one_side(questions, side, options)
    zero = vn.Intervention(vn.NeuronSet.empty(next(iter(masks.values())).space), "zero")
    listed = listed_masks(masks, questions.groups, zero)  # the call below looks again, but with the model loaded
    crossing(questions, [mask for mask, _ in listed], others=others, seed=options["seed"])
    result = vn.knockout(load(), questions, masks, folder=options["out"], **asking)
    sys.stdout.write(f"{result!r}\n")


@_command()
def join(
    out: Annotated[Path, typer.Argument(help="folder of the whole")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART…", help="folders of all the parts")],
) -> None:
    """Put the parts of a recording or of a knockout together: the files are those of an undivided run."""
    from vlmneurons.files.parts import kind_in

    kind: type[vn.ItemStatistics | vn.KnockoutResult]
    kind = vn.ItemStatistics if kind_in(parts[0]) == "vlmneurons items" else vn.KnockoutResult
    sys.stdout.write(f"{kind.join(parts, out)!r}\n")


@_command()
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


@_command()
def report(
    run: Annotated[Path, typer.Option(help="folder of a study or of a knockout")],
    main: Annotated[str | None, typer.Option(help="the selector that per-group figures are of")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the report (default: report/ in the run)")] = None,
    images: _Images = "thumbnails",
) -> None:
    """Write a run's report again."""
    from vlmneurons.study.kept import kept_protocol, open_study
    from vlmneurons.study.protocol import report_settings

    study, protocol = open_study(run), kept_protocol(run)
    parts: Keywords = {"others": study.others, "selections": study.selections, "tables": study.tables}
    if protocol is not None:
        parts["settings"], main = report_settings(protocol), main or protocol.main
    try:
        parts["questions"] = _questions_of_study(run)
    except (VLMNeuronsError, OSError) as error:
        sys.stderr.write(f"the report shows no questions: {error}\n")
    page = study.knockout.report(out or run / "report", main=main, images=images == "thumbnails", **parts)
    sys.stdout.write(f"{page}\n")


@_command()
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
    columns = ["selector", "model", "groups", "n", "clean", "self_effect", "cross_effect", "gap", "gap_p"]
    sys.stdout.write(f"{_as_text(comparison.table().loc[:, columns])}\n{comparison.report(out, main=main)}\n")


@_command(_asking_again)
def explore(
    run: Annotated[Path, typer.Argument(help="folder of a study; what it asked is asked again, unless options differ")],
    out: Annotated[Path | None, typer.Option(help="folder of the explorer (default: explorer/ in the study)")] = None,
    general: Annotated[str | None, typer.Option(help="the study's, as for --data")] = None,
    general_by: Annotated[str | None, typer.Option(help="column that groups them")] = None,
    strongest: Annotated[int, typer.Option(help="neurons of each group with pictures and words")] = 50,
    images: _Images = "thumbnails",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    **options: Any,
) -> None:
    """Write a study's explorer: effects, changed answers, neurons, pictures and words, to click through."""
    from vlmneurons.look.explorer import write_explorer
    from vlmneurons.study.kept import kept_protocol, open_study
    from vlmneurons.study.protocol import SELECTORS as RULES

    if options["remote"] is not None or options["engine"] not in (None, "transformers"):
        elsewhere = "--engine vllm" if options["remote"] is None else "--remote"
        raise ArchitectureError(f"{elsewhere}: values at every token do not come back; run the model here")
    options |= {"general": general, "general_by": general_by}
    defaults = {name: parameter.default for name, parameter in inspect.signature(_asking).parameters.items()}
    changed = {name: value for name, value in options.items() if value is not None}
    options = dict.fromkeys(options) | defaults | _read_command(run) | changed
    if inspect.Parameter.empty in (options["model"], options["data"]):
        raise QuestionError(
            f"{run} does not say what was asked, as studies of the command line do: give --model and --data"
        )
    study, protocol = open_study(run), kept_protocol(run)
    if protocol is None:
        raise FileFormatError(f"{run} is no study's folder: it has no protocol.json")
    selectors = {name: RULES[name](protocol.fraction) for name in protocol.selectors}
    if lacking := [name for name in selectors if name not in study.selections]:
        raise FileFormatError(f"{run} has no neurons of {', '.join(lacking)} in selections/: finish the study first")
    items = vn.ItemStatistics.load(run / "items")
    stats = items.group_by("group", condition="correct", balanced=True, seed=protocol.seed)
    questions, load = _opened(options)
    if options["general"] is not None:
        questions = questions + open_questions(options["general"], group_by=options["general_by"])
    answer = options["answer"] or protocol.answer
    page = write_explorer(
        study.knockout,
        out or run / "explorer",
        questions if answer is None else questions.asked(answer=answer),
        {name: study.selections[name] for name in selectors},
        model=load(),
        stats=stats,
        items=items,
        selectors=selectors,
        main=protocol.main,
        strongest=strongest,
        images=images == "thumbnails",
        batch_size=options["batch_size"],
        progress=not quiet,
    )
    sys.stdout.write(f"{page}\n")


@_command()
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
        placed = {"dtype": dtype or "auto", "device_map": device_map}
        build = functools.partial(_with_weights, **placed) if run else _without_weights
        model, processor = _loaded(name, lambda: build(name, revision))
    except ArchitectureError as error:
        nearest = difflib.get_close_matches(re.sub(r"\W", "_", name).lower(), mapped_types(), n=1, cutoff=0.8)
        hint = f"Is the model type {nearest[0]} meant? " if nearest and not os.path.isdir(name) else ""
        sys.stderr.write(f"{str(error).replace('loaded. ', f'loaded. {hint}', 1)}\n")
        return 2
    built = time.perf_counter()
    try:
        description = check_architecture(model, processor) if run else describe_architecture(model)
    except VLMNeuronsError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    took = f"model built in {built - start:.1f} s, looked through in {time.perf_counter() - built:.1f} s"
    verdict = "The contract holds" if run else "Found without weights; --run checks the values"
    sys.stdout.write(f"{description}\n{verdict} ({took}).\n")
    return 0


# -- what commands share -----------------------------------------------------------------------------------------------


def _without_weights(name: str, revision: str | None) -> "tuple[nn.Module, None]":
    """The model at full size, but without weights and processor."""
    from vlmneurons.testing.architectures import mapped_model, mapped_types

    if name in mapped_types() and not os.path.isdir(name):
        return mapped_model(name), None
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config), None


def _with_weights(name: str, revision: str | None, **placed: object) -> "tuple[nn.Module, Any]":
    """The model with its weights, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmneurons.testing.architectures import mapped_types

    if name in mapped_types() and not os.path.isdir(name):
        raise ValueError("a model type has no weights; give a model on the Hub or a folder, or leave out --run")
    model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, **placed)
    return model.eval(), AutoProcessor.from_pretrained(name, revision=revision)


def _opened(options: Keywords) -> "tuple[vn.QuestionSet, Callable[[], vn.VLM]]":
    """The questions of a command, and how to load its model, once all that is cheap to refuse is refused."""
    name, revision = options["model"], options["revision"]
    elsewhere = options["remote"] not in (None, "local")
    placed = {"revision": revision, "dtype": options["dtype"], "device_map": options["device_map"]}
    if elsewhere and (options["dtype"], options["device_map"]) != (None, None):
        raise ArchitectureError("--dtype and --device-map are for a model that is loaded here, not for --remote")
    _check_model(name, **placed)
    vllm = _vllm_options(options)
    choice = {name: options[name] for name in _CHOICE}
    on_error = options.get("on_error") or "raise"
    questions = open_questions(options["data"], revision=options["data_revision"], on_error=on_error, **choice)
    if elsewhere:
        return questions, lambda: _loaded(name, lambda: vn.VLM.from_pretrained(name, revision=revision, weights=False))
    return questions, lambda: open_model(name, **placed, **vllm)


_CHOICE = ("language", "group_by", "min_items", "per_group", "seed")
"""Options that choose and group the questions of a source."""


def _questions_of_study(run: Path) -> "vn.QuestionSet":
    """The questions of a study, from where it had them."""
    if not (kept := _read_command(run)):
        raise QuestionError(f"{run} does not say what was asked, as studies of the command line do")
    choice = {name: kept[name] for name in _CHOICE}
    questions = open_questions(kept["data"], revision=kept["data_revision"], on_error="skip", **choice)
    if kept["general"] is None:
        return questions
    return questions + open_questions(kept["general"], group_by=kept["general_by"])


def _one_side(questions: "vn.QuestionSet", side: str, options: Keywords) -> "vn.QuestionSet":
    """The questions of one side of the split, read as the command says."""
    if side != "all":
        total, place = len(questions), ("identify", "evaluate").index(side)
        questions = questions.split(options["share"], seed=options["seed"])[place]
        log.info("%d of %d questions: the side to %s on; --side all takes all", len(questions), total, side)
    return questions if options["answer"] is None else questions.asked(answer=options["answer"])


def _asking_options(options: Keywords, part: str | None) -> Keywords:
    """The arguments of a function that asks questions; refuses those that do not fit together."""
    from vlmneurons.run.ask import Options

    asking = {"batch_size": options["batch_size"], "part": part, "distributed": _processes() > 1}
    asking |= {"progress": not options["quiet"], "remote": options["remote"] or False}
    if part is not None:  # processes that share a run find each other only when the model is there
        Options(**asking)
    return asking


def _vllm_options(options: Keywords) -> Keywords:
    """The arguments of `open_model` for vLLM, none for another engine; refuses options that vLLM would not obey."""
    sizes = {name: options[name] for name in ("tensor_parallel_size", "max_model_len") if options[name] is not None}
    if options["engine"] != "vllm":
        for name in sizes:
            raise ArchitectureError(f"--{name.replace('_', '-')} is of --engine vllm, which is not given")
        return {}
    from vlmneurons.run.vllm.server import installed_version

    if _is_demo(options["model"]):
        raise ArchitectureError(f"{options['model']} is embedded and runs here: leave out --engine")
    for name, why in {
        "device_map": "vLLM places the weights itself, on as many GPUs as --tensor-parallel-size says",
        "remote": "a model is held by one of the two",
    }.items():
        if options[name] is not None:
            raise ArchitectureError(f"--{name.replace('_', '-')} with --engine vllm: {why}; leave one out")
    if _processes() > 1:
        raise ArchitectureError("--engine vllm starts its own processes: start one, without torchrun, or use --part")
    for name, size in sizes.items():
        as_whole(f"--{name.replace('_', '-')}", size, ArchitectureError, least=1)
    installed_version()
    return {"engine": "vllm", **sizes}


def _as_text(table: "pd.DataFrame") -> str:
    """A table of effects as it is printed: numbers as in a report, where p below 0.001 and rounding noise read so."""
    from vlmneurons.look.numbers import printed, printed_p

    numbers = table.select_dtypes("float").columns
    shown = {name: printed_p if name.endswith("_p") else functools.partial(printed, digits=3) for name in numbers}
    return table.to_string(index=False, formatters=shown, na_rep="–")
