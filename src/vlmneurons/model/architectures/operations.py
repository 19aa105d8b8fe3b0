"""torch's operations by what they do to the numbers of an MLP: the vocabulary in which flows are read."""

import operator
from collections.abc import Callable, Container

import torch
import torch.nn.functional as F
from torch import fx

PRODUCTS = {operator.mul, torch.mul, torch.multiply, operator.imul, "mul", "mul_"}
AFFINE = {operator.add, operator.iadd, torch.add, operator.sub, operator.neg, operator.truediv, torch.div, "add", "div"}
CLAMPS = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", torch.minimum, torch.maximum}
PASSIVE = {F.dropout, "to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}
ACTIVATIONS = {
    *(torch.sigmoid, torch.tanh, torch.relu, "sigmoid", "tanh", "relu", "relu_"),
    *(F.silu, F.gelu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.hardswish, F.hardtanh),
    *(F.softplus, F.sigmoid, F.tanh, F.logsigmoid, F.softsign, F.hardsigmoid, F.glu, F.prelu),
}
BENDING = ACTIVATIONS - {"relu_", F.glu, F.prelu} | {
    *(operator.pow, torch.pow, torch.square, torch.exp, torch.erf, torch.abs, "pow", "square", "exp", "erf", "abs"),
}
SQUASHING = {torch.sigmoid, F.sigmoid, "sigmoid", torch.softmax, F.softmax, "softmax", torch.tanh, F.tanh, "tanh"}
ELEMENTWISE = PRODUCTS | AFFINE | CLAMPS | PASSIVE | BENDING
MATMULS = {torch.bmm, torch.matmul, operator.matmul, F.linear, "bmm", "matmul"}
TURNS = {"transpose", "mT", "t", "permute", torch.transpose}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "chunk", "split", "tensor_split"),
    *("split_with_sizes", "unbind", "narrow", "select", "transpose", "permute", "movedim", "swapaxes", "t", "detach"),
    *("view_as", "reshape_as", "expand_as", "diagonal", "as_strided", "contiguous", "to", "float", "type"),
}
_SUMS_OVER_TOKENS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__"}


def name_of(node: fx.Node) -> str:
    """What an operation is called, as a function or as a method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_call(node: fx.Node) -> bool:
    """Whether a node calls a function or a method, and no module."""
    return node.op in ("call_function", "call_method")


def is_view(node: fx.Node) -> bool:
    """Whether what is written into a node may be seen in the one that it was made of."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "H", "mH", "data")
    return node.target is operator.getitem or (is_call(node) and name_of(node) in _VIEWS)


def lacks_operand(node: fx.Node) -> bool:
    """Whether a product is with an argument that was not given: with something from outside the module."""
    return node.target in PRODUCTS | AFFINE and None in node.args


def is_clamp_at_zero(node: fx.Node) -> bool:
    """Whether a clamp is a ReLU by another name."""
    return 0 in [bound for bound in (*node.args[1:], *node.kwargs.values()) if not isinstance(bound, fx.Node)]


def keeps_straight(node: fx.Node, inputs: Container[fx.Node]) -> bool:
    """Whether a step only shifts, stretches, clamps, lays out or casts ``inputs``: it bends none of them."""
    if node.target in CLAMPS:
        return not is_clamp_at_zero(node)
    if node.target in PRODUCTS:
        operands = [operand for operand in (*node.args, *node.kwargs.values()) if isinstance(operand, fx.Node)]
        return sum(operand in inputs for operand in operands) < 2 and len(set(operands)) == len(operands)
    return node.target in AFFINE | PASSIVE or node.target is getattr or is_view(node)


def mixes_tokens(node: fx.Node, is_weight: Callable[[fx.Node], bool]) -> bool:
    """Whether a step sums over tokens, as attention does: what comes out is no token's own number.

    A product of two matrices does, unless one of them is a weight: then it is a projection of every token.
    """
    if not is_call(node):
        return False
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return True
    if name == "cumsum":  # along the tokens, and not along the neurons
        return [*node.args[1:], *node.kwargs.values()][:1] in ([-2], [0], [1])
    return name in _SUMS_OVER_TOKENS and not any(map(is_weight, node.all_input_nodes))
