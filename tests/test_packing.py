"""Packed rows: tokens that rows share are there once, see what they see in their rows, and give the same answers."""

import pytest
import torch

import vlmneurons as vn
from helpers import picture, some_questions
from test_masked import assert_same, both, masks_of, passes, random_set  # noqa: F401
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenTable
from vlmneurons.run import replayable
from vlmneurons.run.packing import Packing
from vlmneurons.run.readers import reader_of


def batch_of(rows, *, left=False, pictures=None, image=()):
    """A batch of token ids; 0 is padding, ids in ``image`` are a picture's."""
    length = max(map(len, rows))
    padded = [([0] * (length - len(row)) + row) if left else (row + [0] * (length - len(row))) for row in rows]
    ids = torch.tensor(padded)
    attention = ids != 0
    is_image = torch.isin(ids, torch.tensor(image, dtype=ids.dtype)) if image else torch.zeros_like(attention)
    last = torch.where(attention, torch.arange(length), -1).amax(1)
    table = TokenTable(ids, attention, is_image, torch.zeros_like(attention), None, last)
    return Batch({"input_ids": ids}, table, pictures)


def last_of(batch):
    return [[place] for place in batch.tokens.last.tolist()]


def test_a_shared_beginning_is_there_once_and_what_parts_follows():
    batch = batch_of([[5, 6, 7, 8, 1], [5, 6, 7, 8, 2, 3], [5, 6, 7, 8, 2, 4]])
    packing = Packing.of(batch, last_of(batch))
    ids = batch["input_ids"][packing.row, packing.place]
    assert ids.tolist() == [[5, 6, 7, 8, 1, 2, 3, 4]]
    assert packing.path.tolist() == [[0, 1, 2, 3, 4, -1], [0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 5, 7]]
    assert packing.place.tolist() == [[0, 1, 2, 3, 4, 4, 5, 5]]
    seen = packing.mask(None, torch.bool)[0, 0]
    rows = [seen[n].nonzero().flatten().tolist() for n in (3, 4, 5, 6, 7)]
    assert rows == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 5, 7]]
    assert packing.index(last_of(batch)) == [[4, 6, 7]]


def test_tokens_after_the_last_wanted_one_and_padding_are_left_out():
    batch = batch_of([[5, 6, 7, 8, 9], [1, 2], [3, 4]])
    packing = Packing.of(batch, [[2], [1], [0]])
    ids = batch["input_ids"][packing.row, packing.place]
    assert ids.tolist() == [[5, 6, 7], [1, 2, 3]]  # the short rows share a pack, and no token sees the other row's
    assert packing.pack_of.tolist() == [0, 1, 1]
    assert packing.mask(None, torch.bool)[1, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]


def test_the_same_image_tokens_of_different_pictures_are_not_shared():
    rows = [[1, 9, 9, 9, 2, 3], [1, 9, 9, 9, 2, 4], [1, 9, 9, 9, 2, 4]]
    for pictures, shapes in [((b"a", b"a", b"a"), (1, 7)), ((b"a", b"b", b"a"), (2, 7)), (None, None)]:
        batch = batch_of(rows, pictures=pictures, image=(9,))
        packing = Packing.of(batch, last_of(batch))
        assert (None if packing is None else tuple(packing.row.shape)) == shapes


def test_rows_that_share_little_are_left_alone():
    batch = batch_of([[1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 9, 10]])
    assert Packing.of(batch, last_of(batch)) is None


def test_a_mask_of_numbers_is_taken_over_and_one_that_looks_ahead_refused():
    batch = batch_of([[5, 6, 7, 1], [5, 6, 7, 2]])
    packing = Packing.of(batch, last_of(batch))
    least = torch.finfo(torch.float32).min
    window = torch.full((2, 1, 4, 4), least).masked_fill(torch.ones(4, 4).tril().triu(-1).bool(), 0.0)
    made = packing.mask(window, torch.float32)[0, 0]
    assert [(row == 0).nonzero().flatten().tolist() for row in made] == [[0], [0, 1], [1, 2], [2, 3], [2, 4]]
    assert packing.mask(torch.zeros(2, 1, 4, 4), torch.float32) is None
    assert packing.mask(torch.ones(2, 1, 4, 4, dtype=torch.bool), torch.bool) is None


def test_positions_that_differ_between_rows_that_share_a_token_are_seen():
    batch = batch_of([[5, 6, 7, 1], [5, 6, 7, 2]])
    packing = Packing.of(batch, last_of(batch))
    places = torch.arange(4).expand(3, 2, 4).clone()
    assert packing.agrees(places, 1, 2)
    assert packing.tokens(places, 1, 2).tolist() == [[[0, 1, 2, 3, 3]]] * 3
    places[0, 1, 0] = 7
    assert not packing.agrees(places, 1, 2)
    assert packing.tokens(torch.arange(4)[None], None, 1).tolist() == [[0, 1, 2, 3, 3]]


def about_two_pictures(n=6, answer="letters"):
    shapes = [(48, 48), (40, 64)]
    items = [
        vn.Question(
            picture(k % 2, *shapes[k % 2]),
            f"What is this {'long word ' * (k % 3)}?",
            ("Tea", "Rice and bread", "Rice and soup", "Soup"),
            k % 4,
            "AB"[k % 2],
            id=f"p{k}",
        )
        for k in range(n)
    ]
    return vn.QuestionSet(items, answer=answer, prompt=lambda item, options: item.question)


def packed_tokens(model, questions):
    reader = reader_of(questions.answer)
    wanted = reader.wants(reader.encode(model, questions))
    packing = Packing.of(wanted.batch, wanted.positions)
    return 1.0 if packing is None else packing.row.numel() / wanted.batch["input_ids"].numel()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("answer", ["letters", "text"])
def test_questions_about_one_picture_have_the_answers_of_plain_runs(paper_model, passes, answer, attention):  # noqa: F811
    questions = about_two_pictures(answer=answer)
    kept = paper_model.hf.config.text_config._attn_implementation
    paper_model.hf.set_attn_implementation(attention)
    try:
        with torch.inference_mode():
            assert packed_tokens(paper_model, questions) < 0.8
            assert replayable.structure_for(paper_model, questions).tokens is not None
        ablations = masks_of(paper_model)
        shared, plain = both(paper_model, questions, ablations, answer)
        assert passes[-1] == len(ablations)
        assert replayable.structure_for(paper_model, questions).tokens is not None  # nor was it given up on the way
    finally:
        paper_model.hf.set_attn_implementation(kept)
        replayable._STRUCTURES.pop(paper_model.hf, None)
    assert_same(questions, shared, plain)


def test_other_neurons_in_each_row_are_not_packed(model, passes):  # noqa: F811
    questions = about_two_pictures(4)
    space = model.space()
    rows = [random_set(space, 0.3, seed) for seed in range(4)]
    ablations = [vn.Ablation(model, rows), vn.Ablation(model, rows[0])]
    shared, plain = both(model, questions, ablations)
    assert passes[-1] == 2
    assert_same(questions, shared, plain)


def test_an_image_id_alone_does_not_make_pictures_the_same(model):
    items = [
        vn.Question(picture(seed, 48, 48), "What is this?", ("a", "b"), 0, "A", id=str(seed), image_id="one sight")
        for seed in range(2)
    ]
    questions = vn.QuestionSet(items)
    shared, plain = both(model, questions, masks_of(model))
    assert_same(questions, shared, plain)
    assert not torch.allclose(plain[0].scores[0], plain[0].scores[1])


def test_a_decoder_that_is_not_causal_is_not_packed(tiny_folder, passes):  # noqa: F811
    model = vn.VLM.from_pretrained(tiny_folder("llava_next_qwen2"), attn_implementation="eager")
    decoder = model.hf.model.language_model
    layers = list(decoder.layers)

    def seeing_all(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": None if mask is None else torch.zeros_like(mask)}

    seeing_all.__module__ = "torch.fake"
    handles = [layer.register_forward_pre_hook(seeing_all, with_kwargs=True, prepend=True) for layer in layers]
    try:
        with torch.inference_mode():
            structure = replayable.structure_for(model, some_questions(2))
        assert structure.tokens is None
    finally:
        for handle in handles:
            handle.remove()
