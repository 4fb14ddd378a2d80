"""Everything that is to be run on an NVIDIA GPU, prepared on a machine without one.

    python benchmarks/gpu_device.py FOLDER [--architecture sm_90] [--sweep/--no-sweep]    # here: nvcc, the zoo
    python3 FOLDER/run.py -o FOLDER/results    # there: python3, numpy, the driver; torch and onnx for the race

FOLDER holds compiled programs with inputs and the outputs of the numpy reference, the launcher as a library (and its
source, which run.py compiles where the library does not load), the float networks without their weights, and run.py,
which needs nothing of qcompiler. Networks come in several versions, so that a feature that fails on the device, or
slows it down, is seen; each runs in a process of its own. The sweep measures, for each product of the networks, the
tiles that the compiler chooses among.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx_ir as ir
import typer
from networks import resnet_50

from qcompiler.backends import cpu_conv, gpu_conv, gpu_tensor_cores
from qcompiler.backends.gpu import RUNTIMES, compile_region
from qcompiler.backends.gpu_binary import cubin
from qcompiler.backends.gpu_code import Device, device_of, generate
from qcompiler.backends.gpu_program import ALIGNMENT, GpuProgram, Port, Span, Step, encode
from qcompiler.backends.schedules import gpu_mma as mma
from qcompiler.calibrate import calibrate
from qcompiler.compile import place_prepared, prepare
from qcompiler.errors import QCompilerError
from qcompiler.finetune.four_bits import with_four_bits
from qcompiler.graph import QCOMPILER_DOMAIN, data_input, shape_of, value_name
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import WeightRequest
from qcompiler.regions import Region
from qcompiler.target_loader import load_target

ZOO = Path(os.environ.get("QCOMPILER_ZOO", Path(__file__).resolve().parents[2] / "shared" / "zoo"))
HERE = Path(__file__).resolve().parent
NETWORKS = ("resnet20_cifar10", "squeezenet11", "resnet_50")
FOR_NOTHING = (
    "gpu.launch=0 us", "gpu.crossing.sync=0 us", "gpu.crossing.bandwidth=100000 GB/s",
    "gpu.memory.bandwidth=100000 GB/s",
)  # fmt: skip
"""All on the GPU, whatever that costs."""
VERSIONS: Mapping[str, frozenset[str]] = {
    "all": frozenset({"dp4a", "mma", "cp_async", "dependent_launch"}),
    "no overlap": frozenset({"dp4a", "mma", "cp_async"}),
    "no overlap, no async": frozenset({"dp4a", "mma"}),
    "dp4a": frozenset({"dp4a"}),
}
"""By what is used; the first is what is measured against others. A feature's absence must not change a bit."""
FOUR_BITS: Mapping[str, frozenset[str]] = {
    "packed, mma of four bits": VERSIONS["all"] | {"mma_s4"},
    "multiplied as eight": VERSIONS["all"],
}
"""Of a network in W4A4. An architecture without INT4 in its tensor cores computes mma of four bits all the same."""
LARGE = 8 << 20
"""Bytes of constants from which on only versions with the same tiles are written: they share the constants."""
SAMPLES = 3
SWEPT = 12
"""Tiles of a product that are measured: the likeliest."""
Assemble = Callable[[str, Device], bytes]


@dataclass(frozen=True)
class Case:
    """A program with its inputs and outputs; what run.py reads."""

    name: str
    version: str
    head: str
    """File of the encoded program, less its constants."""
    constants: str
    """File of the constants, or none: then they are random numbers."""
    constants_at: int
    constants_bytes: int
    inputs: tuple[str, ...]
    """Files [samples, …]."""
    outputs: tuple[str, ...]
    launches: tuple[str, ...]
    """For people: what each computes, and how it starts."""
    layer: "Layer | None" = None
    """Of a sweep: the product, for rivals."""


@dataclass(frozen=True)
class Layer:
    """A convolution, or a fully connected layer as one of 1x1."""

    x: tuple[int, ...]
    """[N, H, W, C]."""
    weights: tuple[int, ...]
    """[O, KH, KW, C / group]."""
    strides: tuple[int, int]
    pad: tuple[int, int]
    group: int


class Folder:
    """Where cases go; equal arrays once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: list[Case] = []
        (path / "data").mkdir(parents=True, exist_ok=True)

    def store(self, array: np.ndarray) -> str:
        name = f"{hashlib.sha256(array.tobytes()).hexdigest()[:16]}.npz"
        if not (self.path / "data" / name).exists():
            np.savez_compressed(self.path / "data" / name, array)
        return f"data/{name}"

    def add(
        self,
        name: str,
        version: str,
        program: GpuProgram,
        feeds: Sequence[np.ndarray] = (),
        wanted: Sequence[np.ndarray] = (),
        layer: Layer | None = None,
    ) -> None:
        """A program. That of a layer is only timed: its constants are not stored."""
        blob = encode(program)
        start = int(blob[:96].view(np.int64)[3])
        size = len(program.constants)
        head = np.concatenate([blob[:start], blob[start + size :]])
        launches = tuple(f"{step.operators} {step.launch.grid} {step.launch.block}" for step in program.steps)
        self.cases.append(
            Case(
                name, version, self.store(head), self.store(program.constants) if layer is None else "", start, size,
                tuple(map(self.store, feeds)), tuple(map(self.store, wanted)), launches, layer,
            )
        )  # fmt: skip

    def finish(self) -> None:
        (self.path / "cases.json").write_text(json.dumps([asdict(case) for case in self.cases], indent=1), "utf-8")


# --- networks ----------------------------------------------------------------------------------------------


def model_file(name: str, folder: Path) -> Path:
    return resnet_50(folder / "resnet_50.onnx") if name == "resnet_50" else ZOO / "models" / f"{name}.onnx"


def one_region(model: ir.Model, name: str) -> Region:
    """All of a network; the GPU takes it all, quantizing the input included."""
    graph = model.graph
    return Region(f"gpu_{name}", "gpu", tuple(graph), tuple(graph.inputs), tuple(graph.outputs))


def add_network(
    folder: Folder,
    name: str,
    file: Path,
    target: str,
    versions: Mapping[str, Device],
    assemble: Assemble,
    samples: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """A network in several versions, and its float form; returns its integer graph. Samples: random ones if None."""
    prepared = prepare(file, target, Options(overrides=FOR_NOTHING))
    strip(ir.to_proto(prepared.graph), folder.path / f"{name}.onnx")
    placed = place_prepared(prepared)
    refused = [item for item in placed.partition.placements if item.backend != "gpu"]
    if refused:
        raise QCompilerError(f"{name}: {refused[0].node} does not run on the GPU: {refused[0].reason}.")
    region = one_region(placed.integer, name)
    random = np.random.default_rng(0)
    feeds = samples or {value_name(x): _sample(random, x) for x in region.inputs}
    executor, count = Executor(placed.integer), len(next(iter(feeds.values())))
    runs = [executor.run({key: array[i : i + 1] for key, array in feeds.items()}) for i in range(count)]
    wanted = [np.concatenate([run[value_name(y)] for run in runs]) for y in region.outputs]
    first: bytes | None = None
    for version, device in versions.items():
        program = compile_region(region, device, assemble)
        constants = program.constants.tobytes()
        if first is not None and len(first) > LARGE and constants != first:
            continue
        first = first or constants
        folder.add(name, version, program, [feeds[value_name(x)] for x in region.inputs], wanted)
        print(f"{name}, {version}: {len(program.steps)} launches", flush=True)
    return placed.integer


def four_bit_file(file: Path, output: Path) -> Path:
    """A network rounded to weights and activations of four bits, not finetuned: only its integers matter here."""
    options = Options(formats=WeightRequest("int4", edges=True), overrides=FOR_NOTHING)
    prepared = prepare(file, "cuda-sm80", options)
    assert prepared.plan is not None
    ranges = calibrate(prepared.graph, prepared.samples, bits=4)
    four = plan(prepared.graph, ranges, prepared.target)
    formats = with_four_bits(prepared.graph.graph, prepared.plan, four, ranges.by_name, prepared.target, edges=False)
    ir.save(quantize(prepared.graph, formats), output)
    return output


def _sample(random: np.random.Generator, value: ir.Value) -> np.ndarray:
    shape = shape_of(value)
    return random.standard_normal((SAMPLES, *shape[1:])).astype(np.float32)


def strip(model: onnx.ModelProto, file: Path) -> None:
    """The network without its large weights, which `gpu_engines.py` fills up with random ones."""
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) > 64:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
            tensor.doc_string = "random"
    onnx.save(model, file)


# --- the sweep ---------------------------------------------------------------------------------------------


def add_sweep(folder: Folder, models: Sequence[ir.Model], device: Device, assemble: Assemble) -> None:
    """For each distinct product of the networks the likeliest tiles, as launches of one program."""
    seen: set[tuple[object, ...]] = set()
    for model in models:
        for node in model.graph:
            if node.domain != QCOMPILER_DOMAIN or node.op_type not in ("QConv", "QGemm"):
                continue
            problem = cpu_conv.problem_of(node)
            work = gpu_tensor_cores.work_of(problem, data_input(node), device)
            key = (work, problem.x_shape, problem.weights.shape, problem.strides, problem.pad)
            if work is not None and key not in seen:
                seen.add(key)
                _sweep_layer(folder, node, work, device, assemble)


def _sweep_layer(folder: Folder, node: ir.Node, work: mma.Work, device: Device, assemble: Assemble) -> None:
    def cycles(tile: mma.MmaTile) -> float:
        return mma.cycles(work, tile, device.units, asynchronous=device.copies_ahead)

    tiles = sorted(mma.candidates(work, device.units), key=cycles)[:SWEPT]
    chosen = mma.mma_tile(work, device.units, asynchronous=device.copies_ahead)
    tiles += [] if chosen in tiles else [chosen]
    problem, x = cpu_conv.problem_of(node), data_input(node)
    kernels = [
        gpu_conv.convolution(
            problem, x, node.outputs[0], cpu_conv.finish(problem), device, gpu_tensor_cores.Layout(), tile=tile
        )
        for tile in tiles
    ]
    code = generate({f"t{i}": kernel.function for i, kernel in enumerate(kernels)}, device)
    x_bytes, y_bytes = (int(np.prod(shape_of(value))) for value in (x, node.outputs[0]))
    place = {"x": 0, "y": _up(x_bytes), "scratch": _up(x_bytes) + _up(y_bytes)}
    scratch = max(mma.scratch_words(work, tile) * 4 for tile in tiles)
    constants, steps = 0, list[Step]()
    for number, (tile, kernel) in enumerate(zip(tiles, kernels, strict=True)):
        spans = [Span(False, place["x"], x_bytes)]
        for array in kernel.parameters:
            spans.append(Span(True, constants, array.nbytes))
            constants += _up(array.nbytes)
        spans += [Span(False, place["y"], y_bytes), Span(False, place["scratch"], scratch)]
        launch = code.launches[f"t{number}"]
        label = f"{'* ' if tile == chosen else ''}{_spelled(tile)}"
        steps.append(Step(label, launch, tuple(spans[index] for index in launch.arguments)))
    shape, out = shape_of(x), shape_of(node.outputs[0])
    program = GpuProgram(
        "sweep", (Port("x", shape, "int8", Span(False, 0, x_bytes)),),
        (Port("y", out, "int8", Span(False, place["y"], y_bytes)),), tuple(steps), code.source,
        assemble(code.source, device), np.zeros(constants, np.uint8), place["scratch"] + _up(scratch),
    )  # fmt: skip
    (_, height, width, channels), (outs, *window) = problem.x_shape, problem.weights.shape
    name = f"{window[0]}x{window[1]} {height}x{width}x{channels} to {outs}, stride {problem.strides[0]}"
    layer = Layer(problem.x_shape, problem.weights.shape, problem.strides, problem.pad, problem.group)
    folder.add(name, "sweep", program, layer=layer)
    print(f"sweep: {name}: {len(tiles)} tiles", flush=True)


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _spelled(tile: mma.MmaTile) -> str:
    warps = f"{tile.warp_m}x{tile.warp_n}x{tile.warps_k}"
    return f"{tile.m}x{tile.n}, warps {warps}, k {tile.k} x {tile.stages}, splits {tile.splits}"


# --- the folder --------------------------------------------------------------------------------------------


def build_launcher(folder: Path) -> None:
    """libqgpu.so and its source."""
    stubs = HERE.parent / "runtime_stubs"
    source = folder / "launcher"
    source.mkdir(exist_ok=True)
    for part in RUNTIMES["cuda"]:
        (source / part.name).write_text(part.text, "utf-8")
    for header in (stubs / "abi" / "qgpu.h", stubs / "gpu" / "qgpu_device.h"):
        shutil.copy(header, source)
    files = [str(source / part.name) for part in RUNTIMES["cuda"]]
    command = ["cc", "-O2", "-shared", "-fPIC", f"-I{source}", "-o", str(folder / "libqgpu.so"), *files, "-ldl"]
    subprocess.run(command, check=True)
    shutil.copy(HERE / "gpu_device_run.py", folder / "run.py")
    shutil.copy(HERE / "gpu_engines.py", folder / "gpu_engines.py")


def newest(source: str, device: Device) -> bytes:
    """Machine code of the last architecture."""
    return cubin(source, device.architectures[-1])


def main(
    folder: Annotated[Path, typer.Argument(help="Where everything goes; made anew.")],
    architecture: Annotated[str, typer.Option(help="Of the GPU there.")] = "sm_90",
    sweep: Annotated[bool, typer.Option(help="Whether tiles are measured too.")] = True,
    networks: Annotated[str, typer.Option(help="Names, with commas between.")] = ",".join(NETWORKS),
) -> None:
    if not (ZOO / "manifest.json").is_file():
        raise QCompilerError(f"no model zoo in {ZOO}; set QCOMPILER_ZOO to its folder.")
    shutil.rmtree(folder, ignore_errors=True)
    made = Folder(folder)
    target = f"cuda-{architecture.replace('_', '')}"
    gpu = load_target(target).gpu
    assert gpu is not None
    device = device_of(gpu)
    versions, narrow = (
        {version: replace(device, features=features) for version, features in group.items()}
        for group in (VERSIONS, FOUR_BITS)
    )
    models: list[ir.Model] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in networks.split(","):
            file = model_file(name, Path(temporary))
            models.append(add_network(made, name, file, target, versions, newest))
        four_bits = four_bit_file(model_file(NETWORKS[0], Path(temporary)), Path(temporary) / "four.onnx")
        add_network(made, f"{NETWORKS[0]}_w4a4", four_bits, target, narrow, newest)
        if sweep:
            add_sweep(made, models, replace(device, features=VERSIONS["no overlap"]), newest)
    build_launcher(folder)
    made.finish()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {len(made.cases)} programs, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
