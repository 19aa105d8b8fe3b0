"""What is refused of a model that vLLM holds, before vLLM is started: no vLLM is needed for it.

What runs in vLLM is tested in tests/vllm, where it is installed.
"""

import copy
import importlib.metadata

import pytest
import torch

import vlmneurons as vn
from helpers import save_questions, some_questions
from vlmneurons.cli import main
from vlmneurons.errors import AblationError, ArchitectureError, MismatchError, QuestionError
from vlmneurons.run.readers import Letters
from vlmneurons.run.vllm.server import MOST_TOKENS, payload, server_of


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_5_vl")


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM were installed; it is not started."""
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.33.0" if name == "vllm" else version(name))


def held(folder, **options):
    return vn.VLM.from_pretrained(folder, engine="vllm", **options)


def asked(model, **how):
    return vn.record(model, some_questions(2), condition="all", progress=False, **how)


def test_without_vllm_the_error_says_what_to_install(folder):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        with pytest.raises(MismatchError, match=r"not installed: pip install 'vlmneurons\[vllm\]'"):
            asked(held(folder))


def test_an_engine_that_does_not_exist_is_refused_before_anything_is_loaded():
    with pytest.raises(ArchitectureError, match="engine='vlm' does not exist; choose from transformers, vllm"):
        vn.VLM.from_pretrained("org/x", engine="vlm")


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("enforce_eager", False, "compiled graphs pass over the hooks .*; leave it at True"),
        ("pipeline_parallel_size", 2, "each worker has to see every layer; leave it at 1"),
        ("data_parallel_size", 2, "share them among processes by part="),
        ("speculative_config", {"method": "ngram"}, "tokens that were only guessed would be counted"),
        ("enable_lora", True, "merge it first"),
        ("enable_dbo", True, "does not say which token is of which question"),
        ("worker_extension_cls", "mine.Worker", "the library's own worker counts and edits"),
        ("worker_cls", "mine.Worker", "the library's own worker counts and edits"),
        ("logprobs_mode", "raw_logits", "answers are log-probabilities"),
        ("tokenizer", "other", "it is given by name_or_path"),
    ],
)
def test_an_option_with_which_vllm_would_be_silently_wrong_is_refused(folder, installed, option, value, why):
    with pytest.raises(MismatchError, match=rf"engine='vllm' with {option}=.*: .*{why}"):
        asked(held(folder, **{option: value}))


def test_names_are_here_and_weights_are_not(folder, load):
    model = held(folder, dtype="bfloat16", tensor_parallel_size=2, processor_kwargs={"max_pixels": 3136})
    assert {weight.device.type for weight in model.hf.parameters()} == {"meta"}
    assert model.hf.dtype == torch.bfloat16
    assert model.space() == load("qwen2_5_vl").space()
    assert model.engine == copy.deepcopy(model).engine == "vllm"
    assert model.engine_options == {"tensor_parallel_size": 2, "mm_processor_kwargs": {"max_pixels": 3136}}
    assert load("qwen2_5_vl").engine == "transformers"
    assert model.hf.generation_config.eos_token_id == load("qwen2_5_vl").hf.generation_config.eos_token_id


def test_what_needs_the_weights_here_is_refused(folder, installed):
    model = held(folder)
    inputs = dict(model.prepare(some_questions(1)))
    for run in (lambda: model.hf(**inputs), lambda: model.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(MismatchError, match="held by engine='vllm', where record, record_items and knockout run"):
            run()
    with pytest.raises(QuestionError, match=r"needs gradients, which do not come back from vllm 0\.33\.0"):
        vn.attribute(model, some_questions(2), progress=False)
    with pytest.raises(MismatchError, match="held by engine='vllm'"):
        vn.inspect_neuron(model, some_questions(2), ("language.layers.1.mlp.gate", 3), progress=False)
    with pytest.raises(MismatchError, match="remote='local': this model is held by engine='vllm'"):
        asked(model, remote="local")
    with (
        vn.Ablation(model, vn.NeuronSet(model.space(), [1])),
        pytest.raises(MismatchError, match="being ablated here, which does not reach vLLM"),
    ):
        asked(model)


def test_what_was_changed_here_and_would_not_reach_vllm_is_refused(folder, installed):
    model = held(folder)
    handle = model.hf.get_submodule("model.language_model.norm").register_forward_hook(lambda *_: None)
    with pytest.raises(
        MismatchError, match=r"a hook at model\.language_model\.norm.* does not reach vLLM: take it off"
    ):
        asked(model)
    handle.remove()
    model.hf.config.text_config.rms_norm_eps = 0.5
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(
            MismatchError, match=r"hf\.config was changed after the model was made, which vLLM does not"
        ):
            asked(one)
    with pytest.raises(ArchitectureError, match="engine='vllm' knows no subfolder="):
        held(folder, subfolder="part")


def test_what_vllm_cannot_do_is_refused_before_it_starts(folder, installed):
    model, some = held(folder), None

    class Mine(Letters):
        def score(self, *args):
            return super().score(*args)

    with pytest.raises(QuestionError, match=r"a few tokens' log-probabilities, and Mine\(\) needs more"):
        asked(model, answer=Mine())
    some = vn.NeuronSet(model.space(), [1, 2])
    plus = vn.Intervention(some, "add", factor=1.0, values=1.0, at="gate")
    with pytest.raises(AblationError, match="mode 'add' acts at 'post' only; run the model here"):
        vn.knockout(model, some_questions(4), {"m": plus}, progress=False)
    sites = tuple(site.at(kind) for site in model.space().sites[:1] for kind in ("post", "pre"))
    both = vn.NeuronSet(vn.NeuronSpace(sites, (model.mlp_of(sites[0]).width,) * 2), [1, model.mlp_of(sites[0]).width])
    with pytest.raises(AblationError, match="an MLP has one mask; give neurons of one kind of site, or run here"):
        vn.knockout(model, some_questions(4), {"m": both}, progress=False)
    with pytest.raises(MismatchError, match=r"vision\.layers\.0\..* is not of a decoder's own MLPs"):
        asked(model, space=model.space("vision"))
    with pytest.raises(MismatchError, match="token rules by name and statistics of your own are counted here only"):
        vn.record(model, some_questions(4), tokens={"picture": "image"}, progress=False)


def test_the_setting_names_engine_version_options_and_files(folder, installed, tmp_path):
    def server(where=folder, **options):
        return server_of(held(where, **options))

    assert server().name == server(max_model_len=512, tensor_parallel_size=2).name == "vllm 0.33.0"
    assert server(quantization="fp8").name == "vllm 0.33.0, quantization='fp8'"
    digest = server().weights
    assert digest is not None
    assert digest.startswith("files ")
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert server(other).weights == digest
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert server(other).weights != digest


def test_a_mask_is_sent_as_columns_factors_and_terms():
    columns, factors, terms = payload(torch.tensor([2, 5]).numpy(), 0.5, torch.tensor([1.0, 2.0]).numpy())
    assert torch.frombuffer(bytearray(columns), dtype=torch.int64).tolist() == [2, 5]
    assert torch.frombuffer(bytearray(factors), dtype=torch.float32).tolist() == [0.5, 0.5]
    assert torch.frombuffer(bytearray(terms), dtype=torch.float32).tolist() == [1.0, 2.0]
    assert payload(torch.tensor([2]).numpy(), 0.0)[2] is None
    assert MOST_TOKENS == 128


def test_the_command_line_says_what_vllm_is_started_with(folder, tmp_path, monkeypatch, installed, capsys):
    save_questions(tmp_path, 8)
    seen = []

    def loaded(name, **how):
        seen.append(how)
        raise MismatchError("enough")

    monkeypatch.setattr(vn.VLM, "from_pretrained", loaded)
    record = ["record", "--model", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    ranks = ["--engine", "vllm", "--tensor-parallel-size", "2", "--max-model-len", "4096"]
    assert main([*record, *ranks, "--dtype", "bfloat16"]) == 1
    options = {"engine": "vllm", "tensor_parallel_size": 2, "max_model_len": 4096}
    assert seen == [{"revision": None, "dtype": "bfloat16", **options}]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*record, *ranks]) == 1
    assert "--engine vllm starts its own processes: start one, without torchrun" in capsys.readouterr().err
    assert len(seen) == 1


def test_the_command_line_asks_for_vllm_before_anything_is_opened(folder, tmp_path, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", absent)
        command = ["record", "--model", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
        assert main([*command, "--engine", "vllm"]) == 1
    assert "engine='vllm' needs vLLM, which is not installed: pip install" in capsys.readouterr().err
