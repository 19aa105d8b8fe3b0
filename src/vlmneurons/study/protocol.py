"""The whole study in one call: identify, select, switch off, control, report, in a folder that survives kills.

`run_study` is a short sequence of this library's public functions; whoever wants another study copies it and changes
what is theirs. Each step keeps its own files under the folder and is skipped where they are whole:

    items/        counts of every identification question        (`record_items`)
    selections/   the neurons of every selector
    knockout/     every answer of every question and mask         (`knockout`)
    blind/        answers without pictures, clean
    options-only/ answers to the options alone, clean
    report/       page, figures and tables                        (`KnockoutResult.report`)
"""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlmneurons.checks import Keywords, as_fraction, as_names, as_number, as_path, as_plain, as_whole, check_kind
from vlmneurons.errors import MismatchError, QuestionError, SelectionError
from vlmneurons.files.atomic import write_text
from vlmneurons.files.folders import git_state
from vlmneurons.model.encoder import TOKEN_RULES
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.progress import Step, Steps
from vlmneurons.questions.sets import ANSWERS, QuestionSet
from vlmneurons.recording.items import record_items
from vlmneurons.recording.record import CONDITIONS
from vlmneurons.run.processes import Processes, current_processes
from vlmneurons.run.remote import Remote
from vlmneurons.selectors import CAS, LAP, LAPE, MAD, Selector
from vlmneurons.statistics.items import ItemStatistics
from vlmneurons.study.controls import (
    blind,
    condition_masks,
    fraction_sweep,
    item_sweep,
    options_only,
    random_controls,
    strength_sweep,
)
from vlmneurons.study.design import crossing
from vlmneurons.study.knockout import knockout
from vlmneurons.study.masks import Mask, Masks
from vlmneurons.study.result import KnockoutResult

log = logging.getLogger(__name__)

SELECTORS: Mapping[str, Callable[[float], Selector]] = {
    "LAP": LAP,
    "LAPE": LAPE,
    "MAD": MAD,
    "CAS": CAS,
    "MAD-mean": functools.partial(MAD, on="mean"),
}
"""The selectors of the paper, by name; of MAD also the reading that its deviations are of magnitudes."""


@dataclass(frozen=True)
class Protocol:
    """The settings of a study; the defaults are those of the papers where they say them.

    Attributes:
        selectors: names in `SELECTORS`: of ``"MAD-mean"``, MAD on mean activations, sums are recorded too.
        fraction: share of all neurons in each mask (r).
        main: the selector that is swept and controlled.
        fractions: r of the sweep.
        alphas: strengths of the sweep; neurons are scaled by ``1 + alpha``.
        sizes: numbers of identification questions a group of the sweep; those that a group does not have are left out.
        conditions: other identification conditions to compare with.
        others: masks of other groups that each evaluation question meets; None for all of them. 2 asks 4 runs a
            question and selector instead of one for each group; see `vlmneurons.study.design`.
        repeats: random masks of each kind, at least 5 for a study that is to be published.
        permutations: shuffles of the labels for the null of the selection; None for as many as a corrected p needs, 0
            for none.
        share: share of the questions that neurons are identified on.
        minimum: questions a group must have among those that identify; fewer are refused.
        tokens: which tokens count; see `record`.
        answer: how answers are read; None for the way of the questions.
        on_error: ``"raise"`` or ``"skip"`` questions that cannot be asked.
        batch_size: questions a forward.
        seed: of the split, the random masks, and all resampling.
    """

    selectors: tuple[str, ...] = ("LAP", "LAPE", "MAD", "CAS")
    fraction: float = 0.005
    main: str = "CAS"
    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02)
    alphas: tuple[float, ...] = (-1.0, -0.5, 0.5, 1.0)
    sizes: tuple[int, ...] = (5, 10, 25, 50, 100)
    conditions: tuple[str, ...] = ("all", "wrong")
    others: int | None = None
    repeats: int = 5
    permutations: int | None = None
    share: float = 0.5
    minimum: int = 5
    tokens: str = "content"
    answer: str | None = None
    on_error: str = "raise"
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("selectors", "conditions"):
            as_names(name, getattr(self, name), SelectionError)
        for name in ("fractions", "alphas", "sizes"):
            check_kind(name, getattr(self, name), Sequence, SelectionError, "a list of numbers")
        unknown = [name for name in (*self.selectors, self.main) if name not in SELECTORS]
        if unknown:
            raise SelectionError(f"selector {unknown[0]!r} does not exist; choose from {', '.join(SELECTORS)}")
        if self.main not in self.selectors:
            raise SelectionError(f"main={self.main!r} is not among the selectors {', '.join(self.selectors)}")
        # What is wrong is said before hours of recording, not after them.
        for fraction in (self.fraction, *self.fractions):
            if not 0 < as_number("fraction", fraction, SelectionError) <= 1:
                raise SelectionError(f"fraction {fraction} is outside (0, 1]")
        for alpha in self.alphas:
            as_number("each of alphas", alpha, SelectionError)
        for size in self.sizes:
            if as_whole("each of sizes", size, SelectionError) < 1:
                raise SelectionError(f"sizes are numbers of questions, at least 1; got {list(self.sizes)}")
        numbers = (("repeats", 0), ("permutations", 0), ("minimum", 0), ("batch_size", 1), ("seed", 0), ("others", 1))
        for name, least in numbers:
            if not (getattr(self, name) is None and name in ("permutations", "others")):
                as_whole(name, getattr(self, name), SelectionError, least=least)
        as_fraction("share", self.share, SelectionError)
        for name, given, allowed in (
            *(("conditions", condition, CONDITIONS) for condition in self.conditions),
            ("tokens", self.tokens, TOKEN_RULES),
            ("answer", self.answer, (None, *ANSWERS)),
            ("on_error", self.on_error, ("raise", "skip")),
        ):
            if given not in allowed:
                raise SelectionError(
                    f"{name}={given!r} does not exist; choose from {', '.join(str(one) for one in allowed)}"
                )
        for name, given in vars(self).items():  # the study's folder keeps them as JSON
            several = isinstance(given, Sequence) and not isinstance(given, str)
            object.__setattr__(self, name, tuple(map(as_plain, given)) if several else as_plain(given))


@dataclass(frozen=True)
class StudyResult:
    """What `run_study` gives.

    Attributes:
        knockout: answers and effects of all masks.
        others: clean answers under controls of the questions: ``"blind"``, ``"options only"``.
        selections: the neurons of each selector.
        tables: further tables, such as the null of the selection.
        page: the report.
    """

    knockout: KnockoutResult
    others: Mapping[str, KnockoutResult]
    selections: Mapping[str, Selection]
    tables: "Mapping[str, pd.DataFrame]" = field(default_factory=dict)
    page: Path | None = None


def run_study(
    model: VLM,
    questions: QuestionSet,
    folder: str | Path,
    protocol: Protocol | None = None,
    *,
    general: QuestionSet | None = None,
    distributed: bool = False,
    progress: bool = True,
    remote: Remote = False,
    images: bool = True,
) -> StudyResult:
    """Run, or go on with, a whole study in a folder.

    Args:
        model: the model.
        questions: all questions; they are split into those that identify and those that evaluate.
        folder: where everything is kept. The same call goes on where a killed one stopped.
        protocol: the settings.
        general: questions that measure general ability, asked under every mask.
        distributed: share the work with the other processes of a ``torchrun``.
        progress: show one progress bar over all steps, with the time that is left.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`.
        images: show thumbnails in the report; False for pictures that may not be shared.

    Returns:
        The selections, the answers under every mask, further tables, and the path of the report.

    Raises:
        MismatchError: the folder holds another study, or another process is running in it; there are fewer masks than
            ``protocol.others``, or these would leave cells without a picture.
        SelectionError: a group has too few identification questions that meet the condition.
        QuestionError: a group has fewer identification questions than ``protocol.minimum``.
    """
    protocol = protocol or Protocol()
    check_model(model)
    check_kind("questions", questions, QuestionSet, QuestionError)
    check_kind("protocol", protocol, Protocol, SelectionError)
    folder = as_path("folder", folder, MismatchError)
    processes = current_processes() if distributed else Processes()
    if protocol.answer is not None:
        questions = questions.asked(answer=protocol.answer)
        general = None if general is None else general.asked(answer=protocol.answer)
    identify, evaluate = questions.split(protocol.share, seed=protocol.seed)
    # A design that cannot be is refused before anything is recorded, or kept.
    own = [Mask(protocol.main, 0, group, 1) for group in questions.groups]
    crossing(evaluate, own, others=protocol.others, seed=protocol.seed)
    thin = [f"{group} ({n})" for group, n in identify.counts().items() if n < protocol.minimum]
    if thin:
        raise QuestionError(
            f"at least {protocol.minimum} questions a group identify neurons; fewer in {', '.join(thin)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if processes.first:
        _note_protocol(folder, protocol)
    processes.wait()
    log.info("recording %d identification questions", len(identify))
    with Steps(_steps(identify, evaluate, protocol), disable=not (progress and processes.first)) as steps:
        how: Keywords = {"distributed": distributed, "remote": remote, "images": images}
        return _carried_out(model, identify, evaluate, folder, protocol, processes, general, steps, **how)


def _steps(identify: QuestionSet, evaluate: QuestionSet, protocol: Protocol) -> list[Step]:
    """The steps of a study, and what they will cost, for its progress bar."""
    kinds = len(protocol.selectors) + 2 * protocol.repeats + len(protocol.fractions) + len(protocol.alphas)
    kinds += len(protocol.sizes) + len(protocol.conditions)
    answers = len(evaluate) * (1 + kinds * len(evaluate.groups))
    return [
        Step("identification questions", len(identify), forwards=1.0),
        # Masks share what lies before them; how much that spares is only known once they run.
        Step("answers under masks", answers, forwards=0.3),
        Step("blind questions", len(evaluate), forwards=0.7),
        Step("options only", len(evaluate), forwards=0.5),
        Step("shuffled labels", 1, seconds=0.1 * (200 if protocol.permutations is None else protocol.permutations)),
        Step("report", 1, seconds=60.0),
    ]


def _carried_out(
    model: VLM,
    identify: QuestionSet,
    evaluate: QuestionSet,
    folder: Path,
    protocol: Protocol,
    processes: Processes,
    general: QuestionSet | None,
    steps: Steps,
    *,
    distributed: bool,
    remote: Remote,
    images: bool,
) -> StudyResult:
    """The steps one after the other, each skipped where its files are whole."""
    shown = not steps.hidden
    items = record_items(
        model,
        identify,
        folder / "items",
        tokens=protocol.tokens,
        magnitudes="MAD-mean" in protocol.selectors,
        batch_size=protocol.batch_size,
        on_error=protocol.on_error,
        progress=shown and steps["identification questions"],
        remote=remote,
        distributed=distributed,
    )
    steps["identification questions"].finish()
    selections, masks = study_masks(items, protocol)
    if processes.first:
        (folder / "selections").mkdir(exist_ok=True)
        for name, selection in selections.items():
            selection.save(folder / "selections" / f"{name}.safetensors")
    log.info("asking %d evaluation questions under %d kinds of masks", len(evaluate), len(masks))
    how: Keywords = {
        "batch_size": protocol.batch_size,
        "on_error": protocol.on_error,
        "distributed": distributed,
        "remote": remote,
    }

    def asked(name: str, questions: QuestionSet, masks: Masks, part: str, **more: Any) -> KnockoutResult:
        found = knockout(model, questions, masks, folder=folder / part, progress=shown and steps[name], **how, **more)
        steps[name].finish()
        return found

    crossed = {"others": protocol.others, "seed": protocol.seed}
    result = asked("answers under masks", evaluate, masks, "knockout", controls=general, **crossed)
    nothing = {"none": NeuronSet.empty(items.space)}
    others = {}
    if any(item.options or item.sources for item in evaluate):
        others["blind"] = asked("blind questions", blind(evaluate), nothing, "blind")
    if all(item.options for item in evaluate):  # open questions have none to be asked with
        others["options only"] = asked("options only", options_only(evaluate), nothing, "options-only")
    tables = {}
    steps["shuffled labels"].start(1)
    if protocol.permutations != 0 and processes.first:
        from vlmneurons.trust.nulls import null_distribution

        selector = SELECTORS[protocol.main](protocol.fraction)
        how = {"permutations": protocol.permutations, "balanced": True, "seed": protocol.seed}
        try:
            tables[NULL] = null_distribution(items, selector, **how)
        except SelectionError as error:  # too few pictures for any p: the study's other results stand without it
            log.warning("the selection has no null: %s", error)
            tables[NULL] = pd.DataFrame({"there is none": [str(error)]})
    steps["shuffled labels"].finish()
    page = None
    steps["report"].start(1)
    if processes.first:
        log.info("writing the report")
        given: Keywords = {"others": others, "tables": tables, "selections": selections, "images": images}
        every = evaluate if general is None else evaluate + general
        given |= {"main": protocol.main, "questions": every, "settings": told_of(protocol)}
        page = result.report(folder / "report", **given)
    steps["report"].finish()
    processes.wait()
    return StudyResult(result, others, selections, tables, page)


NULL = "null of the selection"
"""The table of shuffled labels, by its name in a report."""


def told_of(protocol: Protocol) -> dict[str, str]:
    """Lines of a report's head: the split, and the seeds of all that is drawn.

    Args:
        protocol: the settings.
    """
    first, last = protocol.seed, protocol.seed + protocol.repeats - 1
    random = f"; random masks: {first} to {last}" if protocol.repeats > 1 else ""
    return {
        "Split": f"{100 * protocol.share:g} % of the questions choose neurons, the others are asked under masks; each "
        "picture is on one side",
        "Seeds": f"split, balancing and shuffled labels: {first}{random}",
    }


def study_masks(items: ItemStatistics, protocol: Protocol) -> tuple[dict[str, Selection], Masks]:
    """The selection of every selector, and all masks of a study: selections, random controls and sweeps.

    Args:
        items: counts of every identification question.
        protocol: the settings.
    """
    seed = protocol.seed
    stats = items.group_by("group", condition="correct", balanced=True, seed=seed)
    selections = {name: SELECTORS[name](protocol.fraction).select(stats) for name in protocol.selectors}
    main, selector = protocol.main, SELECTORS[protocol.main](protocol.fraction)
    least = min(int(n) for n in stats.items.tolist())
    sizes = [size for size in protocol.sizes if size < least] + [least]
    fractions = [r for r in protocol.fractions if int(r * len(items.space) + 1e-6) >= 1]
    masks: Keywords = {
        **selections,
        **(random_controls(stats, {main: selections[main]}, repeats=n, seed=seed) if (n := protocol.repeats) else {}),
        **fraction_sweep(main, selector, stats, fractions),
        **strength_sweep(main, selections[main], protocol.alphas),
        **item_sweep(main, selector, items, sizes, seed=seed),
        **condition_masks(main, selector, items, protocol.conditions, seed=seed),
    }
    return selections, masks


def _note_protocol(folder: Path, protocol: Protocol) -> None:
    """Write the settings, or make sure that they are those of the study that is there."""
    path = folder / "protocol.json"
    ours = json.loads(json.dumps(asdict(protocol)))
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))["protocol"]
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise MismatchError(
                    f"{folder} holds a study with {name}={theirs.get(name)!r}, not {value!r}: give another folder, or "
                    "the same settings to go on"
                )
        return
    write_text(path, json.dumps({"protocol": ours, "git": git_state()}, indent=1))
