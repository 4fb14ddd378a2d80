"""What the user calls an operator of the integer graph.

Realizing names an operator after the quantized value it makes. The quantized model still has the user's nodes: those
between the DequantizeLinear and the QuantizeLinear around them became the one operator.
"""

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.graph import is_op, value_name

JOINT = " + "


def layer_names(quantized: ir.Model, integer: ir.Model) -> dict[str, str]:
    """Names by node name of the integer graph; a node that stands for several has all of theirs, first to last.

    Args:
        quantized: the QDQ model.
        integer: the graph realized from it.
    """
    makers = {value_name(value): _makers(node) for node in quantized.graph for value in node.outputs if value.name}
    names: dict[str, str] = {}
    for node in integer.graph:
        assert node.name, "every node is named"
        found = _look_up(node.name, makers) or _look_up(value_name(node.outputs[0]), makers)
        names[node.name] = found or node.name
    return names


def _makers(node: ir.Node) -> str:
    """The node itself; of a QuantizeLinear, the nodes behind it, back to where they read quantized values."""
    found: list[str] = []
    waiting = [node.inputs[0]] if is_op(node, "QuantizeLinear") else []
    while waiting:
        value = waiting.pop()
        maker = value.producer() if value is not None else None
        if maker is not None and not is_op(maker, "DequantizeLinear", "QuantizeLinear") and maker.name not in found:
            found.append(maker.name or "")
            waiting += maker.inputs
    return JOINT.join(found[::-1]) or node.name or ""


def _look_up(name: str, makers: Mapping[str, str]) -> str | None:
    """What made the value of this name, or the one that NAME.nhwc, NAME_1 or NAME.x.nhwc was derived from."""
    while name and name not in makers:
        name = name[: max(name.rfind("."), name.rfind("_"), 0)]
    return makers.get(name)
