"""Products with 4-bit weights in groups of 32, float activations: our kernels beside onnxruntime's MatMulNBits.

    python benchmarks/weight_only.py compare [--seconds S] [--rounds N]

Layers of 4096 inputs and outputs, for one row (a step of text generation) and for 16 to 128 (a prompt). Both engines
read the same .onnx file of MatMulNBits nodes: at accuracy level 4 activations are rounded to 8 bits by the group, at
level 1 they stay float32. Each engine runs in a process of its own, rounds alternate between them, and outputs are
compared with the exact product first. The file has five layers of 8 MB, so that weights come from memory as they do in
a model larger than the caches. Minimum and median microseconds a layer.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

DEPTH = OUTPUTS = 4096
GROUP, LAYERS = 32, 5
ROWS = (1, 16, 128)
THREADS = (1, 2)
LEVELS = (4, 1)
ENGINES = ("qcompiler", "onnxruntime")
RESULT = Path(__file__).parent / "results" / "weight-only.md"
MICROSOFT = "com.microsoft"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one layer, and its largest error relative to the largest exact output."""

    least: float
    median: float
    error: float


def layers(rows: int, level: int) -> onnx.ModelProto:
    """`LAYERS` MatMulNBits of seeded weights, all of one input."""
    nodes, outputs, tensors = [], [], []
    for index in range(LAYERS):
        rng = np.random.default_rng(index)
        codes = rng.integers(0, 256, (OUTPUTS, DEPTH // GROUP, GROUP // 2)).astype(np.uint8)
        scale = rng.uniform(0.001, 0.01, (OUTPUTS, DEPTH // GROUP)).astype(np.float32)
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"codes{index}", f"scale{index}"], [f"y{index}"], name=f"layer{index}",
                domain=MICROSOFT, K=DEPTH, N=OUTPUTS, bits=4, block_size=GROUP, accuracy_level=level,
            )
        )  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, [rows, OUTPUTS]))
        tensors += [numpy_helper.from_array(codes, f"codes{index}"), numpy_helper.from_array(scale, f"scale{index}")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, DEPTH])
    graph = helper.make_graph(nodes, "layers", [x], outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def exact(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The first layer's output in float64."""
    codes, scale = (numpy_helper.to_array(tensor) for tensor in proto.graph.initializer[:2])
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(OUTPUTS, DEPTH).astype(np.float64) - 8
    return x.astype(np.float64) @ (nibbles * np.repeat(scale.astype(np.float64), GROUP, axis=1)).T


Run = Callable[[np.ndarray], list[np.ndarray]]


def _ours(path: Path, threads: int) -> Run:
    import qcompiler
    from qcompiler import bundle
    from qcompiler.runtime import Executable

    folder = path.with_name(f"{threads}.qc")
    if not folder.is_dir():
        qcompiler.compile(path, "x86-cpu", overrides=[f"host.threads={threads}"], output=folder)
    executable = Executable(folder / bundle.LIBRARY, bundle.read_weights(folder / bundle.WEIGHTS), threads)
    return lambda x: executable.run([x])


def _theirs(path: Path, threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [np.asarray(y) for y in session.run(None, {"x": x})]


@app.command(hidden=True)
def engine(name: str, folder: Path, rows: int, threads: int, seconds: float) -> None:
    """Time one engine and print the result as JSON."""
    path = folder / "layers.onnx"
    run = (_ours if name == "qcompiler" else _theirs)(path, threads)
    x = np.random.default_rng(1).standard_normal((rows, DEPTH)).astype(np.float32)
    wanted = exact(onnx.load(path), x)
    error = np.abs(run(x)[0] - wanted).max() / np.abs(wanted).max()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 2:
        begin = time.perf_counter()
        run(x)
        times.append((time.perf_counter() - begin) / LAYERS)
    print(json.dumps([min(times) * 1e6, float(np.median(times)) * 1e6, float(error)]))


def timed(name: str, folder: Path, rows: int, threads: int, seconds: float) -> Timing:
    arguments = [name, str(folder), str(rows), str(threads), str(seconds)]
    command = [sys.executable, __file__, "engine", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Timing(*json.loads(done.stdout.splitlines()[-1]))


def _best(timings: list[Timing]) -> Timing:
    return Timing(
        min(each.least for each in timings), float(np.median([each.median for each in timings])), timings[0].error
    )


@app.command("compare")
def main(
    seconds: Annotated[float, typer.Option(help="How long an engine is timed per round.")] = 1.5,
    rounds: Annotated[int, typer.Option(help="How often engines take turns.")] = 3,
) -> None:
    """Print the table and write it to benchmarks/results/weight-only.md."""
    lines = [
        "| rows | threads | level | qcompiler µs, min / median | onnxruntime µs, min / median | ours / theirs, min "
        "| median | error, ours | theirs |\n|---|---|---|---|---|---|---|---|---|"
    ]
    print(lines[0], flush=True)
    for level, rows in itertools.product(LEVELS, ROWS):
        with tempfile.TemporaryDirectory() as name:
            onnx.save(layers(rows, level), Path(name) / "layers.onnx")
            for threads in THREADS:
                found: dict[str, list[Timing]] = {each: [] for each in ENGINES}
                for _, each in itertools.product(range(rounds), ENGINES):
                    found[each].append(timed(each, Path(name), rows, threads, seconds))
                lines.append(_line(rows, threads, level, *(_best(found[each]) for each in ENGINES)))
                print(lines[-1], flush=True)
    RESULT.write_text(
        "# Products with 4-bit weights\n\n"
        f"`python benchmarks/weight_only.py compare --seconds {seconds:g} --rounds {rounds}`: "
        f"{DEPTH} x {OUTPUTS}, groups of {GROUP}, {LAYERS} layers in turn; accuracy level 4 rounds activations to 8 "
        "bits by the group, level 1 leaves them in float32.\n\n" + "\n".join(lines) + "\n",
        "utf-8",
    )


def _line(rows: int, threads: int, level: int, ours: Timing, theirs: Timing) -> str:
    times = [f"{each.least:.0f} / {each.median:.0f}" for each in (ours, theirs)]
    ratios = [f"{ours.least / theirs.least:.2f}", f"{ours.median / theirs.median:.2f}"]
    errors = [f"{each.error:.1e}" for each in (ours, theirs)]
    return f"| {rows} | {threads} | {level} | {' | '.join([*times, *ratios, *errors])} |"


if __name__ == "__main__":
    app()
