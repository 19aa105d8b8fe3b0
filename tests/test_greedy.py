"""Generated answers are greedy whatever a checkpoint's settings say: held against a loop of single forwards."""

import threading

import pytest
import torch
from transformers import GenerationConfig

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.run.greedy import greedily
from vlmneurons.run.readers import reader_of
from vlmneurons.testing import tiny_model
from vlmneurons.testing.tiny import tiny_template

HOSTILE = {
    "penalty": {"repetition_penalty": 1.8},
    "encoder penalty": {"encoder_repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 1},
    "suppressed": {"suppress_tokens": list(range(0, 400, 2))},
    "suppressed at first": {"begin_suppress_tokens": list(range(0, 400, 3))},
    "bad words": {"bad_words_ids": [[number] for number in range(1, 300)]},
    "forced first": {"forced_bos_token_id": 7},
    "forced last": {"forced_eos_token_id": 7},
    "bias": {"sequence_bias": [[[9], 50.0]]},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "least length": {"min_new_tokens": 6},
    "decay": {"exponential_decay_length_penalty": [1, 5.0]},
    "guidance": {"guidance_scale": 3.0},
    "several": {"num_return_sequences": 1, "return_dict_in_generate": True, "output_scores": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 8},
    "length": {"max_length": 3},
}


@torch.inference_mode()
def by_hand(hf, inputs, steps: int, stop: set[int], pad: int) -> list[list[int]]:
    """The likeliest token, put at the end of the whole row, and so on; every step is a forward without a cache."""
    rows = []
    for row in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][real][None]
        given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        types = given.pop("mm_token_type_ids", None)
        if types is not None:
            types = types[row][real][None]
        taken: list[int] = []
        for _ in range(steps):
            more = {} if types is None else {"mm_token_type_ids": types}
            logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given, **more).logits
            taken.append(int(logits[0, -1].float().argmax()))
            if taken[-1] in stop:
                break
            ids = torch.cat([ids, torch.tensor([[taken[-1]]])], 1)
            if types is not None:
                types = torch.cat([types, torch.zeros(1, 1, dtype=types.dtype)], 1)
        rows.append(taken + [pad] * (steps - len(taken)))
    return rows


def texts_of(model, rows):
    return tuple(model.tokenizer.batch_decode(rows, skip_special_tokens=True))


@pytest.mark.parametrize("setting", HOSTILE)
def test_an_answer_is_the_likeliest_token_at_each_step_under_every_setting(paper_model, setting):
    model, reader = paper_model, vn.Generate(max_new_tokens=4)
    question = some_questions(1)
    inputs = model.prepare(question)
    own = model.hf.generation_config
    stop = {own.eos_token_id} if isinstance(own.eos_token_id, int) else set(own.eos_token_id or ())
    expected = texts_of(model, by_hand(model.hf, inputs, 4, stop, model.tokenizer.pad_token_id or 0))
    hostile = GenerationConfig(**{**own.to_dict(), **HOSTILE[setting]})
    model.hf.generation_config = hostile
    try:
        with torch.inference_mode():
            assert reader.read(model, question, reader.encode(model, question)).texts == expected
        assert model.hf.generation_config is hostile  # the user's own calls obey it still
    finally:
        model.hf.generation_config = own


def test_rows_of_a_batch_are_generated_as_each_alone(model):
    reader, questions = vn.Generate(max_new_tokens=3), some_questions(4)
    own = model.hf.generation_config
    model.hf.generation_config = GenerationConfig(**{**own.to_dict(), "repetition_penalty": 2.0, "num_beams": 2})
    try:
        with torch.inference_mode():
            together = reader.read(model, questions, reader.encode(model, questions)).texts
            alone = [
                reader.read(model, q, reader.encode(model, q)).texts[0]
                for q in (questions[i : i + 1] for i in range(4))
            ]
    finally:
        model.hf.generation_config = own
    assert list(together) == alone


def test_what_generation_was_called_with_is_told(model):
    settings = vn.Generate(max_new_tokens=7).settings(model)
    own = model.hf.generation_config
    assert settings["max_new_tokens"] == 7
    assert settings["do_sample"] is False
    assert settings["num_beams"] == 1
    assert settings["use_cache"] is True
    assert settings.get("eos_token_id") == own.eos_token_id
    assert not {"repetition_penalty", "temperature", "top_k", "suppress_tokens"} & set(settings)
    assert repr(reader_of("generate")) == "Generate(max_new_tokens=20)"


def test_the_parts_that_generate_have_their_settings_back_also_after_an_error(model):
    part = torch.nn.Linear(1, 1)
    part.generation_config = mine = GenerationConfig(repetition_penalty=2.0, pad_token_id=3)
    whole = torch.nn.Sequential(part)
    seen = []

    def interrupted():
        with greedily(whole, 5):
            seen.extend([part.generation_config.repetition_penalty, part.generation_config.pad_token_id])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert seen == [None, 3]
    assert part.generation_config is mine


def test_two_threads_that_generate_leave_the_users_settings(model):
    own = model.hf.generation_config

    def again():
        for _ in range(20):
            with greedily(model.hf, 2):
                pass

    threads = [threading.Thread(target=again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.hf.generation_config is own


def test_an_encoder_decoder_begins_as_it_was_trained_to_and_is_greedy_then():
    hf, processor = tiny_model("florence2")
    model = vn.VLM(hf, processor, template=tiny_template("florence2"))
    own = hf.generation_config
    hf.generation_config = GenerationConfig(**{**own.to_dict(), "no_repeat_ngram_size": 1, "num_beams": 3})
    hf.generation_config.forced_bos_token_id = 0
    settings = vn.Generate(max_new_tokens=4).settings(model)
    assert settings["forced_bos_token_id"] == 0
    assert "no_repeat_ngram_size" not in settings
    questions, reader = some_questions(1, prompt="open"), vn.Generate(max_new_tokens=4)
    encoded = reader.encode(model, questions)
    start = own.decoder_start_token_id if own.decoder_start_token_id is not None else own.bos_token_id
    taken = [start, 0]
    with torch.inference_mode():
        text = reader.read(model, questions, encoded).texts[0]
        while len(taken) < 5:
            logits = hf(**encoded, decoder_input_ids=torch.tensor([taken]), use_cache=False).logits
            taken.append(int(logits[0, -1].argmax()))
            if taken[-1] == own.eos_token_id:
                break
    assert text == model.tokenizer.decode(taken, skip_special_tokens=True)
