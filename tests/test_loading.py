"""Loading by name: text models, what is told to model and processor alike, and wrapping without a wall of names."""

import logging
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import vlmneurons as vn
from vlmneurons.errors import ArchitectureError
from vlmneurons.model import vlm as module
from vlmneurons.testing import tiny_model


def configurations():
    import transformers as t

    _, processor = tiny_model("llava_next_qwen2")
    tokenizer = processor.tokenizer
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    usual = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {**usual, "num_key_value_heads": 2}
    return tokenizer, {
        "llama": t.LlamaConfig(**grouped, **vocabulary),
        "qwen3": t.Qwen3Config(**grouped, head_dim=8, **vocabulary),
        "gpt2": t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **vocabulary),
        "opt": t.OPTConfig(hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, **vocabulary),
        "gpt_neox": t.GPTNeoXConfig(**usual, **vocabulary),
        "gemma2": t.Gemma2Config(**grouped, head_dim=8, **vocabulary),
        "mixtral": t.MixtralConfig(**grouped, num_local_experts=3, **vocabulary),
        "t5": t.T5Config(
            d_model=32, d_ff=40, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0, **vocabulary
        ),
    }


NAMES = ("llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma2", "mixtral")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a name to a folder with a small text model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tokenizer, configs = configurations()
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            auto = AutoModelForSeq2SeqLM if configs[name].is_encoder_decoder else AutoModelForCausalLM
            torch.manual_seed(0)
            auto.from_config(configs[name]).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]

    return folder


QUESTIONS = [
    vn.Question(None, f"What is city {i}?", ("Cairo", "Paris", "Rome"), i % 3, "AB"[i % 2], id=f"q{i}")
    for i in range(6)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_model_is_loaded_with_its_tokenizer_and_runs_the_whole_way(saved, name, caplog):
    with caplog.at_level(logging.WARNING):
        model = vn.VLM.from_pretrained(saved(name), template="plain")
    assert "Supported models" not in caplog.text
    assert model.processor is model.tokenizer
    assert "language" in model.towers
    stats = vn.record(model, QUESTIONS, condition="all", batch_size=4, progress=False)
    selection = vn.CAS(fraction=0.05).select(stats)
    result = vn.knockout(model, QUESTIONS, {"CAS": selection}, batch_size=4, progress=False)
    assert result.chosen.shape[1] == len(QUESTIONS)
    batch = model.prepare(QUESTIONS[:2])
    texts = model.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert all(item.question in text for item, text in zip(QUESTIONS, texts))
    if name != "mixtral":
        with model.trace(**batch):
            post = model.language.layers[0].mlp.post.save()
        assert post.numel() == batch["input_ids"].numel() * model.space().widths[0]  # OPT's lie flat


def test_the_counts_of_a_text_model_are_those_of_plain_hooks(saved):
    model = vn.VLM.from_pretrained(saved("llama"), template="plain")
    kept = []
    hook = model.hf.model.layers[1].mlp.act_fn.register_forward_hook(lambda _, args, out: kept.append(out))
    expected = torch.zeros(40, dtype=torch.int64)
    try:
        for item in QUESTIONS:
            with torch.inference_mode():
                model.hf(**model.tokenizer(model.encoder.render(item.question, 0), return_tensors="pt"))
            expected += (kept.pop() > 0).sum((0, 1)).long()
    finally:
        hook.remove()
    asked = vn.QuestionSet(QUESTIONS, prompt=lambda question, options: question.question)
    stats = vn.record(model, asked, condition="all", batch_size=3, progress=False)
    assert stats.positive.sum(0)[40:].tolist() == expected.tolist()


STRING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As text models have it: a message's content is a string, and a list of parts is an error."""


def cities(group):
    places = {"Egypt": "Cairo", "France": "Paris", "India": "Delhi", "Japan": "Tokyo"}
    for number in range(24):
        others = [place for other, place in places.items() if other != group]
        yield vn.Question(
            None, f"Which city is bus {number} from?", (places[group], *others), 0, group, id=f"{group}{number}"
        )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_lines_of_the_readme_run_with_a_text_model_and_questions_without_pictures(
    saved, name, tmp_path, monkeypatch, capsys
):
    if name == "qwen3":
        tokenizer = AutoTokenizer.from_pretrained(saved(name))
        tokenizer.chat_template = STRING_TEMPLATE
        tokenizer.save_pretrained(saved(name))
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block.count("model, questions = vn.load_demo()\n") == 1
    how = ', template="plain"' if name == "llama" else ""
    lines = block.replace(
        "model, questions = vn.load_demo()\n",
        f'model, questions = vn.VLM.from_pretrained("{saved(name).as_posix()}"{how}), vn.QuestionSet(asked)\n',
    )
    assert len(set(lines.splitlines()) ^ set(block.splitlines())) == 2  # one line by another, and nothing else
    (tmp_path / "lines.py").write_text(lines, encoding="utf-8")
    asked = [item for group in ("Egypt", "France", "India", "Japan") for item in cities(group)]
    threads = torch.get_num_threads()
    there = runpy.run_path(str(tmp_path / "lines.py"), init_globals={"asked": asked})
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    model, stats, culture, result = (there[one] for one in ("model", "stats", "culture", "result"))
    assert type(model.hf).__name__.endswith("ForCausalLM")
    assert stats.groups == ("Egypt", "France", "India", "Japan")
    assert set(map(len, culture.values())) == {int(0.02 * 80)}
    assert result.summary().groupby("selector").size().to_dict() == {"CAS": 5, "random": 5}
    assert "self_effect" in printed
    clean = result.accuracy  # and by another way: what the untouched model answers, letter by letter
    evaluate, reader = there["evaluate"], vn.Letters()
    with torch.no_grad():
        parts = [evaluate[row : row + 1] for row in range(len(evaluate))]
        right = [int(reader.read(model, one, reader.encode(model, one)).chosen[0]) == one[0].answer for one in parts]
    for group in stats.groups:
        own = [is_right for is_right, item in zip(right, evaluate, strict=True) if item.group == group]
        assert clean[group] == sum(own) / len(own)


def test_an_encoder_decoder_is_loaded_whole_and_generates(saved):
    model = vn.VLM.from_pretrained(saved("t5"), template="plain")
    assert type(model.hf).__name__ == "T5ForConditionalGeneration"
    reader, questions = vn.Generate(max_new_tokens=2), vn.QuestionSet(QUESTIONS[:2])
    assert len(reader.read(model, questions, reader.encode(model, questions)).texts) == 2


def test_a_text_model_has_sites_without_weights(saved):
    model = vn.VLM.from_pretrained(saved("qwen3"), weights=False, local_files_only=True)
    assert len(model.language) == 2
    assert model.hf.model.layers[0].mlp.up_proj.weight.device.type == "meta"


def test_what_no_class_knows_is_refused_in_a_few_words(tmp_path):
    from transformers import CLIPVisionConfig

    tokenizer, _ = configurations()
    tokenizer.save_pretrained(tmp_path)
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ArchitectureError, match=r"None of AutoModelForImageTextToText.*knows it: load it yourself"
    ) as told:
        vn.VLM.from_pretrained(tmp_path)
    assert len(str(told.value)) < 500


# -- what both are told ------------------------------------------------------------------------------------------------

SHARED = {
    "token": "hf_x",
    "cache_dir": "/scratch/hf",
    "local_files_only": True,
    "force_download": True,
    "subfolder": "sub",
    "proxies": {"https": "x"},
    "code_revision": "abc",
}


class Reached(Exception):
    pass


def calls_of(monkeypatch, **how):
    """What processor, configuration and model are loaded with."""
    seen = {}

    class Recording:
        def __init__(self, name, stop):
            self.name, self.stop = name, stop

        def from_pretrained(self, name, **given):
            seen[self.name] = given
            if self.stop:
                raise Reached
            return object()

    monkeypatch.setattr(module, "AutoProcessor", Recording("processor", False))
    monkeypatch.setattr(module, "AutoConfig", Recording("config", True))
    monkeypatch.setattr(module, "AutoModelForImageTextToText", Recording("model", True))
    with pytest.raises(Reached):
        vn.VLM.from_pretrained("org/gated", **how)
    return seen


@pytest.mark.parametrize("name", SHARED)
def test_where_files_come_from_is_told_to_model_processor_and_configuration(monkeypatch, name):
    seen = calls_of(monkeypatch, **{name: SHARED[name]}, dtype="auto")
    assert seen["model"] == {"trust_remote_code": False, name: SHARED[name], "dtype": "auto"}
    assert seen["processor"] == {"trust_remote_code": False, name: SHARED[name]}
    seen = calls_of(monkeypatch, **{name: SHARED[name]}, weights=False)
    assert seen["config"] == seen["processor"] == {"trust_remote_code": False, name: SHARED[name]}


def test_revision_and_trust_are_told_to_both_and_the_processors_own_arguments_win(monkeypatch):
    seen = calls_of(
        monkeypatch, revision="abc", trust_remote_code=True, token="a", processor_kwargs={"token": "b", "max_pixels": 5}
    )
    assert seen["model"] == {"trust_remote_code": True, "revision": "abc", "token": "a"}
    assert seen["processor"] == {"trust_remote_code": True, "revision": "abc", "token": "b", "max_pixels": 5}


def test_arguments_without_an_effect_on_no_weights_are_refused():
    with pytest.raises(ArchitectureError, match="weights=False loads nothing that dtype could apply to"):
        vn.VLM.from_pretrained("org/x", weights=False, dtype="auto", token="x")


# -- wrapping ----------------------------------------------------------------------------------------------------------


def test_a_model_of_another_class_is_wrapped_without_a_list_of_all_classes(caplog):
    hf, processor = tiny_model("llava_next_qwen2")

    class Mine(type(hf)):
        pass

    hf.__class__ = Mine
    with caplog.at_level(logging.DEBUG, logger="transformers"):
        vn.VLM(hf, processor)
        logging.getLogger("transformers.pipelines.base").error("another message")
    assert "Supported models" not in caplog.text
    assert not logging.getLogger("transformers.pipelines.base").filters


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_a_model_that_runs_as_copies_is_refused(kind):
    hf, processor = tiny_model("llava_next_qwen2")
    copies = kind.__new__(kind)
    nn.Module.__init__(copies)
    copies.module = hf
    with pytest.raises(ArchitectureError, match=rf"{kind.__name__} runs copies of it.*Give VLM\(model.module"):
        vn.VLM(copies, processor)
