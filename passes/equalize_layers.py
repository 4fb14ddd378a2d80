"""Even out the channels between two layers, so that one scale suits all of them."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    add_initializer,
    const_of,
    data_input,
    input_of,
    integer,
    is_op,
    nodes_of,
    only_user,
    real,
    remove_dead,
    shape_of,
    users,
)
from qcompiler.quant.layer_rows import from_weight_rows, has_rows, weight_rows

_BETWEEN = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool")
"""Operators f with f(s x) = s f(x) for s > 0, each channel for itself."""

TOLERANCE = 0.01
"""Channels whose factor differs from 1 by less are even enough."""


class EqualizeLayers(ir.passes.InPlacePass):
    """Conv or Gemm → Relu, LeakyRelu, pools or nothing → Conv or Gemm: channel i between them is divided by sᵢ.

    sᵢ = sqrt(r₁ᵢ / r₂ᵢ), where r₁ᵢ is the largest weight that makes the channel and r₂ᵢ the largest that reads it; both
    then are sqrt(r₁ᵢ r₂ᵢ). Repeated over all pairs until nothing changes, which converges; the model computes the same.
    (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1.)
    Left alone: a channel that something else reads, a Clip between (its bound is the same for all channels), weights
    that other nodes read, and quantized models.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        pairs = [pair for node in nodes_of(model.graph, "Conv", "Gemm") if (pair := _pair(node)) is not None]
        layers = {node: _Layer(node) for pair in pairs for node in pair}
        changed = set[ir.Node]()
        unsettled = bool(pairs)
        while unsettled:
            unsettled = False
            for first, second in pairs:
                factors = _factors(layers[first].made(), layers[second].read())
                if np.abs(factors - 1).max() > TOLERANCE:
                    layers[first].scale_outputs(1 / factors)
                    layers[second].scale_inputs(factors)
                    changed |= {first, second}
                    unsettled = True
        for node in changed:
            layers[node].store()
        if changed:
            remove_dead(model)
        return ir.passes.PassResult(model, modified=bool(changed))


class _Layer:
    """A layer's weights as [groups, M, K] and its bias, while they change."""

    def __init__(self, node: ir.Node) -> None:
        weights, bias = const_of(data_input(node, 1)), const_of(input_of(node, 2))
        assert weights is not None
        self.node = node
        self.rows = weight_rows(node, weights).astype(np.float64)
        self.bias = None if bias is None else bias.astype(np.float64)
        self.inputs = shape_of(data_input(node))[1]

    def _by_input(self) -> np.ndarray:
        """A view as [groups, M, input channels of a group, taps]."""
        groups, outputs, _ = self.rows.shape
        return self.rows.reshape(groups, outputs, self.inputs // groups, -1)

    def made(self) -> np.ndarray:
        """The largest weight of each output channel."""
        return np.abs(self.rows).max(axis=2).reshape(-1)

    def read(self) -> np.ndarray:
        """The largest weight that reads each input channel."""
        return np.abs(self._by_input()).max(axis=(1, 3)).reshape(-1)

    def scale_outputs(self, factors: np.ndarray) -> None:
        self.rows *= factors.reshape(*self.rows.shape[:2], 1)
        if self.bias is not None:
            self.bias = self.bias.reshape(-1) * factors

    def scale_inputs(self, factors: np.ndarray) -> None:
        view = self._by_input()
        view *= factors.reshape(view.shape[0], 1, -1, 1)

    def store(self) -> None:
        for index, array in ((1, from_weight_rows(self.node, self.rows)), (2, self.bias)):
            old = input_of(self.node, index)
            if old is not None and array is not None and self.node.graph is not None:
                graph = self.node.graph
                assert isinstance(graph, ir.Graph)
                new = add_initializer(graph, f"{old.name}_equalized", array.astype(np.float32))
                self.node.replace_input_with(index, new)


def _factors(made: np.ndarray, read: np.ndarray) -> np.ndarray:
    """s per channel; 1 where a side is all zeros."""
    alive = (made > 0) & (read > 0)
    return np.sqrt(np.where(alive, made, 1) / np.where(alive, read, 1))


def _pair(first: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """A layer and the one that alone reads it."""
    if not _scalable(first):
        return None
    reader = only_user(first.outputs[0])
    while reader is not None and is_op(reader, *_BETWEEN):
        if len(reader.outputs) > 1:
            return None
        reader = only_user(reader.outputs[0])
    if reader is None or not is_op(reader, "Conv", "Gemm") or not _scalable(reader):
        return None
    value = data_input(reader)
    same = shape_of(value)[1] == shape_of(first.outputs[0])[1]
    return (first, reader) if same and value.producer() is not None else None


def _scalable(node: ir.Node) -> bool:
    """Whether weights and bias are float constants of this node alone, and used as they stand."""
    constants = [value for value in node.inputs[1:] if value is not None]
    alone = all(const_of(value) is not None and users(value) == (node,) for value in constants)
    plain = is_op(node, "Conv") or (real(node, "alpha", 1.0) == real(node, "beta", 1.0) == 1)
    bias = const_of(input_of(node, 2))
    fits = bias is None or bias.size == shape_of(node.outputs[0])[1]
    return alone and plain and fits and has_rows(node) and not integer(node, "transA", 0)
