"""What a neuron fires at: values equal those of plain hooks, and every map is laid on the right part of the picture."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vlmneurons as vn
from helpers import PAPER_MODELS, activation_of, language_blocks, picture, some_questions
from vlmneurons.errors import QuestionError, SiteError
from vlmneurons.look import neuron_pages as browser

SITE = "language.layers.2.mlp.gate"


def values_by_hook(hf, inputs, layer: int, number: int) -> torch.Tensor:
    """The neuron's gate at every token, by a hook of plain PyTorch."""
    seen = []
    handle = activation_of(language_blocks(hf)[layer].mlp).register_forward_hook(
        lambda _, args, out: seen.append(out[..., number].detach())
    )
    try:
        with torch.inference_mode():
            hf(**inputs)
    finally:
        handle.remove()
    return seen[0]


def test_the_best_of_each_group_are_those_of_plain_hooks(paper_model, bare_model):
    questions = some_questions(8)
    view = vn.inspect_neuron(paper_model, questions, (SITE, 5), k=2, batch_size=3)
    best: dict[str, list[tuple[float, str]]] = {"A": [], "B": []}
    for item in questions:
        batch = paper_model.prepare(item)
        values = values_by_hook(bare_model, batch, 2, 5)
        best[item.group].append((float(values[batch.tokens.counted("content")].max()), item.id))
    for group, found in best.items():
        expected = sorted(found, reverse=True)[:2]
        shown = [(item.value, item.question.id) for item in view.items if item.question.group == group]
        assert [name for _, name in shown] == [name for _, name in expected]
        assert [value for value, _ in shown] == pytest.approx([value for value, _ in expected], abs=2e-5)
        assert view.mean[group] == pytest.approx(np.mean([value for value, _ in found]), abs=2e-5)
        assert view.values[group].tolist() == pytest.approx([value for value, _ in found], abs=2e-5)
    item = view.items[0]
    assert paper_model.tokenizer.decode(paper_model.prepare(item.question)["input_ids"][0]).count("What is this") == 1
    assert "What is this" in "".join(text for text, _, counted in item.words() if counted)
    assert view.table()["id"].tolist() == [one.question.id for one in view.items]
    assert repr(view) == f"NeuronView({SITE}[5]: 4 questions of 2 groups)"
    assert view.note == ""
    drawn = [one.get_offsets()[:, 0] for one in vn.plot_values(view).axes[0].collections if one.get_alpha() == 0.6]
    for group, values in zip(sorted(best), drawn, strict=True):
        assert np.asarray(values).tolist() == pytest.approx([value for value, _ in best[group]], abs=2e-5)


def test_the_page_begins_with_the_group_for_which_the_neuron_is_highest(load):
    view = vn.inspect_neuron(load(PAPER_MODELS[0]), some_questions(8), (SITE, 5), k=2, batch_size=4)
    assert list(view.mean) == ["A", "B"]
    for mean, order in (({"A": 1.0, "B": 2.0}, ["B", "A"]), ({"A": 2.0, "B": 1.0}, ["A", "B"])):
        page = replace(view, mean=mean).to_html()
        assert re.findall(r"<h2>(\w)", page) == order
        assert re.findall(r"<span>([AB])</span><i", page) == order
        ids = [one.question.id for group in order for one in view.items if one.question.group == group]
        assert re.findall(r"<header>(\S+) ·", page) == ids


# -- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 24), (24, 32), (32, 32), (70, 20), (20, 70), (1, 1), (500, 9)])
def test_every_image_token_has_a_place_and_the_places_cover_the_picture_once(paper_model, size):
    question = vn.Question(picture(1, size[1], size[0]), "What?", ("x", "y"), 0, "A", id="q")
    (item,) = vn.inspect_neuron(paper_model, [question], 5).items
    assert item.patches is not None
    assert len(item.patches) == int(item.image.sum())
    for view in {patch.view for patch in item.patches if patch is not None}:
        boxes = [patch.box for patch in item.patches if patch is not None and patch.view == view]
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        assert area == pytest.approx(1, abs=0.35 if view == "tiles" else 1e-9)  # unpadding cuts whole rows of patches
        centres = [((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes]
        assert len(set(centres)) == len(centres)
        if view == "picture":
            assert centres == sorted(centres, key=lambda centre: (centre[1], centre[0]))


def lit(size: tuple[int, int], where: tuple[float, float], side: float) -> Image.Image:
    """A black picture with one white square, centred at ``where`` (shares of width and height)."""
    image = Image.new("RGB", size)
    half = side * min(size) / 2
    x, y = where[0] * size[0], where[1] * size[1]
    image.paste("white", (round(x - half), round(y - half), round(x + half), round(y + half)))
    return image


@pytest.mark.parametrize("where", [(0.2, 0.25), (0.8, 0.25), (0.3, 0.75), (0.8, 0.8)])
@pytest.mark.parametrize("size", [(96, 96), (160, 80), (60, 120)])
def test_a_bright_square_lights_up_the_patch_on_which_it_lies(paper_model, size, where):
    """The model's own image features, before the decoder mixes them, must differ most where the pictures differ."""
    black, white = Image.new("RGB", size), lit(size, where, 0.3)

    def features(image):
        """The embedding of each image token, as the decoder gets it."""
        item = vn.Question(image, "What?", ("x", "y"), 0, "A", id="q")
        batch = paper_model.prepare(item)
        seen = []
        handle = language_blocks(paper_model.hf)[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            with torch.inference_mode():
                paper_model.hf(**batch)
        finally:
            handle.remove()
        return batch, seen[0][0][batch.tokens.image[0]]

    # The towers here are random and mix patches: what is compared is the pixels that each token's patch is made of.
    batch, _ = features(white)
    patches = browser._patches(paper_model, batch, 0, 1, int(batch.tokens.image.sum()))
    brightness = pixels_of_tokens(paper_model, batch)
    dark = pixels_of_tokens(paper_model, features(black)[0])
    assert len(brightness) == len(patches)
    for view in {patch.view for patch in patches if patch is not None}:
        change = {
            patch: float(bright - before)
            for patch, bright, before in zip(patches, brightness, dark, strict=True)
            if patch is not None and patch.view == view
        }
        brightest = max(change, key=lambda patch: change[patch])
        left, top, right, bottom = brightest.box
        half = 0.15 * min(size)
        reach = (half / size[0], half / size[1])
        assert left - reach[0] - 0.02 <= where[0] <= right + reach[0] + 0.02, (view, brightest)
        assert top - reach[1] - 0.02 <= where[1] <= bottom + reach[1] + 0.02, (view, brightest)


def pixels_of_tokens(model, batch) -> list[float]:
    """Mean brightness of the pixels behind each image token, from the processor's tensors; NaN for line ends."""
    if "image_grid_thw" in batch:
        merge = model.hf.config.vision_config.spatial_merge_size**2
        return batch["pixel_values"].float().mean(-1).reshape(-1, merge).mean(-1).tolist()
    edge, patch = model.hf.config.vision_config.image_size, model.hf.config.vision_config.patch_size
    side = edge // patch
    crops = batch["pixel_values"][0].float().mean(1).reshape(-1, side, patch, side, patch).mean((2, 4))
    packed, _ = model.hf.model.pack_image_features(
        [crops.reshape(len(crops), -1, 1)[: n_crops(model, batch)]],
        batch["image_sizes"],
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([math.nan]),
    )
    return packed[0].flatten().tolist()


def n_crops(model, batch) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.hf.config
    return image_size_to_num_patches(
        batch["image_sizes"][0], config.image_grid_pinpoints, config.vision_config.image_size
    )


def test_the_map_holds_the_neurons_values_where_their_patches_lie(model):
    (item,) = vn.inspect_neuron(model, some_questions(1), (SITE, 5)).items
    heat = item.heat(size=(200, 120))
    assert heat.shape == (120, 200)
    for patch, value in zip(item.patches, item.values[item.image].tolist(), strict=True):
        left, top, right, bottom = patch.box
        assert heat[int((top + bottom) * 60), int((left + right) * 100)] == pytest.approx(value)


def test_a_model_whose_layout_is_not_known_shows_tokens_and_says_so(model, monkeypatch, tmp_path):
    monkeypatch.setattr(browser, "_merged_grid", lambda *_: None)
    view = vn.inspect_neuron(model, some_questions(2), 5, k=1)
    assert view.note.startswith("Where in the picture an image token of Qwen2_5_VLForConditionalGeneration lies is not")
    assert "<figcaption>map" not in view.to_html()
    assert "no map is drawn" in view.to_html()
    with pytest.raises(QuestionError, match="it is not known where this model's image tokens lie"):
        view.items[0].heat()
    view.save(tmp_path / "n.png")


# -- pages -------------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_and_runs_nothing(paper_model, tmp_path):
    questions = some_questions(4)
    view = vn.inspect_neuron(paper_model, questions, (SITE, 5), k=1)
    view.save(tmp_path / "neuron.html")
    text = (tmp_path / "neuron.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=['\"](?!data:image/(?:png|webp);base64,|#p\d)", text)
    assert "<script" not in text
    assert text.count("<article>") == 2
    assert text.count("data:image/webp") == 2  # each picture is there once, and its maps are small
    assert max(map(len, re.findall(r"data:image/png;base64,([^'\"]+)", text))) < 6000
    assert "<h2>A " in text
    assert "<figcaption>map</figcaption>" in text
    view.save(tmp_path / "neuron.png")
    with Image.open(tmp_path / "neuron.png") as image:
        assert min(image.size) > 300
    with pytest.raises(QuestionError, match=r"ends in '.txt'; a neuron's page is saved as .html or .png"):
        view.save(tmp_path / "neuron.txt")
    assert view._repr_html_().startswith("<iframe srcdoc=")


@pytest.mark.parametrize("text", ["<script>alert(1)</script> & 'x' $a_b$", "ما هي عاصمة مصر؟", "หมู่บ้าน 👩‍👩‍👧", ""])
def test_texts_of_any_kind_are_shown_as_text(model, text, tmp_path):
    item = vn.Question(picture(), text, ("<b>x</b>", "$y"), 0, "<i>&", id="'\"><img>")
    view = vn.inspect_neuron(model, [item], 5)
    assert text.strip() in "".join(words for words, _, counted in view.items[0].words() if counted)
    page = view.to_html()
    for forbidden in ("<script", "<b>", "<i>", "<img>"):
        assert forbidden not in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view.save(tmp_path / "n.png")
        view.save(tmp_path / "n.html")


def test_questions_without_pictures_and_with_several_are_shown(model, tmp_path):
    several = vn.Question((picture(1), picture(2, 48, 32)), "What?", ("x", "y"), 0, "A", id="two")
    view = vn.inspect_neuron(model, [several, vn.Question(None, "What?", ("x", "y"), 0, "B", id="none")], 5)
    two, none = view.items
    assert {patch.picture for patch in two.patches} == {0, 1}
    assert none.patches == ()
    assert view.note == ""
    view.save(tmp_path / "n.png")
    assert view.to_html().count("<figcaption>map</figcaption>") == 2


def test_what_does_not_exist_is_refused(model):
    questions = some_questions(2)
    for neuron, message in [
        (("language.layers.2.mlp.gate", 64), r"neuron 64 is not in site language.layers.2.mlp.gate \(0–63\)"),
        (("language.layers.9.mlp.gate", 1), "layer 9 is not in tower 'language'"),
        (256, r"neuron 256 is not in this space \(0–255\)"),
        (("vision.layers.0.mlp.gate", 1), "only neurons of the language tower"),
    ]:
        with pytest.raises(SiteError, match=message):
            vn.inspect_neuron(model, questions, neuron)
    with pytest.raises(QuestionError, match="k 0 is less than 1"):
        vn.inspect_neuron(model, questions, 5, k=0)
    with pytest.raises(QuestionError, match="there are no questions to look at"):
        vn.inspect_neuron(model, [], 5)
