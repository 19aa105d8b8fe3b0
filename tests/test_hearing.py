"""Towers that hear, and vision towers that see videos: counted by question, against plain hooks on questions alone.

Processors are those of the models' classes, or made up where these need packages for their features (torchaudio,
mistral-common).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import vlmneurons as vn
from helpers import picture
from small_configs import small_model
from small_processors import TURNS, small_processor, turns
from test_sound_and_video import VIDEO_MODELS, ask, of_video, qwen2_audio, sound, video
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.testing.tiny import tiny_tokenizer
from vlmneurons.testing.tiny.parts import draw_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code, at its default settings
ROUNDING = 4
AUDIO = 11
ALIKE = ("granite_speech", "gemma3n", "gemma4", "qwen3_omni_moe_thinker")
"""The models that hear in a sound what fills it up to the length of others beside it."""


class HearsMadeUp:
    """Makes features of sounds by plain PyTorch, 100 frames a second of 16 bands, and as many placeholders.

    Args:
        shaped: what a model is given of sounds' frames ``[frame, band]``, and how many placeholders each has.
    """

    def __init__(self, shaped: Callable[[list[Tensor]], tuple[dict[str, Tensor], list[int]]]) -> None:
        special = ["<pad>", "<s>", "</s>", *(f"<unused{n}>" for n in range(3, AUDIO)), "<audio>"]
        self.tokenizer = tiny_tokenizer(special, padding_side="left", pad_token="<pad>", eos_token="</s>")
        self.audio_token, self.audio_token_id = "<audio>", AUDIO
        self.feature_extractor, self.shaped = self.frames, shaped
        self.chat_template = TURNS.replace("AUDIO", "<audio>")

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **how: Any) -> str:
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **how)

    def frames(self, values: np.ndarray) -> Tensor:
        whole = torch.from_numpy(values[: len(values) // 160 * 160])
        spectrum = torch.fft.rfft(whole.reshape(-1, 160)).abs()[:, 1:65].reshape(-1, 16, 4).sum(-1)
        return (spectrum + 1e-3).log()

    def __call__(self, text: list[str], audio: Any = (), sampling_rate: int = 0, **how: Any) -> Any:
        inputs, counts = self.shaped([self.frames(one) for one in audio]) if len(audio) else ({}, [])
        left = iter(counts)
        texts = [
            "".join(p + "<audio>" * next(left) for p in one.split("<audio>")[:-1]) + one.split("<audio>")[-1]
            for one in text
        ]
        how.pop("add_special_tokens", None)
        return {**self.tokenizer(texts, add_special_tokens=False, **how), **inputs}


WORDS = {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "vocab_size": 640}


def voxtral() -> tuple[nn.Module, Any]:
    """A Voxtral, whose sounds are filled up to whole pieces of 96 frames."""
    text = {"model_type": "llama", **WORDS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"num_mel_bins": 16, "max_source_positions": 48}
    config = transformers.VoxtralConfig(audio_config=tower, text_config=text, audio_token_id=AUDIO)

    def shaped(sounds: list[Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        pieces = [-(-len(one) // 96) for one in sounds]
        filled = [torch.cat([one, one.new_full((n * 96 - len(one), 16), -7.0)]) for one, n in zip(sounds, pieces)]
        return {"input_features": torch.cat(filled).reshape(-1, 96, 16).transpose(1, 2)}, [24 * n for n in pieces]

    return transformers.VoxtralForConditionalGeneration(config), HearsMadeUp(shaped)


def granite_speech() -> tuple[nn.Module, Any]:
    """A Granite Speech: sounds of a batch are filled up to the longest, which its conformer hears."""
    text = {"model_type": "granite", **WORDS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tower = {
        "input_dim": 16,
        "num_layers": 2,
        "hidden_dim": 32,
        "feedforward_mult": 3,
        "num_heads": 4,
        "output_dim": 20,
    }
    tower |= {"context_size": 8, "max_pos_emb": 16, "conv_kernel_size": 3}
    queries = {"model_type": "blip_2_qformer", "hidden_size": 40, "encoder_hidden_size": 32, "intermediate_size": 56}
    queries |= {"num_attention_heads": 4, "num_hidden_layers": 1, "cross_attention_frequency": 1}
    config = transformers.GraniteSpeechConfig(
        encoder_config=tower, text_config=text, projector_config=queries, audio_token_index=AUDIO,
        has_lora_adapter=False, window_size=6, downsample_rate=2,
    )  # fmt: skip

    def shaped(sounds: list[Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        counts = [-(-len(one) // 6) * 3 for one in sounds]
        features = nn.utils.rnn.pad_sequence(sounds, batch_first=True)
        return {
            "input_features": features,
            "input_features_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None],
        }, counts

    return transformers.GraniteSpeechForConditionalGeneration(config), HearsMadeUp(shaped)


def small(name: str, *, every_tower: bool = False) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        model = small_model(name, every_tower=every_tower)
        return model, small_processor(name, model)

    return build


def _by_mask(name: str, step: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """Which frames of a single question are real: those whose first given frame is."""
    return lambda inputs: inputs[name].bool()[:, ::step]


HEARS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Callable[[dict[str, Tensor]], Tensor] | None]] = {
    "qwen2_audio": (qwen2_audio, _by_mask("feature_attention_mask", 2)),
    "voxtral": (voxtral, None),
    "granite_speech": (granite_speech, None),
    "gemma3n": (small("gemma3n"), _by_mask("input_features_mask", 4)),
    "gemma4": (small("gemma4", every_tower=True), _by_mask("input_features_mask", 4)),
    "qwen2_5_omni_thinker": (small("qwen2_5_omni_thinker"), None),
    "qwen3_omni_moe_thinker": (small("qwen3_omni_moe_thinker"), None),
}


def counts_alone(bare: nn.Module, model: vn.VLM, tower: str, item: vn.Question, real_of: Any) -> tuple[Tensor, int]:
    """How often each neuron fires at real frames or patches of one question, by plain hooks; and how many these are."""
    inputs, seen = dict(model.prepare(item)), []
    mlps = model.towers[tower].mlps
    values: dict[int, list[Tensor]] = {}
    for place, mlp in enumerate(mlps):
        down = bare.get_submodule(mlp.path).get_submodule(mlp.layout.down)
        seen.append(down.register_forward_pre_hook(lambda _, args, p=place: values.setdefault(p, []).append(args[0])))
    with torch.no_grad():
        bare(**inputs)
    for handle in seen:
        handle.remove()
    real, tables, n = None if real_of is None else real_of(inputs), [], set()
    for place in range(len(mlps)):
        parts = [one if real is None else one[real[:, : one.shape[1]]] for one in values[place]]
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        tables.append((flat > 0).sum(0))
        n.add(len(flat))
    assert len(n) == 1
    return torch.cat(tables), n.pop()


@pytest.fixture(scope="module", params=HEARS)
def hearing(request):
    build, real_of = HEARS[request.param]
    torch.manual_seed(0)
    hf, processor = build()
    draw_weights(hf.float().eval())
    torch.manual_seed(0)
    return request.param, vn.VLM(hf, processor), real_of


def questions_of(name: str, n: int = 4) -> vn.QuestionSet:
    seconds = [0.3 + (0.0 if name in ALIKE else 0.4 * number) for number in range(n)]
    heard = [sound(number, seconds[number]) for number in range(n)]
    return vn.QuestionSet(replace(ask(number, audio=heard[number]), group=f"q{number}") for number in range(n))


def test_an_audio_tower_is_counted_by_question_and_no_silence_that_fills_up(hearing):
    name, model, real_of = hearing
    questions = questions_of(name)
    towers = [tower for tower in ("audio", "audio_projector") if tower in model.towers]
    assert "audio" in towers
    for tower in towers:
        space = model.space(tower, "post")
        own = real_of if tower == "audio" else None
        expected = [counts_alone(model.hf, model, tower, item, own) for item in questions]
        for size in (4, 1):
            found = vn.record(model, questions, space, condition="all", batch_size=size, progress=False)
            assert found.tokens.tolist() == [n for _, n in expected]
            off = (found.positive - torch.stack([counts for counts, _ in expected])).abs().sum(1)
            assert int(off.max()) <= ROUNDING
        if tower == "audio":
            with vn.Recorder(model, space) as recorder, torch.no_grad():  # in runs of one's own
                model.hf(**model.prepare(questions))
            assert int((recorder.statistics.positive[0] - found.positive.sum(0)).abs().sum()) <= ROUNDING
    assert len(set(found.tokens.tolist())) > 1 or name in ALIKE


def test_neurons_that_hear_are_selected_and_switched_off(hearing):
    name, model, _ = hearing
    questions = questions_of(name)
    stats = vn.record(model, questions, model.space("audio", "post"), condition="all", batch_size=2, progress=False)
    selection = vn.CAS(0.3).select(stats)
    result = vn.knockout(model, questions, {"CAS": selection}, batch_size=4, progress=False)
    alone = vn.knockout(model, questions, {"CAS": selection}, batch_size=1, progress=False)
    assert np.abs(result.values("margin") - alone.values("margin")).max() < 1e-3
    assert np.ptp(result.values("margin"), axis=0).max() > 1e-4  # what is heard matters
    with torch.no_grad(), vn.Ablation(model, selection["q0"]):
        switched = model.hf(**model.prepare(questions)).logits
    assert (switched - model.hf(**model.prepare(questions)).logits).abs().max() > 1e-4
    with pytest.raises(QuestionError, match=r"counts words; an audio tower has none\. Record it with 'audio'"):
        vn.record(model, questions, model.space("audio"), tokens="text", progress=False)


def test_voxtrals_own_processor_which_is_called_without_sounds_is_refused():
    class Call(transformers.VoxtralProcessor):  # whose tokenizer needs mistral-common
        def __init__(self) -> None:
            made = HearsMadeUp(lambda sounds: ({}, []))
            self.tokenizer, self.feature_extractor, self.audio_token = made.tokenizer, made.frames, "<audio>"

    model = vn.VLM(voxtral()[0], Call(), template=lambda text, n_images, n_sounds=0: f"<audio>{text}")
    told = r"Call takes sounds in its own apply_chat_template alone, where .* called with text= and audio="
    with pytest.raises(QuestionError, match=told):
        model.prepare(questions_of("", 1))
    with pytest.raises(QuestionError, match=told):
        vn.record(model, questions_of("", 2), condition="all", progress=False)


def test_sounds_that_fill_each_other_up_unheard_are_asked_together_or_refused():
    model = vn.VLM(*granite_speech())
    unequal = questions_of("")
    with pytest.raises(QuestionError, match=r"encode sounds of different lengths apart \(batch_size=1\)"):
        vn.record(model, unequal, condition="all", batch_size=4, progress=False)
    assert vn.record(model, unequal, condition="all", batch_size=1, progress=False).items.tolist() == [1] * 4


def test_sounds_of_different_lengths_that_a_model_does_not_keep_apart_are_refused_together():
    torch.manual_seed(0)
    hf, processor = small("qwen3_omni_moe_thinker")()
    draw_weights(hf.float().eval())
    model, unequal = vn.VLM(hf, processor), questions_of("")
    with pytest.raises(
        MismatchError, match=r"answers question 'q\d' otherwise in a batch than alone: .* \(batch_size=1\)"
    ):
        vn.record(model, unequal, condition="all", batch_size=4, progress=False)
    stats = vn.record(model, unequal, model.space("audio", "post"), condition="all", batch_size=1, progress=False)
    assert stats.tokens.tolist() == [counts_alone(hf, model, "audio", item, None)[1] for item in unequal]


def test_a_tower_that_hears_in_an_unknown_way_is_refused_and_a_question_without_sound_counts_nothing():
    model = vn.VLM(*qwen2_audio())
    space, questions = model.space("audio", "post"), questions_of("", 2)
    mixed = [*questions, replace(ask(7), group="none")]
    stats = vn.record(model, mixed, space, condition="all", progress=False)
    assert dict(zip(stats.groups, stats.tokens.tolist()))["none"] == 0
    inputs = model.prepare(questions)
    batch = {**inputs, "feature_attention_mask": inputs["feature_attention_mask"].flip(1)}  # padded in front
    model.hf.config.audio_config.model_type = "some_other"
    message = "audio.layers.0.mlp.post: what this audio tower hears cannot be told apart by question"
    with pytest.raises(MismatchError, match=message):
        vn.record(model, questions, space, condition="all", progress=False)
    model.hf.config.audio_config.model_type = "qwen2_audio_encoder"
    with pytest.raises(MismatchError, match=message), vn.Recorder(model, space), torch.no_grad():
        model.hf(**batch)


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_a_vision_tower_of_videos_is_counted_by_question(name):
    model = vn.VLM(*of_video(name))
    questions = vn.QuestionSet(replace(ask(n, video=video(n, 4 + 2 * (n % 2))), group=f"q{n}") for n in range(4))
    for tower in ("vision", "projector"):
        if tower not in model.towers:
            continue
        space = model.space(tower, "post")
        expected = [counts_alone(model.hf, model, tower, item, None) for item in questions]
        for size in (4, 1):
            found = vn.record(model, questions, space, condition="all", batch_size=size, progress=False)
            assert found.tokens.tolist() == [n for _, n in expected]
            assert int((found.positive - torch.stack([c for c, _ in expected])).abs().sum(1).max()) <= ROUNDING
        still = [replace(questions[0], video=video(9, 1))]
        if name == "qwen3_vl":
            with pytest.raises(
                QuestionError, match=r"the processor refuses it .*t:1 must be larger than temporal_factor"
            ):
                vn.record(model, still, space, condition="all", progress=False)
        else:
            assert int(vn.record(model, still, space, condition="all", progress=False).tokens) > 0
        result = vn.knockout(model, questions, {"CAS": vn.CAS(0.2).select(found)}, progress=False)
        assert result.correct.shape == (5, 4)


def test_pictures_and_videos_of_one_question_are_counted_in_one_tower():
    model = vn.VLM(*of_video("qwen2_5_vl"))
    both = vn.QuestionSet(
        replace(ask(n, video=video(n, 4 + 2 * n)), image=picture(n, 24 + 8 * n, 40), group=f"q{n}") for n in range(3)
    )
    for tower in ("vision", "projector"):
        expected = [counts_alone(model.hf, model, tower, item, None) for item in both]
        found = vn.record(model, both, model.space(tower, "post"), condition="all", batch_size=3, progress=False)
        assert found.tokens.tolist() == [n for _, n in expected]
        assert int((found.positive - torch.stack([counts for counts, _ in expected])).abs().sum(1).max()) <= ROUNDING


def test_templates_show_what_a_processor_has_a_placeholder_for():
    class Names:
        audio_token, video_token = "<a>", None

    assert "<a>" in turns("<i>", Names())
    assert "AUDIO" not in turns("<i>", Names())
