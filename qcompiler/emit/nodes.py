"""The loop over a region's nodes that every format of file shares."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.integer.formats import EIGHT_BITS
from qcompiler.partition import Region

_Emitter = TypeVar("_Emitter")
Refuse = Callable[[ir.Node, str], QCompilerError]


def emit_nodes(
    region: Region,
    emitter: _Emitter,
    emitters: Mapping[str, Callable[[_Emitter, ir.Node], None]],
    language: str,
    refusal: Refuse,
) -> None:
    """Write every node of a region by the function for its operator.

    Args:
        language: what is written, as in messages.
        refusal: makes the error for a node and a reason.

    Raises:
        QCompilerError: an operator that the language lacks, or one that makes other than 8-bit tensors.
    """
    for node in region.nodes:
        emit = emitters.get(node.op_type)
        if emit is None:
            raise refusal(node, f"{language} has no such operator on integers")
        if (wide := next((value for value in node.outputs if value.dtype not in EIGHT_BITS), None)) is not None:
            raise refusal(node, f"it makes {wide.dtype}, and only 8-bit tensors are written")
        emit(emitter, node)
