"""LSTM, GRU and RNN on the CPU against onnxruntime: as a model has them, simplified and compiled."""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qcompiler.backends.float_ops import unsupported
from qcompiler.compile import estimate, place
from qcompiler.passes.normalize_recurrent import NormalizeRecurrent
from qcompiler.passes.project_recurrent import ProjectRecurrent
from qcompiler.pipeline import SIMPLIFY, run_passes
from qcompiler.recurrent import FUNCTIONS
from qcompiler.target_loader import load_target

Attributes = dict[str, int | float | str | list[str] | list[float]]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}


@dataclass(frozen=True)
class Case:
    kind: str
    sizes: tuple[int, int, int, int] = (5, 2, 6, 8)
    """Steps, batch, width, hidden units."""
    direction: str = "forward"
    states: int = 0
    """Initial states that are given: the hidden one, then the cell."""
    bias: bool = True
    peepholes: bool = False
    outputs: tuple[int, ...] = (0,)
    attributes: Attributes = field(default_factory=dict)


def functions(kind: str, *names: str) -> Attributes:
    """Activations and the parameters of those that have any, odd ones."""
    attributes: Attributes = {"activations": list(names)}
    for name, label, numbers in (
        ("activation_alpha", "alpha", (0.6, 0.4, 0.9)),
        ("activation_beta", "beta", (0.3, 0.7, 0.8)),
    ):
        given = [
            n for n, function in zip(numbers, names, strict=False) if getattr(FUNCTIONS[function], label) is not None
        ]
        if given:
            attributes[name] = given
    return attributes


CASES = (
    *(Case(kind, outputs=tuple(range(STATES[kind] + 1))) for kind in GATES),
    *(Case(kind, (7, 3, 5, 13), "bidirectional", states=STATES[kind], outputs=(0, 1)) for kind in GATES),
    *(Case(kind, (4, 1, 3, 130), "reverse", states=1, bias=False) for kind in GATES),
    *(Case(kind, (1, 1, 1, 1), outputs=(1,)) for kind in GATES),
    *(Case(kind, attributes={"clip": 0.4}) for kind in GATES),
    Case("LSTM", (6, 2, 4, 24), states=2, peepholes=True, outputs=(0, 1, 2)),
    Case("LSTM", (6, 2, 4, 9), "bidirectional", peepholes=True, outputs=(2,)),
    Case("LSTM", attributes={"input_forget": 1}),
    Case("GRU", (6, 2, 5, 20), states=1, outputs=(0, 1), attributes={"linear_before_reset": 1}),
    Case("GRU", (6, 1, 5, 7), "bidirectional", attributes={"linear_before_reset": 1}),
    Case("GRU", bias=False, attributes={"linear_before_reset": 1}),
    *(Case("RNN", attributes=functions("RNN", name)) for name in FUNCTIONS),
    Case("LSTM", attributes=functions("LSTM", "HardSigmoid", "ScaledTanh", "Softsign")),
    Case("GRU", attributes=functions("GRU", "HardSigmoid", "LeakyRelu")),
)


def model_of(cases: tuple[Case, ...], rng: np.random.Generator) -> onnx.ModelProto:
    inputs, constants, nodes, outputs = [], [], [], []

    def constant(*shape: int) -> str:
        array = (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)
        constants.append(numpy_helper.from_array(array, f"c{len(constants)}"))
        return constants[-1].name

    def fed(*shape: int) -> str:
        inputs.append(helper.make_tensor_value_info(f"x{len(inputs)}", onnx.TensorProto.FLOAT, shape))
        return inputs[-1].name

    for index, case in enumerate(cases):
        (steps, batch, width, hidden), rows = case.sizes, GATES[case.kind] * case.sizes[-1]
        ways = 2 if case.direction == "bidirectional" else 1
        operands = [fed(steps, batch, width), constant(ways, rows, width), constant(ways, rows, hidden)]
        operands += [constant(ways, 2 * rows) if case.bias else "", ""]
        operands += [fed(ways, batch, hidden) if state < case.states else "" for state in range(STATES[case.kind])]
        operands += [constant(ways, 3 * hidden)] if case.peepholes else []
        names = [f"y{index}_{k}" if k in case.outputs else "" for k in range(max(case.outputs) + 1)]
        node = helper.make_node(case.kind, operands, names, f"n{index}", hidden_size=hidden, direction=case.direction)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in case.attributes.items())
        nodes.append(node)
        outputs += [helper.make_empty_tensor_value_info(name) for name in names if name]
    graph = helper.make_graph(nodes, "recurrent", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


@pytest.mark.parametrize("kind", list(GATES))
def test_agrees_with_onnxruntime(kind, run_on_cpu, tmp_path) -> None:
    rng = np.random.default_rng(7)
    cases = tuple(case for case in CASES if case.kind == kind)
    proto = model_of(cases, rng)
    feeds = {
        info.name: rng.standard_normal([dim.dim_value for dim in info.type.tensor_type.shape.dim]).astype(np.float32)
        for info in proto.graph.input
    }
    expected = ort.InferenceSession(proto.SerializeToString()).run(None, feeds)
    model = run_passes(ir.from_proto(proto), SIMPLIFY, stage="simplify")
    assert unsupported(model) == ()
    actual = run_on_cpu(model, load_target("x86-cpu"), feeds, tmp_path)
    for info, wanted, array in zip(proto.graph.output, expected, actual, strict=True):
        case = cases[int(info.name[1:].split("_")[0])]
        np.testing.assert_allclose(array, np.asarray(wanted), rtol=2e-5, atol=2e-5, err_msg=str(case))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activations": ["Gelu"]}, "its activation Gelu is none of Affine"),
        ({"layout": 1}, "its layout is batch first"),
        ({"activations": ["Affine"]}, "lacks activation_alpha"),
        ({"activations": ["Tanh", "Tanh"]}, "lists 2 activations where RNN has 1"),
    ],
)
def test_refusals_say_why(change: Attributes, reason: str) -> None:
    proto = model_of((Case("RNN", (1, 1, 6, 8)),), np.random.default_rng(1))
    proto.graph.node[0].attribute.extend(helper.make_attribute(name, value) for name, value in change.items())
    model = run_passes(ir.from_proto(proto), (NormalizeRecurrent(), ProjectRecurrent()), stage="simplify")
    (refused,) = unsupported(model)
    assert refused.op == "RNN" and reason in refused.reason


def test_weights_and_lengths_of_run_time_are_refused() -> None:
    proto = model_of((Case("GRU"),), np.random.default_rng(1))
    node = proto.graph.node[0]
    proto.graph.input.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, (2,)))
    node.input[4] = "lengths"
    (refused,) = unsupported(run_passes(ir.from_proto(proto), SIMPLIFY, stage="simplify"))
    assert "sequence lengths are computed at run time" in refused.reason
    node.input[4] = ""
    proto.graph.input.append(helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, (1, 24, 8)))
    node.input[2] = "weights"
    (refused,) = unsupported(run_passes(ir.from_proto(proto), SIMPLIFY, stage="simplify"))
    assert "its recurrent weights are computed at run time" in refused.reason


def test_inputs_are_multiplied_by_the_accelerator(tmp_path) -> None:
    """And what is in the bundle is what the estimate counts: no identity."""
    proto = model_of((Case("LSTM", (9, 1, 20, 32)),), np.random.default_rng(1))
    (tmp_path / "lstm.onnx").write_bytes(proto.SerializeToString())
    placed = place(tmp_path / "lstm.onnx", "systolic-npu")
    backends = {item.op: item.backend for item in estimate(placed)[0].placements}
    assert backends["Gemm"] == "npu" and backends["LSTM"] == "cpu"
    identity, weights = 128 * 128 * 4, 32 * 128 * 4 + 20 * 128
    assert weights <= estimate(placed)[1].totals.weights < identity
