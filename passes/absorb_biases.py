"""Move what every pixel of a channel has in common into the bias of the next layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    add_initializer,
    const_of,
    data_input,
    input_of,
    ints,
    is_op,
    nodes_of,
    only_user,
    real,
    shape_of,
    string,
    users,
    value_name,
)
from qcompiler.quant.layer_rows import has_rows, weight_rows

DEVIATIONS = 3.0
"""Standard deviations below its mean that a channel is taken never to fall."""


@dataclass(frozen=True)
class ChannelMoments:
    """What a Conv or Gemm makes, before its activation: [channels] each."""

    mean: np.ndarray
    deviation: np.ndarray


class AbsorbBiases(ir.passes.InPlacePass):
    """Conv or Gemm → Relu → Conv or Gemm: channel i between them is lowered by cᵢ = max(0, meanᵢ - 3 deviationᵢ).

    The first bias loses cᵢ and the second gains Σᵢ wᵢ cᵢ, so that activations have a smaller range and the model
    computes the same wherever channel i is at least cᵢ before the Relu. (Nagel et al., Data-Free Quantization Through
    Weight Equalization and Bias Correction, ICCV 2019, section 4.1.3.)
    Left alone: channels that something else reads, a second layer with padding (which reads 0, not cᵢ), layers without
    a bias or whose constants other nodes read, and quantized models.
    """

    def __init__(self, moments: Mapping[str, ChannelMoments]) -> None:
        """`moments`: by name of what a layer makes."""
        super().__init__()
        self._moments = moments

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(
            model, modified=any([self._absorb(node) for node in nodes_of(model.graph, "Conv", "Gemm")])
        )

    def _absorb(self, first: ir.Node) -> bool:
        moments, second = self._moments.get(value_name(first.outputs[0])), reader_of(first)
        if moments is None or second is None or not _own_bias(first):
            return False
        bias, weights = const_of(input_of(first, 2)), const_of(data_input(second, 1))
        assert bias is not None and weights is not None
        common = np.maximum(0.0, moments.mean - DEVIATIONS * moments.deviation)
        # What was absorbed before is not there to be absorbed again.
        common = np.where(common > 1e-6 * moments.deviation, common, 0.0)
        if not common.any():
            return False
        rows = weight_rows(second, weights).astype(np.float64)
        groups, outputs, _ = rows.shape
        by_input = rows.reshape(groups, outputs, len(common) // groups, -1).sum(axis=3)
        gained = np.einsum("gmi,gi->gm", by_input, common.reshape(groups, -1)).reshape(-1)
        after = const_of(input_of(second, 2))
        _set_bias(first, bias.reshape(-1) - common)
        _set_bias(second, gained if after is None else after.reshape(-1) + gained)
        # The channels' means have moved along.
        self._moments = {
            **self._moments,
            value_name(first.outputs[0]): ChannelMoments(moments.mean - common, moments.deviation),
        }
        return True


def reader_of(first: ir.Node) -> ir.Node | None:
    """The layer that alone reads a layer's activations, without padding, or None."""
    activation = only_user(first.outputs[0])
    if activation is None or not is_op(activation, "Relu"):
        return None
    second = only_user(activation.outputs[0])
    if second is None or not is_op(second, "Conv", "Gemm") or not has_rows(second):
        return None
    weights = input_of(second, 1)
    fits = weights is not None and const_of(weights) is not None and users(weights) == (second,)
    padded = any(ints(second, "pads", (0,))) or string(second, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    plain = data_input(second).producer() is activation and not padded
    scaled = is_op(second, "Gemm") and not real(second, "alpha", 1.0) == real(second, "beta", 1.0) == 1
    return second if fits and plain and not scaled and _own_bias(second, needed=False) else None


def _own_bias(node: ir.Node, *, needed: bool = True) -> bool:
    """Whether a layer has a bias of one number per channel that nobody else reads, or none if it need not."""
    value = input_of(node, 2)
    if value is None:
        return not needed
    bias = const_of(value)
    return bias is not None and users(value) == (node,) and bias.size == shape_of(node.outputs[0])[1]


def _set_bias(node: ir.Node, bias: np.ndarray) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    new = add_initializer(graph, f"{value_name(node.outputs[0])}_bias_absorbed", bias.astype(np.float32))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, new)
