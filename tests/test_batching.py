"""Which questions share a forward, and preparing the next ones meanwhile: results do not depend on either."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch
from PIL import Image

import vlmneurons as vn
from helpers import picture, some_questions
from vlmneurons.errors import QuestionError
from vlmneurons.questions.media import DatasetPicture
from vlmneurons.run.batching import batches, prefetched
from vlmneurons.run.readers import Letters, reader_of


def ids_of(made):
    return [[item.id for item in batch] for batch in made]


def asked(*sources, options=("Tea", "Rice")):
    return vn.QuestionSet(
        [vn.Question(source, f"What {k}?", options, 0, "AB"[k % 2], id=f"q{k}") for k, source in enumerate(sources)]
    )


def test_questions_of_one_picture_come_together_and_the_others_keep_their_order():
    same, other = picture(0), picture(1)
    questions = asked(same, other, picture(2), same, "a.png", "b.png", "a.png", None, picture(0))
    assert ids_of(batches(questions, 3)) == [["q0", "q3", "q8"], ["q1", "q2", "q4"], ["q6", "q5"], ["q7"]]
    assert ids_of(batches(questions, 1)) == [[f"q{k}"] for k in (0, 1, 2, 3, 4, 5, 6, 8, 7)]
    again = [item for batch in batches(questions, 3) for item in batch]
    assert ids_of(batches(questions.with_items(again), 3)) == ids_of(batches(questions, 3))


def test_pictures_behind_functions_are_not_opened_to_be_compared():
    opened = []

    def source():
        opened.append(1)
        return picture(0)

    list(batches(asked(source, source, picture(1)), 2))
    assert opened == []


def test_a_datasets_pictures_are_digested_once_undecoded_and_not_kept(monkeypatch):
    files = []
    for n in (0, 1, 0):
        file = io.BytesIO()
        picture(n).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    rows = {"image": files, "question": ["What?"] * 3, "answer": [0] * 3, "group": list("ABA"), "id": list("abc")}
    dataset = datasets.Dataset.from_dict({**rows, "A": ["Tea"] * 3, "B": ["Rice"] * 3})
    questions = vn.QuestionSet.from_dataset(dataset.cast_column("image", datasets.Image()))
    read = []
    original = DatasetPicture.__call__
    monkeypatch.setattr(DatasetPicture, "__call__", lambda self: read.append(self.row) or original(self))
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded
    assert ids_of(batches(questions, 2)) == [["a", "c"], ["b"]]
    assert ids_of(batches(questions, 2, lambda item: 1)) == [["a", "c"], ["b"]]
    assert questions.pictures()[0] == questions.pictures()[2] != questions.pictures()[1]
    questions.split(0.5)
    assert read == [0, 1, 2]
    assert max(len(repr(value)) for value in vars(questions[0]).values()) < 1000


def test_by_length_batches_are_of_like_length_longest_first_within_a_window():
    questions = asked(*[picture(k) for k in range(7)])
    lengths = dict(zip([f"q{k}" for k in range(7)], [5, 9, 5, 7, 9, 1, 8], strict=True))
    made = ids_of(batches(questions, 3, lambda item: lengths[item.id]))
    assert made == [["q1", "q4", "q6"], ["q3", "q0", "q2"], ["q5"]]
    same = picture(0)
    questions = asked(picture(1), same, picture(2), same)
    assert ids_of(batches(questions, 2, lambda item: {"q1": 9, "q3": 2}.get(item.id, 5))) == [
        ["q1", "q3"],
        ["q0", "q2"],
    ]


def test_lengths_are_those_of_the_encoded_questions(paper_model):
    questions = vn.QuestionSet([*some_questions(4), vn.Question(None, "Text only?", ("a", "b"), 0, "A", id="t")])
    for item in questions:
        encoded = paper_model.prepare(questions.with_items([item]))
        assert paper_model.encoder.length(questions, item) == encoded["input_ids"].shape[1]
    broken = vn.Question("missing.png", "Why?", ("a", "b"), 0, "A", id="m")
    assert paper_model.encoder.length(questions, broken) > 0


@pytest.mark.parametrize("how", [{"prefetch": 0}, {"prefetch": 5}, {"by_length": True}, {"batch_size": 3}])
@pytest.mark.parametrize("answer", ["letters", "text", "generate"])
def test_the_counts_do_not_depend_on_how_batches_are_made(model, how, answer):
    questions = some_questions(7, answer=answer)
    one = vn.record(model, questions, condition="all", batch_size=2, progress=False)
    other = vn.record(model, questions, condition="all", progress=False, **{"batch_size": 2, **how})
    assert one == other
    assert one.provenance == other.provenance


def test_item_files_do_not_depend_on_preparing_ahead_and_keep_their_order(model, tmp_path):
    questions = some_questions(7)
    for name, how in {"now": {"prefetch": 0}, "ahead": {"prefetch": 3}, "sorted": {"by_length": True}}.items():
        vn.record_items(model, questions, tmp_path / name, batch_size=2, progress=False, **how)
    now, by_length = (vn.ItemStatistics.load(tmp_path / name) for name in ("now", "sorted"))
    for name in ("items.bin", "positive.bin", "manifest.json"):
        assert (tmp_path / "now" / name).read_bytes() == (tmp_path / "ahead" / name).read_bytes()
    assert [item.id for item in by_length.items] == [f"q{k}" for k in range(7)]
    assert (now._files.table("positive") == by_length._files.table("positive")).all()


def test_a_study_does_not_depend_on_preparing_ahead(model):
    questions = some_questions(6)
    masks = {"x": vn.NeuronSet(model.space(), [1, 70, 200])}
    one, other = (vn.knockout(model, questions, masks, batch_size=2, prefetch=n, progress=False) for n in (0, 3))
    assert one.ids == other.ids
    assert (one.margins == other.margins).all()


def test_by_default_nothing_is_prepared_ahead_for_a_model_on_the_cpu(model, monkeypatch):
    threads = []

    def executor(workers, name):
        threads.append(name)
        return ThreadPoolExecutor(workers, name)

    monkeypatch.setattr("vlmneurons.run.batching.ThreadPoolExecutor", executor)

    def made(depth=None):
        with prefetched(model, Letters(), enumerate(batches(some_questions(3), 1)), depth, model.encoder) as ready:
            return ids_of(batch for (_, batch), _ in ready)

    one_by_one = [["q0"], ["q1"], ["q2"]]
    assert made() == one_by_one
    assert not threads
    assert made(1) == one_by_one
    assert threads == ["vlmneurons-encode"]
    # As for offloaded weights or a model that runs elsewhere, whose inputs wait on the CPU all the same.
    monkeypatch.setattr(model.hf, "parameters", lambda: iter([torch.empty(1, device="meta")]))
    assert made() == one_by_one
    assert len(threads) == 2


def test_an_error_of_the_thread_comes_at_its_batch_and_names_the_question(model):
    questions = some_questions(6)
    items = [*questions]
    items.insert(4, vn.Question("missing.png", "Bad?", ("x", "y"), 0, "A", id="bad"))
    with pytest.raises(QuestionError, match=r"question 'bad': the picture 'missing.png' cannot be opened") as caught:
        vn.record(model, questions.with_items(items), condition="all", batch_size=2, prefetch=4, progress=False)
    assert caught.value.partial == vn.record(model, questions[:4], condition="all", batch_size=2, progress=False)
    assert not [one for one in threading.enumerate() if one.name.startswith("vlmneurons-encode")]


def test_an_interrupt_ends_the_thread_at_once(model):
    started = []

    def slow():
        started.append(1)
        time.sleep(0.2)
        return picture(0)

    questions = asked(*[slow] * 8)

    def stopped():
        with prefetched(model, Letters(), enumerate(batches(questions, 1)), 6, model.encoder) as made:
            next(made)[1]()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(started) <= 3  # the one that was wanted, the one that was under way, and no other
    assert not [one for one in threading.enumerate() if one.name.startswith("vlmneurons-encode")]


def test_a_reader_with_an_encoding_of_its_own_is_asked_in_the_callers_thread(model):
    threads = []

    class Own(Letters):
        def encode(self, model, questions):
            threads.append(threading.current_thread())
            return super().encode(model, questions)

    vn.record(model, some_questions(4), answer=Own(), batch_size=2, condition="all", progress=False)
    assert set(threads) == {threading.main_thread()}


def test_a_negative_number_of_batches_ahead_is_refused(model):
    questions = some_questions(2)
    for run in (
        lambda: vn.record(model, questions, prefetch=-1),
        lambda: vn.knockout(model, questions, {"x": vn.NeuronSet(model.space(), [1])}, prefetch=-1),
    ):
        with pytest.raises(QuestionError, match="prefetch -1 is less than 0; 0 encodes each batch when its turn comes"):
            run()


# -- the vision tower sees a picture once ------------------------------------------------------------------------------


@pytest.fixture
def seen(paper_model):
    """The leading dimension of every call of the vision tower."""
    rows = []
    tower = getattr(paper_model.hf.model, "visual", None) or paper_model.hf.model.vision_tower

    def note(module, args):
        rows.append(len(args[0]))

    note.__module__ = "torch.note"  # a user's hook would see, and get, a run with every row
    handle = tower.register_forward_pre_hook(note)
    yield rows
    handle.remove()


def repeated(n=4):
    same = picture(0, 48, 48)
    return vn.QuestionSet(
        [vn.Question(same, f"What {'long ' * k}?", ("Tea", "Rice"), 0, "AB"[k % 2], id=f"r{k}") for k in range(n)]
    )


def test_a_picture_of_several_rows_is_seen_once_with_the_same_scores(paper_model, seen):
    questions = repeated()
    reader = reader_of("letters")
    with torch.inference_mode():
        encoded = reader.encode(paper_model, questions)
        first = reader.read(paper_model, questions, encoded)  # tried out, with all rows
        seen.clear()
        second = reader.read(paper_model, questions, encoded)
        alone = reader.encode(paper_model, questions[:1])
        few = seen[-1]
        reader.read(paper_model, questions[:1], alone)
    assert few == seen[-1]
    torch.testing.assert_close(first.scores, second.scores, rtol=0, atol=1e-5)


def test_what_looks_at_the_vision_tower_sees_every_row(model):
    questions = repeated(3)
    space = model.space("vision", "gate")
    together = vn.record(model, questions, space, tokens="image", condition="all", batch_size=3, progress=False)
    alone = vn.record(model, questions, space, tokens="image", condition="all", batch_size=1, progress=False)
    assert together == alone
