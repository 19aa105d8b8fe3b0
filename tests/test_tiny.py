"""The small models that the other tests run."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vlmneurons.testing import tiny_image, tiny_inputs, tiny_model, tiny_names, tiny_template

NAMES = tiny_names()


def test_there_are_the_three_models_of_the_paper_and_many_others() -> None:
    assert NAMES == ("llava_next_mistral", "llava_next_qwen2", "qwen2_5_vl")
    assert len(tiny_names(processor=False)) >= 25
    with pytest.raises(ValueError, match="there is no tiny model 'gpt'"):
        tiny_model("gpt")
    with pytest.raises(ValueError, match="there is no tiny model 'gpt'"):
        tiny_template("gpt")


@pytest.mark.parametrize("name", NAMES)
def test_each_call_gives_the_same_weights_and_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    one, _ = tiny_model(name)
    torch.manual_seed(5)
    two, _ = tiny_model(name)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    torch.set_rng_state(state)
    tiny_model(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.training
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_at_zero_that_a_trained_model_does_not_have_at_zero(name: str) -> None:
    model, processor = tiny_model(name)
    embedding = model.get_input_embeddings().weight
    assert embedding[processor.tokenizer.pad_token_id].abs().min() > 0
    assert all(parameter.ne(0).all() for parameter in model.parameters())
    assert model.lm_head.weight.data_ptr() != embedding.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_encoded_and_letters_are_single_tokens(name: str) -> None:
    _, processor = tiny_model(name)
    tokenizer = processor.tokenizer
    for letter in "ABCD":
        assert len(tokenizer.encode(letter, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(f" {letter}", add_special_tokens=False)) == 1
    text = "Which dish is this? 日本 – naïve\n\tZoë <b>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_loaded_by_the_auto_classes(name: str, tmp_path) -> None:
    model, processor = tiny_model(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = tiny_inputs(name)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    made = []
    for one in (processor, AutoProcessor.from_pretrained(tmp_path)):
        text = one.apply_chat_template(messages, add_generation_prompt=True)
        made.append(one(text=[text], images=[tiny_image()], return_tensors="pt"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


@pytest.mark.parametrize("name", tiny_names(processor=False))
def test_every_small_model_sees_its_image(name: str) -> None:
    model, _ = tiny_model(name)
    inputs = tiny_inputs(name)
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0, -1) * 0.5 + 0.1}).logits
    assert logits.isfinite().all()
    assert not torch.equal(logits, other)


@pytest.mark.parametrize("name", tiny_names(processor=False))
def test_every_small_model_has_its_familys_processor_and_knows_all_of_its_tokens(name: str) -> None:
    model, processor = tiny_model(name)
    if name != "smolvlm" or importlib.util.find_spec("num2words"):  # without it Idefics3's processor stands in
        assert type(processor) is PROCESSOR_MAPPING[type(model.config)]
    assert len(processor.tokenizer) <= model.get_input_embeddings().weight.shape[0]
    assert (processor.chat_template is None) == (tiny_template(name) is not None)
    assert all(len(processor.tokenizer.encode(letter, add_special_tokens=False)) == 1 for letter in "ABCD")
