"""Which rows of a vision tower are whose, and which patches are padding: worked out by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmneurons as vn
from helpers import picture
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.model.vision_rows import UnknownPadding, real_patches, vision_rows
from vlmneurons.recording.counter import Counter
from vlmneurons.testing import tiny_model


def config(model_type: str = "", tower: str = "siglip") -> SimpleNamespace:
    vision = SimpleNamespace(patch_size=4, image_size=8, model_type=tower)
    return SimpleNamespace(model_type=model_type, vision_config=vision)


def no_more(number: int) -> dict[str, Tensor]:
    raise AssertionError("a question was encoded on its own")


def masked(*sizes: tuple[int, int]) -> Tensor:
    """Masks of pictures of these sizes in canvases of 8 by 8 pixels."""
    mask = torch.zeros(len(sizes), 8, 8, dtype=torch.long)
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = 1
    return mask


@pytest.mark.parametrize(
    ("model_type", "real"),
    [
        ("idefics2", [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]),  # a patch is real if all of its pixels are
        ("idefics3", [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]),  # … if any of them is
        ("smolvlm", [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]),
    ],
)
def test_a_patch_that_is_partly_padding_is_what_its_model_takes_it_for(model_type: str, real: Any) -> None:
    pixels = torch.ones(2, 2, 3, 8, 8)
    pixels[1, 1] = 0  # the second question has one picture: the other is padding, and dropped
    masks = masked((8, 8), (4, 5), (6, 8), (8, 8)).reshape(2, 2, 8, 8)
    data = {"pixel_values": pixels, "pixel_attention_mask": masks}
    rows, patches = vision_rows(data, [2, 1], config(model_type), no_more)
    assert rows == (2, 1)
    assert patches.tolist() == torch.tensor(real).bool().tolist()


def test_a_mask_of_pixels_of_an_unknown_family_is_not_guessed_at() -> None:
    data = {"pixel_values": torch.ones(1, 1, 3, 8, 8), "pixel_attention_mask": masked((8, 5))[None]}
    assert vision_rows(data, [1], config("idefics9"), no_more) is None
    with pytest.raises(UnknownPadding, match="a mask of pixels"):
        real_patches(data, config("idefics9"))
    for name, value in (("image_patch_mask", torch.ones(1, 4)), ("image_sizes", torch.tensor([[8, 5]]))):
        data = {"pixel_values": torch.ones(1, 3, 8, 8), name: value}
        assert vision_rows(data, [1], config(), no_more) is None
        with pytest.raises(UnknownPadding, match=name):
            real_patches(data, config())
    assert real_patches({"pixel_values": torch.ones(1, 3, 8, 8), "attention_mask": torch.ones(1, 5)}, config()) is None


def test_a_mask_of_tiles_is_not_read_as_one_of_pixels() -> None:
    pixels = torch.ones(2, 3, 3, 8, 8)
    pixels[0, 1] = 0  # a black tile is there all the same
    tiles = torch.tensor([[True, True, True], [True, False, False]])
    data = {"pixel_values": pixels, "pixel_attention_mask": tiles}
    assert vision_rows(data, [1, 1], config("granite_docling"), no_more) == ((3, 1), None)
    assert real_patches(data, config("granite_docling")) is None
    assert vision_rows(data, [1, 1], config("idefics3"), no_more) is None
    with pytest.raises(UnknownPadding, match="a mask of tiles"):
        real_patches(data, config("some_other"))


def test_tiles_that_are_not_there_and_patches_that_fill_up_are_padding_in_mllama() -> None:
    tiles = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 0]]])
    data = {"pixel_values": torch.ones(2, 2, 2, 3, 8, 8), "aspect_ratio_mask": tiles}
    data["aspect_ratio_ids"] = torch.tensor([[2, 1], [1, 0]])  # the last picture is not there at all
    rows, patches = vision_rows(data, [2, 1], config("mllama"), no_more)
    assert rows == (2, 2)
    tile, none = [True] * 5 + [False] * 3, [False] * 8  # 2 x 2 patches and the class token, filled up to 8
    assert patches.tolist() == [tile + tile, tile + none, tile + none, none + none]


def test_pixtrals_row_holds_the_pictures_patches_and_not_the_canvas() -> None:
    data = {"pixel_values": torch.ones(3, 3, 8, 8), "image_sizes": torch.tensor([[8, 8], [4, 8], [8, 4]])}
    assert vision_rows(data, [2, 1], config("mistral3"), no_more) is None
    pixtral = config("mistral3", "pixtral")
    assert vision_rows(data, [2, 1], pixtral, no_more) == ((4 + 2, 2), None)


def test_gemma_4s_padding_is_at_minus_one() -> None:
    places = torch.tensor([[[0, 0], [1, 0], [-1, -1]], [[0, 0], [-1, -1], [-1, -1]]])
    data = {"pixel_values": torch.ones(2, 3, 48), "image_position_ids": places}
    rows, patches = vision_rows(data, [1, 1], config("gemma4"), no_more)
    assert rows == (1, 1)
    assert patches.tolist() == [[True, True, False], [True, False, False]]


def test_tiles_are_counted_by_the_processor_or_by_encoding_each_question_on_its_own() -> None:
    data, sizes = {"pixel_values": torch.ones(7, 3, 8, 8)}, [3, 4]
    assert vision_rows(data, [1, 1], config(), no_more, lambda: sizes) == ((3, 4), None)
    alone = lambda number: {"pixel_values": torch.ones(sizes[number], 3, 8, 8)}  # noqa: E731
    for known in (None, [3, 3]):  # a processor that does not say, or is wrong
        assert vision_rows(data, [1, 1], config(), alone, lambda known=known: known) == ((3, 4), None)
    sizes[0] = 2
    assert vision_rows(data, [1, 1], config(), alone) is None
    assert vision_rows(data, [1], config(), no_more) == ((7,), None)
    assert vision_rows({**data, "image_num_crops": torch.tensor([5, 2])}, [1, 1], config(), no_more) == ((5, 2), None)


def test_naflex_tiles_are_padded_to_as_many_patches() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    data = {"pixel_values": torch.ones(2, 3, 12), "pixel_attention_mask": mask}
    rows, patches = vision_rows(data, [1, 1], config("lfm2_vl"), no_more)
    assert rows == (1, 1)
    assert torch.equal(patches, mask.bool())
    whole = {**data, "pixel_attention_mask": torch.ones_like(mask)}
    assert vision_rows(whole, [1, 1], config("lfm2_vl"), no_more) == ((1, 1), None)


# --- with models ---


def questions(*pictures: Any) -> vn.QuestionSet:
    items = [
        vn.Question(image, f"What is it{'?' * n}", ("Tea", "Rice"), 0, f"group {n}", id=f"q{n}")
        for n, image in enumerate(pictures)
    ]
    return vn.QuestionSet(items)


def values_of(model: vn.VLM, inputs: dict[str, Tensor]) -> Tensor:
    """The last layer's values in the vision tower, by a hook of plain PyTorch: ``[row, patch, neuron]``."""
    mlp, values = model.towers["vision"].mlps[-1], []
    down = model.hf.get_submodule(mlp.path).get_submodule(mlp.layout.down)
    handle = down.register_forward_pre_hook(lambda _, args: values.append(args[0]))
    with torch.no_grad():
        model.hf(**inputs)
    handle.remove()
    return values[0]


def test_pictures_padded_to_the_largest_of_a_batch_count_their_own_patches() -> None:
    model = vn.VLM(*tiny_model("idefics2"))
    asked = questions(picture(0, 16, 16), picture(1, 8, 16), picture(2, 16, 8))
    space, last = model.space("vision", "post"), model.towers["vision"].mlps[-1].width
    batch = model.prepare(asked)
    assert batch.patches.sum(1).tolist() == [16, 8, 8]
    together = vn.record(model, asked, space, condition="all", batch_size=3, magnitudes=True, progress=False)
    alone = [values_of(model, model.prepare(item))[0] for item in asked]
    assert together.tokens.tolist() == [len(value) for value in alone] == [16, 8, 8]
    for row, value in enumerate(alone):
        assert (together.positive[row, -last:] - (value > 0).sum(0)).abs().sum() <= 3
        torch.testing.assert_close(together.total[row, -last:], value.double().sum(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_patches_of_a_picture_that_its_mask_takes_for_padding_do_not_count(name: str) -> None:
    model = vn.VLM(*tiny_model(name))
    batch = dict(model.prepare(questions(picture(0))))
    batch["pixel_attention_mask"][0, 1, :, 9:] = 0  # of 4 x 4 patches of 4 pixels the last column is padding
    batch["pixel_attention_mask"][0, 2, 4:] = 0
    with vn.Recorder(model, model.space("vision", "post")) as recorder, torch.no_grad():
        model.hf(**batch)
    value = values_of(model, batch).unflatten(1, (4, 4))
    real = torch.ones(5, 4, 4, dtype=torch.bool)
    real[1, :, 3] = False
    real[2, 1:] = False
    assert recorder.statistics.tokens.tolist() == [int(real.sum())] == [3 * 16 + 12 + 4]
    assert torch.equal(recorder.statistics.positive[0, -value.shape[-1] :], (value[real] > 0).sum(0))


def test_a_maximum_is_not_taken_over_padding(tmp_path: Any) -> None:
    model = vn.VLM(*tiny_model("gemma4"))
    asked, space = questions(picture(0, 24, 40), picture(1, 40, 24)), model.space("vision", "post")
    kept = vn.record_items(model, asked, tmp_path / "items", space, maxima=True, progress=False)
    batch = model.prepare(asked)
    real, value = (batch["image_position_ids"] >= 0).all(-1), values_of(model, batch)
    assert not real.all()
    for row in range(2):
        got = torch.from_numpy(kept._files.table("maximum")[row][-value.shape[-1] :].copy())
        torch.testing.assert_close(got, value[row][real[row]].amax(0))


def test_a_tower_whose_patches_do_not_fit_is_refused_and_not_guessed_at() -> None:
    model = vn.VLM(*tiny_model("gemma4"))
    asked, space = questions(picture(0), picture(1)), model.space("vision")
    batch = model.prepare(asked)
    batch.patches = batch.patches[:, :-1]
    counter = Counter(model, space, tokens="content")
    told = pytest.raises(MismatchError, match=r"has 280 patches in a row where the pictures have 279: its padding")
    with counter.attached(), torch.no_grad(), counter.watch(batch, [0, 1]), told:
        model.hf(**batch)


def test_a_run_of_ones_own_whose_padding_is_unknown_is_refused() -> None:
    model = vn.VLM(*tiny_model("idefics3"))
    batch = dict(model.prepare(questions(picture(0))))
    model.hf.config.model_type = "idefics9"
    with (
        pytest.raises(MismatchError, match=r"sees is padding \(a mask of pixels\), and it cannot be told what"),
        vn.Recorder(model, model.space("vision")),
        torch.no_grad(),
    ):
        model.hf(**batch)
    with vn.Recorder(model), torch.no_grad():  # the language tower has nothing to do with it
        model.hf(**batch)


def test_mllama_is_not_given_questions_of_different_numbers_of_pictures() -> None:
    model = vn.VLM(*tiny_model("mllama"))
    mixed = questions([picture(0), picture(1)], picture(2), picture(3))
    with pytest.raises(QuestionError, match="encode questions with different numbers of pictures apart"):
        model.prepare(mixed)
    statistics = vn.record(model, mixed, condition="all", progress=False)  # which puts them into batches of their own
    alone = vn.record(model, mixed, condition="all", batch_size=1, progress=False)
    assert torch.equal(statistics.tokens, alone.tokens)
    assert (statistics.positive - alone.positive).abs().sum() <= 3
