"""What runs inside each of vLLM's worker processes: counts of requests, and edits of some requests' neurons.

vLLM runs the tokens of many requests as one flat sequence, prompts in pieces, and cuts each MLP among the ranks of
tensor parallelism. So a hook asks the runner which request each token is of, and at which place in it. A request says
in ``extra_args["vlmneurons"]`` which of its places are counted, into which row, and which mask it is under. Each rank
looks after its own neurons. What is counted is what the other engines count (`vlmneurons.statistics.counting`).

Arguments and results are plain values and bytes, which vLLM sends without pickling. vLLM finds the class by its name,
also in other processes and on other machines. It is a worker class (``worker_cls``) and no extension of one, since
nnsight mounts `save` on every object, which vLLM takes for a method that both define.
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmneurons.checks import Keywords, Wire
from vlmneurons.run.vllm.mlps import decoder_mlps
from vlmneurons.statistics.counting import count_patches

_ON_CPU = importlib.import_module("vllm.platforms").current_platform.is_cpu()
_BASE: Any = (
    importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
    if _ON_CPU
    else importlib.import_module("vllm.v1.worker.gpu_worker").Worker
)


class Worker(_BASE):
    """A worker of vLLM that counts and edits. The methods that the library calls begin with ``vn_``."""

    _step: "_Step | None" = None
    _counting: "_Counting | None" = None

    def vn_begin(self, widths: list[int]) -> Wire:
        """Put the hooks into the model, and describe it.

        Args:
            widths: for each layer how many neurons it has in the whole model.

        Returns:
            What is wrong, in words (empty if nothing is); precision; number of ranks; the longest prompt; the kind of
            device.
        """
        runner = self.model_runner
        model = runner.get_model()
        mlps = {n: [model.get_submodule(path) for path in paths] for n, paths in decoder_mlps(model).items()}
        ranks = self.parallel_config.tensor_parallel_size
        held = [
            ranks * sum(mlp.down_proj.input_size_per_partition for mlp in mlps.get(n, ())) for n in range(len(widths))
        ]
        fault = ""
        if not all(hasattr(runner, name) for name in ("input_batch", "query_start_loc", "requests")):
            fault = f"its runner {type(runner).__name__} does not say which token is of which request"
        elif any(len(of_layer) != 1 for of_layer in mlps.values()) or held != widths:
            fault = f"its MLPs have {held} neurons by layer, where the model has {widths}"
        else:
            self._mlps: list[Any] = [mlps[n][0] for n in range(len(widths))]
            self._masks: list[tuple[Tensor, Tensor | None] | None] = [None] * len(widths)
            self._edited = [0] * len(widths)
            self._pixels: list[float] = []
            for n, mlp in enumerate(self._mlps):
                mlp.act_fn.register_forward_pre_hook(lambda _, args, n=n: self._see_gates(n, args[0]))
                mlp.down_proj.register_forward_pre_hook(lambda _, args, n=n: self._see_post(n, args))
            if hasattr(model, "embed_multimodal"):
                embed = model.embed_multimodal
                model.embed_multimodal = lambda **inputs: (self._see_pixels(inputs), embed(**inputs))[1]
        return [fault, str(self.model_config.dtype), ranks, self.model_config.max_model_len, self.device.type]

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step of vLLM, during which the hooks know what its tokens are."""
        self._step = _Step(self.model_runner)
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._step = None

    # -- counting ------------------------------------------------------------------------------------------------------

    def vn_count(self, rows: int, sites: list[Wire], totals: bool, maxima: bool) -> None:
        """Begin to count.

        Args:
            rows: how many rows the tables have.
            sites: layer and kind of each site.
            totals: whether sums of the values are wanted.
            maxima: whether their maxima are.
        """
        self._counting = _Counting(rows, sites, totals, maxima, self.device)

    def vn_counts(self) -> Wire:
        """Stop counting.

        Returns:
            The rank; for each row how many tokens it saw; for each site its tables' bytes, ``[row, neuron of the
            rank]``.
        """
        counting, self._counting = self._counting, None
        assert counting is not None
        tables = [
            {name: table.cpu().numpy().tobytes() for name, table in of_site.items()}
            for of_site in counting.tables.values()
        ]
        return [self._mlps[0].down_proj.tp_rank, counting.seen, tables]

    def _see_gates(self, layer: int, gates: Tensor) -> None:
        if self._step is None or self._counting is None:
            return
        width = gates.shape[-1] // 2
        for number, kind in self._counting.of_layer(layer):
            if kind == "pre":
                self._counting.add(number, self._step, gates[..., :width])
            elif kind == "up":
                self._counting.add(number, self._step, gates[..., width:])
            elif kind == "gate":  # the activation times 1 is the gate, whatever the activation
                ones = torch.ones_like(gates[..., width:])
                values = self._mlps[layer].act_fn.forward_native(torch.cat([gates[..., :width], ones], -1))
                self._counting.add(number, self._step, values)

    # -- edits ---------------------------------------------------------------------------------------------------------

    def vn_masks(self, masks: list[dict[str, Wire]]) -> None:
        """Take the masks that requests are under from now on. Requests name them by number, from 1; 0 is none.

        Args:
            masks: for each mask, by layer: columns (int64), factors and terms (float32, or None), in bytes.
        """
        for layer, mlp in enumerate(self._mlps):
            width = mlp.down_proj.input_size_per_partition
            first = mlp.down_proj.tp_rank * width
            factors, terms = torch.ones(1 + len(masks), width), torch.zeros(1 + len(masks), width)
            for row, mask in enumerate(masks, 1):
                columns, times, plus = mask.get(str(layer), [b"", b"", None])
                places = np.frombuffer(columns, np.int64) - first
                on_rank = (places >= 0) & (places < width)
                factors[row, places[on_rank]] = torch.from_numpy(np.frombuffer(times, np.float32)[on_rank])
                if plus is not None:
                    terms[row, places[on_rank]] = torch.from_numpy(np.frombuffer(plus, np.float32)[on_rank])
            dtype = self.model_config.dtype
            exact = torch.equal(factors.to(dtype).float(), factors)  # else 1.1 would be rounded before it multiplies
            times = factors.to(self.device, dtype if exact else torch.float32)
            plus = terms.to(self.device, dtype) if terms.any() else None
            self._masks[layer] = (times, plus) if plus is not None or (factors != 1).any() else None

    def _see_post(self, layer: int, args: tuple) -> tuple | None:
        step = self._step
        if step is None:
            return None
        values: Tensor = args[0]
        mask = self._masks[layer]
        if mask is not None and step.masked:
            factors, terms = mask
            rows = step.mask_rows(values.device)
            changed = (values[: len(rows)] * factors[rows]).to(values.dtype)
            if terms is not None:
                changed = changed + terms[rows]
            values = torch.cat([changed, values[len(rows) :]])
            self._edited[layer] += step.masked
        if self._counting is not None:
            for number, kind in self._counting.of_layer(layer):
                if kind == "post":
                    self._counting.add(number, step, values)
        return (values, *args[1:])

    # -- what a proof looks at -----------------------------------------------------------------------------------------

    def vn_seen(self) -> Wire:
        """Since the last call: how many tokens each layer edited; sums of magnitudes and squares of the pictures."""
        edited, pixels = self._edited, self._pixels
        self._edited, self._pixels = [0] * len(edited), []
        return [edited, pixels]

    def _see_pixels(self, inputs: Keywords) -> None:
        for name, value in inputs.items():
            for pixels in value if isinstance(value, list | tuple) else [value]:
                if name.startswith("pixel_values") and isinstance(pixels, Tensor):
                    self._pixels += [float(pixels.double().abs().sum()), float(pixels.double().square().sum())]


class _Step:
    """Which request each token of a step belongs to."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self._spans: list[tuple[Keywords, int, int, int]] | None = None
        self._rows: Tensor | None = None
        self._counted: tuple[list[int], Tensor, Tensor] | None = None

    @property
    def spans(self) -> list[tuple[Keywords, int, int, int]]:
        """For each request in order: its labels, where it begins in the step, how many tokens, and its first place."""
        if self._spans is None:  # asked for by a hook: by then the runner has laid the step out
            batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
            self._spans = []
            for n, name in enumerate(batch.req_ids):
                params = self.runner.requests[name].sampling_params
                labels = ((params and params.extra_args) or {}).get("vlmneurons", {})
                size = int(starts[n + 1] - starts[n])
                self._spans.append((labels, int(starts[n]), size, int(batch.num_computed_tokens_cpu[n])))
        return self._spans

    @property
    def masked(self) -> int:
        """How many tokens are under a mask."""
        return sum(size for labels, _, size, _ in self.spans if labels.get("mask"))

    def mask_rows(self, device: torch.device) -> Tensor:
        """``[token]`` the mask that each token is under; further tokens of the step are padding."""
        if self._rows is None:
            masks = torch.tensor([labels.get("mask", 0) for labels, *_ in self.spans])
            sizes = torch.tensor([size for _, _, size, _ in self.spans])
            self._rows = torch.repeat_interleave(masks, sizes).to(device)
        return self._rows

    def counted(self, counting: "_Counting") -> tuple[list[int], Tensor, Tensor]:
        """The rows that are counted in this step, to which of them each token belongs, and which tokens count."""
        if self._counted is None:
            rows, owner, real = [], [], []
            for labels, _, size, first in self.spans:
                counts = [False] * size
                if "counted" in labels:
                    row = labels["row"]
                    # Once each, also where a prompt is computed again after it had to make room.
                    for place in counting.new_places(row, labels["counted"], first, size):
                        counts[place - first] = True
                    rows.append(row)
                owner += [max(0, len(rows) - 1)] * size
                real += counts
            self._counted = rows, torch.tensor(owner), torch.tensor(real)
        return self._counted


class _Counting:
    """Tables of counts, filled step by step."""

    def __init__(self, rows: int, sites: list[Wire], totals: bool, maxima: bool, device: Any) -> None:
        self.rows, self.totals, self.maxima, self.device = rows, totals, maxima, device
        self.seen = [0] * rows
        self.tables: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(sites))}
        self._done = [0] * rows
        self._sites: dict[int, list[tuple[int, str]]] = {}
        for number, (layer, kind) in enumerate(sites):
            self._sites.setdefault(layer, []).append((number, kind))
        self._scratch: dict = {}

    def of_layer(self, layer: int) -> list[tuple[int, str]]:
        """Number and kind of the sites of a layer."""
        return self._sites.get(layer, [])

    def new_places(self, row: int, places: list[int], first: int, size: int) -> list[int]:
        """Those of a row's counted places that are in this piece of its prompt, and were in none before."""
        start, self._done[row] = max(first, self._done[row]), max(self._done[row], first + size)
        new = [place for place in places if start <= place < first + size]
        self.seen[row] += len(new)
        return new

    def add(self, number: int, step: _Step, values: Tensor) -> None:
        """Count one step at one site: ``values`` ``[token, neuron]``, perhaps with padding at the end."""
        rows, owner, real = step.counted(self)
        if not rows:
            return
        parts = values[: len(real), None]
        with torch.no_grad():
            counts = count_patches(
                parts, real[:, None], owner, len(rows), totals=self.totals, maxima=self.maxima, scratch=self._scratch
            )
        tables = self.tables[number]
        for name, counted in counts.items():
            if counted is None:
                continue
            if name not in tables:
                nothing = -torch.inf if name == "maximum" else 0
                shape = (self.rows, *counted.shape[1:])
                tables[name] = torch.full(shape, nothing, dtype=counted.dtype, device=self.device)
            before = tables[name][rows]
            tables[name][rows] = torch.maximum(before, counted) if name == "maximum" else before + counted
