"""Gradient selectors against finite differences with plain hooks, and what integrated gradients must add up to."""

import pytest
import torch

import vlmneurons as vn
from helpers import language_blocks, some_questions
from vlmneurons.errors import ActivationError, MismatchError, QuestionError, SelectionError
from vlmneurons.run.readers import letter_tokens
from vlmneurons.statistics.attributions import AttributionStatistics


@pytest.fixture(scope="module")
def double(tiny_folder):
    """A small model in double precision, norms too (transformers has them in single), for finite differences."""
    model = vn.VLM.from_pretrained(tiny_folder("llava_next_qwen2"), dtype=torch.float64)

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm.__get__(module)
    return model


class Scaled:
    """Values of chosen decoder MLPs multiplied by a vector each, by hooks of plain PyTorch on the down projections."""

    def __init__(self, model, factors, where=None):
        self.model, self.factors, self.where = model, factors, where

    def __enter__(self):
        def hook(_, args, factor):
            changed = args[0] * factor
            return (changed if self.where is None else torch.where(self.where[..., None], changed, args[0]),)

        blocks = language_blocks(self.model.hf)
        self.handles = [
            blocks[layer].mlp.down_proj.register_forward_pre_hook(lambda m, a, f=factor: hook(m, a, f))
            for layer, factor in self.factors.items()
        ]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def margin(model, questions, number, answer="letters"):
    """The margin of one question, from double-precision logits of a plain call, not by the library."""
    one = questions[number : number + 1].asked(answer=answer)
    item = one[0]
    with torch.no_grad():
        if answer == "letters":
            logits = model.hf(**model.prepare(one), use_cache=False).logits[0, -1]
            shown = logits[letter_tokens(model, len(item.options))].logsumexp(-1).tolist()
            scores = {option: shown[place] for place, option in enumerate(one.order(item))}
        else:
            encoded = vn.TextLikelihood().encode(model, one)
            logits = model.hf(**encoded.batch, use_cache=False).logits.log_softmax(-1)
            scores = {
                place: sum(logits[row, at, token].item() for at, token in zip(encoded.positions[row], ids))
                for place, (row, ids) in enumerate(encoded.wanted[0])
            }
    return scores[item.answer] - max(score for place, score in scores.items() if place != item.answer)


def widths(model):
    return {site.layer: width for site, width in zip(model.space().sites, model.space().widths, strict=True)}


@pytest.mark.parametrize("answer", ["letters", "text"])
def test_activation_times_gradient_equals_finite_differences(double, answer):
    questions = some_questions(3, groups="AB")
    given = vn.attribute(double, questions, condition="all", answer=answer, progress=False)
    assert given.items.tolist() == [2, 1]
    space, step = double.space(), 1e-6
    generator = torch.Generator().manual_seed(0)
    for index in torch.randperm(len(space), generator=generator)[:8].tolist():
        site, neuron = space.locate(index)
        sums = {"A": 0.0, "B": 0.0}
        for number, item in enumerate(questions):
            values = []
            for sign in (1, -1):
                factor = torch.ones(widths(double)[site.layer], dtype=torch.float64)
                factor[neuron] += sign * step
                with Scaled(double, {site.layer: factor}):
                    values.append(margin(double, questions, number, answer))
            sums[item.group] += (values[0] - values[1]) / (2 * step)
        for row, group in enumerate(given.groups):
            assert given.total[row, index].item() == pytest.approx(sums[group], rel=1e-4, abs=1e-6)
    assert given.total.abs().max() > 1e-3  # there is something to compare


def test_integrated_gradients_equal_finite_differences_at_every_step(double):
    questions, steps = some_questions(1, groups="A"), 3
    given = vn.attribute(double, questions, method="integrated", steps=steps, condition="all", progress=False)
    space, step = double.space(), 1e-6
    for index in [3, 17, len(space) - 5]:
        site, neuron = space.locate(index)
        total = 0.0
        for number in range(steps):
            values = []
            for sign in (1, -1):
                factor = torch.full((widths(double)[site.layer],), (number + 0.5) / steps, dtype=torch.float64)
                factor[neuron] += sign * step
                with Scaled(double, {site.layer: factor}):
                    values.append(margin(double, questions, 0))
            total += (values[0] - values[1]) / (2 * step) / steps
        assert given.total[0, index].item() == pytest.approx(total, rel=1e-4, abs=1e-7)


def test_integrated_gradients_of_a_layer_add_up_to_what_the_layer_does(double):
    questions = some_questions(1, groups="A")
    space = double.space()
    given = vn.attribute(double, questions, method="integrated", steps=256, condition="all", progress=False)
    whole = margin(double, questions, 0)
    for position, site in enumerate(space.sites):
        with Scaled(double, {site.layer: torch.zeros(space.widths[position], dtype=torch.float64)}):
            without = margin(double, questions, 0)
        part = given.total[0, space.slice(site)].sum().item()
        assert part == pytest.approx(whole - without, rel=2e-2, abs=1e-3)


def test_a_token_rule_looks_at_those_tokens_alone(double):
    questions = some_questions(1, groups="A")
    given = vn.attribute(double, questions, tokens="last", condition="all", progress=False)
    batch = double.prepare(questions, padding_side="right")
    space, step = double.space(), 1e-6
    for index in (5, len(space) - 2):
        site, neuron = space.locate(index)
        values = []
        for sign in (1, -1):
            factor = torch.ones(widths(double)[site.layer], dtype=torch.float64)
            factor[neuron] += sign * step
            with Scaled(double, {site.layer: factor}, batch.tokens.counted("last")):
                values.append(margin(double, questions, 0))
        expected = (values[0] - values[1]) / (2 * step)
        assert given.total[0, index].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_gate_and_post_give_the_same_and_leave_nothing_behind(model):
    questions = some_questions(2, groups="AB")
    before = [parameter.grad for parameter in model.hf.parameters()]
    tables = [
        vn.attribute(model, questions, model.space(kind=kind), condition="all", progress=False).total
        for kind in ("gate", "post")
    ]
    assert torch.equal(*tables)
    assert [parameter.grad for parameter in model.hf.parameters()] == before
    with torch.inference_mode():
        again = vn.attribute(model, questions, condition="all", progress=False)
    assert torch.equal(again.total, tables[0])


def test_frozen_weights_change_nothing(model):
    questions = some_questions(1, groups="A")
    expected = vn.attribute(model, questions, condition="all", progress=False)
    model.hf.requires_grad_(False)
    try:
        assert vn.attribute(model, questions, condition="all", progress=False) == expected
    finally:
        model.hf.requires_grad_(True)


def test_neurons_of_the_vision_tower_can_be_attributed_too(model):
    space = model.space(("language", "vision"), "gate")
    given = vn.attribute(model, some_questions(1, groups="A"), space, condition="all", progress=False)
    language = vn.attribute(model, some_questions(1, groups="A"), condition="all", progress=False)
    assert torch.equal(given.total[:, : len(model.space())], language.total)
    assert given.total[:, len(model.space()) :].abs().max() > 0


def test_parts_add_up_and_files_give_back_the_same(model, tmp_path):
    questions = some_questions(4, groups="AB")
    whole = vn.attribute(model, questions, condition="all", progress=False)
    parts = [vn.attribute(model, questions[start : start + 2], condition="all", progress=False) for start in (0, 2)]
    torch.testing.assert_close((parts[0] + parts[1]).total, whole.total)
    assert (parts[0] + parts[1]).items.tolist() == [2, 2]
    whole.save(tmp_path / "attributions")
    assert AttributionStatistics.load(tmp_path / "attributions") == whole
    other = vn.attribute(model, questions, condition="all", method="integrated", steps=1, progress=False)
    with pytest.raises(MismatchError, match=r"attributions with different '(method|steps)' cannot be added"):
        whole + other


def test_only_questions_that_meet_the_condition_enter(model):
    questions = some_questions(8, groups="AB")
    every = vn.attribute(model, questions, condition="all", progress=False)
    right = vn.attribute(model, questions, condition="correct", progress=False)
    wrong = vn.attribute(model, questions, condition="wrong", progress=False)
    assert (right.items + wrong.items).tolist() == every.items.tolist() == [4, 4]
    torch.testing.assert_close(right.total + wrong.total, every.total)


def test_selectors_take_their_own_tables_out_of_several(model):
    questions = some_questions(4, groups="AB")
    attributions = vn.attribute(model, questions, condition="all", progress=False)
    stats = vn.record(model, questions, condition="all", progress=False)
    both = (vn.CAS(count=20) & vn.Attribution(count=20)).select(stats, attributions)
    alone = vn.CAS(count=20).select(stats), vn.Attribution(count=20).select(attributions)
    assert dict(both) == {group: alone[0][group] & alone[1][group] for group in alone[0]}
    summed = (vn.CAS().zscore() + vn.Attribution().zscore()).take(count=5).select(attributions, stats)
    assert summed.budget == 5
    with pytest.raises(SelectionError, match=r"CAS selects from ActivationStatistics; got AttributionStatistics"):
        vn.CAS(count=1).select(attributions)
    with pytest.raises(SelectionError, match=r"by method='integrated'; these are by 'gradient'"):
        vn.IntegratedGradients(count=1).select(attributions)


def by_token(model, one, kind):
    """For each layer ``[token, neuron]`` value times gradient of the margin of one question read by letters, by plain
    hooks and autograd.
    """
    inputs = model.prepare(one)
    values, handles = [], []

    def keep(value):
        value.retain_grad()
        values.append(value)

    for block in language_blocks(model.hf):
        if kind == "pre":
            handles.append(block.mlp.gate_proj.register_forward_hook(lambda m, a, out: keep(out)))
        else:
            handles.append(block.mlp.down_proj.register_forward_pre_hook(lambda m, a: keep(a[0])))
    try:
        logits = model.hf(**inputs, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    shown = logits[letter_tokens(model, 4)].logsumexp(-1)
    scores = {option: shown[place] for place, option in enumerate(one.order(one[0]))}
    rest = torch.stack([score for option, score in scores.items() if option != one[0].answer])
    (scores[one[0].answer] - rest.max()).backward()
    return [(value * value.grad)[0].detach() for value in values]


@pytest.mark.parametrize("kind", ["pre", "gate"])
def test_the_highest_token_at_pre_and_at_the_gate_is_that_of_plain_autograd(double, kind):
    questions = some_questions(3, groups="AB")
    space = double.space("language", kind)
    how = {"condition": "all", "progress": False}
    highest = vn.attribute(double, questions, space, reduce="max", **how)
    summed = vn.attribute(double, questions, space, **how)
    words = vn.attribute(double, questions, space, reduce="max", tokens="text", **how)
    expected = torch.zeros((3, 2, len(space)), dtype=torch.float64)
    for number, item in enumerate(questions):
        one = questions[number : number + 1]
        text = double.prepare(one).tokens.counted("text")[0]
        row = questions.groups.index(item.group)
        layers = by_token(double, one, kind)
        for n, parts in enumerate(([x.amax(0) for x in layers], [x.sum(0) for x in layers])):
            expected[n, row] += torch.cat(parts)
        expected[2, row] += torch.cat([x[text].amax(0) for x in layers])
    double.hf.zero_grad()
    for stats, ours in zip((highest, summed, words), expected, strict=True):
        torch.testing.assert_close(stats.total, ours, rtol=1e-4, atol=1e-6)  # logits of letters are read in float32
    assert highest.provenance["reduce"] == "max"
    assert "reduce" not in summed.provenance


def test_the_highest_of_one_token_is_its_sum_and_zero_in_experts_that_it_is_not_sent_to(tiny_folder):
    model = vn.VLM.from_pretrained(tiny_folder("qwen3_vl_moe"))
    questions = some_questions(2, groups="AB")
    how = {"tokens": "last", "condition": "all", "progress": False}
    highest, summed = vn.attribute(model, questions, reduce="max", **how), vn.attribute(model, questions, **how)
    assert (summed.total == 0).any()
    assert (summed.total != 0).any()
    torch.testing.assert_close(highest.total, summed.total, rtol=1e-4, atol=1e-9)


def test_attributions_less_those_of_a_control(double):
    questions = some_questions(6, groups="AB")
    how = {"condition": "all", "progress": False}
    country = vn.attribute(double, questions, **how)
    control = vn.attribute(double, questions[:3].group_by(lambda item: "any"), **how)
    less = country - control
    torch.testing.assert_close(less.mean, country.mean - control.mean)
    torch.testing.assert_close((country - country.select_groups(["B", "A"])).mean, torch.zeros_like(country.mean))
    assert less.provenance["less"]["condition"] == "all"
    picked = vn.Attribution(count=5).select(less)["A"].indices
    assert set(picked.tolist()) == set((country.mean - control.mean)[0].topk(5).indices.tolist())
    with pytest.raises(SelectionError, match="differences of attributions are of means: select with on='mean'"):
        vn.Attribution(count=5, on="share").select(less)
    other = vn.attribute(double, questions, reduce="max", **how)
    with pytest.raises(MismatchError, match="attributions with different 'reduce' cannot be compared: None and 'max'"):
        country - other
    with pytest.raises(MismatchError, match="attributions of A, C are taken from those of A, B: give the same groups"):
        country - vn.attribute(double, some_questions(4, groups="AC"), **how)


def test_what_cannot_be_attributed_is_refused(model):
    questions = some_questions(2)
    with pytest.raises(QuestionError, match="Generate reads generated texts, which have no gradient"):
        vn.attribute(model, questions, answer="generate", condition="all", progress=False)
    with pytest.raises(QuestionError, match="method='magic' does not exist; choose from gradient, integrated"):
        vn.attribute(model, questions, method="magic")
    with pytest.raises(QuestionError, match="condition='maybe' does not exist"):
        vn.attribute(model, questions, condition="maybe")
    with pytest.raises(QuestionError, match="steps=0 is less than 1"):
        vn.attribute(model, questions, steps=0)
    with pytest.raises(QuestionError, match="tokens='every' is not a token rule"):
        vn.attribute(model, questions, tokens="every")
    with pytest.raises(QuestionError, match="there are no questions to attribute"):
        vn.attribute(model, questions[:0])
    with pytest.raises(MismatchError, match="integrated gradients grow a neuron from zero: use 'gate' or 'post'"):
        vn.attribute(model, questions, model.space(kind="pre"), method="integrated")
    with pytest.raises(QuestionError, match="reduce='max' is of method='gradient'"):
        vn.attribute(model, questions, method="integrated", reduce="max")
    with pytest.raises(QuestionError, match="reduce='mean' does not exist; choose from sum, max"):
        vn.attribute(model, questions, reduce="mean")


def test_gradients_that_are_not_finite_are_named_and_what_was_done_is_kept(model):
    questions = some_questions(2, groups="AB")
    calls = []

    def poison(grad):
        calls.append(1)
        return grad * float("nan") if len(calls) > 1 else grad

    block = language_blocks(model.hf)[1].mlp.down_proj

    def hook(_, args):
        if args[0].requires_grad:
            args[0].register_hook(poison)

    handle = block.register_forward_pre_hook(hook)
    try:
        with pytest.raises(
            ActivationError, match=r"gradients at language\.layers\.\d\.mlp\.gate, question 'q1'"
        ) as caught:
            vn.attribute(model, questions, condition="all", progress=False)
    finally:
        handle.remove()
    assert caught.value.partial.items.tolist() == [1, 0]
