"""What is found by structure, what is refused, and that reading and writing do what they say."""

import copy
import dataclasses
import functools
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import vlmneurons as vn
from helpers import changes, state_of
from small_models import SMALL
from vlmneurons.errors import ArchitectureError, SiteError
from vlmneurons.model.architectures import find as finding
from vlmneurons.model.architectures.find import Architecture, find_towers, register_architecture
from vlmneurons.model.architectures.hooks import read, read_experts, write, write_experts
from vlmneurons.model.architectures.layout import MLP, Expression, MLPLayout, Step, Tower, Value
from vlmneurons.model.architectures.modules import Modules
from vlmneurons.model.down import Down, down_of
from vlmneurons.testing import tiny_inputs, tiny_model, tiny_template
from vlmneurons.testing.architectures import check_architecture

HIDDEN, WIDTH = 8, 24


# --- small models of our own: blocks with an attention of sorts and whatever MLP is wanted ---


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x).cumsum(-2))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, name: str = "mlp") -> None:
        super().__init__()
        self.self_attn, self.name = Attention(), name
        setattr(self, name, mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + getattr(self, self.name)(x)


class Text(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(32, HIDDEN), nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Toy(nn.Module):
    """The bare minimum of a model: what it is called, where its decoder is, and logits."""

    def __init__(self, make: Callable[[], nn.Module], layers: int = 2, name: str = "mlp") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = Text([Block(make(), name) for _ in range(layers)])
        self.lm_head = nn.Linear(HIDDEN, 32)
        self.eval()

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.language_model(input_ids))


IDS = torch.arange(10).reshape(2, 5)


def linears(*names: str, sizes: dict[str, tuple[int, int]] | None = None) -> dict[str, nn.Module]:
    down = {"down", "fc2", "w2"}
    return {name: nn.Linear(WIDTH, HIDDEN) if name in down else nn.Linear(HIDDEN, WIDTH) for name in names}


class Gated(nn.Module):
    """A gated MLP that computes as it is told, under names that say nothing."""

    def __init__(
        self, compute: Callable[..., Tensor], fused: bool = False, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.compute = compute
        self.a = nn.Linear(HIDDEN, 2 * WIDTH if fused else WIDTH)
        if not fused:
            self.b = nn.Linear(HIDDEN, WIDTH)
        self.c = nn.Linear(WIDTH, HIDDEN)
        if activation is not None:
            self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def layout_of(compute: Callable[..., Tensor], **options: Any) -> MLPLayout:
    towers = find_towers(Toy(lambda: Gated(compute, **options)))
    assert {mlp.width for mlp in towers["language"].mlps} == {WIDTH}
    return towers["language"].mlps[0].layout


# --- what is found ---


def test_roles_follow_the_data_and_not_the_names() -> None:
    first = layout_of(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)))
    second = layout_of(lambda m, x: m.c(m.a(x) * F.silu(m.b(x))))
    assert (first.gate, first.up, first.down) == ("a", "b", "c")
    assert (second.gate, second.up, second.down) == ("b", "a", "c")
    assert first.kinds == ("pre", "gate", "up", "post")
    assert first.product is None
    assert second.product is None


def test_names_that_lie_are_not_believed() -> None:
    class Liar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH)
            self.down_proj, self.act_fn = nn.Linear(WIDTH, HIDDEN), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    layout = find_towers(Toy(Liar))["language"].mlps[0].layout
    assert (layout.gate, layout.up, layout.activation) == ("up_proj", "gate_proj", "act_fn")


@pytest.mark.parametrize(
    ("compute", "split"),
    [
        (lambda m, x: m.c(F.silu(m.a(x).chunk(2, dim=-1)[0]) * m.a_second(x)), None),
        (lambda m, x: (lambda g, u: m.c(F.silu(g) * u))(*m.a(x).chunk(2, -1)), "gate_up"),
        (lambda m, x: (lambda u, g: m.c(F.silu(g) * u))(*m.a(x).chunk(2, dim=-1)), "up_gate"),
        (lambda m, x: (lambda g, u: m.c(F.silu(g) * u))(*torch.split(m.a(x), WIDTH, dim=-1)), "gate_up"),
        (lambda m, x: (lambda h: m.c(F.silu(h[..., ::2]) * h[..., 1::2]))(m.a(x)), "interleaved"),
        (lambda m, x: (lambda h: m.c(h[..., ::2] * F.silu(h[..., 1::2])))(m.a(x)), "interleaved_up"),
        (lambda m, x: (lambda h: m.c(F.silu(h[..., :WIDTH]) * h[..., WIDTH:]))(m.a(x)), "gate_up"),
        (lambda m, x: (lambda h: m.c(F.silu(h[..., :WIDTH]) * h[..., WIDTH : 2 * WIDTH]))(m.a(x)), "gate_up"),
        (lambda m, x: (lambda g, u: m.c(F.silu(g) * u))(*torch.split(m.a(x), [WIDTH, WIDTH], -1)), "gate_up"),
        (lambda m, x: (lambda h: m.c(F.silu(h[0]) * h[-1]))(m.a(x).tensor_split(2, dim=-1)), "gate_up"),
        (lambda m, x: (lambda h: m.c(F.silu(h[-2]) * h[1]))(torch.chunk(input=m.a(x), chunks=2, dim=-1)), "gate_up"),
        (lambda m, x: (lambda h: m.c(h[..., :WIDTH] * h[..., :WIDTH].sigmoid() * h[..., WIDTH:]))(m.a(x)), "gate_up"),
    ],
)
def test_fused_projections_are_told_by_how_they_are_split(compute: Callable[..., Tensor], split: str | None) -> None:
    if split is None:
        with pytest.raises(ArchitectureError):
            layout_of(compute, fused=True)
        return
    layout = layout_of(compute, fused=True)
    assert (layout.fused, layout.split) == ("a", split)


def test_an_activation_written_out_is_kept_as_an_expression_and_repeated_bit_for_bit() -> None:
    model = Toy(lambda: Gated(lambda m, x: (lambda g: m.c((m.b(x) + 1) * (g * torch.sigmoid(1.7 * g))))(m.a(x))))
    mlp = find_towers(model)["language"].mlps[0]
    assert str(mlp.layout.function) == "pre * sigmoid(1.7 * pre)" or "sigmoid" in str(mlp.layout.function)
    seen = capture(model, mlp)
    module = model.get_submodule(mlp.path)
    assert torch.equal(mlp.layout.gate_of(module, seen["pre"]), seen["gate"])
    assert torch.equal(mlp.layout.post_of(module, seen["gate"], seen["up"]), seen["post"])


def test_a_clamped_up_branch_is_not_taken_for_the_gate() -> None:
    for compute in (
        lambda m, x: m.c(F.silu(m.a(x).clamp(max=7)) * m.b(x).clamp(-7, 7)),
        lambda m, x: m.c(F.silu(m.a(x)) * 7 * torch.tanh(m.b(x) / 7)),
        lambda m, x: m.c(F.silu(m.a(x)) * m.act(m.b(x))),
    ):
        layout = layout_of(compute, activation=nn.Tanh())
        assert (layout.gate, layout.up) == ("a", "b")


def test_an_ungated_mlp_has_three_sites_and_no_up() -> None:
    class Plain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(HIDDEN, WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(WIDTH, HIDDEN))

    tower = find_towers(Toy(Plain))["language"]
    assert tower.mlps[0].layout.kinds == ("pre", "gate", "post")
    assert tower.mlps[0].layout.product is None
    assert tower.mlps[0].layout.activation == "1"
    with pytest.raises(SiteError, match="has no 'up'; it has pre, gate, post"):
        tower.mlps[0].site("up")


def test_linear_layers_in_the_block_itself_are_its_mlp() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()
            self.fc1, self.fc2, self.activation_fn = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.self_attn(x)
            return x + self.fc2(F.dropout(self.activation_fn(self.fc1(x)), 0.1, self.training))

    model = Toy(nn.Identity)
    model.language_model.layers = nn.ModuleList([Inline(), Inline()])
    tower = find_towers(model)["language"]
    assert [mlp.path for mlp in tower.mlps] == ["language_model.layers.0", "language_model.layers.1"]
    assert {mlp.name for mlp in tower.mlps} == {"mlp"}


@pytest.mark.parametrize(
    "weights",
    [
        lambda table, x: torch.arange(1, x.shape[1] + 1)[:, None],
        lambda table, x: torch.arange(1, 6, device=x.device, dtype=x.dtype)[:, None],
        lambda table, x: torch.ones(x.shape[1], 1),
        lambda table, x: torch.ones((x.size(1), 1), device=x.device),
        lambda table, x: torch.zeros(x.shape[:-1]).unsqueeze(-1) + 1,
        lambda table, x: torch.full((1, x.shape[-1]), 0.5, dtype=x.dtype),
        lambda table, x: torch.eye(x.shape[1], 1) + 1,
        lambda table, x: torch.linspace(1, 2, x.shape[1])[:, None],
        lambda table, x: torch.tensor([2.0], device=x.device, dtype=x.dtype),
        lambda table, x: torch.tensor(x.shape[1]),
        lambda table, x: torch.roll(table, x.shape[0])[:, None],
        lambda table, x: F.pad(table[1:], (0, x.shape[1] - 4), value=3.0)[:, None],
        lambda table, x: table.to(dtype=x.dtype)[:, None],
        lambda table, x: table.view(x.shape[1], 1),
        lambda table, x: table.reshape(x.shape[1], 1),
        lambda table, x: torch.triu(torch.ones(5, 5), x.shape[0] - 2).sum(0)[:, None],
        lambda table, x: torch.split(table, x.shape[1])[0][:, None],
        lambda table, x: table.repeat(x.shape[0], 1)[..., None],
        lambda table, x: table[:, None].expand(x.shape[1], x.shape[2]),
    ],
)
def test_a_block_that_makes_tensors_as_long_as_its_input_is_followed(weights: Callable[..., Tensor]) -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.act = nn.Linear(HIDDEN, HIDDEN), nn.GELU()
            self.fc1, self.fc2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
            self.table = torch.linspace(1, 2, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(x).cumsum(1) / weights(self.table, x)
            return x + self.fc2(self.act(self.fc1(x)))

    model = Toy(nn.Identity)
    model.language_model.layers = nn.ModuleList([Averaging(), Averaging()])
    tower = find_towers(model)["language"]
    assert [mlp.path for mlp in tower.mlps] == ["language_model.layers.0", "language_model.layers.1"]
    assert {(mlp.layout.gate, mlp.layout.activation, mlp.layout.down) for mlp in tower.mlps} == {("fc1", "act", "fc2")}
    seen = capture(model, tower.mlps[1])
    assert torch.equal(F.gelu(seen["pre"]), seen["post"])


def test_layers_without_an_mlp_keep_their_numbers() -> None:
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))), layers=3)
    model.language_model.layers[1] = nn.Sequential(Attention())
    model.language_model.layers[1].__class__ = type("MambaBlock", (nn.Sequential,), {})
    tower = find_towers(model)["language"]
    assert len(tower) == 3
    assert [mlp.layer for mlp in tower.mlps] == [0, 2]


def test_widths_may_differ_by_layer() -> None:
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    wide = model.language_model.layers[1].mlp
    wide.a, wide.b, wide.c = nn.Linear(HIDDEN, 40), nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)
    assert find_towers(model)["language"].widths == (24, 40)


def test_layouts_of_like_mlps_are_equal_and_hashable() -> None:
    towers = find_towers(tiny_model("llava_next_mistral")[0])
    assert len({mlp.layout for mlp in towers["language"].mlps}) == 1
    assert len({mlp.layout for mlp in towers["vision"].mlps}) == 1


def test_finding_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model, _ = tiny_model("qwen2_5_vl")
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    find_towers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for name, module in model.named_modules() if "mlp" in name
    )


@pytest.mark.parametrize("name", ["text/switch_transformers", "text/jamba", "text/gpt_oss", "qwen3_vl_moe", "gemma4"])
def test_finding_leaves_every_attribute_of_a_model_as_it_was(name: str) -> None:
    """Switch's router, for one, keeps the dtype of what its forward was given."""
    model = SMALL[name]().model
    before = state_of(model)
    towers = find_towers(model)
    assert changes(before, state_of(model)) == []
    copy.deepcopy(model)  # a symbol that was left behind could not be copied
    assert find_towers(model) == towers


def test_what_a_forward_changes_in_place_is_put_back() -> None:
    class Keeping(Gated):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)))
            self.seen, self.last, self.names = [], None, {"a": 1}

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            self.last = self.names["b"] = x
            return super().forward(x)

    model = Toy(Keeping)
    before = state_of(model)
    assert find_towers(model)["language"].widths
    assert changes(before, state_of(model)) == []


def test_finding_leaves_torch_as_it_was_whether_it_succeeds_fails_or_runs_in_several_threads() -> None:
    def names_of_torch() -> dict[tuple[Any, str], Any]:
        return {
            (owner, name): value
            for owner in (torch, F, torch.Tensor, nn.Module)
            for name, value in vars(owner).items()
            if callable(value)
        }

    def failing(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(F.silu(m.a(x)) * m.b(x)) + int(torch.ones(x.shape[1]).sum())

    def find(_: int) -> tuple[int, ...]:
        return find_towers(Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)))))["language"].widths

    before = names_of_torch()
    with pytest.raises(ArchitectureError):
        layout_of(failing)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(find, range(16))) == {(WIDTH, WIDTH)}
    assert names_of_torch() == before


# --- what is refused ---


def test_a_forward_that_cannot_be_followed_is_refused_with_what_was_seen_and_what_to_do() -> None:
    def sorted_first(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(m.a(x).sort(-1).values * F.silu(m.b(x)))

    with pytest.raises(ArchitectureError) as refused:
        layout_of(sorted_first)
    text = str(refused.value)
    assert "language_model.layers" in text
    assert "register_architecture('Toy', Architecture(" in text
    (advice,) = (line for line in text.splitlines() if line.strip().startswith("from vlmneurons"))
    exec(advice.strip(), names := {})
    assert names["register_architecture"] is register_architecture
    assert "Gated" in text or "mlp" in text


TWO_GATES = lambda m, x: m.c(F.silu(m.a(x)) * F.gelu(m.b(x)))  # noqa: E731


def test_two_activated_branches_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="fit together like an MLP"):
        layout_of(TWO_GATES)


def test_two_activated_branches_beside_an_mlp_that_is_found_are_refused_and_not_left_out() -> None:
    model = Toy(lambda: nn.Sequential(SHAPES["plain function"](), Gated(TWO_GATES)))
    with pytest.raises(ArchitectureError, match=r"layers.1.mlp.1: a and c fit together like an MLP's projections"):
        find_towers(model)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)) + m.c(m.b(x)),  # which of its inputs is post?
        lambda m, x: m.c(F.silu(m.a(x) - m.a(-x)) * m.b(x)),
        lambda m, x: m.c(F.silu(m.a(x)) * m.b(x) * (1 + m.b(-x))),
        lambda m, x: m.c(F.gelu(m.a(x) - m.a(-x))),
        lambda m, x: m.c(F.gelu(m.a(x) + m.b(x))),
        lambda m, x: (lambda g: (g.mul_(2), m.c(g * m.b(x)))[1])(F.silu(m.a(x))),  # no gate is silu(pre) here
    ],
)
def test_an_mlp_whose_sites_no_hook_could_tell_is_refused(compute: Callable[..., Tensor]) -> None:
    with pytest.raises(ArchitectureError, match="fit together like an MLP's projections"):
        layout_of(compute)


@pytest.mark.parametrize("other", [F.gelu, lambda gate: F.silu(gate) * 2, lambda gate: gate])
def test_an_mlp_that_computes_otherwise_for_some_inputs_is_refused(other: Callable[..., Tensor]) -> None:
    def compute(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(other(m.a(x)) * m.b(x)) if x.shape[1] > 99 else m.c(F.silu(m.a(x)) * m.b(x))

    with pytest.raises(ArchitectureError, match=r"Gated uses c in two ways\. Seen:\n.*silu.*\n  (MLPLayout|no MLP)"):
        layout_of(compute)
    both = layout_of(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)) * (1 if x.shape[1] > 1 else 2))
    assert (both.gate, both.up, both.down) == ("a", "b", "c")


def test_a_normalisation_before_the_last_projection_is_told_of() -> None:
    layout = layout_of(lambda m, x: m.c(m.act(F.silu(m.a(x)) * m.b(x))), activation=nn.LayerNorm(WIDTH))
    assert (layout.gate, layout.up, layout.normed) == ("a", "b", True)


def kept(x: Tensor, values: Callable[[Tensor], Any]) -> Tensor:
    """A tensor as long as the input, into which something was written."""
    out = torch.zeros((*x.shape[:-1], WIDTH), dtype=x.dtype)
    values(out)
    return out


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.c(kept(x, lambda out: out.copy_(F.gelu(m.a(x))))),
        lambda m, x: m.c(kept(x, lambda out: out.__setitem__(slice(None), F.gelu(m.a(x))))),
        lambda m, x: m.c(kept(x, lambda out: out[:, 1:].copy_(F.gelu(m.a(x))[:, 1:]))),
        lambda m, x: m.c(kept(x, lambda out: out.view(-1, WIDTH).index_add_(0, torch.arange(2), F.gelu(m.a(x))[0]))),
        lambda m, x: m.c(kept(x, lambda out: torch.mul(F.gelu(m.a(x)), 2, out=out))),
        lambda m, x: (lambda h: (h.relu_(), m.c(h))[1])(m.a(x)),
        lambda m, x: (lambda h: (F.relu(h, True), m.c(h))[1])(m.a(x)),
        lambda m, x: (lambda h: (m.act(h), m.c(h))[1])(m.a(x)),
    ],
)
def test_neurons_that_are_written_into_a_tensor_are_refused_and_not_left_out(compute: Callable[..., Tensor]) -> None:
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))), layers=3)
    model.language_model.layers[1].mlp = Gated(compute, activation=nn.ReLU(inplace=True))
    with pytest.raises(
        ArchitectureError, match=r"layers\.1.*: mlp\.a and mlp\.c fit together like an MLP's projections"
    ):
        find_towers(model)


def test_an_activation_in_place_whose_result_alone_is_used_is_an_activation() -> None:
    for compute in (lambda m, x: m.c(F.relu(m.a(x), inplace=True) * m.b(x)), lambda m, x: m.c(m.act(m.a(x)) * m.b(x))):
        layout = layout_of(compute, activation=nn.ReLU(inplace=True))
        assert (layout.gate, layout.up, layout.down) == ("a", "b", "c")


def test_two_lists_that_could_each_be_the_language_model_are_refused() -> None:
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    other = Text([Block(Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))])
    both = nn.Module()
    both.left, both.right = model.language_model, other
    with pytest.raises(ArchitectureError, match="could each be the language model"):
        find_towers(both)


def test_one_mlp_that_serves_two_layers_is_refused() -> None:
    model = Toy(SHAPES["plain function"])
    model.language_model.layers = nn.ModuleList([model.language_model.layers[0]] * 2)
    with pytest.raises(ArchitectureError, match=r"layers.0.mlp and language_model.layers.1.mlp are one module"):
        find_towers(model)


def test_a_projection_that_serves_two_layers_is_refused() -> None:
    for name in ("a", "c"):
        model = Toy(SHAPES["plain function"])
        first, second = (layer.mlp for layer in model.language_model.layers)
        setattr(second, name, getattr(first, name))
        with pytest.raises(ArchitectureError, match=rf"layers.0.mlp and .*layers.1.mlp share '{name}', one module"):
            find_towers(model)


def test_weights_that_are_tied_between_layers_leave_the_layers_apart() -> None:
    model = Toy(SHAPES["plain function"], layers=3)
    first, *others = (layer.mlp for layer in model.language_model.layers)
    for mlp in others:
        mlp.a.weight, mlp.c.weight = first.a.weight, first.c.weight
    check_zeroing(model, find_towers(model)["language"])


def test_layers_that_run_twice_in_a_forward_are_read_and_edited_in_each_pass() -> None:
    class Looped(Text):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed_tokens(input_ids)
            for layer in [*self.layers, *self.layers]:
                x = layer(x)
            return x

    model = Toy(SHAPES["plain function"])
    model.language_model.__class__ = Looped
    tower = find_towers(model)["language"]
    check_zeroing(model, tower)
    seen: list[Tensor] = []
    with read(model, tower.mlps[0], "gate", seen.append):
        model(IDS)
    assert len(seen) == 2


def test_a_forward_that_was_replaced_on_one_object_is_refused() -> None:
    model = Toy(SHAPES["plain function"])
    mlp = model.language_model.layers[1].mlp
    clean = model(IDS)
    mlp.forward = lambda x: mlp.c(torch.tanh(mlp.a(x)) * mlp.b(x))
    assert not torch.equal(model(IDS), clean)
    with pytest.raises(ArchitectureError, match=r"the forward of .*layers.1.mlp was replaced on this one object"):
        find_towers(model)
    mlp.forward = torch.compile(functools.partial(type(mlp).forward, mlp))  # its code would see no hook within
    with pytest.raises(ArchitectureError, match=r"the forward of .*layers.1.mlp was replaced on this one object"):
        find_towers(model)

    @functools.wraps(mlp.__class__.forward)
    def logged(x: Tensor) -> Tensor:  # what only stands around the class's own is none of our business
        return type(mlp).forward(mlp, x)

    mlp.forward = logged
    check_zeroing(model, find_towers(model)["language"])


def test_a_model_without_mlps_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no MLP was found"):
        find_towers(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


@pytest.mark.usefixtures("unchecked")
def test_a_layout_is_made_of_names_and_a_function() -> None:
    with pytest.raises(ArchitectureError, match=r"function= computes gate from pre, such as F\.silu; got 'silu'"):
        MLPLayout(gate="w1", down="w2", function="silu")
    with pytest.raises(ArchitectureError, match="product= computes post from gate and up; got 'mul'"):
        MLPLayout(gate="w1", down="w2", function=F.silu, product="mul")
    for wrong in ({"gate": nn.Linear(2, 2)}, {"gate": ""}, {"up": 3}, {"down": None}, {"activation": F.silu}):
        with pytest.raises(ArchitectureError, match=f"{next(iter(wrong))}= is the name of a module within the MLP"):
            MLPLayout(**{"gate": "w1", "down": "w2", "function": F.silu, **wrong})


def test_a_registered_architecture_is_followed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() == 0.123:  # what cannot be followed
                return x
            return self.w2(F.silu(self.w1(x)) * self.w3(x).flip(-1).flip(-1))

    model = Toy(Odd, name="ff")
    with pytest.raises(ArchitectureError):
        find_towers(model)
    known = len(finding._REGISTERED)
    try:
        layout = MLPLayout(gate="w1", up="w3", down="w2", function=F.silu)
        register_architecture("Toy", Architecture(towers={"language": "language_model.layers"}, mlps={"ff": layout}))
        tower = find_towers(model)["language"]
        assert [str(mlp.site("gate")) for mlp in tower.mlps] == [
            "language.layers.0.mlp.gate",
            "language.layers.1.mlp.gate",
        ]
        check_zeroing(model, tower)
        register_architecture("Toy", Architecture(mlps={"ff": MLPLayout(gate="nope", down="w2", function=F.silu)}))
        with pytest.raises(ArchitectureError, match=r"names 'nope' in language_model.*ff, which has w1, w3, w2"):
            find_towers(model)
        register_architecture("Toy", Architecture(towers={"language": "somewhere"}))
        with pytest.raises(ArchitectureError, match="at 'somewhere', which does not exist"):
            find_towers(model)
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_one_tower_can_be_registered_and_the_other_found_where_both_call_their_mlps_the_same() -> None:
    small, _ = tiny_model("llava_next_mistral")
    language, vision = "model.language_model.layers", "model.vision_tower.encoder.layers"
    found = find_towers(small)
    towers = {"language": language, "vision": vision}
    known = len(finding._REGISTERED)
    try:
        layout = MLPLayout(gate="gate_proj", up="up_proj", down="down_proj", function=F.silu)
        register_architecture(type(small).__name__, Architecture(towers, mlps={"language": {"mlp": layout}}))
        again = find_towers(small)
        assert [mlp.layout for mlp in again["language"].mlps] == [layout] * len(found["language"].mlps)
        assert again["vision"] == found["vision"]
        assert [mlp.path for mlp in again["language"].mlps] == [mlp.path for mlp in found["language"].mlps]
        with pytest.raises(ArchitectureError, match="either a layout for each path, or such a mapping for each tower"):
            Architecture(towers, mlps={"language": {"mlp": layout}, "mlp": layout})
        with pytest.raises(
            ArchitectureError, match=r"mlps= is of 'ears', and towers= gives no path .* has 'language', 'vis"
        ):
            Architecture(towers, mlps={"ears": {"mlp": layout}})
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_a_layout_that_says_too_little_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="give gate=, or fused="):
        MLPLayout(down="down")
    with pytest.raises(ArchitectureError, match="needs activation="):
        MLPLayout(down="down", gate="gate")
    with pytest.raises(ArchitectureError, match="goes with split="):
        MLPLayout(down="down", fused="both", function=F.silu)


# --- reading and writing ---


def capture(model: nn.Module, mlp: MLP, **inputs: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        read(model, mlp, kind, lambda v, *_, k=kind: seen.__setitem__(k, v.clone())) for kind in mlp.layout.kinds
    ]
    with torch.no_grad():
        model(**inputs) if inputs else model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def zero(neuron: int) -> Callable[..., Tensor]:
    def edit(values: Tensor, *_: Any) -> Tensor:
        values = values.clone()
        values[..., neuron] = 0
        return values

    return edit


def check_zeroing(model: nn.Module, tower: Tower) -> None:
    clean = model(IDS)
    for mlp in tower.mlps:
        outcomes = []
        for kind in ("gate", "post"):
            with write(model, mlp, kind, lambda values, *_: None):
                assert torch.equal(model(IDS), clean)
            with write(model, mlp, kind, zero(3)):
                outcomes.append(model(IDS))
        assert torch.equal(*outcomes)
        assert not torch.equal(outcomes[0], clean)
    assert torch.equal(model(IDS), clean)


SHAPES = {
    "plain function": lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))),
    "activation module": lambda: Gated(lambda m, x: m.c(m.act(m.a(x)) * m.b(x)), activation=nn.SiLU()),
    "fused": lambda: Gated(lambda m, x: (lambda u, g: m.c(F.gelu(g) * u))(*m.a(x).chunk(2, dim=-1)), fused=True),
    "interleaved": lambda: Gated(
        lambda m, x: (lambda h: m.c(F.silu(h[..., ::2]) * (h[..., 1::2] + 1)))(m.a(x)), fused=True
    ),
    "keyword": lambda: Gated(lambda m, x: m.c(input=F.silu(m.a(input=x)) * m.b(x))),
    "called twice": lambda: Gated(lambda m, x: m.c(m.act(m.a(x)) * m.b(m.act(x))), activation=nn.SiLU()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_zeroing_at_gate_and_at_post_is_one_thing(shape: str) -> None:
    model = Toy(SHAPES[shape])
    check_zeroing(model, find_towers(model)["language"])


@pytest.mark.parametrize("shape", SHAPES)
def test_writes_at_every_kind_reach_all_that_comes_later(shape: str) -> None:
    model = Toy(SHAPES[shape])
    mlp = find_towers(model)["language"].mlps[0]
    module, before = model.get_submodule(mlp.path), capture(model, mlp)
    for kind in mlp.layout.kinds:
        with write(model, mlp, kind, lambda values: values * 1.5):
            after = capture(model, mlp)
            expected = {**before, kind: before[kind] * 1.5}
            if kind == "pre":
                expected["gate"] = mlp.layout.gate_of(module, expected["pre"])
            if kind != "post":
                expected["post"] = mlp.layout.post_of(module, expected["gate"], expected.get("up"))
            # to rounding: a copy lies in memory otherwise than the model's own slices, which some functions care about
            torch.testing.assert_close(after["post"], expected["post"])


def test_an_activation_module_shared_by_all_layers_is_edited_in_one_only() -> None:
    shared = nn.SiLU()
    model = Toy(lambda: Gated(lambda m, x: m.c(m.act(m.a(x)) * m.b(x)), activation=shared))
    tower = find_towers(model)["language"]
    assert {mlp.layout.activation for mlp in tower.mlps} == {None}
    check_zeroing(model, tower)
    seen: list[Tensor] = []
    with read(model, tower.mlps[0], "gate", seen.append):
        model(IDS)
    assert len(seen) == 1


def test_edits_of_a_computed_gate_follow_each_other_and_come_off_in_any_order() -> None:
    model = Toy(SHAPES["plain function"])
    mlp = find_towers(model)["language"].mlps[0]
    clean = model(IDS)
    one, two = write(model, mlp, "gate", zero(1)), write(model, mlp, "gate", zero(2))
    both = model(IDS)
    with write(model, mlp, "post", zero(1)), write(model, mlp, "post", zero(2)):
        one.remove()
        two.remove()
        assert torch.equal(model(IDS), both)
    one.remove()
    assert torch.equal(model(IDS), clean)
    first, second = write(model, mlp, "gate", lambda v: v + 1), write(model, mlp, "gate", lambda v: v * 2)
    module, seen = model.get_submodule(mlp.path), capture(model, mlp)
    first.remove()
    second.remove()
    plain = capture(model, mlp)
    assert torch.equal(seen["post"], mlp.layout.post_of(module, (plain["gate"] + 1) * 2, plain["up"]))


def test_a_gate_that_is_computed_anew_keeps_what_others_did_to_its_inputs() -> None:
    model = Toy(SHAPES["plain function"])
    mlp = find_towers(model)["language"].mlps[0]
    module = model.get_submodule(mlp.path)
    plain = capture(model, mlp)
    with write(model, mlp, "gate", zero(3)):
        foreign = [  # hooks that come later than ours, and are not ours
            module.a.register_forward_hook(lambda _, args, output: output * 2),
            module.c.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
        ]
        outcome: list[Tensor] = []
        foreign.append(module.c.register_forward_pre_hook(lambda _, args: outcome.append(args[0])))
        model(IDS)
        for hook in foreign:
            hook.remove()
    gate = zero(3)(mlp.layout.gate_of(module, plain["pre"] * 2))
    assert torch.equal(outcome[0], gate * plain["up"] + 1)


def test_an_exception_in_an_edit_leaves_nothing_behind() -> None:
    for shape in SHAPES:
        model = Toy(SHAPES[shape])
        mlp = find_towers(model)["language"].mlps[0]
        clean = model(IDS)

        def fail(values: Tensor) -> Tensor:
            raise KeyError("stop")

        with pytest.raises(KeyError), write(model, mlp, "gate", zero(1)), write(model, mlp, "gate", fail):
            model(IDS)
        assert torch.equal(model(IDS), clean)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_removed_model_can_be_collected() -> None:
    import weakref

    model = Toy(SHAPES["plain function"])
    mlp = find_towers(model)["language"].mlps[0]
    write(model, mlp, "gate", zero(1)).remove()
    gone = weakref.ref(model.get_submodule(mlp.path))
    del model
    gc.collect()
    assert gone() is None


# --- quantised, adapted, sharded, compiled ---


class Int8Linear(nn.Module):
    """As quantised layers are: no `nn.Linear`, weights of another kind."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * self.scale)


class Wrapped(nn.Module):
    """As offloading and logging wrappers are: one linear layer inside, and nothing said about it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(x.contiguous())


class Aside(Wrapped):
    """It keeps what its linear layer gives, as a router may keep its logits, and hands on what it got itself."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.kept = self.inner(x)
        return 2 * x


def test_a_module_that_does_not_give_what_its_linear_layer_gives_is_no_linear_layer() -> None:
    modules = Modules()
    assert modules.size(Wrapped(nn.Linear(HIDDEN, WIDTH))) == (HIDDEN, WIDTH)
    assert modules.size(Aside(nn.Linear(HIDDEN, WIDTH))) is None


@pytest.mark.parametrize("wrap", [Int8Linear, Wrapped])
@pytest.mark.parametrize("name", ["llava_next_mistral", "qwen2_5_vl"])
def test_replaced_linear_layers_are_told_by_what_they_declare_or_wrap(wrap: type, name: str) -> None:
    model, _ = tiny_model(name)
    with torch.no_grad():
        for module in list(model.modules()):
            for child_name, child in list(module.named_children()):
                if type(child) is nn.Linear and ("proj" in child_name or "fc" in child_name):
                    setattr(module, child_name, wrap(child))
    report = check_architecture(model, inputs=tiny_inputs(name))
    assert [(tower.layers, tower.widths) for tower in report.towers[:2]] == [(4, (64,)), (3, (48,))]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_on_the_mlps_is_part_of_what_is_read() -> None:
    import peft

    base, _ = tiny_model("qwen2_5_vl")
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj", "q_proj"], init_lora_weights=False, r=4)
    model, inputs = peft.get_peft_model(base, config).eval(), tiny_inputs("qwen2_5_vl")
    report = check_architecture(model, inputs=inputs)
    assert [(tower.layers, tower.widths) for tower in report.towers[:2]] == [(4, (64,)), (3, (48,))]
    adapted = capture(model, find_towers(model)["language"].mlps[1], **inputs)
    with model.disable_adapter():
        bare = capture(model, find_towers(model)["language"].mlps[1], **inputs)
    merged = model.merge_and_unload()
    once = capture(merged, find_towers(merged)["language"].mlps[1], **inputs)
    for kind in ("pre", "gate", "up", "post"):
        torch.testing.assert_close(adapted[kind], once[kind], rtol=1e-4, atol=1e-4)
        assert (adapted[kind] - bare[kind]).abs().max() > 0.1


ADAPTED = [["down_proj"], ["gate_proj", "up_proj"], ["gate_proj", "up_proj", "down_proj", "fc1", "fc2"]]


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("targets", ADAPTED, ids=["down", "gate and up", "all"])
def test_a_neuron_that_is_off_is_off_in_its_adapter_too_and_is_counted_with_it(name: str, targets: list[str]) -> None:
    import peft

    base, processor = tiny_model(name)
    hf = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=4)).eval()
    model, inputs = vn.VLM(hf, processor, template=tiny_template(name)), tiny_inputs(name)
    counts: list[Tensor] = []
    for tower in ("language", "vision"):
        space = model.space(tower, "post")
        off, twin = vn.NeuronSet(space, range(0, len(space), 3)), copy.deepcopy(model.hf)
        for place, mlp in enumerate(model.towers[tower].mlps):
            down = twin.get_submodule(mlp.path).get_submodule(mlp.layout.down)
            here = [int(n) - space.offsets[place] for n in off.indices if 0 <= n - space.offsets[place] < mlp.width]
            wide = [part for part in down.modules() if isinstance(part, nn.Linear) and part.in_features == mlp.width]
            assert len(wide) == (2 if mlp.layout.down in targets else 1)
            for part in wide:
                part.weight.data[:, here] = 0
        counts.clear()
        handles = [
            model.hf.get_submodule(mlp.path)
            .get_submodule(mlp.layout.down)
            .register_forward_pre_hook(lambda _, args: counts.append((args[0] > 0).flatten(0, -2).sum(0)))
            for mlp in model.towers[tower].mlps
        ]
        with torch.no_grad():
            clean = model.hf(**inputs).logits
            for handle in handles:
                handle.remove()
            with vn.Recorder(model, space, tokens=lambda table: table.attention) as recorder:
                model.hf(**inputs)
            assert torch.equal(recorder.statistics.positive[0], torch.cat(counts))
            with vn.Ablation(model, off):
                switched = model.hf(**inputs).logits
            torch.testing.assert_close(switched, twin(**inputs).logits, rtol=0, atol=1e-5)
        assert (switched - clean).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_that_hides_experts_is_refused_and_it_is_said_to_merge_it() -> None:
    import peft

    config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = peft.get_peft_model(
        transformers.MixtralForCausalLM(
            transformers.MixtralConfig(vocab_size=99, num_local_experts=3, num_key_value_heads=2, **sizes)
        ),
        config,
    )
    with pytest.raises(ArchitectureError, match=r"where one hides what it is on, model\.merge_and_unload\(\) puts it"):
        find_towers(model)
    assert len(find_towers(model.merge_and_unload())["language"].mlps) == 6


def test_offloaded_weights_stay_readable_and_writable() -> None:
    from accelerate import cpu_offload

    inputs = tiny_inputs("qwen3_vl_moe")
    plain, _ = tiny_model("qwen3_vl_moe")
    with torch.no_grad():
        clean = plain(**inputs).logits
    model, _ = tiny_model("qwen3_vl_moe")
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, clean)
    for name, tower in find_towers(plain).items():
        assert tower == find_towers(model)[name]
        mlp = tower.mlps[0]
        for kind in ("gate", "post"):
            with torch.no_grad(), write(model, mlp, kind, zero(3)), write(plain, mlp, kind, zero(3)):
                assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_vlm_of_an_offloaded_model_counts_what_the_model_counts_in_memory(wrapped_first: bool) -> None:
    from accelerate import cpu_offload

    import vlmneurons as vn
    from helpers import some_questions

    model, processor = tiny_model("llava_next_mistral")
    plain = vn.record(vn.VLM(model, processor), some_questions(2), condition="all", progress=False)
    model, processor = tiny_model("llava_next_mistral")
    vlm = vn.VLM(model, processor) if wrapped_first else None
    cpu_offload(model, execution_device=torch.device("cpu"))
    vlm = vn.VLM(model, processor) if vlm is None else vlm
    assert vlm.device == torch.device("cpu")
    statistics = vn.record(vlm, some_questions(2), condition="all", progress=False)
    assert torch.equal(statistics.positive, plain.positive)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())


def test_compiled_models_are_refused_and_not_silently_left_alone() -> None:
    model, _ = tiny_model("llava_next_qwen2")
    mlp = find_towers(model)["language"].mlps[0]
    with pytest.raises(ArchitectureError, match=r"torch\.compile"):
        find_towers(torch.compile(model))
    model.compile()
    with pytest.raises(ArchitectureError, match=r"compiled \(model\.compile\(\)\)"):
        find_towers(model)
    with pytest.raises(ArchitectureError, match="compiled"):
        write(model, mlp, "post", zero(0))
    with pytest.raises(ArchitectureError, match="compiled"):
        read(model, mlp, "post", lambda values: None)


def test_half_precision_and_text_only_input_keep_the_contract() -> None:
    model, _ = tiny_model("llava_next_mistral")
    report = check_architecture(model.to(torch.bfloat16))
    assert any("text only" in note for note in report.notes)
    assert any(note.startswith("vision: nothing ran") for note in report.notes)


def test_values_are_handed_out_under_gradient_checkpointing_too() -> None:
    model, _ = tiny_model("llava_next_mistral")
    # transformers renamed it, and warns of the old name
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    inputs, seen = tiny_inputs("llava_next_mistral"), []
    mlp = find_towers(model)["language"].mlps[1]
    with read(model, mlp, "gate", lambda values: seen.append(values.shape)):
        model(**inputs).logits.sum().backward()
    assert set(seen) == {(1, inputs["input_ids"].shape[1], 64)}


# --- mixtures of experts ---


def moe(implementation: str | None, text: str = "mixtral", **changes: Any) -> PreTrainedModel:
    from vlmneurons.testing import tiny as _tiny

    config = AutoConfig.for_model(
        "llava",
        text_config={
            **_tiny._TEXT,
            "model_type": text,
            "num_local_experts": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            **changes,
        },
        vision_config={**_tiny._EYE, "model_type": "clip_vision_model"},
        image_token_index=10,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    _tiny._draw_weights(model)
    if implementation is not None:
        model.get_decoder().set_experts_implementation(implementation)
    return model


TOKENS = {"input_ids": torch.arange(20, 44).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("text", ["mixtral", "gpt_oss", "lfm2_moe"])
def test_experts_are_read_and_written_in_every_way_in_which_they_run(implementation: str, text: str) -> None:
    changes = {
        "gpt_oss": {"layer_types": ["full_attention"] * 2},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "moe_intermediate_size": 24},
    }
    model = moe(implementation, text, **changes.get(text, {}))
    report = check_architecture(model, inputs=TOKENS)
    assert report.towers[0].tried == report.towers[0].moved


def test_experts_in_one_kernel_are_refused_when_they_run() -> None:
    model = moe("batched_mm")
    mlp = find_towers(model)["language"].mlps[0]
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.config._experts_implementation_internal = "sonicmoe"
    with (
        read(model, mlp, "gate", lambda *_: None),
        pytest.raises(ArchitectureError, match="set_experts_implementation"),
    ):
        model(**TOKENS)
    model.get_decoder().set_experts_implementation("batched_mm")
    model(**TOKENS)


def test_an_expert_sees_only_the_tokens_that_were_routed_to_it() -> None:
    model = moe("grouped_mm")
    tower = find_towers(model)["language"]
    assert [mlp.name for mlp in tower.mlps[:4]] == [f"mlp.experts.{expert}" for expert in range(4)]
    counts, rows, chosen = {}, [], []
    handles = [
        read(model, mlp, "post", lambda values, tokens, mlp=mlp: counts.__setitem__(mlp.expert, tokens.tolist()))
        for mlp in tower.mlps[:4]
    ]
    first = tower.mlps[0]
    handles.append(read_experts(model, first.path, first.layout, "gate", lambda v, e, t: rows.append((v.shape, e, t))))
    hook = model.get_submodule(first.path).register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    with torch.no_grad():
        model(**TOKENS)
    for handle in [*handles, hook]:
        handle.remove()
    (routes,) = chosen
    for expert in range(4):
        assert sorted(counts.get(expert, [])) == (routes == expert).any(-1).nonzero().flatten().tolist()
    ((shape, experts, tokens),) = rows
    assert shape == (2 * 24, 64)
    assert experts.bincount(minlength=4).tolist() == [(routes == expert).sum().item() for expert in range(4)]
    assert tokens.bincount().tolist() == [2] * 24


def test_all_experts_can_be_edited_at_once() -> None:
    model = moe("grouped_mm")
    mlp = find_towers(model)["language"].mlps[2]
    with torch.no_grad():
        with write(model, mlp, "post", zero(7)):
            one = model(**TOKENS).logits

        def edit(values: Tensor, experts: Tensor, tokens: Tensor) -> Tensor:
            values = values.clone()
            values[experts == 2, 7] = 0
            return values

        with write_experts(model, mlp.path, mlp.layout, "gate", edit):
            assert torch.equal(model(**TOKENS).logits, one)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_edits_before_the_activation_of_experts_reach_what_comes_later(implementation: str) -> None:
    model = moe(implementation)
    mlp = find_towers(model)["language"].mlps[0]
    outcomes = []
    for kind, factor in (("post", 1.5), ("up", 1.5), ("post", 0.0), ("pre", 0.0)):  # post = silu(pre) * up
        with torch.no_grad(), write(model, mlp, kind, lambda values, tokens, factor=factor: values * factor):
            outcomes.append(model(**TOKENS).logits)
    torch.testing.assert_close(outcomes[1], outcomes[0])
    torch.testing.assert_close(outcomes[3], outcomes[2])
    assert not torch.allclose(outcomes[0], outcomes[2])


def test_experts_that_are_spread_over_processes_are_refused_when_they_run() -> None:
    model = moe("grouped_mm")
    mlp = find_towers(model)["language"].mlps[0]
    model.get_submodule(mlp.path)._is_expert_parallel = True
    spread = pytest.raises(ArchitectureError, match="experts that are spread over several processes cannot be read")
    with read(model, mlp, "gate", lambda *_: None), spread:
        model(**TOKENS)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x).argmax(-1)


class ListOfExperts(nn.Module):
    """Experts as modules of their own, as models on the Hub have them, and one that sees every token."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor], table: bool = False) -> None:
        super().__init__()
        self.router, self.pick = Router(), pick
        experts = [Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))) for _ in range(4)]
        self.shared_experts = nn.ModuleList(experts[3:])
        self.experts = nn.ModuleDict(dict(zip("xyz", experts))) if table else nn.ModuleList(experts[:3])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        chosen, result = self.router(flat), self.shared_experts[0](flat)
        for number, expert in enumerate(self.experts.children()):
            mask = chosen == number
            if mask.any():
                result[mask] += expert(self.pick(flat, mask))
        return result.reshape(x.shape)


PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by number": lambda flat, mask: flat[mask.nonzero().flatten()],
    "by number, of another kind": lambda flat, mask: flat[mask.nonzero().flatten().int()],
    "by mask": lambda flat, mask: flat[mask],
    "as Mixtral": lambda flat, mask: flat[None, mask.nonzero().flatten()].reshape(-1, HIDDEN),
    "selected": lambda flat, mask: flat.index_select(0, mask.nonzero().flatten()).to(torch.float32),
    "selected by a function": lambda flat, mask: torch.index_select(flat, 0, mask.nonzero().flatten()).contiguous(),
    "laid out anew": lambda flat, mask: torch.squeeze(flat[mask.nonzero()], 1).view(-1, HIDDEN),
}


def test_a_site_of_an_expert_that_cannot_be_written_leaves_nothing_on_the_router() -> None:
    model = Toy(lambda: ListOfExperts(PICKS["by number"]))
    found = next(mlp for mlp in find_towers(model)["language"].mlps if mlp.routed)
    weighed = Expression((Step("function", torch.mul, (Value("gate"), Value("other"))),))
    mlp = dataclasses.replace(found, layout=dataclasses.replace(found.layout, product=weighed))
    with pytest.raises(ArchitectureError, match="cannot be repeated; write at 'post' instead"):
        write(model, mlp, "gate", lambda values, tokens: None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def tokens_of_experts(model, experts, kind):
    """What a plain run gives, and which tokens each expert saw in it, by the expert's name."""
    tokens: dict[str, list[int]] = {}
    handles = [
        read(model, mlp, kind, lambda values, seen, mlp=mlp: tokens.__setitem__(mlp.name, seen.tolist()))
        for mlp in experts
    ]
    output = model(IDS)
    for handle in handles:
        handle.remove()
    return output, tokens


@pytest.mark.parametrize("pick", [*PICKS, "in a table"])
def test_experts_that_are_modules_tell_their_tokens_too(pick: str) -> None:
    model = Toy(lambda: ListOfExperts(PICKS.get(pick, PICKS["by number"]), table=pick == "in a table"))
    tower = find_towers(model)["language"]
    names = [f"experts.{name}" for name in ("xyz" if pick == "in a table" else "012")]
    assert {mlp.name for mlp in tower.mlps} == {f"mlp.{name}" for name in (*names, "shared_experts.0")}
    experts = [mlp for mlp in tower.mlps if "shared" not in mlp.name]
    assert all(mlp.expert is None and mlp.routed == (mlp in experts) for mlp in tower.mlps)
    clean, tokens = tokens_of_experts(model, experts[:3], "gate")
    assert sorted(token for seen in tokens.values() for token in seen) == list(range(10))
    busy = next(mlp for mlp in experts[:3] if mlp.name in tokens)
    with write(model, busy, "gate", zero(0)):
        one = model(IDS)
    with write(model, busy, "post", zero(0)):
        assert torch.equal(model(IDS), one)
    assert torch.equal(model(IDS), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class LoopOfExperts(nn.Module):
    """Experts that lie in two parameters and run one after the other: which is which must be registered."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], in_out: bool) -> None:
        super().__init__()
        self.router, self.multiply = Router(), multiply
        sizes = [(HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN)]
        self.both, self.down = (nn.Parameter(torch.randn(3, *(size if in_out else size[::-1]))) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        chosen, result = self.router(flat), torch.zeros_like(flat)
        for number in torch.arange(3):
            mask = chosen == number
            if mask.any():
                gate, up = self.multiply(flat[mask], self.both[number]).chunk(2, -1)
                result[mask] = self.multiply(F.silu(gate) * up, self.down[number])
        return result.reshape(x.shape)


MULTIPLIED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "x @ w": (lambda x, w: x @ w, True),
    "matmul": (torch.matmul, True),
    "matmul of x": (lambda x, w: x.matmul(w), True),
    "mm": (torch.mm, True),
    "mm of x": (lambda x, w: x.mm(w), True),
    "linear": (F.linear, False),
    "T": (lambda x, w: x @ w.T, False),
    "mT": (lambda x, w: x @ w.mT, False),
    "t": (lambda x, w: x @ w.t(), False),
    "torch.t": (lambda x, w: x @ torch.t(w), False),
    "transpose": (lambda x, w: x @ w.transpose(0, 1), False),
    "torch.transpose": (lambda x, w: x @ torch.transpose(w, 0, 1), False),
}


@pytest.mark.parametrize("product", MULTIPLIED)
def test_experts_in_parameters_that_are_registered_are_read_and_written(product: str) -> None:
    multiply, in_out = MULTIPLIED[product]
    model, known = Toy(lambda: LoopOfExperts(multiply, in_out)), len(finding._REGISTERED)
    layout = MLPLayout(fused="both", split="gate_up", down="down", function=F.silu, parameters=True)
    try:
        register_architecture("Toy", Architecture({"language": "language_model.layers"}, mlps={"mlp": layout}))
        mlps = find_towers(model)["language"].mlps
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]
    assert [(mlp.name, mlp.width) for mlp in mlps[:3]] == [(f"mlp.{expert}", WIDTH) for expert in range(3)]
    assert down_of(model, mlps[1]) == Down("language_model.layers.0.mlp.down", 1 if in_out else 2, 1)
    clean, tokens = tokens_of_experts(model, mlps[:3], "post")
    assert sorted(token for seen in tokens.values() for token in seen) == list(range(10))
    busy = next(mlp for mlp in mlps[:3] if mlp.name in tokens)
    outcomes = []
    for kind in ("gate", "post", "up"):
        with write(model, busy, kind, zero(3)):
            outcomes.append(model(IDS))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], clean)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_an_exception_while_experts_run_leaves_nothing_behind(implementation: str) -> None:
    model = moe(implementation)
    mlps = find_towers(model)["language"].mlps
    with torch.no_grad():
        clean = model(**TOKENS).logits

        def fail(values: Tensor, tokens: Tensor) -> None:
            raise KeyError("stop")

        with pytest.raises(KeyError), write(model, mlps[0], "gate", zero(0)), read(model, mlps[5], "gate", fail):
            model(**TOKENS)
        assert torch.equal(model(**TOKENS).logits, clean)
    assert not any("_apply_gate" in vars(module) for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_edits_of_experts_act_on_every_step_of_generate() -> None:
    model = moe("grouped_mm")
    model.generation_config.pad_token_id = 0
    mlp = find_towers(model)["language"].mlps[0]
    seen: list[int] = []
    with read(model, mlp, "post", lambda values, tokens: seen.append(len(tokens))):
        model.generate(**TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert 1 < len(seen) <= 4
    assert max(seen[1:]) <= 2  # one token of each of two rows


def test_an_mlp_as_wide_as_its_input_is_found() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    assert find_towers(Toy(Square))["language"].widths == (HIDDEN, HIDDEN)


def test_towers_are_named_by_what_they_do() -> None:
    def names(model: str) -> dict[str, str]:
        return {name: tower.path for name, tower in find_towers(tiny_model(model)[0]).items()}

    assert names("florence2") == {
        "language": "model.language_model.decoder.layers",
        "vision": "model.vision_tower.blocks",
        "encoder": "model.language_model.encoder.layers",
    }
    assert names("idefics2")["connector"] == "model.connector.perceiver_resampler.layers"
    assert names("mllama") == {"language": "model.language_model.layers", "vision": "model.vision_model"}
    vision = find_towers(tiny_model("florence2")[0])["vision"]
    assert [mlp.name for mlp in vision.mlps] == ["spatial_block.ffn", "channel_block.ffn"] * 2
    assert vision.widths == (48, 48, 96, 96)


def test_a_projection_that_weighs_something_else_is_no_mlp() -> None:
    class Weighs(Gated):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)))
            self.squeeze, self.excite = nn.Linear(HIDDEN, 4), nn.Linear(4, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.sigmoid(self.excite(F.relu(self.squeeze(x))))

    mlps = find_towers(Toy(Weighs))["language"].mlps
    assert [mlp.layout.down for mlp in mlps] == ["c", "c"]


def test_a_model_whose_post_cannot_be_repeated_passes_the_contract() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
            self.scale = nn.Parameter(torch.rand(64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.silu(self.w1(x)) * self.w3(x) * self.scale)

    model, _ = tiny_model("llava_next_mistral")
    for block in model.model.language_model.layers:
        block.mlp = Scaled()
    report = check_architecture(model, inputs=tiny_inputs("llava_next_mistral"))
    assert (report.towers[0].ran, report.towers[0].moved) == (4, 3)


def odd_toy() -> nn.Module:
    """A model whose MLPs cannot be followed."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(self.act(self.w1(x)) * (self.w3(x) + 1)) if x.sum().item() < 1e9 else x

    return Toy(Odd, name="ff")


RIGHT = {"gate": "w1", "up": "w3", "down": "w2", "function": F.silu}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mlps", "message"),
    [
        ({"language": {"mlp": MLPLayout(**RIGHT)}}, r"names an MLP at 'mlp', which no block of 'language' has"),
        ({"mlp": MLPLayout(**RIGHT)}, r"names an MLP at 'mlp', which no block of 'language' has"),
        ({"language": {"ff": {"gate": "w1"}}}, r"for each tower's name; got \{'ff': .*\} for 'language'"),
        ({"language": [MLPLayout(**RIGHT)]}, r"for each tower's name; got \[MLPLayout"),
        ({"ff": MLPLayout(**{**RIGHT, "down": "act"})}, r"'act' of the MLP at ff is a SiLU, and no projection"),
        ({"ff": MLPLayout(**{**RIGHT, "up": "w2"})}, r"do not agree on its width. Seen:\n  w2: 24, w1: 24, w2: 8"),
    ],
)
def test_an_architecture_that_does_not_fit_its_model_is_refused(mlps: Any, message: str) -> None:
    def found() -> None:
        register_architecture("Toy", Architecture(towers={"language": "language_model.layers"}, mlps=mlps))
        find_towers(odd_toy())

    known = len(finding._REGISTERED)
    try:
        with pytest.raises(ArchitectureError, match=message):
            found()
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_a_block_stands_in_one_tower_and_once() -> None:
    known = len(finding._REGISTERED)
    layers = "language_model.layers"
    model = Toy(lambda: Gated(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))))
    try:
        for towers in ({"language": [layers, layers]}, {"language": layers, "other": layers}):
            register_architecture("Toy", Architecture(towers=towers))
            with pytest.raises(ArchitectureError, match=r"has language_model\.layers\.0 in tower .*'language' already"):
                find_towers(model)
        with pytest.raises(ArchitectureError, match="for a class's name or a function; got <class"):
            register_architecture(Toy, Architecture())
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_post_may_be_given_as_a_plain_function_of_gate_and_up() -> None:
    model, known = odd_toy(), len(finding._REGISTERED)
    try:
        layout = MLPLayout(**RIGHT, product=lambda gate, up: gate * (up + 1))
        register_architecture("Toy", Architecture(towers={"language": "language_model.layers"}, mlps={"ff": layout}))
        check_zeroing(model, find_towers(model)["language"])
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]
    gate = torch.randn(3, WIDTH)
    squared = MLPLayout(gate="w1", down="w2", function=F.relu, product=lambda gate: gate**2)
    assert torch.equal(squared.post_of(nn.Identity(), gate), gate**2)
