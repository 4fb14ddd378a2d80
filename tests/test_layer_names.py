from pathlib import Path

from qcompiler.compile import place
from qcompiler.options import Options

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_operators_go_by_the_names_of_the_users_model() -> None:
    placed = place(EXAMPLES / "digits.onnx", "arm-npu", Options(method="minmax"))
    by_op: dict[str, list[str]] = {}
    for node in placed.integer.graph:
        by_op.setdefault(node.op_type, []).append(placed.layers[node.name or ""])
    assert by_op["QConv"] == ["conv_0 + relu_1", "conv_2 + relu_3", "conv_5 + relu_6"]
    assert by_op["QMaxPool"] == ["maxpool_4"]
    assert by_op["QGemm"] == ["gemm_8"]
    assert set(placed.layers) == {node.name for node in placed.integer.graph}
