"""What neurons write: against formulas by hand in double precision, and against the model's own forward."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import vlmneurons as vn
from vlmneurons.errors import AblationError, ArchitectureError, MismatchError, SelectionError, SiteError
from vlmneurons.model.down import down_of, written
from vlmneurons.testing.tiny import tiny_model, tiny_names, tiny_template

pytestmark = [  # of transformers and peft, not ours
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

ALL = tiny_names(processor=False)
NORMS = {
    "llava_next_mistral": "weight",
    "qwen2_5_vl": "weight",
    "llava": "weight",
    "internvl": "weight",
    "qwen3_vl_moe": "weight",
    "llama4": "weight",
    "mllama": "weight",
    "idefics3": "weight",
    "gemma4": "weight",
    "glm4v": "weight",
    "gemma3": "1 + weight",
    "paligemma": "1 + weight",
    "qwen3_5": "1 + weight",
    "aya_vision": "mean",
    "cohere2_vision": "mean",
}
"""What each family's norms do, as its paper or code says: RMSNorm with either weight, or a LayerNorm without bias."""
BEHIND = {"gemma3": "post_feedforward_layernorm", "gemma4": "post_feedforward_layernorm", "glm4v": "post_mlp_layernorm"}
"""Families whose blocks put a norm behind the MLP."""


def vlm(name: str) -> vn.VLM:
    hf, processor = tiny_model(name)
    with torch.no_grad():  # weights that are all 1, as a new model's are, would hide a norm's
        for module in hf.modules():
            if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
                module.weight.add_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1)) / 3)
    return vn.VLM(hf, processor, template=tiny_template(name))


def some(model: vn.VLM, n: int = 12) -> vn.NeuronSet:
    space = model.space("language", "post")
    return vn.NeuronSet(space, torch.randperm(len(space), generator=torch.Generator().manual_seed(2))[:n])


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def normed(x: np.ndarray, module: nn.Module, kind: str) -> np.ndarray:
    """A norm by its formula."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = numbers(module.weight)
    if kind == "mean":
        x = x - x.mean()
    return x / np.sqrt((x**2).mean() + epsilon) * (1 + weight if kind.startswith("1") else weight)


def column(model: vn.VLM, site: vn.Site, neuron: int) -> np.ndarray:
    """A neuron's column, by the names of the projections in transformers."""
    mlp = model.mlp_of(site)
    module = model.hf.get_submodule(mlp.path)
    if mlp.expert is None:
        return numbers(module.down_proj.weight)[:, neuron]
    weight = numbers(module.down_proj)[mlp.expert]
    return weight[neuron] if mlp.path.endswith("feed_forward.experts") else weight[:, neuron]


def by_hand(model: vn.VLM, name: str, site: vn.Site, neuron: int) -> np.ndarray:
    """Every logit."""
    tower = model.towers["language"]
    block = model.hf.get_submodule(tower.layer_paths[site.layer])
    final = model.hf.get_submodule(tower.layer_paths[0].rpartition(".layers")[0]).norm
    x = column(model, site, neuron)
    if name in BEHIND:
        x = normed(x, getattr(block, BEHIND[name]), NORMS[name])
    return numbers(model.hf.get_output_embeddings().weight) @ normed(x, final, NORMS[name])


def agree(model: vn.VLM, table: pd.DataFrame, logits, k: int) -> None:
    """The table has the k highest and lowest of the logits that a function gives for a site and a neuron."""
    for (site, neuron), rows in table.groupby(["site", "neuron"], sort=False):
        expected = logits(vn.Site.parse(site), neuron)[: len(model.tokenizer)]
        for direction, sign in (("promotes", -1), ("suppresses", 1)):
            part = rows[rows["direction"] == direction]
            assert part["rank"].tolist() == list(range(1, k + 1))
            np.testing.assert_allclose(part["logit"], sign * np.sort(sign * expected)[:k], atol=1e-5)
            np.testing.assert_allclose(part["logit"], expected[part["token_id"]], atol=1e-5)
            assert part["token"].tolist() == [model.tokenizer.decode([one]) for one in part["token_id"]]


@pytest.mark.parametrize("name", NORMS)
def test_the_tokens_are_those_of_the_formula(name):
    model = vlm(name)
    neurons = some(model)
    table = vn.neuron_writes(model, neurons, k=4)
    assert len(table) == 2 * 4 * 12
    pairs = [neurons.space.locate(one) for one in neurons.indices.tolist()]
    assert list(dict.fromkeys(zip(table["site"], table["neuron"]))) == [(str(site), number) for site, number in pairs]
    agree(model, table, lambda site, neuron: by_hand(model, name, site, neuron), 4)


@pytest.mark.parametrize("name", ["gemma4", "paligemma"])
def test_soft_capping_is_that_of_the_model(name):
    model = vlm(name)
    model.hf.config.get_text_config().final_logit_softcapping = 2.0
    table = vn.neuron_writes(model, some(model), k=3)
    if "final_logit_softcapping" not in inspect.getsource(type(model.hf).forward):  # PaliGemma of transformers 5.20
        agree(model, table, lambda *where: by_hand(model, name, *where), 3)
        return
    agree(model, table, lambda *where: 2 * np.tanh(by_hand(model, name, *where) / 2), 3)
    assert table["logit"].abs().max() < 2


@pytest.mark.parametrize("name", ["gemma3", "aya_vision"])
def test_what_the_configuration_names_and_the_model_does_not_do_is_not_done(name):
    model = vlm(name)
    model.hf.config.get_text_config().final_logit_softcapping = 2.0
    model.hf.config.get_text_config().logit_scale = 0.0625
    table = vn.neuron_writes(model, some(model), k=3)
    agree(model, table, lambda *where: by_hand(model, name, *where), 3)


def test_tied_embeddings_are_the_unembedding():
    model = vlm("llava")
    untied = vn.neuron_writes(model, some(model), k=3)
    model.hf.lm_head.weight = model.hf.get_input_embeddings().weight
    tied = vn.neuron_writes(model, some(model), k=3)
    agree(model, tied, lambda *where: by_hand(model, "llava", *where), 3)
    assert untied["token_id"].tolist() != tied["token_id"].tolist()


def test_a_layer_norms_bias_and_that_of_the_unembedding_are_no_neurons():
    model = vlm("aya_vision")
    tower, generator = model.hf.model.language_model, torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer_norm = nn.LayerNorm(32, eps=1e-3)
        layer_norm.weight.copy_(torch.randn(32, generator=generator))
        layer_norm.bias.copy_(torch.randn(32, generator=generator))
        tower.norm = layer_norm
        model.hf.lm_head.bias = nn.Parameter(torch.randn(model.hf.lm_head.out_features, generator=generator))

    def formula(site: vn.Site, neuron: int) -> np.ndarray:
        x = column(model, site, neuron)
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-3) * numbers(layer_norm.weight)
        return numbers(model.hf.lm_head.weight) @ x

    agree(model, vn.neuron_writes(model, some(model), k=3), formula, 3)


@pytest.mark.parametrize("name", [name for name in ALL if name != "florence2"])
def test_the_logits_are_those_of_the_models_own_forward_with_the_column_in_the_residual_stream(name):
    model = vlm(name)
    neurons = some(model, 5)
    pairs = [neurons.space.locate(one) for one in neurons.indices.tolist()]
    tower = model.towers["language"]
    behind = BEHIND.get(name)
    rows = []
    for site, number in pairs:
        row = torch.from_numpy(column(model, site, number)).float()
        block = model.hf.get_submodule(tower.layer_paths[site.layer])
        rows.append(row if behind is None else getattr(block, behind)(row))
    final = model.hf.get_submodule(tower.layer_paths[0].rpartition(".layers")[0]).norm
    stream = torch.stack([*rows, torch.zeros_like(rows[0])])[None]
    hook = final.register_forward_pre_hook(lambda *_: (stream,))
    question = vn.Question(vn.testing.tiny_image(), "Which?", ("a", "b"), 0, "A", id="1")
    with torch.no_grad():
        logits = model.hf(**model.prepare(question)).logits[0]
    hook.remove()
    own = numbers(logits[:-1] - logits[-1])
    agree(model, vn.neuron_writes(model, neurons, k=3), lambda site, neuron: own[pairs.index((site, neuron))], 3)


def test_weights_that_are_no_plain_matrix_are_asked_for_their_columns():
    class Eights(nn.Module):
        """Whole numbers with a scale for each row, as int8 quantisation keeps them."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.float() * self.scale).T

    model = vlm("qwen2_5_vl")
    mlp = model.mlp_of("language.layers.1.mlp.post")
    module, few = model.hf.get_submodule(mlp.path), torch.tensor([3, 7])
    whole = written(model.hf, mlp, few)
    module.down_proj = Eights(module.down_proj)
    assert down_of(model.hf, mlp) is None
    quantised = written(model.hf, mlp, few)
    torch.testing.assert_close(quantised, (module.down_proj.weight.float() * module.down_proj.scale).T[few])
    torch.testing.assert_close(quantised, whole, atol=0.02, rtol=0)
    assert not torch.equal(quantised, whole)


def test_an_adapter_is_part_of_what_is_written():
    from peft import LoraConfig, get_peft_model

    hf, processor = tiny_model("qwen2_5_vl")
    before = written(hf, vn.VLM(hf, processor).mlp_of("language.layers.0.mlp.post"), torch.tensor([5]))
    adapted = get_peft_model(hf, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model = vn.VLM(adapted.base_model.model, processor)
    site = "language.layers.0.mlp.post"
    layer = model.hf.get_submodule(model.mlp_of(site).path).down_proj
    change = layer.lora_B.default.weight @ layer.lora_A.default.weight * layer.scaling["default"]
    after = written(model.hf, model.mlp_of(site), torch.tensor([5]))
    torch.testing.assert_close(after - before, change.T[[5]].detach(), atol=1e-5, rtol=0)


def test_nothing_is_left_on_the_model_and_no_neurons_give_an_empty_table(load):
    model = load("qwen2_5_vl")
    before = [len(module._forward_hooks) for module in model.hf.modules()]
    table = vn.neuron_writes(model, vn.NeuronSet.empty(model.space()))
    assert table.columns.tolist() == ["site", "neuron", "direction", "rank", "token", "token_id", "logit"]
    assert len(table) == 0
    assert len(vn.neuron_writes(model, vn.NeuronSet(model.space("language", "up"), [1]), k=1)) == 2
    assert [len(module._forward_hooks) for module in model.hf.modules()] == before


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(load):
    model = load("qwen2_5_vl")
    space = model.space()
    one = vn.NeuronSet(space, [1])
    both = vn.NeuronSet(model.space(["language", "vision"]), [len(model.space()) + 3])
    with pytest.raises(SiteError, match=r"vision\.layers\.0\.mlp\.gate: only the language tower writes into what the"):
        vn.neuron_writes(model, both)
    wide = vn.NeuronSpace.from_widths("language", "gate", [width + 1 for width in space.widths])
    with pytest.raises(MismatchError, match=r"these neurons are not of this model: language\.layers\.0\.mlp\.gate has"):
        vn.neuron_writes(model, vn.NeuronSet(wide, [1]))
    with pytest.raises(AblationError, match="a Selection has a set of neurons for each group; give the one"):
        vn.neuron_writes(model, vn.Selection({"A": one}))
    with pytest.raises(MismatchError, match="neurons is one NeuronSet, such as selection"):
        vn.neuron_writes(model, [one])
    with pytest.raises(MismatchError, match="model is a VLM, such as"):
        vn.neuron_writes(model.hf, one)
    with pytest.raises(SelectionError, match="k 0 is less than 1"):
        vn.neuron_writes(model, one, k=0)
    with pytest.raises(SelectionError, match="k 1000000 is more than the"):
        vn.neuron_writes(model, one, k=10**6)
    florence = vlm("florence2")
    with pytest.raises(ArchitectureError, match="is an encoder-decoder: no final norm to see through"):
        vn.neuron_writes(florence, vn.NeuronSet(florence.space(), [1]))


def test_a_path_to_the_logits_that_is_not_known_is_refused():
    model = vlm("llava")
    one = vn.NeuronSet(model.space(), [1])

    def cubed(_, args, output):
        output.logits = output.logits**3
        return output

    hook = model.hf.register_forward_hook(cubed)
    with pytest.raises(ArchitectureError, match="LlavaForConditionalGeneration changes its logits in a way that is"):
        vn.neuron_writes(model, one)
    hook.remove()
    norm = model.hf.model.language_model.norm
    model.hf.model.language_model.norm = nn.Sequential(norm, nn.Linear(32, 32))
    with pytest.raises(ArchitectureError, match="the unembedding stands something else than one norm"):
        vn.neuron_writes(model, one)


def test_a_model_without_its_weights_is_refused(tiny_folder):
    model = vn.VLM.from_pretrained(tiny_folder("qwen2_5_vl"), weights=False)
    with pytest.raises(ArchitectureError, match="weights are not in memory"):
        vn.neuron_writes(model, vn.NeuronSet(model.space(), [1]))
