"""Small models through `contract.py`: one of each kind here, and all in ``.ci/nightly``, which runs it as a script."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import small_configs
import vlmneurons as vn
from contract import ROUNDING, Rows, keeps_apart, run, run_all
from helpers import often
from small_models import SMALL
from vlmneurons.errors import MismatchError
from vlmneurons.model.architectures.find import find_towers
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.run.alone import check_alone
from vlmneurons.testing.architectures import mapped_types

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code, at its default settings
SAMPLE = {
    "qwen2_5_vl": {"language", "vision", "projector"},
    "text/gpt2": {"language"},
    "text/mixtral": {"language"},
    "text/switch_transformers": {"language", "encoder"},
    "small/aria": {"language", "vision", "projector"},
    "small/blip-2": {"language", "vision", "qformer"},
    "small/qwen3_5_moe": {"language", "vision", "projector"},
    "every/nemotron_h_omni": {"language", "vision", "projector", "audio", "audio_projector"},
}
"""One of each kind: gated, routed, in bare matrices, encoder and decoder, queries, a tower that hears."""


@pytest.mark.parametrize("name", SAMPLE)
def test_half_of_each_tower_off_is_zeroed_columns_and_counts_are_those_of_plain_hooks(name: str) -> None:
    if name == "small/aria" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its processor's pictures cannot be made small: it takes no defaults of its own")
    with torch.random.fork_rng(devices=[]):
        result = run(name)
    assert set(result["towers"]) >= SAMPLE[name]
    for tower in SAMPLE[name]:
        of = result["towers"][tower]
        assert of["ran"] == of["mlps"] or tower == "language"  # no token may have been sent to an expert
        assert of["tried"] >= of["moved"] > 0
        assert of["half"]["neurons"] == of["all"] // 2
        assert of["half"]["moved"] > 1e-3 > of["half"]["off"]
        assert of["half"]["generated"] < 1e-3
    if result["towers"]["language"].get("counts"):
        counts = result["towers"]["language"]["counts"]
        assert counts["counts"] > 500 > ROUNDING * 15 >= counts["off"]


def test_what_is_not_as_plain_pytorch_has_it_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import contract

    keep = contract.without_columns
    fewer = lambda bare, mlps, neurons: keep(bare, mlps, type(neurons)(neurons.space, neurons.indices[1:]))  # noqa: E731
    monkeypatch.setattr(contract, "without_columns", fewer)
    with pytest.raises(AssertionError, match="off zeroed columns'"):
        run("text/llama", ("half",))
    assert run_all(["text/llama"], tmp_path / "1-of-1.json") == 1
    assert "off zeroed columns'" in json.loads((tmp_path / "1-of-1.json").read_text())[0]["failed"]
    monkeypatch.setattr(contract, "expert_post", lambda module, mlp, rows: -torch.ones(len(rows), mlp.width))
    with pytest.raises(AssertionError, match="counts differ from plain hooks'"):
        run("text/mixtral", ("counts",))


def test_every_class_of_the_mapping_has_a_small_model_and_the_page_says_which_are_run() -> None:
    kinds = {name.partition("/")[2] for name in SMALL if name.startswith("small/")} | set(SMALL)
    same = {"llava_next", "pp_chart2table", "shieldgemma2"}
    assert not set(mapped_types()) - kinds - same
    page = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| \w+ \|.*\| (run|meta)[^|]*\|$", page, re.MULTILINE)
    said = re.search(r"\*\*(\d+)\*\* of these are run in small", page)
    assert said is not None
    assert len(rows) == len(dict(rows)) >= 95
    assert int(said[1]) == sum(how == "run" for _, how in rows)


OF_THE_CLASS: dict[str, tuple[str, ...]] = {
    "its projector is as wide as the words' vectors": (
        "aria", "deepseek_vl", "dots3_note", "granite_docling", "internvl", "janus", "lighton_ocr", "llama4", "llava",
        "llava_next_mistral", "llava_next_qwen2", "llava_next_video", "llava_onevision", "mistral3", "mistral_large4",
        "perception_lm", "qianfan_ocr", "video_llama_3", "video_llava", "vipllava",
    ),
    "its projector is as wide as the decoder's MLPs, and its connector's vectors are words'": ("idefics2",),
    "its vision MLPs are as wide as the words' vectors": ("glm4v", "glm4v_moe", "glm46v", "glmga"),
    "experts, the shared one and dense MLPs have one width": ("llama4", "jamba"),
    "its encoder's vectors, or all its sizes, are its decoder's": (
        "bart", "diffusion_gemma", "florence2", "switch_transformers", "t5", "t5gemma2", "udop",
    ),
    "its decoder looks at the encoder's vectors as they are": ("pix2struct",),
    "its projector would be none if actions' vectors were not as wide as words'": ("pi0",),
    "two of its stacks have one configuration": ("granite4_vision", "idefics", "video_llava"),
}  # fmt: skip
"""Why sizes of a small model are the same: its class makes one of the other."""


def sizes_of(model: nn.Module) -> dict[int, set[str]]:
    """What is of each size: vectors between layers, and widths of MLPs, routed and shared experts, by tower."""
    found: dict[int, set[str]] = {}
    for tower in find_towers(model).values():
        for mlp in tower.mlps:
            kind = "expert" if mlp.expert is not None else "shared" if "shared" in mlp.path else "MLP"
            found.setdefault(mlp.width, set()).add(f"{tower.name} {kind}")
            shape = weight_of(model, mlp)
            if "projector" not in tower.name:  # its results are words' vectors
                hidden = shape[0] if shape[1] == mlp.width else shape[1]
                found.setdefault(hidden, set()).add(f"{tower.name} vectors")
    return found


def weight_of(model: nn.Module, mlp: MLP) -> tuple[int, ...]:
    """The shape of a down projection, of one expert where these lie in one tensor."""
    holder = model.get_submodule(mlp.path)
    if mlp.layout.parameters:
        return tuple(getattr(holder, mlp.layout.down)[mlp.expert].shape)
    down = holder.get_submodule(mlp.layout.down)
    return next(one.weight.shape for one in down.modules() if getattr(getattr(one, "weight", None), "ndim", 0) >= 2)


SOME = ("llava_next_mistral", "qwen2_5_vl", "glm4v_moe", "llama4", "florence2", "molmo2", "text/llama", "small/pi0")


@pytest.mark.parametrize("name", often(SOME, SMALL))
def test_no_two_sizes_of_a_small_model_are_the_same_unless_its_class_has_it_so(name: str) -> None:
    """So that none can be taken for another: a width for a model's, or a tower's for another's."""
    with torch.random.fork_rng(devices=[]):
        same = [what for what in sizes_of(SMALL[name]().model).values() if len(what) > 1]
    why = [reason for reason, names in OF_THE_CLASS.items() if name.rpartition("/")[2] in names]
    assert bool(same) == bool(why), f"{name}: {same}, though {why}"


def asked(name: str) -> tuple[vn.VLM, vn.QuestionSet]:
    small = SMALL[name]()
    model = vn.VLM(small.model, small.processor or small.tokenizer, template=small.template)
    return model, Rows(model, small).questions


def test_a_model_whose_rows_reach_each_other_is_refused_in_a_batch_and_asked_one_by_one() -> None:
    model, questions = asked("small/hunyuan_vl")
    masks = {"x": vn.NeuronSet(model.space(), range(0, len(model.space()), 3))}
    refusals = {
        "record": lambda: vn.record(model, questions, condition="all", progress=False),
        "knockout": lambda: vn.knockout(model, questions, masks, progress=False),
        "screen": lambda: vn.screen(model, questions, masks, progress=False),
    }
    for refused in refusals.values():
        with pytest.raises(MismatchError, match=r"otherwise in a batch than alone: .* \(batch_size=1\)"):
            refused()
    together = vn.record(model, questions, condition="all", batch_size=1, progress=False)
    parts = [vn.record(model, questions[n : n + 1], condition="all", progress=False) for n in range(len(questions))]
    assert torch.equal(together.positive, torch.cat([part.positive for part in parts]))


def test_an_encoder_decoder_model_whose_padding_reaches_words_is_refused_in_a_batch_too() -> None:
    model, questions = asked(
        "small/udop"
    )  # the distance from words to its picture's patches counts the padding between
    masks, questions = {"x": vn.NeuronSet(model.space(), range(0, 99, 3))}, questions.asked(answer="generate")
    with pytest.raises(
        MismatchError, match=r"UdopForConditionalGeneration answers question 'q\d' otherwise in a batch"
    ):
        vn.knockout(model, questions, masks, progress=False)
    assert len(vn.knockout(model, questions, masks, batch_size=1, progress=False).chosen) == 2


@pytest.mark.parametrize("heads", [2, 24])
def test_sparse_attention_is_kept_apart_but_for_ties_which_few_small_heads_make(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(small_configs.TEXT, "index_n_heads", heads)
    model, questions = asked("small/hy_v4_vl")
    ties = []

    def watch(indexer: torch.nn.Module, args: tuple, _: object) -> None:
        """Scores anew in float64: a ReLU a head, so that what no head looks at scores zero, as others do."""
        exact = copy.deepcopy(indexer).double()
        hidden, residual = (value.double() for value in args[:2])
        split = (exact.head_dim - exact.qk_rope_head_dim, exact.qk_rope_head_dim)
        query = exact.wq_b(residual).unflatten(-1, (-1, exact.head_dim))
        key = exact.k_norm(exact.wk(hidden))[:, :, None]
        cos, sin = (value.double()[:, :, None] for value in args[2])
        turned = []
        for value in (query, key):
            passed, rotated = value.split(split, -1)
            first, second = rotated.chunk(2, -1)
            turned.append(torch.cat([passed, rotated * cos + torch.cat([-second, first], -1) * sin], -1))
        looked = torch.einsum("bshd,btd->bsht", turned[0], turned[1].squeeze(2)).relu()
        scores = (looked * exact.weights_proj(hidden)[..., None]).sum(2)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        best = scores.masked_fill(~seen, -torch.inf).topk(exact.index_topk + 1, -1).values[..., -2:]
        ties.append(int((best[..., 0].isfinite() & (best[..., 0] == best[..., 1])).sum()))

    indexers = [one for one in model.hf.modules() if hasattr(one, "index_topk") and hasattr(one, "weights_proj")]
    handles = [one.register_forward_hook(watch) for one in indexers]
    for row in range(len(questions)):
        model.hf(**model.prepare(questions[row : row + 1]))
    for handle in handles:
        handle.remove()
    assert len(ties) == 5 * len(indexers) > 5
    assert sum(ties) > 100 if heads == 2 else sum(ties) == 0
    if heads == 2:
        with pytest.raises(MismatchError, match="otherwise in a batch than alone"):
            check_alone(model, questions, "right")
    else:
        check_alone(model, questions, "right")


def test_positions_that_weigh_attention_are_counted_from_where_a_row_begins() -> None:
    small = SMALL["small/mistral_large4"]()
    model = vn.VLM(small.model, small.processor, template=small.template)
    rows = Rows(model, small)
    assert keeps_apart(model, small.model, rows, "left")
    given = model.prepare(rows.questions)
    assert torch.equal(given["position_ids"], (given["attention_mask"].cumsum(1) - 1).clamp(min=0))
    given.pop("position_ids")
    last = model.hf(**rows.alone(0)).logits[0, -1]
    assert (model.hf(**given).logits[0, -1] - last).abs().max() > 0.1  # as it would be without
    check_alone(model, rows.questions, "left")


class Failing:
    """Lets a model fail, as long as there is something to fail with."""

    def __init__(self, model: vn.VLM, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors, self.rows = list(errors), []
        forward = model.hf.forward

        def fail(*args: object, **kwargs: object) -> object:
            self.rows.append(len(kwargs["input_ids"]))
            if self.errors:
                raise self.errors.pop(0)
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.hf, "forward", fail)


def test_a_batch_that_does_not_fit_is_tried_in_half_and_one_that_fails_is_left_to_the_next(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    model, questions = asked("small/hunyuan_vl")
    seen = Failing(model, monkeypatch, torch.OutOfMemoryError("full"), ValueError("broken"))
    check_alone(model, questions, "right")
    assert seen.rows == [5, 2]
    with pytest.raises(MismatchError, match="otherwise in a batch than alone"):
        check_alone(model, questions, "right")
    assert not [one for one in recwarn if "could not be tried" in str(one.message)]


def test_where_three_batches_fail_it_is_told_and_no_more_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = asked("small/hunyuan_vl")
    seen = Failing(model, monkeypatch, *[ValueError("broken")] * 9)
    for _ in range(2):
        check_alone(model, questions, "right")
    told = (
        r"answers a question in a batch as it does alone could not be tried \(ValueError: broken\): compare with batch_"
    )
    with pytest.warns(UserWarning, match=told):
        check_alone(model, questions, "right")
    check_alone(model, questions, "right")
    assert seen.rows == [5] * 3


def test_what_is_no_number_in_a_batch_alone_is_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = asked("small/glm_ocr")

    def spoil(_: torch.nn.Module, __: object, output: object) -> None:
        if len(output.logits) > 1:
            output.logits[1] = torch.nan

    handle = model.hf.register_forward_hook(spoil)
    with pytest.raises(MismatchError, match=r"question 'q1' otherwise in a batch than alone: .* by up to inf"):
        check_alone(model, questions, "right")
    handle.remove()
    check_alone(model, questions, "right")


def test_experts_that_choose_from_some_of_the_tokens_are_refused_wherever_tokens_are_told_apart() -> None:
    model, questions = asked("small/ernie4_5_vl_moe")
    space = model.space()
    expert = next(n for n in range(len(space)) if model.mlp_of(space.locate(n)[0]).expert is not None)
    told = "its experts choose from .* of the batch's .* tokens, and it cannot be told which"
    how = {"condition": "all", "progress": False}
    with pytest.raises(MismatchError, match=told):
        vn.record(model, questions, **how)
    with pytest.raises(MismatchError, match=told):
        vn.inspect_neurons(model, questions, vn.NeuronSet(space, [expert]))
    with pytest.raises(MismatchError, match=told):
        vn.attribute(model, questions, space, tokens="content", **how)
    with pytest.raises(MismatchError, match=told):
        vn.attribute(model, questions, space, reduce="max", **how)
    assert vn.attribute(model, questions, space, **how).total.abs().sum() > 0  # of all tokens: none need be told apart
