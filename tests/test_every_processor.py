"""Every small model with a processor of its own family: what works is held to plain PyTorch, what does not is named.

The expected numbers come from a second copy of each model that the library never touches: its processor is called
plainly, on one question at a time and thus without padding, and values are taken by forward hooks. Where even a single
picture is padded (Gemma 4, Mllama), the padding is taken out by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import vlmneurons as vn
from helpers import picture, removed_after
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.run.masked import read_masked
from vlmneurons.run.readers import Letters, TextLikelihood
from vlmneurons.testing import tiny_model, tiny_names, tiny_template

# Processors of transformers 5.24 make arrays of tensors in a way that NumPy warns of (GLM-4V).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = tiny_names(processor=False)
ROUNDING = 3
"""How many counts of thousands may differ: neurons within rounding of 0, in a batch of another size."""

FLORENCE = (
    "MismatchError: Florence2ForConditionalGeneration is an encoder-decoder model: no single forward shows its decoder "
    "the question and gives the answer. Count in runs of your own: with vn.Recorder(model, model.space('encoder')) as "
    "recorder, recorder.group(…): model.hf(**model.prepare(questions))"
)
FLORENCE_ANSWER = (
    "QuestionError: Florence2ForConditionalGeneration is an encoder-decoder model: its answer begins in the decoder, "
    "not after the question, so the question's logits do not hold it; read answers by generation (answer='generate')"
)
APPENDED = (
    "QuestionError: question 'q0': {} puts text of its own after the prompt, so no text of an option continues it; "
    "read answers by letters or generation"
)
ROUTED = "AblationError: {}: per-row neurons are not available for routed experts; ablate all rows alike"

TABLE: dict[tuple[str, str], str] = {
    ("paligemma", "option texts"): APPENDED.format("PaliGemmaProcessor"),
    ("paligemma", "no picture"): (
        "QuestionError: question 'q0': the processor refuses it (ValueError: `images` are expected as arguments to a "
        "`PaliGemmaProcessor` instance.)"
    ),
    ("got_ocr2", "no picture"): (
        "QuestionError: question 'q0': the processor refuses it (ValueError: You must provide valid `images` for "
        "GotOcr2Processor, found `None`)"
    ),
    ("qwen3_vl_moe", "masks by row"): ROUTED.format("language.layers.0.mlp.experts.0.post"),
    ("llama4", "masks by row"): ROUTED.format("language.layers.1.mlp.experts.0.post"),
    ("glm4v_moe", "masks by row"): ROUTED.format("language.layers.1.mlp.experts.0.post"),
    **{("florence2", column): FLORENCE for column in ("language", "vision", "no picture", "knockout")},
    **{("florence2", column): FLORENCE_ANSWER for column in ("letters", "masks", "masks by row", "vision masks")},
    ("florence2", "option texts"): APPENDED.format("Florence2Processor"),
    ("florence2", "two pictures"): (
        "QuestionError: question 'q0': the processor refuses it (ValueError: The total number of <image> tokens in the "
        "prompts should be the same as the number of images passed. Found total 1 <image> tokens and 2 images.)"
        if Version(transformers.__version__) >= Version("5.23")
        else FLORENCE  # its processor did not count, and left it to the model
    ),
}
"""What is not "works", by model and column: the exact error."""


def question(number: int, *pictures: Any) -> vn.Question:
    return vn.Question(
        list(pictures) or None,
        f"What is this {'long word ' * (number % 4)}?",
        ("Tea", "Rice", "Bread", "Soup"),
        number % 4,
        "AB"[number % 2],
        id=f"q{number}",
    )


WITH_PICTURES = vn.QuestionSet([question(n, picture(n, 24 + 8 * (n % 3), 40 - 8 * (n % 2))) for n in range(4)])
WITHOUT = vn.QuestionSet([question(n) for n in range(3)])
WITH_TWO = vn.QuestionSet([question(0, picture(0), picture(1, 40, 24)), question(1, picture(2), picture(3, 32, 40))])


class Case:
    """A model in the library's hands, and the same model in nobody's."""

    def __init__(self, name: str) -> None:
        self.name, self.template = name, tiny_template(name)
        hf, processor = tiny_model(name)
        # The library knows by itself how PaliGemma is prompted.
        self.model = vn.VLM(hf, processor, template=None if name == "paligemma" else self.template)
        self.bare, self.processor = tiny_model(name)

    # -- plain transformers --------------------------------------------------------------------------------------------

    def prompt(self, item: vn.Question) -> str:
        text = WITH_PICTURES.prompt(item, [item.options[index] for index in WITH_PICTURES.order(item)])
        if self.template is not None:
            return self.template(text, item.n_images)
        content = [{"type": "image"}] * item.n_images + [{"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def inputs(self, item: vn.Question, more: str = "") -> dict[str, Tensor]:
        """One question as the processor makes it, alone and without padding."""
        text, images = self.prompt(item) + more, list(item.load_images())
        if self.name != "got_ocr2":
            images = [images]
        begins = self.processor.tokenizer.bos_token
        own = {"add_special_tokens": False} if begins and text.startswith(begins) else {}
        made = self.processor(text=[text], **({"images": images} if item.n_images else {}), return_tensors="pt", **own)
        made = {name: value for name, value in made.items() if name != "labels"}
        if "image_position_ids" in made:  # Gemma 4
            real = (made["image_position_ids"] >= 0).all(-1)
            assert item.n_images > 1 or real.sum() < real.numel()
            if item.n_images == 1:
                made["pixel_values"] = made["pixel_values"][:, real[0]]
                made["image_position_ids"] = made["image_position_ids"][:, real[0]]
        if self.name == "florence2":
            made["decoder_input_ids"] = torch.tensor([[2, 20, 21]])
        return {name: value.float() if value.is_floating_point() else value for name, value in made.items()}

    @cached_property
    def singles(self) -> list[dict[str, Tensor]]:
        return [self.inputs(item) for item in WITH_PICTURES]

    def mlps(self, tower: str) -> list[MLP]:
        return [mlp for mlp in self.model.towers[tower].mlps if mlp.expert is None]

    @contextmanager
    def hooked(self, tower: str) -> Iterator[dict[int, list[Tensor]]]:
        """The values before the down projection of every MLP that is a module, by its place in the tower's space."""
        values: dict[int, list[Tensor]] = {}
        handles = []
        for place, mlp in enumerate(self.model.towers[tower].mlps):
            if mlp.expert is None:
                down = self.bare.get_submodule(mlp.path).get_submodule(mlp.layout.down)
                handles.append(
                    down.register_forward_pre_hook(lambda _, args, p=place: values.setdefault(p, []).append(args[0]))
                )
        with removed_after(handles):
            yield values

    @contextmanager
    def zeroed(self, neurons: vn.NeuronSet, tower: str) -> Iterator[None]:
        handles = []
        for mlp, columns in self.columns(neurons, tower):
            down = self.bare.get_submodule(mlp.path).get_submodule(mlp.layout.down)
            handles.append(down.register_forward_pre_hook(lambda _, args, c=columns: (args[0].index_fill(-1, c, 0.0),)))
        with removed_after(handles):
            yield

    def columns(self, neurons: vn.NeuronSet, tower: str) -> Iterator[tuple[MLP, Tensor]]:
        for place, mlp in enumerate(self.model.towers[tower].mlps):
            start = neurons.space.offsets[place]
            here = neurons.indices[(neurons.indices >= start) & (neurons.indices < start + mlp.width)] - start
            if len(here):
                yield mlp, here

    def letters(self, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability of each option letter after a question, in the order shown."""
        vocabulary = self.processor.tokenizer.get_vocab()
        forms = torch.tensor([[vocabulary[letter], vocabulary["Ġ" + letter]] for letter in "ABCD"])
        return self.bare(**inputs).logits[0, -1].log_softmax(-1)[forms].logsumexp(-1)

    # -- neurons -------------------------------------------------------------------------------------------------------

    def some(self, tower: str, seed: int, *, experts: bool = False) -> vn.NeuronSet:
        """A tenth of a tower's neurons, at random; of those that are not routed to if plain hooks are to reach them."""
        space = self.model.space(tower, "post")
        chosen = torch.rand(len(space), generator=torch.Generator().manual_seed(seed)) < 0.1
        if not experts:
            for place, mlp in enumerate(self.model.towers[tower].mlps):
                if mlp.expert is not None:
                    chosen[space.offsets[place] : space.offsets[place] + mlp.width] = False
        return vn.NeuronSet(space, chosen.nonzero().flatten())


# --- the columns of the table ---


def same_counts(case: Case, statistics: vn.ActivationStatistics, tower: str, expected: dict[int, Tensor]) -> None:
    """Counts of each group ``[group, neuron]`` are those expected of the MLPs that plain hooks reach."""
    space = case.model.space(tower, "post")
    for place, counts in expected.items():
        start = space.offsets[place]
        got = statistics.positive[:, start : start + space.widths[place]]
        assert got.shape == counts.shape
        off = int((got - counts).abs().sum())
        assert off <= ROUNDING, f"{off} of {int(counts.sum())} counts differ at {space.sites[place]}"


def language_counts(case: Case, questions: vn.QuestionSet) -> None:
    """`record` counts what plain hooks see at the tokens of the question and its picture, whatever the batch."""
    model = case.model
    recorded = [
        vn.record(model, questions, model.space("language", "post"), condition="all", batch_size=size, progress=False)
        for size in (4, 1)
    ]
    batch = model.prepare(questions, padding_side="right")
    groups, expected, n_tokens = list(recorded[0].groups), {}, [0] * len(recorded[0].groups)
    for row, item in enumerate(questions):
        alone = case.inputs(item)
        real = batch.tokens.attention[row]
        assert torch.equal(batch["input_ids"][row][real], alone["input_ids"][0])
        counted = batch.tokens.counted("content")[row][real]
        text = model.tokenizer.decode(alone["input_ids"][0][counted & ~batch.tokens.image[row][real]])
        assert text.strip() == questions.prompt(item, [item.options[n] for n in questions.order(item)]).strip()
        placeholders = alone["input_ids"][0] == case.bare.config.image_token_id
        assert torch.equal(batch.tokens.image[row][real], placeholders)
        group = groups.index(item.group)
        n_tokens[group] += int(counted.sum())
        with case.hooked("language") as values:
            case.bare(**alone)
        for place, (value,) in values.items():
            table = expected.setdefault(place, torch.zeros(len(groups), value.shape[-1], dtype=torch.int64))
            table[group] += (value.reshape(-1, value.shape[-1]) > 0)[counted].sum(0)
    for statistics in recorded:
        assert statistics.tokens.tolist() == n_tokens
        same_counts(case, statistics, "language", expected)
    assert int((recorded[0].positive - recorded[1].positive).abs().sum()) <= ROUNDING


def language(case: Case) -> None:
    language_counts(case, WITH_PICTURES)


def no_picture(case: Case) -> None:
    language_counts(case, WITHOUT)


def two_pictures(case: Case) -> None:
    language_counts(case, WITH_TWO)
    model = case.model
    one, two = (
        vn.record(model, WITH_TWO, model.space("vision"), condition="all", batch_size=size, progress=False)
        for size in (1, 2)
    )
    assert torch.equal(one.tokens, two.tokens)
    assert int((one.positive - two.positive).abs().sum()) <= ROUNDING


def real_patches_of(case: Case, inputs: dict[str, Tensor], value: Tensor) -> Tensor:
    """The values of one question at patches of its picture ``[patch, neuron]``, by hand."""
    if case.name == "mllama":  # tiles of 4 x 4 patches and the class token, filled up to 24
        n_tiles = int(inputs["aspect_ratio_mask"].sum())
        value = value.reshape(-1, 24, value.shape[-1])[:n_tiles, :17]
    return value.reshape(-1, value.shape[-1])


def vision(case: Case) -> None:
    """Every patch of a question's picture is counted for it, and no padding."""
    model, space = case.model, case.model.space("vision", "post")
    recorded = [
        vn.record(model, WITH_PICTURES, space, condition="all", batch_size=size, progress=False) for size in (4, 1)
    ]
    groups, expected = list(recorded[0].groups), {}
    n_patches: dict[int, list[int]] = {}
    for item, alone in zip(WITH_PICTURES, case.singles, strict=True):
        group = groups.index(item.group)
        with case.hooked("vision") as values:
            case.bare(**alone)
        for place, parts in values.items():
            value = torch.cat([real_patches_of(case, alone, part) for part in parts])
            table = expected.setdefault(place, torch.zeros(len(groups), value.shape[-1], dtype=torch.int64))
            table[group] += (value > 0).sum(0)
            n_patches.setdefault(place, [0] * len(groups))[group] += len(value)
    with vn.Recorder(model, space) as recorder:  # in runs of the user's own padding does not count either
        model.hf(**model.prepare(WITH_PICTURES))
    assert recorder.statistics.tokens.tolist() == [sum(n_patches[0])]
    assert int((recorder.statistics.positive[0] - recorded[0].positive.sum(0)).abs().sum()) <= ROUNDING
    for statistics in recorded:
        assert statistics.tokens.tolist() == n_patches[0]
        same_counts(case, statistics, "vision", expected)


def padding_sides(case: Case) -> None:
    """Left and right padding give the same counts."""
    model, counts, tower = case.model, [], "encoder" if case.name == "florence2" else "language"
    for side in ("left", "right"):
        batch = dict(model.prepare(WITH_PICTURES, padding_side=side))
        if case.name == "florence2":
            batch["decoder_input_ids"] = torch.tensor([[2, 20, 21]] * 4)
        with vn.Recorder(model, model.space(tower, "post")) as recorder:
            model.hf(**batch)
        counts.append(recorder.statistics)
    assert torch.equal(counts[0].tokens, counts[1].tokens)
    assert int((counts[0].positive - counts[1].positive).abs().sum()) <= ROUNDING


def letters(case: Case) -> None:
    """The letters' log-probabilities are those of plain forwards one by one."""
    reader = Letters()
    reading = reader.read(case.model, WITH_PICTURES, reader.encode(case.model, WITH_PICTURES))
    for row, (item, alone) in enumerate(zip(WITH_PICTURES, case.singles, strict=True)):
        shown = case.letters(alone).double()
        order = list(WITH_PICTURES.order(item))
        torch.testing.assert_close(reading.scores[row][order], shown, rtol=0, atol=1e-3)
        assert reading.chosen[row] == order[int(shown.argmax())]


def option_texts(case: Case) -> None:
    """The options' log-likelihoods are those of plain forwards one by one."""
    reader, some = TextLikelihood(), WITH_PICTURES[:2]
    reading = reader.read(case.model, some, reader.encode(case.model, some))
    for row, item in enumerate(some):
        n_prompt = case.singles[row]["input_ids"].shape[1]
        for place, option in enumerate(item.options):
            alone = case.inputs(item, f" {option}")
            ids = alone["input_ids"][0]
            steps = case.bare(**alone).logits[0, n_prompt - 1 : -1].log_softmax(-1)
            expected = steps.gather(1, ids[n_prompt:, None]).sum()
            assert abs(float(reading.scores[row, place] - expected)) < 1e-3


def check_masks(case: Case, tower: str) -> None:
    """Answers under masks that share a batch, or a forward, are those of plain forwards with zeroed columns."""
    reader, masks = Letters(), [case.some(tower, seed) for seed in (0, 1)]
    encoded = reader.encode(case.model, WITH_PICTURES)
    clean = reader.read(case.model, WITH_PICTURES, encoded)
    readings = list(
        read_masked(case.model, reader, WITH_PICTURES, encoded, [vn.Ablation(case.model, mask) for mask in masks])
    )
    for mask, reading in zip(masks, readings, strict=True):
        for row, (item, alone) in enumerate(zip(WITH_PICTURES, case.singles, strict=True)):
            with case.zeroed(mask, tower):
                shown = case.letters(alone).double()
            order = list(WITH_PICTURES.order(item))
            torch.testing.assert_close(reading.scores[row][order], shown, rtol=0, atol=1e-3)
            assert reading.chosen[row] == order[int(shown.argmax())]
        if len(mask):
            assert (reading.scores - clean.scores).abs().max() > 1e-4


def masks(case: Case) -> None:
    check_masks(case, "language")


def vision_masks(case: Case) -> None:
    check_masks(case, "vision")


def masks_by_row(case: Case) -> None:
    """Each row of a batch under a mask of its own answers as it does alone."""
    reader, sets = Letters(), [case.some("language", seed, experts=True) for seed in range(4)]
    encoded = reader.encode(case.model, WITH_PICTURES)
    with vn.Ablation(case.model, sets):
        together = reader.read(case.model, WITH_PICTURES, encoded)
    for row, mask in enumerate(sets):
        with case.zeroed(mask, "language"):
            shown = case.letters(case.singles[row]).double()
        order = list(WITH_PICTURES.order(WITH_PICTURES[row]))
        torch.testing.assert_close(together.scores[row][order], shown, rtol=0, atol=1e-3)


def knockout(case: Case) -> None:
    """A study of both towers runs through, and no mask of neurons that are not there changes an answer."""
    selections = {}
    for tower in ("language", "vision"):
        space = case.model.space(tower, "post")
        statistics = vn.record(case.model, WITH_PICTURES, space, condition="all", progress=False)
        selections[tower] = vn.RandomNeurons(0.1, seed=0).select(statistics)
    result = vn.knockout(case.model, WITH_PICTURES, selections, progress=False)
    assert len(result.table()) == 2 * 2 * 2


def traces(case: Case) -> None:
    """An nnsight trace shows what plain hooks see, in both towers, and takes an edit."""
    model, item = case.model, WITH_PICTURES[:1]
    inputs = dict(model.prepare(item))
    if case.name == "florence2":
        inputs["decoder_input_ids"] = torch.tensor([[2, 20, 21]])
    sites = {}
    for tower in ("vision", "language"):
        mlps = case.mlps(tower)
        if mlps:
            sites[tower] = mlps[0].site("post")
    with case.hooked("vision") as seen, case.hooked("language") as read:
        case.bare(**inputs)
    seen_by = {"vision": seen, "language": read}
    with model.trace(**inputs):
        values = nnsight_save({tower: model.site(site) for tower, site in sites.items()})
    for tower, site in sites.items():
        place = model.space(tower, "post").sites.index(site)
        assert torch.equal(values[tower], seen_by[tower][place][0])


COLUMNS: dict[str, Callable[[Case], None]] = {
    "language": language,
    "vision": vision,
    "padding sides": padding_sides,
    "letters": letters,
    "option texts": option_texts,
    "masks": masks,
    "masks by row": masks_by_row,
    "vision masks": vision_masks,
    "knockout": knockout,
    "no picture": no_picture,
    "two pictures": two_pictures,
    "trace": traces,
}


def nnsight_save(values: dict[str, Any]) -> dict[str, Any]:
    import nnsight

    return nnsight.save(values)


@pytest.mark.parametrize("name", NAMES)
def test_each_column_works_or_says_what_does_not(name: str) -> None:
    case, row = Case(name), {}
    for column, check in COLUMNS.items():
        try:
            with torch.no_grad():
                check(case)
            row[column] = "works"
        except vn.VLMNeuronsError as error:
            row[column] = f"{type(error).__name__}: {error}"
    assert row == {column: TABLE.get((name, column), "works") for column in COLUMNS}


def test_paligemma_is_prompted_as_it_was_trained_without_a_template() -> None:
    plain, told = vn.VLM(*tiny_model("paligemma")), Case("paligemma")
    batch = plain.prepare(WITH_PICTURES[:1])
    assert torch.equal(batch["input_ids"], told.inputs(WITH_PICTURES[0])["input_ids"])
    text = plain.tokenizer.decode(batch["input_ids"][0])
    assert text == told.prompt(WITH_PICTURES[0]).replace("<image>", "<image>" * 16 + "<bos>") + "\n"
    assert "labels" not in batch


def test_an_encoder_decoders_questions_are_padded_on_the_right_whatever_is_asked_for() -> None:
    case = Case("florence2")
    left, right = (case.model.prepare(WITH_PICTURES, padding_side=side) for side in ("left", "right"))
    assert torch.equal(left["input_ids"], right["input_ids"])
    for row, alone in enumerate(case.singles):
        assert torch.equal(left["input_ids"][row][left.tokens.attention[row]], alone["input_ids"][0])
