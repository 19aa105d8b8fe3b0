"""Many masks in one forward: the answers of plain runs, whatever the model, the masks and the memory."""

import functools
from dataclasses import replace

import pytest
import torch

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.errors import AblationError, ActivationError
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenTable
from vlmneurons.run import masked, replay, replayable
from vlmneurons.run.masked import _Turns, read_masked, read_ragged
from vlmneurons.run.owners import OWNERS
from vlmneurons.run.readers import Reading, Wanted, reader_of
from vlmneurons.testing import tiny as _tiny

CLOSE = 1e-4
"""Nats by which a margin may differ in float32. Margins here are of order 1; the largest difference seen is 1e-5."""


def random_set(space, share, seed, layers=None):
    """A random set of neurons, in some layers or all."""
    part = torch.rand(len(space), generator=torch.Generator().manual_seed(seed)) < share
    if layers is not None:
        part &= torch.isin(space.layer_of, torch.tensor(layers))
    return vn.NeuronSet(space, part.nonzero().flatten())


def masks_of(model):
    """Masks that begin at every layer, at several, and nowhere; one of them by row."""
    space = model.space()
    sets = [random_set(space, 0.3, layer, [layer]) for layer in range(len(model.language))]
    sets += [
        random_set(space, 0.05, 10),
        vn.NeuronSet.empty(space),
        random_set(space, 0.5, 11),
        random_set(space, 0.3, 12, [0]),
    ]
    return [vn.Ablation(model, neurons) for neurons in sets]


def by_loop(model, reader, questions, encoded, ablations):
    """The readings of one plain run for each ablation."""
    readings = []
    for ablation in ablations:
        with ablation:
            readings.append(reader.read(model, questions, encoded))
    return readings


def both(model, questions, ablations, answer="letters"):
    """The readings of one forward and of plain runs."""
    reader = reader_of(answer)
    with torch.inference_mode():
        encoded = reader.encode(model, questions)
        return (
            list(read_masked(model, reader, questions, encoded, ablations)),
            by_loop(model, reader, questions, encoded, ablations),
        )


def assert_same(questions, shared, plain):
    assert [one.chosen for one in shared] == [one.chosen for one in plain]
    for one, other in zip(shared, plain, strict=True):
        torch.testing.assert_close(one.margins(questions), other.margins(questions), rtol=0, atol=CLOSE, equal_nan=True)


@pytest.fixture
def passes(monkeypatch):
    """How many masks each shared forward that ran through served."""
    served = []
    run = replay._Pass.run

    def counted(self):
        for number, logits in enumerate(run(self)):
            if number == 0:
                served.append(len(self.tiles))
            yield logits

    monkeypatch.setattr(replay._Pass, "run", counted)
    return served


@pytest.mark.parametrize("answer", ["letters", "text"])
@pytest.mark.parametrize("n_questions", [1, 2, 5])
def test_the_answers_of_one_forward_are_those_of_plain_runs(paper_model, passes, answer, n_questions):
    questions = some_questions(n_questions)
    ablations = masks_of(paper_model)
    shared, plain = both(paper_model, questions, ablations, answer)
    assert passes[-1] == len(ablations)
    assert_same(questions, shared, plain)


def test_masks_differ_in_their_effects_so_that_a_mix_up_would_be_seen(paper_model):
    questions = some_questions(4)
    _, plain = both(paper_model, questions, masks_of(paper_model))
    margins = torch.stack([one.margins(questions) for one in plain])
    differences = (margins[:, None] - margins).abs().amax(-1)
    assert differences[~torch.eye(len(margins), dtype=torch.bool)].min() > 100 * CLOSE


def test_an_empty_mask_gives_the_untouched_model(model):
    questions = some_questions(4)
    reader = reader_of("letters")
    with torch.inference_mode():
        encoded = reader.encode(model, questions)
        clean = reader.read(model, questions, encoded)
        nothing, _ = read_masked(
            model,
            reader,
            questions,
            encoded,
            [vn.Ablation(model, vn.NeuronSet.empty(model.space())), masks_of(model)[0]],
        )
    assert_same(questions, [nothing], [clean])


@pytest.mark.parametrize(
    ("how", "at"),
    [
        ({"mode": "scale", "factor": -0.5}, "post"),
        ({"mode": "scale", "factor": 2.0}, "gate"),
        ({"mode": "add", "factor": 3.0, "values": 0.5}, "gate"),
        ({"mode": "add", "values": 0.5}, "post"),
        ({"mode": "replace", "values": 1.5}, "post"),
        ({"mode": "replace", "values": -1.0}, "gate"),
    ],
)
def test_every_mode_acts_as_in_plain_runs(model, passes, how, at):
    questions = some_questions(3)
    space = model.space()
    sets = [random_set(space, 0.02, 1), random_set(space, 0.5, 2), random_set(space, 0.2, 3, [2])]
    ablations = [vn.Ablation(model, neurons, at=at, **how) for neurons in sets]
    shared, plain = both(model, questions, ablations)
    assert passes[-1] == 3
    assert_same(questions, shared, plain)


def test_an_ablation_of_other_neurons_in_each_row_acts_in_its_tile(model, passes):
    questions = some_questions(3)
    space = model.space()
    rows = [random_set(space, 0.3, seed) for seed in range(3)]
    ablations = [vn.Ablation(model, rows), vn.Ablation(model, rows[::-1]), vn.Ablation(model, rows[0])]
    shared, plain = both(model, questions, ablations)
    assert passes[-1] == 3
    assert_same(questions, shared, plain)


# -- questions that meet different masks -------------------------------------------------------------------------------


def in_part(model, questions, ablations, rows, reader):
    """The readings of some questions under each ablation: shared, and of a run for each ablation and its questions."""
    with torch.inference_mode():
        shared = list(read_ragged(model, reader, questions, reader.encode(model, questions), ablations, rows))
        plain = []
        for ablation, own in zip(ablations, rows, strict=True):
            some = questions.with_items([questions[row] for row in own])
            with ablation:
                plain.append(reader.read(model, some, reader.encode(model, some)))
    return shared, plain


def about_pictures(n, each):
    """Questions about shared pictures, so that rows are packed."""
    first = some_questions(n)
    return vn.QuestionSet(
        [
            replace(item, question=f"{item.question} {'It is new. ' * k}", answer=k, id=f"{item.id}{k}")
            for item in first
            for k in range(each)
        ]
    )


RAGGED = [(0, 1, 2, 3, 4, 5), (4, 5), (0, 1), (2,), (1, 3, 5), (5,), (0, 2, 4), (0, 1, 2, 3, 4, 5)]
"""Some meet a mask twice as often as others; the fifth splits those of a picture."""


def assert_same_in_part(questions, rows, shared, plain):
    for own, one, other in zip(rows, shared, plain, strict=True):
        some = [questions[row] for row in own]
        assert one.chosen == other.chosen
        assert one.texts == other.texts
        torch.testing.assert_close(one.margins(some), other.margins(some), rtol=0, atol=CLOSE, equal_nan=True)


@pytest.mark.parametrize("answer", ["letters", "text"])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_questions_that_meet_different_masks_share_a_forward_and_are_computed_for_their_own(
    model, passes, monkeypatch, answer, each
):
    questions, ablations = about_pictures(6 // each, each), masks_of(model)
    if each == 3:  # several chunks
        monkeypatch.setattr(replay, "_CPU_BYTES", 2**16)
    edited, edit_tiles = [], replay._Pass._edit_tiles

    def seen(self, site, values, tokens=None):
        edited.append(sum(len(tile.copied) for tile in self.computing))
        return edit_tiles(self, site, values, tokens)

    monkeypatch.setattr(replay._Pass, "_edit_tiles", seen)
    shared, plain = in_part(model, questions, ablations, RAGGED, reader_of(answer))
    assert passes[-1] == len(ablations)
    assert_same_in_part(questions, RAGGED, shared, plain)
    if answer == "letters" and each == 1:
        assert 0 < max(edited[-3:]) <= sum(map(len, RAGGED))  # rows, and not six for each mask


@pytest.mark.parametrize("kind", ["generate", "not replayed", "other modes", "own reader", "vision", "watched"])
def test_questions_that_meet_different_masks_get_the_answers_of_plain_runs_whatever_is_asked(model, monkeypatch, kind):
    questions, ablations = some_questions(6), masks_of(model)
    reader, runs = reader_of("letters"), []
    if kind == "generate":
        reader = vn.Generate(max_new_tokens=3)
    elif kind == "other modes":
        ablations[1] = vn.Ablation(model, random_set(model.space(), 0.3, 40), "scale", factor=-0.5)
        ablations[2] = vn.Ablation(model, random_set(model.space(), 0.3, 41), "add", values=0.5, at="gate")
        ablations[3] = vn.Ablation(model, random_set(model.space(), 0.3, 42), "scale", factor=2.0, at="gate")
    elif kind == "own reader":

        class Own(vn.Letters):
            def read(self, model, questions, encoded, watch=None):
                return super().read(model, questions, encoded, watch)

        reader = Own()
    elif kind == "vision":
        ablations[3] = vn.Ablation(model, random_set(model.space("vision", "post"), 0.5, 1))
    if kind == "not replayed":

        def refused(*_):
            raise replay.CannotReplay("no")

        monkeypatch.setattr(masked, "structure_for", refused)
    handle = None
    if kind == "watched":
        handle = model.hf.model.language_model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    calls, forward = [], model.hf.forward

    @functools.wraps(forward)
    def counted(*given, **how):
        calls.append(1)
        return forward(*given, **how)

    monkeypatch.setattr(model.hf, "forward", counted)
    with torch.inference_mode():
        list(read_ragged(model, reader, questions, reader.encode(model, questions), ablations, RAGGED))
    n_calls = len(calls)
    monkeypatch.undo()
    if handle is not None:
        handle.remove()
        assert len(runs) == len(RAGGED)
    if kind in ("generate", "not replayed"):
        turns = max(sum(row in own for own in RAGGED) for row in range(6))
        assert n_calls == turns * (3 if kind == "generate" else 1)
    if kind == "not replayed":
        monkeypatch.setattr(masked, "structure_for", refused)
    shared, plain = in_part(model, questions, ablations, RAGGED, reader)
    assert_same_in_part(questions, RAGGED, shared, plain)


@pytest.mark.parametrize("kind", ["replayed", "not replayed"])
def test_rows_that_are_no_questions_are_run_the_plain_way_where_each_row_would_need_a_mask(model, monkeypatch, kind):
    class Beside(vn.Letters):
        """Every question stands in two rows, the second of which is nobody's."""

        def encode(self, model, questions):
            return model.encoder.rows(questions, [*questions, *questions], [""] * 2 * len(questions))

        def wants(self, encoded):
            n = len(encoded.tokens.last) // 2
            return Wanted(encoded, encoded.tokens.last[:, None].tolist(), list(range(n)), [*range(n), *[-1] * n])

        def score(self, model, questions, encoded, logits):
            return super().score(model, questions, encoded, logits[: len(questions)])

    if kind == "not replayed":

        def refused(*_):
            raise replay.CannotReplay("no")

        monkeypatch.setattr(masked, "structure_for", refused)
    questions, ablations = some_questions(6), masks_of(model)
    shared, plain = in_part(model, questions, ablations, RAGGED, Beside())
    assert_same_in_part(questions, RAGGED, shared, plain)
    assert model.hf not in masked._MIXES_ROWS  # which says of the model what is the reader's


@pytest.mark.parametrize("ragged", [False, True])
def test_neurons_of_two_kinds_of_one_mlp_are_all_switched_off(model, ragged):
    # Both kinds are edited at one place, by one hook each: one of the two must not take the other's place.
    sites = tuple(site.at(kind) for site in model.space().sites for kind in ("post", "pre"))
    space = vn.NeuronSpace(sites, tuple(model.mlp_of(site).width for site in sites))
    ablations = [vn.Ablation(model, random_set(space, 0.3, seed)) for seed in range(3)]
    questions = some_questions(6)
    if ragged:
        shared, plain = in_part(model, questions, ablations, RAGGED[:3], reader_of("letters"))
        assert_same_in_part(questions, RAGGED[:3], shared, plain)
    else:
        assert_same(questions, *both(model, questions, ablations))


def test_questions_without_a_picture_share_a_forward_too(model, passes):
    questions = vn.QuestionSet(
        [vn.Question(None, f"Where {'so ' * n}?", ("A b", "C d"), 0, "g", id=str(n)) for n in range(3)]
    )
    ablations = masks_of(model)
    shared, plain = both(model, questions, ablations)
    assert passes[-1] == len(ablations)
    assert_same(questions, shared, plain)


def test_vision_neurons_are_switched_off_in_runs_of_their_own_and_the_order_stays(model, passes):
    questions = some_questions(3)
    language = masks_of(model)
    vision = vn.Ablation(model, random_set(model.space("vision", "post"), 0.5, 1))
    ablations = [language[0], vision, language[1], vision, language[5]]
    shared, plain = both(model, questions, ablations)
    assert passes[-1] == 3
    assert_same(questions, shared, plain)


def test_generated_answers_come_from_plain_runs(model, passes):
    questions = some_questions(2)
    ablations = masks_of(model)[:2]
    shared, plain = both(model, questions, ablations, vn.Generate(max_new_tokens=3))
    assert [one.texts for one in shared] == [one.texts for one in plain]
    assert passes == []


def test_a_reader_that_runs_the_model_in_its_own_way_is_left_alone(model, passes):
    class Own(vn.Letters):
        def read(self, model, questions, encoded, watch=None):
            return super().read(model, questions, encoded, watch)

    both(model, some_questions(2), masks_of(model)[:2], Own())
    assert passes == []


def test_hooks_of_the_user_see_one_run_for_each_mask(model):
    questions = some_questions(2)
    ablations = masks_of(model)[:3]
    both(model, questions, ablations)  # the structure is known now
    runs = []
    reader = reader_of("letters")
    handle = model.hf.model.language_model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    try:
        with torch.inference_mode():
            list(read_masked(model, reader, questions, reader.encode(model, questions), ablations))
    finally:
        handle.remove()
    assert len(runs) == 3


def test_masks_within_another_ablation_act_on_top_of_it(model):
    questions = some_questions(2)
    with vn.Ablation(model, random_set(model.space(), 0.3, 77), "add", values=1.0, at="post"):
        shared, plain = both(model, questions, masks_of(model)[:3])
    assert_same(questions, shared, plain)


@pytest.mark.parametrize("fits", [0, 1, 3])
def test_out_of_memory_halves_the_chunk_and_goes_on(model, passes, monkeypatch, fits):
    questions = some_questions(2)
    ablations = masks_of(model)
    compute, sizes = replay._Pass._compute, []

    def limited(self, tiles):
        sizes.append(len(tiles))
        if len(tiles) > max(fits, 1) or (fits == 0 and len(sizes) == 6):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, tiles)

    with torch.inference_mode():
        structure = replayable.structure_for(model, questions)
    monkeypatch.setattr(structure, "most_rows", None)
    monkeypatch.setattr(replay._Pass, "_compute", limited)
    if fits == 0:  # not even one tile fits at some time: the error of the plain run is what counts, and it has none
        with pytest.raises(torch.OutOfMemoryError):
            both(model, questions, ablations)
        return
    shared, plain = both(model, questions, ablations)
    assert max(sizes) == len(ablations) - 1  # the empty one needs no tile
    assert max(sizes[-2:]) <= fits
    assert_same(questions, shared, plain)


def test_many_masks_of_long_vocabularies_are_taken_in_several_passes(model, passes, monkeypatch):
    questions = some_questions(2)
    ablations = masks_of(model)
    both(model, questions, ablations)
    passes.clear()
    monkeypatch.setattr(replay, "_MOST_LOGITS", 2 * 3 * model.hf.get_output_embeddings().out_features)
    shared, plain = both(model, questions, ablations)
    assert passes == [3, 3, 2]
    assert_same(questions, shared, plain)


def test_nan_under_one_mask_is_an_error_at_that_mask(model):
    questions = some_questions(2)
    reader = reader_of("letters")
    good = masks_of(model)[0]
    bad = vn.Ablation(model, random_set(model.space(), 0.5, 3), "scale", factor=1e38)
    with torch.inference_mode():
        readings = read_masked(model, reader, questions, reader.encode(model, questions), [good, bad, good])
        assert next(readings).scores is not None
        with pytest.raises(ActivationError, match="NaN"):
            next(readings)


def test_after_an_interrupt_the_model_is_as_it_was(model, monkeypatch):
    questions = some_questions(2)
    reader = reader_of("letters")
    ablations = masks_of(model)

    def interrupted(self, tiles):
        raise KeyboardInterrupt

    with torch.inference_mode():
        encoded = reader.encode(model, questions)
        clean = reader.read(model, questions, encoded)
        replayable.structure_for(model, questions)
        with monkeypatch.context() as patch:
            patch.setattr(replay._Pass, "_compute", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(read_masked(model, reader, questions, encoded, ablations))
        assert torch.equal(reader.read(model, questions, encoded).scores, clean.scores)
    assert model.hf not in OWNERS._held


def test_half_precision_agrees_as_far_as_it_can_tell(tiny_folder, passes):
    model = vn.VLM.from_pretrained(tiny_folder("llava_next_mistral"), dtype=torch.bfloat16)
    questions = some_questions(3)
    ablations = masks_of(model)
    shared, plain = both(model, questions, ablations)
    assert passes[-1] == len(ablations)
    for one, other in zip(shared, plain, strict=True):  # bfloat16 has 8 bits: logits of order 1 are off by 1 in 100
        torch.testing.assert_close(one.margins(questions), other.margins(questions), rtol=0, atol=0.1)


def two_and_three(name):
    """A tiny model of any architecture, and batches of two and of three rows, one of them padded."""
    hf, processor = _tiny.tiny_model(name)
    model = vn.VLM(hf, processor or _tiny.tiny_model("qwen2_5_vl")[1])

    def batch(n):
        inputs = {key: torch.cat([value] * n) for key, value in _tiny.tiny_inputs(name).items()}
        attention = torch.ones_like(inputs["input_ids"])
        attention[0, -3:] = 0
        none = torch.zeros_like(attention, dtype=torch.bool)
        table = TokenTable(inputs["input_ids"], attention.bool(), none, none, none, attention.sum(1) - 1)
        return Batch({**inputs, "attention_mask": attention}, table, None)

    return model, batch(2), batch(3)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("llava", "layers"),
        ("gemma3", "layers"),  # its MLPs' outputs are normed before they are added
        ("qwen3_5", "layers"),  # linear attention
        ("glm4v_moe", "layers"),  # routed experts
        ("qwen3_vl", "decoder"),  # picture features enter between the layers
        ("qwen3_vl_moe", "decoder"),
        ("gemma4", "decoder"),  # layers share keys and values
    ],
)
def test_a_decoder_is_called_again_by_layers_or_as_a_whole(name, calls):
    model, two, three = two_and_three(name)
    with torch.inference_mode():
        structure = replayable.find_structure(model, two, three)  # compares logits under four masks with plain runs
    assert ("decoder" if structure.hidden is None else "layers") == calls


@pytest.mark.parametrize("name", ["qwen3_vl", "mllama"])
def test_where_rows_cannot_be_computed_apart_each_has_a_mask_of_its_own_in_a_plain_run(passes, name):
    hf, processor = _tiny.tiny_model(name)  # their layers are given pictures of all rows together
    model, reader = vn.VLM(hf, processor, template=_tiny.tiny_template(name)), reader_of("letters")
    questions, ablations = some_questions(6), masks_of(model)
    ablations = [*ablations, *ablations][: len(RAGGED)]
    with torch.inference_mode():
        assert not replayable.structure_for(model, questions).ragged
    passes.clear()
    shared, plain = in_part(model, questions, ablations, RAGGED, reader)
    assert not passes
    assert_same_in_part(questions, RAGGED, shared, plain)


def test_an_encoder_decoder_is_run_the_plain_way():
    model, two, three = two_and_three("florence2")
    with torch.inference_mode(), pytest.raises(replay.CannotReplay, match="encoder"):
        replayable.find_structure(model, two, three)


def test_a_decoder_that_replays_wrongly_is_found_out(load_bare, tiny_folder):
    model = vn.VLM.from_pretrained(tiny_folder("llava_next_qwen2"))
    layer = model.hf.model.language_model.layers[1]
    forward, seen = layer.forward, []

    def with_memory(hidden, *args, **kwargs):  # each call depends on the one before
        seen.append(hidden.detach().mean())
        return forward(hidden + (seen[-2] if len(seen) > 1 else 0), *args, **kwargs)

    layer.forward = with_memory
    with torch.inference_mode(), pytest.raises(replay.CannotReplay, match="differ"):
        replayable.structure_for(model, some_questions(1))


def test_by_row_ablations_of_experts_are_refused_as_in_plain_runs():
    model, two, _ = two_and_three("glm4v_moe")
    neurons = random_set(model.space("language", "post"), 0.5, 0)
    ablation = vn.Ablation(model, [neurons, neurons])
    with torch.inference_mode(), ablation, pytest.raises(AblationError, match="routed experts"):
        model.hf(**two, use_cache=False)


def test_scores_of_graded_answers_stay_with_their_questions_where_questions_meet_different_masks(model):
    ablation = vn.Ablation(model, vn.NeuronSet.empty(model.space()))
    turns = _Turns(some_questions(3), [(ablation, [0, 1]), (ablation, [2, 1])])
    first = Reading((0, 1, 0), graded=torch.tensor([0.5, -1.0, 2.0]), texts=("a", "b", "c"))
    second = Reading((1, 0, 1), graded=torch.tensor([9.0, 3.0, 9.0]), texts=("x", "d", "x"))
    one, other = turns.readings([first, second])
    assert (one.graded.tolist(), one.texts, one.chosen) == ([0.5, -1.0], ("a", "b"), (0, 1))
    assert (other.graded.tolist(), other.texts, other.chosen) == ([2.0, 3.0], ("c", "d"), (0, 0))
