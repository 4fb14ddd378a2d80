"""INT8 .tflite files come in and equal LiteRT's reference kernels: what is emitted here, operators built by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the extra 'tflite' is not installed")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qcompiler.compile import Placed, place
from qcompiler.compile import compile as compile_model
from qcompiler.emit.tflite import tflite_of
from qcompiler.emit.tflite_model import Operation, Tensor, TfliteModel
from qcompiler.errors import QCompilerError
from qcompiler.importer import import_onnx
from qcompiler.integer.formats import TensorFormat
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.tflite_file import parse_tflite

TARGET = "edge-tpu"
"""Of TFLite's arithmetic."""


class Imported:
    """A .tflite file, run by LiteRT and as the integer graph that it is imported as."""

    def __init__(self, content: bytes, folder: Path) -> None:
        # By content, not by name.
        self.path = folder / "network.bin"
        self.path.write_bytes(content)
        self.placed: Placed = place(self.path, TARGET, Options())
        self.op_types = [node.op_type for node in self.placed.integer.graph]
        self._interpreter = Interpreter(
            model_content=content,
            experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
            experimental_preserve_all_tensors=True,
        )
        self._interpreter.allocate_tensors()
        self._executor = Executor(self.placed.integer)

    def random(self, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [
            np.clip(np.rint(rng.normal(0, (25, 90)[seed % 2], detail["shape"])), -128, 127).astype(detail["dtype"])
            for detail in self._interpreter.get_input_details()
        ]

    def both(self, feeds: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(LiteRT's, ours) for every output."""
        details = self._interpreter.get_input_details()
        for detail, array in zip(details, feeds, strict=True):
            self._interpreter.set_tensor(detail["index"], array)
        self._interpreter.invoke()
        ours = self._executor.run({detail["name"]: feed for detail, feed in zip(details, feeds, strict=True)})
        outputs = self._interpreter.get_output_details()
        return [(self._interpreter.get_tensor(detail["index"]), ours[detail["name"]]) for detail in outputs]

    def inner(self, feeds: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(LiteRT's, ours) for every operator of ours, in order, on the feeds that LiteRT ran last."""
        details = self._interpreter.get_input_details()
        made = [node.outputs[0].name or "" for node in self.placed.integer.graph]
        ours = self._executor.run({detail["name"]: feed for detail, feed in zip(details, feeds, strict=True)}, made)
        names = [tensor.name for tensor in parse_tflite(self.path.read_bytes(), self.path).tensors]
        # Names of ours end in what import and passes add.
        return [(self._interpreter.get_tensor(names.index(name.split("/nchw")[0])), ours[name]) for name in made]

    def differences(self, feeds: int = 4) -> tuple[int, int, int]:
        """How many results differ, of how many, and by how much at most."""
        differing, total, most, seen = 0, 0, 0, set()
        for seed in range(feeds):
            for want, got in self.both(self.random(seed)):
                assert want.dtype == got.dtype and want.shape == got.shape
                distance = np.abs(want.astype(np.int32) - got.astype(np.int32))
                differing, total = differing + int((distance > 0).sum()), total + distance.size
                most = max(most, int(distance.max()))
                seen |= set(want.ravel().tolist())
        assert len(seen) > 1, "a constant result proves nothing"
        return differing, total, most


# --- what we emit ------------------------------------------------------------------------------------------


@pytest.fixture
def comes_back(realized, tmp_path: Path) -> Callable[..., Imported]:
    """Quantize a network, write it as .tflite, import that and compare."""

    def check(network, *outputs: str) -> Imported:
        imported = Imported(tflite_of(realized(network, *outputs).region), tmp_path)
        differing, total, _ = imported.differences()
        assert differing == 0, f"{differing} of {total}"
        return imported

    return check


CONVOLUTIONS = {
    "same": (5, 7, (3, 3), {"pads": [1, 1, 1, 1]}),
    "same, even kernel": (4, 6, (2, 4), {"pads": [0, 1, 1, 2]}),
    "lopsided": (3, 8, (5, 3), {"pads": [4, 0, 1, 2], "strides": [2, 1]}),
    "strides": (6, 5, (3, 2), {"strides": [3, 2]}),
    "dilated": (4, 4, (3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "depthwise": (9, 9, (3, 3), {"pads": [1, 1, 1, 1], "group": 9}),
    "depthwise, two each": (6, 12, (3, 3), {"group": 6, "strides": [2, 2]}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("clamped", [False, True])
def test_convolutions(net, comes_back, case, clamped):
    inputs, outputs, kernel, attributes = CONVOLUTIONS[case]
    network = net(len(case))
    y = network.conv(network.input(1, inputs, 13, 11), inputs, outputs, kernel, **attributes)
    if clamped:
        y = network.op("Clip", y, network.const(0.0), network.const(6.0))
    assert "QConv" in comes_back(network, y).op_types


@pytest.mark.parametrize("seed", range(4))
def test_random_networks(net, comes_back, seed):
    """Odd sizes, a residual addition, pools, a dense layer behind an image, softmax: nothing stays float."""
    network = net(seed)
    height, width, inputs, channels = (int(size) for size in network.rng.integers((7, 7, 1, 3), (15, 15, 5, 12)))
    x = network.conv(network.input(1, inputs, height, width), inputs, channels, (3, 3), pads=[1, 1, 1, 1])
    x = network.op("Relu", x)
    y = network.conv(x, channels, channels, (3, 3), pads=[1, 1, 1, 1], group=channels)
    y = network.op(("Add", "Sub", "Mul", "Add")[seed], network.op("Relu", y), x)
    y = network.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = network.op("GlobalAveragePool", y) if seed % 2 else network.op("Relu", y)
    pixels = 1 if seed % 2 else (height // 2) * (width // 2)
    y = network.op("Flatten", y)
    y = network.op("Gemm", y, network.weight(channels * pixels, 10), network.weight(10))
    imported = comes_back(network, network.op("Softmax", y, axis=1))
    assert {"QConv", "QMaxPool", "QSoftmax"} <= set(imported.op_types)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(imported.op_types), imported.op_types


def test_data_movement(net, comes_back):
    network = net(11)
    x = network.conv(network.input(1, 4, 8, 10), 4, 8, (3, 3), pads=[1, 1, 1, 1])
    starts, ends, axes = (network.const(numbers, "int64") for numbers in ([0, 1], [8, 9], [1, 3]))
    every = network.op("Slice", x, starts, ends, axes, network.const([2, 2], "int64"))
    padded = network.op("Pad", every, network.const([0, 0, 1, 2, 0, 0, 3, 0], "int64"))
    resized = network.op(
        "Resize", every, "", network.const([1, 1, 2, 2]), mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    joined = network.op("Concat", padded, network.op("Relu", network.conv(padded, 4, 3, (1, 1))), axis=1)
    comes_back(network, network.conv(joined, 7, 3, (1, 1)), network.conv(resized, 4, 3, (3, 3)))


def test_transposed_convolutions(net, comes_back):
    network = net(12)
    x = network.input(1, 5, 6, 7)
    y = network.op("ConvTranspose", x, network.weight(5, 4, 3, 3), network.weight(4), strides=[2, 1], pads=[1, 0, 1, 1])
    # This target runs them as convolutions.
    assert "QConv" in comes_back(network, network.op("Relu", y)).op_types


def test_products_of_two_tensors(net, comes_back):
    network = net(13)
    assert (
        "QMatMul"
        in comes_back(network, network.op("MatMul", network.input(2, 3, 6, 8), network.input(2, 3, 8, 5))).op_types
    )


# --- operators by hand -------------------------------------------------------------------------------------

SAME = TensorFormat((0.05,), -3)


VERSIONS = {"RESHAPE": 1, "SQUEEZE": 1, "DEPTH_TO_SPACE": 1, "HARD_SWISH": 1}
"""Of operators whose second version is no other, or none."""


def hand_made(
    name: str,
    shapes: list[tuple[int, ...]],
    made: list[tuple[int, ...]],
    options: object = None,
    constants: tuple[np.ndarray, ...] = (),
    *,
    constants_first: bool = False,
    formats: tuple[TensorFormat, TensorFormat] = (SAME, SAME),
) -> bytes:
    """A file of one operator: its inputs' and outputs' shapes, its options, constants before or behind the inputs."""
    model = TfliteModel("by hand")
    inputs = [model.tensor(f"x{i}", shape, "int8", formats[0]) for i, shape in enumerate(shapes)]
    fixed = [
        model.constant(f"c{i}", array, SAME if array.dtype == np.int8 else None) for i, array in enumerate(constants)
    ]
    outputs = [model.tensor(f"y{i}", shape, "int8", formats[1]) for i, shape in enumerate(made)]
    code = getattr(schema.BuiltinOperator, name)
    kind = 0 if options is None else getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
    operands: list[Tensor] = fixed + inputs if constants_first else inputs + fixed
    model.operator(Operation(code, VERSIONS.get(name, 2)), operands, outputs, kind, options)
    return model.serialize(inputs, outputs)


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


MOVEMENTS = {
    "reshape": hand_made("RESHAPE", [(1, 4, 6, 2)], [(8, 6)], None, (ints(8, 6),)),
    "squeeze": hand_made("SQUEEZE", [(1, 4, 1, 5)], [(4, 5)], schema.SqueezeOptionsT()),
    "split": hand_made(
        "SPLIT", [(1, 5, 4, 6)], [(1, 5, 4, 2)] * 3, schema.SplitOptionsT(numSplits=3), (ints(3),), constants_first=True
    ),
    "pack": hand_made("PACK", [(3, 5)] * 2, [(3, 2, 5)], schema.PackOptionsT(valuesCount=2, axis=1)),
    "slice": hand_made("SLICE", [(1, 5, 7, 3)], [(1, 2, 7, 2)], None, (ints(0, 1, 0, 1), ints(1, 2, -1, 2))),
    "strided slice": hand_made(
        "STRIDED_SLICE",
        [(2, 5, 7, 3)],
        [(5, 3, 3)],
        schema.StridedSliceOptionsT(beginMask=2, endMask=2, shrinkAxisMask=1),
        (ints(-1, 9, 1, 0), ints(0, 0, -1, 3), ints(1, 1, 2, 1)),
    ),
    "transpose": hand_made("TRANSPOSE", [(2, 3, 4, 5)], [(4, 2, 5, 3)], None, (ints(2, 0, 3, 1),)),
    "pad": hand_made(
        "PAD", [(1, 3, 4, 2)], [(1, 6, 4, 4)], None, (np.array([[0, 0], [1, 2], [0, 0], [2, 0]], np.int32),)
    ),
    "mirror pad": hand_made(
        "MIRROR_PAD",
        [(1, 5, 4, 2)],
        [(1, 8, 5, 2)],
        schema.MirrorPadOptionsT(mode=0),
        (np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32),),
    ),
    "maximum": hand_made("MAXIMUM", [(1, 3, 4, 2)] * 2, [(1, 3, 4, 2)], schema.MaximumMinimumOptionsT()),
    "depth to space": hand_made(
        "DEPTH_TO_SPACE", [(1, 3, 4, 8)], [(1, 6, 8, 2)], schema.DepthToSpaceOptionsT(blockSize=2)
    ),
    "space to depth": hand_made(
        "SPACE_TO_DEPTH", [(1, 6, 4, 3)], [(1, 3, 2, 12)], schema.SpaceToDepthOptionsT(blockSize=2)
    ),
    "max pool": hand_made(
        "MAX_POOL_2D",
        [(1, 7, 9, 3)],
        [(1, 4, 5, 3)],
        schema.Pool2DOptionsT(padding=0, strideH=2, strideW=2, filterHeight=3, filterWidth=3),
    ),
    "nearest, half pixels": hand_made(
        "RESIZE_NEAREST_NEIGHBOR",
        [(1, 4, 6, 3)],
        [(1, 8, 12, 3)],
        schema.ResizeNearestNeighborOptionsT(halfPixelCenters=True),
        (ints(8, 12),),
    ),
}


@pytest.mark.parametrize("case", MOVEMENTS)
def test_operators_that_move_or_choose_elements(case, tmp_path):
    assert Imported(MOVEMENTS[case], tmp_path).differences()[0] == 0


WIDER = TensorFormat((0.11,), 5)
FRACTION = TensorFormat((1 / 256,), -128)
POOL = schema.Pool2DOptionsT(padding=1, strideH=2, strideW=2, filterHeight=3, filterWidth=2)
ROUNDED: dict[str, tuple[bytes, float]] = {
    # TFLite rounds averages from zero of the stored integers, ours from zero of the real numbers: halves differ.
    "average pool": (hand_made("AVERAGE_POOL_2D", [(1, 9, 8, 5)], [(1, 4, 4, 5)], POOL), 0.1),
    "mean": (
        hand_made(
            "MEAN",
            [(1, 5, 7, 9)],
            [(1, 9)],
            schema.ReducerOptionsT(keepDims=False),
            (ints(1, 2),),
            formats=(SAME, WIDER),
        ),
        0.0,
    ),
    "add": (hand_made("ADD", [(1, 5, 4, 3)] * 2, [(1, 5, 4, 3)], schema.AddOptionsT(), formats=(SAME, WIDER)), 0.0),
    "sub": (hand_made("SUB", [(1, 5, 4, 3)] * 2, [(1, 5, 4, 3)], schema.SubOptionsT(), formats=(SAME, WIDER)), 0.0),
    "mul": (hand_made("MUL", [(1, 5, 4, 3)] * 2, [(1, 5, 4, 3)], schema.MulOptionsT(), formats=(SAME, WIDER)), 0.0),
    "quantize": (hand_made("QUANTIZE", [(1, 99)], [(1, 99)], schema.QuantizeOptionsT(), formats=(SAME, WIDER)), 0.0),
    "softmax": (
        hand_made("SOFTMAX", [(7, 30)], [(7, 30)], schema.SoftmaxOptionsT(beta=1.0), formats=(SAME, FRACTION)),
        0.0,
    ),
    "logistic": (hand_made("LOGISTIC", [(4, 99)], [(4, 99)], formats=(SAME, FRACTION)), 0.0),
    # Tables of exactly computed values; TFLite's kernels compute in fixed point and round twice.
    "tanh": (hand_made("TANH", [(4, 99)], [(4, 99)], formats=(SAME, TensorFormat((1 / 128,), 0))), 0.1),
    "hard swish": (
        hand_made("HARD_SWISH", [(4, 99)], [(4, 99)], schema.HardSwishOptionsT(), formats=(SAME, WIDER)),
        0.1,
    ),
    "leaky relu": (
        hand_made("LEAKY_RELU", [(4, 99)], [(4, 99)], schema.LeakyReluOptionsT(alpha=0.3), formats=(SAME, WIDER)),
        0.25,
    ),
    "relu6": (hand_made("RELU6", [(4, 99)], [(4, 99)], formats=(SAME, WIDER)), 0.0),
    # Weights of 11 bits against TFLite's 10.
    "bilinear": (
        hand_made(
            "RESIZE_BILINEAR",
            [(1, 4, 6, 3)],
            [(1, 7, 12, 3)],
            schema.ResizeBilinearOptionsT(halfPixelCenters=True),
            (ints(7, 12),),
        ),
        0.15,
    ),
}
"""Files, and the share of results that may differ by one."""


@pytest.mark.parametrize("case", ROUNDED)
def test_operators_that_round(case, tmp_path):
    content, share = ROUNDED[case]
    differing, total, most = Imported(content, tmp_path).differences()
    assert most <= 1 and differing <= share * total, f"{differing} of {total}, by up to {most}"


def test_a_dense_layer_that_keeps_its_dimensions(tmp_path):
    rng, model = np.random.default_rng(4), TfliteModel("by hand")
    x = model.tensor("x", (2, 3, 16), "int8", SAME)
    scales = tuple(float(np.float32(scale)) for scale in rng.uniform(0.01, 0.02, 5))
    w = model.constant("w", rng.integers(-127, 128, (5, 16)).astype(np.int8), TensorFormat(scales, 0))
    sums = tuple(float(np.float32(0.05) * np.float32(scale)) for scale in scales)
    b = model.constant("b", rng.integers(-999, 999, 5).astype(np.int32), TensorFormat(sums, 0))
    y = model.tensor("y", (2, 3, 5), "int8", WIDER)
    options = schema.FullyConnectedOptionsT(keepNumDims=True, fusedActivationFunction=1)
    kind = schema.BuiltinOptions.FullyConnectedOptions
    model.operator(Operation(schema.BuiltinOperator.FULLY_CONNECTED, 12), [x, w, b], [y], kind, options)
    assert Imported(model.serialize([x], [y]), tmp_path).differences()[0] == 0


# --- what is refused ---------------------------------------------------------------------------------------


def import_bytes(content: bytes, folder: Path) -> None:
    (folder / "network.tflite").write_bytes(content)
    import_onnx(folder / "network.tflite")


def test_unknown_operators_are_named(tmp_path):
    content = hand_made("L2_NORMALIZATION", [(1, 9)], [(1, 9)])
    with pytest.raises(QCompilerError, match=r"network\.tflite has TFLite operators .*: L2_NORMALIZATION;"):
        import_bytes(content, tmp_path)


def test_options_that_onnx_lacks(tmp_path):
    table = np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32)
    content = hand_made("MIRROR_PAD", [(1, 5, 4, 2)], [(1, 8, 5, 2)], schema.MirrorPadOptionsT(mode=1), (table,))
    with pytest.raises(QCompilerError, match=r"MIRROR_PAD that makes 'y0' repeats the border"):
        import_bytes(content, tmp_path)


def test_sizes_that_are_computed(tmp_path):
    model = TfliteModel("by hand")
    x, sizes = model.tensor("x", (1, 4, 4, 2), "int8", SAME), model.tensor("sizes", (2,), "int32")
    y = model.tensor("y", (1, 8, 8, 2), "int8", SAME)
    code, options = schema.BuiltinOperator.RESIZE_BILINEAR, schema.ResizeBilinearOptionsT()
    model.operator(Operation(code, 2), [x, sizes], [y], schema.BuiltinOptions.ResizeBilinearOptions, options)
    with pytest.raises(QCompilerError, match=r"computes its input 1 \('sizes'\)"):
        import_bytes(model.serialize([x, sizes], [y]), tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_truncated_files(share, tmp_path):
    content = MOVEMENTS["strided slice"]
    with pytest.raises(QCompilerError, match=r"network\.tflite"):
        import_bytes(content[: max(int(len(content) * share), 12)], tmp_path)


def test_options_that_are_missing(tmp_path):
    content = hand_made("AVERAGE_POOL_2D", [(1, 9, 8, 5)], [(1, 4, 4, 5)])
    with pytest.raises(QCompilerError, match=r"network\.tflite is a broken TensorFlow Lite model"):
        import_bytes(content, tmp_path)


# --- real networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "key"), [("kws_ref_model", "kws01", "mfcc_int8"), ("pretrainedResnet_quant", "cifar10", "images")]
)
def test_trained_networks(zoo, tmp_path, name, data, key):
    """Every convolution and addition is equal; the average pool behind them rounds some halves the other way."""
    imported = Imported((zoo / "tflite" / f"{name}.tflite").read_bytes(), tmp_path)
    assert not {"QuantizeLinear", "DequantizeLinear", "Transpose"} & set(imported.op_types)
    with np.load(zoo / "data" / f"{data}.npz") as arrays:
        samples = arrays[key][:12]
    for sample in samples if samples.dtype == np.int8 else (samples.astype(np.int16) - 128).astype(np.int8):
        [(want, got)] = imported.both([sample[None]])
        assert want.argmax() == got.argmax()
        inner = imported.inner([sample[None]])
        before = inner[: imported.op_types.index("QAveragePool")]
        assert len(before) >= 9 and all(np.array_equal(want, got) for want, got in before)
        want, got = inner[len(before)]
        assert np.abs(want.astype(int) - got).max() <= 1 and (want != got).mean() < 0.1


def test_compiles_and_runs(tmp_path):
    """A bundle, whose self-check runs the imported model, and its numbers beside LiteRT's."""
    path = tmp_path / "network.tflite"
    path.write_bytes(ROUNDED["softmax"][0])
    bundle = compile_model(path, target=TARGET, output=tmp_path / "network.qc")
    rows = np.random.default_rng(3).integers(-128, 128, (7, 30)).astype(np.int8)
    [(want, _)] = Imported(path.read_bytes(), tmp_path).both([rows])
    np.testing.assert_array_equal(bundle.run({"x0": rows})["y0"], want)
