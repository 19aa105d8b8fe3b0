"""Sounds and videos: arrays, or files that are decoded when they are needed.

WAV files and moving pictures (GIF, WebP, PNG) need no further package; other sounds need `soundfile`, other videos
`av`.
"""

import io
import math
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageSequence

from vlmneurons.questions.media import SUFFIXES, encoded, is_function, key_of, open_picture, picture_key, unpacked

SoundSource = str | Path | bytes | Mapping[str, object] | Callable[[], object]
"""A sound: a file, an encoded file's bytes, ``{"array": …, "sampling_rate": …}``, or a function that yields one."""

VideoSource = str | Path | bytes | np.ndarray | Sequence[object] | Callable[[], object]
"""A video: a file, an encoded file's bytes, an array ``[frame, height, width, 3]``, its frames as pictures, or a
function that yields one of these."""

SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".aif")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
"""Ends of the names of files that hold sounds and videos."""

FRAMES_PER_SECOND, MOST_FRAMES = 2.0, 64
"""Which frames of a video's file are seen: two a second at equal distances in time, and never more than 64."""


# -- sound -------------------------------------------------------------------------------------------------------------


def check_sound(source: object) -> str:
    """What is wrong with a sound as it was given; empty where nothing is."""
    if (isinstance(source, str | Path | bytes) and source) or is_function(source):
        return ""
    if isinstance(source, Mapping) and set(source) & {"array", "bytes", "path"}:
        if "array" in source and not source.get("sampling_rate"):
            return "an array of a sound needs its 'sampling_rate', in values a second"
        return ""
    if hasattr(source, "__array__"):
        return "an array needs its sampling rate: {'array': …, 'sampling_rate': …}"
    return f"a sound is a path, bytes, {{'array', 'sampling_rate'}} or a function; got {type(source).__name__}"


def open_sound(source: Any, rate: int) -> Float32[np.ndarray, " sample"]:
    """A sound as one channel at a rate: channels are averaged, another rate is converted by a polyphase filter.

    Args:
        source: the sound.
        rate: values a second.

    Raises:
        ImportError: the file is no WAV, and `soundfile` is not installed.
        ValueError: it is no sound, or an empty one.
    """
    source = unpacked(source)
    fault = check_sound(source)
    if fault:
        raise ValueError(fault)
    values, own_rate = (source["array"], source["sampling_rate"]) if isinstance(source, Mapping) else _decoded(source)
    values = np.asarray(values)
    if values.dtype.kind in "iu":
        values = values / float(np.iinfo(values.dtype).max + 1)
    if values.ndim == 2:  # channels are fewer than values
        values = values.mean(0 if values.shape[0] < values.shape[1] else 1)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a sound is an array [sample] or [channel, sample] of finite values; got {values.shape}")
    if int(own_rate) != rate:
        from scipy.signal import resample_poly

        divisor = math.gcd(int(own_rate), rate)
        values = resample_poly(values.astype(np.float64), rate // divisor, int(own_rate) // divisor)
    return np.ascontiguousarray(values, dtype=np.float32)


def _decoded(source: bytes | str | Path) -> tuple[np.ndarray, int]:
    file = encoded(source)
    try:
        with wave.open(file, "rb") as sound:
            if getattr(sound, "getformat", int)() == 3:  # floats, which Python reads from 3.15 on: no integers
                return _by_soundfile(source)
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError):
        return _by_soundfile(source)
    raw = np.frombuffer(data[: len(data) // (width * channels) * width * channels], np.uint8).reshape(-1, width)
    if width == 1:  # the one width that has no sign
        values = (raw[:, 0].astype(np.float64) - 128) / 128
    else:
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 4 - width :] = raw
        values = wide.view("<i4")[:, 0] / 2.0**31
    return values.reshape(-1, channels).mean(1), rate


def _by_soundfile(source: bytes | str | Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
        raise ImportError(
            "this file is no plain WAV, and other sounds need the package soundfile: pip install "
            "'vlmneurons[audio]', or give {'array': …, 'sampling_rate': …}"
        ) from error
    values, rate = soundfile.read(encoded(source), dtype="float64", always_2d=True)
    return values.mean(1), int(rate)


def sound_key(source: Any) -> str:
    """A digest of a sound's path, or of its content where it has none."""
    return key_of(unpacked(source), lambda sound: _values(sound["array"], f" {sound['sampling_rate']}"))


def _values(array: Any, more: str = "") -> bytes:
    values = np.ascontiguousarray(array)
    return f"{values.dtype} {values.shape}{more}".encode() + values.tobytes()


# -- video -------------------------------------------------------------------------------------------------------------


def is_frame(part: object) -> bool:
    """Whether a part of a list is a frame of a video, and not a video itself."""
    if isinstance(part, str | Path):
        return str(part).lower().endswith(SUFFIXES) and not str(part).lower().endswith((".gif", ".webp"))
    return isinstance(part, Image.Image) or getattr(part, "ndim", None) == 3


def check_video(source: object) -> str:
    """What is wrong with a video as it was given; empty where nothing is."""
    if (isinstance(source, str | Path | bytes) and source) or is_function(source):
        return ""
    if isinstance(source, Mapping) and set(source) & {"bytes", "path"}:
        return ""
    if hasattr(source, "__array__") and not isinstance(source, Image.Image):
        values = np.asarray(source)
        if values.ndim == 4 and values.shape[-1] == 3 and values.dtype == np.uint8 and len(values):
            return ""
        return f"a video is an array [frame, height, width, 3] of uint8; got {values.dtype} {values.shape}"
    if isinstance(source, list | tuple) and source and all(map(is_frame, source)):
        return ""
    return f"a video is a path, bytes, an array, a list of its frames or a function; got {type(source).__name__}"


def open_video(source: object) -> UInt8[np.ndarray, "frame height width 3"]:
    """A video's frames: all of an array's or a list's, and of a file two a second, at most 64.

    Raises:
        ImportError: the file is no moving picture that Pillow reads, and `av` is not installed.
        ValueError: it is no video, or its frames differ in size.
    """
    source = unpacked(source)
    fault = check_video(source)
    if fault:
        raise ValueError(fault)
    if isinstance(source, str | Path | bytes):
        return _frames(source)
    if isinstance(source, list | tuple):
        frames = [np.asarray(open_picture(_as_picture(frame))) for frame in source]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(
                f"the frames of a video have one size; got {sorted({frame.shape[:2] for frame in frames})}"
            )
        return np.stack(frames)
    return np.ascontiguousarray(source)


def _frames(source: bytes | str | Path) -> UInt8[np.ndarray, "frame height width 3"]:
    file = encoded(source)
    try:
        with Image.open(file, formats=("GIF", "WEBP", "PNG")) as moving:
            shown, times, now = [], [], 0.0
            for frame in ImageSequence.Iterator(moving):
                shown.append(np.asarray(open_picture(frame.copy())))
                times.append(now)
                now += frame.info.get("duration", 100) / 1000
        return np.stack([shown[place] for place in _seen_frames(times, now)])
    except Image.UnidentifiedImageError:
        pass
    try:
        import av  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
        raise ImportError(
            "this file needs the package av: pip install 'vlmneurons[video]', or give the frames: an array "
            "[frame, height, width, 3] or a list of pictures"
        ) from error
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        times = [float(frame.time or 0.0) for frame in container.decode(video=0)]
    if not times:
        raise ValueError("it has no frames")
    wanted = set(_seen_frames(times, 2 * times[-1] - times[-2] if len(times) > 1 else 1.0))
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        decoded = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for place, frame in decoded if place in wanted])


def _seen_frames(times: Sequence[float], end: float) -> list[int]:
    """The places of the frames that are seen, at equal distances in time; at least two where the video has two."""
    n = min(len(times), MOST_FRAMES, max(2, round((end - times[0]) * FRAMES_PER_SECOND)))
    wanted = times[0] + (np.arange(n) + 0.5) * (end - times[0]) / n
    places = np.searchsorted(np.asarray(times), wanted, side="right") - 1
    return sorted(set(places.tolist()))


def video_key(source: object) -> str:
    """A digest of a video's path, or of its content where it has none."""

    def content(video: Any) -> bytes:
        if not isinstance(video, list | tuple):
            return _values(video)
        return "+".join(map(picture_key, map(_as_picture, video))).encode()

    return key_of(unpacked(source), content)


def _as_picture(frame: object) -> object:
    """A frame of a list, which may be an array, as a picture."""
    return Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame
