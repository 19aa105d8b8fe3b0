"""Running a study: every question, clean and under every mask, each batch kept as soon as it is finished."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlmneurons.checks import JSON, JSONMapping, as_path
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.files.digests import digest_of
from vlmneurons.files.folders import RunFolder, manifest_in
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
from vlmneurons.study.effects import NO_GROUP
from vlmneurons.study.masks import Mask, Masks, listed_masks
from vlmneurons.study.result import RUN, TABLES, KnockoutResult, chance_accuracy


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
            others = 2 a study of 25 groups asks each question 4 times for a selector instead of 26 times; self effects
            are those of the full crossing, and cross effects and gaps unbiased estimates of theirs. What is not asked
            is missing in the result, never zero. See `vlmneurons.study.design`.
        seed: of the draw of these masks.
        batch_size: questions a forward; where they do not fit into memory, half as many from then on (the provenance
            says so under ``"halved"``).
        answer: how answers are read; by default as the set says.
        mode: what is done to the neurons, with ``factor``, ``values`` and ``at``; see `Ablation`.
        factor: see `Ablation`.
        values: see `Ablation`.
        at: see `Ablation`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked (their ids are kept in the provenance).
        folder: keep every batch there as it is finished, and the result in the end. The same call goes on with a run
            that was stopped or killed, and reads a finished one from its files.
        distributed: share the batches with the other processes of a ``torchrun``; each gets the whole result, which
            equals that of one process. With a folder, it must be one that all processes see.
        by_length: let questions of like length share a batch; see `record`.
        prefetch: how many batches a thread prepares (opens, resizes, tokenizes) while the model runs; by default 2, and
            none for a model on the CPU, whose cores the thread would take.
        progress: show a progress bar.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`. A folder's
            manifest says it, so that local and remote answers are not mixed.
        part: ask only a part of the batches: ``"3/8"``, or ``(3, 8)``, is every eighth batch from the third on. Each
            part needs a folder of its own, which in the end holds its answers and no tables; `KnockoutResult.join`
            makes the whole of them, which equals an undivided run byte for byte.

    Returns:
        Every answer of every run, from which tables, tests and figures are computed.

    Raises:
        QuestionError: fewer than two groups; a question cannot be asked. The ``partial`` of this error, and of any
            other error or interrupt on the way, is the result of what was finished before.
        MismatchError: neurons of another model; a mask's group has no questions; the folder holds another run, or
            another process is running in it.
        OutOfMemoryError: a single question does not fit into memory.
    """
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote, distributed, part)
    if part is not None and folder is None:
        raise QuestionError("a part needs a folder, from which it is joined with the others")
    questions = to_ask(questions, answer)
    controls = None if controls is None else to_ask(controls, answer)
    all_questions = _with_controls(questions, controls)
    engine = engine_of(model, all_questions, remote)
    action = Intervention(NeuronSet.empty(model.space()), mode, factor, values, at)
    listed = listed_masks(masks, questions.groups, action)
    names = () if controls is None else controls.groups
    design = crossing(all_questions, [mask for mask, _ in listed], others=others, seed=seed, controls=names)
    about = {
        "intervention": {"mode": mode, "factor": factor, "at": at or "post", "values": values is not None},
        "selections": {
            str(name): repr(entry)
            if isinstance(entry, Selection | NeuronSet | Intervention)
            else [repr(repeat) for repeat in entry]
            for name, entry in masks.items()
        },
    }
    study = _Study(engine, all_questions, names, listed, design, options, about)
    return study.in_memory() if folder is None else study.in_folder(as_path("folder", folder, MismatchError))


def _with_controls(questions: QuestionSet, controls: QuestionSet | None) -> QuestionSet:
    """All questions of a study, its own and the controls.

    Raises:
        QuestionError: groups that cannot be compared.
    """
    if len(questions.groups) < 2:
        raise QuestionError(
            "a knockout compares groups, and needs questions of at least two; "
            f"got {', '.join(questions.groups) or 'none'}"
        )
    together = questions if controls is None else questions + controls
    if NO_GROUP in together.groups:
        raise QuestionError("no group can be named 'all': the tables use that name for all groups together")
    both = sorted(set(questions.groups) & set(() if controls is None else controls.groups))
    if both:
        raise QuestionError(f"the control questions are of {', '.join(both)}, which the study's own questions are too")
    return together


class _Study:
    """One study: its different runs, and how their answers become a result, in memory or in a folder."""

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
        self.design, self.design_questions = design, questions
        """The questions of the design's columns: those of the study, which a folder may keep in another order."""
        self.options, self.about = options, about
        model = engine.model
        self.ablations: list[Ablation] = []
        self.mask_runs: list[int] = []
        """For each mask the run that gives its answers: equal masks share one; an empty mask is the clean run, 0."""
        runs: dict[str, int] = {}
        for _, mask in listed:
            assert isinstance(mask.neurons, NeuronSet)
            ablation = Ablation(model, mask.neurons, mask.mode, factor=mask.factor, values=mask.values, at=mask.at)
            if len(mask.neurons) == 0:
                self.mask_runs.append(0)
                continue
            if mask.fingerprint not in runs:
                self.ablations.append(ablation)
                runs[mask.fingerprint] = len(self.ablations)
            self.mask_runs.append(runs[mask.fingerprint])
        met = np.zeros((1 + len(self.ablations), len(questions)), dtype=bool)
        met[0] = True
        for row, run in enumerate(self.mask_runs):
            met[run] |= design.meets[row]
        self.question_runs = {
            question.id: tuple(np.flatnonzero(met[:, n]).tolist()) for n, question in enumerate(questions)
        }
        """The runs that each question meets, the clean one first."""
        engine.check(self.ablations, None)  # what cannot be done is refused before anything is asked
        self.setting = setting_of_run(model, questions=questions, engine=engine)

    def in_memory(self) -> KnockoutResult:
        """The result of the whole study."""
        job = _AnswersJob(self)
        ask(job, self.questions, self.options)
        return self.result(*job.gathered())

    def in_folder(self, folder: Path) -> KnockoutResult:
        """The result of the whole study, or of what is left of it, kept in a folder."""
        content = content_of(self.questions)
        part, asked_here = self.options.dealt(self._ids_asked_here)
        numbers = {"options": [len(question.options) for question in self.questions]} if part else {}
        about = {"ids": [question.id for question in self.questions], **numbers, **asked_here}
        run = RunFolder(folder, {**self._manifest(content), **part}, about)
        self._refuse_saved(run)
        if (folder / "knockout.json").exists():
            result = KnockoutResult.load(folder)
            run.tidy()
            return result
        manifest = manifest_in(run.folder)
        if manifest is not None:  # batches are cut from the order that the questions had when the run began
            self.questions = in_order_of(manifest["about"]["ids"], self.questions)
        processes = self.options.processes
        with run.opened() if processes.first else contextlib.nullcontext():
            processes.wait()  # no process begins before the first holds the folder
            job = _AnswersJob(self, run)
            job.check_parts(run)
            processes.wait()  # nor before all know which batches are finished
            ask(job, self.questions, self.options)
            result = self.result(*job.gathered())
            if processes.first:
                result.save(folder)
                run.clear()
            processes.wait()
        return result

    def _ids_asked_here(self) -> list[str]:
        """Ids of the questions that this process asks."""
        batches = list(batches_of(_AnswersJob(self), self.questions, self.options))
        return [question.id for _, batch in self.options.processes.mine(batches) for question in batch]

    def _refuse_saved(self, run: RunFolder) -> None:
        """Refuse a folder that holds a result that no run in it made, such as one that was saved there."""
        if (run.folder / "knockout.json").exists() and not run.path.exists():
            raise MismatchError(
                f"{run.folder} holds a result that was saved there, and not a run that could be gone on with: open it "
                "with KnockoutResult.load, or give another folder"
            )

    def _manifest(self, content: Mapping[str, str]) -> JSON:
        """What must be the same for a run to be resumed."""
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
            "masks": self._mask_digests(),
        }

    def _mask_digests(self) -> dict[str, str]:
        """For each selector a digest of its masks: of their neurons, and of what is done to them."""
        masks: dict[str, list[str]] = {}
        for mask, intervention in self.listed:
            masks.setdefault(mask.selector, []).append(f"{mask.repeat} {mask.group} {intervention.fingerprint}")
        return {name: digest_of(descriptions)[:16] for name, descriptions in masks.items()}

    def result(self, parts: Mapping[str, pd.DataFrame], halved: JSONMapping) -> KnockoutResult:
        """The result of some batches: the questions that have answers, in their order, a row for each mask."""
        tables = [table for table in parts.values() if len(table)]
        answers = pd.concat(tables) if tables else pd.DataFrame(columns=_COLUMNS)
        skipped = set(answers.loc[answers["run"] < 0, "id"])
        answers = answers.loc[answers["run"] >= 0]
        answered = set(answers["id"])
        questions = [question for question in self.questions if question.id in answered]
        column = {question.id: number for number, question in enumerate(questions)}
        rows, columns = answers["run"].to_numpy(np.int64), [column[name] for name in answers["id"]]

        def of_masks(attribute: str, name: str) -> np.ndarray:
            """A table of the runs' answers, with the row of each mask's run."""
            dtype, missing = TABLES[attribute]
            table = np.full((1 + len(self.ablations), len(questions)), missing, dtype=dtype)
            table[rows, columns] = answers[name].to_numpy(dtype)
            return table[[0, *self.mask_runs]]

        texts = of_masks("texts", "text")
        layers = self.listed[0][1].neurons.space.tower_layers if self.listed else ()
        all_halved = [note for name in sorted(halved) for note in halved[name]]
        pictures = dict(zip((question.id for question in self.questions), self.questions.pictures(), strict=True))
        return KnockoutResult(
            ids=tuple(question.id for question in questions),
            groups=tuple(question.group for question in questions),
            answers=np.array([question.answer for question in questions], dtype=np.int64),
            masks=tuple(mask for mask, _ in self.listed),
            chosen=of_masks("chosen", "chosen"),
            margins=of_masks("margins", "margin"),
            provenance={
                **run_provenance(self.engine.model, self.setting, questions=self.questions, engine=self.engine),
                "batch_size": self.options.batch_size,
                **({"halved": all_halved} if all_halved else {}),
                **({} if self.design.others is None else {"others": self.design.others, "design": self.design.digest}),
                **self.about,
                "masks": self._mask_digests(),
                "layers": [f"{tower} {layer}" for tower, layer in layers],
                "chance": chance_accuracy([len(question.options) for question in questions]),
                "skipped": [question.id for question in self.questions if question.id in skipped],
                **({} if self.options.part is None else {"part": str(self.options.processes)}),
            },
            texts=None if pd.isna(texts).all() else texts,
            controls=self.controls,
            pictures=tuple(pictures[question.id] for question in questions),
            asked=self._asked(questions),
            scores=of_masks("scores", "score") if self.engine.reader.grades else None,
        )

    def _asked(self, questions: Sequence[Question]) -> np.ndarray | None:
        """``[1 + mask, question]`` which of the masks these questions were asked under; None for all."""
        if self.design.others is None:
            return None
        column = {question.id: number for number, question in enumerate(self.design_questions)}
        meets = self.design.meets[:, [column[question.id] for question in questions]]
        return np.concatenate([np.ones((1, len(questions)), dtype=bool), meets])


_Answered = tuple[int, Sequence[Question], Reading]
"""A run, the questions that meet it, and what was answered to them."""


class _AnswersJob(Job[pd.DataFrame]):
    """Keeps each batch's answers, clean and under every different mask, as a table, in a folder or in memory.

    Columns: ``run``, ``id``, ``chosen``, ``margin``, ``text``, ``score``; what cannot be asked has the run -1.

    Args:
        study: the study.
        folder: where batches are kept, those of earlier sessions among them; None for memory.
    """

    unit = "answer"

    def __init__(self, study: _Study, folder: RunFolder | None = None) -> None:
        super().__init__(study.engine)
        self._study, self._folder = study, folder
        self._ablations = [None, *study.ablations]
        self._finished = {} if folder is None else folder.parts()
        self._new: dict[str, pd.DataFrame] = {}
        self._halved = {} if folder is None else folder.notes()
        """How batches were halved for want of memory, by the name of the batch."""
        self.limit = MemoryLimit([note for name in sorted(self._halved) for note in self._halved[name]])
        self._noted = len(self.limit.halved)
        self._batch: list[pd.DataFrame] = []

    def batch_key(self, question: Question) -> tuple[int, ...]:
        """See `Job.batch_key`: where the engine wants it so, questions of a batch meet the same masks."""
        return () if self.engine.ragged else self._study.question_runs[question.id]

    def weight(self, batch: QuestionSet) -> int:
        """See `Job.weight`: answers."""
        return sum(len(self._study.question_runs[question.id]) for question in batch)

    def is_finished(self, number: int, batch: QuestionSet) -> bool:
        """See `Job.is_finished`."""
        return _batch_name(number) in self._finished

    def run(self, questions: QuestionSet, encoded: object, move_bar: Callable[[int], object], /) -> pd.DataFrame:
        """See `Job.run`."""
        places: dict[int, list[int]] = {}  # of the questions that meet each run
        for place, question in enumerate(questions):
            for number in self._study.question_runs[question.id]:
                places.setdefault(number, []).append(place)
        numbers = sorted(places)
        whole = all(len(rows) == len(questions) for rows in places.values())
        runs = [Run(self._ablations[number], None if whole else tuple(places[number])) for number in numbers]
        answered: list[_Answered] = []
        try:
            for number, reading in zip(numbers, self.engine.answers(questions, encoded, runs), strict=True):
                asked = [questions[place] for place in places[number]]
                answered.append((number, asked, checked(reading, self.engine.reader, asked)))
                move_bar(len(asked))
            return _answer_table(answered)
        except (RuntimeError, MemoryError):  # it may be asked again in smaller parts
            move_bar(-sum(len(asked) for _, asked, _ in answered))
            raise

    def take(self, number: int, questions: QuestionSet, made: pd.DataFrame) -> int:
        """See `Job.take`."""
        self._batch.append(made)
        return 0

    def finish(self, number: int, batch: QuestionSet) -> None:
        """See `Job.finish`."""
        asked = {name for table in self._batch for name in table["id"]}
        skipped = [question for question in batch if question.id not in asked]
        if skipped:
            self._batch.append(_answer_table([(-1, skipped, Reading((None,) * len(skipped)))]))
        table = pd.concat(self._batch)
        name = _batch_name(number)
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
        return self._study.result({**self._finished, **self._new}, self._halved)

    def gathered(self) -> tuple[dict[str, pd.DataFrame], dict[str, list[JSON]]]:
        """Every process's batches, and how they were halved."""
        processes = self._study.options.processes
        for halved in processes.gather(self._halved):
            self._halved.update(halved)
        parts = {name: table for new in processes.gather(self._new) for name, table in new.items()}
        return {**self._finished, **parts}, self._halved

    def check_parts(self, folder: RunFolder) -> None:
        """Refuse kept batches that are not of the questions that the manifest says.

        Raises:
            FileFormatError: one is not.
        """
        batches = batches_of(self, self._study.questions, self._study.options)
        expected = {_batch_name(n): {question.id for question in batch} for n, batch in enumerate(batches)}
        for name, table in self._finished.items():
            if list(table.columns) != _COLUMNS or set(table["id"]) != expected.get(name):
                raise FileFormatError(
                    f"{folder.folder / 'parts' / name}.parquet does not hold its batch: delete it, and it is run again"
                )


_DTYPES = {"run": "int32", "id": "string", "chosen": "int16", "margin": "float64", "text": "string", "score": "float64"}
_COLUMNS = list(_DTYPES)


def _batch_name(number: int) -> str:
    return f"batch-{number:06d}"


def _answer_table(answered: Sequence[_Answered]) -> pd.DataFrame:
    """The answers to the questions that meet each run, run by run."""
    columns = {
        "run": np.repeat([run for run, _, _ in answered], [len(questions) for _, questions, _ in answered]),
        "id": [question.id for _, questions, _ in answered for question in questions],
        "chosen": [-1 if choice is None else choice for *_, reading in answered for choice in reading.chosen],
        "margin": np.concatenate([reading.margins(questions).numpy() for _, questions, reading in answered]),
        "text": [text for *_, reading in answered for text in reading.texts or (None,) * len(reading.chosen)],
        "score": np.concatenate([_scores(reading) for *_, reading in answered]),
    }
    return pd.DataFrame(columns, columns=_COLUMNS).astype(_DTYPES)


def _scores(reading: Reading) -> np.ndarray:
    """The score of each answer; NaN where answers are not graded."""
    return np.full(len(reading.chosen), np.nan) if reading.graded is None else np.asarray(reading.graded, np.float64)
