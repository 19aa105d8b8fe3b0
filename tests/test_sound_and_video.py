"""Questions with sounds and videos: every form, every error, and through the models that take them."""

import csv
import io
import json
import wave
from dataclasses import replace
from itertools import combinations

import datasets
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

import vlmneurons as vn
from helpers import picture
from vlmneurons.errors import QuestionError
from vlmneurons.run.masked import read_masked
from vlmneurons.run.readers import Letters, TextLikelihood
from vlmneurons.study.controls import blind, options_only
from vlmneurons.testing.tiny import tiny_model, tiny_tokenizer
from vlmneurons.testing.tiny.parts import draw_weights, finish, text_config

FOUR = ("Tea", "Rice", "Bread", "Soup")
RATE = 16_000


def ask(n: int = 0, **shown) -> vn.Question:
    return vn.Question(None, f"What is {n}?" + " word" * n, FOUR, n % 4, "AB"[n % 2], id=f"q{n}", **shown)


def tone(seconds: float = 0.2, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def sound(seed: int = 0, seconds: float = 0.25, rate: int = RATE) -> dict:
    values = np.random.default_rng(seed).standard_normal(round(seconds * rate)) * 0.1
    return {"array": values.astype(np.float32), "sampling_rate": rate}


def wav(values: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    """A WAV file of values in [-1, 1), written by the standard library."""
    whole = np.round(np.repeat(values, channels) * 2 ** (8 * width - 1)).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    data = b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in whole)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()


def video(seed: int = 0, frames: int = 4, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def gif(frames: int, milliseconds: int) -> bytes:
    """A moving picture whose frames are grey, each lighter than the one before."""
    shown = [Image.new("L", (8, 8), 10 * n) for n in range(frames)]
    buffer = io.BytesIO()
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=milliseconds)
    return buffer.getvalue()


# -- sounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("how", ["bytes", "path", "text", "function", "mapping"])
def test_a_wav_file_is_read_without_a_decoder_at_every_width(tmp_path, width, channels, how):
    data = wav(tone(), width=width, channels=channels)
    (tmp_path / "a.wav").write_bytes(data)
    path = tmp_path / "a.wav"
    source = {"bytes": data, "path": path, "text": str(path), "function": lambda: data}.get(
        how, {"bytes": data, "path": None}
    )
    (heard,) = ask(audio=source).load_audio(RATE)
    assert heard.dtype == np.float32
    assert heard.shape == tone().shape
    assert np.abs(heard - tone()).max() <= 2.0 ** (1 - 8 * width)


def test_arrays_of_every_kind_become_one_channel_at_the_rate_that_is_asked_for():
    values = tone()
    whole = np.round(values * 2**15).astype(np.int16)
    for array in (
        values,
        values.astype(np.float64),
        values.tolist(),
        whole,
        np.stack([values, values]),
        np.stack([values] * 2, 1),
    ):
        (heard,) = ask(audio={"array": array, "sampling_rate": RATE}).load_audio(RATE)
        assert np.abs(heard - values).max() < 1e-4
    (slow,) = ask(audio={"array": tone(1.0, 48_000), "sampling_rate": 48_000}).load_audio(RATE)
    middle = slice(1000, 15_000)  # away from the ends, where a filter has nothing to look at
    assert np.abs(slow[middle] - tone(1.0)[middle]).max() < 2e-3
    two = ask(audio=[sound(1), sound(2)])
    assert (len(two.load_audio(RATE)), two.n_media, two.n_images) == (2, (0, 2, 0), 0)
    assert ask(audio=[]).audio is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(4), r"audio: an array needs its sampling rate: \{'array': …, 'sampling_rate': …\}"),
        ({"array": np.zeros(4)}, "audio: an array of a sound needs its 'sampling_rate', in values a second"),
        (3, r"audio: a sound is a path, bytes, \{'array', 'sampling_rate'\} or a function; got int"),
        ("", "audio: a sound is a path, bytes"),
        ([sound(), None], "audio: a sound is a path, .* got NoneType"),
        ({}, "audio: a sound is a path, .* got dict"),
    ],
    ids=range(6),
)
def test_what_is_no_sound_is_refused_when_the_question_is_made(given, message, unchecked):
    with pytest.raises(QuestionError, match=f"question 'q0': {message}"):
        ask(audio=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.wav", r"the sound 'nowhere.wav' cannot be opened \(FileNotFoundError"),
        (
            {"array": np.zeros(0), "sampling_rate": RATE},
            r"the sound 'dict' cannot be opened \(ValueError: a sound is an array",
        ),
        ({"array": np.array([np.nan]), "sampling_rate": RATE}, "of finite values"),
        (lambda: None, "the sound 'function' cannot be opened .* a sound is a path"),
        (b"ID3\x04no wave", r"\(ImportError: this file is no plain WAV, .* pip install 'vlmneurons\[audio\]', or give"),
        (wav(tone())[:20], "the sound 'bytes' cannot be opened"),
    ],
    ids=range(6),
)
def test_a_sound_that_cannot_be_opened_names_its_question(given, message, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(QuestionError, match=f"question 'q0': .*{message}"):
        ask(audio=given).load_audio(RATE)


def test_other_sounds_are_read_by_soundfile_where_it_is_installed(monkeypatch):
    class Soundfile:
        @staticmethod
        def read(file, dtype, always_2d):
            assert (file.read(), dtype, always_2d) == (b"fLaC", "float64", True)
            return np.stack([tone(), -tone()], 1), RATE

    monkeypatch.setitem(__import__("sys").modules, "soundfile", Soundfile)
    (heard,) = ask(audio=b"fLaC").load_audio(RATE)
    assert np.array_equal(heard, np.zeros_like(tone()))


def test_a_wav_of_floats_is_not_read_as_integers_by_a_python_that_opens_it(monkeypatch):
    class Soundfile:
        @staticmethod
        def read(file, dtype, always_2d):
            return np.frombuffer(file.read()[-4 * len(tone()) :], "<f4").astype(float)[:, None], RATE

    with io.BytesIO() as file, wave.open(file, "wb") as writer:
        writer.setparams((1, 4, RATE, 0, "NONE", ""))
        writer.writeframes(tone().astype("<f4").tobytes())
        floats = file.getvalue()
    # Python before 3.15 opens no file that says it holds floats; from then on getformat tells them.
    monkeypatch.setattr(wave.Wave_read, "getformat", lambda sound: 3, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", Soundfile)
    (heard,) = ask(audio=floats).load_audio(RATE)
    assert np.array_equal(heard, tone().astype(np.float32))


# -- videos ------------------------------------------------------------------------------------------------------------


def test_arrays_and_lists_of_frames_are_seen_whole():
    frames = video(3)
    pictures = [Image.fromarray(frame) for frame in frames]
    for given in (frames, pictures, tuple(pictures), list(frames), lambda: frames, lambda: pictures):
        item = ask(video=given)
        assert item.n_media == (0, 0, 1)
        assert np.array_equal(item.load_videos()[0], frames)
    several = ask(video=[video(1), pictures, video(2, 6)])
    assert [len(one) for one in several.load_videos()] == [4, 4, 6]
    assert several.n_frames == (4, 4, 6)


def test_of_a_moving_picture_two_frames_a_second_are_seen_and_never_more_than_64():
    def greys(data):
        return [int(frame[0, 0, 0]) for frame in ask(video=data).load_videos()[0]]

    assert greys(gif(20, 100)) == [20, 70, 120, 170]  # 2 s: at 0.25, 0.75, 1.25 and 1.75
    assert greys(gif(3, 100)) == [0, 20]  # at least two
    assert len(greys(gif(25, 4000))) == 25  # no frame twice
    assert len(ask(video=gif(25, 40)).load_videos()[0]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            np.zeros((4, 4, 3), np.uint8),
            r"video: a video is an array \[frame, height, width, 3\] of uint8; got uint8 \(4, 4, 3\)",
        ),
        (np.zeros((2, 4, 4, 3)), r"got float64 \(2, 4, 4, 3\)"),
        (picture(), "video: a video is a path, bytes, an array, a list of its frames or a function; got"),
        (3, "got int"),
        ([video(), 3], "got int"),
        ([None], "got NoneType"),
    ],
    ids=range(6),
)
def test_what_is_no_video_is_refused_when_the_question_is_made(given, message, unchecked):
    with pytest.raises(QuestionError, match=f"question 'q0': .*{message}"):
        ask(video=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.mp4", r"the video 'nowhere.mp4' cannot be opened \(FileNotFoundError"),
        (
            b"no video",
            r"\(ImportError: this file needs the package av: pip install 'vlmneurons\[video\]', or give the frames",
        ),
        ([picture(0), picture(1, 8, 8)], r"the frames of a video have one size; got \[\(8, 8\), \(24, 32\)\]"),
        (lambda: 3, "the video 'function' cannot be opened"),
    ],
    ids=range(4),
)
def test_a_video_that_cannot_be_opened_names_its_question(given, message, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(QuestionError, match=f"question 'q0': .*{message}"):
        ask(video=given).load_videos()


def test_what_is_heard_and_seen_identifies_a_question():
    items = [
        ask(),
        ask(audio=sound(1)),
        ask(audio=sound(2)),
        ask(audio={**sound(1), "sampling_rate": 8000}),
        ask(video=video(1)),
    ]
    items += [
        ask(video=video(2)),
        ask(video=video(1), audio=sound(1)),
        ask(audio=[sound(1), sound(2)]),
        ask(audio=wav(tone())),
    ]
    derived = [replace(item, id="") for item in items]
    assert len({item.id for item in derived}) == len({item.image_key for item in items}) == len(items)
    assert replace(items[1], audio=sound(1)) == items[1] != items[2]
    assert replace(items[4], video=video(1)) == items[4] != items[5]
    shared = [ask(n, audio=sound(n // 3)) for n in range(30)]
    first, second = vn.QuestionSet(shared).split(seed=0)
    assert not {item.image_key for item in first} & {item.image_key for item in second}
    assert len(first) + len(second) == 30
    named = [replace(item, id=str(n)) for n, item in enumerate(items)]
    for questions in (blind(vn.QuestionSet(named)), options_only(vn.QuestionSet([items[6]]))):
        assert not any(item.sources for item in questions)


# -- tables ------------------------------------------------------------------------------------------------------------


def row(**more) -> dict:
    return {"question": "What?", "options": FOUR, "answer": 1, "group": "A", **more}


def test_folders_and_datasets_have_columns_of_sounds_and_videos(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(tone()))
    (tmp_path / "b.gif").write_bytes(gif(20, 100))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "video", "question", "A", "B", "answer", "group"])
        table.writerows([["a.wav", "", "Q1?", "x", "y", "A", "g"], ["", "b.gif", "Q2?", "x", "y", "A", "g"]])
        table.writerow([json.dumps(["a.wav", "a.wav"]), "b.gif", "Q3?", "x", "y", "A", "g"])
    questions = vn.QuestionSet.from_folder(tmp_path)
    assert [item.n_media for item in questions] == [(0, 1, 0), (0, 0, 1), (0, 2, 1)]
    assert np.abs(questions[0].load_audio(RATE)[0] - tone()).max() < 1e-4
    assert len(questions[1].load_videos()[0]) == 4
    undecoded = datasets.Audio(decode=False)
    made = datasets.Dataset.from_list(
        [row(speech={"bytes": wav(tone()), "path": "a.wav"}), row(speech=None, question="And now?")]
    )
    for form in (undecoded, datasets.Audio()):
        dataset = made.cast_column("speech", form)
        questions = vn.QuestionSet.from_dataset(dataset, columns={"audio": "speech"})
        assert [item.n_media for item in questions] == [(0, 1, 0), (0, 0, 0)]
        assert np.abs(questions[0].load_audio(RATE)[0] - tone()).max() < 1e-4
        message = r"row 0, column 'speech' holds a sound, .* asked without: give columns=\{'audio': 'speech'\}"
        with pytest.raises(QuestionError, match=message):
            vn.QuestionSet.from_dataset(dataset)
    rows = [row(audio=sound(1)), row(video=video(1)), row(video=[picture(0), picture(1)], image=picture(2))]
    questions = vn.QuestionSet.from_rows([{**one, "id": n} for n, one in enumerate(rows)])
    assert [item.n_media for item in questions] == [(0, 1, 0), (0, 0, 1), (1, 0, 1)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"speech": "a.wav"}, r"row 1, column 'speech' holds a sound, 'a\.wav', .* give columns=\{'audio': 'speech'\}"),
        ({"clip": "b.mp4"}, r"row 1, column 'clip' holds a video, 'b\.mp4', .* give columns=\{'video': 'clip'\}"),
        ({"audio": "nowhere.wav"}, r"row 1, column 'audio': the sound '.*nowhere\.wav' is not there"),
        ({"video": "../b.mp4"}, r"row 1, column 'video': the picture's path '\.\./b\.mp4' leads out of the folder"),
        ({"audio": {"bytes": None, "path": None}}, "row 1, column 'audio': a sound is empty"),
        ({"audio": [3]}, "row 1, column 'audio': a sound is a path, .* got int"),
        ({"audio": "https://example.org/a.mp3"}, "row 1, column 'audio': .* is elsewhere, and nothing is fetched"),
    ],
    ids=range(7),
)
def test_sounds_and_videos_that_would_be_dropped_or_cannot_be_opened_are_refused_by_row(tmp_path, more, message):
    for name in ("a.wav", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "t.jsonl").write_text(json.dumps(row(**more)))
    with pytest.raises(QuestionError, match=message):
        vn.QuestionSet.from_folder(tmp_path)


# -- models ------------------------------------------------------------------------------------------------------------


def qwen2_audio():
    """As Qwen/Qwen2-Audio-7B-Instruct, small."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    names = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    tokenizer = tiny_tokenizer(special, **roles, extra_special_tokens=names)
    features = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, hop_length=160, chunk_length=2, n_fft=400)
    tower = Qwen2AudioEncoderConfig(
        num_mel_bins=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        d_model=32,
        max_source_positions=100,
    )
    config = Qwen2AudioConfig(
        audio_config=tower.to_dict(),
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(feature_extractor=features, tokenizer=tokenizer)
    return finish(Qwen2AudioForConditionalGeneration(config), tokenizer), processor


def of_video(name: str):
    """A small model of the library's whose template shows videos, as the released ones' do."""
    hf, processor = tiny_model(name)
    shown = "<|vision_start|><|video_pad|><|vision_end|>" if "qwen" in name else "<video>"
    if "qwen" in name:
        small = {"shortest_edge": 64, "longest_edge": 4096}
        processor.video_processor.size = type(processor.video_processor.size)(**small)
        processor.video_processor.cap_pixels_per_frame = False
    if "video" not in processor.chat_template:
        text = "{% elif part['type'] == 'text' %}"
        before = "{% elif part['type'] == 'video' %}" + shown + text
        processor.chat_template = processor.chat_template.replace(text, before)
        loop = "{% for part in message['content'] if part['type'] == 'text' %}"
        videos = "{% for part in message['content'] if part['type'] == 'video' %}" + shown + "\n{% endfor %}"
        processor.chat_template = processor.chat_template.replace(loop, videos + loop)
    return hf, processor


@pytest.fixture(scope="module")
def audio_model():
    return vn.VLM(*qwen2_audio())


COUNTS_FRAMES = Version(transformers.__version__) < Version("5.23")
"""Whether SmolVLM's processor takes the frames of a video for videos, and refuses it."""
SMOLVLM = pytest.param(
    "smolvlm", marks=pytest.mark.skipif(COUNTS_FRAMES, reason="SmolVLM's processor takes frames for videos")
)
VIDEO_MODELS = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", SMOLVLM)


@pytest.fixture(scope="module", params=VIDEO_MODELS)
def video_model(request):
    return vn.VLM(*of_video(request.param))


def check_rules(model: vn.VLM, questions: vn.QuestionSet, kind: str, placeholder: str) -> None:
    """The rules of tokens against the tokens themselves."""
    batch = model.prepare(questions)
    ids = batch["input_ids"]
    theirs = batch.tokens.counted(kind)
    assert torch.equal(theirs, ids == model.tokenizer.convert_tokens_to_ids(placeholder))
    assert theirs.any(1).all()
    text = batch.tokens.counted("text")
    assert torch.equal(batch.tokens.counted("content"), text | theirs)
    for other in {"image", "audio", "video"} - {kind}:
        assert not batch.tokens.counted(other).any()
    for number, item in enumerate(questions):
        words = model.tokenizer.decode(ids[number][text[number]])
        shown = [item.options[index] for index in questions.order(item)]
        assert words.strip() == questions.prompt(item, shown).strip()
    stats = vn.record(model, questions, condition="all", tokens=kind, progress=False)
    assert int(stats.tokens.sum()) == int(theirs.sum())


def test_questions_with_sounds_are_asked_recorded_and_knocked_out(audio_model):
    model = audio_model
    questions = vn.QuestionSet(ask(n, audio=sound(n, 0.2 + 0.1 * n, 8000 * (1 + n % 2))) for n in range(4))
    check_rules(model, questions, "audio", "<|AUDIO|>")
    for side in ("left", "right"):
        batch = model.prepare(questions, padding_side=side)
        logits = model.hf(**batch).logits
        for row, item in enumerate(questions):
            alone = model.prepare([item])
            assert torch.equal(batch["input_ids"][row][batch.tokens.attention[row]], alone["input_ids"][0])
            single = model.hf(**alone).logits[0, -1]
            assert (logits[row, batch.tokens.last[row]] - single).abs().max() < 1e-4
    parts = [vn.record(model, [item], condition="all", progress=False) for item in questions]
    assert vn.record(model, questions, condition="all", batch_size=4, progress=False) == sum(parts)
    counted = {}
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda _, a, out, n=n: counted.__setitem__(n, out.detach()))
        for n, layer in enumerate(model.hf.model.language_model.layers)
    ]
    batch = model.prepare(questions)
    with torch.no_grad():
        model.hf(**batch)
    for handle in handles:
        handle.remove()
    content = batch.tokens.counted("content")
    expected = torch.cat([(counted[n] > 0)[content].sum(0) for n in sorted(counted)])
    stats = vn.record(model, questions, condition="all", progress=False)
    assert torch.equal(stats.positive.sum(0), expected)
    for answer in ("letters", "text", "generate"):
        masks = {"x": vn.NeuronSet(model.space(), range(40))}
        assert vn.knockout(model, questions.asked(answer=answer), masks, progress=False).correct.shape == (2, 4)
    two = model.prepare(ask(7, audio=[sound(1), sound(2, 0.5)]))
    one = [int(model.prepare(ask(7, audio=one)).tokens.counted("audio").sum()) for one in (sound(1), sound(2, 0.5))]
    assert int(two.tokens.counted("audio").sum()) == sum(one)
    other = model.prepare(ask(0, audio=sound(9)))
    assert not torch.equal(other["input_features"], model.prepare(ask(0, audio=sound(8)))["input_features"])


def test_questions_with_videos_are_asked_recorded_and_knocked_out(video_model):
    model = video_model
    name = type(model.hf).__name__
    questions = vn.QuestionSet(ask(n, video=video(n, 4 + 2 * (n % 2))) for n in range(4))
    alike = vn.QuestionSet(ask(n, video=video(n, 4)) for n in range(3))
    placeholder = {"Qwen": "<|video_pad|>", "Llav": "<video>"}.get(name[:4])
    if placeholder is None:  # frames are shown as pictures
        placeholder = model.tokenizer.convert_ids_to_tokens(int(model.hf.config.image_token_id))
    check_rules(model, alike, "video", placeholder)
    parts = [vn.record(model, [item], condition="all", progress=False) for item in questions]
    assert vn.record(model, questions, condition="all", batch_size=4, progress=False) == sum(parts)
    stats = vn.record(model, questions, condition="all", progress=False)
    other = vn.record(
        model, [replace(q, video=video(90 + n, 4)) for n, q in enumerate(questions)], condition="all", progress=False
    )
    assert not torch.equal(stats.positive, other.positive)  # what is seen matters
    masks = {"x": vn.NeuronSet(model.space(), range(40))}
    assert vn.knockout(model, questions, masks, progress=False).correct.shape == (2, 4)
    seen = vn.record(model, questions, model.space("vision"), condition="all", progress=False)
    assert (seen.tokens > 0).all()  # by question, see test_hearing.py


def alike_but_for(kind: str) -> vn.QuestionSet:
    """Questions of the same words and options, about sounds, or videos, of the same length."""
    heard = [{"array": tone(0.3, pitch=300.0 * 2**n), "sampling_rate": RATE} for n in range(4)]
    shown = [{"audio": heard[n]} if kind == "sound" else {"video": video(n)} for n in range(4)]
    items = [vn.Question(None, "What is it?", FOUR, 0, "AB"[n % 2], id=f"q{n}", **one) for n, one in enumerate(shown)]
    return vn.QuestionSet(items, shuffle=None)


@pytest.mark.parametrize("answer", ["letters", "text"])
@pytest.mark.parametrize("kind", ["sound", *VIDEO_MODELS])
def test_questions_that_differ_in_their_sounds_or_videos_alone_share_nothing_under_masks(kind, answer):
    """Their placeholders are the same tokens: whatever computes what rows share once must not take them for shared."""
    model = vn.VLM(*(qwen2_audio() if kind == "sound" else of_video(kind)))
    draw_weights(model.hf)  # else what is heard hardly matters
    questions = alike_but_for(kind).asked(answer=answer)
    space = model.space("language", "post")
    masks = [vn.NeuronSet(space, range(start, len(space), 7)) for start in range(3)]
    reader, own, scores = Letters() if answer == "letters" else TextLikelihood(), [], []
    with torch.no_grad():
        encoded = reader.encode(model, questions)
        together = list(read_masked(model, reader, questions, encoded, [vn.Ablation(model, one) for one in masks]))
        for mask, reading in zip(masks, together, strict=True):
            with vn.Ablation(model, mask):
                parts = [questions[row : row + 1] for row in range(4)]
                alone = [reader.read(model, part, reader.encode(model, part)) for part in parts]
            own.append(torch.cat([one.scores for one in alone]))
            scores.append(reading.scores)
    assert (torch.stack(scores) - torch.stack(own)).abs().max() < 1e-3
    assert min((one - other).abs().max() for one, other in combinations(own[0], 2)) > 1e-2  # what they show matters
    result = vn.knockout(model, questions, {"x": masks[0], "y": masks[1]}, batch_size=4, progress=False)
    single = vn.knockout(model, questions, {"x": masks[0], "y": masks[1]}, batch_size=1, progress=False)
    assert (result.chosen == single.chosen).all()


def test_videos_and_pictures_of_one_question_are_told_apart_or_refused():
    qwen, smol = (vn.VLM(*of_video(name)) for name in ("qwen2_5_vl", "smolvlm"))
    both = vn.Question(picture(0), "What?", FOUR, 0, "A", id="both", video=video(0))
    tokens = qwen.prepare(both).tokens
    alone = [qwen.prepare(replace(both, **{kind: None})).tokens for kind in ("video", "image")]
    assert int(tokens.counted("image").sum()) == int(alone[0].counted("image").sum()) > 0
    assert int(tokens.counted("video").sum()) == int(alone[1].counted("video").sum()) > 0
    if COUNTS_FRAMES:
        with pytest.raises(QuestionError, match=r"the processor refuses it .* videos in the text .1. and videos .4. "):
            smol.prepare(ask(0, video=video(0, 4)))
        return
    with pytest.raises(
        QuestionError, match=r"takes a video's frames as pictures, which cannot be told from .* 'both': ask"
    ):
        smol.prepare(both)
    with pytest.raises(QuestionError, match=r"encode videos with different numbers of frames apart \(batch_size=1\)"):
        smol.prepare([ask(0, video=video(0, 4)), ask(1, video=video(1, 6))])


def test_models_and_processors_that_take_no_sound_or_video_refuse_it_before_any_forward(load, audio_model):
    forwards = []
    whole = load("llava_next_qwen2")
    cases = [
        (
            whole,
            {"audio": sound()},
            "the questions have audio, and LlavaNextProcessor, the VLM's processor, takes no sounds",
        ),
        (
            whole,
            {"video": video()},
            "the questions have video, and LlavaNextProcessor, the VLM's processor, takes no videos",
        ),
        (audio_model, {"video": video()}, "the questions have video, and Qwen2AudioProcessor, .* takes no videos"),
        (audio_model, {"image": picture()}, "the questions show pictures, and Qwen2AudioProcessor, .* takes none"),
    ]
    for model, shown, message in cases:
        handle = model.hf.register_forward_pre_hook(lambda *_: forwards.append(1))
        item = replace(ask(), **shown)
        for run in (model.prepare, lambda q, m=model: vn.record(m, [q], condition="all", progress=False)):
            with pytest.raises(QuestionError, match=message):
                run(item)
        handle.remove()
    assert not forwards
    with pytest.raises(QuestionError, match="questions with and without a sound or video cannot share a batch"):
        audio_model.prepare([ask(0, audio=sound()), ask(1)])
    mixed = [ask(n, audio=None if n % 2 else sound(n)) for n in range(4)]
    stats = vn.record(audio_model, mixed, condition="all", progress=False)  # which puts them into batches of their own
    assert stats.items.tolist() == [2, 2]


NO_ROOM = "the template function has no place for the questions' {}"
NONE = "takes {0}: VLM\\(model, AutoProcessor.* to ask without {1}: vlmneurons.study.controls.blind"
SHOWN = {
    "a sound": {"audio": sound()},
    "a video": {"video": video()},
    "two pictures": {"image": [picture(0), picture(1)]},
    "nothing": {},
}


def two_arguments(text: str, n_images: int) -> str:
    return "<image>" * n_images + text


@pytest.mark.parametrize(
    ("name", "template", "shown", "message"),
    [
        ("audio", two_arguments, "a sound", NO_ROOM.format("sounds")),
        ("audio", two_arguments, "a video", NONE.format("no videos", "videos")),
        ("audio", two_arguments, "two pictures", NONE.format("none", "pictures")),
        ("audio", "plain", "a video", NONE.format("no videos", "videos")),
        ("audio", "plain", "a sound", "has no place for sounds and videos; give"),
        ("qwen2_5_vl", two_arguments, "a sound", NONE.format("no sounds", "sounds")),
        ("qwen2_5_vl", two_arguments, "a video", NO_ROOM.format("videos")),
        ("qwen2_5_vl", "plain", "a video", "has no place for sounds and videos; give"),
        (
            "qwen2_5_vl",
            "plain",
            "two pictures",
            "'q0': the placeholders of its 2 pictures stand side by side in the pr",
        ),
        ("llava_next_qwen2", two_arguments, "a sound", NONE.format("no sounds", "sounds")),
        ("llava_next_qwen2", two_arguments, "a video", NONE.format("no videos", "videos")),
        *(("llava_next_qwen2", template, "two pictures", "") for template in (two_arguments, "plain")),
        *((name, two_arguments, "nothing", "") for name in ("audio", "qwen2_5_vl", "llava_next_qwen2")),
    ],
)
def test_what_a_template_or_processor_has_no_room_for_is_refused_alike_before_any_forward(
    name, template, shown, message
):
    hf, processor = qwen2_audio() if name == "audio" else of_video(name) if "qwen2_5" in name else tiny_model(name)
    model = vn.VLM(hf, processor, template=template)
    item = replace(ask(), **SHOWN[shown])
    forwards = []
    hf.register_forward_pre_hook(lambda *_: forwards.append(1))
    for run in (model.prepare, lambda q: vn.record(model, [q], condition="all", progress=False)):
        if message:
            with pytest.raises(QuestionError, match=message):
                run(item)
        else:
            run(item)
    assert bool(forwards) is not bool(message)


@pytest.mark.usefixtures("unchecked")
def test_a_processor_of_the_users_own_is_called_with_sounds_if_it_has_an_argument_for_them():
    class Own:
        def __init__(self, processor):
            self.wrapped, self.tokenizer = processor, processor.tokenizer
            self.chat_template, self.apply_chat_template = processor.chat_template, processor.apply_chat_template
            self.image_token = None

    class Hears(Own):
        def __call__(self, text, audio=None, **options):
            return self.wrapped(text=text, audio=audio, **options)

    class Deaf(Own):
        def __call__(self, text, padding, padding_side, add_special_tokens, return_tensors):
            raise AssertionError("asked without its sound")

    hf, processor = qwen2_audio()
    item = ask(audio=sound())
    expected = vn.VLM(hf, processor).prepare(item)
    heard = vn.VLM(qwen2_audio()[0], Hears(processor)).prepare(item)
    assert torch.equal(heard["input_ids"], expected["input_ids"])
    assert torch.equal(heard.tokens.counted("audio"), expected.tokens.counted("audio"))
    with pytest.raises(QuestionError, match=NONE.format("no sounds", "sounds")):
        vn.VLM(qwen2_audio()[0], Deaf(processor)).prepare(item)


def test_a_broken_sound_is_named_and_may_be_skipped(audio_model):
    questions = [ask(n, audio=sound(n)) for n in range(3)] + [ask(3, audio=b"no sound")]
    with pytest.raises(QuestionError, match="question 'q3': the sound 'bytes' cannot be opened"):
        vn.record(audio_model, questions, condition="all", progress=False)
    stats = vn.record(audio_model, questions, condition="all", on_error="skip", progress=False)
    assert stats.provenance["skipped"] == ["q3"]
