"""Fold a Pad into the convolution or pool that reads it."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, integer, ints, producer, shape_of, string
from qcompiler.passes.fold_auto_pad import kernel_of
from qcompiler.passes.rewriting import Rewrite, no_auto_pad, scalar_of, until_settled

_POOLS = ("AveragePool", "MaxPool")
_NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Softplus", "Abs", "Exp", "Sqrt")


class FoldPad(ir.passes.InPlacePass):
    """Pad of spatial axes by a constant, then Conv, AveragePool or MaxPool => the latter with larger pads.

    Conv: the constant is 0. AveragePool: the constant is 0 and becomes counted padding, which any padding of the pool's
    own must then be too. MaxPool: the constant can never win, being -inf, or 0 where the input is never negative.
    A pool's pads stay smaller than its kernel. Other paddings (channels, reflect, cropping) stay Pad.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Conv", *_POOLS), _fold)


def _fold(node: ir.Node) -> bool:
    pad = producer(data_input(node), "Pad")
    if pad is None or not no_auto_pad(node) or any(out.uses() for out in node.outputs[1:]):
        return False
    spatial = len(shape_of(data_input(node))) - 2
    added = _spatial_pads(pad, spatial)
    if added is None:
        return False
    own = ints(node, "pads", (0,) * (2 * spatial))
    pads = tuple(old + new for old, new in zip(own, added, strict=True))
    kernel = kernel_of(node)
    if node.op_type in _POOLS and not all(size < kernel[index % spatial] for index, size in enumerate(pads)):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"pads": pads}
    value = scalar_of(input_of(pad, 2)) if input_of(pad, 2) is not None else 0.0
    if node.op_type == "AveragePool":
        if integer(node, "ceil_mode", 0) or (any(own) and not integer(node, "count_include_pad", 0)):
            return False
        attributes["count_include_pad"] = 1
    if node.op_type == "MaxPool":
        if integer(node, "ceil_mode", 0) or not _never_wins(value, data_input(pad)):
            return False
    elif value != 0:
        return False
    rewrite = Rewrite(node)
    inputs = [data_input(pad), *node.inputs[1:]]
    return rewrite.replace(rewrite.node(node.op_type, inputs, attributes, layer=node))


def _spatial_pads(pad: ir.Node, spatial: int) -> tuple[int, ...] | None:
    """Begins and ends of the last `spatial` axes, if the Pad is constant, adds, and touches no other axis."""
    amounts, axes = const_of(input_of(pad, 1)), const_of(input_of(pad, 3))
    if string(pad, "mode", "constant") != "constant" or amounts is None or (amounts < 0).any():
        return None
    if input_of(pad, 3) is not None and axes is None:
        return None
    rank = spatial + 2
    chosen = np.arange(rank) if axes is None else axes % rank
    begins, ends = np.zeros(rank, np.int64), np.zeros(rank, np.int64)
    begins[chosen], ends[chosen] = np.split(amounts, 2)
    if begins[:2].any() or ends[:2].any():
        return None
    return (*begins[2:].tolist(), *ends[2:].tolist())


def _never_wins(value: float | None, x: ir.Value) -> bool:
    if value is None or value > 0:
        return False
    if value <= np.finfo(np.float32).min:
        return True
    maker = x.producer()
    while maker is not None and maker.op_type in ("MaxPool", "Reshape", "Transpose"):
        maker = data_input(maker).producer()
    if maker is None or value != 0:
        return False
    low = scalar_of(input_of(maker, 1)) if maker.op_type == "Clip" else None
    return maker.op_type in _NOT_NEGATIVE or (low is not None and low >= 0)
