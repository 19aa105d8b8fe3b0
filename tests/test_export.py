"""Exported checkpoints: equal to the ablation in plain transformers, and every byte beside the columns as it was."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmneurons as vn
from vlmneurons.errors import AblationError, FileFormatError, MismatchError
from vlmneurons.model.down import down_of
from vlmneurons.run.export import NOTE
from vlmneurons.testing.tiny import tiny_inputs, tiny_model, tiny_names, tiny_template

pytestmark = [  # of transformers, not ours
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


def loaded(name: str, folder) -> vn.VLM:
    """A small model from a folder that it was saved to, as transformers keeps its names there."""
    hf, processor = tiny_model(name)
    if not folder.exists():
        hf.save_pretrained(folder)
        processor.save_pretrained(folder)
    if name != "llama4":  # whose forward is mended by `tiny_model` alone
        hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        saved = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        hf.load_state_dict(saved.state_dict())
        hf.config._name_or_path = str(folder)
    return vn.VLM(hf, processor, template=tiny_template(name))


def some(model: vn.VLM, towers=None) -> vn.NeuronSet:
    """A third of the neurons of every tower."""
    space = model.space(towers or list(model.towers), "post")
    return vn.NeuronSet(
        space, torch.randperm(len(space), generator=torch.Generator().manual_seed(0))[: len(space) // 3]
    )


@pytest.mark.parametrize("name", tiny_names(processor=False))
def test_the_exported_checkpoint_gives_the_logits_of_the_ablation_bit_for_bit(name, tmp_path):
    model, inputs = loaded(name, tmp_path / "model"), tiny_inputs(name)
    neurons = some(model, ["language"] if name == "gemma4" else None)  # Gemma 4's vision tower clips: see below
    folder = vn.export(model, neurons, tmp_path / "zero")
    doubled = vn.export(model, neurons, tmp_path / "double", "scale", factor=1.7)
    with torch.no_grad():
        clean = model.hf(**inputs).logits
        with vn.Ablation(model, neurons):
            zeroed = model.hf(**inputs).logits
        with vn.Ablation(model, neurons, "scale", factor=1.7):
            scaled = model.hf(**inputs).logits
        assert torch.equal(loaded(name, folder).hf(**inputs).logits, zeroed)
        torch.testing.assert_close(loaded(name, doubled).hf(**inputs).logits, scaled, atol=2e-4, rtol=1e-4)
        assert torch.equal(model.hf(**inputs).logits, clean)  # the model itself is untouched
    assert (zeroed - clean).abs().max() > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["double", "model", "zero"]


@pytest.mark.parametrize("name", ["llava_next_mistral", "qwen2_5_vl", "qwen3_vl_moe", "mllama"])
def test_names_shards_and_every_other_byte_are_those_of_the_checkpoint(name, tmp_path):
    hf, processor = tiny_model(name)
    hf.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "model")
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"the same once more")
    model = loaded(name, tmp_path / "model")
    neurons = some(model)
    folder = vn.export(model, neurons, tmp_path / "out")
    note = json.loads((folder / NOTE).read_text())
    assert note["from"] == "checkpoint"
    assert sum(one["neurons"] for one in note["tensors"]) == len(neurons)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    changed = {one["tensor"] for one in note["tensors"]}
    for shard in shards:
        before, after = load_file(tmp_path / "model" / shard), load_file(folder / shard)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) == (key not in changed) for key in before)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for kept in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (folder / kept).read_bytes() == before[kept]
    AutoProcessor.from_pretrained(folder)


def test_the_note_says_what_was_done(tmp_path):
    model = loaded("qwen2_5_vl", tmp_path / "model")
    one = vn.NeuronSet.from_indices(model.space(), {2: [5, 3]})
    folder = vn.export(model, one, tmp_path / "deep" / "out", "scale", factor=0.5)
    assert json.loads((folder / NOTE).read_text()) == {
        "vlmneurons": vn.__version__,
        "model": str(tmp_path / "model"),
        "revision": None,
        "from": "checkpoint",
        "mode": "scale",
        "factor": 0.5,
        "neurons": {"language.layers.2.mlp.gate": [3, 5]},
        "tensors": [{"tensor": "model.layers.2.mlp.down_proj.weight", "expert": None, "axis": 1, "neurons": 2}],
    }
    before, after = (load_file(one / "model.safetensors") for one in (tmp_path / "model", folder))
    name = "model.layers.2.mlp.down_proj.weight"
    before[name][:, [3, 5]] *= 0.5
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_that_is_not_its_checkpoint_any_more_is_exported_as_it_is(tmp_path):
    inputs = tiny_inputs("qwen2_5_vl")
    changed = loaded("qwen2_5_vl", tmp_path / "model")
    with torch.no_grad():
        changed.hf.lm_head.weight += 1
    settings = loaded("qwen2_5_vl", tmp_path / "model")
    settings.hf.config.text_config.rms_norm_eps = 0.5
    for module in settings.hf.model.language_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    hf, processor = tiny_model("qwen2_5_vl")
    for number, model in enumerate((changed, settings, vn.VLM(hf, processor))):
        neurons = some(model, ["language"])
        folder = vn.export(model, neurons, tmp_path / f"{number}")
        assert json.loads((folder / NOTE).read_text())["from"] == "memory"
        with torch.no_grad(), vn.Ablation(model, neurons):
            expected = model.hf(**inputs).logits
        with torch.no_grad():
            assert torch.equal(loaded("qwen2_5_vl", folder).hf(**inputs).logits, expected)


def test_a_checkpoint_that_keeps_each_expert_apart_is_scaled_expert_by_expert(tmp_path):
    model = loaded("glm4v_moe", tmp_path / "model")
    (expert,) = [site for site in model.space() if site.mlp == "mlp.experts.2"][:1]
    one = vn.NeuronSet(model.space(), [model.space().flat(expert, 4)])
    folder = vn.export(model, one, tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path / "model", folder))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [f"model.language_model.layers.{expert.layer}.mlp.experts.2.down_proj.weight"]
    assert (before[changed[0]] != after[changed[0]]).any(0).nonzero().flatten().tolist() == [4]


def test_a_model_without_its_weights_is_exported_from_its_checkpoint(tmp_path):
    model = loaded("llava_next_mistral", tmp_path / "model")
    neurons = some(model)
    bare = vn.VLM.from_pretrained(tmp_path / "model", weights=False)
    ours, theirs = (vn.export(one, neurons, tmp_path / name) for one, name in ((model, "a"), (bare, "b")))
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_half_precision_is_scaled_in_single_and_loads_as_it_was_stored(tmp_path):
    hf, processor = tiny_model("qwen2_5_vl")
    hf.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = vn.VLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    one = vn.NeuronSet.from_indices(model.space(), {0: [1]})
    folder = vn.export(model, one, tmp_path / "out", "scale", factor=1 / 3)
    assert json.loads((folder / NOTE).read_text())["from"] == "checkpoint"
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (load_file(place / "model.safetensors")[name] for place in (tmp_path / "model", folder))
    assert after.dtype == torch.bfloat16
    assert torch.equal(after[:, 1], (before[:, 1].float() / 3).bfloat16())


def test_the_checkpoint_of_transposed_weights_is_scaled_along_the_other_axis():
    from transformers.pytorch_utils import Conv1D

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Module()
            self.block.c_proj = Conv1D(4, 6)  # from 6 neurons to 4

    from vlmneurons.model.architectures.layout import MLP, MLPLayout

    layout = MLPLayout(down="c_proj", gate="c_fc", function=torch.relu)
    hf, mlp = Turned(), MLP("language", 0, "mlp", "block", layout, 6)
    down = down_of(hf, mlp)
    assert (down.name, down.axis, down.expert) == ("block.c_proj.weight", 0, None)
    columns = down.columns(hf.block.c_proj.weight.detach(), torch.tensor([5, 0]))
    alone = torch.zeros(2, 6)
    alone[0, 5] = alone[1, 0] = 1
    torch.testing.assert_close(columns, hf.block.c_proj(alone).detach() - hf.block.c_proj.bias.detach())


@pytest.mark.usefixtures("unchecked")
def test_what_scaled_columns_cannot_be_is_refused(tmp_path):
    model = loaded("qwen2_5_vl", tmp_path / "model")
    one = vn.NeuronSet(model.space(), [1])
    out = tmp_path / "out"
    for mode in ("mean", "add", "replace", "half"):
        with pytest.raises(AblationError, match=f"mode '{mode}' is not one of scaled columns: an export is 'zero' or"):
            vn.export(model, one, out, mode)
    with pytest.raises(AblationError, match="mode 'scale' needs factor="):
        vn.export(model, one, out, "scale")
    with pytest.raises(AblationError, match="mode 'zero' takes no factor"):
        vn.export(model, one, out, factor=2.0)
    with pytest.raises(AblationError, match="factor nan is not finite"):
        vn.export(model, one, out, "scale", factor=float("nan"))
    with pytest.raises(MismatchError, match="neurons is one NeuronSet"):
        vn.export(model, [one], out)
    with pytest.raises(MismatchError, match="these neurons are not of this model"):
        vn.export(model, vn.NeuronSet(vn.NeuronSpace.from_widths("language", "gate", [3]), [1]), out)
    with pytest.raises(FileFormatError, match="exists already and is not empty: give a new folder"):
        vn.export(model, one, tmp_path / "model")
    model.hf.model.language_model.layers[1].mlp.down_proj.weight = model.hf.model.language_model.layers[
        0
    ].mlp.down_proj.weight
    with pytest.raises(AblationError, match=re.escape("down_proj.weight is also model.language_model.layers.")):
        vn.export(model, one, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_weights_that_are_no_plain_matrix_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = loaded("gemma4", tmp_path / "gemma4")
    with pytest.raises(AblationError, match=r"vision_tower.*down_proj is not a plain matrix of floating-point numbers"):
        vn.export(model, vn.NeuronSet(model.space("vision"), [1]), tmp_path / "out")
    hf, processor = tiny_model("qwen2_5_vl")
    adapted = get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"])).base_model.model
    model = vn.VLM(adapted, processor)
    with pytest.raises(AblationError, match=r"q_proj has an adapter: merge it into the weights first"):
        vn.export(model, vn.NeuronSet(model.space(), [1]), tmp_path / "out")


def test_a_checkpoint_without_the_columns_is_refused(tmp_path):
    model = loaded("qwen2_5_vl", tmp_path / "model")
    one = vn.NeuronSet.from_indices(model.space(), {0: [1]})
    bare = vn.VLM.from_pretrained(tmp_path / "model", weights=False)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=r"down_proj\.weight should be one tensor of the checkpoint; .*none"):
        vn.export(bare, one, tmp_path / "out")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="are neither in memory nor in a checkpoint on disk"):
        vn.export(bare, one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_double_precision_stays_double_and_no_weight_becomes_infinite(tmp_path):
    hf, processor = tiny_model("llava_next_mistral")
    hf.double().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = vn.VLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    neurons = vn.NeuronSet(model.space("language", "post"), [0, 5])
    folder = vn.export(model, neurons, tmp_path / "scaled", "scale", factor=1.1)
    columns = load_file(folder / "model.safetensors")["language_model.model.layers.0.mlp.down_proj.weight"][:, [0, 5]]
    assert torch.equal(columns, model.hf.model.language_model.layers[0].mlp.down_proj.weight[:, [0, 5]] * 1.1)
    single = loaded("llava_next_mistral", tmp_path / "single")
    neurons = vn.NeuronSet(single.space("language", "post"), [0, 5])
    with pytest.raises(
        AblationError, match=r"factor 1e\+39 makes weights of .*down_proj.weight larger than torch.float32"
    ):
        vn.export(single, neurons, tmp_path / "huge", "scale", factor=1e39)
    assert not (tmp_path / "huge").exists()


def test_a_folder_that_is_a_link_is_written_where_it_leads(tmp_path, monkeypatch):
    model = loaded("llava_next_mistral", tmp_path / "model")
    neurons = vn.NeuronSet(model.space("language", "post"), [0])
    for name, there in (("empty", True), ("new", False)):
        if there:
            (tmp_path / name).mkdir()
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
        assert vn.export(model, neurons, tmp_path / f"link-{name}") == tmp_path / f"link-{name}"
        assert (tmp_path / f"link-{name}").is_symlink()
        assert (tmp_path / name / NOTE).is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileFormatError, match="is where this process is, which cannot be put in its place"):
        vn.export(model, neurons, ".")


# -- tied weights, and a model that is not quite its checkpoint --------------------------------------------------------


def tied(folder) -> vn.VLM:
    """A model whose output embeddings are its input embeddings, loaded from a checkpoint that holds them once."""
    hf, processor = tiny_model("qwen2_5_vl")
    hf.config.tie_word_embeddings = hf.config.get_text_config().tie_word_embeddings = True
    hf.lm_head.weight = hf.get_input_embeddings().weight
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return loaded("qwen2_5_vl", folder)


def written_from(folder) -> str:
    return json.loads((folder / NOTE).read_text())["from"]


def test_tied_embeddings_stay_tied_and_embeddings_that_were_parted_stay_parted(tmp_path):
    inputs = tiny_inputs("qwen2_5_vl")
    model = tied(tmp_path / "model")
    for parted in (False, True):
        if parted:
            model.hf.lm_head.weight = nn.Parameter(model.hf.lm_head.weight.detach() * 1.5)
        neurons = some(model, ["language"])
        folder = vn.export(model, neurons, tmp_path / f"parted {parted}")
        assert written_from(folder) == ("memory" if parted else "checkpoint")
        again = loaded("qwen2_5_vl", folder)
        assert (again.hf.lm_head.weight is again.hf.get_input_embeddings().weight) != parted
        with torch.no_grad(), vn.Ablation(model, neurons):
            expected = model.hf(**inputs).logits
        with torch.no_grad():
            assert torch.equal(again.hf(**inputs).logits, expected)


def test_columns_whose_memory_another_layer_shares_are_refused(tmp_path):
    model = loaded("qwen2_5_vl", tmp_path / "model")
    first, second = (layer.mlp.down_proj.weight for layer in model.hf.model.language_model.layers[:2])
    second.data = first.data
    assert second is not first
    with pytest.raises(AblationError, match=r"layers\.0\..*down_proj.weight is also .*layers\.1\..*down_proj.weight"):
        vn.export(model, vn.NeuronSet.from_indices(model.space(), {0: [1]}), tmp_path / "out")


def test_an_ablated_model_is_not_exported_as_if_it_were_not(tmp_path):
    model = loaded("qwen2_5_vl", tmp_path / "model")
    first, second = (vn.NeuronSet.from_indices(model.space(), {layer: [1]}) for layer in (0, 1))
    with (
        vn.Ablation(model, first),
        pytest.raises(AblationError, match=r"is being ablated, .* export it outside of the ablation, and give all the"),
    ):
        vn.export(model, second, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    vn.export(model, first | second, tmp_path / "out")


def test_without_all_weights_in_memory_what_differs_from_the_checkpoint_is_refused(tmp_path):
    changed = "neither in memory nor in a checkpoint on disk that is as the model is now: load the model whole"
    whole = loaded("qwen2_5_vl", tmp_path / "model")
    neurons = vn.NeuronSet.from_indices(whole.space(), {0: [1]})
    bare = vn.VLM.from_pretrained(tmp_path / "model", weights=False)
    bare.hf.config.get_text_config().rms_norm_eps = 0.5
    whole.hf.model.language_model.layers[3].to("meta")  # as one that was offloaded
    vn.export(whole, neurons, tmp_path / "offloaded")
    with torch.no_grad():
        whole.hf.lm_head.weight += 1
    for model in (bare, whole):
        with pytest.raises(FileFormatError, match=changed):
            vn.export(model, neurons, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "offloaded"]


def test_of_weights_that_a_folder_holds_twice_those_are_exported_that_transformers_loads(tmp_path):
    hf, processor = tiny_model("qwen2_5_vl")
    hf.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        hf.lm_head.weight += 1
    hf.save_pretrained(tmp_path / "changed")
    single = (tmp_path / "changed" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(single)
    bare = vn.VLM.from_pretrained(tmp_path / "model", weights=False)
    folder = vn.export(bare, vn.NeuronSet.from_indices(bare.space(), {0: [1]}), tmp_path / "out")
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == ["model.safetensors"]
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], hf.lm_head.weight.detach())


def test_a_checkpoint_that_lacks_a_file_is_exported_from_memory_or_refused(tmp_path):
    hf, processor = tiny_model("qwen2_5_vl")
    hf.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "model")
    whole, bare = loaded("qwen2_5_vl", tmp_path / "model"), vn.VLM.from_pretrained(tmp_path / "model", weights=False)
    sorted((tmp_path / "model").glob("*.safetensors"))[1].unlink()
    neurons = vn.NeuronSet.from_indices(whole.space(), {0: [1]})
    assert written_from(vn.export(whole, neurons, tmp_path / "out")) == "memory"
    with pytest.raises(FileFormatError, match="are neither in memory nor in a checkpoint on disk"):
        vn.export(bare, neurons, tmp_path / "bare")


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "llama4"])
def test_experts_with_equal_weights_are_told_apart_with_and_without_weights_in_memory(name, tmp_path):
    hf, processor = tiny_model(name)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 3 and parameter.shape[0] == 4:  # of all experts
                parameter[1] = parameter[0]
                parameter[3] = 0
    hf.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = loaded(name, tmp_path / "model")
    space = model.space("language", "gate")
    experts = [site for site in space if re.search(r"experts\.\d", site.mlp)]
    assert len({site.mlp for site in experts}) == 4
    neurons = vn.NeuronSet(space, [space.flat(site, 2 * place) for place, site in enumerate(experts) if place != 1])
    folder = vn.export(model, neurons, tmp_path / "out")
    with torch.no_grad(), vn.Ablation(model, neurons):
        expected = model.hf(**tiny_inputs(name)).logits
    with torch.no_grad():
        assert torch.equal(loaded(name, folder).hf(**tiny_inputs(name)).logits, expected)
    bare = vn.VLM.from_pretrained(tmp_path / "model", weights=False)
    by_name = vn.export(bare, neurons, tmp_path / "bare")
    ours, before = load_file(by_name / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in before)
    assert any(not torch.equal(ours[key], before[key]) for key in before)


# -- killed in the middle ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import vlmneurons as vn
from vlmneurons.run import export

folder, where = Path(sys.argv[1]), sys.argv[2]
before = getattr(export, where)
def then_die(*arguments):
    before(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(export, where, then_die)
model = vn.VLM.from_pretrained(folder / "model", weights=False)
vn.export(model, vn.NeuronSet.load(folder / "neurons.safetensors"), folder / "out")
"""


@pytest.mark.parametrize("where", ["_copy", "_scale"])
def test_an_export_that_was_killed_leaves_no_checkpoint_and_the_next_one_clears_what_it_left(where, tmp_path):
    model = loaded("llava_next_mistral", tmp_path / "model")
    neurons = some(model)
    neurons.save(tmp_path / "neurons.safetensors")
    source = str(Path(vn.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), where],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    (left / "of-the-killed-one.json").write_text("{}")
    (left / "folder").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (left / "link").symlink_to(tmp_path / "kept")
    folder, expected = vn.export(model, neurons, tmp_path / "out"), vn.export(model, neurons, tmp_path / "expected")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    assert (tmp_path / "kept" / "file").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "neurons.safetensors", "out", "expected", "kept"}


def test_a_link_where_an_export_writes_is_not_followed(tmp_path):
    model = loaded("llava_next_mistral", tmp_path / "model")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".out-unfinished").symlink_to(tmp_path / "precious")
    vn.export(model, some(model), tmp_path / "out")
    assert (tmp_path / "precious" / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "precious"]


def test_two_exports_into_one_folder_do_not_mix(tmp_path, monkeypatch):
    from vlmneurons.run import export

    model = loaded("llava_next_mistral", tmp_path / "model")
    neurons = some(model)
    scale, refused = export._scale, []

    def meanwhile(*arguments):
        monkeypatch.setattr(export, "_scale", scale)
        with pytest.raises(
            MismatchError, match=r"out-unfinished is in use by another process; wait for it, or give an"
        ):
            vn.export(model, neurons, tmp_path / "out")
        refused.append(True)
        return scale(*arguments)

    monkeypatch.setattr(export, "_scale", meanwhile)
    vn.export(model, neurons, tmp_path / "out")
    assert refused

    def written_meanwhile(*arguments):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        return scale(*arguments)

    monkeypatch.setattr(export, "_scale", written_meanwhile)
    with pytest.raises(FileFormatError, match="other was written to by another process: give a new folder"):
        vn.export(model, neurons, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "out"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_files_have_the_rights_that_the_user_gives_to_new_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        model = loaded("llava_next_mistral", tmp_path / "model")
        with torch.no_grad():
            model.hf.lm_head.weight += 1
        for name in ("checkpoint", "memory"):
            folder = vn.export(model, some(model), tmp_path / name)
            assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
    finally:
        os.umask(before)
