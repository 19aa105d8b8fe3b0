"""Recording: counts equal those of plain hooks, answers decide what enters, and nothing is lost on the way."""

import contextlib
import inspect

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import DynamicCache

import vlmneurons as vn
from helpers import language_blocks, picture, plain_hooks, some_questions
from vlmneurons.errors import ActivationError, MismatchError, QuestionError, SelectionError, VLMNeuronsError
from vlmneurons.statistics.counting import (
    count_patches,
    count_routed,
    count_tokens,
    fired_by_owner,
    fired_by_row,
    rows_not_finite,
)
from vlmneurons.statistics.counts import ActivationStatistics


def by_hand(model, bare, questions, kind="gate", rule="content", tower="language"):
    """Counts, tokens and sums per item, one question at a time, by hooks on a model that was never wrapped."""
    layers = 4 if tower == "language" else 3
    result = {}
    for item in questions:
        inputs = model.prepare(questions.with_items([item]))
        with plain_hooks(bare) as values, torch.inference_mode():
            logits = bare(**inputs).logits[0, -1]
        counted = inputs.tokens.counted(rule)[0]
        fired, total = [], []
        for layer in range(layers):
            here = values[f"{tower}.layers.{layer}.mlp.{kind}"][0]
            here = here[0][counted] if tower == "language" else here.reshape(-1, here.shape[-1])
            fired.append((here.numpy() > 0).sum(0))
            total.append(here.double().numpy().sum(0))
        n = int(counted.sum()) if tower == "language" else len(here)
        order = questions.order(item)
        letters = [[model.tokenizer.convert_tokens_to_ids(form + letter) for form in ("", "Ġ")] for letter in "ABCD"]
        scores = [float(log_softmax(logits, -1)[ids].logsumexp(0)) for ids in letters]
        right = order[int(np.argmax(scores))] == item.answer
        result[item.id] = (np.concatenate(fired), n, np.concatenate(total), right)
    return result


@pytest.mark.parametrize("condition", ["correct", "wrong", "all"])
def test_counts_per_group_equal_those_of_plain_hooks_exactly(paper_model, bare_model, condition):
    questions = some_questions(10, groups="BA")
    items = by_hand(paper_model, bare_model, questions)
    stats = vn.record(paper_model, questions, condition=condition, batch_size=4, progress=False)
    assert stats.groups == ("A", "B")
    assert stats.space == paper_model.space()
    n_kept = 0
    for row, group in enumerate(stats.groups):
        kept = [
            items[item.id]
            for item in questions
            if item.group == group and (condition == "all" or items[item.id][3] == (condition == "correct"))
        ]
        n_kept += len(kept)
        assert int(stats.items[row]) == len(kept)
        assert int(stats.tokens[row]) == sum(n for _, n, _, _ in kept)
        expected = np.sum([fired for fired, _, _, _ in kept], 0) if kept else np.zeros(256)
        assert np.array_equal(stats.positive[row].numpy(), expected)
    assert 0 < n_kept <= 10


@pytest.mark.parametrize("kind", ["pre", "gate", "up", "post"])
def test_every_kind_of_site_and_every_rule_is_counted(paper_model, bare_model, kind):
    questions = some_questions(4, groups="A")
    for rule in ("content", "image", "text", "last"):
        items = by_hand(paper_model, bare_model, questions, kind, rule).values()
        space = paper_model.space("language", kind)
        stats = vn.record(paper_model, questions, space, condition="all", tokens=rule, progress=False)
        assert np.array_equal(stats.positive[0].numpy(), np.sum([fired for fired, _, _, _ in items], 0))
        assert int(stats.tokens[0]) == sum(n for _, n, _, _ in items)


@pytest.mark.parametrize("kind", ["gate", "post"])
def test_a_vision_tower_is_counted_by_the_questions_own_patches(paper_model, bare_model, kind):
    questions = some_questions(5, groups="ABC")
    items = by_hand(paper_model, bare_model, questions, kind, "content", "vision")
    space = paper_model.space("vision", kind)
    stats = vn.record(paper_model, questions, space, condition="all", magnitudes=True, batch_size=5, progress=False)
    for row, group in enumerate("ABC"):
        own = [items[item.id] for item in questions if item.group == group]
        assert np.array_equal(stats.positive[row].numpy(), np.sum([fired for fired, _, _, _ in own], 0))
        assert int(stats.tokens[row]) == sum(n for _, n, _, _ in own)
        np.testing.assert_allclose(stats.total[row].numpy(), np.sum([total for _, _, total, _ in own], 0), atol=1e-3)


def test_both_towers_can_be_recorded_at_once(model):
    questions = some_questions(4)
    both = vn.record(model, questions, model.space(["language", "vision"]), condition="all", progress=False)
    language = vn.record(model, questions, condition="all", progress=False)
    vision = vn.record(model, questions, model.space("vision"), condition="all", progress=False)
    assert torch.equal(both.positive[:, :256], language.positive)
    assert torch.equal(both.positive[:, 256:], vision.positive)
    assert torch.equal(both.tokens, language.tokens)
    assert torch.equal(both.routed[:, -1], vision.tokens)
    torch.testing.assert_close(both.probability[:, 256:], vision.probability)


def test_magnitudes_are_sums_in_double_precision(paper_model, bare_model):
    questions = some_questions(6)
    items = by_hand(paper_model, bare_model, questions)
    stats = vn.record(paper_model, questions, condition="all", magnitudes=True, progress=False)
    for row, group in enumerate("AB"):
        own = [items[item.id] for item in questions if item.group == group]
        np.testing.assert_allclose(stats.total[row].numpy(), np.sum([t for _, _, t, _ in own], 0), rtol=0, atol=1e-3)
    torch.testing.assert_close(stats.mean, stats.total / stats.tokens[:, None])


def test_parts_add_up_to_the_whole_exactly_and_survive_a_file(model, tmp_path):
    questions = some_questions(9, groups="ABC")
    how = {"condition": "all", "progress": False, "magnitudes": True}
    parts = [vn.record(model, questions[:4], **how), vn.record(model, questions[4:], **how)]
    whole = vn.record(model, questions, **how)
    added = parts[0] + parts[1]
    for name in ("positive", "tokens", "items"):
        assert torch.equal(getattr(added, name), getattr(whole, name))
    torch.testing.assert_close(added.total, whole.total, rtol=0, atol=1e-4)
    whole.save(tmp_path / "stats.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "stats.safetensors")
    assert loaded == whole
    assert loaded.provenance == whole.provenance
    assert loaded.provenance["condition"] == "all"
    assert loaded.provenance["tokens"] == "content"
    assert loaded.provenance["model"] == model.name
    assert loaded.provenance["versions"]["torch"] == str(torch.__version__)
    other = vn.record(model, questions[:4], condition="all", tokens="text", progress=False)
    with pytest.raises(
        MismatchError,
        match="statistics of different settings cannot be added: of the second, its tokens is 'text', not 'content'",
    ):
        vn.record(model, questions[4:], condition="all", progress=False) + other


def test_kinds_of_tokens_are_groups_counted_in_one_pass(paper_model):
    questions, how = some_questions(6), {"condition": "all", "magnitudes": True, "progress": False}
    both = vn.record(paper_model, questions, tokens={"picture": "image", "words": "text"}, batch_size=4, **how)
    assert both.groups == ("picture", "words")
    everyone = questions.group_by(lambda item: "all")
    for row, rule in enumerate(("image", "text")):
        one = vn.record(paper_model, everyone, tokens=rule, batch_size=4, **how)
        for name in ("positive", "tokens", "items", "total"):
            assert torch.equal(getattr(both, name)[row], getattr(one, name)[0]), name
    assert both.provenance["tokens"] == "picture: image, words: text"
    more = vn.record(paper_model, questions[:3], tokens={"picture": "image", "words": "text"}, batch_size=3, **how)
    more += vn.record(paper_model, questions[3:], tokens={"picture": "image", "words": "text"}, **how)
    for name in ("positive", "tokens", "items"):
        assert torch.equal(getattr(more, name), getattr(both, name)), name
    torch.testing.assert_close(more.total, both.total, rtol=0, atol=1e-4)  # other batches round otherwise


def test_rules_by_name_that_make_no_sense_are_refused(model, tmp_path, unchecked):
    questions = some_questions(2)
    with pytest.raises(QuestionError, match="tokens='pixels' is not a token rule"):
        vn.record(model, questions, tokens={"a": "pixels"})
    with pytest.raises(QuestionError, match="a vision tower sees pictures alone: record it by itself"):
        vn.record(model, questions, model.space("vision", "post"), tokens={"a": "image"})
    with pytest.raises(QuestionError, match="groups of the decoder's tokens, and no rule was given"):
        vn.record(model, questions, tokens={})
    with pytest.raises(QuestionError, match=r"token rules by name are groups of vn\.record"):
        vn.record_items(model, questions, tmp_path / "items", tokens={"a": "image"})
    with pytest.raises(QuestionError, match="a Recorder counts by one rule"):
        vn.Recorder(model, tokens={"a": "image"})
    with pytest.raises(MismatchError, match="token rules by name"):
        vn.record(model, questions, tokens={"a": "image"}, remote="local")


class Always(vn.AnswerReader):
    """Runs the model once, and gives the answers that it was told."""

    def __init__(self, answers):
        self.answers = answers

    def read(self, model, questions, encoded, watch=None):
        from vlmneurons.run.readers import Reading

        with watch(encoded, list(range(len(questions)))):
            model.hf(**encoded)
        return Reading(tuple(self.answers[item.id] for item in questions))


def test_a_group_without_a_counted_item_has_zeros_and_a_selector_names_it(model):
    questions = some_questions(4)
    answers = {item.id: item.answer if item.group == "A" else None for item in questions}
    stats = vn.record(model, questions, answer=Always(answers), progress=False)
    assert stats.groups == ("A", "B")
    assert stats.items.tolist() == [2, 0]
    assert stats.tokens[1] == 0
    assert not stats.positive[1].any()
    with pytest.raises(SelectionError, match="no token was counted for B"):
        vn.CAS(0.05).select(stats)


def test_a_token_rule_may_be_a_function_and_is_named_in_the_provenance(model):
    def only_first(table):
        mask = torch.zeros_like(table.attention)
        mask[:, :1] = True
        return mask

    questions = some_questions(3, groups="A")
    stats = vn.record(model, questions, condition="all", tokens=only_first, progress=False)
    # Right padding: the first token is real in each row.
    assert int(stats.tokens[0]) == 3
    assert stats.provenance["tokens"].endswith("only_first")


@pytest.mark.parametrize(
    ("rule", "got"),
    [
        (lambda table: table.ids, "torch.int64"),
        (lambda table: table.attention[:, 1:], r"\(3, 114\) torch.bool|torch.bool"),
        (lambda table: [True], "list"),
    ],
)
def test_a_token_rule_with_a_wrong_result_is_refused(model, rule, got):
    with pytest.raises(QuestionError, match=rf"a token rule returns a bool tensor of shape \(3, \d+\); got .*({got})"):
        vn.record(model, some_questions(3), tokens=rule, progress=False)


def test_settings_that_do_not_exist_are_refused_before_anything_runs(model, unchecked):
    questions = some_questions(2)
    for how, message in [
        ({"condition": "right"}, "condition='right' does not exist; choose from correct, wrong, all"),
        ({"on_error": "ignore"}, "on_error='ignore' does not exist; choose from raise, skip"),
        ({"batch_size": 0}, "batch_size 0 is less than 1"),
        (
            {"tokens": "words"},
            "tokens='words' is not a token rule; choose from content, image, audio, video, text, last",
        ),
        ({"answer": "letter"}, "answer='letter' is not a way of reading answers"),
        ({"space": model.space("vision"), "tokens": "last"}, "tokens='last' counts words; a vision tower has none"),
        ({"answer": 5}, "answer=5 is not a way of reading answers; choose from letters, generate, text"),
    ]:
        with pytest.raises(QuestionError, match=message):
            vn.record(model, questions, **how)
    with pytest.raises(QuestionError, match="there are no questions to record"):
        vn.record(model, [])
    foreign = vn.NeuronSpace.from_widths("language", "gate", [64, 32])
    with pytest.raises(
        MismatchError, match=r"language.layers.1.mlp.gate has 64 neurons in this model; the space has 32"
    ):
        vn.record(model, questions, foreign)


# -- questions that cannot be asked ------------------------------------------------------------------------------------


def spoiled(questions: vn.QuestionSet, at: int, image) -> vn.QuestionSet:
    items = list(questions)
    bad = vn.Question(image, "Bad?", ("x", "y"), 0, "A", id="bad")
    return questions.with_items([*items[:at], bad, *items[at:]])


def test_an_error_carries_the_statistics_of_the_batches_before_it(model):
    questions = some_questions(6)
    with pytest.raises(QuestionError, match=r"question 'bad': the picture 'missing.png' cannot be opened") as caught:
        vn.record(model, spoiled(questions, 5, "missing.png"), condition="all", batch_size=2, progress=False)
    expected = vn.record(model, questions[:4], condition="all", progress=False)
    assert caught.value.partial == expected
    with pytest.raises(QuestionError) as caught:
        vn.record(model, spoiled(questions, 0, b""), condition="all", batch_size=2, progress=False)
    assert caught.value.partial.items.tolist() == [0, 0]


def test_an_interrupt_carries_the_statistics_of_the_batches_before_it(model):
    questions = some_questions(6)
    forwards = []

    def interrupt(*_):
        forwards.append(1)
        if len(forwards) == 3:
            raise KeyboardInterrupt

    handle = model.hf.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            vn.record(model, questions, condition="all", batch_size=2, progress=False)
        forwards.clear()
        masks = {"x": vn.NeuronSet(model.space(), [1])}
        with pytest.raises(KeyboardInterrupt) as stopped:
            vn.knockout(model, questions, masks, batch_size=2, progress=False)
    finally:
        handle.remove()
    assert caught.value.partial == vn.record(model, questions[:4], condition="all", progress=False)
    assert stopped.value.partial.ids == ("q0", "q1")


@pytest.mark.parametrize("answer", ["letters", "text", "generate"])
def test_questions_that_cannot_be_asked_are_skipped_on_demand_and_named(model, answer):
    questions = some_questions(6)
    how = {"condition": "all", "batch_size": 4, "progress": False, "answer": answer}
    stats = vn.record(model, spoiled(questions, 2, "missing.png"), on_error="skip", **how)
    assert stats == vn.record(model, questions, **how)
    assert stats.provenance["skipped"] == ["bad"]


def test_a_picture_that_the_processor_refuses_is_named_too(model):
    thin = picture(0, 1, 300)  # Qwen refuses an aspect ratio above 200
    questions = spoiled(some_questions(3), 1, thin)
    with pytest.raises(QuestionError, match=r"question 'bad': the processor refuses it .*aspect ratio"):
        vn.record(model, questions, progress=False)
    stats = vn.record(model, questions, condition="all", on_error="skip", progress=False)
    assert stats == vn.record(model, some_questions(3), condition="all", progress=False)


# -- activations that are not numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, 2])
def test_nan_or_infinite_activations_name_the_first_layer_and_the_question(paper_model, value, layer):
    weight = language_blocks(paper_model.hf)[layer].mlp.gate_proj.weight
    kept = weight[5].detach().clone()
    try:
        with torch.no_grad():
            weight[5] = value
        with pytest.raises(ActivationError, match=rf"language.layers.{layer}.mlp.gate, question 'q0'") as caught:
            vn.record(paper_model, some_questions(4), condition="all", progress=False)
    finally:
        with torch.no_grad():
            weight[5] = kept
    assert "try dtype=torch.float32" in str(caught.value)
    assert caught.value.partial.items.sum() == 0


def test_the_question_whose_activations_are_nan_is_named(model):
    token = model.tokenizer.convert_tokens_to_ids("Z")
    items = [
        vn.Question(picture(i), "ZZ top?" if i == 2 else "What?", ("Tea", "Rice"), 0, "A", id=f"q{i}") for i in range(4)
    ]
    embeddings = model.hf.get_input_embeddings().weight
    kept = embeddings[token].detach().clone()
    try:
        with torch.no_grad():
            embeddings[token] = float("nan")
        for answer in ("letters", "text", "generate"):
            with pytest.raises(ActivationError, match=r"language.layers.0.mlp.gate, question 'q2'"):
                vn.record(model, items, answer=answer, condition="all", batch_size=4, progress=False)
    finally:
        with torch.no_grad():
            embeddings[token] = kept


# -- a Recorder in the user's own runs ---------------------------------------------------------------------------------


def plain_counts(model, values, counted, layers=4):
    return torch.cat(
        [
            ((step[f"language.layers.{layer}.mlp.gate"] > 0) & counted[..., None]).sum((0, 1))
            for layer in range(layers)
            for step in [values]
        ]
    )


def test_a_recorder_counts_plain_calls_traces_and_groups(paper_model):
    inputs = paper_model.prepare(some_questions(3))
    special = torch.tensor([n for n, token in paper_model.tokenizer.added_tokens_decoder.items() if token.special])
    image = paper_model.hf.config.image_token_id
    ids, attention = inputs["input_ids"], inputs["attention_mask"].bool()
    counted = (attention & ~torch.isin(ids, special)) | (ids == image)
    with plain_hooks(paper_model.hf) as values, torch.inference_mode():
        paper_model.hf(**inputs)
    values = {name: value[0] for name, value in values.items()}
    expected = plain_counts(paper_model, values, counted)
    with vn.Recorder(paper_model) as recorder:
        with torch.inference_mode():
            paper_model.hf(**inputs)
        with torch.no_grad(), paper_model.trace(**inputs):
            paper_model.language.layers[0].mlp.gate.save()
        with recorder.group("Egypt"):
            paper_model.hf(**inputs)
        with recorder.group(["Japan", "Egypt", "Japan"]):
            paper_model.hf(**inputs)
    paper_model.hf(**inputs)  # not counted any more
    stats = recorder.statistics
    assert stats.groups == ("all", "Egypt", "Japan")
    assert torch.equal(stats.positive[0], 2 * expected)
    assert torch.equal(stats.positive[1] + stats.positive[2], 2 * expected)
    assert stats.items.tolist() == [6, 4, 2]
    assert int(stats.tokens[0]) == 2 * int(counted.sum())
    assert int(stats.tokens[2]) == int(counted[[0, 2]].sum())


def test_a_recorder_counts_every_step_of_generate_and_each_item_once(paper_model):
    inputs = paper_model.prepare(some_questions(2))
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    rule = "last"
    with plain_hooks(paper_model.hf) as values:
        paper_model.hf.generate(**inputs, **how)
    gates = [torch.cat([values[f"language.layers.{n}.mlp.gate"][s][:, -1] for n in range(4)], -1) for s in range(4)]
    with vn.Recorder(paper_model, tokens=rule) as recorder:
        paper_model.hf.generate(**inputs, **how)
    assert torch.equal(recorder.statistics.positive[0], sum((gate > 0).sum(0) for gate in gates))
    assert int(recorder.statistics.tokens[0]) == 8
    assert recorder.statistics.items.tolist() == [2]
    with vn.Recorder(paper_model, tokens=rule) as again, paper_model.generate(**inputs, **how):
        paper_model.language.layers[0].mlp.gate.save()
    assert again.statistics == recorder.statistics


@pytest.mark.parametrize("masked", [True, False])
def test_a_later_step_of_a_loop_of_ones_own_is_of_the_items_that_were_counted(tiny_folder, masked):
    model = vn.VLM.from_pretrained(tiny_folder("llava_next_qwen2"))
    ids = torch.tensor([[10, 11, 12], [13, 14, 15]])

    def mask(length):
        return {"attention_mask": torch.ones(2, length, dtype=torch.int64)} if masked else {}

    parameters = inspect.signature(type(model.hf).forward).parameters
    cache = {"cache" if "cache" in parameters else "past_key_values": DynamicCache(config=model.hf.config)}
    with vn.Recorder(model) as recorder:
        model.hf(ids, use_cache=True, **cache, **mask(3))
        model.hf(torch.tensor([[16], [17]]), use_cache=True, **cache, **mask(4))
    assert (recorder.statistics.tokens.tolist(), recorder.statistics.items.tolist()) == ([8], [2])
    with vn.Recorder(model) as whole:
        model.hf(torch.cat([ids, torch.tensor([[16], [17]])], 1))
    assert torch.equal(recorder.statistics.positive, whole.statistics.positive)


def test_a_run_that_raises_or_is_stopped_is_not_counted(model):
    inputs = model.prepare(some_questions(2))
    with vn.Recorder(model) as recorder:
        model.hf(**inputs)
        handle = language_blocks(model.hf)[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.hf(**inputs)
        handle.remove()
        with torch.no_grad(), model.trace(**inputs) as tracer:
            model.language.layers[2].mlp.gate.save()
            tracer.stop()
        once = recorder.statistics
        model.hf(**inputs)
    assert once.items.tolist() == [2]
    assert torch.equal(recorder.statistics.positive, 2 * once.positive)


def test_a_recorder_sees_what_an_ablation_leaves(model):
    inputs = model.prepare(some_questions(2))
    space = model.space("language", "post")
    with vn.Ablation(model, vn.NeuronSet(space, [3, 70])), vn.Recorder(model, space) as recorder:
        model.hf(**inputs)
    assert recorder.statistics.positive[0][[3, 70]].tolist() == [0, 0]
    assert recorder.statistics.positive[0].sum() > 0


def test_recorders_nest_and_refuse_to_be_entered_twice(model):
    inputs = model.prepare(some_questions(1))
    with vn.Recorder(model) as outer, vn.Recorder(model) as inner:
        model.hf(**inputs)
        with pytest.raises(VLMNeuronsError, match="this recorder is already counting"):
            outer.__enter__()
    assert outer.statistics == inner.statistics
    with pytest.raises(MismatchError, match="nothing was recorded yet: run the model inside `with recorder:`"):
        vn.Recorder(model).statistics  # noqa: B018
    with outer:  # a recorder can be entered again, and goes on counting
        model.hf(**inputs)
    assert outer.statistics.items.tolist() == [2]


def test_runs_that_a_recorder_cannot_tell_apart_are_refused(model):
    inputs = model.prepare(some_questions(2))
    with (
        vn.Recorder(model) as recorder,
        recorder.group(["A"]),
        pytest.raises(MismatchError, match="1 group labels were given for a batch of 2 rows"),
    ):
        model.hf(**inputs)
    embedded = model.hf.get_input_embeddings()(inputs["input_ids"])
    with vn.Recorder(model), pytest.raises(QuestionError, match="tells tokens apart by input_ids; this run gives none"):
        model.hf(inputs_embeds=embedded)
    with (
        vn.Recorder(model, model.space("vision")) as recorder,
        recorder.group(["A", "B"]),
        pytest.raises(MismatchError, match="the rows of this vision tower cannot be told apart by question"),
    ):
        model.hf(**inputs)
    with vn.Recorder(model, model.space("vision")) as recorder:
        model.hf(**inputs)
    assert recorder.statistics.tokens.tolist() == [inputs["pixel_values"].shape[0]]
    with vn.Recorder(model) as recorder:
        model.hf(torch.tensor([[10, 11, 12]]))  # ids by position, no mask, no picture
    assert (recorder.statistics.tokens.tolist(), recorder.statistics.items.tolist()) == ([3], [1])
    weight = language_blocks(model.hf)[1].mlp.up_proj.weight
    kept = weight[0].detach().clone()
    with torch.no_grad():
        weight[0] = float("nan")
    try:
        with vn.Recorder(model, model.space("language", "post")), pytest.raises(Exception, match=r"layers.1.mlp.post"):
            model.hf(**inputs)
    finally:
        with torch.no_grad():
            weight[0] = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [1, 11, 40, 100, 10_000])
def test_counts_are_exact_however_many_values_are_compared_at_once(block, dtype, monkeypatch):
    monkeypatch.setattr("vlmneurons.statistics.counting.CPU_BLOCK", block)
    values = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, 0] = 0
    counted = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    counted[3] = False
    scratch: dict = {}
    expected = ((values.double().numpy() > 0) & counted.numpy()[..., None]).sum(1)
    assert fired_by_row(values, counted.float(), scratch).numpy().tolist() == expected.tolist()
    most = max(11, min(block, values.numel() * values.element_size() // 4))  # one token's values, or a block
    assert scratch[values.device].numel() <= most
    owner = torch.eye(5).repeat_interleave(7, 1) * counted.flatten()
    assert fired_by_owner(values.flatten(0, 1), owner, scratch).numpy().tolist() == expected.tolist()
    assert fired_by_row(values[:, :0], counted[:, :0].float(), scratch).tolist() == [[0] * 11] * 5


def test_counting_never_waits_for_a_device(monkeypatch):
    """On the meta device nothing can be read back: what would make the host wait for a GPU raises there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know the device
    values = torch.empty(3, 7, 5, device="meta", dtype=torch.bfloat16)
    mask = torch.ones(3, 7, dtype=torch.bool)
    for strict in (False, True):
        found = count_tokens(values, mask, totals=True, maxima=True, strict=strict)
        assert {name: one.device.type for name, one in found.items() if one is not None} == dict.fromkeys(
            ["fired", "tokens", "total", "maximum", *(["bad"] if strict else [])], "meta"
        )
        count_patches(values, mask, torch.tensor([0, 0, 1]), 2, totals=True, strict=strict)
        count_routed(values[0], torch.zeros(7, dtype=torch.int64, device="meta"), mask, totals=True, strict=strict)


def test_values_that_are_not_finite_are_found_where_the_host_does_not_wait():
    """The way of devices other than a CPU, tried on a CPU: its shortcut is what the device's name leads to."""
    values, mask = torch.randn(4, 6, 5), torch.ones(4, 6, dtype=torch.bool)
    values[0, 1, 2], values[1, 0, 0], values[2, 5, 4], values[3, 3, 3] = torch.nan, torch.inf, -torch.inf, 3e38
    mask[2, 5] = False
    wanted = [True, True, False, False]
    assert rows_not_finite(values, mask).tolist() == wanted
    elsewhere = torch.Tensor._make_subclass(
        type("Elsewhere", (torch.Tensor,), {"device": torch.device("meta")}), values
    )
    assert rows_not_finite(elsewhere, mask).tolist() == wanted
