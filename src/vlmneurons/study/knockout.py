"""Running a study: every question, clean and under every mask, each batch kept as soon as it is finished."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlmneurons.checks import path_of
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.files.folders import RunFolder, Stopped
from vlmneurons.model.identity import digest_of_weights
from vlmneurons.model.vlm import VLM, check_model, refuse_edits
from vlmneurons.neurons.sets import NeuronSet, Selection
from vlmneurons.progress import Progress, progress_bar
from vlmneurons.questions.identity import digest_of_questions
from vlmneurons.questions.sets import Question, QuestionSet
from vlmneurons.recording.record import check_sizes
from vlmneurons.recording.recorder import provenance_of_run, rule_name
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.batching import batches, prefetched
from vlmneurons.run.masked import read_masked
from vlmneurons.run.memory import MemoryLimit, asked_in_parts
from vlmneurons.run.processes import Processes, current_processes
from vlmneurons.run.readers import AnswerReader, Reading, reader_of
from vlmneurons.run.remote import Remote, RemoteReader, edits_of, reader_at, reader_provenance
from vlmneurons.study.masks import Intervention, Mask, Masks, digest_of_mask, listed_masks, per_layer
from vlmneurons.study.result import KnockoutResult


def knockout(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    masks: Masks,
    *,
    controls: QuestionSet | None = None,
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    mode: str = "zero",
    factor: float | None = None,
    values: Any = None,
    at: str | None = None,
    on_error: str = "raise",
    folder: str | Path | None = None,
    distributed: bool = False,
    prefetch: int | None = None,
    progress: Progress = True,
    remote: Remote = False,
) -> KnockoutResult:
    """Ask every question with the model as it is and under every mask.

    Args:
        model: the model.
        questions: evaluation questions of at least two groups; they should share no picture with those that the
            neurons were identified on (`QuestionSet.split`).
        masks: what to switch off, by name: a `Selection` (one mask for each of its groups), a list of selections
            (repeats of one control, such as random seeds), a single `NeuronSet`, or any of these as an `Intervention`.
            Equal sets are run once.
        controls: further questions, whose groups no mask is of, that measure general ability.
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
        prefetch: how many batches a thread prepares (opens, resizes, tokenizes) while the model runs; by default 2, and
            none for a model on the CPU, whose cores the thread would take.
        progress: show a progress bar.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`. The manifest of
            a folder says it, so that answers from here and there are not mixed.

    Returns:
        Every answer of every run, from which tables, tests and figures are computed.

    Raises:
        QuestionError: fewer than two groups; a question cannot be asked (``error.partial``, also of any other error
            or interrupt on the way, holds the result up to it).
        MismatchError: neurons of another model; a mask's group has no questions; the folder holds another run, or
            another process is running in it.
        OutOfMemoryError: a single question does not fit into memory.
    """
    questions = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if answer is not None:
        questions = questions.asked(answer=answer)
    if on_error not in ("raise", "skip"):
        raise QuestionError(f"on_error={on_error!r} does not exist; choose from raise, skip")
    check_model(model)
    refuse_edits(model)
    check_sizes(batch_size, prefetch)
    batch_size = int(batch_size)  # as the manifest has it
    controls = QuestionSet(controls) if controls is not None and not isinstance(controls, QuestionSet) else controls
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
    given = Intervention(NeuronSet.empty(model.space()), mode, factor, values, at)
    listed = listed_masks(masks, questions.groups, given)
    run = _Run(model, asked, listed, batch_size, on_error, progress, remote)
    run.prefetch = prefetch
    run.controls = () if controls is None else controls.groups
    run.processes = current_processes() if distributed else Processes()
    run.about = {
        "intervention": {"mode": mode, "factor": factor, "at": at or "post", "values": values is not None},
        "selections": {str(name): _describe(one) for name, one in masks.items()},
    }
    return run.alone() if folder is None else run.in_folder(path_of("folder", folder, MismatchError))


class _Run:
    """One study: the plan, and how it is carried out batch by batch."""

    processes: Processes
    controls: tuple[str, ...]
    about: Mapping[str, Any]
    prefetch: int | None = None

    def __init__(
        self,
        model: VLM,
        questions: QuestionSet,
        listed: list[tuple[Mask, Intervention]],
        batch_size: int,
        on_error: str,
        progress: Progress,
        remote: Remote,
    ) -> None:
        self.model, self.questions, self.batch_size = model, questions, batch_size
        self.on_error, self.progress, self.remote = on_error, progress, remote
        self.reader = reader_at(model, reader_of(questions.answer), remote)
        self.batches = list(batches(questions, batch_size))
        self.listed = listed
        self.limit = MemoryLimit()
        self.halved: dict[str, list[dict[str, Any]]] = {}
        """How each batch was halved for want of memory, in this session or an earlier one of the same folder."""
        self.untouched = Ablation(model, NeuronSet.empty(model.space()))
        self.ablations: list[Ablation] = []
        self.run_of: list[int] = []
        """For each mask the run whose answers are its: equal masks share one, and an empty mask is the clean run, 0."""
        known: dict[Any, int] = {}
        for _, one in listed:
            if len(one.neurons) == 0:
                Ablation._refuse_foreign(model, one.neurons.space)
                self.run_of.append(0)
                continue
            zero = one.mode == "zero" or (one.mode == "scale" and one.factor == 0)
            key = (one.neurons, "zero" if zero else (one.mode, one.factor, id(one.values), one.at))
            if key not in known:
                self.ablations.append(
                    Ablation(model, one.neurons, one.mode, factor=one.factor, values=one.values, at=one.at)
                )
                known[key] = len(self.ablations)
            self.run_of.append(known[key])
        if remote:
            for ablation in self.ablations:  # what cannot be sent is refused before anything is
                edits_of(model, ablation, remote)

    # -- batches -------------------------------------------------------------------------------------------------------

    def ask(self, batch: QuestionSet, encode: Callable[[], Any], told: Callable[[int], Any]) -> pd.DataFrame:
        """One batch, clean and under every different mask: a row for each run and question.

        ``encode`` gives what the reader made of the batch; parts of it are encoded anew where they are needed.

        Columns: ``run``, ``id``, ``chosen``, ``margin``, ``text``; a question that cannot be asked has the run -1.
        """

        def read(part: QuestionSet, ready: Any) -> pd.DataFrame:
            readings: list[Reading] = []
            try:
                for reading in self._readings(part, ready):
                    readings.append(reading)
                    told(len(part))
                return _table(part, readings)
            except (RuntimeError, MemoryError):  # it may be asked again in smaller parts
                told(-len(part) * len(readings))
                raise

        skipped: list[str] | None = [] if self.on_error == "skip" else None
        anew = functools.partial(self.reader.encode, self.model)
        tables = [table for _, table in asked_in_parts(batch, self.limit, encode, anew, read, skipped)]
        if skipped:
            tables.append(
                pd.DataFrame({"run": -1, "id": skipped, "chosen": -1, "margin": np.nan, "text": None}, columns=_COLUMNS)
            )
        return tables[0] if len(tables) == 1 else pd.concat([table.astype(_DTYPES) for table in tables])

    def _readings(self, questions: QuestionSet, encoded: Any) -> Iterator[Reading]:
        """The clean answers to one batch, and those under every mask."""
        if isinstance(self.reader, RemoteReader):
            yield from self.reader.read_masked(self.model, questions, encoded, self.ablations)
        else:
            # The untouched model is one more mask, of no neurons, and shares the forward with the others.
            yield from read_masked(self.model, self.reader, questions, encoded, [self.untouched, *self.ablations])

    def go(
        self, known: Mapping[str, pd.DataFrame], keep: Callable[[str, pd.DataFrame], None]
    ) -> dict[str, pd.DataFrame]:
        """Ask the batches of this process that are not known yet, and give all there are, of every process."""
        mine = list(self.processes.mine(self.batches))
        n_runs = 1 + len(self.ablations)
        done = sum(len(batch) for number, batch in mine if _name(number) in known)
        new: dict[str, pd.DataFrame] = {}
        total = sum(len(batch) for _, batch in mine)
        coming = ((number, batch) for number, batch in mine if _name(number) not in known)
        with (
            torch.inference_mode(),
            progress_bar(
                self.progress if self.processes.first else False,
                total=total * n_runs,
                initial=done * n_runs,
                unit="answer",
                smoothing=0.05,  # nearly the mean rate: masks differ in cost, and each batch has all of them
            ) as bar,
            prefetched(self.model, self.reader, coming, self.prefetch, lambda one: one[1]) as ready,
        ):
            for (number, batch), encode in ready:
                name = _name(number)
                try:
                    with self._noting(name):
                        table = self.ask(batch, encode, bar.update)
                    keep(name, table)
                    new[name] = table
                except Stopped:  # there is no time to lose; what is finished is in the folder
                    raise
                except BaseException as error:
                    error.partial = self.result({**known, **new})  # type: ignore[attr-defined]
                    raise
        for theirs in self.processes.gather(self.halved):
            self.halved.update(theirs)
        return {**known, **{name: table for part in self.processes.gather(new) for name, table in part.items()}}

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Within, what is learnt about memory is noted under a batch's name."""
        before = len(self.limit.halved)
        try:
            yield
        finally:
            if self.limit.halved[before:]:
                self.halved.setdefault(name, []).extend(self.limit.halved[before:])

    def alone(self) -> KnockoutResult:
        """The whole study, in memory."""
        return self.result(self.go({}, lambda name, table: None))

    # -- in a folder ---------------------------------------------------------------------------------------------------

    def in_folder(self, folder: Path) -> KnockoutResult:
        """The whole study, or what is left of it, kept in a folder."""
        run = RunFolder(folder, self.manifest())
        if (folder / "knockout.json").exists():
            return KnockoutResult.load(folder)
        with run.opened() if self.processes.first else contextlib.nullcontext():
            self.processes.wait()  # nobody begins before the first process holds the folder
            known = run.parts()
            self._check(known, run)
            self.halved = run.notes()
            self.limit = MemoryLimit(self._all_halved)
            self.processes.wait()  # nor before all know what was there

            def keep(name: str, table: pd.DataFrame) -> None:
                if name in self.halved:
                    run.note(name, self.halved[name])
                run.write(name, table)

            result = self.result(self.go(known, keep))
            if self.processes.first:
                result.save(folder)
                run.clear()
            self.processes.wait()
        return result

    def _check(self, known: Mapping[str, pd.DataFrame], run: RunFolder) -> None:
        """Refuse kept batches that are not what the manifest says."""
        expected = {_name(number): {item.id for item in batch} for number, batch in enumerate(self.batches)}
        for name, table in known.items():
            if list(table.columns) != _COLUMNS or set(table["id"]) != expected.get(name):
                raise FileFormatError(
                    f"{run.folder / 'parts' / name}.parquet does not hold its batch: delete it, and it is run again"
                )

    def manifest(self) -> dict[str, Any]:
        """What must agree for a run to be gone on with."""
        masks: dict[str, Any] = {}
        for mask, one in self.listed:
            masks.setdefault(mask.selector, hashlib.sha256()).update(
                f"{mask.repeat} {mask.group} {digest_of_mask(one)}".encode()
            )
        provenance = provenance_of_run(self.model)
        return {
            "kind": "vlmneurons knockout run",
            "model": {
                "class": type(self.model.hf).__name__,
                "revision": provenance["revision"],
                "weights": digest_of_weights(self.model.hf),
                "dtype": provenance["dtype"],
            },
            "versions": provenance["versions"],
            "questions": {
                "number": len(self.questions),
                "digest": digest_of_questions(self.questions),
                "controls": self.controls,
            },
            "answer": repr(self.reader),
            "shuffle": self.questions.shuffle,
            "batch_size": self.batch_size,
            "on_error": self.on_error,
            **({"remote": self.remote} if self.remote else {}),
            "masks": {name: digest.hexdigest()[:16] for name, digest in masks.items()},
        }

    # -- the result ----------------------------------------------------------------------------------------------------

    def result(self, parts: Mapping[str, pd.DataFrame]) -> KnockoutResult:
        """The result of some batches, questions in their order, a row for each mask."""
        n_runs = 1 + len(self.ablations)
        by_id: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        skipped = set()
        for table in parts.values():
            skipped.update(table["id"][table["run"] < 0])
            asked = table[table["run"] >= 0].sort_values(["run"], kind="stable")
            ids = asked["id"].tolist()
            n = len(ids) // n_runs
            columns = [asked[name].to_numpy(dtype).reshape(n_runs, n) for name, dtype in _ARRAYS.items()]
            for place, name in enumerate(ids[:n]):
                by_id[name] = (columns[0][:, place], columns[1][:, place], columns[2][:, place])
        kept = [item for item in self.questions if item.id in by_id]
        rows = [0, *self.run_of]
        chosen = np.stack([by_id[item.id][0] for item in kept], 1) if kept else np.zeros((n_runs, 0), dtype=np.int64)
        margins = np.stack([by_id[item.id][1] for item in kept], 1) if kept else np.zeros((n_runs, 0))
        texts = np.stack([by_id[item.id][2] for item in kept], 1) if kept else np.zeros((n_runs, 0), dtype=object)
        no_text = all(value is None or value is pd.NA for value in texts.flat)
        layers = list(per_layer(self.listed[0][1].neurons)) if self.listed else []
        return KnockoutResult(
            ids=tuple(item.id for item in kept),
            groups=tuple(item.group for item in kept),
            answers=np.array([item.answer for item in kept], dtype=np.int64),
            masks=tuple(mask for mask, _ in self.listed),
            chosen=chosen[rows],
            margins=margins[rows],
            provenance={
                **provenance_of_run(self.model),
                **reader_provenance(self.reader),
                "weights": digest_of_weights(self.model.hf),
                "answer": repr(self.reader),
                "prompt": rule_name(self.questions.prompt),
                "shuffle": self.questions.shuffle,
                "batch_size": self.batch_size,
                **({"halved": self._all_halved} if self.halved else {}),
                **self.about,
                "layers": layers,
                "chance": float(np.mean([1 / len(item.options) for item in kept])) if kept else None,
                "skipped": [item.id for item in self.questions if item.id in skipped],
            },
            texts=None if no_text else texts[rows],
            controls=self.controls,
            pictures=tuple(self.pictures[item.id] for item in kept),
        )

    @property
    def _all_halved(self) -> list[dict[str, Any]]:
        """Every time that a batch was halved, in the order of the batches, whichever process ran them."""
        return [one for name in sorted(self.halved) for one in self.halved[name]]

    @functools.cached_property
    def pictures(self) -> dict[str, str]:
        """The picture of each question; pictures are looked at once, and not at all where questions name them."""
        return dict(zip((item.id for item in self.questions), self.questions.pictures(), strict=True))


_COLUMNS = ["run", "id", "chosen", "margin", "text"]
_DTYPES = {"run": "int32", "id": "string", "chosen": "int16", "margin": "float64", "text": "string"}
_ARRAYS: dict[str, Any] = {"chosen": np.int64, "margin": np.float64, "text": object}


def _name(number: int) -> str:
    return f"batch-{number:06d}"


def _table(questions: QuestionSet, readings: Sequence[Reading]) -> pd.DataFrame:
    """The answers to some questions in every run, run by run."""
    texts = [text for reading in readings for text in (reading.texts or [None] * len(questions))]
    return pd.DataFrame(
        {
            "run": np.repeat(np.arange(len(readings)), len(questions)),
            "id": [item.id for item in questions] * len(readings),
            "chosen": [-1 if choice is None else choice for reading in readings for choice in reading.chosen],
            "margin": np.concatenate([reading.margins(questions).numpy() for reading in readings]),
            "text": texts,
        },
        columns=_COLUMNS,
    ).astype(_DTYPES)


def _describe(given: Any) -> Any:
    if isinstance(given, Selection | NeuronSet | Intervention):
        return repr(given)
    return [repr(one) for one in given]
