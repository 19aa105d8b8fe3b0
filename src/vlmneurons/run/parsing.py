"""Which option a generated text names: by rules that read an answer only where it is said in so many words.

A wrong letter is worse than none: a failure to parse is counted and reported, a letter that was not meant is seen by
nobody. So the rules do not look for what would rule an answer out (no list of denials is ever complete) but for
sentences that hold nothing besides an answer: a letter, and words that announce one. ``answer_words.tsv`` is the table
of these words, a row a language, for the languages of CVQA and some more. Its columns, entries apart by commas:

- *nouns* announce an answer: what follows is it, whatever else stood before ("I see a tower, so the answer is B"),
- *options* do so beside a closer ("so the correct option is B"; but "I looked at option B"), or as *leads* do,
- *leads* announce one if the sentence holds nothing else before it ("it is B"),
- *fillers* may stand between ("the correct answer is B"),
- *closers* may end what follows a letter ("B is correct", "उत्तर B है"),
- *negations*, and *doubts* with conditions and "or", speak against an answer; with ``*`` they are common words of
  another language too, and so looked for only where the language is known,
- *reasons* begin the why of an answer: what they introduce says no longer which.

A word that is missing there costs a parse failure, not a wrong answer.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from vlmneurons.checks import as_names, check_kind
from vlmneurons.errors import QuestionError
from vlmneurons.model.prompts import THOUGHT
from vlmneurons.questions.question import normalize


def parse_answer(text: str, options: Sequence[str]) -> int | None:
    r"""Which option a generated text names: index from 0 in shown order, or None where that cannot be told.

    A text that is one option, word for word, is that option; else a letter wins over a number, and a number over an
    option's text within a longer one. A lone letter is always the letter of an option. What is marked as the answer
    (``\boxed{…}``, ``<answer>…</answer>``) is read alone, and what a model thought before (``<think>…</think>``) not
    at all. What is ambiguous, denied, doubted, asked or contradicts itself is None, never a guess. Answers in plain
    words are read in the languages of CVQA.

    Args:
        text: what the model wrote.
        options: the options, in the order in which they were shown.

    Raises:
        QuestionError: the text or an option is no text, or there are no options.

    Examples:
        >>> options = ["Cairo", "Paris", "Rome", "Oslo"]
        >>> [parse_answer(text, options) for text in ("B", "(c) Rome", "The answer is D.", "It is Paris", "Hm")]
        [1, 2, 3, 1, None]
    """
    check_kind("text", text, str, QuestionError, "a text")
    options = as_names("options", options, QuestionError)
    if not options:
        raise QuestionError("there are no options that the text could name")
    said = _after_thought(_cleaned(text))
    return None if said is None or not said.strip() else _parsed(said, options)  # nothing is no option's text


def stated(text: str) -> str:
    """What a generated text states: what follows the model's thought, and within the tags of an answer if it has any.

    Args:
        text: what the model wrote.

    Returns:
        The text without what is no answer; empty if a thought was not ended, or if several tags differ.
    """
    said = _after_thought(_cleaned(text)) or ""
    marked = {part.strip() for found in _MARKED.finditer(said) for part in found.groups() if part is not None}
    if not marked:
        return said.strip()
    return marked.pop() if len(marked) == 1 else ""


def _parsed(said: str, options: Sequence[str]) -> int | None:
    marked = [part for found in _MARKED.finditer(said) for part in found.groups() if part is not None]
    if marked:
        read = {_parsed(part, options) for part in marked}
        return read.pop() if len(read) == 1 else None
    plain = normalize(said)
    whole = [index for index, option in enumerate(options) if normalize(_cleaned(option)) == plain]
    letter = re.fullmatch("[a-z]", plain)
    if whole and not letter:
        return whole[0] if len(whole) == 1 else None
    if not plain:
        return None
    bare = re.sub(r"[*`$]|(?m:^[#>\s]+)|\\(?:text|mathrm|mathbf|textbf)\b|\\[()\[\]]", "", said)
    bare = re.sub(r"(?<=:)\s*\n\s*", " ", bare)  # "Answer:" and the letter in the next line
    bare = next((part for part in _NEXT_QUESTION.split(bare) if part.strip()), "")
    texts = [_cleaned(option) for option in options]
    for kind in (_LETTER, _NUMBER):
        decided, index = _by_label(bare, texts, kind)
        if decided:
            return index
    index = _by_text(bare, texts)
    labels, _ = _labels(bare, texts, _LETTER)
    contradicted = any(label.word is None and label.index >= 0 and label.index != index for label in labels)
    return None if contradicted else index


# -- what is read at all -----------------------------------------------------------------------------------------------

_MARKED = re.compile(
    r"<answer>(.*?)</answer>|<\|begin_of_box\|>(.*?)<\|end_of_box\|>|\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", re.S | re.I
)
"""What a model was taught to put its answer in: tags, GLM's box, LaTeX's box."""

_NEXT_QUESTION = re.compile(
    r"\n\s*(?:question|q|user|human|problem|pregunta|pergunta|frage|问题|問題|질문)\s*\d*\s*:", re.I
)
"""A model that was not stopped goes on with a question of its own making."""


def _cleaned(text: str) -> str:
    """NFKC, decimal digits of every script as ASCII, no invisible characters, no marks of a turn's end."""
    text = unicodedata.normalize("NFKC", re.split(r"<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|</s>", text)[0])
    kept = []
    for character in text.replace("’", "'"):
        kind = unicodedata.category(character)
        if kind == "Nd":
            character = str(unicodedata.decimal(character))
        if kind not in ("Cf", "Co"):  # private characters stand for labels below
            kept.append(character)
    return "".join(kept).strip()


def _after_thought(text: str) -> str | None:
    """What follows the model's thought; None if the thought did not end."""
    found = list(THOUGHT.finditer(text))
    if not found:
        return text
    return text[found[-1].end() :] if found[-1][1] else None


# -- letters and numbers -----------------------------------------------------------------------------------------------

_WORD = "0-9A-Za-z_\u00c0-\u024f\u0300-\u036f\u0370-\u052f\u1e00-\u1eff"  # what a Latin letter may not be joined to
_OPEN, _CLOSE = r"[(\[{<\"'«“„‘「『【〈《]{0,4}", r"[)\]}>\"'»”」』】〉》]"
_LETTER = re.compile(
    rf"(?<![{_WORD}~!¬≠])(?<![{_WORD}]['.\-])(?P<open>{_OPEN})(?P<label>[A-Za-z])(?!['\-][{_WORD}])"
    rf"(?:(?P<close>{_CLOSE}+)|(?![{_WORD}+#]|\.[A-Z]\b))"
)
_NUMBER = re.compile(
    rf"(?<![{_WORD}.,\-])(?P<open>{_OPEN})(?P<label>\d{{1,2}})(?:(?P<close>{_CLOSE}+)|(?![{_WORD}%°]|[.,:/\-]\d))"
)
_FIRST, _MOST = 0xE000, 0x1900  # a private character stands in the text for each label
_MOST_SAID = 12  # a sentence of more letters is a list of them
_LABEL = "[\ue000-\uf8ff]"


@dataclass(frozen=True)
class _Label:
    """A letter or number that may name an option.

    Attributes:
        index: the option's; -1 if there is none of this label.
        start, end: where it stands, with its brackets and the option's own text beside it.
        word: what it is as a word ("A dog", Spanish "a"), if it may be one.
        small: it is written small, without brackets.
        marked: it stands in brackets, or a stop or bracket follows.
        named: the option's own text stands beside it.
    """

    index: int
    start: int
    end: int
    word: str | None
    small: bool
    marked: bool
    named: bool


def _by_label(text: str, options: Sequence[str], kind: "re.Pattern[str]") -> tuple[bool, int | None]:
    """Whether letters, or numbers, settle the answer, and which it is; settled without an answer is a contradiction."""
    labels, contradicted = _labels(text, options, kind)
    if contradicted or len(labels) > _MOST:
        return True, None
    reading, pieces, reached = _Reading(labels, kind is _LETTER), [], 0
    for number, label in enumerate(labels):
        pieces += [text[reached : label.start], chr(_FIRST + number)]
        reached = label.end
    for sentence in _SENTENCE.split("".join(pieces) + text[reached:]) if labels else []:
        reading.take(sentence)
    chosen = reading.outcome()
    if chosen is None:
        return reading.answered, None
    # Where options have letters of their own, in another order, a bare letter means two things.
    own = [re.match(r"\(?([A-Za-z])[.):]\s", option) for option in options]
    moved = any(found and ord(found[1].upper()) - ord("A") != place for place, found in enumerate(own))
    if moved and not any(label.named and label.index == chosen for label in labels):
        return True, None
    return True, chosen if chosen >= 0 else None


def _labels(text: str, options: Sequence[str], kind: "re.Pattern[str]") -> tuple[list[_Label], bool]:
    """The labels of a text, and whether the text of another option beside one contradicts it."""
    labels: list[_Label] = []
    contradicted, reached = False, 0
    for found in kind.finditer(text):
        label, index = found["label"], _index_of(found["label"], options)
        if found.start() < reached or index is None:
            continue  # within an option's text that was read with its letter; or a number that may mean two things
        start, end = found.start(), found.end()
        bracketed = bool(re.search(r"[(\[{<]", found["open"])) and bool(found["close"])
        stop = re.match(r"[.:)\]、]", text[end:])
        marked = bracketed or stop is not None or bool(re.search(r"[)\]]", found["close"] or ""))
        small = label.islower() and not bracketed
        before_word = re.match(rf"\s+[{_WORD}]", text[end:]) is not None and not bracketed
        spoken = label == "I" and not marked and text[end:].strip() != ""
        word = label.lower() if small or (label in "AEIOUY" and before_word) or spoken else None
        place = end + next(re.finditer(r"[\s.:,)\]}>(\[\"'–—-]*", text[end:])).end()
        beside = _option_at(text, place, options)
        before = _option_before(text[reached:start], options) if bracketed else None
        named = index in (beside or ()) or index in (before or ())
        if beside is not None and index in beside:
            end = place + len(options[index])
            end += next(re.finditer(rf"{_CLOSE}*", text[end:])).end()
            word = None
        elif before is not None:
            contradicted |= not named
            start = len(text[:start].rstrip(" ,:–—-")) - len(options[index]) if named else start
        elif beside is not None and place > end and (marked or (word is None and kind is _LETTER)):
            contradicted = True
        elif stop is not None and re.match(r"\.\s?[A-Z]\.", text[end:]):
            contradicted |= not small  # initials: A. A. Milne
        elif stop is not None and text[:start].rstrip(" ")[-1:] in ("", "\n"):
            end += stop.end()  # a line that begins with "B. " goes on
        labels.append(_Label(index, start, end, word, small, marked, named))
        reached = end
    return labels, contradicted


def _index_of(label: str, options: Sequence[str]) -> int | None:
    """The option that a label stands for, -1 for none; None where a number may mean an option's place or its text."""
    if not label.isdigit():
        index = ord(label.upper()) - ord("A")
        return index if index < len(options) else -1
    # Among 2, 4, 6 and 8 "the answer is 4" means the option that reads 4, not the fourth.
    same = [index for index, option in enumerate(options) if normalize(option) == str(int(label))]
    if len(same) == 1:
        return same[0]
    if same or any(re.search(rf"(?<!\d){int(label)}(?!\d)", option) for option in options):
        return None
    return int(label) - 1 if 1 <= int(label) <= len(options) else -1


def _option_at(text: str, place: int, options: Sequence[str]) -> list[int] | None:
    """The options, if any, whose text is the longest that stands at a place as words of its own."""

    def stands(option: str) -> bool:
        end = place + len(option)
        return text[place:end].casefold() == option.casefold() and not joined(option[-1], text[end : end + 1])

    return _longest(options, stands)


def _option_before(text: str, options: Sequence[str]) -> list[int] | None:
    """The options, if any, whose text is the longest that a text ends with."""
    text = text.rstrip(" ,:–—-")

    def stands(option: str) -> bool:
        rest = text[: -len(option)]
        return text[-len(option) :].casefold() == option.casefold() and not joined(rest[-1:], option[0])

    return _longest(options, stands)


def _longest(options: Sequence[str], stands: Callable[[str], bool]) -> list[int] | None:
    found = [index for index, option in enumerate(options) if option and stands(option)]
    most = max((len(options[index]) for index in found), default=0)
    return [index for index in found if len(options[index]) == most] or None


# -- sentences ---------------------------------------------------------------------------------------------------------

_SENTENCE = re.compile(
    r"(?<=[!?…。！？।॥؟۔;；።፧])|(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bNo\.)(?<!\bMrs\.)(?<=\.)(?=\s|$)|\n+", re.I
)
_CLAUSE = re.compile(rf"[,،、，(){{}}]|[—–](?!\s*{_LABEL})|(?<={_LABEL}) - |\b(?:but|pero|aber|tetapi)\b", re.I)
_QUESTION = re.compile(
    r"[?？؟፧]\W*$|[✗✘❌✖×]"
    r"|^[^\w\ue000-\uf8ff]*(?:is|are|was|does|should|could|would|er|est-ce|ist|apakah|adakah)\s(?!é |í |ea )",
    re.I,
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|correction|sorry|oops|scratch that|on second thought|(?:that|this|it|which) (?:is|was) "
    r"(?:not|wrong|incorrect|false)|that's (?:not|wrong)|isn't (?:right|correct)|espera|perdón|attendez|désolé)\b"
    r"|^\W*no\s*(?:[.,;!]|$)|等等|抱歉|いや、|すみません|아니,|잠깐",
    re.I,
)
_COPULAS = re.compile(
    r"(?:is|was|must|would|est|es|é|è|este|ist|er|eo|adalah|ialah|yaiku|nyaéta|adolah|ay|ang|ni|bụ|jest|là|to)\b"
)
_LAST = re.compile(r"\bfinal|\bendgültig|\bakhir|最终|最終|최종|окончательн|अंतिम|النهائي|نهایی|চূড়ান্ত", re.I)


class _Reading:
    """What the sentences of a text say, one after the other.

    Attributes:
        said: options that a sentence names as the answer.
        last: the one that a sentence names as the final answer.
        opened: options whose letter a line or sentence begins with.
        taken_back: a later sentence takes an answer back.
    """

    def __init__(self, labels: Sequence[_Label], letters: bool) -> None:
        self.labels, self.letters = labels, letters
        self.said: list[int] = []
        self.last: int | None = None
        self.opened: list[int] = []
        self.taken_back = False

    @property
    def answered(self) -> bool:
        """There were answers: one, or several that differ."""
        return bool(self.said or self.opened)

    def outcome(self) -> int | None:
        """The one answer of all sentences; None if there is none, or not one."""
        if self.taken_back:
            return None
        if self.last is not None:
            return self.last
        said, opened = set(self.said), set(self.opened)
        if len(said) == 1 and (opened <= said or len(opened) > 1):  # several letters begin lines: the options again
            return said.pop()
        return opened.pop() if not said and len(opened) == 1 else None

    def take(self, sentence: str) -> None:
        """Read one sentence."""
        if self.answered and _TAKEN_BACK.search(sentence):
            self.taken_back = True
        if not 1 <= len(re.findall(_LABEL, sentence)) <= _MOST_SAID or _QUESTION.search(sentence):
            return
        clauses = _CLAUSE.split(sentence)
        for place, clause in enumerate(clauses):
            for found in re.finditer(_LABEL, clause):
                before, after = clause[: found.start()], clause[found.end() :]
                index = self._statement(clauses, place, before, self._label(found[0]), after)
                if index is not None:
                    self.said.append(index)
                    self.last = index if _LAST.search(sentence) else self.last
                    return
            if _reason(clause) is not None and (place, _reason(clause)) != (0, 0):  # "because it is tall, the answer …"
                break
        index = self._opening(sentence.strip())
        if index is not None:
            self.opened.append(index)

    def _label(self, character: str) -> _Label:
        return self.labels[ord(character) - _FIRST]

    def _words(self, text: str) -> str:
        """A text in which the labels that may be words are words."""
        return re.sub(_LABEL, lambda found: self._label(found[0]).word or found[0], text)

    def _statement(self, clauses: Sequence[str], place: int, before: str, label: _Label, after: str) -> int | None:
        """The option of a label, if its clause says that it is the answer and the sentence says nothing else."""
        reason = _reason(after)
        later = [] if reason is not None else [self._words(clause) for clause in clauses[place + 1 :]]
        before, after = self._words(before), self._words(after if reason is None else after[:reason])
        if re.search(_LABEL, before + after):
            return None
        if label.small:  # "the answer is b"; but "the answer is a" may go on with a noun, and "option b shows"
            stopped = re.match(r"\W*[.!。)\"']", after) is not None or place < len(clauses) - 1
            if _spelt(after) or (label.word in tuple("aeiouy") and not stopped):
                return None
        if label.word is not None and _spelt(after) and not _spelt(before) and not _COPULAS.match(_spelt(after)):
            return None  # "A is correct"; but Portuguese "A resposta correta"
        earlier = [self._words(clause) for clause in clauses[:place]]
        unlabelled = [clause for clause in earlier if not re.search(_LABEL, clause)]
        for language in _languages():
            free = language.announces(before, after, alone=not any(map(_spelt, unlabelled)))
            if free is None:
                continue
            # What stands before must not doubt it, nor anything in the sentence hold another letter, if not to deny it.
            beside = (language, _languages()[0])
            doubted = any(one.opposes(part) for one in beside for part in (free, *unlabelled))
            # "…, which is wrong": what follows in a few words is about the answer
            few = [part for part in later[:1] if not re.search(_LABEL, part) and len(_spelt(part).split()) < 5]
            doubted |= any(one.opposes(part) for one in beside for part in few)
            return None if doubted or _other_label([*earlier, *later], beside) else label.index
        return None

    def _opening(self, sentence: str) -> int | None:
        """The option of a letter that a sentence begins with: "B", "B. Paris is …", "(B) because …", "B, as …"."""
        if not re.match(_LABEL, sentence):
            return None
        label, (first, *later) = self._label(sentence[0]), _CLAUSE.split(sentence)
        first = first[1:]
        if not _spelt(sentence[1:]) and not re.search(_LABEL, sentence[1:]):
            return label.index
        apart = not _spelt(first) or _reason(first) == 0  # B, the tower   B because
        if not (label.marked or (apart and label.word is None)) or not (self.letters or label.named):
            return None
        clauses = [self._words(clause) for clause in (first, *later)]
        if _other_label(clauses, _languages()):
            return None
        for clause in clauses:
            if _reason(clause) == 0:
                break
            alone = len(_spelt(clause).split()) == 1  # "B: no"
            if not re.search(_LABEL, clause) and any(one.opposes(clause, known=alone) for one in _languages()):
                return None
        return label.index


def _other_label(clauses: Sequence[str], languages: Sequence["_Language"]) -> bool:
    """Whether clauses, up to the first reason, hold a label that they do not deny."""
    for place, clause in enumerate(clauses):
        reason = _reason(clause) if place or _reason(clause) else None
        told = clause if reason is None else clause[:reason]
        denied = any(one.opposes(told) for one in languages) and not any(one.doubts(told) for one in languages)
        if re.search(_LABEL, told) and not denied:
            return True
        if reason is not None:
            return False
    return False


def _spelt(text: str) -> str:
    """The words of a text in lower case, a space between them, and nothing else."""
    kept = []
    for character in text.casefold():
        # Marks are vowel signs and accents, parts of words; so is an apostrophe within one.
        kept.append(character if unicodedata.category(character)[0] in "LMN" or character == "'" else " ")
    return " ".join(word.strip("'") for word in "".join(kept).split() if word.strip("'"))


# -- the table of words ------------------------------------------------------------------------------------------------


class _Language:
    """A row of the table, as patterns."""

    def __init__(self, row: dict[str, str]) -> None:
        self.spaced = row["spaced"] == "yes"
        entries = {name: _entries(row[name]) for name in row if name not in ("language", "spaced")}
        before = [one for name in ("nouns", "options", "leads", "fillers") for one in entries[name]]
        self._before = self._pattern(before, "*$")
        self._after = self._pattern(before + entries["closers"], "*$")
        self._nouns = self._pattern(entries["nouns"])
        self._options = self._pattern(entries["options"])
        self._leads = self._pattern(entries["options"] + entries["leads"])
        self._closers = self._pattern(entries["closers"])
        self._ends = self._pattern(entries["closers"] + entries["nouns"], "$")
        against = entries["negations"] + entries["doubts"]
        self._against = self._pattern([one.rstrip("*") for one in against])
        self._elsewhere = self._pattern([one for one in against if not one.endswith("*")])
        self._negations = self._pattern([one.rstrip("*") for one in entries["negations"]])
        self._doubts = self._pattern([one.rstrip("*") for one in entries["doubts"]])

    def _pattern(self, entries: Sequence[str], tail: str = "") -> "re.Pattern[str]":
        choice = "|".join(re.escape(entry) for entry in sorted(set(entries), key=len, reverse=True)) or "(?!)"
        return re.compile(f"(?: (?:{choice})(?= |$)){tail}" if self.spaced else f"(?:{choice}){tail}")

    def _spelt(self, text: str) -> str:
        return " " + _spelt(text) if self.spaced else _spelt(text).replace(" ", "")

    def opposes(self, text: str, *, known: bool = True) -> bool:
        """Whether a text holds a negation, a doubt or a condition; ``known``: it is in this language."""
        spelt = self._spelt(text)
        return bool((self._against if known else self._elsewhere).search(spelt)) or "n't" in spelt

    def doubts(self, text: str) -> bool:
        """Whether a text holds a doubt, a condition or an alternative."""
        return bool(self._doubts.search(self._spelt(text)))

    def announces(self, before: str, after: str, *, alone: bool) -> str | None:
        """What stands in a clause before the words that say "the answer is" of a letter; None if none say so.

        Args:
            before: what stands before the letter in its clause.
            after: what stands after it.
            alone: nothing stands before the clause in its sentence.
        """
        told, follows = self._spelt(before)[-200:], self._spelt(after)
        known = self._before.search(told)
        assert known is not None  # it may be empty
        free, words = told[: known.start()].strip(), known[0]
        if self._negations.search(words):  # a word that holds a noun, such as 오답
            return None
        if follows.strip() and not (self._after.fullmatch(follows) and self._ends.search(follows)):
            return None
        right = self._closers.search(words) or self._closers.search(follows)
        if self._nouns.search(words) or (self._options.search(words) and right):
            return free
        said = self._leads.search(words) or follows.strip()
        return "" if said and alone and not free else None


def _entries(cell: str) -> list[str]:
    return [_spelt(_cleaned(entry)) + "*" * entry.endswith("*") for entry in cell.split(", ") if entry.strip()]


@cache
def _rows() -> list[dict[str, str]]:
    table = resources.files("vlmneurons.run").joinpath("answer_words.tsv").read_text(encoding="utf-8")
    head, *lines = table.splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


@cache
def _languages() -> tuple[_Language, ...]:
    """English first."""
    return tuple(_Language(row) for row in _rows())


@cache
def _reasons() -> "re.Pattern[str]":
    entries = [re.escape(_cleaned(one)) for row in _rows() for one in row["reasons"].split(", ") if one]
    return re.compile("|".join(rf"(?<!\w){one}(?!\w)" if one.isascii() else one for one in entries), re.I)


def _reason(clause: str) -> int | None:
    """Where in a clause the words begin that say why: 0 if nothing stands before them, None if there are none."""
    found = _reasons().search(clause)
    return None if found is None else found.start() * bool(re.search(rf"\w|{_LABEL}", clause[: found.start()]))


# -- the text of an option ---------------------------------------------------------------------------------------------

_ALONE = re.compile("yes|no|sí|si|oui|non|não|sim|ja|nei|nein|да|нет|true|false|ya|both|none|all|it")
"""Options that are words of many sentences: they count where they are a clause by themselves."""


def _by_text(text: str, options: Sequence[str]) -> int | None:
    """The one option whose words the text contains and does not deny; of two that contain each other, the longer."""
    plain = re.sub(r"[^\S\n]+", " ", text.casefold())
    plain = re.sub(r"(?<!\w)[a-z][.)] ", " ", plain)  # the letter of an option ends no sentence
    spans: list[tuple[int, int, int]] = []
    for index, option in enumerate(options):
        wanted = normalize(option)
        for match in re.finditer(re.escape(wanted), plain) if wanted else ():
            before, after = plain[: match.start()][-1:], plain[match.end() :][:1]
            if not joined(before, wanted[0]) and not joined(wanted[-1], after):
                spans.append((match.start(), match.end(), index))
    # From left to right, the longer first where two begin together: what ends before something earlier did lies in it.
    outer: set[int] = set()
    reached, before_it = -1, -1
    spans.sort(key=lambda span: (span[0], -span[1]))
    for n, (start, end, index) in enumerate(spans):
        if n and spans[n - 1][:2] != (start, end):
            reached = max(reached, before_it)
        before_it = end
        if end > reached and index not in outer and _affirmed(plain, start, end):
            outer.add(index)
    return outer.pop() if len(outer) == 1 else None


def _affirmed(plain: str, start: int, end: int) -> bool:
    """Whether the clause around a span neither denies nor doubts it, and its sentence does not ask."""
    # A clause is a few words: looking at all that was said before would take a long text's length squared.
    near = slice(max(0, start - 200), end + 200)
    left = re.split(_SENTENCE, plain[near.start : start])[-1]
    right = re.split(_SENTENCE, plain[end : near.stop])[0]
    if _QUESTION.search(f"{left}{plain[start:end]}{right}"):
        return False
    if re.search(r"\b(?:options|choices|opciones|opções|optionen|opzioni)\W*$", left):
        return False
    clause = f"{_CLAUSE.split(left)[-1]} {_CLAUSE.split(right)[0]}"
    if _ALONE.fullmatch(plain, start, end):
        return not _spelt(clause)
    return not any(language.opposes(clause, known=False) for language in _languages())


def joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word.

    Args:
        left: a character, or none.
        right: the one after it, or none.
    """
    if not left or not right:
        return False
    if unicodedata.category(right).startswith("M"):  # a vowel sign or an accent belongs to the letter before it
        return True
    if any(unicodedata.name(character, "").startswith(_UNSPACED) for character in (left, right)):
        return False
    return all(character == "_" or unicodedata.category(character)[0] in "LMN" for character in (left, right))


_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts that put no space between words, or between a word and its particles."""
