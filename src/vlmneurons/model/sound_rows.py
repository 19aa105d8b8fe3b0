"""Which rows and frames of an audio tower belong to which question, and which only fill a sound up.

An audio tower runs on sounds, on pieces of them, or on one long row of all their frames; after its convolutions a frame
stands for several of those that it is given. How many is decided by each family's own code, so it is written here for
the families that are known. Of other families nothing is counted: the silence that fills a sound up would be counted
for it without a sign.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class Heard(NamedTuple):
    """What an audio tower is given of a batch.

    Attributes:
        owner: for each row of the tower's leading dimension, the row of the batch that it belongs to.
        real: which frames of each row belong to a sound, and do not fill it up; as many as after the convolutions.
    """

    owner: Int64[Tensor, " part"]
    real: Bool[Tensor, "part frame"]


class _Family(NamedTuple):
    """How an audio tower is given sounds.

    Attributes:
        lengths: how many frames there are after the convolutions, from how many there were.
        mask: the name of the input that tells which frames are real; empty where all count as real (the decoder sees
            the silence that fills a sound up, too).
        axis: the axis of the input that its frames lie along.
        packed: whether all real frames are one long row.
        alone: whether what fills up a sound is heard with the sound itself: the tower mixes them, or the frames on
            their border are taken for the sound's.
    """

    lengths: Callable[[Tensor, object], Tensor]
    mask: str = ""
    axis: int = 2
    packed: bool = False
    alone: bool = False


def _halved(times: int) -> Callable[[Tensor, object], Tensor]:
    """After convolutions that take every second frame."""

    def lengths(frames: Tensor, config: object) -> Tensor:
        for _ in range(times):
            frames = (frames - 1) // 2 + 1
        return frames

    return lengths


def _in_chunks(frames: Tensor, config: object) -> Tensor:
    """Qwen3-Omni: chunks of twice a window, each halved three times by itself."""
    chunk = 2 * int(getattr(config, "n_window"))  # noqa: B009 (of whatever class)
    whole = _halved(3)(torch.full_like(frames, chunk), config)
    rest = torch.where(frames % chunk > 0, _halved(3)(frames % chunk, config), 0)
    return frames // chunk * whole + rest


_FAMILIES = {
    "qwen2_audio_encoder": _Family(_halved(1), "feature_attention_mask"),
    "qwen2_5_omni_audio_encoder": _Family(_halved(1), "feature_attention_mask", packed=True),
    "qwen3_omni_moe_audio_encoder": _Family(_in_chunks, "feature_attention_mask", packed=True),
    "voxtral_encoder": _Family(_halved(1)),
    "gemma3n_audio": _Family(_halved(2), "input_features_mask", axis=1, alone=True),
    "gemma4_audio": _Family(_halved(2), "input_features_mask", axis=1, alone=True),
    "granite_speech_encoder": _Family(_halved(0), axis=1, alone=True),
}
"""By the type of the audio tower's configuration."""


def _family(config: object) -> tuple[_Family | None, object]:
    """The family of a model's audio tower, and that tower's configuration."""
    for name in ("audio_config", "encoder_config"):
        tower_config = getattr(config, name, None)
        if tower_config is not None:
            return _FAMILIES.get(getattr(tower_config, "model_type", "")), tower_config
    return None, None


def hears_alone(config: object) -> bool:
    """Whether a model would hear in a sound what fills it up to the length of others in its batch.

    Args:
        config: the model's configuration.
    """
    family, _ = _family(config)
    return family is not None and family.alone


def sound_rows(
    data: Mapping[str, object], n_sounds: Sequence[int] | None, n_tokens: Sequence[int] | None, config: object
) -> Heard | None:
    """Which rows and frames of an audio tower are each question's; None where that is not known.

    Args:
        data: the model's inputs.
        n_sounds: how many sounds each question has, in order; None where all are one question's.
        n_tokens: how many tokens of each question are placeholders of sounds.
        config: the model's configuration.
    """
    if n_sounds is not None and sum(n_sounds) == 0:
        return Heard(torch.zeros(0, dtype=torch.int64), torch.ones(0, 1, dtype=torch.bool))
    family, tower_config = _family(config)
    features = data.get("input_features")
    if family is None or not isinstance(features, Tensor) or features.ndim != 3:
        return None
    frames = features.shape[family.axis]
    n_real = torch.full((len(features),), frames)
    if family.mask:
        mask = data.get(family.mask)
        if not isinstance(mask, Tensor) or mask.shape != (len(features), frames):
            return None
        n_real = mask.bool().sum(1).cpu()
        if not torch.equal(mask.bool().cpu(), torch.arange(frames) < n_real[:, None]):
            return None  # a sound with holes, or padded in front
    shares = [len(features)] if n_sounds is None else _shares(len(features), n_sounds, n_tokens)
    if shares is None:
        return None
    owner = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    lengths = family.lengths(n_real, tower_config)
    if family.packed:
        return Heard(owner.repeat_interleave(lengths), torch.ones(int(lengths.sum()), 1, dtype=torch.bool))
    longest = int(family.lengths(torch.tensor([frames]), tower_config))
    return Heard(owner, torch.arange(longest) < lengths[:, None])


def _shares(n: int, n_sounds: Sequence[int], n_tokens: Sequence[int] | None) -> list[int] | None:
    """How many of ``n`` rows of features are each question's: one a sound, or pieces of as many placeholders each."""
    if n == sum(n_sounds):
        return list(n_sounds)
    total = sum(n_tokens or ())
    if n_tokens is None or n == 0 or total % n or any(tokens % (total // n) for tokens in n_tokens):
        return None
    return [tokens // (total // n) for tokens in n_tokens]
