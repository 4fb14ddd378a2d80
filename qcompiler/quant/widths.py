"""How wide activations are, operator by operator, where some compute in sixteen bits and others in eight.

An operator reads all its inputs in its own type. A tensor is made in the widest type that a reader wants, whatever its
maker computes in, and is brought to the other type for those that want it. Data movement and Concat hand on what is
read from them.
"""

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.graph import is_op, string, users
from qcompiler.integer.facts import LOOKUP_FUNCTIONS
from qcompiler.quant import operators
from qcompiler.quant.operators import MAC_OPS
from qcompiler.quant.types import DTypeName, WeightRequest
from qcompiler.quant.weight_bits import activation_dtype
from qcompiler.target import Target

WIDE: DTypeName = "int16"


def eight_bits_only(node: ir.Node) -> str | None:
    """Why a node's inputs cannot be of 16 bits."""
    if _interpolates(node):
        return f"{node.op_type} takes 8-bit inputs"
    if is_op(node, *MAC_OPS) and not operators.has_weights(node):
        return "products of two activations take 8-bit inputs"
    return None


def keeps_width(node: ir.Node, region: Sequence[ir.Node]) -> bool:
    """Whether a node makes what it reads, and no other width: tables, softmax and interpolation.

    Args:
        region: the members of the lookup table that ends in `node`, if it does.
    """
    return len(region) > 1 or is_op(node, *LOOKUP_FUNCTIONS, "Softmax") or _interpolates(node)


def _interpolates(node: ir.Node) -> bool:
    return is_op(node, "Resize") and string(node, "mode", "nearest") == "linear"


class Widths:
    """The types of activations that operators read, as far as that follows from what the user asks for."""

    def __init__(
        self, nodes: Sequence[ir.Node], regions: Mapping[ir.Node, Sequence[ir.Node]], target: Target,
        wanted: WeightRequest,
    ) -> None:  # fmt: skip
        """Raises QCompilerError where the target has no such type, or an operator has no form that reads it."""
        self.usual: DTypeName = activation_dtype(target, wanted)
        self._nodes, self._regions = nodes, regions
        self._asked: dict[ir.Node, DTypeName] = {}
        for layer, kind in wanted.activations_by_layer.items():
            dtype = activation_dtype(target, WeightRequest(activations=kind))
            for node in operators.named_nodes(nodes, [layer], "--layer-activations"):
                clamp = operators.clamp_of(node)
                members = [*(regions.get(node) or (node,)), *([clamp] if clamp is not None else [])]
                reason = eight_bits_only(node)
                if dtype == WIDE and reason is not None:
                    raise QCompilerError(f"--layer-activations {layer}=int16: {reason}.")
                self._asked |= dict.fromkeys(members, dtype)
        self._handed_on: dict[ir.Node, DTypeName] = {}

    @property
    def all(self) -> list[DTypeName]:
        """The types that occur."""
        return list(dict.fromkeys((self.usual, *self._asked.values())))

    def of(self, node: ir.Node) -> DTypeName:
        """What a node reads."""
        return self._asked.get(node) or self._handed_on.get(node) or self.usual

    def settle(self, in_float: Collection[ir.Node]) -> None:
        """Let data movement, once it is known what stays in float, hand on what its readers want."""
        if len(self.all) == 1:
            return
        for node in reversed(self._nodes):
            if node in in_float or node in self._asked or not _hands_on(node) or _interpolates(node):
                continue
            types: list[DTypeName] = [
                self.of(reader) for value in node.outputs for reader in users(value) if reader not in in_float
            ]
            if types:
                self._handed_on[node] = _widest(types)

    def made(self, value: ir.Value, in_float: Collection[ir.Node]) -> DTypeName:
        """The type a quantized value is made in."""
        maker = value.producer()
        kept = maker is not None and (operators.inherits_format(maker) or keeps_width(maker, self._region(maker)))
        if maker is not None and maker not in in_float and kept:
            return self.of(maker)
        types: list[DTypeName] = [self.of(reader) for reader in users(value) if reader not in in_float]
        if not types:
            return self.of(maker) if maker is not None and maker not in in_float else self.usual
        return _widest(types)

    def _region(self, node: ir.Node) -> Sequence[ir.Node]:
        return self._regions.get(node, ())


def _widest(types: Sequence[DTypeName]) -> DTypeName:
    return WIDE if WIDE in types else types[0]


def _hands_on(node: ir.Node) -> bool:
    return operators.inherits_format(node) or is_op(node, "Concat")
