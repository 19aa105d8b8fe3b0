"""Counting in any run of a model: `Recorder`, by hooks around the user's own calls, traces and generations.

A neuron *fires* at a token if its value is above zero (for SiLU and GELU the gate is above zero exactly where its input
is). For each row of a batch the recorder counts the tokens at which each neuron fires, among those that the token rule
counts. All counts are integers.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmneurons.checks import Keywords, as_names
from vlmneurons.errors import MismatchError, QuestionError, VLMNeuronsError
from vlmneurons.files.stopping import Undivided, close_whole
from vlmneurons.model.sound_rows import Heard, sound_rows
from vlmneurons.model.tokens import TokenRule, free_tokens
from vlmneurons.model.vision_rows import UnknownPadding, real_patches
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.recording.counter import Counter
from vlmneurons.recording.frame import Frame, is_filled
from vlmneurons.recording.groups import GroupTables
from vlmneurons.run.identity import run_provenance, setting_of_run
from vlmneurons.run.owners import OWNERS
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.identity import Setting


class Recorder:
    """Counts how often neurons fire, in whatever runs the model makes while it is entered.

    It works in plain calls (``model.hf(**inputs)``), in traces and in ``generate``, where each token is counted once.
    Rows belong to the group that `group` names, or to ``"all"``. A run that does not end, because it raised or was
    stopped, is not counted at all. While it is entered, no other thread may run the model: such a run is refused.

    It counts what the model computes. Whether the model's own code keeps the rows of your batch apart, and from their
    padding, is tried where the library asks questions, but not here: with a model that is not known to do so, compare a
    batch with its rows alone.

    Args:
        model: the model.
        space: the neurons to count; by default the gates of the language tower.
        tokens: which tokens count; see `TokenTable.counted`. In runs of your own the chat template is not known, so
            ``"content"`` and ``"text"`` count its words. Neurons of a vision tower count over all patches.
        magnitudes: also sum the neurons' values, in float64, for mean activations.

    Example:
        ``with Recorder(model) as recorder, recorder.group("Egypt"): model.hf(**inputs)``, then ``recorder.statistics``.
    """

    def __init__(
        self, model: VLM, space: NeuronSpace | None = None, *, tokens: TokenRule = "content", magnitudes: bool = False
    ) -> None:
        if isinstance(tokens, Mapping):
            raise QuestionError("a Recorder counts by one rule; token rules by name are for vn.record")
        self._counter = Counter(model, space, tokens=tokens, magnitudes=magnitudes)
        self.model, self.space = model, self._counter.space
        self.tokens, self.magnitudes = tokens, self._counter.magnitudes
        self._groups = GroupTables(self._counter)
        self._entered: contextlib.ExitStack | None = None
        self._labels: Sequence[str] | str = "all"
        self._setting: Setting | None = None
        self._generation: _Generation | None = None
        self._continues = False

    # -- being entered -------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Recorder":
        if self._entered is not None:
            raise VLMNeuronsError("this recorder is already counting; make another one to nest them")
        setting = setting_of_run(self.model, tokens=self.tokens)
        if self._setting is not None and (differs := list(self._setting.differences(setting))):
            raise MismatchError(
                f"this recorder has counted under another setting: {'; '.join(differs[:3])}. Make another one"
            )
        self._setting = setting
        try:
            with Undivided(), contextlib.ExitStack() as stack:
                stack.enter_context(self._counter.attached(self._begin, self._end))
                stack.enter_context(self._generations())
                self._entered = stack.pop_all()
        except KeyboardInterrupt:  # as it was entered
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._entered is not None:
            try:
                close_whole(self._entered)
            finally:
                self._entered = None

    @contextlib.contextmanager
    def group(self, label: str | Sequence[str]) -> Iterator[None]:
        """Within, rows of the batch belong to this group; a list gives each row its own.

        Args:
            label: the group of all rows, or a list with the group of each row.
        """
        before, self._labels = (
            self._labels,
            label if isinstance(label, str) else as_names("label", label, MismatchError),
        )
        try:
            yield
        finally:
            self._labels = before

    @property
    def statistics(self) -> ActivationStatistics:
        """What was counted so far; groups in the order in which they came.

        Raises:
            MismatchError: nothing was counted yet.
        """
        if not self._groups.names or self._setting is None:
            raise MismatchError("nothing was recorded yet: run the model inside `with recorder:`")
        if not self._groups.whole:
            raise MismatchError("a run was interrupted while its counts were being added: record again")
        return self._groups.statistics(run_provenance(self.model, self._setting, tokens=self.tokens))

    # -- one forward ---------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[object, ...], kwargs: Keywords) -> None:
        """The model's forward begins: what does it show?"""
        self._counter.forget()
        arguments = _by_name(module, args, kwargs)
        mask = self._counted_tokens(arguments)
        # Whose each picture or sound of a run of the user's own is, is not known; but all may be of one group.
        one_group = isinstance(self._labels, str)
        self._counter.frame = Frame(
            mask,
            list(range(len(mask))),
            patches=self._real_patches(arguments),
            sounds=self._sound_rows(arguments) if one_group else None,
            filled=is_filled(arguments),
            prepared=not one_group,
        )

    def _counted_tokens(self, arguments: Keywords) -> Tensor:
        """``[row, token]`` which tokens of a forward count; notes whether their items were counted before."""
        of_decoder = self._counter.of_decoder
        shown = self._decoder_arguments(arguments) if of_decoder else arguments
        ids, attention = shown.get("input_ids"), shown.get("attention_mask")
        if ids is None:
            why = " (in `generate` an encoder runs outside of the model's forward: call model.hf(**inputs))"
            raise QuestionError(
                "a Recorder tells tokens apart by input_ids; this run gives none"
                + (why if self.model.is_encoder_decoder else "")
            )
        generation = None if of_decoder else self._generation
        if generation is not None:
            shown, self._continues = generation.step(shown)
        else:
            if attention is not None and not (isinstance(attention, Tensor) and attention.ndim == 2):
                raise QuestionError(
                    "a Recorder tells padding by an attention mask of [row, token]; this run gives "
                    f"{list(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__}, from "
                    "which padding cannot be told"
                )
            # A later step of a loop of the user's own brings new tokens of items that were counted before. Its mask, if
            # it has one, is of the earlier tokens too, and its cache holds them.
            caches = (arguments.get(name) for name in ("past_key_values", "cache"))
            self._continues = (attention is not None and attention.shape[1] > ids.shape[1]) or any(map(_holds, caches))
        table = free_tokens(self.model, dict(shown), ids.shape[1])
        assert table is not None
        mask = table.counted(self.tokens)
        return mask if generation is None else mask & generation.new_tokens(mask)

    def _sound_rows(self, arguments: Mapping[str, object]) -> Heard | None:
        """The rows of an audio tower; None where there is none."""
        hears = any(state.hears for state in self._counter.sites)
        return sound_rows(arguments, None, None, self.model.hf.config) if hears else None

    def _real_patches(self, arguments: Mapping[str, object]) -> Tensor | None:
        """Which patches of a vision tower's rows are no padding; None where all are, or without such a tower."""
        if not any(state.of_media and not state.hears for state in self._counter.sites):
            return None
        try:
            return real_patches(arguments, self.model.hf.config)
        except UnknownPadding as padding:
            raise MismatchError(
                f"some of what the vision tower of {type(self.model.hf).__name__} sees is padding ({padding}), and it "
                "cannot be told what: padding would be counted"
            ) from None

    def _decoder_arguments(self, arguments: Mapping[str, object]) -> Keywords:
        """The arguments that say which tokens an encoder-decoder model's decoder sees: they are not the question's."""
        if arguments.get("decoder_input_ids") is None:
            raise MismatchError(
                f"the decoder of {type(self.model.hf).__name__} sees decoder_input_ids, not the question, and this run "
                "gives none: call model.hf(**inputs, decoder_input_ids=…), or record model.space('encoder')"
            )
        return {
            "input_ids": arguments["decoder_input_ids"],
            "attention_mask": arguments.get("decoder_attention_mask"),
        }

    def _end(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """The model's forward is over: everything is counted."""
        frame = self._counter.frame
        if frame is None:
            return
        OWNERS.check(module)  # the end of a run that another thread began before this recorder was entered
        labels, n_rows = self._labels, len(frame.mask)
        groups = [labels] * n_rows if isinstance(labels, str) else list(labels)
        if len(groups) != n_rows:
            raise MismatchError(f"{len(groups)} group labels were given for a batch of {n_rows} rows")
        self._counter.check_finite()
        self._groups.add(groups, count_items=not self._continues)
        self._counter.forget()

    # -- generations ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _generations(self) -> Iterator[None]:
        """Within, the model's ``generate`` says that its forwards are steps of one generation."""
        hf = self.model.hf
        if not hasattr(hf, "generate"):
            yield
            return
        generate, was_replaced = hf.generate, "generate" in vars(hf)

        @functools.wraps(generate)
        def generating(*args: object, **kwargs: object) -> Tensor:
            OWNERS.check(hf)  # another thread's steps would be taken for those of a generation of this one
            before, self._generation = self._generation, _Generation(args, kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation = before

        vars(hf)["generate"] = generating
        try:
            yield
        finally:
            if was_replaced:
                vars(hf)["generate"] = generate
            else:
                vars(hf).pop("generate", None)


class _Generation:
    """The steps of one call of ``generate``: which of a step's tokens the steps before have not shown."""

    def __init__(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._rows, self._prompt = prompt.shape if isinstance(prompt, Tensor) and prompt.ndim == 2 else (None, None)
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._length = self._shown = 0

    def step(self, arguments: Keywords) -> tuple[Keywords, bool]:
        """The arguments of the next forward with a mask of its tokens, and whether it goes on with counted items.

        The model's own mask does not say that: a cache of fixed size has masks of other shapes, and without any cache
        every step shows all tokens anew.
        """
        ids = arguments["input_ids"]
        if self._rows is not None and len(ids) != self._rows:
            raise QuestionError(
                f"this generation follows {len(ids)} continuations of {self._rows} rows (beams, or several sequences), "
                "so an item's tokens would be counted several times: record with num_beams=1, num_return_sequences=1"
            )
        first = self._length == 0
        from_start = first or ids.shape[1] > self._length  # the whole sequence, for want of a cache
        total = ids.shape[1] if from_start else self._length + ids.shape[1]
        expected = self._prompt if first else self._length + 1
        if expected is not None and total > expected:
            raise QuestionError(
                f"this generation runs {total - expected} further tokens in a step (looked ahead by an assistant, by "
                "prompt lookup, or a prompt in chunks): those that are taken back would be counted too. "
                "Record with neither assistant_model=, prompt_lookup_num_tokens= nor prefill_chunk_size="
            )
        # Of a step that shows the whole sequence, the tokens of the steps before are not counted once more.
        self._shown, self._length = (self._length if from_start else 0), total
        mask = torch.ones_like(ids)
        if self._mask is not None and from_start:
            of_prompt = self._mask[:, : ids.shape[1]].to(ids.device, ids.dtype)
            mask[:, : of_prompt.shape[1]] = of_prompt
        return {**arguments, "attention_mask": mask}, not first

    def new_tokens(self, mask: Tensor) -> Tensor:
        """``[1, token]`` which of a step's tokens ``[row, token]`` the steps before have not shown."""
        return torch.arange(mask.shape[1], device=mask.device)[None] >= self._shown


def _holds(cache: Any) -> bool:
    """Whether a cache holds tokens of earlier forwards."""
    length = getattr(cache, "get_seq_length", None)
    return length is not None and bool(length() > 0)


def _by_name(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Keywords:
    """The arguments of a forward by their names, however they were given."""
    if not args:
        return dict(kwargs)
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(parameters, args)), **kwargs}
