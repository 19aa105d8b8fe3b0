"""Switching neurons off, or setting them to something else, for as long as a ``with`` block lasts.

The intervention is a hook on the model's own modules, so it acts in every way of running the model: traces, plain
calls, and every token of every step of ``generate``. Ablations nest: each acts on what the ones entered before it left.
"""

import contextlib
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmneurons.checks import as_number
from vlmneurons.errors import AblationError, MismatchError
from vlmneurons.files.stopping import Undivided, close_whole
from vlmneurons.model.architectures.hooks import write
from vlmneurons.model.architectures.inside import Removal
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.run.editing import edit_columns, edit_rows
from vlmneurons.run.intervention import Intervention, Values
from vlmneurons.run.owners import OWNERS
from vlmneurons.statistics.counts import ActivationStatistics

MODES = ("zero", "scale", "mean", "add", "replace")
"""What an ablation does with a neuron's value ``x``: 0, ``factor * x``, a mean, ``x + factor * values``, ``values``."""


_IN_FORCE: "weakref.WeakKeyDictionary[nn.Module, list[Ablation]]" = weakref.WeakKeyDictionary()


def ablations_in_force(module: nn.Module) -> "tuple[Ablation, ...]":
    """The ablations that a model is under, in the order in which they were entered."""
    return tuple(_IN_FORCE.get(module, ()))


@dataclass(frozen=True)
class SiteEdit:
    """Which neurons of one site are edited: the same in all rows (``columns``), or others in each (``mask``).

    Attributes:
        columns: the neurons, where they are the same in all rows.
        mask: the neurons of each row, where they are not.
        values: what the mode needs, if anything: for the neurons in ``columns``, or else for all of the site.
    """

    columns: Tensor | None
    mask: Bool[Tensor, "row neuron"] | None
    values: Float[Tensor, "*row neuron"] | None


class Ablation:
    """Sets neurons to zero, or to something else, while it is entered; the model is untouched before and after.

    Leaving it restores the model exactly, also after an exception, and ablations may be left in any order. An empty set
    of neurons changes no bit of any logit.

    Args:
        model: the model.
        neurons: the neurons; or a sequence with one `NeuronSet` for each row of the batches that will be run.
        mode: ``"zero"``; ``"scale"`` (times ``factor``; steering by ``1 + alpha`` in the terms of arXiv 2601.03115);
            ``"mean"`` (set to ``values``, the neurons' mean activations); ``"add"`` (plus ``factor * values``);
            ``"replace"`` (set to ``values``).
        factor: for ``"scale"`` the factor, for ``"add"`` the strength.
        values: for ``"mean"``, ``"add"`` and ``"replace"``: a number, one value per neuron of the set
            (``[len(neurons)]``, in the order of ``neurons.indices``), or one per neuron of the space
            (``[len(space)]``). For ``"mean"`` also `ActivationStatistics` recorded with ``magnitudes=True``: the mean
            over all its groups' counted tokens.
        at: ``"gate"`` or ``"post"``. Zeroing and scaling mean the same at both. The other modes do not, so there ``at``
            must be said, and statistics must be of that kind.

    Raises:
        MismatchError: the neurons, or values, are not of this model.
        AblationError: a mode without what it needs; another thread is ablating the model.

    Example:
        ``with Ablation(model, selection["Egypt"]): answer = model.generate(**inputs)``
    """

    def __init__(
        self,
        model: VLM,
        neurons: NeuronSet | Sequence[NeuronSet],
        mode: str = "zero",
        *,
        factor: float | None = None,
        values: Values = None,
        at: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise AblationError(f"mode {mode!r} does not exist; choose from {', '.join(MODES)}")
        if at is None:
            if mode not in ("zero", "scale"):
                raise AblationError(f"mode {mode!r} differs between the sites: say at='gate' or at='post'")
            at = "post"
        if at not in ("gate", "post"):
            raise AblationError(f"at={at!r}: an ablation acts at 'gate' or at 'post'")
        if mode == "scale" and factor is None:
            raise AblationError("mode 'scale' needs factor=…; 0 is zero ablation, 1.5 amplifies by half")
        if mode in ("zero", "mean", "replace") and factor is not None:
            raise AblationError(f"mode {mode!r} takes no factor")
        if mode in ("mean", "add", "replace") and values is None:
            raise AblationError(f"mode {mode!r} needs values=…")
        if mode in ("zero", "scale") and values is not None:
            raise AblationError(f"mode {mode!r} takes no values")
        check_model(model)
        self.model = model
        self.mode, self.at = mode, at
        self.factor = 1.0 if factor is None else as_number("factor", factor, AblationError)
        if isinstance(neurons, Mapping):
            raise AblationError(
                f"a {type(neurons).__name__} has a set of neurons for each group; give the one to ablate, "
                "such as selection['Egypt']"
            )
        if not isinstance(neurons, NeuronSet | Sequence) or isinstance(neurons, str):
            raise AblationError(f"neurons are a NeuronSet, or a sequence of them; got {type(neurons).__name__}")
        self.by_row = not isinstance(neurons, NeuronSet)
        sets = (neurons,) if isinstance(neurons, NeuronSet) else tuple(neurons)
        self.neurons: NeuronSet | tuple[NeuronSet, ...] = sets if self.by_row else sets[0]
        if not sets:
            raise AblationError("an empty sequence of neuron sets was given; give one set, or one for each row")
        for neurons_of_row in sets:
            if not isinstance(neurons_of_row, NeuronSet):
                kind = type(neurons_of_row).__name__
                raise AblationError(f"neurons are a NeuronSet, or a sequence of them; one is a {kind}")
        self.space = sets[0].space
        for space in (neurons_of_row.space for neurons_of_row in sets):
            if not self.space.same_neurons(space):
                raise MismatchError(f"the rows' neurons are of different spaces: {self.space} and {space}")
        self._refuse_foreign(model, self.space)
        self.edits = self._plan(sets, self._values_of_space(values, sets))
        """The edit of each site that has any: an engine may make them elsewhere than in this model's own forward."""
        self._entered = contextlib.ExitStack()
        self._values = values

    @property
    def what(self) -> Intervention:
        """The ablation as data; where rows have neurons of their own, each row's set is named by its number."""
        neurons = self.neurons
        if isinstance(neurons, tuple):
            neurons = Selection({f"row {row}": neurons_of_row for row, neurons_of_row in enumerate(neurons)})
        factor = self.factor if self.mode in ("scale", "add") else None
        return Intervention(neurons, self.mode, factor, self._values, self.at)

    @staticmethod
    def _refuse_foreign(model: VLM, space: NeuronSpace) -> None:
        for site, width in zip(space.sites, space.widths, strict=True):
            try:
                mlp = model.mlp_of(site)
            except LookupError as error:
                raise MismatchError(f"these neurons are not of this model: {error}") from error
            if mlp.width != width:
                raise MismatchError(
                    f"these neurons are not of this model: {site} has {mlp.width} neurons here, {width} in their space"
                )

    def _values_of_space(self, values: object, sets: tuple[NeuronSet, ...]) -> Float[Tensor, " space"] | None:
        """The values as one for every neuron of the space, whatever form they were given in."""
        if values is None:
            return None
        size = len(self.space)
        if isinstance(values, ActivationStatistics):
            if self.mode != "mean":
                raise AblationError(f"mode {self.mode!r} takes a number or a tensor; statistics are for mode 'mean'")
            if values.space != self.space.at(self.at):
                raise MismatchError(
                    f"the means are of {values.space}, the ablation acts at {self.at} of {self.space}: record them "
                    f"with space=model.space(…, {self.at!r})"
                )
            return values.merge_groups({"all": list(values.groups)}).mean[0]
        try:
            dtype = torch.as_tensor(values).dtype
            if dtype == torch.bool or dtype.is_complex:
                raise TypeError(f"they are {dtype}")
            tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise AblationError(f"values are a number or a tensor of numbers: {error}") from error
        if not torch.isfinite(tensor).all():
            raise AblationError("values hold NaN or infinity")
        if tensor.ndim == 0:
            return tensor.expand(size)
        if tensor.shape == (size,):
            return tensor
        if not self.by_row and tensor.shape == (len(sets[0]),):
            return torch.zeros(size, dtype=torch.float64).index_copy(0, sets[0].indices, tensor)
        allowed = f"[{size}]" if self.by_row else f"[{len(sets[0])}] or [{size}]"
        raise MismatchError(f"values are a number or a tensor of shape {allowed}; got {list(tensor.shape)}")

    def _plan(self, sets: tuple[NeuronSet, ...], values: Tensor | None) -> dict[Site, SiteEdit]:
        """The edit of each site that has neurons of the sets; other sites are left out, and cost nothing."""
        edits = {}
        bounds = torch.tensor(self.space.offsets)
        cuts = [torch.searchsorted(neurons.indices, bounds) for neurons in sets]
        for position, site in enumerate(self.space.sites):
            start, width = self.space.offsets[position], self.space.widths[position]
            columns = [
                neurons.indices[cut[position] : cut[position + 1]] - start
                for neurons, cut in zip(sets, cuts, strict=True)
            ]
            if not any(map(len, columns)):
                continue
            of_site = None if values is None else values[start : start + width]
            if not self.by_row:
                edits[site] = SiteEdit(columns[0], None, None if of_site is None else of_site[columns[0]])
            else:
                mask = torch.zeros((len(sets), width), dtype=torch.bool)
                for row, columns_of_row in enumerate(columns):
                    mask[row, columns_of_row] = True
                edits[site] = SiteEdit(None, mask, of_site)
        return edits

    # -- being entered -------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Ablation":
        hf, entered = self.model.hf, self._entered
        if self in ablations_in_force(hf):
            raise AblationError("this ablation is already in force; make another one to apply it twice")
        try:
            with Undivided():
                entered.enter_context(OWNERS.held(hf, "ablated"))
                _IN_FORCE.setdefault(hf, []).append(self)
                entered.callback(_IN_FORCE[hf].remove, self)
                # Entered first and removed last, so that an empty set is guarded against other threads as well.
                entered.enter_context(OWNERS.guard(hf))
                entered.callback(_refuse_saving(hf).remove)
                for site in self.edits:
                    mlp = self.model.mlp_of(site.at(self.at))
                    entered.enter_context(write(hf, mlp, self.at, self._editor(site)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        close_whole(self._entered)

    def _editor(self, site: Site) -> Callable[..., Tensor | None]:
        """The function that returns one site's edited values."""
        edit_in_place = self.in_place(site)

        def apply(values: Tensor, tokens: Tensor | None = None) -> Tensor:
            # Others may still look at the model's own tensor: a trace shows it, a recorder counts it.
            values = values.clone()
            edit_in_place(values, tokens)
            return values

        return apply

    def in_place(self, site: Site) -> Callable[..., None]:
        """The function that edits one site's values in place; index tensors are moved to their device once.

        Args:
            site: one of `edits`.

        Raises:
            AblationError: the function was given other rows than those that neurons were chosen for.
        """
        edit = self.edits[site]
        cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor | None, Tensor | None, Tensor | None]] = {}

        def apply(values: Tensor, tokens: Tensor | None = None) -> None:
            key = (values.device, values.dtype)
            if key not in cache:
                cache[key] = (
                    None if edit.columns is None else edit.columns.to(values.device),
                    None if edit.mask is None else edit.mask.to(values.device),
                    None if edit.values is None else edit.values.to(values.device, values.dtype),
                )
            columns, mask, new = cache[key]
            if columns is not None:
                edit_columns(values, columns, self.mode, self.factor, new)
            else:
                assert mask is not None
                self._edit_rows(site, values, mask, new, tokens)

        return apply

    def _edit_rows(
        self, site: Site, values: Tensor, mask: Bool[Tensor, "row neuron"], new: Tensor | None, tokens: Tensor | None
    ) -> None:
        n_rows = len(mask)
        if site.tower != "language":
            raise AblationError(f"{site}: the rows of a vision tower are patches, not questions; ablate all rows alike")
        if tokens is not None:
            raise AblationError(f"{site}: per-row neurons are not available for routed experts; ablate all rows alike")
        if values.ndim < 3 or values.shape[0] != n_rows:
            raise AblationError(
                f"{n_rows} sets of neurons were given, one for each row, but {site} sees a batch of shape "
                f"{tuple(values.shape[:-1])}"
            )
        edit_rows(values, mask, self.mode, self.factor, new)

    def __repr__(self) -> str:
        unit = "rows" if self.by_row else "neurons"
        factor = f", factor={self.factor:g}" if self.mode in ("scale", "add") else ""
        return f"Ablation({len(self.neurons)} {unit}, {self.mode!r}{factor}, at={self.at!r})"


# -- saving an ablated model -------------------------------------------------------------------------------------------


class _Refusal:
    """Stands in the way of ``save_pretrained`` while a model is ablated: its weights are not what it computes with."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf, self.holders, self.before = weakref.ref(hf), 0, vars(hf).get("save_pretrained")

    def __call__(self, *_: object, **__: object) -> None:
        raise AblationError(
            "this model is being ablated, and an ablation is no part of its weights: what is saved would be the "
            "untouched model. Save it outside of the ablation"
        )

    def __deepcopy__(self, memo: Mapping[int, object]) -> object:
        # A copy of the model is not ablated, so it may be saved.
        hf = self.hf()
        copied = memo.get(id(hf))
        return self if hf is None or copied is None else types.MethodType(getattr(type(hf), "save_pretrained"), copied)  # noqa: B009


def _refuse_saving(hf: nn.Module) -> Removal:
    """Puts a refusal in the place of ``save_pretrained``: a single one, however many ablations nest."""
    refusal = vars(hf).get("save_pretrained")
    if not isinstance(refusal, _Refusal):
        refusal = vars(hf)["save_pretrained"] = _Refusal(hf)
    refusal.holders += 1

    def allow() -> None:
        refusal.holders -= 1
        if refusal.holders == 0:
            vars(hf).pop("save_pretrained", None)
            if refusal.before is not None:
                vars(hf)["save_pretrained"] = refusal.before

    return Removal(allow)
