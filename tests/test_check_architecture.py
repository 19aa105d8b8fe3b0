"""The contract that any model must meet: small models of many classes meet it, and broken ones are caught."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmneurons.cli import main
from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures import find as finding
from vlmneurons.model.architectures.find import Architecture, register_architecture
from vlmneurons.model.architectures.layout import MLPLayout
from vlmneurons.testing import architectures as contract
from vlmneurons.testing import tiny_inputs, tiny_model, tiny_names
from vlmneurons.testing.architectures import check_architecture, describe_architecture, mapped_types
from vlmneurons.testing.selectors import ContractError

NAMED = [
    "llava",
    "llava_next_mistral",
    "llava_next_qwen2",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "gemma3",
    "gemma4",
    "paligemma",
    "idefics3",
    "smolvlm",
    "internvl",
    "mistral3",
    "llama4",
    "glm4v_moe",
    "aya_vision",
    "molmo2",
    "mllama",
    "florence2",
]


def test_every_class_that_was_promised_is_among_the_small_models() -> None:
    assert set(NAMED) <= set(tiny_names(processor=False))
    assert len({type(tiny_model(name)[0]) for name in tiny_names(processor=False)}) >= 20


@pytest.mark.parametrize("name", tiny_names(processor=False))
def test_the_contract_holds_with_an_image_in_the_input(name: str) -> None:
    model, _ = tiny_model(name)
    report = check_architecture(model, inputs=tiny_inputs(name))
    assert not report.notes
    for tower in report.towers:
        assert tower.ran > 0
        assert tower.moved > 0
        assert not tower.bare


def test_a_vlm_is_checked_with_its_own_processor() -> None:
    import vlmneurons as vn

    report = check_architecture(vn.VLM(*tiny_model("qwen2_5_vl")))
    assert [(tower.name, tower.ran) for tower in report.towers] == [("language", 4), ("vision", 3), ("projector", 1)]


def test_the_report_can_be_read() -> None:
    text = str(check_architecture(tiny_model("glm4v_moe")[0], inputs=tiny_inputs("glm4v_moe")))
    assert text.splitlines()[0] == "Glm4vMoeForConditionalGeneration"
    assert "language: 2 layers, 6 MLPs x 24–72 = 232 neurons  [model.language_model.layers]" in text
    assert "4 x mlp.experts.*: pre = gate_up_proj (gate_up), gate = act_fn(pre), post = gate * up -> down_proj" in text
    assert "ran: " in text


# --- what breaks the contract is found ---


def broken(monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable) -> None:
    monkeypatch.setattr(contract, name, replacement)


def test_values_that_are_not_the_models_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmneurons.model.architectures.hooks import read

    broken(monkeypatch, "read", lambda hf, mlp, kind, call: read(hf, mlp, kind, lambda v, *_: call(v * (1 + 1e-6))))
    with pytest.raises(ContractError, match="differs from what a plain hook sees"):
        check_architecture(tiny_model("llava")[0], inputs=tiny_inputs("llava"))


WRONG_LAYOUTS = {
    "up forgotten": (MLPLayout(gate="gate_proj", down="down_proj", function=F.silu), "post is not gate, as the"),
    "up for gate": (MLPLayout(gate="up_proj", down="down_proj", function=F.silu), "post is not gate, as the layout"),
    "gate and down exchanged": (MLPLayout(gate="down_proj", down="gate_proj", function=F.silu), "post is not gate"),
    "gate and up exchanged": (
        MLPLayout(gate="up_proj", up="gate_proj", down="down_proj", function=F.silu),
        r"post is not gate \* up, as the layout says: it names other projections",
    ),
    "another function": (
        MLPLayout(gate="gate_proj", up="up_proj", down="down_proj", function=F.gelu),
        r"post is not gate \* up, as the layout says",
    ),
    "a function beside the module": (
        MLPLayout(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn", function=F.gelu),
        r"gate is not gelu\(pre\), as the layout says",
    ),
    "a function that fails": (
        MLPLayout(gate="gate_proj", up="up_proj", down="down_proj", function=lambda pre: 1 / 0),
        "does not run while every site is read: ZeroDivisionError: division by zero",
    ),
    "an ungated function that fails": (
        MLPLayout(gate="gate_proj", down="down_proj", function=lambda pre: 1 / 0),
        "gate cannot be computed as the layout says: ZeroDivisionError: division by zero",
    ),
    "up forgotten, activation named": (
        MLPLayout(gate="gate_proj", down="down_proj", activation="act_fn"),
        "post is not gate, as the layout says",
    ),
}


@pytest.mark.parametrize("what", WRONG_LAYOUTS)
def test_a_registered_layout_by_which_the_mlp_would_compute_other_values_is_found(what: str) -> None:
    layout, message = WRONG_LAYOUTS[what]
    model, _ = tiny_model("llava_next_mistral")
    towers = {"language": "model.language_model.layers", "vision": "model.vision_tower.encoder.layers"}
    known = len(finding._REGISTERED)
    try:
        register_architecture(type(model).__name__, Architecture(towers, mlps={"language": {"mlp": layout}}))
        where = "" if message.startswith("does not run") else r"language\.layers\.0\.mlp\."
        with pytest.raises(ContractError, match=where + message):
            check_architecture(model, inputs=tiny_inputs("llava_next_mistral"))
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_a_module_that_does_not_run_as_often_as_the_others_is_found() -> None:
    model, _ = tiny_model("llava_next_mistral")
    for block in model.model.language_model.layers:
        block.mlp.spare = nn.Linear(32, block.mlp.up_proj.out_features)
    layout = MLPLayout(gate="gate_proj", up="spare", down="down_proj", function=F.silu)
    known = len(finding._REGISTERED)
    try:
        towers = {"language": "model.language_model.layers"}
        register_architecture(type(model).__name__, Architecture(towers, mlps={"mlp": layout}))
        with pytest.raises(
            ContractError, match=r"layers\.0\.mlp does not run each module .*gate_proj 1 times, spare 0"
        ):
            check_architecture(model, inputs=tiny_inputs("llava_next_mistral"))
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_towers_that_were_exchanged_are_noted() -> None:
    model, _ = tiny_model("llava_next_mistral")
    known = len(finding._REGISTERED)
    try:
        towers = {"vision": "model.language_model.layers", "language": "model.vision_tower.encoder.layers"}
        register_architecture(type(model).__name__, Architecture(towers))
        report = check_architecture(model, inputs=tiny_inputs("llava_next_mistral"))
        assert re.search(
            r"language: model\.vision_tower\S+ sees \d+ rows where the input has \d+ tokens: is model", str(report)
        )
    finally:
        del finding._REGISTERED[: len(finding._REGISTERED) - known]


def test_reads_that_change_the_model_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmneurons.model.architectures.hooks import read

    broken(monkeypatch, "read", lambda hf, mlp, kind, call: read(hf, mlp, kind, lambda v, *_: call(v.mul_(1.0001))))
    with pytest.raises(ContractError, match="while every site is read"):
        check_architecture(tiny_model("llava")[0], inputs=tiny_inputs("llava"))


def test_a_gate_written_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmneurons.model.architectures.hooks import write

    def wrong(hf: nn.Module, mlp, kind: str, edit: Callable):
        return write(hf, mlp, "pre" if kind == "gate" else kind, edit)

    broken(monkeypatch, "write", wrong)  # pre = 0 gives gate = 0 for SiLU, but not bit for bit for a sigmoid
    model, _ = tiny_model("llava")
    for layer in model.model.language_model.layers:
        layer.mlp.act_fn = nn.Sigmoid()
    with pytest.raises(ContractError, match="gives different logits"):
        check_architecture(model, inputs=tiny_inputs("llava"))


def test_hooks_left_behind_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmneurons.model.architectures.hooks import write

    class Stuck:
        def __init__(self, *arguments: object) -> None:
            write(*arguments)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    broken(monkeypatch, "write", Stuck)
    with pytest.raises(ContractError, match="after an edit of"):
        check_architecture(tiny_model("llava")[0], inputs=tiny_inputs("llava"))


def test_tokens_taken_for_others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmneurons.model.architectures.hooks import read_experts

    def shifted(hf: nn.Module, path: str, layout, kind: str, call: Callable):
        return read_experts(hf, path, layout, kind, lambda v, e, t: call(v, e, t.roll(1)))

    broken(monkeypatch, "read_experts", shifted)
    with pytest.raises(ContractError, match="expert 0"):
        check_architecture(tiny_model("qwen3_vl_moe")[0], inputs=tiny_inputs("qwen3_vl_moe"))


def test_models_that_do_not_repeat_themselves_are_refused() -> None:
    model, _ = tiny_model("llava")
    model.lm_head.register_forward_hook(lambda _, args, output: output + torch.rand(1))
    with pytest.raises(ContractError, match="other logits in a second run"):
        check_architecture(model, inputs=tiny_inputs("llava"))


def test_what_cannot_be_told_is_an_architecture_error() -> None:
    class Odd(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.gate_proj(x).softmax(-1) * self.up_proj(x))

    model, _ = tiny_model("llava")
    for layer in model.model.language_model.layers:
        layer.mlp = Odd(layer.mlp)
    with pytest.raises(ArchitectureError, match="fit together like an MLP's projections"):
        describe_architecture(model)


# --- the command ---


def test_the_command_describes_a_model_type(capsys: pytest.CaptureFixture) -> None:
    assert "qwen2_5_vl" in mapped_types()
    assert main(["check", "llava_next"]) == 0
    text = capsys.readouterr().out
    assert "language: 32 layers, 32 MLPs x 11,008 = 352,256 neurons" in text
    assert "--run checks the values" in text


def test_the_command_runs_the_contract_on_a_saved_model(tmp_path: Path) -> None:
    model, processor = tiny_model("llava_next_qwen2")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "vlmneurons", "check", str(tmp_path), "--run"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "vision: 3 layers, 3 MLPs x 48 = 144 neurons" in result.stdout
    assert "The contract holds" in result.stdout


def test_the_command_says_what_it_cannot_load(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "no/such-model-anywhere"]) == 2
    assert "no/such-model-anywhere cannot be loaded. " in capsys.readouterr().err
    assert main(["check", "Qwen2.5-VL"]) == 2
    assert "Qwen2.5-VL cannot be loaded. Is the model type qwen2_5_vl meant? " in capsys.readouterr().err
