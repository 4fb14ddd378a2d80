"""Five hundred random float networks: quantized, partitioned, tiled, and simulated to the reference's every bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends import accelerators, npu
from qcompiler.compile import EIGHT_BITS, place
from qcompiler.graph import value_name
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.partition import partition
from qcompiler.quant.types import WeightRequest
from qcompiler.simulator.machine import Log, compile_simulator
from qcompiler.target import Target
from qcompiler.target_loader import load_target

GRAPHS, BLOCK = 500, 25
TARGETS = ("arm-npu", "systolic-npu", "ethos-u65-256", "nvdla-small", "gemmini", "vta")
SCRATCHPADS = (None, 64 * 1024, 32 * 1024, 8 * 1024)
"""Bytes, or the chip's own; what has no tile so small goes to the CPU."""
FORMATS = (EIGHT_BITS, WeightRequest(activations="int16"), WeightRequest("int4"), WeightRequest("int4", {}, "int16"))
"""In turn, where the chip has them."""

Shape = tuple[int, ...]
Tensor = tuple[str, Shape]


class Writer:
    """Appends random operators to a float network of feature maps, NCHW."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.read: set[str] = set()

    def below(self, limit: int) -> int:
        return int(self.rng.integers(limit))

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        """Of unequal channels, as trained ones are."""
        spread = 2.0 ** self.rng.uniform(-2, 1, (shape[0], *[1] * (len(shape) - 1)))
        scale = spread / np.sqrt(max(1, np.prod(shape[1:])))
        return self.constant((self.rng.normal(size=shape) * scale).astype(np.float32))

    def op(self, kind: str, *inputs: str, **attributes: float | str | list[int]) -> str:
        name = f"t{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [name], name=f"n{len(self.nodes)}")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        self.read.update(inputs)
        return name

    # --- operators -----------------------------------------------------------------------------------------

    def conv(self, x: str, shape: Shape) -> Tensor:
        n, c, h, w = shape
        kernel = [min(1 + self.below(4), h), min(1 + self.below(4), w)]
        stride, pads = [1 + self.below(2), 1 + self.below(2)], [self.below(size) for size in (*kernel, *kernel)]
        depth, group = (c, c) if self.below(3) == 0 else (1 + self.below(33), 1)
        bias = [self.weight(depth)] if self.below(4) else []
        y = self.op(
            "Conv", x, self.weight(depth, c // group, *kernel), *bias, group=group, strides=stride, pads=pads,
            kernel_shape=kernel,
        )  # fmt: skip
        size = [(full + pads[i] + pads[i + 2] - kernel[i]) // stride[i] + 1 for i, full in enumerate((h, w))]
        return self.activation(y, (n, depth, *size))

    def activation(self, x: str, shape: Shape) -> Tensor:
        match self.below(7):
            case 0:
                return x, shape
            case 1 | 2 | 3:
                return self.op("Relu", x), shape
            case 4:
                limits = self.constant(np.array(0, np.float32)), self.constant(np.array(6, np.float32))
                return self.op("Clip", x, *limits), shape
            case 5:
                return self.op("LeakyRelu", x, alpha=0.1), shape
            case _:
                return self.op(str(self.rng.choice(["Sigmoid", "Tanh", "HardSwish"])), x), shape

    def pool(self, x: str, shape: Shape) -> Tensor:
        n, c, h, w = shape
        kernel = [min(2 + self.below(2), h), min(2 + self.below(2), w)]
        stride = [1 + self.below(2), 1 + self.below(2)]
        pads = [self.below(size) for size in (*kernel, *kernel)]
        if self.below(2):
            y = self.op("MaxPool", x, kernel_shape=kernel, strides=stride, pads=pads)
        else:
            y = self.op(
                "AveragePool", x, kernel_shape=kernel, strides=stride, pads=pads, count_include_pad=self.below(2)
            )
        size = [(full + pads[i] + pads[i + 2] - kernel[i]) // stride[i] + 1 for i, full in enumerate((h, w))]
        return y, (n, c, *size)

    def combine(self, x: str, shape: Shape, others: list[Tensor]) -> Tensor:
        same = [name for name, other in others if other == shape]
        kind = str(self.rng.choice(["Add", "Add", "Sub", "Mul"]))
        if self.below(4) == 0:
            return self.op(kind, x, self.weight(shape[1], 1, 1)), shape
        return self.activation(self.op(kind, x, same[self.below(len(same))]), shape)

    def concat(self, x: str, shape: Shape, others: list[Tensor]) -> Tensor:
        fitting = [(name, s) for name, s in others if s[0] == shape[0] and s[2:] == shape[2:]]
        name, other = fitting[self.below(len(fitting))]
        if shape[1] + other[1] > 64:
            return x, shape
        return self.op("Concat", x, name, axis=1), (shape[0], shape[1] + other[1], *shape[2:])

    def resize(self, x: str, shape: Shape) -> Tensor:
        n, c, h, w = shape
        if h * w > 150:
            return x, shape
        factors = self.constant(np.array([1, 1, 2, 2], np.float32))
        nearest = self.below(2)
        y = self.op(
            "Resize", x, "", factors, mode="nearest" if nearest else "linear",
            coordinate_transformation_mode="asymmetric" if nearest else "half_pixel", nearest_mode="floor",
        )  # fmt: skip
        return y, (n, c, 2 * h, 2 * w)

    def move(self, x: str, shape: Shape) -> Tensor:
        n, c, h, w = shape
        match self.below(3):
            case 0 if c > 1:
                start = 1 + self.below(c - 1)
                bounds = (self.constant(np.array([value], np.int64)) for value in (start, c, 1))
                return self.op("Slice", x, *bounds), (n, c - start, h, w)
            case 1:
                amounts = [0, 0, self.below(2), self.below(2), 0, 0, self.below(2), self.below(2)]
                y = self.op("Pad", x, self.constant(np.array(amounts, np.int64)))
                return y, (n, c, h + amounts[2] + amounts[6], w + amounts[3] + amounts[7])
            case _:
                return self.op("Transpose", x, perm=[0, 1, 3, 2]), (n, c, w, h)

    def head(self, x: str, shape: Shape) -> str:
        """Mean, product, perhaps a softmax."""
        y = self.op("Flatten", self.op("GlobalAveragePool", x))
        y = self.op("Gemm", y, self.weight(10, shape[1]), self.weight(10), transB=1)
        return self.op("Softmax", y, axis=-1) if self.below(2) else y

    # --- the network ---------------------------------------------------------------------------------------

    def model(self) -> tuple[onnx.ModelProto, Shape]:
        shape = (1, 1 + self.below(12), 5 + self.below(12), 5 + self.below(12))
        made: list[Tensor] = [("x", shape)]
        for _ in range(3 + self.below(8)):
            # Mostly a chain, at times a branch.
            x, now = made[-1] if self.below(4) else made[self.below(len(made))]
            match self.below(11):
                case 0 | 1 | 2 | 3:
                    made.append(self.conv(x, now))
                case 4:
                    made.append(self.pool(x, now))
                case 5 | 6:
                    made.append(self.combine(x, now, made))
                case 7:
                    made.append(self.concat(x, now, made))
                case 8:
                    made.append(self.resize(x, now))
                case 9:
                    made.append(self.move(x, now))
                case _:
                    made.append(self.activation(x, now))
        last, now = made[-1]
        if last == "x":
            last, now = self.conv(last, now)
        unread = [name for name, _ in made if name not in self.read and name not in ("x", last)]
        outputs = dict.fromkeys([self.head(last, now) if self.below(2) else last, *unread])
        declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(
            self.nodes, "random", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], declared,
            self.constants,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), shape


# --- running ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One accelerator region of a network, and what the reference has for its inputs and outputs."""

    label: str
    program: npu.NpuProgram
    inputs: tuple[np.ndarray, ...]
    outputs: dict[str, np.ndarray]
    target: Target


def shrunk(target: Target, size: int | None) -> Target:
    """The chip with a scratchpad of at most so many bytes."""
    assert target.npu is not None
    scratchpad = target.npu.scratchpad
    scratchpad = scratchpad.model_copy(update={"size": min(scratchpad.size, size or scratchpad.size)})
    memories = {**target.npu.memories, target.npu.memory_name("scratchpad"): scratchpad}
    return target.model_copy(update={"npu": target.npu.model_copy(update={"memories": memories})})


def formats_for(chip: str, seed: int) -> WeightRequest:
    offered = load_target(chip).quantization
    having = [
        formats
        for formats in FORMATS
        if (formats.activations != "int16" or "int16" in offered.activations.dtypes)
        and (formats.default != "int4" or "int4" in offered.weights.dtypes)
    ]
    return having[seed // (len(TARGETS) * len(SCRATCHPADS)) % len(having)]


def cases(seed: int, folder: Path) -> Iterator[Case]:
    model, shape = Writer(seed).model()
    file = folder / f"{seed}.onnx"
    onnx.save(model, file)
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(3, *shape[1:])).astype(np.float32)
    chip = TARGETS[seed % len(TARGETS)]
    placed = place(file, chip, Options(calibration={"x": data}, formats=formats_for(chip, seed)))
    target = shrunk(placed.target, SCRATCHPADS[seed // len(TARGETS) % len(SCRATCHPADS)])
    parts = partition(placed.integer, target, can_run=partial(accelerators.can_run, target=target), keep_islands=True)
    reference = Executor(placed.integer)
    regions = [region for region in parts.regions if region.backend == "npu"]
    names = [value_name(value) for region in regions for value in (*region.inputs, *region.outputs)]
    values = reference.run({"x": data[:1]}, list(dict.fromkeys(names)))
    for region in regions:
        yield Case(
            f"seed {seed} on {chip}, {region.name}",
            npu.compile_region(region, target),
            tuple(values[value_name(value)] for value in region.inputs),
            {value_name(value): values[value_name(value)] for value in region.outputs},
            target,
        )


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_simulator(tmp_path_factory.mktemp("simulator"))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(GRAPHS // BLOCK))
def test_random_networks(simulator: Path, tmp_path: Path, block: int) -> None:
    every = [case for seed in range(block * BLOCK, (block + 1) * BLOCK) for case in cases(seed, tmp_path)]
    assert len(every) >= BLOCK // 2, "most networks have something for the accelerator"
    functions = {
        f"driver_{index}": npu.driver(case.program, f"driver_{index}", index) for index, case in enumerate(every)
    }
    library = tmp_path / "drivers.so"
    executable = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    executable.export_library(str(library), addons=[str(simulator)])
    module, log = tvm.runtime.load_module(str(library)), Log(library)
    for index, case in enumerate(every):
        outputs = [tvm.runtime.tensor(np.full(tensor.shape, 77, tensor.dtype)) for tensor in case.program.outputs]
        workspace = np.full(max(1, case.program.workspace_bytes), 0x5A, np.uint8)
        arguments = [*case.inputs, case.program.blob.copy()]
        log.reset()
        module[f"driver_{index}"](*map(tvm.runtime.tensor, arguments), *outputs, tvm.runtime.tensor(workspace))
        for output, tensor in zip(outputs, case.program.outputs, strict=True):
            np.testing.assert_array_equal(
                output.numpy(), case.outputs[tensor.name], err_msg=f"{case.label}: {tensor.name}"
            )
        np.testing.assert_array_equal(log.words(), npu.words(case.program), err_msg=case.label)
