"""The engines that `cpu.py` compares: each loads one quantized network and runs it, in a process of its own."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

Engine = Literal["qcompiler", "onnxruntime", "openvino", "litert"]
ENGINES: tuple[Engine, ...] = ("qcompiler", "onnxruntime", "openvino", "litert")


@dataclass(frozen=True)
class Work:
    """One network for one engine."""

    engine: Engine
    model: Path
    """A bundle, an .onnx in QDQ form, or a .tflite."""
    threads: int
    inputs: tuple[np.ndarray, ...]
    """In the order of the ONNX model's inputs, of its shapes and types."""
    output_types: tuple[str, ...]
    """Of the ONNX model."""
    single_precision: bool = False
    """Whether an engine that would compute float networks in bfloat16 must not."""


@dataclass(frozen=True)
class Loaded:
    invoke: Callable[[], Any]
    """Runs once on inputs that are in place already: nobody's Python wrapping is measured."""
    outputs: Callable[[], Sequence[np.ndarray]]
    """What the last run computed, as numbers of the ONNX model."""


def load(work: Work) -> Loaded:
    match work.engine:
        case "qcompiler":
            return _qcompiler(work)
        case "onnxruntime":
            return _onnxruntime(work)
        case "openvino":
            return _openvino(work)
        case "litert":
            return _litert(work)


def _qcompiler(work: Work) -> Loaded:
    from qcompiler import bundle
    from qcompiler.runtime import Executable

    executable = Executable(work.model / bundle.LIBRARY, bundle.read_weights(work.model / bundle.WEIGHTS), work.threads)
    executable.set_inputs(work.inputs)
    return Loaded(executable.invoke, lambda: executable.run(work.inputs))


def _onnxruntime(work: Work) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(work.model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for argument, array in zip(session.get_inputs(), work.inputs, strict=True):
        binding.bind_cpu_input(argument.name, array)
    for result in session.get_outputs():
        binding.bind_output(result.name)
    return Loaded(lambda: session.run_with_iobinding(binding), binding.copy_outputs_to_cpu)


def _openvino(work: Work) -> Loaded:
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": work.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    config |= {"INFERENCE_PRECISION_HINT": "f32"} if work.single_precision else {}
    request = core.compile_model(core.read_model(work.model), "CPU", config).create_infer_request()
    for index, array in enumerate(work.inputs):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
    return Loaded(request.infer, lambda: [np.array(tensor.data) for tensor in request.output_tensors])


def _litert(work: Work) -> Loaded:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(work.model), num_threads=work.threads)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), work.inputs, strict=True):
        interpreter.set_tensor(detail["index"], _to_tflite(array, detail))
    details = list(zip(interpreter.get_output_details(), work.output_types, strict=True))
    return Loaded(
        interpreter.invoke,
        lambda: [_from_tflite(interpreter.get_tensor(detail["index"]), detail, dtype) for detail, dtype in details],
    )


def _to_tflite(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    """The ONNX model's input as the .tflite wants it: NHWC and quantized."""
    if array.ndim == 4 and array.shape != tuple(detail["shape"]):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype.kind == "f" and detail["dtype"] != np.float32:
        scale, zero_point = detail["quantization"]
        info = np.iinfo(detail["dtype"])
        array = np.clip(np.rint(array / np.float32(scale)) + zero_point, info.min, info.max)
    return np.ascontiguousarray(array.astype(detail["dtype"]).reshape(detail["shape"]))


def _from_tflite(array: np.ndarray, detail: dict[str, Any], dtype: str) -> np.ndarray:
    if np.dtype(dtype).kind != "f" or array.dtype.kind == "f":
        return array
    scale, zero_point = detail["quantization"]
    return (array.astype(np.float32) - zero_point) * np.float32(scale)


# --- a process each ----------------------------------------------------------------------------------------


class Worker:
    """An engine in a process of its own, idle between slices."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()
        answer: list[np.ndarray] | str = self._pipe.recv()
        self.refusal: str | None = answer if isinstance(answer, str) else None
        """Why the engine cannot run the network."""
        self.outputs: list[np.ndarray] = [] if isinstance(answer, str) else answer
        """After one run."""

    def slice(self, seconds: float) -> list[float]:
        """Seconds per run, over so long."""
        self._pipe.send(seconds)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(work: Work, pipe: Connection) -> None:
    try:
        loaded = load(work)
        loaded.invoke()
        pipe.send(loaded.outputs())
    except (RuntimeError, ValueError) as error:
        pipe.send(" ".join(str(error).split()))
        return
    while True:
        try:
            seconds = pipe.recv()
        except EOFError:
            return
        for _ in range(3):
            loaded.invoke()
        pipe.send(_timed(loaded.invoke, seconds))


def _timed(invoke: Callable[[], Any], seconds: float) -> list[float]:
    # Short runs are timed in batches, so that reading the clock costs nothing.
    start = time.perf_counter()
    invoke()
    batch = max(1, int(50e-6 / (time.perf_counter() - start)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        for _ in range(batch):
            invoke()
        times.append((time.perf_counter() - start) / batch)
    return times
