"""Quantized networks of the zoo: every integer tensor against onnxruntime's, which computes the same in float32.

Each operator reads onnxruntime's own integers, so that a difference shows where it arises. There is only one reason
for any: the exact value lies on the border between two integers, and float32 sums fall on either side of it.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.graph import const_of, dtype_of, is_op, shape_of, value_name
from qcompiler.importer import import_onnx
from qcompiler.integer import ops, reference
from qcompiler.integer.realize import realize
from qcompiler.passes.cancel_layout_transposes import CancelLayoutTransposes
from qcompiler.quant.arithmetic import RequantizeVariant
from qcompiler.target import Target
from qcompiler.target_loader import load_target

MODELS = ("kws_dscnn_tflite_int8_qdq", "resnet8_tflite_int8_qdq", "mobilenet_v1_025_128_tflite_qat_qdq")
BORDER = 1e-3
"""Distance from the border, in units of the last place, within which float32 may round either way."""


def target(variant: RequantizeVariant) -> Target:
    base = load_target("arm-npu")
    return base.model_copy(update={"quantization": base.quantization.model_copy(update={"requantize": variant})})


def samples(zoo: Path, name: str, count: int) -> Iterator[np.ndarray]:
    """Preprocessed inputs of a model, through the zoo's own evaluation."""
    taken: list[np.ndarray] = []

    def record(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        taken.extend(feeds.values())
        return [np.zeros((1, 1001), np.float32)]

    evaluate(zoo, name, record, count)
    return iter(taken)


def evaluate(zoo: Path, name: str, run: object, limit: int) -> dict[str, float]:
    spec = importlib.util.spec_from_file_location("eval_ref", zoo / "eval_ref.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries = json.loads((zoo / "manifest.json").read_text())["models"]
    entry = next(entry for entry in entries if entry["name"] == name)
    return module.evaluate(entry, run, limit)


def exposed_session(model: ir.Model) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """onnxruntime without optimizations, every QuantizeLinear's result an output."""
    exposed = model.clone()
    names = [value_name(node.outputs[0]) for node in exposed.graph if is_op(node, "QuantizeLinear")]
    for node in exposed.graph:
        if is_op(node, "QuantizeLinear") and not node.outputs[0].is_graph_output():
            exposed.graph.outputs.append(node.outputs[0])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = ir.to_proto(exposed).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]), names


def exact_values(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    """The result in float64 before rounding, zero point included."""
    form = reference.Form(shape_of(node.outputs[0]), np.dtype(np.int32))
    match node.op_type:
        case "QConv" | "QGemm" | "QAveragePool":
            kind = {"QConv": ops.QConv, "QGemm": ops.QGemm, "QAveragePool": ops.QAveragePool}[node.op_type]
            op = kind.of(node)
            # 2^30 with shift 1 is the factor 1: the accumulator itself.
            *data, multiplier, _ = inputs
            plain = replace(op, requantize="tosa", y_zero_point=0, clamp_min=-(2**31), clamp_max=2**31 - 1)
            unit = [np.full(multiplier.shape, 1 << 30, np.int32), np.ones(multiplier.shape, np.int32)]
            raw = plain.node([value for value in node.inputs if value is not None], ir.Value(name="raw"), "raw")
            acc = reference.INTEGER_FUNCTIONS[node.op_type](raw, form, *data, *unit)
            scale = multiplier[-1] if node.op_type == "QAveragePool" else multiplier
            return acc * np.float64(scale) + op.y_zero_point
        case "QAdd":
            op = ops.QAdd.of(node)
            a, b = inputs[0].astype(np.float64) - op.a_zero_point, inputs[1].astype(np.float64) - op.b_zero_point
            return (a * op.multiplier_a + b * op.multiplier_b) / 2.0**op.shift_y + op.y_zero_point
        case "QSoftmax":
            op = ops.QSoftmax.of(node)
            table = const_of(node.inputs[1])
            assert table is not None
            powers = np.exp(inputs[0].astype(np.float64) * -np.log(table[1] / 2**22))
            return powers / powers.sum(axis=-1, keepdims=True) * op.inverse_scale / 256 + op.y_zero_point
    raise AssertionError(f"no exact value for {node.op_type}")


@dataclass
class Comparison:
    tensors: int = 0
    elements: int = 0
    different: int = 0
    unexplained: int = 0


def compare(model: ir.Model, session: onnxruntime.InferenceSession, names: list[str], x: np.ndarray) -> Comparison:
    feeds = {value_name(model.graph.inputs[0]): x}
    expected = {name: np.asarray(array) for name, array in zip(names, session.run(names, feeds), strict=True)}
    executor, result = reference.Executor(model), Comparison()
    values: dict[ir.Value, np.ndarray] = {model.graph.inputs[0]: x}
    for value in model.graph.initializers.values():
        constant = const_of(value)
        assert constant is not None
        values[value] = constant
    exact: dict[ir.Value, np.ndarray] = {}
    for node in model.graph:
        inputs = [values[value] for value in node.inputs if value is not None]
        (values[node.outputs[0]],) = executor.run_node(node, inputs)
        # Real values follow the integers through the Transposes behind an operator.
        source, out = node.inputs[0], node.outputs[0]
        if node.domain:
            exact[out] = exact_values(node, inputs)
        elif source in exact:
            exact[out] = _moved(node, exact[source])
        want = expected.get(value_name(out))
        if want is None:
            continue
        got = values[out]
        assert got.dtype == want.dtype and got.shape == want.shape
        wrong = got != want
        difference = np.abs(got.astype(int) - want.astype(int))[wrong]
        border = np.abs(exact[out][wrong] % 1 - 0.5)
        result.tensors += 1
        result.elements += got.size
        result.different += int(wrong.sum())
        result.unexplained += int(((difference > 1) | (border > BORDER)).sum())
        values[out] = want
    return result


def _moved(node: ir.Node, array: np.ndarray) -> np.ndarray:
    if node.op_type == "Transpose":
        return array.transpose(node.attributes["perm"].as_ints())
    assert node.op_type == "Reshape"
    return array.reshape(shape_of(node.outputs[0]))


@pytest.mark.parametrize("name", MODELS)
def test_integers_equal_onnxruntime_but_on_borders(zoo: Path, name: str) -> None:
    model = import_onnx(zoo / "models" / f"{name}.onnx")
    session, names = exposed_session(model)
    integer = realize(model, target("float32"))
    assert not any(is_op(node, "QuantizeLinear", "DequantizeLinear", "Conv", "MatMul") for node in integer.graph)
    for x in samples(zoo, name, 3):
        result = compare(integer, session, names, x)
        assert result.tensors == len(names)
        assert result.unexplained == 0, result
        assert result.different < 2e-4 * result.elements, result


@pytest.mark.parametrize(("name", "count"), [(MODELS[0], 100), (MODELS[1], 25), (MODELS[2], 12)])
@pytest.mark.parametrize("variant", ["float32", "tflite", "tosa"])
def test_metric_equals_onnxruntime(zoo: Path, name: str, count: int, variant: RequantizeVariant) -> None:
    path = zoo / "models" / f"{name}.onnx"
    model = realize(import_onnx(path), target(variant))
    CancelLayoutTransposes()(model)
    assert not any(is_op(node, "Transpose") for node in model.graph)
    executor = reference.Executor(model)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = evaluate(zoo, name, lambda feeds: list(executor.run(feeds).values()), count)
    want = evaluate(zoo, name, lambda feeds: session.run(None, feeds), count)
    assert dtype_of(model.graph.outputs[0]) in (np.int8, np.uint8)
    assert abs(got["top1"] - want["top1"]) <= (0 if variant == "float32" else 1 / count + 1e-9)
