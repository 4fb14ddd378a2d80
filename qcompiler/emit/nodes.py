"""The loop over a region's nodes that every format of file shares."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.partition import Region

_Emitter = TypeVar("_Emitter")
Refuse = Callable[[ir.Node, str], QCompilerError]


def emit_nodes(
    region: Region,
    emitter: _Emitter,
    emitters: Mapping[str, Callable[[_Emitter, ir.Node], None]],
    language: str,
    refusal: Refuse,
    types: Sequence[ir.DataType],
) -> None:
    """Write every node of a region by the function for its operator.

    Args:
        language: what is written, as in messages.
        refusal: makes the error for a node and a reason.
        types: of the tensors that can be written.

    Raises:
        QCompilerError: an operator that the language lacks, or one that makes tensors of another type.
    """
    for node in region.nodes:
        emit = emitters.get(node.op_type)
        if emit is None:
            raise refusal(node, f"{language} has no such operator on integers")
        if (other := next((value for value in node.outputs if value.dtype not in types), None)) is not None:
            written = " and ".join(str(dtype) for dtype in types)
            raise refusal(node, f"it makes {other.dtype}, and only {written} tensors are written")
        emit(emitter, node)
