"""Store embedding tables in 8 bits."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, integer
from qcompiler.passes.rewriting import Rewrite, until_settled

LEAST_ROWS, LEAST_WIDTH = 256, 8
"""Smaller tables are not worth the two operators that bring rows back to float."""


class QuantizeEmbeddings(ir.passes.InPlacePass):
    """Gather of rows of a float constant [rows, width]  ⇒  Gather of int8 rows → Cast → Mul by Gather of their scales.

    A row's scale is its largest magnitude over 127. Left alone: tables smaller than `LEAST_ROWS` by `LEAST_WIDTH`,
    other axes than the first, and nodes to keep.

    Args:
        keep: names of Gather nodes whose tables stay in float.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Gather",), lambda node: node.name not in self.keep and _rewrite(node))


def _table(node: ir.Node) -> np.ndarray | None:
    """The table a Gather takes rows of at run time, if it is one to store in 8 bits."""
    table = const_of(data_input(node))
    if table is None or table.dtype != np.float32 or table.ndim != 2:
        return None
    if table.shape[0] < LEAST_ROWS or table.shape[1] < LEAST_WIDTH:
        return None
    return table if integer(node, "axis", 0) == 0 and const_of(data_input(node, 1)) is None else None


def _rewrite(node: ir.Node) -> bool:
    table = _table(node)
    if table is None:
        return False
    name, indices = data_input(node).name, data_input(node, 1)
    scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    rewrite = Rewrite(node)
    codes = rewrite.constant(np.rint(table / scale).astype(np.int8), f"{name}_codes")
    rows = rewrite.node("Gather", [codes, indices], {"axis": 0}, layer=node)
    real = rewrite.node("Cast", [rows], {"to": int(ir.DataType.FLOAT)})
    scales = rewrite.node("Gather", [rewrite.constant(scale, f"{name}_scales"), indices], {"axis": 0})
    return rewrite.replace(rewrite.node("Mul", [real, scales]))
