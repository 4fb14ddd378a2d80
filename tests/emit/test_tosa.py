"""Emitted TOSA in the TOSA reference model, bit for bit."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.emit.tosa import serialize, tosa_of
from qcompiler.errors import QCompilerError
from qcompiler.graph import make_node
from qcompiler.partition import Region
from qcompiler.target_loader import load_target

FEEDS = 2

needs_tools = pytest.mark.skipif(
    shutil.which("tosa_reference_model") is None, reason="tosa-tools is not on PATH (it wants numpy < 2.2)"
)


def run_tosa(file: Path, feeds: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    folder = file.parent
    for index, array in enumerate(feeds):
        np.save(folder / f"in{index}.npy", array.view(np.int8))
    command = [
        "tosa_reference_model",
        f"--tosa_file={file.name}",
        f"--ifm_name={','.join(f'TosaInput_{index}' for index in range(len(feeds)))}",
        f"--ifm_file={','.join(f'in{index}.npy' for index in range(len(feeds)))}",
        f"--ofm_name={','.join(f'TosaOutput_{index}' for index in range(outputs))}",
        f"--ofm_file={','.join(f'out{index}.npy' for index in range(outputs))}",
        "--flatbuffer_dir=.",
        "--output_dir=.",
        "--tosa_level=NONE",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [np.load(folder / f"out{index}.npy") for index in range(outputs)]


def chip_with(variant: str):
    chip = load_target("arm-npu")
    return chip.model_copy(update={"quantization": chip.quantization.model_copy(update={"requantize": variant})})


@pytest.fixture
def check(realized, tmp_path) -> Callable[..., list[str]]:
    """Compare a network's region with its TOSA on several inputs; returns the operators of the region."""

    def compare(network, *outputs: str, variant: str = "tflite", dtypes: tuple[str, ...] = ("int8",)) -> list[str]:
        chip = chip_with(variant)
        formats = chip.quantization.activations.model_copy(update={"dtypes": dtypes})
        chip = chip.model_copy(update={"quantization": chip.quantization.model_copy(update={"activations": formats})})
        made = realized(network, *outputs, chip=chip)
        text = tosa_of(made.region)
        assert text == tosa_of(made.region), "two emissions differ"
        file = tmp_path / "region.mlir"
        file.write_text(text)
        emitted = serialize(file)
        for seed in range(FEEDS):
            feeds = made.feeds(seed)
            wanted = made.run(feeds)
            for want, got in zip(wanted, run_tosa(emitted, feeds, len(wanted)), strict=True):
                np.testing.assert_array_equal(got.view(want.dtype), want)
                assert len(np.unique(want)) > 1, "a constant result proves nothing"
        return made.op_types

    return compare


CONVOLUTIONS = {
    "valid": (8, 12, (3, 3), {}),
    "unread border": (3, 8, (3, 3), {"strides": [3, 2]}),
    "lopsided": (3, 8, (5, 3), {"pads": [4, 0, 1, 2], "strides": [2, 2]}),
    "dilated": (4, 4, (3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "depthwise": (9, 9, (3, 3), {"pads": [1, 1, 1, 1], "group": 9, "strides": [2, 2]}),
    "depthwise, two each": (6, 12, (3, 3), {"pads": [1, 1, 1, 1], "group": 6}),
}


@needs_tools
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("variant", ["tflite", "tosa"])
def test_convolutions(net, check, case, variant):
    inputs, outputs, kernel, attributes = CONVOLUTIONS[case]
    network = net(len(case))
    y = network.conv(network.input(1, inputs, 13, 11), inputs, outputs, kernel, **attributes)
    y = network.op("Clip", y, network.const(-0.4), network.const(2.0))
    assert "QConv" in check(network, y, variant=variant)


@needs_tools
@pytest.mark.parametrize("variant", ["tflite", "tosa"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_network_of_many_operators(net, check, variant, dtype):
    network = net(3)
    x = network.conv(network.input(1, 3, 12, 10), 3, 8, (3, 3), pads=[1, 1, 1, 1], strides=[2, 2])
    x = network.op("Relu", x)
    y = network.op("Add", x, network.op("Mul", x, network.conv(x, 8, 8, (1, 1))))
    y = network.op("Sub", network.conv(y, 8, 8, (1, 1)), network.const(network.rng.normal(0, 1, (8, 1, 1))))
    y = network.op("Concat", network.op("Relu", y), network.op("Sigmoid", network.conv(x, 8, 4, (1, 1))), axis=1)
    y = network.op("MaxPool", network.conv(y, 12, 6, (1, 1)), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = network.op("Flatten", network.op("Relu", y))
    y = network.op("Gemm", y, network.weight(54, 20), network.weight(20))
    op_types = check(network, y, variant=variant, dtypes=(dtype,))
    assert {"QConv", "QAdd", "QMul", "Concat", "QLookup", "QMaxPool", "QGemm"} <= set(op_types)


@needs_tools
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("variant", ["tflite", "tosa"])
def test_average_pools_with_padding(net, check, counted, variant):
    network = net(4)
    x = network.conv(network.input(1, 3, 9, 7), 3, 5, (1, 1))
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": counted}
    assert "QAveragePool" in check(network, network.op("AveragePool", x, **pool), variant=variant)


@needs_tools
@pytest.mark.parametrize(("shape", "axes"), [((2, 6, 5, 3), [2, 3]), ((4, 9, 7), [1]), ((3, 50), [1])])
def test_means(net, check, shape, axes):
    network = net(5)
    y = network.op("ReduceMean", network.input(*shape), axes=axes, keepdims=0)
    assert {"QReduceMean", "QAveragePool"} & set(check(network, y))


@needs_tools
@pytest.mark.parametrize("width", [2, 10, 300])
def test_softmax(net, check, width):
    network = net(6)
    y = network.op("Gemm", network.input(5, 16), network.weight(16, width), network.weight(width))
    assert check(network, network.op("Softmax", y, axis=1))[-1] == "QSoftmax"


@needs_tools
@pytest.mark.parametrize(
    ("mode", "factor", "coordinates"),
    [
        ("nearest", 2, "asymmetric"), ("nearest", 3, "half_pixel"), ("nearest", 3, "align_corners"),
        ("linear", 2, "half_pixel"), ("linear", 4, "pytorch_half_pixel"), ("linear", 2, "asymmetric"),
    ],
)  # fmt: skip
def test_interpolation(net, check, mode, factor, coordinates):
    network = net(7)
    x = network.conv(network.input(1, 3, 5, 6), 3, 4, (1, 1))
    sizes = network.const([1, 1, factor, factor])
    y = network.op("Resize", x, "", sizes, mode=mode, coordinate_transformation_mode=coordinates)
    op_types = check(network, network.conv(y, 4, 3, (1, 1)))
    assert {"QResizeNearest", "QResizeLinear"} & set(op_types)


@needs_tools
def test_data_movement(net, check):
    network = net(8)
    x = network.conv(network.input(1, 4, 8, 10), 4, 8, (3, 3), pads=[1, 1, 1, 1])
    starts, ends, axes = (network.const(numbers, "int64") for numbers in ([0, 1], [8, 9], [1, 3]))
    every = network.op("Slice", x, starts, ends, axes, network.const([2, 3], "int64"))
    odd = network.op("Slice", x, *(network.const(numbers, "int64") for numbers in ([1], [8], [1], [2])))
    padded = network.op("Pad", odd, network.const([0, 0, 1, 2, 0, 0, 3, 0], "int64"))
    joined = network.op("Concat", padded, network.op("Relu", network.conv(padded, 4, 3, (1, 1))), axis=1)
    flat = network.op("Reshape", joined, network.const([7, 12, 12], "int64"))
    moved = network.op("Unsqueeze", network.op("Transpose", flat, perm=[2, 0, 1]), network.const([0], "int64"))
    op_types = check(network, network.conv(moved, 12, 3, (1, 1)), network.conv(every, 4, 3, (3, 3)))
    assert {"Slice", "Pad", "Concat"} <= set(op_types)


@needs_tools
@pytest.mark.parametrize(("strides", "pads"), [([2, 2], [0, 0, 0, 0]), ([2, 1], [1, 0, 1, 1]), ([1, 2], [2, 1, 0, 1])])
def test_transposed_convolutions(net, check, strides, pads):
    network = net(9)
    x = network.input(1, 5, 6, 7)
    y = network.op("ConvTranspose", x, network.weight(5, 4, 3, 3), network.weight(4), strides=strides, pads=pads)
    assert "QConvTranspose" in check(network, network.op("Relu", y))


@needs_tools
def test_products_of_two_tensors(net, check):
    network = net(10)
    a, b = network.input(2, 3, 6, 8), network.input(2, 3, 8, 5)
    assert "QMatMul" in check(network, network.op("MatMul", a, b))


def test_the_text_needs_no_tools_and_shares_constants(net, realized):
    network = net(11)
    x = network.conv(network.input(1, 3, 6, 6), 3, 4, (1, 1))
    text = tosa_of(realized(network, network.op("Relu", x)).region)
    assert text.count('"tosa.conv2d"') == 1 and text.count("#tosa.rounding_mode<DOUBLE_ROUND>") == 1
    constants = [line.split("=", 1)[1] for line in text.splitlines() if '"tosa.const"' in line]
    assert len(constants) == len(set(constants))


def test_refuses_weights_of_thirds(net, realized):
    network = net(12)
    x = network.conv(network.input(1, 3, 5, 6), 3, 4, (1, 1))
    options = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    y = network.op("Resize", x, "", network.const([1, 1, 2, 2]), **options)
    made = realized(network, network.conv(y, 4, 3, (1, 1)))
    with pytest.raises(QCompilerError, match="RESIZE give the same weights"):
        tosa_of(made.region)


@pytest.mark.parametrize(("variant", "reason"), [("float32", "rescales in floating point"), ("tosa", "divides 64-bit")])
def test_refuses_other_arithmetic(net, realized, variant, reason):
    network = net(13)
    y = network.op("Gemm", network.input(5, 16), network.weight(16, 4), network.weight(4))
    y = network.op("Softmax", y, axis=1) if variant == "tosa" else y
    made = realized(network, y, chip=chip_with(variant))
    with pytest.raises(QCompilerError, match=reason):
        tosa_of(made.region)


def test_says_where_tosa_opt_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(QCompilerError, match=r"tosa-opt is not on PATH.*pip install tosa-tools"):
        serialize(tmp_path / "region.mlir")


def test_refuses_wide_tensors():
    x, y = (ir.Value(name=name, shape=ir.Shape((2, 3)), type=ir.TensorType(ir.DataType.INT16)) for name in "xy")
    node = make_node("Transpose", [x], [y], {"perm": [1, 0]}, name="turn")
    with pytest.raises(QCompilerError, match=r"'turn' \(Transpose\).*makes INT16"):
        tosa_of(Region("npu_0", "npu", (node,), (x,), (y,)))
