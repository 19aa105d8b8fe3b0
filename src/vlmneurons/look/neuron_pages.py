"""What a neuron fires at: the questions of each group at which it is highest, token by token and patch by patch.

`inspect_neuron` runs the questions, and keeps, for the best of each group, the neuron's value at every token. Image
tokens are laid back onto the picture where it is known which patch each of them stands for: for LLaVA-NeXT by sending
numbered patches through the model's own packing (base picture, tiles, unpadding, line ends), for Qwen-VL by its merged
grid. For other models the picture is shown without a map, and the page says so: a map that may be wrong is not drawn.
"""

import html
import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vlmneurons.checks import Keywords, as_flag, as_path, as_whole, check_kind
from vlmneurons.errors import MismatchError, QuestionError, SiteError
from vlmneurons.files.stopping import hooked
from vlmneurons.look.numbers import significant
from vlmneurons.look.pages import inside, page_from
from vlmneurons.model.architectures.hooks import read
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenRule
from vlmneurons.model.vlm import VLM, check_model, refuse_unobeyed
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import Site, site_of
from vlmneurons.progress import Progress
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.recording.counter import all_tokens
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.ask import Job, Options, ask, engine_of, to_ask
from vlmneurons.run.engine import Engine
from vlmneurons.run.local import LocalEngine
from vlmneurons.run.readers import Letters, Reading
from vlmneurons.run.remote import Remote

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_LARGEST, _HEAT = 360, (214, 39, 40)
"""Pixels of a picture's longer side, and the colour of the highest value."""


@dataclass(frozen=True)
class Patch:
    """Where in the pictures one image token lies.

    Attributes:
        picture: which of the question's pictures, from 0.
        view: ``"picture"``, the whole of it at once, or ``"tiles"``, the enlarged parts that LLaVA-NeXT adds.
        box: the part of the picture that it stands for: left, top, right, bottom, each from 0 to 1.
    """

    picture: int
    view: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class InspectedItem:
    """One question, and the neuron's value at each of its tokens.

    Attributes:
        question: the question.
        value: the highest value at a counted token.
        tokens: texts of the tokens; ``""`` for image tokens.
        values: ``[token]``, the neuron's value; NaN where the token did not reach it (experts).
        counted: ``[token]``, whether the token rule counts it.
        image: ``[token]``, whether it is an image token.
        patches: for each image token, in order, its place, or None (a line end); or None if that is not known.
        answer: what the model answers, read as the questions say; empty where that was not asked, or is not known.
        right: whether it is right; None where there is none.
    """

    question: Question
    value: float
    tokens: tuple[str, ...]
    values: Float[Tensor, " token"]
    counted: Bool[Tensor, " token"]
    image: Bool[Tensor, " token"]
    patches: tuple[Patch | None, ...] | None
    answer: str = ""
    right: bool | None = None

    def heat(self, picture: int = 0, view: str = "picture", size: tuple[int, int] = (256, 256)) -> np.ndarray:
        """The neuron's value over a picture, ``[height, width]``; NaN where no token stands for that part.

        Values are in the unit of the site: the activation itself.

        Args:
            picture: which of the question's pictures.
            view: ``"picture"`` or ``"tiles"``.
            size: width and height of the map in pixels.

        Raises:
            QuestionError: it is not known where this model's image tokens lie.
        """
        if self.patches is None:
            raise QuestionError(f"question {self.question.id!r}: it is not known where this model's image tokens lie")
        width, height = size
        heat = np.full((height, width), np.nan)
        for patch, value in zip(self.patches, self.values[self.image].tolist(), strict=True):
            if patch is None or (patch.picture, patch.view) != (picture, view):
                continue
            left, top, right, bottom = patch.box
            rows = slice(math.floor(top * height + 1e-6), max(math.ceil(bottom * height - 1e-6), 1))
            heat[rows, math.floor(left * width + 1e-6) : max(math.ceil(right * width - 1e-6), 1)] = value
        return heat

    def words(self) -> list[tuple[str, float, bool]]:
        """The text, piece by piece: text, highest value of its tokens, whether it is counted; images left out."""
        rows = zip(self.tokens, self.values.tolist(), self.counted.tolist(), self.image.tolist(), strict=True)
        return [(text, value, counted) for text, value, counted, image in rows if not image and text]

    def _top_words(self) -> list[tuple[str, float]]:
        """The words that are counted, from the highest value; one that did not reach the neuron comes last."""
        words = [(text, value) for text, value, counted in self.words() if counted]
        return sorted(words, key=lambda word: -math.inf if math.isnan(word[1]) else word[1], reverse=True)


@dataclass(frozen=True, eq=False)
class NeuronView:
    """The questions at which a neuron is highest, some of each group; made by `inspect_neuron`.

    Attributes:
        model: the model's name.
        site: the neuron's site.
        number: its number within the site.
        items: the questions, by group, highest first.
        mean: for each group, the mean over its questions of the highest value at a counted token.
        note: why there is no map over pictures, or no answer, if there is none.
        values: for each group ``[question]``, the highest value at a counted token of every question, those that are
            not shown too, in the unit of the site: the activation itself.
    """

    model: str
    site: Site
    number: int
    items: tuple[InspectedItem, ...]
    mean: dict[str, float]
    note: str = ""
    values: dict[str, Float[Tensor, " question"]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The neuron's name, such as ``"language.layers.3.mlp.gate[17]"``."""
        return f"{self.site}[{self.number}]"

    def table(self) -> "pandas.DataFrame":
        """One row a question shown: ``group``, ``id``, ``value``, ``question``, ``right``, ``answer``, ``top`` word."""
        import pandas as pd

        return pd.DataFrame(
            {
                "group": item.question.group,
                "id": item.question.id,
                "value": item.value,
                "question": item.question.question,
                "right": item.question.right,
                "answer": item.answer,
                "top": next((text for text, _ in item._top_words()), ""),
            }
            for item in self.items
        )

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write a page (``.html``: one file, no scripts, nothing loaded from elsewhere) or a picture (``.png``).

        Args:
            path: the file; its ending says which.

        Raises:
            QuestionError: the name ends in neither.
        """
        path = as_path("path", path, QuestionError)
        suffix = path.suffix.lower()
        if suffix == ".html":
            path.write_text(self.to_html(), encoding="utf-8")
        elif suffix == ".png":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # of scripts that the font lacks
                self.plot().savefig(path, dpi=110)
        else:
            raise QuestionError(f"{os.fspath(path)!r} ends in {suffix!r}; a neuron's page is saved as .html or .png")

    def to_html(self) -> str:
        """The page as text."""
        groups: dict[str, list[Keywords]] = {}
        places: dict[object, str] = {}
        for number, item in enumerate(self._sorted_items()):
            group = item.question.group
            card = _card(item, self._highest, number, places) | {"mean": significant(self.mean[group])}
            groups.setdefault(group, []).append(card)
        most = max([*self.mean.values(), 1e-9])
        means = [(name, significant(mean), round(100 * max(mean, 0) / most)) for name, mean in self._by_mean()]
        texts: Keywords = {"title": f"Neuron {self.name}", "highest": significant(self._highest)}
        return page_from("neuron.html", view=self, groups=groups, means=means, **texts)

    def _repr_html_(self) -> str:
        return f"<iframe srcdoc='{html.escape(self.to_html(), quote=True)}' width='100%' height='600'></iframe>"

    def plot(self) -> "Figure":
        """The same as a picture: one row a question, with its pictures, maps, and highest words."""
        from matplotlib.figure import Figure

        drawn = [(item, _pictures(item, self._highest)) for item in self._sorted_items()]
        columns = max((len(pictures) for _, pictures in drawn), default=0) + 1
        rows = max(len(drawn), 1)
        figure = Figure(figsize=(2.6 * columns + 2.2, 2.5 * rows + 0.6), layout="constrained")
        figure.suptitle(f"{self.name}\n{self.note}" if self.note else self.name, parse_math=False, wrap=True)
        axes = figure.subplots(rows, columns, squeeze=False, width_ratios=[1] * (columns - 1) + [1.8])
        for axis in axes.flat:
            axis.set_axis_off()
        for row, (item, pictures) in zip(axes, drawn, strict=False):
            for axis, (title, picture) in zip(row, pictures, strict=False):
                axis.imshow(np.asarray(picture))
                axis.set_title(title, fontsize=8)
            words = "\n".join(f"{value:+.2f}  {text.strip()!r}" for text, value in item._top_words()[:4])
            asked = item.question.question[:70]
            text = f"{item.question.group}: {asked}\nright: {item.question.right[:40]}\n\n{words}"
            row[-1].text(0, 0.95, text, va="top", fontsize=8, parse_math=False, wrap=True)
        return figure

    @property
    def _highest(self) -> float:
        return max((item.value for item in self.items), default=1.0)

    def _by_mean(self) -> list[tuple[str, float]]:
        """Groups with their means, from the highest; one in which no token reached the neuron comes last."""
        return sorted(self.mean.items(), key=lambda pair: (math.isnan(pair[1]), -pair[1]))

    def _sorted_items(self) -> list[InspectedItem]:
        """The questions, those of the group for which the neuron is highest first."""
        rank = {group: place for place, (group, _) in enumerate(self._by_mean())}
        return sorted(self.items, key=lambda item: rank[item.question.group])

    def __repr__(self) -> str:
        return f"NeuronView({self.name}: {len(self.items)} questions of {len(self.mean)} groups)"


def inspect_neuron(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    neuron: "int | tuple[Site | str, int]",
    *,
    k: int = 3,
    answers: bool = True,
    tokens: TokenRule = "content",
    batch_size: int = 8,
    by_length: bool = False,
    prefetch: int | None = None,
    on_error: str = "raise",
    progress: Progress = False,
    remote: Remote = False,
) -> NeuronView:
    """The questions of each group at which a neuron is highest, with its value at every token and image patch.

    Args:
        model: the model.
        questions: where to look; they are run once, and of those that are not shown only the value is kept.
        neuron: a site (or its name) and the neuron's number in it; or its number in ``model.space()``.
        k: questions shown of each group.
        answers: ask those once more, for what the model answers; the page shows it.
        tokens: which tokens make a question's value, its maximum over them; see `vlmneurons.record`.
        batch_size: questions a forward; where they do not fit into memory, half as many from then on.
        by_length: let questions of like length share a batch; see `vlmneurons.record`.
        prefetch: how many batches a thread prepares while the model runs; see `vlmneurons.record`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked.
        progress: show a progress bar.
        remote: only False: values at every token do not come back from a model that runs elsewhere.

    Raises:
        SiteError: no such neuron, or one of another tower than the language model.
        QuestionError: there are no questions, or one cannot be asked.
        MismatchError: an encoder-decoder model, whose decoder does not see the question; or one that runs its layers
            several times in a forward.

    Examples:
        >>> view = inspect_neuron(model, questions, ("language.layers.2.mlp.gate", 17), k=2)  # doctest: +SKIP
        >>> view.save("neuron.html")  # doctest: +SKIP
    """
    check_model(model)
    if isinstance(neuron, tuple) and len(neuron) == 2:
        site = site_of("the neuron's site", neuron[0])
        number = as_whole("the neuron's number", neuron[1], SiteError)
    else:
        site, number = model.space().locate(neuron)
    width = model.mlp_of(site).width
    if not 0 <= number < width:
        raise SiteError(f"neuron {number} is not in site {site} (0–{width - 1})")
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote)
    (view,) = _inspected(model, questions, [(site, int(number))], k, tokens, options, answers)
    return view


def inspect_neurons(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    neurons: NeuronSet,
    *,
    k: int = 3,
    answers: bool = True,
    tokens: TokenRule = "content",
    batch_size: int = 8,
    by_length: bool = False,
    prefetch: int | None = None,
    on_error: str = "raise",
    progress: Progress = False,
    remote: Remote = False,
) -> list[NeuronView]:
    """What `inspect_neuron` gives, of many neurons in one pass over the questions.

    In memory are the values of all neurons at every token of a batch, for each neuron of the questions that are shown,
    and its highest value in every question.

    Args:
        model: the model.
        questions: where to look; see `inspect_neuron`.
        neurons: of the language tower, such as ``selection["Egypt"]``.
        k: questions shown of each group and neuron.
        answers: ask those once more, for what the model answers.
        tokens: which tokens make a question's value; see `inspect_neuron`.
        batch_size: questions a forward.
        by_length: let questions of like length share a batch; see `vlmneurons.record`.
        prefetch: how many batches a thread prepares while the model runs; see `vlmneurons.record`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked.
        progress: show a progress bar.
        remote: only False; see `inspect_neuron`.

    Returns:
        A `NeuronView` for each neuron, in the order of ``neurons.indices``.

    Raises:
        SiteError: neurons of another tower than the language model.
        QuestionError: there are no questions, or one cannot be asked.
        MismatchError: neurons of another model; see `inspect_neuron` for others.

    Example:
        ``[view.table() for view in vn.inspect_neurons(model, questions, selection["Egypt"], k=2)]``
    """
    check_model(model)
    check_kind("neurons", neurons, NeuronSet, MismatchError, "one NeuronSet, such as selection['Egypt']")
    Ablation(model, neurons)  # says what is wrong with them, and is never entered
    wanted = [(site, number) for site, part in neurons.by_site().items() for number in part.tolist()]
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote)
    return _inspected(model, questions, wanted, k, tokens, options, answers)


def _inspected(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    neurons: Sequence[tuple[Site, int]],
    k: int,
    tokens: TokenRule,
    options: Options,
    answers: bool,
) -> list[NeuronView]:
    """Run the questions once, and keep what is shown of each neuron; then ask what is shown."""
    as_flag("answers", answers, QuestionError)
    for site, _ in neurons:
        if site.tower != "language":
            raise SiteError(
                f"{site}: only neurons of the language tower see words and pictures as tokens; record others"
            )
    as_whole("k", k, QuestionError, least=1)
    refuse_unobeyed(model)
    if options.remote is not False:
        raise QuestionError(f"remote={options.remote!r}: values at every token do not come back; run the model here")
    if model.is_encoder_decoder:
        raise MismatchError(
            f"{type(model.hf).__name__} is an encoder-decoder model: its decoder does not see the question's tokens"
        )
    asked = to_ask(questions, None, "to look at")
    if not neurons:
        return []
    job = _InspectingJob(LocalEngine(model, Letters()), asked.groups, neurons, k, tokens)
    ask(job, asked, options)
    notes = []
    if not job.places_known:
        kind = type(model.hf).__name__
        notes.append(f"Where in the picture an image token of {kind} lies is not known: no map is drawn.")
    if answers:
        notes += _answer(model, asked, job.best, options)
    values = {group: torch.stack(highest, 1) for group, highest in job.values.items() if highest}
    means = {group: (job.sums[group] / highest.shape[1]).tolist() for group, highest in values.items()}
    return [
        NeuronView(
            model.name,
            site,
            number,
            tuple(item for group in job.best.values() for item in group[place]),
            {group: mean[place] for group, mean in means.items()},
            " ".join(notes),
            {group: highest[place] for group, highest in values.items()},
        )
        for place, (site, number) in enumerate(neurons)
    ]


def _answer(
    model: VLM, asked: QuestionSet, best: Mapping[str, list[list[InspectedItem]]], options: Options
) -> list[str]:
    """Put the model's answers to the items that are shown; gives why there are none, if there are none."""
    shown = [items for group in best.values() for items in group]
    ids = {item.question.id for items in shown for item in items}
    try:
        questions = asked.with_items(item for item in asked if item.id in ids)
        job = _AnswerJob(engine_of(model, questions))
        ask(job, questions, replace(options, progress=False))
    except (MismatchError, QuestionError) as error:
        return [f"What the model answers is not known: {error}"]
    for items in shown:
        items[:] = [replace(item, **job.answers.get(item.question.id, {})) for item in items]
    return []


class _AnswerJob(Job[Reading]):
    """Keeps what the model answers to each question, and whether it is right."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.answers: dict[str, Keywords] = {}

    def run(self, questions: QuestionSet, encoded: object, move_bar: Callable[[int], object], /) -> Reading:
        """See `Job.run`."""
        return self.engine.reader.read(self.engine.model, questions, encoded)

    def take(self, number: int, questions: QuestionSet, made: Reading) -> int:
        """See `Job.take`."""
        texts = made.texts or ("",) * len(questions)
        for item, chosen, text in zip(questions, made.chosen, texts, strict=True):
            option = item.options[chosen] if chosen is not None and item.options else text
            if option:
                self.answers[item.id] = {"answer": option, "right": chosen == item.answer}
        return len(questions)


class _InspectingJob(Job["Float[Tensor, 'neuron row token']"]):
    """Keeps the questions of each group at which each neuron is highest."""

    def __init__(
        self, engine: Engine, groups: Sequence[str], neurons: Sequence[tuple[Site, int]], k: int, tokens: TokenRule
    ) -> None:
        super().__init__(engine)
        self._neurons, self._k, self._tokens = neurons, k, tokens
        self.best: dict[str, list[list[InspectedItem]]] = {group: [[] for _ in neurons] for group in groups}
        self.sums = {group: torch.zeros(len(neurons), dtype=torch.float64) for group in groups}
        self.values: dict[str, list[Float[Tensor, " neuron"]]] = {group: [] for group in groups}
        self._least = {group: torch.full((len(neurons),), -math.inf) for group in groups}
        self.places_known = True
        self._batch: Batch | None = None

    def encode(self, questions: QuestionSet) -> Batch:
        """See `Job.encode`: as the user's own calls show them."""
        return self.engine.model.prepare(questions)

    def run(
        self, questions: QuestionSet, encoded: Batch, move_bar: Callable[[int], object], /
    ) -> Float[Tensor, "neuron row token"]:
        """See `Job.run`."""
        self._batch = encoded
        return _values(self.engine.model, self._neurons, encoded)

    def take(self, number: int, questions: QuestionSet, made: Float[Tensor, "neuron row token"]) -> int:
        """See `Job.take`."""
        model, batch = self.engine.model, self._batch
        assert batch is not None
        counted = batch.tokens.counted(self._tokens).cpu()
        high = made.masked_fill(~counted | made.isnan(), -math.inf).amax(-1)
        firsts = np.cumsum([0, *(item.n_images for item in questions)])
        for row, item in enumerate(questions):
            best, least = self.best[item.group], self._least[item.group]
            # A group's first k questions are kept whatever they are, also where no token reached the neuron.
            few = len(self.values[item.group]) < self._k
            enters = range(len(best)) if few else torch.nonzero(high[:, row] > least).flatten().tolist()
            self.sums[item.group] += high[:, row].double()
            self.values[item.group].append(high[:, row].clone())
            if not len(enters):
                continue
            attended = batch.tokens.attention[row].cpu()
            image = batch.tokens.image[row].cpu()[attended]
            patches = _patches(model, batch, int(firsts[row]), item.n_images, int(image.sum()))
            self.places_known &= patches is not None
            texts = _texts(model.tokenizer, batch["input_ids"][row].cpu()[attended].tolist(), image.tolist())
            for place in enters:
                values, value = made[place, row][attended], float(high[place, row])
                inspected = InspectedItem(item, value, texts, values, counted[row][attended], image, patches)
                best[place] = sorted([*best[place], inspected], key=lambda item: -item.value)[: self._k]
                if len(best[place]) == self._k:
                    least[place] = best[place][-1].value
        return len(questions)


def _values(model: VLM, neurons: Sequence[tuple[Site, int]], batch: Batch) -> Float[Tensor, "neuron row token"]:
    """The neurons' values at every token of a batch; NaN where a token was not routed to them."""
    kept = torch.full((len(neurons), *batch["input_ids"].shape), torch.nan)
    flat, places_at = kept.view(len(neurons), -1), {}
    for place, (site, _) in enumerate(neurons):
        places_at.setdefault(site, []).append(place)

    def keeper(places: list[int]) -> Callable[..., None]:
        numbers = torch.tensor([neurons[place][1] for place in places])
        passes = 0

        def keep(values: Tensor, tokens: Tensor | None = None) -> None:
            nonlocal passes
            columns = values[..., numbers.to(values.device)].detach().to("cpu", torch.float32).flatten(0, -2).T
            if tokens is not None:  # an expert sees the tokens that were routed to it
                flat[torch.tensor(places)[:, None], tokens.cpu()] = columns
                return
            passes += 1
            if passes > 1 or columns.shape[1] != flat.shape[1]:
                raise MismatchError(
                    f"{type(model.hf).__name__} does not compute the neuron once for each token of a forward, so "
                    "there is no one value to show at it; vn.record counts all of them"
                )
            flat[places] = columns

        return keep

    reads = (read(model.hf, model.mlp_of(site), site.kind, keeper(places)) for site, places in places_at.items())
    with hooked(reads), all_tokens(model, places_at, lambda: flat.shape[1]), torch.inference_mode():
        model.hf(**batch)
    return kept


def _texts(tokenizer: Any, ids: Sequence[int], image: Sequence[bool]) -> tuple[str, ...]:
    """Text of each token; a character that several tokens make together stands at the last of them."""
    texts, waiting = [], []
    for number, is_image in zip(ids, image, strict=True):
        if is_image:
            texts.append("")
            waiting = []
            continue
        waiting.append(number)
        text = tokenizer.decode(waiting)
        if "\ufffd" in text and len(waiting) < 8:
            texts.append("")
            continue
        texts.append(text)
        waiting = []
    return tuple(texts)


# -- where image tokens lie --------------------------------------------------------------------------------------------


def _patches(model: VLM, batch: Batch, first: int, n_images: int, n_tokens: int) -> tuple[Patch | None, ...] | None:
    """The place of each image token of one question, whose pictures begin at ``first``; None if it is not known."""
    if n_images == 0:
        return ()
    places: list[Patch | None] = []
    for picture in range(n_images):
        if "image_grid_thw" in batch:
            patches = _merged_grid(model, batch["image_grid_thw"][first + picture].tolist(), picture)
        elif getattr(model.hf.config, "model_type", "") == "llava_next" and "image_sizes" in batch:
            patches = _llava_next(model, batch["image_sizes"][first + picture].cpu(), picture)
        else:
            return None
        if patches is None:
            return None
        places += patches
    return tuple(places) if len(places) == n_tokens else None


def _merged_grid(model: VLM, grid: list[int], picture: int) -> list[Patch | None] | None:
    """Qwen-VL and its relatives: patches of the resized picture, merged in squares, row by row."""
    vision = getattr(model.hf.config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    frames, height, width = grid
    if merge is None or frames != 1 or height % merge or width % merge:
        return None
    rows, columns = height // merge, width // merge
    return [
        Patch(picture, "picture", (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows))
        for row in range(rows)
        for column in range(columns)
    ]


def _llava_next(model: VLM, size: Tensor, picture: int) -> list[Patch | None] | None:
    """LLaVA-NeXT: the whole picture squeezed into a square, then the tiles of the enlarged one with line ends.

    The order is the model's own: it is given patches that are numbers, and packs them.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config = model.hf.config
    edge = config.vision_config.image_size
    side = edge // config.vision_config.patch_size
    tiles_high, tiles_wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
    base, tiles = side * side, tiles_high * tiles_wide
    numbered = torch.arange((1 + tiles) * base, dtype=torch.float64).reshape(1 + tiles, base, 1)
    pack = getattr(model.hf.model, "pack_image_features", None)
    if pack is None or config.vision_feature_select_strategy != "default":
        return None
    packed, _ = pack(
        [numbered], size[None], vision_feature_select_strategy="default", image_newline=torch.tensor([-1.0]).double()
    )
    height, width = (int(length) for length in size)
    canvas_wide, canvas_high = tiles_wide * edge, tiles_high * edge
    # As the image processor enlarges: the side that fills the canvas first decides, the other is padded evenly.
    scale = min(canvas_wide / width, canvas_high / height)
    content_wide = min(math.ceil(width * scale), canvas_wide)
    content_high = min(math.ceil(height * scale), canvas_high)
    left, top = (canvas_wide - content_wide) // 2, (canvas_high - content_high) // 2

    def place(number: int) -> Patch | None:
        if number < 0:
            return None
        crop, within = divmod(number, base)
        row, column = divmod(within, side)
        if crop == 0:
            return Patch(picture, "picture", (column / side, row / side, (column + 1) / side, (row + 1) / side))
        tile_row, tile_column = divmod(crop - 1, tiles_wide)
        x, y = (tile_column * side + column) * edge / side, (tile_row * side + row) * edge / side
        box = (
            (x - left) / content_wide,
            (y - top) / content_high,
            (x + edge / side - left) / content_wide,
            (y + edge / side - top) / content_high,
        )
        a, b, c, d = (min(max(corner, 0.0), 1.0) for corner in box)
        return Patch(picture, "tiles", (a, b, c, d))

    return [place(round(number)) for number in packed[0].flatten().tolist()]


# -- drawing -----------------------------------------------------------------------------------------------------------


def _maps(item: InspectedItem, picture: int) -> list[tuple[str, str]]:
    """Views of a picture that have a map, each with its title."""
    views = dict.fromkeys(patch.view for patch in item.patches or () if patch and patch.picture == picture)
    return [(view, "map" if view == "picture" else "map, tiles") for view in views]


def _pictures(item: InspectedItem, highest: float) -> list[tuple[str, Image.Image]]:
    """A question's pictures, each followed by its maps."""
    drawn = []
    for number, picture in enumerate(item.question.load_images()):
        scale = _LARGEST / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        large = picture.resize(size, Image.Resampling.LANCZOS)
        drawn.append(("picture", large))
        for view, title in _maps(item, number):
            drawn.append((title, _overlay(large, item.heat(number, view, size), highest)))
    return drawn


def _overlay(picture: Image.Image, heat: np.ndarray, highest: float) -> Image.Image:
    """A pale grey picture with a red map on it: no red at 0 and below, full red at the highest value."""
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None].repeat(3, -1) * 0.6 + 255 * 0.4
    alpha = 0.85 * np.clip(np.nan_to_num(heat, nan=0.0) / max(highest, 1e-9), 0, 1)[..., None]
    return Image.fromarray((grey * (1 - alpha) + np.array(_HEAT) * alpha).round().astype(np.uint8))


def _card(item: InspectedItem, highest: float, first: int, places: dict[object, str]) -> Keywords:
    """What the page shows of a question; each picture is in the page once, and elsewhere named by its place."""
    pictures = []
    for number, picture in enumerate(item.question.load_images()):
        small = picture.convert("RGB")
        small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        key = (item.question.image_key, number)
        address = places.get(key) or inside(_file(small, "WEBP"), "image/webp")
        places.setdefault(key, f"#p{first}-{len(pictures)}")
        pictures.append(("picture", address, *small.size, ""))
        for view, title in _maps(item, number):
            share = np.clip(np.nan_to_num(item.heat(number, view, (96, 96))) / max(highest, 1e-9), 0, 1)
            red = np.dstack([*(np.full_like(share, colour) for colour in _HEAT), 255 * share]).round().astype(np.uint8)
            heat = inside(_file(Image.fromarray(red), "PNG"), "image/png")
            pictures.append((title, places[key], *small.size, heat))
    words = []
    for text, value, counted in item.words():
        shade = round(min(max(np.nan_to_num(value) / max(highest, 1e-9), 0.0), 1.0), 3)
        bare = text.strip()
        before, _, after = text.partition(bare) if bare else ("", "", text)
        shown = bare or ("↵" if "\n" in text else "␣")
        words.append((text, counted, before, shown, after, shade, significant(value)))
    top = [(text.strip(), significant(value)) for text, value in item._top_words()[:3]]
    return {
        "item": item,
        "value": significant(item.value, 4),
        "first": first,
        "top": top,
        "answer": [option == item.answer for option in item.question.options],
        "pictures": pictures,
        "words": words,
    }


def _file(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=80)
    return buffer.getvalue()
