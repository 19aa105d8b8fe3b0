"""What the search must not be fooled by: halves of MLPs in modules of their own, names, tensors made on the way."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from test_architectures import HIDDEN, IDS, WIDTH, Gated, Toy, check_zeroing, layout_of
from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures import find as finding
from vlmneurons.model.architectures.find import Architecture, find_towers, register_architecture
from vlmneurons.model.architectures.hooks import read, write
from vlmneurons.model.architectures.layout import MLPLayout
from vlmneurons.model.down import Down, down_of
from vlmneurons.testing import tiny_inputs, tiny_model
from vlmneurons.testing.architectures import check_architecture


def meta(config: Any, kind: type | None = None) -> nn.Module:
    with torch.device("meta"):
        return (kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)).eval()


# --- an activation is where it is, in whatever module ---


class Half(nn.Module):
    """One linear layer and what is done to its input and its output."""

    def __init__(self, linear: nn.Linear, before: Callable = lambda x: x, after: Callable = lambda x: x) -> None:
        super().__init__()
        self.dense, self.before, self.after = linear, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.dense(self.before(x)))


class Activated(nn.Linear):
    """A linear layer by what it declares, and an activation besides."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class NormActivated(nn.LayerNorm):
    """A normalisation by its name, and an activation besides."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class InTwo(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Scaled(nn.Module):
    """An MLP whose neurons are weighed besides."""

    def __init__(self, scale: Callable[[Tensor, Tensor], Tensor] = lambda scale, x: scale) -> None:
        super().__init__()
        self.first, self.second, self.weigh = up(), down(), scale
        self.register_buffer("scale", torch.linspace(1, 2, WIDTH)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)) * self.weigh(self.scale, x))


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.act = nn.Parameter(torch.linspace(-1, 1, WIDTH)), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bias)


def up() -> nn.Linear:
    return nn.Linear(HIDDEN, WIDTH)


def down() -> nn.Linear:
    return nn.Linear(WIDTH, HIDDEN)


NAMED: dict[str, Callable[[], nn.Module]] = {
    "gelu after the first": lambda: InTwo(Half(up(), after=F.gelu), down()),
    "relu as a clamp": lambda: InTwo(Half(up(), after=lambda x: x.clamp(min=0)), down()),
    "silu written out": lambda: InTwo(Half(up(), after=lambda x: x * torch.sigmoid(x)), down()),
    "silu before the second": lambda: InTwo(up(), Half(down(), before=F.silu)),
    "dropouts around": lambda: InTwo(Half(up(), after=lambda x: F.dropout(F.relu(x), 0.1, False)), Half(down())),
    "scaled by a buffer": lambda: Scaled(),
    "in a module between": lambda: InTwo(Half(up()), Half(down()), nn.Sequential(nn.GELU(), nn.Dropout(0.1))),
    "a square": lambda: InTwo(Half(up(), after=lambda x: x * x), down()),
    "a square by a keyword": lambda: InTwo(Half(up(), after=lambda x: torch.mul(x, other=x)), down()),
    "a bias of its own": lambda: InTwo(up(), down(), Shifted()),
    "in single precision": lambda: InTwo(up(), Half(down(), before=lambda x: F.gelu(x.float()))),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a linear layer that activates": lambda: InTwo(Activated(HIDDEN, WIDTH), down()),
    "the same, wrapped": lambda: InTwo(Half(Activated(HIDDEN, WIDTH)), down()),
    "a norm that activates": lambda: InTwo(up(), down(), NormActivated(WIDTH)),
    "a function that looks": lambda: InTwo(Half(up(), after=lambda x: F.gelu(x) if float(x.sum()) < 9 else x), down()),
    "glu of one projection": lambda: InTwo(Half(nn.Linear(HIDDEN, 2 * WIDTH), after=F.glu), down()),
    "weighed by what comes in": lambda: Scaled(lambda scale, x: x.mean(-1, keepdim=True)),
    "as long as what comes in": lambda: Scaled(lambda scale, x: scale.expand(x.shape[1], WIDTH)),
    "a softmax": lambda: InTwo(Half(up(), after=lambda x: x.softmax(-1)), down()),
    "a glu that looks": lambda: InTwo(
        Half(nn.Linear(HIDDEN, 2 * WIDTH), after=lambda x: F.glu(x) if float(x.sum()) < 9 else x[..., :WIDTH]), down()
    ),
    "half of a projection": lambda: InTwo(
        Half(nn.Linear(HIDDEN, 2 * WIDTH), after=lambda x: x[..., :WIDTH].relu()), down()
    ),
    "by a number made on the way": lambda: InTwo(Half(up(), after=lambda x: F.gelu(x) * torch.tensor([2.0])), down()),
}


@pytest.mark.parametrize("where", NAMED)
def test_an_activation_in_one_half_of_an_mlp_is_found(where: str) -> None:
    model = Toy(NAMED[where])
    tower = find_towers(model)["language"]
    assert tower.widths == (WIDTH, WIDTH)
    check_zeroing(model, tower)


@pytest.mark.parametrize("where", REFUSED)
def test_an_activation_that_cannot_be_reached_is_refused_in_every_layer_and_in_one(where: str) -> None:
    for layers in (range(2), [1]):
        model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
        for layer in layers:
            model.language_model.layers[layer].mlp = REFUSED[where]()
        with pytest.raises(ArchitectureError, match=r"layers\.1.* fit together like an MLP's projections"):
            find_towers(model)


def test_two_layers_without_anything_between_are_no_mlp() -> None:
    with pytest.raises(ArchitectureError, match="no MLP was found in any list of blocks"):
        find_towers(Toy(lambda: InTwo(Half(up(), after=lambda x: 2 * x), Half(down(), before=nn.Dropout()))))


def test_a_wrapped_tower_is_not_silently_left_out() -> None:
    model, inputs = tiny_model("llava")[0], tiny_inputs("llava")
    before = {name: tower.widths for name, tower in find_towers(model).items()}
    for layer in model.model.vision_tower.encoder.layers:
        layer.mlp = InTwo(Half(layer.mlp.fc1, after=F.gelu), layer.mlp.fc2)
    report = check_architecture(model, inputs=inputs)
    assert {tower.name: tower.neurons for tower in report.towers} == {name: sum(w) for name, w in before.items()}


@pytest.mark.parametrize("bare", ["both", "first", "second"])
def test_an_mlp_of_bare_matrices_is_refused_and_not_left_out(bare: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(WIDTH, HIDDEN)), nn.Parameter(torch.randn(HIDDEN, WIDTH))
            self.up, self.down = up(), down()

        def forward(self, x: Tensor) -> Tensor:
            post = F.silu(self.up(x) if bare == "second" else F.linear(x, self.w1))
            return self.down(post) if bare == "first" else F.linear(post, self.w2)

    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    model.language_model.layers[1].mlp = Bare()
    with pytest.raises(ArchitectureError, match="are parameters and no modules: its values cannot be read"):
        find_towers(model)


# --- names of classes decide nothing ---


class Sums(nn.Module):
    """An attention whose values are wider than what goes in, so that two of its layers fit together like an MLP's."""

    def __init__(self, scores: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three = up(), up(), up()
        self.four, self.scores = down(), scores

    def attend(self, x: Tensor) -> Tensor:
        return self.four(self.scores(self.one(x), self.two(x), self.three(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


SCORES: dict[str, Callable[..., Tensor]] = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "softmax": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bij,bjk->bik", torch.einsum("bik,bjk->bij", q, k), F.silu(v)),
    "gated": lambda q, k, v: F.scaled_dot_product_attention(q, q, v) * torch.sigmoid(k).reshape(k.shape),
}


@pytest.mark.parametrize("how", SCORES)
def test_an_attention_by_any_name_is_no_mlp(how: str) -> None:
    kind = type("FeedForward", (Sums,), {})
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    for layer in model.language_model.layers:
        layer.self_attn = kind(SCORES[how])
    assert [mlp.path for mlp in find_towers(model)["language"].mlps] == [
        f"language_model.layers.{layer}.mlp" for layer in range(2)
    ]


class AdapterAttention(Sums):
    """An attention by its name, with an MLP: in a module of its own, or in its own forward."""

    def __init__(self, inline: bool, looks: bool = False, ranks: bool = False) -> None:
        super().__init__(SCORES["sdpa"])
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.ff = nn.Identity() if inline else Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)))
        if inline:
            self.fc1, self.fc2 = up(), down()
        self.inline, self.looks, self.ranks = inline, looks, ranks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and float(x.sum()) == 0.123:
            return x
        x = self.query(x) + self.attend(x)
        act = functools.partial(torch.softmax, dim=-1) if self.ranks else F.gelu
        return x + (self.fc2(act(self.fc1(x))) if self.inline else self.ff(x))


@pytest.mark.parametrize("inline", [True, False])
def test_an_mlp_in_what_is_called_an_attention_is_found(inline: bool) -> None:
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    model.language_model.layers[1].self_attn = AdapterAttention(inline)
    tower = find_towers(model)["language"]
    inside = "language_model.layers.1.self_attn" + ("" if inline else ".ff")
    assert {mlp.path for mlp in tower.mlps if mlp.layer == 1} == {"language_model.layers.1.mlp", inside}


@pytest.mark.parametrize("setting", ["looks", "ranks"])
def test_an_mlp_in_an_attention_that_cannot_be_followed_or_told_for_certain_is_refused(setting: str) -> None:
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    model.language_model.layers[1].self_attn = AdapterAttention(True, **{setting: True})
    with pytest.raises(ArchitectureError, match=r"self_attn\.\w+ and self_attn\.fc2 fit together"):
        find_towers(model)


def test_an_attention_that_loops_over_tokens_is_no_mlp() -> None:
    class Recurrence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj, self.o_proj = up(), up(), down()

        def forward(self, x: Tensor) -> Tensor:
            states, query = [], self.q_proj(x)
            for step in range(x.shape[1]):
                states.append(torch.cumsum(self.v_proj(x)[:, : step + 1], 1)[:, -1] * query[:, step])
            return self.o_proj(torch.stack(states, 1))

    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    for layer in model.language_model.layers:
        layer.self_attn = Recurrence()
    assert find_towers(model)["language"].widths == (WIDTH, WIDTH)


def test_the_adapters_and_the_protein_encoder_of_evolla_are_found() -> None:
    config = transformers.EvollaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    towers = find_towers(meta(config, transformers.EvollaForProteinText2Text))
    adapters = [mlp for mlp in towers["language"].mlps if "adapter" in mlp.path]
    assert adapters
    assert any("protein_encoder.model.encoder.layer" in mlp.path for mlp in towers["protein_encoder"].mlps)


# --- what a forward may do besides ---


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.c(F.silu(m.a(x.clamp(max=min(1e10, torch.finfo(x.dtype).max)))) * m.b(x)),
        lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)).clamp(min=torch.finfo(x.dtype).min),
        lambda m, x: m.c(nn.SiLU()(m.a(x)) * m.b(x)),
        lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)) * torch.tensor([0.5]),
        lambda m, x: m.c((F.silu(m.a(x).float()) * m.b(x)).to(x.dtype)),
        lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)) * torch.sigmoid(x @ m.c.bias)[..., None],  # a vector is no layer
    ],
)
def test_limits_of_a_dtype_and_modules_and_tensors_made_on_the_way_are_followed(compute: Callable[..., Tensor]) -> None:
    layout = layout_of(compute)
    assert (layout.gate, layout.up, layout.down) == ("a", "b", "c")


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, by path: tensors and modules by identity, containers by what is in them."""

    def seen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: id(inner) for key, inner in value.items()}
        return [id(inner) for inner in value] if isinstance(value, list | tuple) else id(value)

    return {
        f"{path}.{name}": seen(value) for path, module in model.named_modules() for name, value in vars(module).items()
    }


@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe", "gemma4", "florence2", "mllama", "constants"])
def test_a_model_is_left_as_it_was_attribute_by_attribute(name: str) -> None:
    if name == "constants":
        model: nn.Module = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)) + torch.ones(1) * x.sum()))
    else:
        model = tiny_model(name)[0]
    before = attributes(model)
    weights = copy.deepcopy(model.state_dict())
    find_towers(model)
    assert attributes(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


# --- experts by their axes ---


class OutIn(nn.Module):
    """Experts that all see every token, as ``[expert, out, in]``: shapes that fit the other way round as well."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Parameter(torch.randn(2, WIDTH, HIDDEN)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.randn(2, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, x.shape[-1]).expand(2, -1, -1)
        gate = torch.bmm(flat, self.gate_proj.transpose(1, 2))
        post = F.silu(gate) * torch.bmm(flat, self.up_proj.transpose(1, 2))
        return torch.bmm(post, self.down_proj.transpose(1, 2)).sum(0).view(x.shape)


def test_experts_that_lie_the_other_way_round_have_their_own_width() -> None:
    model = Toy(OutIn)
    mlps = find_towers(model)["language"].mlps
    assert [mlp.width for mlp in mlps] == [WIDTH] * 4
    assert down_of(model, mlps[1]) == Down("language_model.layers.0.mlp.down_proj", 2, 1)
    seen: list[torch.Size] = []
    with read(model, mlps[1], "post", lambda values, tokens: seen.append(values.shape)):
        clean = model(IDS)
    assert seen == [(IDS.numel(), WIDTH)]

    def zero(values: Tensor, tokens: Tensor) -> Tensor:
        return values.index_fill(-1, torch.tensor([3, WIDTH - 1]), 0)

    with write(model, mlps[1], "post", zero):
        edited = model(IDS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.language_model.layers[0].mlp.down_proj[1, :, [3, WIDTH - 1]] = 0
    torch.testing.assert_close(edited, twin(IDS))
    assert not torch.equal(edited, clean)


@pytest.mark.filterwarnings("ignore")
def test_square_weights_of_experts_and_halves_of_any_width_pass_the_contract() -> None:
    ids = {"input_ids": torch.arange(3, 20)[None]}
    sizes = {"vocab_size": 99, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    for width, act in ((37, "silu"), (32, "gelu")):
        config = transformers.Phi3Config(
            hidden_size=32, intermediate_size=width, hidden_act=act, pad_token_id=0, **sizes
        )
        torch.manual_seed(0)
        assert check_architecture(transformers.Phi3ForCausalLM(config).eval(), inputs=ids).towers[0].widths == (width,)
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=3, **sizes)
    torch.manual_seed(0)
    assert check_architecture(transformers.MixtralForCausalLM(config).eval(), inputs=ids).towers[0].widths == (16,)


# --- which tower is which ---


def test_sparse_layers_of_switch_are_parts_of_blocks() -> None:
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, num_decoder_layers=4, num_experts=3, vocab_size=99
    )
    towers = find_towers(meta(config, transformers.SwitchTransformersForConditionalGeneration))
    assert {name: len(tower) for name, tower in towers.items()} == {"language": 4, "encoder": 4}
    assert set(towers["language"].widths) == {48}


def test_encoders_are_not_called_language() -> None:
    for config, kind in (
        (transformers.ViTConfig(num_hidden_layers=2), transformers.ViTModel),
        (transformers.Dinov2Config(num_hidden_layers=2), transformers.Dinov2Model),
        (transformers.Wav2Vec2Config(num_hidden_layers=2), transformers.Wav2Vec2Model),
    ):
        with pytest.raises(ArchitectureError, match=r"no language model was told among (vision|audio)"):
            find_towers(meta(config, kind))
    with pytest.raises(ArchitectureError, match=r"local_decoder.* could each be the language model; say which"):
        find_towers(meta(transformers.BltConfig(), transformers.BltForCausalLM))


@pytest.mark.filterwarnings("ignore")
def test_gemma_3n_with_two_inputs_and_gemma_4_that_hears_are_found() -> None:
    config = transformers.Gemma3nTextConfig(
        num_hidden_layers=3, altup_num_inputs=2, activation_sparsity_pattern=None, num_kv_shared_layers=0
    )
    assert len(find_towers(meta(config))["language"]) == 3
    config = transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(num_hidden_layers=2),
        vision_config=transformers.Gemma4VisionConfig(num_hidden_layers=2),
        audio_config=transformers.Gemma4AudioConfig(num_hidden_layers=2),
    )
    towers = find_towers(meta(config, transformers.Gemma4ForConditionalGeneration))
    assert {name: len(tower) for name, tower in towers.items()} == {"language": 2, "vision": 2, "audio": 2}


# --- between the towers ---


def test_a_projector_has_a_name_and_can_be_switched_off() -> None:
    model, inputs = tiny_model("llava")[0], tiny_inputs("llava")
    tower = find_towers(model)["projector"]
    assert (tower.layer_paths, [mlp.name for mlp in tower.mlps]) == (("model.multi_modal_projector",), ["mlp"])
    with torch.no_grad():
        clean = model(**inputs).logits
        with write(model, tower.mlps[0], "post", lambda values: values.index_fill(-1, torch.tensor([1, 4]), 0)):
            edited = model(**inputs).logits
        twin = copy.deepcopy(model)
        twin.model.multi_modal_projector.linear_2.weight[:, [1, 4]] = 0
        torch.testing.assert_close(edited, twin(**inputs).logits)
    assert not torch.equal(edited, clean)


def test_what_projects_in_qwen_is_found_in_the_vision_tower() -> None:
    towers = find_towers(tiny_model("qwen3_vl")[0])
    assert towers["projector"].layer_paths == ("model.visual.merger", "model.visual.deepstack_merger_list.0")


@pytest.mark.parametrize("name", ["llava_next_mistral", "qwen2_5_vl"])
def test_a_projector_is_counted_by_question(name: str) -> None:
    import vlmneurons as vn
    from helpers import some_questions

    model, questions = vn.VLM(*tiny_model(name)), some_questions(3)
    space = model.space("projector", "post")
    last = model.hf.get_submodule(model.towers["projector"].mlps[0].path)
    last = last.get_submodule(model.towers["projector"].mlps[0].layout.down)
    expected = {}
    for number, question in enumerate(questions):  # one at a time: every row is the question's
        seen: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2) > 0))
        with torch.no_grad():
            model.hf(**model.prepare(questions[number : number + 1]))
        hook.remove()
        expected[question.group] = expected.get(question.group, 0) + torch.cat(seen).sum(0)
    for size in (1, 3):
        statistics = vn.record(model, questions, space, condition="all", batch_size=size, progress=False)
        for group, counts in expected.items():
            assert torch.equal(statistics.positive[statistics.groups.index(group)], counts)
    with vn.Ablation(model, vn.NeuronSet.from_indices(space, {0: [1, 2]})), torch.no_grad():
        model.hf(**model.prepare(questions))


def test_a_q_former_has_a_name_and_what_it_sees_is_not_counted_as_if_it_were_the_text() -> None:
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**settings, "image_size": 28, "patch_size": 14},
        qformer_config={**settings, "vocab_size": 99, "encoder_hidden_size": 32},
        text_config={
            **{"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 1},
        },
        num_query_tokens=4,
        image_token_index=98,
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    tower = find_towers(model)["qformer"]
    assert (len(tower), set(tower.widths)) == (2, {64})
    inputs = {
        "pixel_values": torch.randn(1, 3, 28, 28),
        "input_ids": torch.tensor([[98] * 4 + [5, 6, 7]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
    }
    with torch.no_grad():
        clean = model(**inputs).logits
        with write(model, tower.mlps[0], "post", lambda values: torch.zeros_like(values)):
            assert not torch.equal(model(**inputs).logits, clean)


@pytest.mark.parametrize("names", [("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")])
def test_a_layer_that_declares_its_sizes_is_a_projection_whatever_it_computes_with(names: tuple[str, str]) -> None:
    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("packed", linear.weight.detach().flatten())
            for name, size in zip(names, (linear.in_features, linear.out_features), strict=True):
                setattr(self, name, size)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.packed.view(-1, x.shape[-1]))

    model = Toy(lambda: InTwo(Packed(up()), Packed(down()), nn.GELU()))
    check_zeroing(model, find_towers(model)["language"])


def test_a_single_module_can_be_registered_as_a_tower() -> None:
    model, known = tiny_model("llava")[0], len(finding._REGISTERED)
    layout = MLPLayout(gate="linear_1", down="linear_2", activation="act")
    towers = {"language": "model.language_model.layers", "between": "model.multi_modal_projector"}
    try:
        register_architecture(type(model).__name__, Architecture(towers, mlps={"between": {"": layout}}))
        found = find_towers(model)["between"]
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]
    assert [str(mlp.site("post")) for mlp in found.mlps] == ["between.layers.0.mlp.post"]
