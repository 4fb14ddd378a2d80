"""Layers that read 16-bit activations among layers that read 8: tensors are converted where formats meet."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_networks import check_bit_exact, random_weights, save_network

from qcompiler.compile import Placed, place, place_prepared, prepare
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.graph import dtype_of, nodes_of
from qcompiler.options import Options
from qcompiler.quant.types import WeightRequest, WideType

LAYERS = ("c0", "c1", "c2", "sig", "s", "g", "c3", "m", "y")
"""Operators that may read 16 bits: convolutions, a table, a sum, a gate's product, a pool and products."""


def residual_network(path: Path, seed: int) -> Path:
    """A residual sum, a Concat after pooling, a sigmoid that gates, a convolution, and products at the end."""
    rng = np.random.default_rng(seed)
    shapes = {
        "w0": (12, 3, 3, 3), "b0": (12,), "w1": (12, 12, 3, 3), "w2": (12, 12, 1, 1), "w3": (10, 24, 3, 3),
        "w4": (10, 7), "w5": (5, 7),
    }  # fmt: skip
    constants = random_weights(rng, shapes)
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["s"]),
        helper.make_node("Conv", ["s", "w2"], ["c2"]),
        helper.make_node("Sigmoid", ["c2"], ["sig"]),
        helper.make_node("Mul", ["s", "sig"], ["g"]),
        helper.make_node("MaxPool", ["g"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("MaxPool", ["s"], ["q"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["p", "q"], ["cat"], axis=1),
        helper.make_node("Conv", ["cat", "w3"], ["c3"]),
        helper.make_node("GlobalAveragePool", ["c3"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("MatMul", ["f", "w4"], ["h"]),
        helper.make_node("Gemm", ["h", "w5"], ["y"], transB=1),
    ]
    return save_network(path, nodes, constants, [1, 3, 10, 12], [1, 5])


def samples(seed: int, count: int = 16) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 3, 10, 12)).astype(np.float32)}


def placed(path: Path, target: str, wide: dict[str, WideType]) -> Placed:
    formats = WeightRequest(activations_by_layer=wide)
    return place(path, target, Options(calibration=samples(1), formats=formats))


def reads(done: Placed) -> dict[str, str]:
    """What each product reads, by layer."""
    found: dict[str, str] = {}
    for node in done.integer.graph:
        if (
            node.op_type in ("QConv", "QGemm", "QAdd", "QMul", "QReduceMean", "QAveragePool", "QLookup")
            and node.inputs[0]
        ):
            for name in done.layers[node.name or ""].split(" + "):
                found[name] = str(dtype_of(node.inputs[0]))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", ["x86-cpu", "systolic-npu"])
def test_any_mixture_is_bit_exact(tmp_path: Path, target: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = residual_network(tmp_path / "model.onnx", seed)
    chosen = [name for name in LAYERS if rng.random() < 0.4] or ["c3"]
    done = placed(path, target, dict.fromkeys(chosen, "int16"))
    if done.target.npu is not None:
        products = [
            item for item in done.partition.placements if item.op in ("Conv", "Gemm", "Add", "Mul", "Requantize")
        ]
        assert {item.backend for item in products} == {"npu"}
    found = reads(done)
    assert {name for name in LAYERS if found[name] == "int16"} == set(chosen)
    feeds = {"x": samples(seed + 50, 1)["x"]}
    got = check_bit_exact(done, tmp_path, feeds)
    session = exact_session(ir.to_proto(done.quantized).SerializeToString())
    theirs = np.asarray(session.run(None, feeds)[0])
    assert np.abs(theirs - got).max() < 0.02 * np.abs(theirs).max() + 0.01


@pytest.mark.parametrize("variant", ["tflite", "tosa"])
def test_fixed_point_rescales_between_widths(tmp_path: Path, variant: str) -> None:
    path = residual_network(tmp_path / "model.onnx", 11)
    wide: dict[str, WideType] = {"s": "int16", "c3": "int16", "h": "int16"}
    formats = WeightRequest(activations_by_layer=wide)
    options = Options(calibration=samples(1), formats=formats, overrides=[f"quantization.requantize={variant}"])
    done = place(path, "x86-plain", options)
    assert {name for name, dtype in reads(done).items() if dtype == "int16"} == set(wide)
    check_bit_exact(done, tmp_path, {"x": samples(9, 1)["x"]})


def test_tensors_are_made_in_the_widest_type_that_is_read_and_converted_once(tmp_path: Path) -> None:
    """The sum is read by c2 in 8 bits, by g and through a pool and a Concat by c3 in 16."""
    path = residual_network(tmp_path / "model.onnx", 3)
    done = placed(path, "x86-cpu", {"c3": "int16", "g": "int16"})
    made = {node.op_type: str(dtype_of(node.outputs[0])) for node in done.integer.graph}
    assert made["QAdd"] == made["QMul"] == made["QMaxPool"] == made["Concat"] == "int16"
    conversions = nodes_of(done.integer.graph, "QRequantize", domain="qcompiler")
    pairs = [(str(dtype_of(node.inputs[0])), str(dtype_of(node.outputs[0]))) for node in conversions if node.inputs[0]]
    assert pairs == [("int16", "uint8"), ("uint8", "int16")]  # the sum for c2, the sigmoid for g
    assert {name for name, dtype in reads(done).items() if dtype == "int16"} == {"c3", "g"}


def test_single_layers_may_read_8_bits_among_16(tmp_path: Path) -> None:
    path = residual_network(tmp_path / "model.onnx", 3)
    formats = WeightRequest(activations="int16", activations_by_layer={"c1": "int8", "sig": "int8"})
    done = place(path, "x86-cpu", Options(calibration=samples(1), formats=formats))
    assert {name for name, dtype in reads(done).items() if dtype == "uint8"} == {"c1", "sig"}
    check_bit_exact(done, tmp_path, {"x": samples(4, 1)["x"]})


def test_wide_layers_lessen_the_error(tmp_path: Path) -> None:
    path = residual_network(tmp_path / "model.onnx", 5)
    fresh = samples(77, 24)["x"]
    exact = exact_session(path)
    errors: list[float] = []
    for layers in ((), ("s", "c3", "m"), LAYERS):
        done = placed(path, "x86-cpu", dict.fromkeys(layers, "int16"))
        session = exact_session(ir.to_proto(done.quantized).SerializeToString())
        pairs = [(session.run(None, {"x": x[None]})[0], exact.run(None, {"x": x[None]})[0]) for x in fresh]
        errors.append(sum(float(np.square(np.asarray(a) - np.asarray(b)).sum()) for a, b in pairs))
    assert errors[2] < errors[1] < errors[0]


def test_repair_knows_what_a_layer_reads(tmp_path: Path) -> None:
    """Biases are in units of the input's scale as the layer reads it."""
    path = residual_network(tmp_path / "model.onnx", 5)
    formats = WeightRequest("int4", activations_by_layer={"c3": "int16", "c1": "int16"})
    options = Options(calibration=samples(1, 32), formats=formats, quality="balanced")
    done = place(path, "x86-cpu", options)
    assert {name for name, dtype in reads(done).items() if dtype == "int16"} == {"c1", "c3"}
    feeds = {"x": samples(4, 1)["x"]}
    got = check_bit_exact(done, tmp_path, feeds)
    wanted = np.asarray(exact_session(path).run(None, feeds)[0])
    assert np.abs(wanted - got).max() < 0.35 * np.abs(wanted).max()


def test_scales_of_tensors_of_two_widths_are_not_tuned(tmp_path: Path) -> None:
    """The best quality then ends with repair, and says so."""
    path = residual_network(tmp_path / "model.onnx", 5)
    formats = WeightRequest("int4", activations_by_layer={"c3": "int16", "c1": "int16"})
    options = Options(calibration=samples(1, 32), formats=formats, quality="best")
    prepared = prepare(path, "x86-cpu", options)
    assert prepared.plan is not None and prepared.plan.conversions and prepared.plan.rounded
    assert any("neither weights in groups nor tensors of two widths" in warning for warning in prepared.warnings)
    check_bit_exact(place_prepared(prepared), tmp_path, {"x": samples(4, 1)["x"]})


@pytest.mark.parametrize(
    ("target", "wide", "message"),
    [
        ("x86-cpu", {"c33": "int16"}, "--layer-activations c33: the simplified model has no operator 'c33'; did you"),
        ("nvdla-large", {"c3": "int16"}, "nvdla-large has no int16 activations"),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, target: str, wide: dict[str, WideType], message: str) -> None:
    with pytest.raises(QCompilerError, match=message):
        placed(residual_network(tmp_path / "m.onnx", 1), target, wide)


def test_what_reads_eight_bits_only_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c"),
        helper.make_node("Resize", ["c", "", "scales"], ["y"], mode="linear", name="y"),
    ]
    constants = [
        numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w"),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, depth, h, w])
             for name, depth, h, w in (("x", 3, 10, 12), ("y", 2, 20, 24))]  # fmt: skip
    graph = helper.make_graph(nodes, "enlarged", infos[:1], infos[1:], constants)
    path = tmp_path / "enlarged.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(QCompilerError, match="--layer-activations y=int16: Resize takes 8-bit inputs"):
        placed(path, "x86-cpu", {"y": "int16"})
