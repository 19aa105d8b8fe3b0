"""Models that are unlike the three of the paper: a user's own, encoder-decoders, looped layers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import vlmneurons as vn
from helpers import some_questions
from vlmneurons.errors import ArchitectureError, MismatchError, QuestionError
from vlmneurons.model.architectures import find as _find
from vlmneurons.model.architectures.find import Architecture, register_architecture
from vlmneurons.model.identity import digest_of_weights
from vlmneurons.testing import check_architecture, tiny_inputs, tiny_model
from vlmneurons.testing.tiny import tiny_tokenizer

WIDTH, IMAGE = 64, 10


class Processor:
    """As small as a processor can be: a picture becomes four patches of colour, each with a placeholder of its own."""

    def __init__(self, n_tokens: int = 4, pixels: Tensor | None = None) -> None:
        special = ["<s>", "<pad>", "</s>", *(f"<{number}>" for number in range(3, IMAGE)), "<image>"]
        self.tokenizer = tiny_tokenizer(
            special,
            **{"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"},
            extra_special_tokens={"image_token": "<image>"},
        )
        self.image_token, self.image_token_id = "<image>", IMAGE
        self.n_tokens, self.pixels = n_tokens, pixels

    def __call__(self, text: list[str], images: Any = None, **how: Any) -> BatchFeature:
        encoded = self.tokenizer([one.replace("<image>", "<image>" * self.n_tokens) for one in text], **how)
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if images is not None and self.pixels is not None:
            data["pixel_values"] = self.pixels.repeat(len(text), 1, 1, 1)
        elif images is not None:
            small = [np.array(picture.resize((2, 2)), dtype=np.float32) / 255 for row in images for picture in row]
            data["pixel_values"] = torch.from_numpy(np.stack(small).reshape(len(small), 4, 3))
        return BatchFeature(data)


def template(text: str, n_images: int) -> str:
    return "<image>" * n_images + text + "\nAnswer:"


class Block(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.mix, self.act = nn.Linear(size, size), nn.GELU()
        self.w1, self.w2 = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]
        return x + self.w2(self.act(self.w1(x)))


class OwnConfig(PretrainedConfig):
    model_type = "own"


class OwnVLM(PreTrainedModel):
    """A model that transformers does not know: other names, no image features, no `get_input_embeddings`."""

    config_class = OwnConfig
    passes = 1

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.words, self.patches = nn.Embedding(600, 32), nn.Linear(3, 32)
        self.eye = nn.ModuleList(Block(32, 48) for _ in range(2))
        self.blocks = nn.ModuleList(Block(32, WIDTH) for _ in range(3))
        self.head = nn.Linear(32, 600)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> CausalLMOutput:
        x = self.words(input_ids)
        if pixel_values is not None:
            seen = self.patches(pixel_values)
            for block in self.eye:
                seen = block(seen)
            x = x.masked_scatter((input_ids == IMAGE)[..., None], seen)
        for _ in range(self.passes):
            for block in self.blocks:
                x = block(x * attention_mask[..., None])
        return CausalLMOutput(logits=self.head(x))


def own_model(kind: type[OwnVLM] = OwnVLM) -> OwnVLM:
    torch.manual_seed(0)
    return kind(OwnConfig()).eval()


@pytest.fixture
def own() -> Iterator[vn.VLM]:
    """The user's own model, its towers named in one place."""
    known = len(_find._REGISTERED)
    register_architecture("OwnVLM", Architecture(towers={"language": "blocks", "vision": "eye"}))
    try:
        yield vn.VLM(own_model(), Processor(), template=template)
    finally:
        del _find._REGISTERED[: len(_find._REGISTERED) - known]


# --- a user's own model ---


def test_a_model_that_transformers_does_not_know_is_found_by_its_structure() -> None:
    model = vn.VLM(own_model(), Processor(), template=template)
    assert repr(model).splitlines()[1:] == [
        "  language: 3 layers x 64 = 192 neurons; mlp.{pre,gate,post} at blocks",
        "  eye: 2 layers x 48 = 96 neurons; mlp.{pre,gate,post} at eye",
    ]
    check_architecture(model.hf, inputs=dict(model.prepare(some_questions(1))))


def test_a_users_own_model_goes_through_the_whole_study(own: vn.VLM) -> None:
    questions, bare = some_questions(4), own_model()
    inputs = own.prepare(questions, padding_side="right")  # as letters are read
    values: list[Tensor] = []
    handles = [block.act.register_forward_hook(lambda _, args, out: values.append(out)) for block in bare.blocks]
    with torch.no_grad():
        plain = bare(**inputs).logits
    for handle in handles:
        handle.remove()

    with torch.no_grad(), own.trace(**inputs):
        own.vision.layers[0].mlp.post[:] = 0
        gate = own.language.layers[1].mlp.gate.save()
        logits = own.head.output.save()
    assert gate.shape == values[1].shape
    assert not torch.equal(logits, plain)

    counted = inputs.tokens.counted("content")
    rows = [item.group == "A" for item in questions]
    expected = torch.cat([((value > 0) & counted[..., None])[rows].sum((0, 1)) for value in values])
    statistics = vn.record(own, questions, condition="all", batch_size=4, progress=False)
    assert torch.equal(statistics.positive[statistics.groups.index("A")], expected)
    with vn.Recorder(own) as recorder, torch.no_grad():
        assert torch.equal(own.hf(**inputs).logits, plain)
    assert int(recorder.statistics.items.sum()) == 4

    neurons = vn.NeuronSet.from_indices(own.space(), {1: [3, 5]})
    handle = bare.blocks[1].act.register_forward_hook(
        lambda _, args, out: out.index_fill(-1, torch.tensor([3, 5]), 0.0)
    )
    with torch.no_grad(), vn.Ablation(own, neurons):
        assert torch.equal(own.hf(**inputs).logits, bare(**inputs).logits)
    handle.remove()
    chosen = vn.Selection({"A": neurons, "B": neurons})
    for answer in ("letters", "text"):
        result = vn.knockout(own, questions, {"mine": chosen}, answer=answer, progress=False)
        assert len(result.table()) == 4


class SeesTwice(OwnVLM):
    """One tower under two names: each half of a picture goes through it by itself."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.other_eye = self.eye

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> CausalLMOutput:
        halves = list(self.patches(pixel_values).chunk(2, 1))
        for half, eye in enumerate((self.eye, self.other_eye)):
            for block in eye:
                halves[half] = block(halves[half])
        x = self.words(input_ids).masked_scatter((input_ids == IMAGE)[..., None], torch.cat(halves, 1))
        for block in self.blocks:
            x = block(x * attention_mask[..., None])
        return CausalLMOutput(logits=self.head(x))


def test_a_tower_that_is_shared_and_runs_twice_is_found_once_and_counts_both() -> None:
    known = len(_find._REGISTERED)
    register_architecture("SeesTwice", Architecture(towers={"language": "blocks", "vision": "eye"}))
    try:
        model = vn.VLM(own_model(SeesTwice), Processor(), template=template)
    finally:
        del _find._REGISTERED[: len(_find._REGISTERED) - known]
    assert {name: len(tower.mlps) for name, tower in model.towers.items()} == {"language": 3, "vision": 2}
    questions, space = some_questions(4), model.space("vision")
    how = {"condition": "all", "progress": False}
    found = vn.record(model, questions, space, batch_size=1, **how)
    fired: dict[str, Any] = dict.fromkeys(found.groups, 0)
    values: list[Tensor] = []
    handles = [block.act.register_forward_hook(lambda _, args, out: values.append(out)) for block in model.hf.eye]
    for item in questions:
        values.clear()
        with torch.no_grad():
            model.hf(**model.prepare([item]))
        assert len(values) == 4
        fired[item.group] += torch.stack(
            [(values[n] > 0).sum((0, 1)) + (values[n + 2] > 0).sum((0, 1)) for n in (0, 1)]
        )
    for handle in handles:
        handle.remove()
    for row, group in enumerate(found.groups):
        assert torch.equal(found.positive[row], fired[group].flatten())
    assert found.tokens.tolist() == [2 * 4] * 2
    with pytest.raises(MismatchError, match=r"the rows of this vision tower cannot be told apart by question; ask one"):
        vn.record(model, questions, space, batch_size=2, **how)
    off, bare = vn.NeuronSet(space, range(0, 96, 2)), own_model(SeesTwice)
    for block in bare.eye:
        block.w2.weight.data[:, ::2] = 0
    inputs = model.prepare(questions)
    with torch.no_grad(), vn.Ablation(model, off):
        assert torch.equal(model.hf(**inputs).logits, bare(**inputs).logits)


class Half(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.act, self.w2 = nn.Linear(32, width), nn.GELU(), nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)))


class ByName(nn.Module):
    """A block whose MLPs lie in a table; a block of words alone leaves one of them unused."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.mix, self.names = nn.Linear(32, 32), names
        self.mlps = nn.ModuleDict({"words": Half(WIDTH), "pictures": Half(WIDTH + 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]
        for name in self.names:
            x = x + self.mlps[name](x)
        return x


@pytest.mark.parametrize("names", [("words", "pictures"), ("words",)])
def test_mlps_in_a_table_of_modules_have_its_names(names: tuple[str, ...]) -> None:
    class Named(OwnVLM):
        def __init__(self, config: OwnConfig) -> None:
            super().__init__(config)
            self.blocks = nn.ModuleList(ByName(names) for _ in range(3))

    model, bare = vn.VLM(own_model(Named), Processor(), template=template), own_model(Named)
    space = model.space("language", "post")
    assert [str(site) for site in space.sites[:2]] == [f"language.layers.0.mlp.{n}.post" for n in ("words", "pictures")]
    off = vn.NeuronSet(space, range(0, len(space), 2))
    for block in bare.blocks:
        for half in block.mlps.values():
            half.w2.weight.data[:, ::2] = 0
    inputs, values = model.prepare(some_questions(1)), []
    with torch.no_grad():
        with vn.Ablation(model, off):
            assert torch.equal(model.hf(**inputs).logits, bare(**inputs).logits)
        handles = [
            half.act.register_forward_hook(lambda _, args, out: values.append((out > 0).sum((0, 1))))
            for block in model.hf.blocks
            for name, half in block.mlps.items()
            if name in names
        ]
        with vn.Recorder(model, space, tokens=lambda table: table.attention) as recorder:
            model.hf(**inputs)
    for handle in handles:
        handle.remove()
    counted = recorder.statistics.positive[0].split(list(space.widths))
    assert torch.equal(torch.cat(counted[:: 3 - len(names)]), torch.cat(values))
    assert not any(one.any() for one in counted[1::2]) or len(names) == 2


def test_what_a_users_own_model_lacks_is_said(own: vn.VLM) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = own_model()
            self.words, self.blocks, self.head = whole.words, whole.blocks, whole.head

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.words(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    with pytest.raises(ArchitectureError, match=r"Bare has no config, device, dtype: VLM wraps a transformers model"):
        vn.VLM(Bare(), Processor(), template=template)
    with pytest.raises(QuestionError, match=r"Processor has no chat template; give VLM\(…, template=function\)"):
        vn.VLM(own_model(), Processor()).prepare(some_questions(1))
    with pytest.raises(QuestionError, match="OwnVLM cannot generate; read answers by letters or text"):
        vn.record(own, some_questions(2), answer="generate", progress=False)

    class Silent(OwnVLM):
        def forward(self, **inputs: Any) -> Any:
            return super().forward(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).to_tuple()

    with pytest.raises(QuestionError, match=r"Silent gives tuple without logits; answers are read from output.logits"):
        vn.record(vn.VLM(own_model(Silent), Processor(), template=template), some_questions(2), progress=False)


# --- layers that run several times ---


class Looped(OwnVLM):
    passes = 2


def test_layers_that_run_twice_count_every_pass_of_every_token(tmp_path: Any) -> None:
    model, questions = vn.VLM(own_model(Looped), Processor(), template=template), some_questions(4, groups="A")
    inputs, values = model.prepare(questions, padding_side="right"), []
    handle = model.hf.blocks[0].act.register_forward_hook(lambda _, args, out: values.append(out > 0))
    with torch.no_grad():
        model.hf(**inputs)
    handle.remove()
    counted = inputs.tokens.counted("content")
    statistics = vn.record(model, questions, condition="all", batch_size=4, progress=False)
    assert len(values) == 2
    fired = sum((value & counted[..., None]).sum((0, 1)) for value in values)
    assert torch.equal(statistics.positive[0, :WIDTH], fired)
    assert statistics.tokens.tolist() == [int(counted.sum())]
    assert statistics.routed is not None
    assert statistics.routed.tolist() == [[2 * int(counted.sum())] * 3]
    assert torch.equal(statistics.probability[0, :WIDTH].double(), fired.double() / (2 * counted.sum()))
    with pytest.raises(MismatchError, match="Looped computes its sites several times for a token in one forward"):
        vn.record_items(model, questions, tmp_path / "items", progress=False)
    with pytest.raises(MismatchError, match="Looped does not compute the neuron once for each token of a forward"):
        vn.inspect_neuron(model, questions, 3)


# --- encoder-decoders ---


@pytest.fixture(scope="module")
def florence() -> vn.VLM:
    """A Florence-2 with room in its vocabulary for a tokenizer."""
    hf, _ = tiny_model("florence2")
    inputs = tiny_inputs("florence2")
    processor = Processor(int((inputs["input_ids"] == IMAGE).sum()), inputs["pixel_values"])
    return vn.VLM(hf, processor, template=lambda text, n_images: "<image>" * n_images + text)


def fired_in(model: vn.VLM, tower: str, layer: int, counted: Tensor, run: Any) -> Tensor:
    """How often the neurons of one MLP fire at the counted tokens, by a hook of plain PyTorch."""
    block, values = getattr(model.hf.model.language_model, tower).layers[layer], []
    handle = block.fc2.register_forward_pre_hook(lambda _, args: values.append(args[0] > 0))
    with torch.no_grad():
        run()
    handle.remove()
    return (torch.cat(values, 1) & counted[..., None]).sum((0, 1))


def test_an_encoder_is_counted_over_the_question_and_a_decoder_over_its_own_tokens(florence: vn.VLM) -> None:
    inputs = florence.prepare(some_questions(3))
    length = inputs["input_ids"].shape[1]
    for n_tokens in (3, length):  # as many tokens as the question has must not be taken for the question's
        ids = torch.randint(20, 200, (3, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        extra = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        for tower, space, counted in (
            ("encoder", "encoder", inputs["attention_mask"].bool() & (inputs["input_ids"] > 2)),
            ("decoder", "language", mask.bool()),
        ):
            with vn.Recorder(florence, florence.space(space, "post")) as recorder:
                florence.hf(**inputs, **extra)
            expected = fired_in(florence, tower, 1, counted, lambda extra=extra: florence.hf(**inputs, **extra))
            assert recorder.statistics.tokens.tolist() == [int(counted.sum())]
            assert torch.equal(recorder.statistics.positive[0, -len(expected) :], expected)


def test_a_decoder_is_counted_in_every_step_of_generate(florence: vn.VLM) -> None:
    inputs, how = florence.prepare(some_questions(3)), {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 1}
    with vn.Recorder(florence, florence.space("language", "post"), tokens=lambda table: table.attention) as recorder:
        florence.hf.generate(**inputs, **how)
    expected = fired_in(
        florence, "decoder", 1, torch.ones(3, 4, dtype=torch.bool), lambda: florence.hf.generate(**inputs, **how)
    )
    assert recorder.statistics.items.tolist() == [3]
    assert recorder.statistics.tokens.tolist() == [3 * 4]
    assert torch.equal(recorder.statistics.positive[0, WIDTH:], expected)


def test_what_an_encoder_decoder_cannot_be_asked_is_refused_and_the_way_is_named(
    florence: vn.VLM, tmp_path: Any
) -> None:
    questions = some_questions(3)
    inputs = florence.prepare(questions)
    neurons = vn.NeuronSet.from_indices(florence.space(), {0: [1, 2]})
    for answer in ("letters", "text", "generate"):
        for space in ("language", "encoder", "vision"):
            with pytest.raises(MismatchError, match=r"is an encoder-decoder model: no single forward .*vn.Recorder"):
                vn.record(florence, questions, florence.space(space), answer=answer, progress=False)
    with pytest.raises(MismatchError, match="is an encoder-decoder model"):
        vn.record_items(florence, questions, tmp_path / "items", florence.space("encoder"), progress=False)
    with pytest.raises(MismatchError, match="its decoder does not see the question's tokens"):
        vn.inspect_neuron(florence, questions, 3)
    selection = vn.Selection({"A": neurons, "B": neurons})
    for answer in ("letters", "text"):
        for size in (1, 3):  # one question's only position must not be taken for the decoder's
            with pytest.raises(QuestionError, match=r"its answer begins in the decoder.*answer='generate'"):
                vn.knockout(florence, questions, {"mine": selection}, answer=answer, batch_size=size, progress=False)
    with (
        pytest.raises(MismatchError, match=r"sees decoder_input_ids, not the question, and this run gives none"),
        vn.Recorder(florence),
    ):
        florence.hf(**inputs, labels=inputs["input_ids"])
    with pytest.raises(MismatchError, match=r"its decoder sees other tokens than its other towers"):
        vn.Recorder(florence, florence.space(["language", "encoder"]))
    outside = pytest.raises(QuestionError, match=r"in `generate` an encoder runs outside of the model's forward")
    with outside, vn.Recorder(florence, florence.space("encoder")):
        florence.hf.generate(**inputs, max_new_tokens=2)


class Quantised(Tensor):
    """A weight in whole numbers, as torchao's are: it can be multiplied with, and nothing else is right."""

    @staticmethod
    def __new__(cls, whole: Tensor, step: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=step.dtype, device=whole.device)

    def __init__(self, whole: Tensor, step: Tensor) -> None:
        self.whole, self.step = whole, step

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["whole", "step"], None

    def plain(self) -> Tensor:
        return self.whole.to(self.step.dtype) * self.step

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return cls(args[0].whole, args[0].step)
        if function in (aten.t.default, aten.mm.default, aten.addmm.default, aten.linear.default):
            return function(*(one.plain() if isinstance(one, cls) else one for one in args), **(kwargs or {}))
        raise NotImplementedError(f"{function} of quantised weights")


@pytest.fixture(scope="module")
def quantised() -> tuple[vn.VLM, vn.VLM]:
    """A model of quantised weights, and one of the same numbers in plain ones."""
    models = [tiny_model("llava_next_mistral") for _ in range(2)]
    for number, (hf, _) in enumerate(models):
        for module in hf.model.language_model.modules():
            if isinstance(module, nn.Linear):
                step = module.weight.detach().abs().amax(1, keepdim=True) / 127
                kept = Quantised((module.weight.detach() / step).round().to(torch.int8), step)
                module.weight = nn.Parameter(kept if number == 0 else kept.plain(), requires_grad=False)
        hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach(), requires_grad=False)
    first, second = (vn.VLM(*one) for one in models)
    return first, second


def test_weights_that_quantise_themselves_are_multiplied_with_and_never_indexed(
    quantised: tuple[vn.VLM, vn.VLM],
) -> None:
    assert type(quantised[0].hf.get_submodule("model.language_model.layers.0.mlp.down_proj").weight) is Quantised
    asked, found = some_questions(6), []
    for model in quantised:
        neurons = vn.NeuronSet.from_pairs(model.space(), [(0, 3), (2, 5)])
        counts = vn.record(model, asked, condition="all", progress=False)
        answers = vn.knockout(model, asked, {"x": neurons}, progress=False)  # of few columns, in single precision
        found.append((counts.positive, answers.margins, vn.neuron_writes(model, neurons, k=3)))
    (counts, margins, writes), (other, others, plain) = found
    assert torch.equal(counts, other)
    np.testing.assert_allclose(margins, others, atol=1e-5)
    assert (np.abs(margins[1] - margins[0]) > 1e-4).any()
    assert writes["token"].tolist() == plain["token"].tolist()
    np.testing.assert_allclose(writes["logit"], plain["logit"], atol=1e-5)


def test_weights_that_quantise_themselves_are_known_by_every_byte_also_in_inference_mode(
    quantised: tuple[vn.VLM, vn.VLM],
) -> None:
    model = quantised[0]
    before = digest_of_weights(model.hf)
    with torch.inference_mode():
        assert digest_of_weights(model.hf) == before != digest_of_weights(quantised[1].hf)
    weight = model.hf.get_submodule("model.language_model.layers.1.mlp.up_proj").weight
    for part in (weight.whole, weight.step):
        kept = part.flatten()[0].clone()
        part.view(-1)[0] += 1
        assert digest_of_weights(model.hf) != before
        part.view(-1)[0] = kept
    assert digest_of_weights(model.hf) == before


def test_4_bit_weights_that_are_packed_for_a_cpu_are_known_without_a_state_dict_that_would_change_them() -> None:
    class Packed(nn.Linear):
        def _save_to_state_dict(self, *args: Any) -> None:
            raise AssertionError("bitsandbytes unpacks its weights here, and not to what they were")

    hf, _ = tiny_model("llava_next_mistral")
    place = "model.language_model.layers.1.mlp.up_proj"
    plain = hf.get_submodule(place)
    packed = Packed(plain.in_features, plain.out_features, bias=False)
    packed.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    scale, second = torch.ones(4), torch.ones(2)
    packed.weight.quant_state = SimpleNamespace(
        packing_format_for_cpu=True, absmax=scale, dtype=torch.bfloat16, state2=SimpleNamespace(absmax=second)
    )
    hf.get_submodule(place.rpartition(".")[0]).up_proj = packed
    before = digest_of_weights(hf)
    for part in (packed.weight.data, scale, second, hf.lm_head.weight.data):
        kept = part.flatten()[0].clone()
        part.view(-1)[0] += 1
        assert digest_of_weights(hf) != before
        part.view(-1)[0] = kept
    assert digest_of_weights(hf) == before
