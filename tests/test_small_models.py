"""Small models through `contract.py`: one of each kind here, and all in ``.ci/nightly``, which runs it as a script."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import vlmneurons as vn
from contract import ROUNDING, Rows, run, run_all
from small_models import SMALL
from vlmneurons.errors import MismatchError
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
