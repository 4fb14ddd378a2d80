"""Move outliers of activation channels into the weights that read them."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.graph import add_initializer, const_of, data_input, graph_of, is_op, remove_dead, shape_of, users
from qcompiler.passes.rewriting import constant_operand

STRENGTH = 0.5
"""How much of the difference between channels moves over to the weights; 0.5 suits most networks (paper, section 4)."""


class MigrateScales(ir.passes.InPlacePass):
    """Mul by a constant [K] (→ Add of a constant [K]), read by MatMuls only: channel j is divided by sⱼ before them.

    sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1 - α), Xⱼ being the channel's values in the calibration data and Wⱼ the row of all MatMul
    weights that reads it. The constants take the division, the weights the multiplication, so the model computes the
    same. This is where layer normalization ends in a transformer, and where its outlier channels are.
    (Xiao et al., SmoothQuant, ICML 2023, equations 3 and 4.)
    Left alone: tensors without maxima, tensors that something else reads, and weights that other nodes read. A tensor
    is migrated once: the pass forgets its maxima then.

    Args:
        maxima: by name of the tensor the MatMuls read, [K] the largest magnitude of each channel.
        strength: α, between 0 (leave activations) and 1 (even them out wholly).
    """

    def __init__(self, maxima: Mapping[str, np.ndarray], strength: float = STRENGTH) -> None:
        super().__init__()
        self.maxima = dict(maxima)
        self.strength = strength

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            for value in node.outputs:
                modified |= value.name in self.maxima and self._migrate(value)
        if modified:
            remove_dead(model)
        return ir.passes.PassResult(model, modified=modified)

    def _migrate(self, value: ir.Value) -> bool:
        constants, readers = _affine(value), _readers(value)
        if not constants or not readers:
            return False
        largest = self.maxima.pop(value.name or "")
        weights = np.max([np.abs(_array(reader, 1)).max(axis=1) for reader in readers], axis=0)
        alive = (largest > 0) & (weights > 0)
        ratio = np.where(alive, largest, 1) ** self.strength / np.where(alive, weights, 1) ** (1 - self.strength)
        for node, index in constants:
            _replace(node, index, _array(node, index) / ratio)
        for reader in readers:
            _replace(reader, 1, _array(reader, 1) * ratio[:, None])
        return True


def _affine(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The constants [K] of the Mul, or Mul and Add, that make `value`: node and index; empty if it is not made so."""
    found: list[tuple[ir.Node, int]] = []
    while (maker := value.producer()) is not None and is_op(maker, "Mul", "Add"):
        operand = constant_operand(maker)
        width = shape_of(value)[-1]
        if operand is None or operand[1].shape[-1:] != (width,) or operand[1].size != width:
            return []
        if found and (users(value) != (found[-1][0],) or value.is_graph_output()):
            return []
        found.append((maker, operand[2]))
        if is_op(maker, "Mul"):
            return found
        value = operand[0]
    return []


def _readers(value: ir.Value) -> list[ir.Node]:
    """The MatMuls that read `value`, each with a constant matrix of its own; empty if anything else reads it."""
    readers = list(users(value))
    plain = all(
        is_op(node, "MatMul")
        and data_input(node) is value
        and const_of(data_input(node, 1)) is not None
        and len(shape_of(data_input(node, 1))) == 2
        and users(data_input(node, 1)) == (node,)
        for node in readers
    )
    return readers if plain and not value.is_graph_output() else []


def _array(node: ir.Node, index: int) -> np.ndarray:
    array = const_of(data_input(node, index))
    assert array is not None
    return array.astype(np.float64)


def _replace(node: ir.Node, index: int, array: np.ndarray) -> None:
    new = add_initializer(graph_of(node), f"{data_input(node, index).name}_migrated", array.astype(np.float32))
    node.replace_input_with(index, new)
