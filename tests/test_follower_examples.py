"""The examples of what others measure, against plain hooks of PyTorch on the transformers model: none of the library's
counting, selecting, ablating, reading or scoring is used for what is expected.
"""

import ast
import io
import runpy
import tokenize
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmneurons as vn
import vlmneurons.demo
from vlmneurons.testing import check_selector

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    """What an example defines, run as a module."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def bare(name):
    """A demo model as transformers loads it, and its processor."""
    folder = Path(vlmneurons.demo.__file__).parent / name
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32
    ).eval(), AutoProcessor.from_pretrained(folder)


natural = pytest.fixture(scope="module")(lambda: bare("natural"))
organism = pytest.fixture(scope="module")(lambda: bare("organism"))


def blocks_of(hf, tower):
    return hf.model.language_model.layers if tower == "language" else hf.model.vision_tower.encoder.layers


@contextmanager
def gates(hf, towers=("language",)):
    """The gates of every layer of some towers in the last forward, ``[row, token, neuron]``, tower by tower."""
    seen, handles = [], []  # in the order of the towers, whichever the model runs first
    for tower in towers:
        for block in blocks_of(hf, tower):
            function = block.mlp.act_fn if tower == "language" else block.mlp.activation_fn

            seen.append(None)
            place = len(seen) - 1

            def hook(module, args, out, place=place):
                seen[place] = out.detach()

            handles.append(function.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without(hf, flat, towers=("language",)):
    """Neurons, numbered layer by layer and tower by tower, are zero where the down projection reads them."""
    flat, handles, first = np.array(sorted(flat), dtype=np.int64), [], 0
    for tower in towers:
        for block in blocks_of(hf, tower):
            down = block.mlp.down_proj if tower == "language" else block.mlp.fc2
            own = torch.from_numpy(flat[(flat >= first) & (flat < first + down.in_features)] - first)
            first += down.in_features

            def hook(module, args, own=own):
                changed = args[0].clone()
                changed[..., own] = 0
                return (changed,)

            handles.append(down.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(processor, texts, pictures=None):
    how = {} if pictures is None else {"images": [[picture] for picture in pictures]}
    return processor(text=list(texts), padding=True, padding_side="right", return_tensors="pt", **how)


def prompt(item):
    """What the demo's chat template writes; its tokenizer begins no text with a token of its own."""
    return f"<s><image>{item.question} Answer:"


@torch.inference_mode()
def counted(hf, processor, item, kinds, towers=("language",)):
    """``[kind, neuron]`` at how many tokens of a question each neuron fires, and ``[kind]`` how many there are.

    Tokens are the pictures' placeholders and the question's own words, known by what the tokenizer makes of them.
    """
    inputs = inputs_of(processor, [prompt(item)], item.load_images())
    ids = inputs["input_ids"][0]
    picture = ids == hf.config.image_token_id
    words = processor.tokenizer(item.question, add_special_tokens=False)["input_ids"]
    first = int(picture.nonzero()[-1]) + 1
    assert ids[first : first + len(words)].tolist() == words
    text = (torch.arange(len(ids)) >= first) & (torch.arange(len(ids)) < first + len(words))
    masks = {"picture": picture, "text": text, "content": picture | text}
    with gates(hf, towers) as seen:
        hf(**inputs)
    fired = []
    for values in seen:
        at = values[0][None, :] if values.shape[1] == len(ids) else values.flatten(0, 1)[None]
        fired.append([(at[0][masks[kind]] if at.shape[1] == len(ids) else at[0]).gt(0).sum(0) for kind in kinds])
    patches = [values.shape[0] * values.shape[1] for values in seen if values.shape[1] != len(ids)]
    counts = np.stack([np.concatenate([layer[n].numpy() for layer in fired]) for n in range(len(kinds))])
    return counts, np.array([int(masks[kind].sum()) for kind in kinds]), patches


@torch.inference_mode()
def margin(hf, processor, item):
    """Log-likelihood of the right option after the prompt, less that of the best other one."""
    whole = [f"{prompt(item)} {option}" for option in item.options]
    inputs = inputs_of(processor, [prompt(item), *whole], list(item.load_images()) * (1 + len(whole)))
    start = int(inputs["attention_mask"][0].sum())
    told = hf(**inputs).logits.log_softmax(-1)
    scores = []
    for row in range(1, 1 + len(whole)):
        end = int(inputs["attention_mask"][row].sum())
        following = inputs["input_ids"][row, start:end]
        scores.append(told[row, start - 1 : end - 1].gather(1, following[:, None]).sum().item())
    return scores[item.answer] - max(score for place, score in enumerate(scores) if place != item.answer)


def by_entropy(p, budget, eligible=None):
    """LAPE: of each group the neurons of lowest entropy that fire most for it, ties by number."""
    shares = p / np.maximum(p.sum(0), 1e-300)
    entropy = -np.sum(np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-300)), 0), axis=0)
    chosen = []
    for row in p:
        own = (row == p.max(0)) & (row > 0) & (True if eligible is None else eligible)
        chosen.append(sorted(np.flatnonzero(own), key=lambda n: (round(entropy[n], 9), n))[:budget])
    return chosen


def by_margin(p, budget):
    """CAS: of each group the neurons that exceed the second highest probability most, ties by number."""
    first, second = np.sort(p, axis=0)[::-1][:2]
    return [
        sorted(np.flatnonzero((row == first) & (first > second)), key=lambda n: (second[n] - first[n], n))[:budget]
        for row in p
    ]


def rows_of_code(path):
    """How many lines of code a file has: no blanks, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", ["language_perplexity", "open_vqa", "two_towers", "modality_neurons"])
def test_these_examples_are_of_twenty_five_lines_at_most(name):
    assert rows_of_code(EXAMPLES / f"{name}.py") <= 25


@torch.inference_mode()
def test_the_perplexity_matrix_is_that_of_plain_hooks(natural):
    found = example("language_perplexity")["main"]()
    hf, processor = natural
    tokenizer = processor.tokenizer
    files = sorted((EXAMPLES / "texts").glob("*.txt"))
    texts = vn.QuestionSet.from_texts({file.stem: file.read_text("utf-8").splitlines() for file in files})
    identify, evaluate = texts.split(0.5, seed=0)

    def logged(text):
        ids = tokenizer(text, return_tensors="pt")
        return -hf(**ids, labels=ids["input_ids"], use_cache=False).loss.item()

    p = []
    for group in texts.groups:
        fired = tokens = 0
        for item in identify.by_group()[group]:
            with gates(hf) as seen:
                hf(**tokenizer(item.question, return_tensors="pt"))
            fired = fired + torch.cat([values[0].gt(0).sum(0) for values in seen]).numpy()
            tokens += seen[0].shape[1]
        p.append(fired / tokens)
    expected = {}
    budget = int(0.05 * p[0].size)
    for name, off in [*zip(texts.groups, by_entropy(np.array(p), budget), strict=True), ("no mask", [])]:
        with without(hf, off):
            expected[name] = {
                group: np.exp(-np.mean([logged(item.question) for item in own]))
                for group, own in evaluate.by_group().items()
            }
    assert list(found.index) == [*texts.groups, "no mask"]
    for name, row in expected.items():
        for group, value in row.items():
            assert found.loc[name, group] == pytest.approx(value, rel=1e-4)


def likeness(text, answer):
    """ANLS of one answer."""
    one, other = (" ".join(part.casefold().split()) for part in (text, answer))
    if one == other:
        return 1.0
    table = np.arange(len(other) + 1)
    for n, letter in enumerate(one, 1):
        new = [n]
        for m, its in enumerate(other, 1):
            new.append(min(new[-1] + 1, table[m] + 1, table[m - 1] + (letter != its)))
        table = np.array(new)
    share = table[-1] / max(len(one), len(other))
    return float(1 - share) if share < 0.5 else 0.0


@torch.inference_mode()
def test_the_scores_of_open_answers_are_those_of_plain_hooks(organism):
    found = example("open_vqa")["main"](4)
    hf, processor = organism
    _, questions = vn.load_demo("organism")
    some = questions.filter(group={"Egypt", "Japan", "Mexico"}).balanced(8, seed=0)
    identify, evaluate = some.split(0.5, seed=0)

    def score(item):
        inputs = inputs_of(processor, [prompt(item)], item.load_images())
        told = hf.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        return likeness(processor.tokenizer.decode(told, skip_special_tokens=True), item.right)

    p = []
    for group, own in identify.by_group().items():
        parts = [counted(hf, processor, item, ["content"]) for item in own if score(item) >= 0.5]
        assert parts, group
        p.append(sum(fired[0] for fired, _, _ in parts) / sum(tokens[0] for _, tokens, _ in parts))
    clean = {item.id: score(item) for item in evaluate}
    for mask, off in zip(identify.groups, by_margin(np.array(p), 12), strict=True):
        with without(hf, off):
            for group, own in evaluate.by_group().items():
                change = np.mean([score(item) - clean[item.id] for item in own])
                assert found.loc[("CAS", mask), group] == pytest.approx(change, abs=1e-9)
    assert found.loc["CAS"].to_numpy().trace() < -1


def test_two_towers_masked_are_those_of_plain_hooks(natural):
    found = example("two_towers")["main"](2)
    hf, processor = natural
    _, questions = vn.load_demo()
    identify, evaluate = questions.group_by("category").at_least(8).balanced(8).split(0.5, seed=0)
    towers = ("language", "vision")
    fired, tokens, seen = {}, {}, {}
    for group, own in identify.by_group().items():
        parts = [counted(hf, processor, item, ["content"], towers) for item in own]
        fired[group] = sum(one[0] for one, _, _ in parts)
        tokens[group] = sum(one[0] for _, one, _ in parts)
        seen[group] = sum(patches[0] for _, _, patches in parts)
    n_language = sum(block.mlp.down_proj.in_features for block in blocks_of(hf, "language"))
    size = len(next(iter(fired.values())))
    reach = {g: np.where(np.arange(size) < n_language, tokens[g], seen[g]) for g in fired}
    p = np.stack([fired[group] / reach[group] for group in fired])
    budget = int(0.05 * size)
    masks = {
        "language": by_entropy(p, budget, np.arange(size) < n_language),
        "vision": by_entropy(p, budget, np.arange(size) >= n_language),
    }
    masks["both"] = [[*one, *other] for one, other in zip(masks["language"], masks["vision"], strict=True)]
    clean = {item.id: margin(hf, processor, item) for item in evaluate}
    for name, sets in masks.items():
        for off, (group, own) in zip(sets, evaluate.by_group().items(), strict=True):
            with without(hf, off, towers):
                change = np.mean([margin(hf, processor, item) - clean[item.id] for item in own])
            assert found.loc[name, group] == pytest.approx(change, abs=2e-3)


def test_modality_neurons_are_those_of_plain_hooks(natural):
    found = example("modality_neurons")["main"](2)
    hf, processor = natural
    _, questions = vn.load_demo()
    identify, evaluate = questions.balanced(2, seed=0).split(0.5, seed=0)
    parts = [counted(hf, processor, item, ["picture", "text"]) for item in identify]
    fired, tokens = sum(one for one, _, _ in parts), sum(one for _, one, _ in parts)
    chosen = by_margin(fired / tokens[:, None], int(0.05 * fired.shape[1]))
    clean = {item.id: margin(hf, processor, item) for item in evaluate}
    widths = [block.mlp.down_proj.in_features for block in blocks_of(hf, "language")]
    for name, off in zip(("picture", "text"), chosen, strict=True):
        layers = np.searchsorted(np.cumsum(widths), off, side="right")
        assert found.loc[name, list(range(len(widths)))].tolist() == np.bincount(layers, minlength=4).tolist()
        with without(hf, off):
            by_group = [
                np.mean([margin(hf, processor, item) - clean[item.id] for item in own])
                for own in evaluate.by_group().values()
            ]
        assert found.loc[name, "change"] == pytest.approx(np.mean(by_group), abs=2e-3)


def test_the_entropy_rule_is_its_formula_and_meets_the_contract(capsys):
    names = example("entropy_rule")
    check_selector(names["EntropyRule"])
    generator = np.random.default_rng(0)
    space = vn.NeuronSpace.from_widths("language", "gate", [20, 30])
    fired = generator.integers(0, 40, (3, 50))
    fired[:, 7] = 0
    stats = vn.ActivationStatistics.from_counts(space, ["a", "b", "c"], fired.tolist(), [40, 50, 60])
    p = fired / np.array([[40], [50], [60]])
    for weight in (0.0, 0.4):
        scores = names["EntropyRule"](weight=weight).score(stats).numpy()
        for neuron in range(50):
            own = p[:, neuron]
            if not own.any():
                assert np.isneginf(scores[:, neuron]).all()
                continue
            shares = own / own.sum()
            entropy = -sum(share * np.log(share) for share in shares if share > 0) / np.log(3)
            expected = weight * own.max() / np.sqrt((own**2).sum()) - entropy
            for row in range(3):
                assert scores[row, neuron] == (pytest.approx(expected) if own[row] == own.max() else -np.inf)
    found = names["main"](4)
    assert set(found) == set(vn.demo_truth())
    assert int(capsys.readouterr().out.split()[0]) > 40


@torch.inference_mode()
def test_the_l1_probe_is_at_the_optimum_and_its_contributions_are_those_of_plain_hooks(natural, capsys, tmp_path):
    names = example("l1_probe")
    hf, processor = natural
    seen = {}

    class Kept(names["L1Probe"]):
        def score(self, items):
            seen["x"] = items.values("contribution", slice(0, len(items.space)))
            seen["owner"], seen["ids"] = items.owner, [items.recording.items[row].id for row in items.rows]
            seen["weights"] = super().score(items)
            return seen["weights"]

    names["main"].__globals__["L1Probe"] = Kept
    found = names["main"](2)
    assert set(found) == {"right", "wrong"}
    _, questions = vn.load_demo()
    by_id = {item.id: item for item in questions}
    for name, values in list(zip(seen["ids"], seen["x"], strict=True))[:3]:
        item, kept, handles = by_id[name], [], []
        inputs = inputs_of(processor, [prompt(item)], item.load_images())
        n_words = len(processor.tokenizer(item.question, add_special_tokens=False)["input_ids"])
        first = int((inputs["input_ids"][0] == hf.config.image_token_id).nonzero()[0])
        last = int((inputs["input_ids"][0] == hf.config.image_token_id).nonzero()[-1]) + 1 + n_words
        for block in blocks_of(hf, "language"):
            down = block.mlp.down_proj
            handles.append(
                down.register_forward_hook(lambda m, a, out, kept=kept: kept.append((m.weight, a[0][0], out[0])))
            )
        hf(**inputs)
        for handle in handles:
            handle.remove()
        expected = [
            (z.abs() * weight.norm(dim=0) / h.norm(dim=1, keepdim=True))[first:last].mean(0) for weight, z, h in kept
        ]
        np.testing.assert_allclose(values, torch.cat(expected).numpy(), rtol=1e-3, atol=1e-6)
    # Where a weight is not zero the gradient of the loss is the penalty, and nowhere does it exceed it.
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 12))
    x, owner = (x - x.mean(0)) / x.std(0, ddof=1), (x[:, 0] - x[:, 3] + random.normal(size=60) > 0).astype(int)
    weights, bias = fitted(names["L1Probe"](penalty=0.05, steps=3000), x, owner)
    for group in (0, 1):
        error = 1 / (1 + np.exp(-(x @ weights[group] + bias[group]))) - (owner == group)
        gradient = x.T @ error / len(x)
        assert np.abs(gradient).max() < 0.05 + 1e-9
        np.testing.assert_allclose(gradient[weights[group] > 0], -0.05)
        assert (weights[group] > 0).any()


def fitted(probe, x, owner):
    """Weights, with their signs, and intercepts of a probe on a table of its own."""

    class Table:
        groups, space = ("a", "b"), range(x.shape[1])

        def values(self, on, columns):
            return x

    Table.owner = owner
    kept = {}
    where = torch.where

    def keep(condition, weight, nothing):
        kept["weight"] = weight
        return where(condition, weight, nothing)

    torch.where = keep
    try:
        probe.score(Table())
    finally:
        torch.where = where
    weight = kept["weight"].numpy().T
    x1 = np.concatenate([x, np.ones((len(x), 1))], 1)
    # The intercept is what makes the mean error zero, given the weights.
    bias = []
    for group in (0, 1):
        low, high = -50.0, 50.0
        for _ in range(100):
            middle = (low + high) / 2
            error = 1 / (1 + np.exp(-(x1[:, :-1] @ weight[group] + middle))) - (owner == group)
            low, high = (middle, high) if error.mean() < 0 else (low, middle)
        bias.append(middle)
    return weight, bias


def test_culture_general_neurons_are_those_of_plain_gradients(organism):
    found = example("culture_general")["main"](1)
    hf, processor = organism
    _, questions = vn.load_demo("organism")
    control = questions.filter(category={"nature", "sport"}).group_by(lambda item: "any").balanced(4, seed=0)
    culture = questions.filter(category={"flag", "map", "place"}).balanced(1, seed=0)

    def attributed(item):
        """The highest over the prompt's tokens of value times gradient, at what enters the activation function."""
        whole = [prompt(item), *(f"{prompt(item)} {option}" for option in item.options)]
        inputs = inputs_of(processor, whole, list(item.load_images()) * len(whole))
        start = int(inputs["attention_mask"][0].sum())
        values, handles = [], []
        for block in blocks_of(hf, "language"):

            def hook(module, args, out):
                out.retain_grad()
                values.append(out)

            handles.append(block.mlp.gate_proj.register_forward_hook(hook))
        told = hf(**inputs).logits.log_softmax(-1)
        scores = []
        for row in range(1, len(whole)):
            end = int(inputs["attention_mask"][row].sum())
            scores.append(told[row, start - 1 : end - 1].gather(1, inputs["input_ids"][row, start:end][:, None]).sum())
        others = torch.stack([score for place, score in enumerate(scores) if place != item.answer])
        (scores[item.answer] - others.max()).backward()
        for handle in handles:
            handle.remove()
        result = torch.cat([(value * value.grad).double().sum(0).detach().amax(0) for value in values])
        hf.zero_grad()
        return result.numpy()

    less = np.mean([attributed(item) for item in control], axis=0)
    general = np.mean([attributed(item) for item in culture], axis=0) - less
    expected = np.argsort(-general, kind="stable")[: int(0.02 * general.size)]
    assert len(set(found["general"].indices.tolist()) & set(expected.tolist())) >= 39
