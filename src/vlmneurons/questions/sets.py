"""Sets of questions, and how they are asked.

A `QuestionSet` is a sequence of questions together with the way in which they are asked: the prompt, how the answer is
read, and the order of the options. `vlmneurons.run` and `vlmneurons.recording` run a model on them.
"""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, overload

from vlmneurons.checks import Keywords, abridged, as_fraction, as_names, as_whole, check_kind, is_missing
from vlmneurons.errors import GroupError, QuestionError
from vlmneurons.questions import sources, tables
from vlmneurons.questions.question import LETTERS, Question, hash_of, value_of

log = logging.getLogger(__name__)

Prompt = Callable[["Question", Sequence[str]], str]
"""The text of the user's turn, from a question and its options in the order in which they are shown."""


def multiple_choice_prompt(question: Question, options: Sequence[str]) -> str:
    """The question, lettered options, and the request to answer with a letter: the usual prompt for CVQA."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    request = "Answer with the option's letter from the given choices directly."
    return f"Question: {question.question}\n\nOptions: {lines}\n\n{request}"


def open_prompt(question: Question, options: Sequence[str]) -> str:
    """The question alone; the options are not shown. For answers read as the likelihood of each option's text."""
    return question.question


def bare_prompt(question: Question, options: Sequence[str]) -> str:
    """The question alone, after its pictures' placeholders: no chat template is put around it. For running text."""
    return question.question


ANSWERS = ("letters", "generate", "text", "running")
"""The ways of reading an answer; see `vlmneurons.run.readers`."""

_PROMPTS: dict[str, Prompt] = {"multiple choice": multiple_choice_prompt, "open": open_prompt, "bare": bare_prompt}


class QuestionSet(Sequence[Question]):
    """Questions, and how they are asked.

    An immutable sequence: indexing gives a `Question`, slicing and every method gives a new set. Ids are unique.

    Args:
        questions: any iterable of `Question`.
        prompt: the user's turn, as a function of the question and its options in shown order; or ``"multiple choice"``,
            ``"open"`` or, without a chat template, ``"bare"`` for one of the built-in prompts. By default the one that
            fits ``answer``.
        answer: how the answer is read: ``"letters"`` (the logits of the option letters, one forward), ``"generate"``
            (greedy generation, parsed), ``"text"`` (likelihood of each option's text) or ``"running"`` (likelihood of
            the question's own text); or an object of `vlmneurons.run.readers`, such as
            ``Generate(scorer=vn.exact_match)`` for open questions.
        shuffle: seed of the order in which each question's options are shown, drawn per question from (seed, id);
            None shows them as they are. Options that speak of each other's letters or places (``"A. Oslo"``, ``"Both A
            and B"``, ``"None of the above"``; see `Question.keeps_order`) are always shown as they are, and the log
            says for how many questions.

    Raises:
        QuestionError: an id stands twice, or something that is not a Question was given.
    """

    def __init__(
        self,
        questions: Iterable[Question] = (),
        *,
        prompt: Prompt | str | None = None,
        answer: object = "letters",
        shuffle: int | None = 0,
    ) -> None:
        if isinstance(questions, str | Question | set | frozenset) or not isinstance(questions, Iterable):
            raise QuestionError(f"a QuestionSet is made of a list of Question objects; got {type(questions).__name__}")
        is_reader = not isinstance(answer, type) and callable(getattr(answer, "read", None))
        if answer not in ANSWERS if isinstance(answer, str) else not is_reader:
            more = "" if isinstance(answer, str) else ", or give an AnswerReader, such as Generate()"
            raise QuestionError(
                f"answer={answer!r} is not a way of reading answers; choose from {', '.join(ANSWERS)}{more}"
            )
        if isinstance(prompt, str) and prompt not in _PROMPTS:
            raise QuestionError(f"prompt={prompt!r} is not a built-in prompt; choose from {', '.join(_PROMPTS)}")
        if prompt is not None and not isinstance(prompt, str) and not callable(prompt):
            raise QuestionError(
                f"prompt={prompt!r} is no prompt: give a function of a question and its options, or one of "
                f"{', '.join(_PROMPTS)}"
            )
        if isinstance(shuffle, bool):
            raise QuestionError(
                f"shuffle is the seed of the options' order, or None to show them as they are; got {shuffle}"
            )
        if shuffle is not None:
            shuffle = as_whole("shuffle", shuffle, QuestionError)
        self._fill(questions, prompt, answer, shuffle)
        kept = [question.id for question in self._questions if question.keeps_order]
        if kept and shuffle is not None:
            log.warning(
                "%d of %d questions have options that speak of each other's letters or places (%s): their options are "
                "shown as they are, not shuffled",
                *(len(kept), len(self), abridged(kept)),
            )

    def _fill(
        self, questions: Iterable[Question], prompt: Prompt | str | None, answer: object, shuffle: int | None
    ) -> None:
        self._questions = tuple(questions)
        for question in self._questions:
            if not isinstance(question, Question):
                raise QuestionError(f"a QuestionSet holds Question objects; got {type(question).__name__}")
        twice = [name for name, count in Counter(question.id for question in self._questions).items() if count > 1]
        if twice:
            raise QuestionError(
                f"ids must be unique; more than once there are {abridged(twice)}. Give each question an id of its own"
            )
        self._prompt = prompt
        self.answer = answer
        self.shuffle = shuffle

    @property
    def prompt(self) -> Prompt:
        """The function that writes the user's turn."""
        if self._prompt is None:
            if self.answer == "running" or getattr(self.answer, "prompt", None) == "bare":
                return bare_prompt
            shows = getattr(self.answer, "shows_options", self.answer != "text")
            return multiple_choice_prompt if shows else open_prompt
        return _PROMPTS[self._prompt] if isinstance(self._prompt, str) else self._prompt

    def asked(self, **settings: object) -> "QuestionSet":
        """The same questions, asked another way: any of ``prompt``, ``answer``, ``shuffle``.

        Args:
            settings: arguments of `QuestionSet` other than the questions; those that are not given stay as they are.
        """
        kept: Keywords = {"prompt": self._prompt, "answer": self.answer, "shuffle": self.shuffle}
        return QuestionSet(self._questions, **{**kept, **settings})

    def with_items(self, items: Iterable[Question]) -> "QuestionSet":
        """Other questions, asked in the same way.

        Args:
            items: the questions.

        Raises:
            QuestionError: an id stands twice, or something that is not a Question was given.
        """
        questions = object.__new__(QuestionSet)
        questions._fill(items, self._prompt, self.answer, self.shuffle)
        return questions

    # -- a sequence ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._questions)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> "QuestionSet": ...
    def __getitem__(self, index: Any) -> Any:
        return self.with_items(self._questions[index]) if isinstance(index, slice) else self._questions[index]

    def __iter__(self) -> Iterator[Question]:
        return iter(self._questions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuestionSet) and self._questions == other._questions

    def __hash__(self) -> int:
        return hash(self._questions)

    def __add__(self, other: Iterable[Question]) -> "QuestionSet":
        """Both sets' questions, asked as the first says.

        Raises:
            QuestionError: an id stands twice, or the second set has a setting that is neither the first's nor usual.
        """
        if not isinstance(other, Iterable):
            return NotImplemented
        if isinstance(other, QuestionSet):
            for name, usual in (("_prompt", None), ("answer", "letters"), ("shuffle", 0)):
                first, second = getattr(self, name), getattr(other, name)
                if second not in (usual, first):
                    name = name.strip("_")
                    raise QuestionError(
                        f"one set is asked in one way: the first with {name}={first!r}, the second with {second!r}. "
                        f"Give it the first's with .asked({name}=…), or ask the two one after the other"
                    )
        return self.with_items((*self._questions, *other))

    def __repr__(self) -> str:
        counts = self.counts()
        shown = ", ".join(f"{group}: {n}" for group, n in list(counts.items())[:8])
        more = f", and {len(counts) - 8} more groups" if len(counts) > 8 else ""
        return f"QuestionSet({len(self)} questions; {shown}{more})" if counts else "QuestionSet(empty)"

    # -- groups --------------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that occur, sorted."""
        return tuple(sorted({question.group for question in self._questions}))

    def counts(self) -> dict[str, int]:
        """Number of questions of each group, groups sorted."""
        counts = Counter(question.group for question in self._questions)
        return {group: counts[group] for group in sorted(counts)}

    def by_group(self) -> dict[str, "QuestionSet"]:
        """One set per group, groups sorted."""
        return {
            group: self.with_items(question for question in self._questions if question.group == group)
            for group in self.groups
        }

    def group_by(self, key: str | Callable[[Question], str]) -> "QuestionSet":
        """The same questions, grouped by a metadata column, or by a function of the question.

        Args:
            key: a column of `Question.metadata`, or a function from a question to its group.

        Raises:
            QuestionError: a question has no such column, or nothing in it, such as None.
        """
        if not isinstance(key, str) and not callable(key):
            raise QuestionError(f"questions are grouped by a column or a function of the question; got {key!r}")
        return self.with_items(replace(question, group=_label(question, key)) for question in self._questions)

    def filter(self, keep: Callable[[Question], bool] | None = None, **where: object) -> "QuestionSet":
        """The questions for which ``keep`` is true, and whose fields or metadata have the given values.

        A value may be a set, list or other collection of allowed values. Each group that ``group`` names must exist, as
        a misspelt one would be missing from every table without a word; a function may name groups that do not.

        Args:
            keep: a function from a question to whether it stays.
            where: fields or metadata, by name, and the value or values that they may have.

        Raises:
            QuestionError: a question has no field or metadata of such a name.
            GroupError: ``group`` names one that no question has.

        Example:
            ``questions.filter(group={"Egypt", "Japan"}, category="food")``
        """
        if keep is not None and not callable(keep):
            raise QuestionError(f"questions are kept by a function, or by values such as group='Japan'; got {keep!r}")
        allowed: dict[str, tuple[object, ...]] = {}
        for key, value in where.items():
            if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
                value = (value,)
            allowed[key] = tuple(value)
        groups = self.groups
        absent = [group for group in allowed.get("group", ()) if group not in groups]
        if absent:
            raise GroupError(
                f"no question is of group {absent[0]!r}; the groups are {', '.join(groups) or 'none'}. For "
                "those of a list that are there, filter with a function: filter(lambda item: item.group in wanted)"
            )

        def stays(question: Question) -> bool:
            fits = all(value_of(question, key) in values for key, values in allowed.items())
            return fits and (keep is None or bool(keep(question)))

        return self.with_items(filter(stays, self._questions))

    def balanced(self, size: int | None = None, *, seed: int = 0) -> "QuestionSet":
        """The same number of questions of every group, chosen by a seeded hash of their ids.

        Args:
            size: questions per group; by default the size of the smallest group.
            seed: of the hash; another one chooses other questions.

        Raises:
            QuestionError: a group has fewer; the message names the thin groups.
        """
        counts = self.counts()
        seed = as_whole("seed", seed, QuestionError)
        if size is not None and (size := as_whole("size", size, QuestionError)) < 1:
            raise QuestionError(f"{size} questions per group were asked for; the least is 1")
        size = min(counts.values(), default=0) if size is None else size
        thin = [f"{group} ({n})" for group, n in counts.items() if n < size]
        if thin:
            raise QuestionError(f"{size} questions per group were asked for; fewer are in {abridged(thin)}")
        kept = set()
        for members in self.by_group().values():
            kept.update(sorted((question.id for question in members), key=lambda name: hash_of(seed, name))[:size])
        return self.with_items(question for question in self._questions if question.id in kept)

    def at_least(self, size: int) -> "QuestionSet":
        """The questions of the groups that have at least ``size`` of them; thinner groups are left out.

        Args:
            size: least number of questions of a group.

        Example:
            ``questions.group_by("country").at_least(100).balanced(seed=0)``

        Raises:
            QuestionError: no group has as many; the message names the largest.
        """
        size = as_whole("size", size, QuestionError)
        counts = self.counts()
        kept = {group for group, n in counts.items() if n >= size}
        if counts and not kept:
            largest = max(counts, key=lambda group: counts[group])
            raise QuestionError(f"no group has {size} questions; the largest is {largest} ({counts[largest]})")
        return self.with_items(question for question in self._questions if question.group in kept)

    def split(self, fraction: float = 0.5, *, seed: int = 0) -> tuple["QuestionSet", "QuestionSet"]:
        """Two disjoint sets, such as one to identify neurons on and one to evaluate on.

        Questions that share a picture stay together, every group is divided in the same proportion as nearly as that
        allows, and the result depends on ids, pictures and seed alone: not on the order of the questions, nor on where
        picture files lie.

        Args:
            fraction: share of the questions that goes to the first set, in (0, 1).
            seed: of the division; another one divides otherwise.

        Raises:
            QuestionError: the fraction is not in (0, 1).
        """
        fraction, seed = as_fraction("fraction", fraction, QuestionError), as_whole("seed", seed, QuestionError)
        clusters = self._by_picture()
        wanted = {group: fraction * n for group, n in self.counts().items()}
        taken = dict.fromkeys(wanted, 0)  # questions of each group that went to the first set
        first: set[str] = set()
        # Large clusters go first, so that small ones can even out what those leave uneven.
        names = {key: _cluster_name(key, questions) for key, questions in clusters.items()}
        for key in sorted(clusters, key=lambda key: (-len(clusters[key]), hash_of(seed, names[key]))):
            sizes = Counter(question.group for question in clusters[key])
            # Above 0 where taking the cluster brings the groups nearer to what they should have than leaving it.
            lacking = sum((wanted[group] - taken[group] - n / 2) * n for group, n in sizes.items())
            # The hash decides an exact tie (one question, two sides), or one side would always win it.
            if lacking > 1e-9 or (abs(lacking) <= 1e-9 and int(hash_of(seed, names[key], "side"), 16) % 2):
                first.update(question.id for question in clusters[key])
                for group, n in sizes.items():
                    taken[group] += n
        return (
            self.with_items(question for question in self._questions if question.id in first),
            self.with_items(question for question in self._questions if question.id not in first),
        )

    def _by_picture(self) -> dict[str, list[Question]]:
        """Questions that share a picture, directly or through further questions, under a key that no order changes.

        A picture's key points to that of a picture in the same cluster, and the first of them in order to itself
        (a disjoint-set forest).
        """
        parent: dict[str, str] = {}

        def root(key: str) -> str:
            while parent.setdefault(key, key) != key:
                parent[key] = key = parent[parent[key]]
            return key

        first_keys = []
        for question in self._questions:
            has_one_key = question.image_id is not None or not question.sources
            keys = [question.image_key] if has_one_key else list(question.source_keys)
            for key in keys:
                first, second = sorted((root(keys[0]), root(key)))
                parent[second] = first
            first_keys.append(keys[0])
        clusters: dict[str, list[Question]] = {}
        for question, key in zip(self._questions, first_keys, strict=True):
            clusters.setdefault(root(key), []).append(question)
        return clusters

    def pictures(self) -> tuple[str, ...]:
        """For each question the name of its picture: the same for questions that share one.

        Questions that share a picture through others do so too, as in `split`. A question without a picture, or whose
        picture does not open, shares it with none unless its ``image_id`` says otherwise.
        """

        def opens(question: Question) -> bool:
            try:
                return bool(question.image_key)
            except QuestionError:
                return False

        clusters = self.filter(opens)._by_picture()
        name_of = {question.id: key for key, questions in clusters.items() for question in questions}
        return tuple(name_of.get(question.id, f"no image: {question.id}") for question in self._questions)

    def order(self, question: Question) -> tuple[int, ...]:
        """The order in which a question's options are shown: position shown → index in ``question.options``.

        Options that speak of each other's letters or places are shown as they are; see `Question.keeps_order`.

        Args:
            question: one of the questions.
        """
        check_kind("question", question, Question, QuestionError)
        if self.shuffle is None or question.keeps_order:
            return tuple(range(len(question.options)))
        return _shuffled(self.shuffle, question.id, len(question.options))

    # -- where they come from ------------------------------------------------------------------------------------------

    @classmethod
    def from_texts(cls, texts: Mapping[str, Sequence[str]], **settings: Any) -> "QuestionSet":
        """Running text, such as articles in several languages: each text is read as it stands, without a chat template.

        A text is a question that is its own answer. Its score is the mean log-likelihood of its tokens, in nats (see
        `vlmneurons.RunningText`), so ``exp(-score)`` is its perplexity. It is neither right nor wrong.

        Args:
            texts: the texts of each group, by its name. Their ids are derived from them: a text that stands twice in a
                group is refused.
            **settings: ``answer`` of the set: another `vlmneurons.RunningText`.

        Raises:
            QuestionError: a text is empty or none, stands twice, or a single text or nothing is given for a list.

        Example:
            ``QuestionSet.from_texts({"de": german, "fr": french})``
        """
        check_kind("texts", texts, Mapping, QuestionError, "a dictionary of texts by group")
        questions: list[Question] = []
        for group, several in texts.items():
            if not (own_texts := as_names(f"texts[{group!r}]", several, QuestionError)):
                raise QuestionError(
                    f"texts[{group!r}] is empty, and the group would be missing: leave it out, or give its texts"
                )
            questions += [Question(None, text, group=group, answers=[text]) for text in own_texts]
        return cls(questions, **{"answer": "running", "shuffle": None, **settings})

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        table: str | None = None,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        *,
        options: Sequence[str] | None = None,
        **settings: Any,
    ) -> "QuestionSet":
        """Questions from a folder that holds a CSV or JSON Lines table and picture files.

        The table has the columns ``image`` (a path within the folder, or a picture in base64; empty for none; several
        as a JSON list), ``question``, ``options`` (a list, or columns ``A``, ``B``, ``C``, ``D`` …, or ``a``, ``b``
        …), ``answer`` (an index from 0, a letter, or the right option's text; refused where these differ), ``group``,
        and optionally ``id`` and ``image_id``; every further column becomes metadata. Open questions have ``answers``
        (a list of texts that are accepted, or of dictionaries with an ``answer`` each) in place of ``options`` and
        ``answer``, from the column that ``columns`` names for it.

        Args:
            folder: the folder.
            table: name of the table within it; by default the only ``.csv``, ``.tsv`` or ``.jsonl`` file.
            columns: the table's own name of each field, where it differs; see `from_dataset`.
            options: those of every row, where the table has none, such as ``("yes", "no")``.
            **settings: ``prompt``, ``answer``, ``shuffle`` of the set.

        Raises:
            QuestionError: no table or several, a column that is not there or stands twice, or a row that is not a
                question (which one is said): also one with a picture that is not there, that lies outside the folder,
                or that no column of ``image`` names, as it would be asked without it.
        """
        check_kind("folder", folder, (str, os.PathLike), QuestionError, "a path")
        check_kind("table", table, (str, type(None)), QuestionError, "the name of a file")
        path, rows = sources.rows_of_folder(Path(folder), table)
        where, folder = f"{path}, row", Path(folder)
        asked = tables.questions_of_rows(rows, columns, where, start=1, folder=folder, options=options)
        return cls(asked, **settings)

    @classmethod
    def from_dataset(
        cls,
        dataset: object,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        *,
        options: Sequence[str] | None = None,
        **settings: Any,
    ) -> "QuestionSet":
        """Questions from a dataset of `datasets` (one split). Pictures stay on disk until they are needed.

        Columns of pictures, of lists of pictures, of encoded files (``{"bytes", "path"}``), of paths and of base64
        texts are read alike; ``ClassLabel`` columns give their names. A transform (``with_transform``) is applied. A
        streaming dataset is gone through once, and its pictures are kept in memory, encoded: ``take(n)`` of it.

        Args:
            dataset: rows with the columns that `from_folder` describes.
            columns: the dataset's own name of each field, where it differs: ``{"image": "photo", "group": "country"}``;
                several for pictures and options that stand in columns of their own: ``{"image": ["image_1",
                "image_2"]}``, of which a row may leave some empty.
            options: those of every row, where the dataset has none, such as ``("yes", "no")``.
            **settings: ``prompt``, ``answer``, ``shuffle`` of the set.

        Raises:
            QuestionError: a column is missing, or a row is not a question, or holds a picture that it would be asked
                without; the message names row and column.
        """
        if not hasattr(dataset, "column_names") or not hasattr(dataset, "remove_columns"):
            raise QuestionError(
                f"from_dataset takes a datasets.Dataset; got {type(dataset).__name__}. QuestionSet.from_rows reads "
                "dictionaries and pandas tables, QuestionSet.from_folder the files of a folder"
            )
        if isinstance(names := cast(Any, dataset).column_names, Mapping):
            splits = ", ".join(names)
            raise QuestionError(f"from_dataset takes one split; got a {type(dataset).__name__} of {splits}: choose one")
        rows = sources.rows_of_dataset(dataset)
        names = sources.names_in_dataset(dataset)
        return cls(tables.questions_of_rows(rows, columns, "dataset row", names=names, options=options), **settings)

    @classmethod
    def from_rows(
        cls,
        rows: object,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        *,
        options: Sequence[str] | None = None,
        **settings: Any,
    ) -> "QuestionSet":
        """Questions from dictionaries, or a table of pandas, with the columns that `from_folder` describes.

        Args:
            rows: dictionaries, or a `pandas.DataFrame`. Pictures may be all that `Question` takes, in lists too.
            columns: the table's own name of each field, where it differs; see `from_dataset`.
            options: those of every row, where the table has none, such as ``("yes", "no")``.
            **settings: ``prompt``, ``answer``, ``shuffle`` of the set.

        Raises:
            QuestionError: as for `from_dataset`.

        Example:
            ``QuestionSet.from_rows(pandas.read_parquet("mine.parquet"), columns={"group": "country"})``
        """
        return cls(tables.questions_of_rows(sources.rows_of_table(rows), columns, "row", options=options), **settings)


@functools.lru_cache(maxsize=4096)
def _shuffled(shuffle: int, name: str, n: int) -> tuple[int, ...]:
    return tuple(sorted(range(n), key=lambda index: hash_of(shuffle, name, index)))


def _cluster_name(key: str, questions: Sequence[Question]) -> str:
    """A name for questions that share a picture, for the hash of a split: it may not depend on where files lie."""
    sources = [source for question in questions if question.image_id is None for source in question.sources]
    has_path = any(isinstance(source, str | Path) for source in sources)
    return " ".join(sorted(question.id for question in questions)) if has_path else key


def _label(question: Question, key: str | Callable[[Question], object]) -> str:
    """A question's group by a column or function; None, NaN and the like are no group."""
    value = value_of(question, key)
    if is_missing(value):
        where = f"in the column {key!r}" if isinstance(key, str) else "from the function that groups"
        raise QuestionError(
            f"question {question.id!r} has {value} {where}, which is no group: leave such questions out with filter()"
        )
    return str(value)
