"""Out of memory: the batch is halved, the results are the same, and the provenance says so."""

import dataclasses
import inspect
import json
import logging

import pytest
import torch

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.errors import FileFormatError, OutOfMemoryError, QuestionError
from vlmneurons.run import replayable
from vlmneurons.run.memory import MemoryLimit, asked_in_parts, is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(CPU),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "python": MemoryError,
}


@pytest.fixture
def limited(model, monkeypatch):
    """A model whose forward raises an error above a number of rows; which numbers it saw."""
    sizes = []

    def limit(most, error="cuda"):
        forward = model.hf.forward

        def failing(*args, **kwargs):
            rows = len(kwargs["input_ids"])
            sizes.append(rows)
            if rows > most:
                raise ERRORS[error]()
            return forward(*args, **kwargs)

        failing.__signature__ = inspect.signature(forward)  # which `generate` looks at
        monkeypatch.setattr(model.hf, "forward", failing)
        return sizes

    yield limit
    replayable._STRUCTURES.pop(model.hf, None)  # where not even three questions fit, that is remembered


@pytest.mark.parametrize("error", ERRORS)
def test_recording_goes_on_with_half_the_batch_and_says_so(model, limited, caplog, error):
    questions = some_questions(7)
    expected = vn.record(model, questions, condition="all", batch_size=1, progress=False)
    sizes = limited(2, error)
    with caplog.at_level(logging.WARNING):
        stats = vn.record(model, questions, condition="all", batch_size=6, progress=False)
    assert stats == expected
    assert sizes == [6, 3, 2, 1, 2, 1, 1]
    assert stats.provenance["halved"] == [{"from": 6, "to": 3, "first": "q0"}, {"from": 3, "to": 2, "first": "q0"}]
    assert "out of memory with 6 questions at once ('q0' and others): going on with 3; batch_size=3" in caplog.text
    assert "halved" not in expected.provenance


def test_generated_answers_too(model, limited):
    questions = some_questions(4, answer=vn.Generate(max_new_tokens=2))
    expected = vn.record(model, questions, condition="all", batch_size=2, progress=False)
    limited(2)
    assert vn.record(model, questions, condition="all", batch_size=4, progress=False) == expected


def test_a_question_that_does_not_fit_alone_is_named_with_what_to_do(model, limited):
    questions = some_questions(4)
    limited(0)
    for run in (
        lambda: vn.record(model, questions, condition="all", progress=False),
        lambda: vn.knockout(model, questions, {"x": vn.NeuronSet(model.space(), [1])}, progress=False),
    ):
        with pytest.raises(
            OutOfMemoryError, match=r"question 'q0' does not fit into memory on its own .*smaller pict"
        ) as e:
            run()
        assert isinstance(e.value, MemoryError)
        assert isinstance(e.value, vn.VLMNeuronsError)
        assert isinstance(e.value.__cause__, torch.OutOfMemoryError)


def test_item_files_are_the_same_and_remember_it(model, limited, tmp_path):
    questions = some_questions(7)
    vn.record_items(model, questions, tmp_path / "whole", batch_size=2, progress=False)
    sizes = limited(2)
    vn.record_items(model, questions, tmp_path / "halved", batch_size=4, progress=False)
    assert max(sizes[1:]) == 2
    loaded = vn.ItemStatistics.load(tmp_path / "halved")
    assert loaded.provenance["halved"] == [{"from": 4, "to": 2, "first": "q0"}]
    assert (tmp_path / "whole" / "positive.bin").read_bytes() == (tmp_path / "halved" / "positive.bin").read_bytes()
    again = vn.record_items(model, questions, tmp_path / "halved", batch_size=4, progress=False)
    assert again.complete


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_study_goes_on_with_half_the_batch_clean_and_under_masks(model, limited, most):
    questions = some_questions(6)
    space = model.space()
    masks = {"x": vn.NeuronSet(space, [1, 70, 200]), "y": vn.NeuronSet(space, [5]), "z": vn.NeuronSet(space, [130])}
    expected = vn.knockout(model, questions, masks, batch_size=2, progress=False)
    limited(most)
    result = vn.knockout(model, questions, masks, batch_size=5, progress=False)
    assert result.ids == expected.ids
    assert (result.chosen == expected.chosen).all()
    assert abs(result.margins - expected.margins).max() < 1e-4
    assert result.provenance["halved"][0] == {"from": 5, "to": 3, "first": "q0"}


def test_a_study_in_a_folder_remembers_it_when_it_is_gone_on_with(model, limited, tmp_path):
    questions = some_questions(9)
    masks = {"x": vn.NeuronSet(model.space(), [1, 70])}
    stopping = [*questions[:5], dataclasses.replace(questions[5], image="missing.png"), *questions[6:]]

    def study(asked, **how):
        return vn.knockout(model, vn.QuestionSet(asked), masks, progress=False, folder=tmp_path, prefetch=0, **how)

    sizes = limited(2)
    with pytest.raises(QuestionError, match="missing"):
        study(stopping, batch_size=4)
    notes = {path.name: json.loads(path.read_text()) for path in (tmp_path / "parts").glob("*.json")}
    assert notes == {"batch-000000.json": [{"from": 4, "to": 2, "first": "q0"}]}
    sizes.clear()
    result = study(questions, batch_size=4)
    assert max(sizes) == 2  # the size that fits is known
    assert result.provenance["halved"] == [{"from": 4, "to": 2, "first": "q0"}]
    assert vn.KnockoutResult.load(tmp_path).provenance["halved"] == result.provenance["halved"]
    assert not (tmp_path / "parts").exists()


def test_a_study_halved_again_after_it_was_gone_on_with_says_both(model, limited, tmp_path):
    questions = some_questions(8)
    masks = {"x": vn.NeuronSet(model.space(), [1, 70])}
    stopping = [*questions[:5], dataclasses.replace(questions[5], image="missing.png"), *questions[6:]]
    limited(2)
    with pytest.raises(QuestionError, match="missing") as caught:
        vn.knockout(model, stopping, masks, batch_size=4, progress=False, folder=tmp_path, prefetch=0)
    first, second = {"from": 4, "to": 2, "first": "q0"}, {"from": 2, "to": 1, "first": "q4"}
    assert caught.value.partial.provenance["halved"] == [first]
    limited(1)
    result = vn.knockout(model, questions, masks, batch_size=4, progress=False, folder=tmp_path)
    assert result.provenance["halved"] == [first, second]


def test_a_damaged_note_of_a_halved_batch_is_named(model, limited, tmp_path):
    questions = some_questions(8)
    masks = {"x": vn.NeuronSet(model.space(), [1, 70])}
    stopping = [*questions[:5], dataclasses.replace(questions[5], image="missing.png"), *questions[6:]]
    limited(2)
    with pytest.raises(QuestionError, match="missing"):
        vn.knockout(model, stopping, masks, batch_size=4, progress=False, folder=tmp_path, prefetch=0)
    note = tmp_path / "parts" / "batch-000000.json"
    for text in ("", "3", "[{}]", '[{"from": "x", "to": 1, "first": "q"}]'):
        note.write_text(text)
        with pytest.raises(FileFormatError, match=r"batch-000000\.json is damaged .*: delete it, and the run goes on"):
            vn.knockout(model, questions, masks, batch_size=4, progress=False, folder=tmp_path)


def test_an_error_of_the_model_skips_no_questions(model, monkeypatch):
    """A model that gives no logits would have every question skipped, and counts of nothing."""
    monkeypatch.setattr(model.hf, "forward", lambda **_: object())
    with pytest.raises(QuestionError, match="without logits"):
        vn.record(model, some_questions(2), condition="all", on_error="skip", progress=False)


def test_a_batch_that_one_question_spoils_is_asked_one_by_one():
    questions = some_questions(4)
    asked = []

    def encode(part):
        if any(item.id == "q2" for item in part):
            raise QuestionError("no")
        return len(part)

    def read(part, ready):
        asked.append(ready)
        return [item.id for item in part]

    limit, skipped = MemoryLimit(), []
    made = list(asked_in_parts(questions, limit, lambda: encode(questions), encode, read, skipped))
    assert [ids for _, ids in made] == [["q0"], ["q1"], ["q3"]]
    assert skipped == ["q2"]
    assert asked == [1, 1, 1]
    assert list(asked_in_parts(questions[:2], limit, lambda: "ahead", encode, lambda part, ready: ready)) == [
        (questions[:2], "ahead")
    ]
    with pytest.raises(QuestionError, match="no"):
        list(asked_in_parts(questions, limit, lambda: encode(questions), encode, read))
    with pytest.raises(QuestionError, match="of reading"):
        list(asked_in_parts(questions, limit, lambda: 1, encode, _refuse, skipped))


def _refuse(part, ready):
    raise QuestionError("of reading")


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert all(is_out_of_memory(make()) for make in ERRORS.values())


def test_the_limit_holds_for_later_batches_and_may_be_known_before():
    questions = some_questions(5)
    limit = MemoryLimit([{"from": 8, "to": 4, "first": "q9"}])
    assert [len(part) for part in limit.parts(questions)] == [4, 1]
    several = MemoryLimit([{"from": 8, "to": 2, "first": "q9"}, {"from": 8, "to": 4, "first": "q7"}])
    assert several.most == 2  # of several processes, the one with least memory
    parts = limit.halves([questions[:3], questions[1:4]], MemoryError())
    assert [len(part) for part in parts] == [2, 1, 2, 1]
    assert limit.halved[-1] == {"from": 3, "to": 2, "first": "q0"}
