"""Running a study: every question, clean and under every mask, each batch kept as soon as it is finished."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike

from vlmneurons.checks import JSON, JSONMapping, as_path
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.files.digests import digest_of
from vlmneurons.files.folders import RunFolder
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.progress import Progress
from vlmneurons.questions.identity import content_of, in_order_of
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.ask import Job, Options, ask, batches_of, engine_of, to_ask
from vlmneurons.run.engine import Engine, Run
from vlmneurons.run.identity import run_provenance, setting_of_run, versions
from vlmneurons.run.intervention import Intervention, Values
from vlmneurons.run.memory import MemoryLimit
from vlmneurons.run.readers import AnswerReader, Reading, checked
from vlmneurons.run.remote import Remote
from vlmneurons.study.design import Design, crossing
from vlmneurons.study.masks import Mask, Masks, listed_masks, per_layer
from vlmneurons.study.result import NOT_ASKED, RUN, KnockoutResult, chance_of


def knockout(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    masks: Masks,
    *,
    controls: QuestionSet | None = None,
    others: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    mode: str = "zero",
    factor: float | None = None,
    values: Values = None,
    at: str | None = None,
    on_error: str = "raise",
    folder: str | Path | None = None,
    distributed: bool = False,
    by_length: bool = False,
    prefetch: int | None = None,
    progress: Progress = True,
    remote: Remote = False,
    part: tuple[int, int] | str | None = None,
) -> KnockoutResult:
    """Ask every question with the model as it is and under every mask.

    Args:
        model: the model.
        questions: evaluation questions of at least two groups; they should share no picture with those that the
            neurons were identified on (`QuestionSet.split`).
        masks: what to switch off, by name: a `Selection` (one mask for each of its groups), a list of selections
            (repeats of one control, such as random seeds), a single `NeuronSet`, or any of these as an `Intervention`.
            Equal sets are run once.
        controls: further questions, whose groups no mask is of, that measure general ability, asked as the others are.
        others: masks of other groups that each question meets, besides its own group's; None for all of them. With
            k = 2 a study of 25 groups asks 4 runs a question and selector instead of 26; self effects are those of the
            full crossing, cross effects and gaps unbiased estimates of theirs. What is not asked is missing in the
            result, never zero. See `vlmneurons.study.design`.
        seed: of the draw of these masks.
        batch_size: questions a forward; where they do not fit into memory, half as many from then on (the provenance
            says so under ``"halved"``).
        answer: how answers are read; by default as the set says.
        mode: what is done to the neurons, with ``factor``, ``values`` and ``at``; see `Ablation`.
        factor: see `Ablation`.
        values: see `Ablation`.
        at: see `Ablation`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked (their ids are kept in the provenance).
        folder: keep every batch there as it is finished, and the result in the end. A run that is stopped or killed is
            gone on with by the same call; a finished one is read from its files.
        distributed: share the batches with the other processes of a ``torchrun``; each gets the whole result, which
            equals that of one process. With a folder, it must be one that all processes see.
        by_length: let questions of like length share a batch; see `record`.
        prefetch: how many batches a thread prepares (opens, resizes, tokenizes) while the model runs; by default 2, and
            none for a model on the CPU, whose cores the thread would take.
        progress: show a progress bar.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`. The manifest of
            a folder says it, so that answers from here and there are not mixed.
        part: ask a part of the batches alone: of ``"3/8"``, or ``(3, 8)``, every eighth, from the third on. Each part
            needs a folder of its own, which in the end holds its answers and no tables; `KnockoutResult.join` makes the
            whole of them, which equals an undivided run byte for byte.

    Returns:
        Every answer of every run, from which tables, tests and figures are computed.

    Raises:
        QuestionError: fewer than two groups; a question cannot be asked (``error.partial``, also of any other error
            or interrupt on the way, holds the result up to it).
        MismatchError: neurons of another model; a mask's group has no questions; the folder holds another run, or
            another process is running in it.
        OutOfMemoryError: a single question does not fit into memory.
    """
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote, distributed, part)
    if part is not None and folder is None:
        raise QuestionError("a part needs a folder, from which it is joined with the others")
    questions = to_ask(questions, answer)
    controls = None if controls is None else to_ask(controls, answer)
    asked = _asked(questions, controls)
    engine = engine_of(model, asked, remote)
    given = Intervention(NeuronSet.empty(model.space()), mode, factor, values, at)
    listed = listed_masks(masks, questions.groups, given)
    names = () if controls is None else controls.groups
    design = crossing(asked, [mask for mask, _ in listed], others=others, seed=seed, controls=names)
    about = {
        "intervention": {"mode": mode, "factor": factor, "at": at or "post", "values": values is not None},
        "selections": {str(name): _describe(one) for name, one in masks.items()},
    }
    study = _Study(engine, asked, names, listed, design, options, about)
    return study.alone() if folder is None else study.in_folder(as_path("folder", folder, MismatchError))


def _asked(questions: QuestionSet, controls: QuestionSet | None) -> QuestionSet:
    """All questions of a study, its own and the controls.

    Raises:
        QuestionError: groups that cannot be compared.
    """
    if len(questions.groups) < 2:
        raise QuestionError(
            "a knockout compares groups, and needs questions of at least two; "
            f"got {', '.join(questions.groups) or 'none'}"
        )
    asked = questions if controls is None else questions + controls
    if "all" in asked.groups:
        raise QuestionError("no group can be named 'all': the tables use that name for all groups together")
    both = sorted(set(questions.groups) & set(() if controls is None else controls.groups))
    if both:
        raise QuestionError(f"the control questions are of {', '.join(both)}, which the study's own questions are too")
    return asked


class _Study:
    """One study: its different runs, and how they become a result, alone or in a folder."""

    def __init__(
        self,
        engine: Engine,
        questions: QuestionSet,
        controls: tuple[str, ...],
        listed: list[tuple[Mask, Intervention]],
        design: Design,
        options: Options,
        about: Mapping[str, object],
    ) -> None:
        self.engine, self.questions, self.controls, self.listed = engine, questions, controls, listed
        self.asked_for = questions
        """The questions in the order of the design; a folder may keep them in another one."""
        self.design, self.options, self.about = design, options, about
        model = engine.model
        self.ablations: list[Ablation] = []
        self.run_of: list[int] = []
        """For each mask the run whose answers are its: equal masks share one, and an empty mask is the clean run, 0."""
        known: dict[str, int] = {}
        for _, one in listed:
            assert isinstance(one.neurons, NeuronSet)
            ablation = Ablation(model, one.neurons, one.mode, factor=one.factor, values=one.values, at=one.at)
            if len(one.neurons) == 0:
                self.run_of.append(0)
                continue
            if one.fingerprint not in known:
                self.ablations.append(ablation)
                known[one.fingerprint] = len(self.ablations)
            self.run_of.append(known[one.fingerprint])
        met = np.zeros((1 + len(self.ablations), len(questions)), dtype=bool)
        met[0] = True
        for row, run in enumerate(self.run_of):
            met[run] |= design.meets[row]
        self.runs_of = {item.id: tuple(np.flatnonzero(met[:, n]).tolist()) for n, item in enumerate(questions)}
        """The runs that each question meets, the clean one first."""
        engine.check(self.ablations, None)  # what cannot be done is refused before anything is asked
        self.setting = setting_of_run(model, questions=questions, engine=engine)

    def alone(self) -> KnockoutResult:
        """The whole study, in memory."""
        job = _AnswersJob(self, {}, {}, None)
        ask(job, self.questions, self.options)
        return self.result(*job.gathered())

    def in_folder(self, folder: Path) -> KnockoutResult:
        """The whole study, or what is left of it, kept in a folder."""
        content = content_of(self.questions)
        part, kept = self.options.dealt(self._mine)
        options = {"options": [len(item.options) for item in self.questions]} if part else {}
        about = {"ids": [item.id for item in self.questions], **options, **kept}
        run = RunFolder(folder, {**self._manifest(content), **part}, about)
        self._refuse_saved(run)
        if (folder / "knockout.json").exists():
            result = KnockoutResult.load(folder)
            run.tidy()
            return result
        known = run.known()
        if known is not None:  # batches are cut from the order in which the questions stood when it began
            self.questions = in_order_of(known["about"]["ids"], self.questions)
        processes = self.options.processes
        with run.opened() if processes.first else contextlib.nullcontext():
            processes.wait()  # nobody begins before the first process holds the folder
            parts = run.parts()
            job = _AnswersJob(self, parts, run.notes(), run)
            job.check(parts, run)
            processes.wait()  # nor before all know what was there
            ask(job, self.questions, self.options)
            result = self.result(*job.gathered())
            if processes.first:
                result.save(folder)
                run.clear()
            processes.wait()
        return result

    def _mine(self) -> list[str]:
        """Ids of the questions that are asked here."""
        all_of_it = list(batches_of(_AnswersJob(self, {}, {}, None), self.questions, self.options))
        return [item.id for _, batch in self.options.processes.mine(all_of_it) for item in batch]

    def _refuse_saved(self, run: RunFolder) -> None:
        """Refuse a folder that holds a result which no run in it made, such as one that was saved there."""
        if (run.folder / "knockout.json").exists() and not run.path.exists():
            raise MismatchError(
                f"{run.folder} holds a result that was saved there, and not a run that could be gone on with: open it "
                "with KnockoutResult.load, or give another folder"
            )

    def _manifest(self, content: Mapping[str, str]) -> JSON:
        """What must agree for a run to be gone on with."""
        options = self.options
        return {
            "kind": RUN,
            "setting": self.setting.to_json(),
            "versions": versions(),
            "content": content,
            "controls": list(self.controls),
            "batch_size": options.batch_size,
            **({} if self.design.others is None else {"design": self.design.digest, "others": self.design.others}),
            **({"by_length": True} if options.by_length else {}),
            "on_error": options.on_error,
            "masks": self._neurons(),
        }

    def _neurons(self) -> dict[str, str]:
        """What identifies the neurons of each selector's masks, and what is done to them."""
        masks: dict[str, list[str]] = {}
        for mask, one in self.listed:
            masks.setdefault(mask.selector, []).append(f"{mask.repeat} {mask.group} {one.fingerprint}")
        return {name: digest_of(all_of_it)[:16] for name, all_of_it in masks.items()}

    def result(self, parts: Mapping[str, pd.DataFrame], halved: JSONMapping) -> KnockoutResult:
        """The result of some batches, questions in their order, a row for each mask."""
        tables = [table for table in parts.values() if len(table)]
        answers = pd.concat(tables) if tables else pd.DataFrame(columns=_COLUMNS)
        skipped = set(answers.loc[answers["run"] < 0, "id"])
        answers = answers.loc[answers["run"] >= 0]
        there = set(answers["id"])
        kept = [item for item in self.questions if item.id in there]
        place = {item.id: number for number, item in enumerate(kept)}
        where = (answers["run"].to_numpy(np.int64), np.array([place[name] for name in answers["id"]], dtype=np.int64))
        rows = [0, *self.run_of]

        def stacked(name: str, dtype: DTypeLike) -> np.ndarray:
            table = np.full((1 + len(self.ablations), len(kept)), _NOTHING[name], dtype=dtype)
            table[where] = answers[name].to_numpy(dtype)
            return table[rows]

        texts = stacked("text", object)
        layers = list(per_layer(NeuronSet.empty(self.listed[0][1].neurons.space))) if self.listed else []
        of_all = [one for name in sorted(halved) for one in halved[name]]
        pictures = dict(zip((item.id for item in self.questions), self.questions.pictures(), strict=True))
        return KnockoutResult(
            ids=tuple(item.id for item in kept),
            groups=tuple(item.group for item in kept),
            answers=np.array([item.answer for item in kept], dtype=np.int64),
            masks=tuple(mask for mask, _ in self.listed),
            chosen=stacked("chosen", np.int64),
            margins=stacked("margin", np.float64),
            provenance={
                **run_provenance(self.engine.model, self.setting, questions=self.questions, engine=self.engine),
                "batch_size": self.options.batch_size,
                **({"halved": of_all} if of_all else {}),
                **({} if self.design.others is None else {"others": self.design.others, "design": self.design.digest}),
                **self.about,
                "masks": self._neurons(),
                "layers": layers,
                "chance": chance_of([len(item.options) for item in kept]),
                "skipped": [item.id for item in self.questions if item.id in skipped],
                **({} if self.options.part is None else {"part": str(self.options.processes)}),
            },
            texts=None if all(value is None or value is pd.NA for value in texts.flat) else texts,
            controls=self.controls,
            pictures=tuple(pictures[item.id] for item in kept),
            asked=self._asked(kept),
            scores=stacked("score", np.float64) if self.engine.reader.grades else None,
        )

    def _asked(self, kept: Sequence[Question]) -> np.ndarray | None:
        """``[1 + mask, question]`` which of the masks each question was asked under; None for all."""
        if self.design.others is None:
            return None
        column = {item.id: number for number, item in enumerate(self.asked_for)}
        meets = self.design.meets[:, [column[item.id] for item in kept]]
        return np.concatenate([np.ones((1, len(kept)), dtype=bool), meets])


class _AnswersJob(Job[pd.DataFrame]):
    """Keeps each batch's answers, clean and under every different mask, as a table, in a folder or in memory.

    Columns: ``run``, ``id``, ``chosen``, ``margin``, ``text``, ``score``; what cannot be asked has the run -1.
    """

    unit = "answer"

    def __init__(
        self,
        study: _Study,
        known: Mapping[str, pd.DataFrame],
        halved: Mapping[str, list[JSON]],
        folder: RunFolder | None,
    ) -> None:
        super().__init__(study.engine)
        self._study, self._folder = study, folder
        self._ablations = [None, *study.ablations]
        self._known = dict(known)
        self._new: dict[str, pd.DataFrame] = {}
        self._halved = {name: list(all_of_it) for name, all_of_it in halved.items()}
        """How each batch was halved for want of memory, in this session or an earlier one of the same folder."""
        self.limit = MemoryLimit([one for name in sorted(halved) for one in halved[name]])
        self._noted = len(self.limit.halved)
        self._batch: list[pd.DataFrame] = []

    def apart(self, question: Question) -> tuple[int, ...]:
        """See `Job.apart`: where the engine wants it so, questions of a batch meet the same masks."""
        return () if self.engine.ragged else self._study.runs_of[question.id]

    def weight(self, batch: QuestionSet) -> int:
        """See `Job.weight`: answers."""
        return sum(len(self._study.runs_of[item.id]) for item in batch)

    def known(self, number: int, batch: QuestionSet) -> bool:
        """See `Job.known`."""
        return _name(number) in self._known

    def run(self, questions: QuestionSet, encoded: object, told: Callable[[int], object]) -> pd.DataFrame:
        """See `Job.run`."""
        readings: dict[int, Reading] = {}
        meeting: dict[int, list[int]] = {}
        for place, item in enumerate(questions):
            for number in self._study.runs_of[item.id]:
                meeting.setdefault(number, []).append(place)
        numbers = sorted(meeting)
        whole = all(len(rows) == len(questions) for rows in meeting.values())
        runs = [Run(self._ablations[number], None if whole else tuple(meeting[number])) for number in numbers]
        try:
            for number, reading in zip(numbers, self.engine.answers(questions, encoded, runs), strict=True):
                asked = [questions[place] for place in meeting[number]]
                readings[number] = checked(reading, self.engine.reader, asked)
                told(len(meeting[number]))
            return _table(questions, meeting, readings)
        except (RuntimeError, MemoryError):  # it may be asked again in smaller parts
            told(-sum(len(meeting[number]) for number in readings))
            raise

    def take(self, number: int, questions: QuestionSet, made: pd.DataFrame) -> int:
        """See `Job.take`."""
        self._batch.append(made)
        return 0

    def finish(self, number: int, batch: QuestionSet) -> None:
        """See `Job.finish`."""
        asked = {name for table in self._batch for name in table["id"]}
        skipped = [item.id for item in batch if item.id not in asked]
        if skipped:
            nothing = {"run": -1, "id": skipped, "chosen": -1, "margin": np.nan, "text": None, "score": np.nan}
            self._batch.append(pd.DataFrame(nothing, columns=_COLUMNS).astype(_DTYPES))
        table = pd.concat(self._batch)
        name = _name(number)
        if halved := self.limit.halved[self._noted :]:
            self._halved.setdefault(name, []).extend(halved)
            self._noted = len(self.limit.halved)
        if self._folder is not None:
            if name in self._halved:
                self._folder.note(name, self._halved[name])
            self._folder.write(name, table)
        self._new[name] = table

    def forget(self) -> None:
        """See `Job.forget`."""
        self._batch = []

    def partial(self) -> KnockoutResult:
        """See `Job.partial`."""
        return self._study.result({**self._known, **self._new}, self._halved)

    def gathered(self) -> tuple[dict[str, pd.DataFrame], dict[str, list[JSON]]]:
        """Every process's batches, and how they were halved."""
        processes = self._study.options.processes
        for theirs in processes.gather(self._halved):
            self._halved.update(theirs)
        parts = {name: table for part in processes.gather(self._new) for name, table in part.items()}
        return {**self._known, **parts}, self._halved

    def check(self, parts: Mapping[str, pd.DataFrame], folder: RunFolder) -> None:
        """Refuse kept batches that are not what the manifest says.

        Raises:
            FileFormatError: one is not.
        """
        all_of_it = batches_of(self, self._study.questions, self._study.options)
        expected = {_name(number): {item.id for item in batch} for number, batch in enumerate(all_of_it)}
        for name, table in parts.items():
            if list(table.columns) != _COLUMNS or set(table["id"]) != expected.get(name):
                raise FileFormatError(
                    f"{folder.folder / 'parts' / name}.parquet does not hold its batch: delete it, and it is run again"
                )


_DTYPES = {"run": "int32", "id": "string", "chosen": "int16", "margin": "float64", "text": "string", "score": "float64"}
_COLUMNS = list(_DTYPES)
_NOTHING: dict[str, Any] = {"chosen": NOT_ASKED, "margin": np.nan, "text": None, "score": np.nan}


def _name(number: int) -> str:
    return f"batch-{number:06d}"


def _table(
    questions: QuestionSet, meeting: Mapping[int, Sequence[int]], readings: Mapping[int, Reading]
) -> pd.DataFrame:
    """The answers to the questions that meet each run, run by run."""
    asked = {number: [questions[place] for place in meeting[number]] for number in readings}
    chosen = [choice for reading in readings.values() for choice in reading.chosen]
    texts = [text for reading in readings.values() for text in (reading.texts or [None] * len(reading.chosen))]
    return pd.DataFrame(
        {
            "run": np.repeat(list(asked), list(map(len, asked.values()))),
            "id": [item.id for items in asked.values() for item in items],
            "chosen": [-1 if choice is None else choice for choice in chosen],
            "margin": np.concatenate([readings[number].margins(items).numpy() for number, items in asked.items()]),
            "text": texts,
            "score": np.concatenate([_scores(readings[number], len(items)) for number, items in asked.items()]),
        },
        columns=_COLUMNS,
    ).astype(_DTYPES)


def _describe(given: Any) -> object:
    if isinstance(given, Selection | NeuronSet | Intervention):
        return repr(given)
    return [repr(one) for one in given]


def _scores(reading: Reading, n: int) -> np.ndarray:
    """The grades of a reading; NaN where it has none."""
    return np.full(n, np.nan) if reading.graded is None else np.asarray(reading.graded, dtype=np.float64)
