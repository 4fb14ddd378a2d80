"""Weights of two bits and of one: reference, CPU and simulator agree, and they take the room they should."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_networks import check_bit_exact, random_weights, save_network

from qcompiler.backends import relax
from qcompiler.compile import place, schedule
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.integer.reference import execute
from qcompiler.integer.weight_types import narrowed, stored_bits, stored_type
from qcompiler.options import Options
from qcompiler.quant.types import WeightRequest, WeightType

TYPES: tuple[tuple[WeightType, str], ...] = (("int2", "int2"), ("binary", "int1"))


def random_network(path: Path, seed: int) -> Path:
    """Odd sizes; reductions that fill no quads, and one of 64 channels that does; a depthwise one; products."""
    rng = np.random.default_rng(seed)
    inner, depth = int(rng.integers(5, 40)), int(rng.integers(5, 30))
    shapes = {
        "w0": (inner, 3, 3, 3), "w1": (depth, inner, 2, 3), "b1": (depth,), "w2": (depth, 1, 3, 3),
        "w3": (64, depth, 1, 1), "w4": (16, 64, 1, 2), "w5": (9, 16), "w6": (4, 9),
    }  # fmt: skip
    constants = random_weights(rng, shapes)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c0", "w1", "b1"], ["c1"], strides=[int(rng.integers(1, 3))] * 2),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], group=depth, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c2", "w3"], ["c3"]),
        helper.make_node("Conv", ["c3", "w4"], ["c4"]),
        helper.make_node("GlobalAveragePool", ["c4"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w5"], ["g"], transB=1),
        helper.make_node("Gemm", ["g", "w6"], ["y"], transB=1),
    ]
    return save_network(path, nodes, constants, [1, 3, 11, 13], [1, 4])


@pytest.mark.parametrize("target", ["x86-cpu", "x86-plain", "systolic-npu"])
@pytest.mark.parametrize(("wanted", "stored"), TYPES)
def test_reference_cpu_and_simulator_agree(tmp_path: Path, target: str, wanted: WeightType, stored: str) -> None:
    model = random_network(tmp_path / "model.onnx", 5 + len(target) + len(stored))
    done = place(model, target, Options(formats=WeightRequest(wanted)))
    precisions = [item.precision for item in done.partition.placements]
    assert sum(precision.endswith(f"*{stored}") for precision in precisions) == 5  # all but the first and the last
    if done.target.npu is not None:
        on_npu = [item for item in done.partition.placements if item.precision.endswith(f"*{stored}")]
        assert all(item.backend == "npu" for item in on_npu)
    feeds = {"x": np.random.default_rng(3).standard_normal((1, 3, 11, 13)).astype(np.float32)}
    got = check_bit_exact(done, tmp_path, feeds)
    assert len(np.unique(got)) > 1
    session = exact_session(ir.to_proto(done.quantized).SerializeToString())
    theirs = np.asarray(session.run(None, feeds)[0])
    assert np.abs(theirs - got).max() < 0.05 * np.abs(theirs).max() + 0.05


@pytest.mark.parametrize(("wanted", "stored"), TYPES)
def test_sizes(tmp_path: Path, wanted: WeightType, stored: str) -> None:
    """On the CPU, a layer's parameter; for the accelerator, its constants."""
    rng = np.random.default_rng(1)
    constants = [
        numpy_helper.from_array(rng.standard_normal((64, 64, 3, 3)).astype(np.float32), f"w{i}") for i in range(3)
    ]
    nodes = [helper.make_node("Conv", [f"c{i}", f"w{i}"], [f"c{i + 1}"], name=f"c{i + 1}") for i in range(3)]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64, s, s]) for n, s in (("c0", 10), ("c3", 4))]
    graph = helper.make_graph(nodes, "sizes", infos[:1], infos[1:], constants)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    bits = {"int2": 2, "int1": 1}[stored]
    done = place(path, "x86-cpu", Options(formats=WeightRequest(wanted)))
    lowered = relax.lower(done.integer, done.partition, done.target)
    assert 64 * 64 * 9 * bits // 8 in {array.nbytes for array in lowered.parameters if array.dtype == np.uint8}
    eight, few = (
        sum(len(program.blob) for program in schedule(place(path, "systolic-npu", Options(formats=formats))).values())
        for formats in (WeightRequest(), WeightRequest(wanted, edges=True))
    )
    assert few < eight * bits / 8 + 3 * 64 * 12 + 100


def test_edges_have_few_bits_on_request(tmp_path: Path) -> None:
    model = random_network(tmp_path / "model.onnx", 2)
    done = place(model, "systolic-npu", Options(formats=WeightRequest("binary", edges=True)))
    products = [item.precision for item in done.partition.placements if item.op in ("Conv", "Gemm")]
    assert products == ["int8*int1"] * 7
    mixed = place(model, "systolic-npu", Options(formats=WeightRequest("int2", {"c2": "binary", "c3": "int8"})))
    by_layer = {mixed.layers[item.node]: item.precision for item in mixed.partition.placements}
    assert by_layer["c2"] == "int8*int1" and by_layer["c3"] == "int8*int8" and by_layer["c4"] == "int8*int2"


def test_our_own_model_compiles_again_to_the_same_integers(tmp_path: Path) -> None:
    first = place(
        random_network(tmp_path / "model.onnx", 9), "x86-cpu", Options(formats=WeightRequest("int2", {"c3": "binary"}))
    )
    ir.save(first.quantized, tmp_path / "quantized.onnx")
    second = place(tmp_path / "quantized.onnx", "x86-cpu")
    precisions = [[item.precision for item in done.partition.placements] for done in (first, second)]
    assert precisions[0] == precisions[1] and {"uint8*int2", "uint8*int1"} <= set(precisions[0])
    feeds = {"x": np.random.default_rng(2).standard_normal((1, 3, 11, 13)).astype(np.float32)}
    np.testing.assert_array_equal(execute(first.integer, feeds)["y"], execute(second.integer, feeds)["y"])


@pytest.mark.parametrize("wanted", ["int2", "binary"])
def test_repair_helps(tmp_path: Path, wanted: WeightType) -> None:
    model = random_network(tmp_path / "model.onnx", 6)
    rng = np.random.default_rng(1)
    samples = {"x": rng.standard_normal((32, 3, 11, 13)).astype(np.float32)}
    fresh = rng.standard_normal((16, 1, 3, 11, 13)).astype(np.float32)
    exact = exact_session(model)
    errors = []
    for quality in ("fast", "balanced"):
        done = place(model, "x86-cpu", Options(calibration=samples, formats=WeightRequest(wanted), quality=quality))
        session = exact_session(ir.to_proto(done.quantized).SerializeToString())
        pairs = [(session.run(None, {"x": x})[0], exact.run(None, {"x": x})[0]) for x in fresh]
        errors.append(sum(float(np.square(np.asarray(a) - np.asarray(b)).sum()) for a, b in pairs))
    assert errors[1] < errors[0]


def test_targets_without_refuse(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="arm-npu has no binary weights: its spec lists int8, uint8"):
        place(random_network(tmp_path / "m.onnx", 1), "arm-npu", Options(formats=WeightRequest("binary")))


def test_weights_are_narrowed_to_what_the_target_has() -> None:
    four = ir.DataType.INT4.numpy()
    ternary, binary, wide = (np.array(values, np.int8).astype(four) for values in ([-1, 0, 1], [-1, 1, 1], [-3, 0, 1]))
    offered = ("int8", "int4", "int2", "int1")
    assert [stored_type(narrowed(array, offered)) for array in (ternary, binary, wide)] == ["int2", "int1", "int4"]
    assert [stored_bits(narrowed(array, offered)) for array in (ternary, binary, wide)] == [2, 1, 4]
    assert narrowed(binary, ("int8", "int4", "int2")) is binary and narrowed(ternary, ("int4", "int1")) is ternary
    eight = np.array([-1, 1], np.int8)
    assert narrowed(eight, offered) is eight
