"""Race our CPU code against ONNX Runtime, OpenVINO and LiteRT on the same quantized networks.

    python benchmarks/cpu.py                # pip install -e '.[bench]'; all networks, writes results/cpu.md
    python benchmarks/cpu.py --only kws --rounds 3

Every engine gets the QDQ file that qcompile writes; LiteRT gets a .tflite that qcompile emits, without the float
borders, which spares it their conversion, and quantized with signed activations. Each engine runs in a process of its
own, on inputs that are in place already; engines take turns, so that a disturbance hits all, and the minimum and the
median of all runs are compared.
"""

import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import typer
from cpu_engines import ENGINES, Engine, Work, Worker
from networks import mobilenet_v2, resnet_50
from onnx import numpy_helper
from rich.console import Console

import qcompiler
from qcompiler import host_cpu
from qcompiler.bundle import LIBRARY, QDQ_MODEL, WEIGHTS, Bundle, read_weights
from qcompiler.compile import place
from qcompiler.costs import VIEWS
from qcompiler.emit.regions import write_tflite
from qcompiler.errors import QCompilerError
from qcompiler.graph import const_of, data_input, dtype_of
from qcompiler.partition import Region
from qcompiler.runtime import Executable

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEFAULT_ZOO = HERE.parents[1] / "shared" / "zoo"
TFLITE_TARGET = "arm-npu"
"""A target that computes as TFLite does: what its accelerator takes can be written as .tflite."""
PACKAGES: Mapping[Engine, str] = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert"}
AGREEMENT = 0.1
"""Largest distance of an engine's outputs from ONNX Runtime's, relative to their norm: each rounds its own way."""

ZOO_NETWORKS: Mapping[str, str] = {
    "resnet8": "resnet8_tflite_int8_qdq",
    "mobilenet_v1_025": "mobilenet_v1_025_128_tflite_qat_qdq",
    "kws": "kws_dscnn_tflite_int8_qdq",
    "squeezenet11": "squeezenet11",
    "resnet20": "resnet20_cifar10",
}
SHAPED: Mapping[str, Callable[[Path], Path]] = {"mobilenet_v2": mobilenet_v2, "resnet_50": resnet_50}
LAYERS_OF = "mobilenet_v2"


class Time(NamedTuple):
    """Milliseconds a run."""

    minimum: float
    median: float


class Turns(NamedTuple):
    rounds: int
    seconds: float
    """Of each turn."""


@dataclass(frozen=True)
class Row:
    network: str
    threads: int
    macs: int
    times: Mapping[Engine, Time]
    distances: Mapping[Engine, float]
    """Of the outputs from ONNX Runtime's, relative to their norm."""

    def ratio(self, median: bool = False) -> float:
        """Our time to the best peer's."""
        peers = min(item[median] for engine, item in self.times.items() if engine != "qcompiler")
        return self.times["qcompiler"][median] / peers


@dataclass(frozen=True)
class Built:
    network: str
    threads: int
    seconds: float
    """To compile the QDQ file."""
    stored: int
    """Bytes of code and constants."""
    weights: int
    """Bytes of the quantized weights."""

    @property
    def allowed(self) -> float:
        return 1.2 * self.weights + 1e6


class Layer(NamedTuple):
    name: str
    kernel: str
    macs: int
    microseconds: float


def main(
    only: Annotated[str, typer.Option(help="networks whose name contains this")] = "",
    threads: Annotated[list[int] | None, typer.Option(help="thread counts; 1 and 2 if not given")] = None,
    rounds: Annotated[int, typer.Option(help="times each engine gets its turn")] = 8,
    seconds: Annotated[float, typer.Option(help="length of a turn")] = 0.4,
    target: Annotated[str, typer.Option(help="the CPU target to compile for")] = "x86-cpu",
    zoo: Annotated[Path, typer.Option(help="folder of models")] = DEFAULT_ZOO,
) -> None:
    """Build, check, measure; print the tables, and write them if no network was left out."""
    console = Console(width=160)
    rows, builds, layers = list[Row](), list[Built](), list[Layer]()
    with TemporaryDirectory(prefix="cpu-benchmark-") as temporary:
        work = Path(temporary)
        peak = _peak(work)
        for network in [*ZOO_NETWORKS, *SHAPED]:
            if only not in network:
                continue
            source = source_of(network, zoo, work)
            qdq = _quantized(network, source, target, work)
            tflite = _tflite(network, (qdq, source), work)
            for count in threads or [1, 2]:
                bundle, built = _built(network, qdq, target, count, work)
                builds.append(built)
                peers: dict[Engine, Path] = {"onnxruntime": qdq, "openvino": qdq}
                peers |= {"litert": tflite} if tflite is not None else {}
                rows.append(race(network, bundle, peers, count, Turns(rounds, seconds)))
                console.print(_line(rows[-1], peak), highlight=False)
                if network == LAYERS_OF and count == 1:
                    layers = _layers(bundle)
    text = _markdown(rows, builds, layers, peak)
    console.print(text, markup=False, highlight=False)
    if not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.md").write_text(text)


# --- building ----------------------------------------------------------------------------------------------


def source_of(network: str, zoo: Path, work: Path) -> Path:
    if network in SHAPED:
        return SHAPED[network](work / f"{network}.onnx")
    return zoo / "models" / f"{ZOO_NETWORKS[network]}.onnx"


def _quantized(network: str, source: Path, target: str, work: Path) -> Path:
    """The network in QDQ form, as qcompile writes it into the bundle."""
    bundle = qcompiler.compile(source, target)
    qdq = work / f"{network}.qdq.onnx"
    qdq.write_bytes((bundle.path / QDQ_MODEL).read_bytes())
    return qdq


def _built(network: str, qdq: Path, target: str, threads: int, work: Path) -> tuple[Bundle, Built]:
    spec = threaded(target, threads, work)
    start = time.perf_counter()
    bundle = qcompiler.compile(qdq, spec, output=work / f"{network}-{threads}.qc")
    seconds = time.perf_counter() - start
    stored = sum((bundle.path / name).stat().st_size for name in (LIBRARY, WEIGHTS))
    return bundle, Built(network, threads, seconds, stored, _weight_bytes(qdq))


def threaded(target: str, threads: int, work: Path) -> Path:
    """A spec like `target`, with so many threads."""
    spec = work / f"threads-{threads}.yaml"
    spec.write_text(f"extends: {target}\ndescription: {target} with {threads} threads\nhost: {{threads: {threads}}}\n")
    return spec


def _weight_bytes(qdq: Path) -> int:
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(qdq).graph.initializer]
    return sum(array.nbytes for array in arrays if array.dtype.itemsize == 1 and array.ndim > 1)


def _tflite(network: str, sources: Sequence[Path], work: Path) -> Path | None:
    """The network between its float ends as .tflite, from the first source that TFLite can say.

    The QDQ file may have unsigned activations, which TFLite does not multiply by signed weights; then the original is
    quantized for TFLite. None, and the reasons printed, if nothing can be written.
    """
    for source in sources:
        try:
            placed = place(source, TFLITE_TARGET)
            return write_tflite(_inside(placed.integer.graph), work).rename(work / f"{network}.tflite")
        except QCompilerError as error:
            print(f"{network}: not measured with LiteRT: {error}")
    return None


def _inside(graph: ir.Graph) -> Region:
    """Everything between the float borders, and behind the transpose of the input: a TFLite model's input is NHWC."""
    inside = tuple(node for node in graph if not _is_border(node, graph.inputs))
    made = [output for node in inside for output in node.outputs]
    read = dict.fromkeys(value for node in inside for value in node.inputs if value is not None)
    inputs = tuple(value for value in read if value not in made and const_of(value) is None)
    outside = [node for node in graph if node not in inside]
    left = {value for node in outside for value in node.inputs} | set(graph.outputs)
    outputs = tuple(value for value in made if value in left)
    for node in outside:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape"):
            raise QCompilerError(f"its {node.op_type} is computed in float")
    return Region("network", "npu", inside, inputs, outputs)


def _is_border(node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
    if any(dtype_of(value).kind == "f" for value in (data_input(node), node.outputs[0])):
        return True
    source = data_input(node)
    producer = source.producer()
    return node.op_type == "Transpose" and (source in inputs or (producer is not None and _is_border(producer, inputs)))


# --- measuring ---------------------------------------------------------------------------------------------


def race(
    network: str,
    bundle: Bundle,
    peers: Mapping[Engine, Path],
    threads: int,
    turns: Turns,
    agreement: float = AGREEMENT,
    *,
    single_precision: bool = False,
) -> Row:
    """Time a bundle and other engines' models; the program stops if outputs differ by more than `agreement`."""
    inputs, types = _inputs(bundle), tuple(tensor.dtype for tensor in bundle.outputs)
    models: dict[Engine, Path] = {"qcompiler": bundle.path, **peers}
    workers: dict[Engine, Worker] = {
        engine: Worker(Work(engine, model, threads, inputs, types, single_precision))
        for engine, model in models.items()
    }
    for engine in ENGINES:
        worker = workers.get(engine)
        if worker is not None and worker.refusal is not None:
            print(f"{network}: {engine} cannot run it: {worker.refusal}")
            workers.pop(engine).close()
    runs: dict[Engine, list[float]] = {engine: [] for engine in workers}
    for _ in range(turns.rounds):
        for engine, worker in workers.items():
            runs[engine] += worker.slice(turns.seconds)
    distances: dict[Engine, float] = {
        engine: _distance(worker, workers["onnxruntime"]) for engine, worker in workers.items()
    }
    for worker in workers.values():
        worker.close()
    for engine, distance in distances.items():
        if not distance <= agreement:
            sys.exit(f"{network}: {engine}'s outputs are {distance:.2f} of their norm away from ONNX Runtime's")
    times: dict[Engine, Time] = {
        engine: Time(1e3 * min(values), 1e3 * float(np.median(values))) for engine, values in runs.items()
    }
    return Row(network, threads, bundle.report.totals.macs, times, distances)


def _inputs(bundle: Bundle) -> tuple[np.ndarray, ...]:
    """Seeded noise of the spread that the network's quantization expects."""
    random = np.random.default_rng(0)
    arrays: list[np.ndarray] = []
    for tensor in bundle.inputs:
        if np.dtype(tensor.dtype).kind == "f":
            array = random.standard_normal(tensor.shape)
        else:
            info = np.iinfo(tensor.dtype)
            array = random.integers(info.min, info.max + 1, tensor.shape)
        arrays.append(array.astype(tensor.dtype))
    return tuple(arrays)


def _distance(worker: Worker, reference: Worker) -> float:
    pairs = zip(worker.outputs, reference.outputs, strict=True)
    return max(
        float(np.linalg.norm(a.ravel().astype(np.float64) - b.ravel()) / max(np.linalg.norm(b), 1e-9)) for a, b in pairs
    )


def _peak(work: Path) -> float | None:
    """Multiply-accumulates a second of one core, in billions; None on CPUs without AVX512-VNNI."""
    if "avx512vnni" not in host_cpu.detect().features:
        return None
    program = work / "vnni_peak"
    subprocess.run(["cc", "-O2", str(HERE / "vnni_peak.c"), "-o", str(program)], check=True)
    return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def _layers(bundle: Bundle) -> list[Layer]:
    """The kernels in order, each at its fastest of many runs, with the multiply-accumulates of the layers in it."""
    executable = Executable(bundle.path / LIBRARY, read_weights(bundle.path / WEIGHTS))
    executable.set_inputs(_inputs(bundle))
    kernels = executable.profile(100)
    layers = [layer for layer in bundle.report.layers if layer.op not in VIEWS]
    rows: list[Layer] = []
    for kernel, seconds in kernels:
        count = len(re.sub(r"\d+$", "", kernel).split("_"))
        inside, layers = layers[:count], layers[count:]
        rows.append(Layer(" + ".join(x.layer for x in inside), kernel, sum(x.macs for x in inside), 1e6 * seconds))
    return rows


# --- tables ------------------------------------------------------------------------------------------------


def _line(row: Row, peak: float | None) -> str:
    return " | ".join(_cells(row, peak))


def _cells(row: Row, peak: float | None) -> list[str]:
    def cell(engine: Engine) -> str:
        item = row.times.get(engine)
        return f"{item.minimum:.3f} / {item.median:.3f}" if item else "-"

    limit = row.macs / (peak * 1e6 * row.threads) if peak else None
    ours = row.times["qcompiler"].minimum
    return [
        row.network,
        str(row.threads),
        *map(cell, ENGINES),
        f"**{row.ratio():.2f}** / {row.ratio(median=True):.2f}",
        f"{limit:.3f} ({ours / limit:.1f}×)" if limit else "-",
        " ".join(f"{row.distances[engine]:.3f}" if engine in row.distances else "-" for engine in ENGINES),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(rows: Sequence[Row], builds: Sequence[Built], layers: Sequence[Layer], peak: float | None) -> str:
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES.values())
    won = {count: [row.ratio() for row in rows if row.threads == count] for count in sorted({r.threads for r in rows})}
    verdict = "; ".join(
        f"{count} thread{'s' if count > 1 else ''}: {sum(ratio <= 1 for ratio in ratios)} of {len(ratios)} at most "
        f"1.00, worst {max(ratios):.2f}"
        for count, ratios in won.items()
    )
    text = f"""# CPU code beside ONNX Runtime, OpenVINO and LiteRT

`python benchmarks/cpu.py {" ".join(sys.argv[1:])}`, {date.today()}, {cpu_name()}; {packages}.

Milliseconds a run, minimum / median; *ratio*: ours to the fastest peer's. *Limit*: the network's multiply-accumulates
at {peak or "?"} billion a second and thread (measured with vnni_peak.c), and how far above it we are. *Distance*:
of the outputs from ONNX Runtime's, relative to their norm, engine by engine in the same order.

Ratios of minima. {verdict}.

"""
    header = ["network", "threads", *ENGINES, "ratio", "limit", "distance"]
    text += table(header, [_cells(row, peak) for row in rows])
    text += "\n## Compiling\n\n"
    text += table(
        ["network", "threads", "compile s", "code and constants", "INT8 weights", "allowed (1.2 × weights + 1 MB)"],
        [
            [b.network, str(b.threads), f"{b.seconds:.1f}", f"{b.stored:,}", f"{b.weights:,}", f"{b.allowed:,.0f}"]
            for b in builds
        ],
    )
    if layers:
        text += f"\n## {LAYERS_OF}, kernel by kernel, 1 thread\n\nEach at its fastest of 100 runs.\n\n"
        text += table(["layers", "kernel", "MMAC", "µs", "GMAC/s", "of the ceiling"], [_layer(x, peak) for x in layers])
    return text


def _layer(layer: Layer, peak: float | None) -> list[str]:
    rate = layer.macs / layer.microseconds / 1e3
    share = f"{rate / peak:.0%}" if peak and layer.macs else "-"
    macs, speed = (f"{layer.macs / 1e6:.2f}", f"{rate:.0f}") if layer.macs else ("-", "-")
    return [layer.name, layer.kernel, macs, f"{layer.microseconds:.1f}", speed, share]


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{found.group(1) if found else platform.processor()} ({host_cpu.detect().mcpu})"


if __name__ == "__main__":
    typer.run(main)
