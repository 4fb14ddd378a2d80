"""One engine on an NVIDIA GPU, in a process of its own: prints the seconds of one inference of a batch of one, first
with copies of input and output, then without.

    python benchmarks/gpu_engines.py torch MODEL.onnx    # fp16, channels last, in a CUDA graph
    python benchmarks/gpu_engines.py onnxruntime MODEL.onnx    # fp16 through the CUDA execution provider
    python benchmarks/gpu_engines.py layers cases.json    # JSON: microseconds of each layer in gpu_device.py's sweep

Needs for torch: torch with CUDA; for onnxruntime: onnxruntime-gpu and onnxconverter-common. Weights that were left out
(gpu_device.py) are random numbers: times do not depend on them.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

ROUNDS, RUNS = 20, 50

# These packages are absent where there is no GPU.
Tensor = Any


def best(run: Callable[[], object]) -> float:
    """Seconds of one run: the fastest of some rounds of many."""
    for _ in range(RUNS):
        run()
    times: list[float] = []
    for _ in range(ROUNDS):
        start = perf_counter()
        for _ in range(RUNS):
            run()
        times.append((perf_counter() - start) / RUNS)
    return min(times)


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: [max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in constants
    }


def opened(path: Path) -> onnx.ModelProto:
    """A model; weights without numbers get random ones, of a size that keeps activations in range."""
    model, random = onnx.load(path), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.doc_string == "random":
            shape = tuple(tensor.dims)
            spread = 1 / np.sqrt(max(1, np.prod(shape[1:])))
            numbers = (random.standard_normal(shape) * spread).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    return model


def with_onnxruntime(path: Path) -> tuple[float, float]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise SystemExit("onnxruntime has no CUDA execution provider; install onnxruntime-gpu")
    half = import_module("onnxconverter_common").float16.convert_float_to_float16(opened(path), keep_io_types=True)
    session = ort.InferenceSession(half.SerializeToString(), providers=["CUDAExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes_of(half).items()}
    whole = best(lambda: session.run(None, feeds))
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return whole, best(lambda: session.run_with_iobinding(binding))


def with_torch(path: Path) -> tuple[float, float]:
    torch: Any = import_module("torch")
    if not torch.cuda.is_available():
        raise SystemExit("torch has no CUDA")
    torch.backends.cudnn.benchmark = True
    model = opened(path)
    network = TorchNetwork(model, torch, "cuda", torch.float16)
    ((name, shape),) = shapes_of(model).items()
    host = torch.randn(shape, dtype=torch.float16).pin_memory()
    x = host.to("cuda", memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                network.run({name: x})
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (y,) = network.run({name: x})

        def run() -> None:
            x.copy_(host, non_blocking=True)
            graph.replay()
            y.cpu()

        return best(run), replayed(torch, graph)


def layers(path: Path) -> list[dict[str, float | str]]:
    """cuDNN in fp16, and where a layer is a plain matrix product cuBLASLt in INT8 (without an epilogue), in a graph."""
    torch: Any = import_module("torch")
    if not torch.cuda.is_available():
        raise SystemExit("torch has no CUDA")
    torch.backends.cudnn.benchmark = True
    found: list[dict[str, float | str]] = []
    for case in json.loads(path.read_text("utf-8")):
        if case["layer"] is None:
            continue
        (n, height, width, channels), (outs, kernel, _, depth) = case["layer"]["x"], case["layer"]["weights"]
        last = torch.channels_last
        x = torch.randn(n, channels, height, width).half().cuda().to(memory_format=last)
        weights = torch.randn(outs, depth, kernel, case["layer"]["weights"][2]).half().cuda().to(memory_format=last)
        bias = torch.randn(outs).half().cuda()
        settings = (case["layer"]["strides"], case["layer"]["pad"], 1, case["layer"]["group"])
        times: dict[str, float | str] = {"name": case["name"]}
        conv = torch.nn.functional.conv2d
        times["cuDNN fp16"] = captured(torch, partial(conv, x, weights, bias, *settings))
        if kernel == 1 and settings[0] == [1, 1] and n * height * width > 16:
            a = torch.randint(-128, 128, (n * height * width, depth), dtype=torch.int8).cuda()
            b = torch.randint(-128, 128, (outs, depth), dtype=torch.int8).cuda().t()
            try:
                times["cuBLASLt INT8"] = captured(torch, partial(torch._int_mm, a, b))
            except RuntimeError as error:
                times["cuBLASLt INT8"] = str(error).splitlines()[0]
        found.append(times)
    return found


def captured(torch: Any, run: Callable[[], object], copies: int = 20) -> float:
    """Microseconds of a function, recorded several times over in a graph."""
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(copies):
                run()
        return replayed(torch, graph) / copies * 1e6


def replayed(torch: Any, graph: Any) -> float:
    """Seconds of a graph, replayed again and again."""
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(RUNS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / RUNS)
    return min(times)


class TorchNetwork:
    """An ONNX graph of the operators that the benchmarked networks have, by PyTorch's functions."""

    def __init__(self, model: onnx.ModelProto, torch: Any, device: str, dtype: Any) -> None:
        self._torch, self._graph = torch, model.graph
        self._constants: dict[str, Tensor] = {}
        for tensor in model.graph.initializer:
            array = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if array.is_floating_point():
                array = array.to(device, dtype)
            if array.dim() == 4:
                array = array.contiguous(memory_format=torch.channels_last)
            self._constants[tensor.name] = array

    def run(self, feeds: dict[str, Tensor]) -> list[Tensor]:
        values = {**self._constants, **feeds}
        for node in self._graph.node:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            inputs = [values[name] if name else None for name in node.input]
            values[node.output[0]] = self._compute(node.op_type, inputs, attributes)
        return [values[output.name] for output in self._graph.output]

    def _compute(self, op: str, inputs: Sequence[Tensor], attributes: dict[str, Any]) -> Tensor:
        torch, functional = self._torch, self._torch.nn.functional
        x: Tensor = inputs[0] if inputs else None
        match op:
            case "Constant":
                return torch.from_numpy(numpy_helper.to_array(attributes["value"]).copy())
            case "Conv":
                bias = inputs[2] if len(inputs) > 2 else None
                padded, pads = self._padded(x, attributes, 0.0)
                strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
                return functional.conv2d(padded, inputs[1], bias, strides, pads, dilations, attributes.get("group", 1))
            case "MaxPool":
                padded, pads = self._padded(x, attributes, float("-inf"))
                ceil = bool(attributes.get("ceil_mode", 0))
                return functional.max_pool2d(
                    padded, attributes["kernel_shape"], attributes["strides"], pads, ceil_mode=ceil
                )
            case "AveragePool":
                counted = bool(attributes.get("count_include_pad", 0))
                pads = attributes.get("pads", [0] * 4)[:2]
                strides = attributes.get("strides", [1, 1])
                return functional.avg_pool2d(x, attributes["kernel_shape"], strides, pads, False, counted)
            case "GlobalAveragePool":
                return x.mean((2, 3), keepdim=True)
            case "BatchNormalization":
                scale, bias, mean, variance = inputs[1:]
                epsilon = attributes.get("epsilon", 1e-5)
                return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
            case "Relu":
                return functional.relu(x)
            case "Clip":
                return x.clamp(*(None if bound is None else float(bound) for bound in inputs[1:]))
            case "Add":
                return x + inputs[1]
            case "Concat":
                return torch.cat(inputs, attributes["axis"])
            case "Flatten":
                return x.flatten(attributes.get("axis", 1))
            case "Reshape":
                return x.reshape([int(dim) for dim in inputs[1]])
            case "Gemm":
                a, b = (
                    matrix.T if attributes.get(flag, 0) else matrix
                    for matrix, flag in zip(inputs[:2], ("transA", "transB"), strict=True)
                )
                return torch.addmm(inputs[2], a, b) if len(inputs) > 2 else a @ b
            case "MatMul":
                return x @ inputs[1]
            case "Softmax":
                return torch.softmax(x, attributes.get("axis", -1))
            case "Slice":
                starts, ends = ([int(bound) for bound in numbers] for numbers in inputs[1:3])
                axes = [int(axis) for axis in inputs[3]] if len(inputs) > 3 else range(len(starts))
                steps = [int(step) for step in inputs[4]] if len(inputs) > 4 else [1] * len(starts)
                pieces = [slice(None)] * x.dim()
                for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
                    pieces[axis] = slice(*bounds)
                return x[tuple(pieces)]
            case "Pad":
                befores, afters = torch.tensor_split(inputs[1], 2)
                # PyTorch counts from the last axis.
                pairs = zip(befores.flip(0).tolist(), afters.flip(0).tolist(), strict=True)
                return functional.pad(x, [int(size) for pair in pairs for size in pair])
            case "Dropout" | "Identity":
                return x
        raise SystemExit(f"no PyTorch code for the operator {op}")

    def _padded(self, x: Tensor, attributes: dict[str, Any], fill: float) -> tuple[Tensor, list[int]]:
        """The input and the symmetric padding left to do."""
        top, left, bottom, right = attributes.get("pads", [0] * 4)
        if (top, left) == (bottom, right):
            return x, [top, left]
        return self._torch.nn.functional.pad(x, (left, right, top, bottom), value=fill), [0, 0]


ENGINES: dict[str, Callable[[Path], tuple[float, float]]] = {"torch": with_torch, "onnxruntime": with_onnxruntime}

if __name__ == "__main__":
    engine, file = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(layers(file)) if engine == "layers" else " ".join(map(str, ENGINES[engine](file))))
