"""Weights that share scales in groups beside integer activations: reference, CPU and simulator agree bit for bit."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_networks import check_bit_exact, random_weights, save_network

from qcompiler.backends import relax
from qcompiler.compile import Placed, place, schedule
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.graph import data_input, nodes_of
from qcompiler.integer.reference import execute
from qcompiler.integer.weight_groups import groups_of, stored_bytes
from qcompiler.options import Options
from qcompiler.quant.types import Quality, WeightRequest, WeightType


def random_network(path: Path, seed: int) -> Path:
    """Odd sizes: last groups that are not full, depths that fill no quads, a grouped and a depthwise one, products."""
    rng = np.random.default_rng(seed)
    inner, depth = int(rng.integers(9, 40)), int(rng.integers(17, 30))
    shapes = {
        "w0": (inner, 3, 3, 3), "w1": (depth, inner, 2, 3), "b1": (depth,), "w2": (depth, 1, 3, 3),
        "w3": (64, depth, 1, 1), "w4": (18, 32, 1, 2), "w5": (21, 18), "w6": (21, 33), "w7": (4, 33),
    }  # fmt: skip
    constants = random_weights(rng, shapes)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c0", "w1", "b1"], ["c1"], strides=[int(rng.integers(1, 3))] * 2),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], group=depth, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c2", "w3"], ["c3"]),
        helper.make_node("Conv", ["c3", "w4"], ["c4"], group=2, dilations=[1, int(rng.integers(1, 3))]),
        helper.make_node("GlobalAveragePool", ["c4"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w5"], ["g"], transB=1),
        helper.make_node("MatMul", ["g", "w6"], ["m"]),
        helper.make_node("Gemm", ["m", "w7"], ["y"], transB=1),
    ]
    return save_network(path, nodes, constants, [1, 3, 11, 13], [1, 4])


GROUPED = {"c1", "c3", "c4", "g", "m"}
"""The layers whose depth is more than a group of 8; the first and the last keep eight bits."""


def grouped_layers(done: Placed) -> set[str]:
    """Names in the user's model; what a grouped convolution was split into goes by its first part."""
    nodes = [*nodes_of(done.integer.graph, "QConv", domain="qcompiler"),
             *nodes_of(done.integer.graph, "QGemm", domain="qcompiler")]  # fmt: skip
    return {
        part.removesuffix("_Conv")
        for node in nodes
        if groups_of(data_input(node, 1)) is not None
        for part in done.layers[node.name or ""].split(" + ")
    }


def random_input(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 3, 11, 13)).astype(np.float32)}


@pytest.mark.parametrize("target", ["x86-cpu", "x86-avx2", "systolic-npu"])
@pytest.mark.parametrize("wanted", ["int4", "int2", "binary"])
def test_reference_and_code_agree(tmp_path: Path, target: str, wanted: WeightType) -> None:
    seed = 5 + len(target) + len(wanted)
    model = random_network(tmp_path / "model.onnx", seed)
    done = place(model, target, Options(formats=WeightRequest(wanted, group=8)))
    assert grouped_layers(done) >= GROUPED
    if done.target.npu is not None:
        assert {item.backend for item in done.partition.placements if item.op in ("Conv", "Gemm")} == {"npu"}
    feeds = random_input(seed)
    got = check_bit_exact(done, tmp_path, feeds)
    assert len(np.unique(got)) > 1
    session = exact_session(ir.to_proto(done.quantized).SerializeToString())
    theirs = np.asarray(session.run(None, feeds)[0])
    assert np.abs(theirs - got).max() < 0.05 * np.abs(theirs).max() + 0.05


@pytest.mark.parametrize("variant", ["float32", "tflite", "tosa", "shift"])
@pytest.mark.parametrize("target", ["x86-plain", "systolic-npu"])
def test_every_requantize_variant(tmp_path: Path, target: str, variant: str) -> None:
    model = random_network(tmp_path / "model.onnx", 7 + len(variant))
    options = Options(formats=WeightRequest("int4", group=8), overrides=[f"quantization.requantize={variant}"])
    done = place(model, target, options)
    assert grouped_layers(done) >= GROUPED - {"c4"}
    assert len(np.unique(check_bit_exact(done, tmp_path, random_input(3)))) > 1


def test_groups_beside_16_bit_activations(tmp_path: Path) -> None:
    model = random_network(tmp_path / "model.onnx", 4)
    done = place(model, "x86-cpu", Options(formats=WeightRequest("int4", activations="int16", group=16)))
    assert grouped_layers(done) >= {"c3", "g", "m"}
    check_bit_exact(done, tmp_path, random_input(5))


def wide_layers(path: Path) -> Path:
    rng = np.random.default_rng(1)
    constants = [
        numpy_helper.from_array(rng.standard_normal((64, 64, 3, 3)).astype(np.float32), f"w{i}") for i in range(3)
    ]
    nodes = [helper.make_node("Conv", [f"c{i}", f"w{i}"], [f"c{i + 1}"], name=f"c{i + 1}") for i in range(3)]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64, s, s]) for n, s in (("c0", 10), ("c3", 4))]
    graph = helper.make_graph(nodes, "sizes", infos[:1], infos[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("wanted", "bits", "factor_bits"), [("int4", 4, 4), ("int2", 2, 8), ("binary", 1, 8)])
def test_sizes(tmp_path: Path, wanted: WeightType, bits: int, factor_bits: int) -> None:
    """On the CPU, a layer's parameters; for the accelerator, its constants and what it is said to read."""
    path, weights, size = wide_layers(tmp_path / "model.onnx"), 64 * 64 * 9, 32
    expected = weights * bits // 8 + weights // size * factor_bits // 8
    formats = WeightRequest(wanted, group=size)
    done = place(path, "x86-cpu", Options(formats=formats))
    (product,) = (n for n in nodes_of(done.integer.graph, "QConv", domain="qcompiler") if groups_of(n.inputs[1]))
    assert stored_bytes(data_input(product, 1)) == expected
    lowered = relax.lower(done.integer, done.partition, done.target)
    sizes = {array.nbytes for array in lowered.parameters}
    assert {weights * bits // 8, weights // size * factor_bits // 8} <= sizes
    plain, grouped = (
        sum(len(program.blob) for program in schedule(place(path, "systolic-npu", Options(formats=request))).values())
        for request in (WeightRequest(), formats)
    )
    assert plain - grouped == weights - expected


def test_our_own_model_compiles_again_to_the_same_integers(tmp_path: Path) -> None:
    model = random_network(tmp_path / "model.onnx", 9)
    formats = WeightRequest("int4", {"c3": "binary", "c4": "int2"}, group=8, groups={"g": 16, "m": 0})
    first = place(model, "x86-cpu", Options(formats=formats))
    ir.save(first.quantized, tmp_path / "quantized.onnx")
    second = place(tmp_path / "quantized.onnx", "x86-cpu")
    for done in (first, second):
        noted = {groups_of(data_input(node, 1)) for node in done.integer.graph if len(node.inputs) == 5}
        assert {(groups.size, groups.bits) for groups in noted if groups} == {(8, 4), (8, 1), (8, 2), (16, 4)}
    feeds = random_input(2)
    np.testing.assert_array_equal(execute(first.integer, feeds)["y"], execute(second.integer, feeds)["y"])


def test_foreign_models_with_whole_factors_become_integers_and_others_stay_as_they_are(tmp_path: Path) -> None:
    """Factors from 1 to 16 (as of AIMET's low-power blockwise quantization) are 8-bit weights; free scales are not."""
    rng = np.random.default_rng(8)
    codes = rng.integers(-8, 8, (6, 24, 3, 3))
    factors = rng.integers(1, 17, (6, 2, 3, 3))
    unit = rng.uniform(0.01, 0.02, (6, 1, 1, 1)).astype(np.float32)
    found = {}
    for name, scale in (("whole", unit * factors), ("free", unit * rng.uniform(1, 16, factors.shape))):
        four = helper.make_tensor("w", TensorProto.INT4, codes.shape, codes.ravel().tolist())
        constants = [
            four,
            numpy_helper.from_array(scale.astype(np.float32), "s"),
            *(numpy_helper.from_array(np.array(0.05 * place, np.float32), f"s{place}") for place in (1, 30)),
            *(numpy_helper.from_array(np.array(zero, np.int8), f"z{zero}") for zero in (3, -5)),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s1", "z3"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s1", "z3"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=1, block_size=12),
            helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1], name="c"),
            helper.make_node("QuantizeLinear", ["c", "s30", "z-5"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "s30", "z-5"], ["y"]),
        ]
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, d, 7, 5]) for n, d in (("x", 24), ("y", 6)))
        graph = helper.make_graph(nodes, name, [x], [y], constants)
        path = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        done = place(path, "x86-cpu")
        found[name] = [node.op_type for node in done.integer.graph if "Conv" in node.op_type]
        feeds = {"x": rng.standard_normal((1, 24, 7, 5)).astype(np.float32)}
        got = check_bit_exact(done, tmp_path, feeds)
        theirs = np.asarray(exact_session(path).run(None, feeds)[0])
        assert np.abs(theirs - got).max() <= 1.5 * 1.001  # one step of 0.05 * 30
        assert np.mean(theirs != got) < 0.01
    assert found == {"whole": ["QConv"], "free": ["Conv"]}


@pytest.mark.parametrize("wanted", ["int4", "int2"])
def test_groups_are_more_accurate_and_repair_helps(tmp_path: Path, wanted: WeightType) -> None:
    model = random_network(tmp_path / "model.onnx", 6)
    rng = np.random.default_rng(1)
    samples = {"x": rng.standard_normal((32, 3, 11, 13)).astype(np.float32)}
    fresh = rng.standard_normal((16, 1, 3, 11, 13)).astype(np.float32)
    exact = exact_session(model)
    errors = []
    cases: tuple[tuple[Quality, int | None], ...] = (("fast", None), ("fast", 8), ("balanced", 8))
    for quality, group in cases:
        formats = WeightRequest(wanted, group=group)
        done = place(model, "x86-cpu", Options(calibration=samples, formats=formats, quality=quality))
        assert bool(grouped_layers(done)) == (group is not None)
        session = exact_session(ir.to_proto(done.quantized).SerializeToString())
        pairs = [(session.run(None, {"x": x})[0], exact.run(None, {"x": x})[0]) for x in fresh]
        errors.append(sum(float(np.square(np.asarray(a) - np.asarray(b)).sum()) for a, b in pairs))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(
    ("target", "formats", "message"),
    [
        ("arm-npu", WeightRequest("int8", group=32), "arm-npu has no weights in groups beside integer activations"),
        ("x86-cpu", WeightRequest("int4", group=20), "groups of x86-cpu are multiples of 8"),
        ("x86-cpu", WeightRequest(group=32), "--group-size is for weights of less than 8 bits"),
        ("x86-cpu", WeightRequest("int4", groups={"c33": 8}), "no quantized layer with weights is called 'c33'"),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, target: str, formats: WeightRequest, message: str) -> None:
    with pytest.raises(QCompilerError, match=message):
        place(random_network(tmp_path / "m.onnx", 1), target, Options(formats=formats))
