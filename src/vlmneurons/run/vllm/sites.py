"""Named sites in nnsight's traces of a model that vLLM runs: ``language.layers[3].mlp.post``.

Traces of such a model are nnsight's own (`nnsight.modeling.vllm`): each invoke is a request, whose block runs in vLLM's
workers, where values are ``[token, neuron]`` of that request alone. vLLM computes ``pre`` and ``up`` in one projection.
Under tensor parallelism each rank computes a part of both, so that their columns come as pre 0, up 0, pre 1, up 1; here
they are put in order. What cannot be had raises.
"""

import functools
from typing import TYPE_CHECKING, cast, no_type_check

from nnsight.intervention.envoy import Envoy

from vlmneurons.errors import MismatchError
from vlmneurons.model.travel import PART
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.run.vllm.mlps import decoder_mlps

if TYPE_CHECKING:
    from nnsight.modeling.vllm import VLLM

    from vlmneurons.model.named import NamedTower  # what a type checker sees: the same names, and no others


@no_type_check
def _class() -> type:
    """The class of an MLP; one made in a function is sent to the workers by its source, as the trace is."""

    class MLP:
        """An MLP in vLLM, and all else of nnsight's envoy of it."""

        def __init__(self, envoy, width, ranks):
            self.__dict__.update({"_envoy": envoy, "_width": width, "_ranks": ranks})

        def read(self, kind):
            """A copy of the values of a site, ``[token, neuron]``; writing into it does not reach the model."""
            if kind == "post":
                return self._envoy.down_proj.input.clone()
            if kind not in ("pre", "gate", "up"):
                raise ValueError(f"site kind {kind!r} does not exist; the kinds are pre, gate, up, post")
            parts = self._envoy.gate_up_proj.output[0].unflatten(-1, (self._ranks, 2, self._width // self._ranks))
            pre, up = (parts[..., place, :].flatten(-2).clone() for place in (0, 1))
            if kind == "gate":  # the activation times 1, whatever the activation
                import torch

                return self._envoy.act_fn._module.forward_native(torch.cat([pre, torch.ones_like(up)], -1))
            return pre if kind == "pre" else up

        def __getattr__(self, name):
            if name.startswith("__") or "_envoy" not in self.__dict__:
                raise AttributeError(name)
            if name == "post":
                return self._envoy.down_proj.input
            if name == "gate":
                raise ValueError("vLLM has 'gate' nowhere by itself: read('gate') computes it, and 'post' can be set")
            if name not in ("pre", "up"):
                return getattr(self._envoy, name)
            if self._ranks > 1:
                raise ValueError(
                    f"{name!r} lies in pieces on {self._ranks} ranks, so that no tensor of it could be edited in "
                    f"place: read({name!r}) gives a copy in order, and assigning to .{name} sets it"
                )
            start = 0 if name == "pre" else self._width
            return self._envoy.gate_up_proj.output[0][..., start : start + self._width]

        def __setattr__(self, name, value):
            if name == "post":
                self._envoy.down_proj.input = value
            elif name == "gate":
                raise ValueError("vLLM has 'gate' nowhere by itself, so that it cannot be set: set 'post' or 'pre'")
            elif name in ("pre", "up"):
                whole, *rest = self._envoy.gate_up_proj.output
                whole = whole.clone()
                parts = whole.unflatten(-1, (self._ranks, 2, self._width // self._ranks))
                parts[..., ("pre", "up").index(name), :] = value.unflatten(-1, (self._ranks, -1))
                self._envoy.gate_up_proj.output = (whole, *rest)
            else:
                setattr(self._envoy, name, value)

        def __call__(self, *args, **kwargs):
            return self._envoy(*args, **kwargs)

    return MLP


_MLP = _class()


def named_in_vllm(model: VLM, held: "VLLM") -> "NamedTower":
    """The language tower of a model in nnsight's traces of the same model in vLLM: ``….layers[3].mlp.post``.

    Args:
        model: the model, for its names; its weights are not used (``weights=False`` or ``engine="vllm"`` will do).
        held: nnsight's model of it, started: ``VLLM(name, tensor_parallel_size=2, dispatch=True)``.

    Returns:
        ``.layers[i].mlp`` with ``.post``, which can be read, edited in place and assigned; ``.pre`` and ``.up``, which
        can be too, but under tensor parallelism only assigned; and ``.read(kind)``, a copy of any kind, also ``gate``.
        All else is nnsight's envoy of the module. What cannot be had raises within the trace.

    Raises:
        MismatchError: vLLM is not started; or it has other MLPs, such as experts.

    Example:
        ``language = named_in_vllm(model, held)``, then
        ``with held.trace(prompt, temperature=0.0): post = language.layers[3].mlp.post.save()``
    """
    check_model(model)
    entry = getattr(held, "vllm_entrypoint", None)
    if entry is None:
        raise MismatchError("held is nnsight's VLLM, started: VLLM(name, dispatch=True); how it is spread is not known")
    spread = getattr(entry, "llm_engine", entry).vllm_config.parallel_config  # of either kind of engine
    ranks, root = int(spread.tensor_parallel_size), held._module
    if spread.pipeline_parallel_size != 1:
        raise MismatchError("pipeline_parallel_size: a trace sees the layers of one stage; leave it at 1")
    paths_of = decoder_mlps(root)
    layers = {}
    for mlp in model.language.tower.mlps:
        where, paths = f"layer {mlp.layer} has {mlp.name}", paths_of.get(mlp.layer, [])
        if len(paths) != 1 or mlp.expert is not None or mlp.routed:
            in_vllm = ", ".join(paths) or "no MLP with one projection of gate and up"
            raise MismatchError(f"{where} here, and in vLLM {in_vllm}: no site of it can be named there")
        width = getattr(root.get_submodule(f"{paths[0]}.down_proj"), "input_size", 0)
        if width != mlp.width:
            raise MismatchError(f"{where} of {mlp.width} neurons here, and {width} in vLLM: another model")
        envoy = functools.reduce(_child, paths[0].split("."), cast("Envoy", held))
        layers[str(mlp.layer)] = PART(None, {"mlp": _MLP(envoy, mlp.width, ranks)}, {})
    return cast("NamedTower", PART(None, {"layers": PART(None, layers, {})}, {}))


def _child(envoy: Envoy, step: str) -> Envoy:
    return envoy[int(step)] if step.isdigit() else getattr(envoy, step)
