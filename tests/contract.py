"""What every small model goes through beside `check_architecture`, against plain PyTorch on a copy that nobody wrapped.

*Half off*: half of a tower's neurons, drawn at random, are switched off; logits, and three generated tokens with their
logits, are those of a deep copy in which the columns of the down projections are zero. *Counts*: how often each neuron
is above zero, row by row, in a batch of five padded on the left, on the right, and in batches of one, is what forward
hooks see of each row alone. *Study*: questions are recorded, neurons selected, and switched off; the log-probabilities
of the letters are those of a deep copy with zeroed columns that is shown each question alone.

As a script it runs models by name, or the n-th part of all, and writes a shard that `docs/generate_architectures.py`
reads: ``python tests/contract.py --part 1/8 --output contract``. ``.ci/nightly`` runs all.
"""

import argparse
import copy
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmneurons as vn
from small_models import SMALL, Small
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.testing import check_architecture, tiny_image

N_ROWS = 5
ROUNDING = 4
"""How many counts of a row may differ between batches of other sizes: neurons within rounding of 0."""
NEAR = 1e-6
"""A value is within rounding of 0 if it is this small beside the largest of its site."""
STEPS = 3


# -- half of a tower off -----------------------------------------------------------------------------------------------


def half_of(model: vn.VLM, tower: str) -> vn.NeuronSet:
    space = model.space(tower, "post")
    order = torch.randperm(len(space), generator=torch.Generator().manual_seed(len(space)))
    return vn.NeuronSet(space, order[: len(space) // 2].sort().values)


@torch.no_grad()
def without_columns(bare: nn.Module, mlps: Sequence[MLP], neurons: vn.NeuronSet) -> nn.Module:
    """A deep copy of a model whose down projections have zeros in the columns of some neurons."""
    twin = copy.deepcopy(bare)
    for place, mlp in enumerate(mlps):
        start = neurons.space.offsets[place]
        here = neurons.indices[(neurons.indices >= start) & (neurons.indices < start + mlp.width)] - start
        holder = twin.get_submodule(mlp.path)
        if mlp.layout.parameters:
            weight = _own(holder, mlp.layout.down)[mlp.expert]
            axis = -2 if weight.shape[-2] == mlp.width != weight.shape[-1] else -1
            if weight.shape[-1] == weight.shape[-2] == mlp.width:
                raise ValueError(f"{mlp.path}: a square down projection does not say which axis is the neurons'")
        else:
            down = holder.get_submodule(mlp.layout.down)
            # The linear layer itself may be inside, as that of Gemma 4, which clips what goes through it.
            down = next(one for one in down.modules() if getattr(one, "weight", torch.empty(0)).ndim == 2)
            weight, axis = _own(down, "weight"), -2 if type(down).__name__ == "Conv1D" else -1  # GPT-2's is [in, out]
        assert weight.shape[axis] == mlp.width
        weight.index_fill_(axis, here, 0.0)
    return twin


def _own(module: nn.Module, name: str) -> Tensor:
    """A parameter that no other module shares: Diffusion Gemma's encoder has the weights of its decoder."""
    if not hasattr(getattr(module, name), "own"):
        setattr(module, name, nn.Parameter(getattr(module, name).clone(), requires_grad=False))
        getattr(module, name).own = True
    return getattr(module, name)


def generated(hf: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids of three tokens, and their logits ``[row, token, word]``."""
    # A copy: BLIP writes into the ids that it is given.
    given = {name: value.clone() for name, value in inputs.items() if name != "decoder_input_ids"}
    how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "num_beams": 1}
    if getattr(hf.config, "is_encoder_decoder", False):  # T5's cache is as long as its encoder, and its decoder longer
        how["use_cache"] = False
    out = hf.generate(**given, **how, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1)


@torch.no_grad()
def half_off(model: vn.VLM, bare: nn.Module, inputs: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """One tower's half switched off against zeroed columns.

    Returns:
        ``neurons`` that were switched off, ``moved`` how far the logits went, ``off`` by how much they differ from the
        copy's, ``generated`` likewise of three tokens, or why the model generates none by itself.

    Raises:
        AssertionError: they are not the same.
    """
    neurons = half_of(model, tower)
    twin = without_columns(bare, model.towers[tower].mlps, neurons)
    clean, expected = model.hf(**inputs).logits, twin(**inputs).logits
    with vn.Ablation(model, neurons):
        found = model.hf(**inputs).logits
    off, moved = difference(found, expected), float((clean - found).abs().max())
    result: dict[str, Any] = {"neurons": len(neurons), "moved": moved, "off": off}
    try:
        ids, steps = generated(twin, inputs)
    except Exception as error:  # with nothing of the library on it
        return result | {
            "generated": f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        }
    with vn.Ablation(model, neurons):
        ours, ours_steps = generated(model.hf, inputs)
    assert torch.equal(ours, ids), f"{tower}: other tokens than with zeroed columns"
    again = model.hf(**inputs).logits
    assert torch.equal(again, clean), f"{tower}: logits are others after the ablation"
    return result | {"generated": difference(ours_steps, steps)}


def difference(found: Tensor, expected: Tensor) -> float:
    """How far logits are from those of zeroed columns; no more than rounding (routed rows may be summed otherwise)."""
    most = float((found - expected).abs().max())
    assert most <= 2e-5 * max(1.0, float(expected.abs().max())), f"logits are {most:g} off zeroed columns'"
    return most


# -- counts, row by row ------------------------------------------------------------------------------------------------


@contextmanager
def plain_counts(bare: nn.Module, mlps: Sequence[MLP], real: Tensor | None = None) -> Iterator[dict[int, Tensor]]:
    """How often each neuron of ``post`` is above zero, and near it, in the forwards within, by the MLP's place.

    ``real`` says which patches of each picture are not padding, where some are even alone.
    """
    counts: dict[int, Tensor] = {}
    handles = []

    def add(place: int, values: Tensor) -> None:
        values = values if real is None or values.shape[:2] != real.shape else values[real]
        values = values.detach().reshape(-1, values.shape[-1])
        near = values.abs() <= NEAR * values.abs().max() if values.numel() else values > 0
        of = torch.stack([(values > 0).sum(0), near.sum(0)])
        counts[place] = counts[place] + of if place in counts else of

    tensors: dict[str, list[tuple[int, MLP]]] = {}
    for place, mlp in enumerate(mlps):
        if mlp.layout.parameters:
            tensors.setdefault(mlp.path, []).append((place, mlp))
            continue
        down = bare.get_submodule(mlp.path).get_submodule(mlp.layout.down)
        handles.append(down.register_forward_pre_hook(lambda _, args, place=place: add(place, args[0])))
    for path, experts in tensors.items():

        def of_experts(module: nn.Module, args: tuple, kwargs: dict, experts: list = experts) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            hidden = given[0].reshape(-1, given[0].shape[-1])
            chosen = next((value for value in given[1:] if value.dtype == torch.int64), None)
            for place, mlp in experts:
                if "shared" in mlp.path:  # which see every token, and are weighted by more than their own parameters
                    continue
                if chosen is None:  # one slice an expert, what is not routed to it being zero
                    slices = hidden.reshape(len(experts), -1, hidden.shape[-1])[mlp.expert]
                    rows = slices[slices.ne(0).any(-1)]
                else:
                    rows = hidden[(chosen.reshape(len(hidden), -1) == mlp.expert).any(-1)]
                add(place, expert_post(module, mlp, rows))

        handles.append(bare.get_submodule(path).register_forward_pre_hook(of_experts, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def expert_post(module: nn.Module, mlp: MLP, rows: Tensor) -> Tensor:
    """What an expert's down projection is given, of rows of its input."""
    layout = mlp.layout

    def times(name: str) -> Tensor:
        weight, bias = getattr(module, name)[mlp.expert], getattr(module, f"{name}_bias", None)
        output = rows @ weight if weight.shape[0] == rows.shape[-1] else F.linear(rows, weight)
        return output if bias is None else output + bias[mlp.expert]

    if layout.fused is None:
        pre, up = times(layout.gate), None if layout.up is None else times(layout.up)
    else:
        both = times(layout.fused)
        halves = both.chunk(2, -1) if layout.split in ("gate_up", "up_gate") else (both[..., ::2], both[..., 1::2])
        pre, up = halves if layout.split in ("gate_up", "interleaved") else halves[::-1]
    return layout.post_of(module, layout.gate_of(module, pre), up)


def compare(found: Tensor, expected: Mapping[int, Tensor], space: vn.NeuronSpace, what: str) -> int:
    """How many counts ``[neuron]`` differ; every one of an MLP that plain hooks saw is compared.

    A neuron's may differ by no more than it has values within rounding of 0 in the row alone.
    """
    off = 0
    for place, (counts, near) in expected.items():
        start = space.offsets[place]
        differ = (found[start : start + space.widths[place]] - counts).abs()
        assert (differ <= near).all(), f"{what}: {int(differ.sum())} counts differ from plain hooks'"
        off += int(differ.sum())
    assert off <= ROUNDING, f"{what}: {off} counts differ from plain hooks'"
    return off


def real_patches(kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
    """Which patches of a question's pictures ``[picture, patch]`` are not padding, by hand; None where all are."""
    if kind == "lfm2_vl":
        return inputs["pixel_attention_mask"].bool()
    if kind == "gemma4" and "image_position_ids" in inputs:
        return (inputs["image_position_ids"] >= 0).all(-1)
    if kind == "aria":
        return inputs["pixel_mask"].unfold(1, 70, 70).unfold(2, 70, 70).flatten(3).any(-1).flatten(1)
    return None


def counts_alone(bare: nn.Module, rows: "Rows", mlps: Sequence[MLP]) -> list[dict[int, Tensor]]:
    """What plain hooks see of each row alone."""
    expected = []
    for row in range(N_ROWS):
        inputs = rows.alone(row)
        with plain_counts(bare, mlps, real_patches(bare.config.model_type, inputs)) as counts:
            bare(**inputs)
        expected.append(counts)
    return expected


@torch.no_grad()
def counts_by_row(model: vn.VLM, bare: nn.Module, rows: "Rows", tower: str) -> dict[str, Any]:
    """Counts of a tower that sees the text's tokens: five rows in one batch, padded on either side, and one by one.

    Returns:
        ``rows``, ``counts`` in all, and ``off``: how many of these differ from what plain hooks see of rows alone.
    """
    mlps, space = model.towers[tower].mlps, model.space(tower, "post")
    expected = counts_alone(bare, rows, mlps)
    off, ways = 0, {side: rows.together(side) for side in rows.sides if rows.apart[side]}
    for side, batch in ways.items():
        recorder = vn.Recorder(model, space, tokens=lambda table: table.attention)
        with recorder, recorder.group([f"row {row}" for row in range(N_ROWS)]):
            model.hf(**batch)
        for row, found in enumerate(recorder.statistics.positive):
            off += compare(found, expected[row], space, f"{tower}, row {row}, padded on the {side}")
    for row in range(N_ROWS):
        with vn.Recorder(model, space, tokens=lambda table: table.attention) as recorder:
            model.hf(**rows.alone(row))
        off += compare(recorder.statistics.positive[0], expected[row], space, f"{tower}, row {row} alone")
    total = sum(int(counts.sum()) for row in expected for counts, _ in row.values())
    return {"rows": N_ROWS, "sides": list(ways), "counts": total, "off": off}


@torch.no_grad()
def counts_by_question(model: vn.VLM, bare: nn.Module, rows: "Rows", tower: str) -> dict[str, Any]:
    """Counts of a tower that sees pictures, by question, in batches of five and of one."""
    mlps, space = model.towers[tower].mlps, model.space(tower, "post")
    expected = counts_alone(bare, rows, mlps)
    off = 0
    for size in (N_ROWS, 1) if rows.apart["right"] else (1,):
        found = vn.record(model, rows.questions, space, condition="all", batch_size=size, progress=False)
        for row in range(N_ROWS):  # each question is a group of its own
            own = found.positive[found.groups.index(f"q{row}")]
            off += compare(own, expected[row], space, f"{tower}, question {row}, batches of {size}")
    total = sum(int(counts.sum()) for row in expected for counts, _ in row.values())
    return {"rows": N_ROWS, "sides": ["left"], "counts": total, "off": off}


@torch.no_grad()
def keeps_apart(model: vn.VLM, bare: nn.Module, rows: "Rows", side: str) -> bool:
    """Whether a model that nobody wrapped gives rows of a batch, padded on a side, the logits that each has alone."""
    batch = rows.together(side)
    logits = bare(**batch).logits
    for row in range(N_ROWS):
        expected = bare(**rows.alone(row)).logits[0, -1].log_softmax(-1)
        if model.is_encoder_decoder:
            last = -1
        else:
            last = int(batch["attention_mask"][row].nonzero().max()) - batch["attention_mask"].shape[1]
        off = float((logits[row, last].log_softmax(-1) - expected).abs().max())
        if off > 2e-3 * max(1.0, float(expected.abs().max())):
            return False
    return True


# -- record, select, knockout ------------------------------------------------------------------------------------------


@torch.no_grad()
def study(model: vn.VLM, bare: nn.Module, rows: "Rows", tower: str) -> dict[str, Any]:
    """Neurons of a tower selected by recorded counts, and switched off while questions are asked.

    Returns:
        ``masks`` that were asked under, ``off`` by how much letters' margins differ from those of copies with zeroed
        columns, ``moved`` how far they went, or ``refused``, what the library says it does not do.
    """
    space, questions, size = model.space(tower, "post"), rows.questions, N_ROWS
    if model.is_encoder_decoder:  # counts of its questions are those of a Recorder, which `counts_by_row` compares
        selection = {"q0": half_of(model, tower), "q1": half_of(model, tower)}
        questions, size = questions.asked(answer="generate"), N_ROWS if rows.apart["right"] else 1
        model.hf.generation_config.use_cache = False  # T5's cache is as long as its encoder, and its decoder longer
    else:
        try:
            recorded = vn.record(model, questions, space, condition="all", batch_size=size, progress=False)
        except QuestionError as error:
            if "read answers by generation" not in str(error):
                raise
            questions = questions.asked(answer="generate")
            recorded = vn.record(model, questions, space, condition="all", batch_size=size, progress=False)
        except MismatchError as error:
            if rows.apart["right"] or "otherwise in a batch than alone" not in str(error):
                raise
            size = 1  # as it says
            recorded = vn.record(model, questions, space, condition="all", batch_size=size, progress=False)
        single = vn.record(model, questions, space, condition="all", batch_size=1, progress=False)
        apart = int((recorded.positive - single.positive).abs().sum())
        assert apart <= ROUNDING, f"{tower}: {apart} counts differ between batches of {N_ROWS} and of 1"
        assert torch.equal(recorded.tokens, single.tokens)
        selection = vn.CAS(0.1).select(recorded)
    masks = {name: selection[name] for name in ("q0", "q1")}
    whole = {"CAS": vn.Selection(masks)}
    result = vn.knockout(model, questions, whole, batch_size=size, progress=False)
    alone = vn.knockout(model, questions, whole, batch_size=1, progress=False)
    assert (result.chosen == alone.chosen).all(), f"{tower}: other answers in batches of {N_ROWS} and of 1"
    told: dict[str, Any] = {"masks": len(masks), "neurons": len(masks["q0"]), "batches": size}
    if model.is_encoder_decoder or not isinstance(questions.answer, str) or questions.answer != "letters":
        return told | {"answers": "generated"}
    off = 0.0
    for number, neurons in enumerate((None, *masks.values())):
        twin = bare if neurons is None else without_columns(bare, model.towers[tower].mlps, neurons)
        expected = [letters(model, twin, rows, row) for row in range(N_ROWS)]
        margins = [
            scores[item.answer] - scores[np.arange(4) != item.answer].max() for scores, item in zip(expected, questions)
        ]
        off = max(off, float(np.abs(result.values("margin")[number] - margins).max()))
    assert off <= 1e-3, f"{tower}: letters' margins are {off:g} off those of zeroed columns"
    return told | {"off": off, "moved": float(np.ptp(result.values("margin"), axis=0).max())}


def letters(model: vn.VLM, bare: nn.Module, rows: "Rows", row: int) -> np.ndarray:
    """Log-probabilities of the options' letters after a question alone, in the question's own order."""
    vocabulary, item = model.tokenizer.get_vocab(), rows.questions[row]
    forms = torch.tensor([[vocabulary[letter], vocabulary["Ġ" + letter]] for letter in "ABCD"])
    inputs = model.prepare(rows.questions[row : row + 1], padding_side="right")
    shown = bare(**inputs).logits[0, -1].double().log_softmax(-1)[forms].logsumexp(-1)
    scores = np.empty(4)
    scores[list(rows.questions.order(item))] = shown.numpy()
    return scores


class Rows:
    """Five rows of different lengths: questions with pictures through a processor, or ids of words."""

    def __init__(self, model: vn.VLM, small: Small) -> None:
        self.model, self.small = model, small
        decodes = model.is_encoder_decoder
        self.apart: dict[str, bool] = {}
        self.sides = ("right",) if decodes else ("left", "right")
        self.questions = vn.QuestionSet(
            vn.Question(
                tiny_image(n, 24 + 8 * (n % 3), 40 - 8 * (n % 2)) if small.sees else None,
                f"What is this {'long word ' * n}?",
                ("Tea", "Rice", "Bread", "Soup"),
                n % 4,
                f"q{n}",
                id=f"q{n}",
            )
            for n in range(N_ROWS)
        )
        generator = torch.Generator().manual_seed(3)
        self.ids = [torch.randint(20, 90, (5 + 3 * n,), generator=generator) for n in range(N_ROWS)]

    def _more(self, n: int) -> dict[str, Tensor]:
        given = self.small.inputs.get("decoder_input_ids")
        return {} if given is None else {"decoder_input_ids": given[:1].repeat(n, 1)}

    def alone(self, row: int) -> dict[str, Any]:
        if self.small.processor is not None:
            return {**self.model.prepare(self.questions[row : row + 1]), **self._more(1)}
        ids = self.ids[row][None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self._more(1)}

    def together(self, side: str) -> dict[str, Any]:
        if self.small.processor is not None:
            return {**self.model.prepare(self.questions, padding_side=side), **self._more(N_ROWS)}
        length = max(map(len, self.ids))
        ids, mask = torch.zeros(N_ROWS, length, dtype=torch.int64), torch.zeros(N_ROWS, length, dtype=torch.int64)
        for row, own in enumerate(self.ids):
            place = slice(length - len(own), None) if side == "left" else slice(len(own))
            ids[row, place], mask[row, place] = own, 1
        made = {"input_ids": ids, "attention_mask": mask, **self._more(N_ROWS)}
        if self.model.encoder._counts_positions:
            made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return made


# -- all of it ---------------------------------------------------------------------------------------------------------

OF_TEXT = ("language", "encoder")
OF_PICTURES = ("vision", "projector", "qformer", "connector", "high_res_vision_model")


def run(name: str, wanted: Sequence[str] = ("contract", "half", "counts", "study")) -> dict[str, Any]:
    """Everything about one small model.

    Args:
        name: one of `SMALL`.
        wanted: which parts.

    Returns:
        A row of figures: the class, the towers and what each went through.

    Raises:
        AssertionError: something is not as plain PyTorch has it.
    """
    start, small = time.process_time(), SMALL[name]()
    bare = small.model
    model = vn.VLM(copy.deepcopy(bare), small.processor or small.tokenizer, template=small.template)
    result: dict[str, Any] = {"name": name, "type": small.type, "class": type(bare).__name__, "towers": {}}
    result |= {"made_up": small.made_up, "unasked": small.unasked, "sees": small.sees}
    reports: Mapping[str, Any] = {}
    if "contract" in wanted:
        report = check_architecture(bare, inputs=small.inputs)
        reports = {tower.name: tower for tower in report.towers}
        result["notes"] = list(report.notes)
    rows = Rows(model, small)
    if {"counts", "study"} & set(wanted) and not small.unasked and small.rows:
        rows.apart = {side: keeps_apart(model, bare, rows, side) for side in rows.sides}
        result["together"] = [side for side, apart in rows.apart.items() if apart]
    for tower in model.towers:
        of = result["towers"].setdefault(tower, {})
        if tower in reports:
            own = reports[tower]
            of |= {"mlps": own.mlps, "ran": own.ran, "moved": own.moved, "tried": own.tried, "all": own.neurons}
            of["widths"] = list(own.widths)
        if "half" in wanted:
            of["half"] = half_off(model, bare, small.inputs, tower)
        if "counts" in wanted and rows_count(small, tower):
            count: Callable = counts_by_row if tower in OF_TEXT else counts_by_question
            try:
                of["counts"] = count(model, bare, rows, tower)
            except vn.VLMNeuronsError as error:  # what is not counted is said
                of["counts"] = {"refused": f"{type(error).__name__}: {error}"}
        if "study" in wanted and not small.unasked and not (model.is_encoder_decoder and small.processor is None):
            try:
                of["study"] = study(model, bare, rows, tower)
            except vn.VLMNeuronsError as error:
                of["study"] = {"refused": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.process_time() - start, 1)}


def rows_count(small: Small, tower: str) -> bool:
    """Whether what a tower sees is told apart by row; where not, the library says so (`test_every_processor.py`)."""
    if tower in OF_TEXT:
        return small.rows
    asked = small.processor is not None and small.sees and small.rows and not small.padded_alone
    return asked and tower in OF_PICTURES and not getattr(small.model.config, "is_encoder_decoder", False)


def run_all(names: Sequence[str], output: Path) -> int:
    """Runs models and writes their rows as they come; the number of those that failed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for name in names:
        try:
            results.append(run(name))
            said = "runs"
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).strip()}"
            results.append({"name": name, "failed": said})
        print(f"{time.strftime('%H:%M:%S')} {name}: {said}", flush=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return sum("failed" in result for result in results)


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="small models; all of them by default")
    parser.add_argument("--part", default="1/1", help="the n-th of so many parts of these")
    parser.add_argument("--output", type=Path, default=Path("out/contract"), help="folder for the shard")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    names = (given.names or list(SMALL))[part - 1 :: parts]
    raise SystemExit(run_all(names, given.output / f"{part}-of-{parts}.json") > 0)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
