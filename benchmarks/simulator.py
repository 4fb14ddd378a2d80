"""The timing model beside other people's figures, and its speed.

    python benchmarks/simulator.py [--vela PATH] [--scalesim PYTHON] [--zoo DIR] [--section NAME]

Sections: `vela` compares every zoo network and some others, quantized by us, with the Vela compiler's own report
(operators, totals, memory), `vela-int16` the same with 16-bit activations; `systolic` compares with SCALE-Sim's cycles;
`nvdla` with published frame rates; `speed` measures. Each writes benchmarks/results/simulator-NAME.md. `--vela` and
`--scalesim` may belong to other environments.
"""

import csv
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import networks
import numpy as np
import typer
import vela_reference
from vela_reference import Network, Operator

import qcompiler
from qcompiler.compile import Placed, place, schedule
from qcompiler.costs import cost, region_cost
from qcompiler.emit.tflite import tflite_of
from qcompiler.errors import QCompilerError
from qcompiler.options import Options
from qcompiler.quant.types import ActivationType, WeightRequest
from qcompiler.simulator import engines
from qcompiler.simulator.cost import RegionCost
from qcompiler.simulator.mac_array import find_block, mac_array
from qcompiler.simulator.workload import Feed, Port, Shape
from qcompiler.target import MacArray, Npu, Systolic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GOLDEN = ROOT / "tests" / "simulator"
DEFAULT_ZOO = Path(os.environ.get("QCOMPILER_ZOO", ROOT.parent / "shared" / "zoo"))

ETHOS = ("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512")
SRAM = 2 * 2**20
"""Bytes, of every accelerator here: Vela's Shared_Sram mode keeps all feature maps there."""
ETHOS_U85 = ("ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048")
HELD_OUT: Mapping[str, Callable[[Path], Path]] = {
    "mobilenet_v1": networks.mobilenet_v1,
    "mobilenet_v2": networks.mobilenet_v2,
    "resnet_18": networks.resnet_18,
    "resnet_50": networks.resnet_50,
    "squeezenet10": partial(networks.published, "squeezenet"),
    "densenet121": partial(networks.published, "densenet121"),
}
"""Networks with seeded weights that were compared for the first time when the model was done."""
GROUPS = ("held out", "in view")
IN_VIEW_INT16 = ("mnist_cnn", "kws_dscnn", "resnet8_cifar10", "mobilenet_v1_025_128")
"""Those that 16 bits were priced by; the others of the zoo were compared once that was done."""
NVDLA = {
    "nvdla-large": 269,
    "nvdla-1024": 153,
    "nvdla-512": 93,
    "nvdla-256": 46,
    "nvdla-128": 20,
    "nvdla-small": 7.3,
    "nvdla-32": 3.6,
}
"""Frames a second."""


# --- Vela ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One operator: the engine model on Vela's operator, whole."""

    accelerator: str
    network: str
    theirs: Operator
    same_block: bool
    cycles: float

    @property
    def close(self) -> bool:
        return abs(self.cycles / self.theirs.npu_cycles - 1) <= 0.10


@dataclass(frozen=True)
class Whole:
    """One network: our schedule, priced, and Vela's."""

    accelerator: str
    network: str
    cycles: int
    sram: int
    theirs: Network


def with_sram(name: str, folder: Path) -> Path:
    """A bundled target with the SRAM both compilers are given."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"extends: {name}\ndescription: {name} as compared\nnpu: {{memories: {{sram: {{size: {SRAM} B}}}}}}\n"
    )
    return path


def operator_cycles(shape: Shape, array: MacArray, npu: Npu, *, scales_staged: bool) -> float:
    inside = Port.of(npu.scratchpad, npu.clock)
    scales = inside if scales_staged else Port.of(npu.memories[npu.weight_memory], npu.clock)
    return mac_array(shape, array, Feed(inside, inside, scales)).cycles


def priced(placed: Placed) -> tuple[RegionCost, bytes] | None:
    """The accelerator's part of a network: its cost, and itself as TFLite. None unless it is one region."""
    regions = [region for region in placed.partition.regions if region.backend == "npu"]
    if len(regions) != 1:
        return None
    program = schedule(placed)[regions[0].name]
    return region_cost(program, placed.target), tflite_of(regions[0])


def compare_with_vela(
    vela: Path, models: Sequence[Path], activations: ActivationType
) -> tuple[list[Compared], list[Whole], list[str]]:
    """Operators on maps of the type, whole networks, and why some are left out."""
    compared: list[Compared] = []
    wholes: list[Whole] = []
    left_out: list[str] = []
    bits, formats = 16 if activations == "int16" else 8, WeightRequest(activations=activations)
    for model in models:
        for accelerator in (*ETHOS, *ETHOS_U85):
            with TemporaryDirectory() as folder:
                target = with_sram(accelerator, Path(folder))
                try:
                    placed = place(model, target, Options(method="minmax", samples=2, formats=formats))
                    found = priced(placed)
                except QCompilerError as error:
                    left_out.append(f"{model.stem}: {error}")
                    break
            if found is None:
                left_out.append(f"{model.stem}: the accelerator gets it in several parts")
                break
            ours, tflite = found
            known = placed.target.emit.vela
            assert known is not None
            theirs = vela_reference.run(vela, tflite, accelerator, known.system_config, SRAM)
            wholes.append(Whole(accelerator, model.stem, ours.cycles, ours.peak_scratchpad, theirs))
            npu = placed.target.npu
            assert npu is not None
            array = npu.engines["mac"].geometry
            assert isinstance(array, MacArray)
            for operator in theirs.operators:
                if operator.shape is not None and operator.npu_cycles and operator.shape.ifm_bits == bits:
                    cycles = operator_cycles(operator.shape, array, npu, scales_staged=operator.scales_staged)
                    same = find_block(operator.shape, array).ofm == operator.block
                    compared.append(Compared(accelerator, model.stem, operator, same, cycles))
            print(f"{model.stem} on {accelerator}", file=sys.stderr)
    return compared, wholes, left_out


def vela_report(vela: Path, zoo: Path) -> str:
    with TemporaryDirectory() as folder:
        models = [make(Path(folder) / f"{name}.onnx") for name, make in HELD_OUT.items()]
        compared, wholes, left_out = compare_with_vela(vela, [*models, *_zoo(zoo)], "int8")
    write_golden("vela_operators.csv", (item for item in compared if item.accelerator in ETHOS))
    lines = [
        "# The MAC array beside Vela 5.2.0",
        "",
        "Networks quantized by us (ranges from random inputs, which change no cycle), emitted as TFLite and given to "
        f"Vela with `--memory-mode {vela_reference.MEMORY_MODE}`, {SRAM // 2**20} MiB of SRAM and the system "
        "configurations that the target specs name. Made by `benchmarks/simulator.py --section vela`.",
        "",
        f"**What was held out.** {', '.join(HELD_OUT)}: {len(HELD_OUT)} networks of published shape with seeded "
        "weights, made and compared only once the model was done; nothing was fitted to them afterwards. Everything "
        "else (the zoo) was in view when it was written and revised.",
        "",
        "## Operators",
        "",
        "Vela's operators with 8-bit inputs, priced whole by the engine model: its block choice, and its cycles beside "
        "Vela's NPU cycles (which include waiting for weights that were not there in time). The Ethos-U85 chooses "
        "blocks by rules of its own for depthwise convolutions, pools and elementwise operators, which are not "
        "followed here; only its totals are to be trusted.",
        "",
        "| accelerator | networks | operators | same OFM block | cycles within 10% | median error |",
        "|---|---|---|---|---|---|",
    ]
    lines += _operator_rows(compared, group_of)
    lines += [
        "",
        "## Networks",
        "",
        "Our schedule priced by the simulator, beside Vela's total cycles (memory accesses included) and SRAM. Ours "
        "copies inputs and outputs from and to external memory; Vela's input is in SRAM, where it transposes it. Vela "
        "charges a broadcast constant (the scale and shift that DenseNet has after each concatenation) as if the whole "
        "map were read from external memory; its NPU cycles, without memory accesses, stand in the last column.",
        "",
        "| network | accelerator | our cycles | Vela's | | our SRAM | Vela's | | Vela's NPU cycles |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_network_row(whole) for whole in wholes]
    lines += [
        "",
        "| accelerators | networks | totals | SRAM within 15% or lower |",
        "|---|---|---|---|",
    ]
    lines += _tallies(wholes, group_of)
    lines += ["", "Left out:", "", *[f"- {reason}" for reason in left_out]] if left_out else []
    return "\n".join(lines)


def vela_int16_report(vela: Path, zoo: Path) -> str:
    models = [path for path in _zoo(zoo) if "tflite" not in path.stem]
    compared, wholes, left_out = compare_with_vela(vela, models, "int16")
    write_golden("vela_operators_int16.csv", (item for item in compared if item.accelerator in ETHOS))
    lines = [
        "# The MAC array with 16-bit activations beside Vela 5.2.0",
        "",
        "The float networks of the zoo, quantized by us with `--activations int16` (ranges from random inputs), "
        "emitted as TFLite and given to Vela as in simulator-vela.md, where they are one region. Made by "
        "`benchmarks/simulator.py --section vela-int16`.",
        "",
        f"**What was held out.** All but {', '.join(IN_VIEW_INT16)}.",
        "",
        "## Operators",
        "",
        "Vela's operators with 16-bit inputs, priced whole by the engine model, beside Vela's NPU cycles. For "
        "depthwise convolutions and pools the Ethos-U85 chooses blocks by rules that are not followed here.",
        "",
        "| accelerator | networks | operators | same OFM block | cycles within 10% | median error |",
        "|---|---|---|---|---|---|",
        *_operator_rows(compared, _group_int16),
        "",
        "## Networks",
        "",
        "| network | accelerator | our cycles | Vela's | | our SRAM | Vela's | | Vela's NPU cycles |",
        "|---|---|---|---|---|---|---|---|---|",
        *[_network_row(whole) for whole in wholes],
        "",
        "| accelerators | networks | totals | SRAM within 15% or lower |",
        "|---|---|---|---|",
        *_tallies(wholes, _group_int16),
    ]
    lines += ["", "Left out:", "", *[f"- {reason}" for reason in left_out]] if left_out else []
    return "\n".join(lines)


def _zoo(zoo: Path) -> list[Path]:
    return sorted((zoo / "models").glob("*.onnx"))


def _group_int16(network: str) -> str:
    return GROUPS[network in IN_VIEW_INT16]


def _operator_rows(compared: Sequence[Compared], group: Callable[[str], str]) -> list[str]:
    lines: list[str] = []
    for accelerators in (ETHOS, ETHOS_U85):
        family = [item for item in compared if item.accelerator in accelerators]
        for name in GROUPS:
            for accelerator in accelerators:
                some = [i for i in family if i.accelerator == accelerator and group(i.network) == name]
                lines.append(f"| {accelerator} | {name} | {_operator_row(some)} |")
        lines.append(f"| {_family(accelerators)} | all | {_operator_row(family)} |")
    return lines


def _tallies(wholes: Sequence[Whole], group: Callable[[str], str]) -> list[str]:
    lines: list[str] = []
    for accelerators, share in ((ETHOS, 0.10), (ETHOS_U85, 0.20)):
        family = [whole for whole in wholes if whole.accelerator in accelerators]
        for name in GROUPS:
            some = [whole for whole in family if group(whole.network) == name]
            lines.append(f"| {_family(accelerators)} | {name} | {_tally(some, share)} |")
    return lines


def _family(accelerators: Sequence[str]) -> str:
    return f"{accelerators[0]} to {accelerators[-1]}"


def group_of(network: str) -> str:
    return GROUPS[0] if network in HELD_OUT else GROUPS[1]


def _tally(wholes: Sequence[Whole], share: float) -> str:
    close = sum(abs(_off(whole.cycles, whole.theirs.total_cycles)) <= share for whole in wholes)
    small = sum(_off(whole.sram, whole.theirs.sram_bytes) <= 0.15 for whole in wholes)
    return f"{close} of {len(wholes)} within {share:.0%} | {small} of {len(wholes)}"


def _operator_row(items: Sequence[Compared]) -> str:
    blocks, close = sum(item.same_block for item in items), sum(item.close for item in items)
    error = median(abs(_off(item.cycles, item.theirs.npu_cycles)) for item in items)
    share = f"{blocks} ({blocks / len(items):.1%}) | {close} ({close / len(items):.1%})"
    return f"{len(items)} | {share} | {error:.2%}"


def _network_row(whole: Whole) -> str:
    theirs = whole.theirs
    return (
        f"| {whole.network} | {whole.accelerator} | {whole.cycles} | {theirs.total_cycles} "
        f"| {_off(whole.cycles, theirs.total_cycles):+.1%} | {whole.sram} | {theirs.sram_bytes} "
        f"| {_off(whole.sram, theirs.sram_bytes):+.1%} | {theirs.npu_cycles} |"
    )


def _off(ours: float, theirs: float) -> float:
    return ours / theirs - 1


def write_golden(name: str, compared: Iterable[Compared]) -> None:
    """Every distinct operator once, for the tests to compare with where there is no Vela."""
    rows = sorted(
        {
            (
                item.accelerator, shape.op, *shape.ofm, *shape.ifm, *shape.kernel, *shape.stride, *shape.dilation,
                shape.groups, shape.ofm_bits, *(shape.second or ("", "", "")), int(item.theirs.scales_staged),
                *item.theirs.block, item.theirs.npu_cycles,
            )
            for item in compared
            if (shape := item.theirs.shape) is not None
        },
        key=str,
    )  # fmt: skip
    with (GOLDEN / name).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(VELA_COLUMNS)
        table.writerows(rows)


VELA_COLUMNS = (
    "accelerator", "op", "ofm_h", "ofm_w", "ofm_c", "ifm_h", "ifm_w", "ifm_c", "kernel_h", "kernel_w", "stride_h",
    "stride_w", "dilation_h", "dilation_w", "groups", "ofm_bits", "second_h", "second_w", "second_c", "scales_staged",
    "block_h", "block_w", "block_c", "npu_cycles",
)  # fmt: skip


# --- SCALE-Sim -----------------------------------------------------------------------------------------------------


def systolic_report() -> str:
    rows = tuple(csv.DictReader((GOLDEN / "scalesim_cycles.csv").open()))
    lines = [
        "# Systolic arrays beside SCALE-Sim 3.0.0",
        "",
        "Compute cycles of every distinct convolution and matrix product; SCALE-Sim's are in "
        "tests/simulator/scalesim_cycles.csv, made by `benchmarks/scalesim_cycles.py`.",
        "",
        "| network | array | dataflow | layers | equal | cycles |",
        "|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["network"], int(row["array"]), row["dataflow"]) for row in rows)
    for network, size, dataflow in keys:
        array = Systolic.model_validate({"kind": "systolic", "rows": size, "cols": size, "dataflow": dataflow})
        mine = [
            row for row in rows if (row["network"], row["array"], row["dataflow"]) == (network, str(size), dataflow)
        ]
        ours = [_systolic_cycles(row, array) for row in mine]
        equal = sum(int(cycles == int(row["cycles"])) for cycles, row in zip(ours, mine, strict=True))
        lines.append(f"| {network} | {size}x{size} | {dataflow} | {len(mine)} | {equal} | {sum(ours)} |")
    return "\n".join(lines)


def _systolic_cycles(row: dict[str, str], array: Systolic) -> int:
    """Of one group."""
    m, k, n = (int(row[name]) for name in ("m", "k", "n"))
    shape = Shape("conv", (1, m, n), (1, m, k), (1, 1), (1, 1), (1, 1), 1, 8, 8, 8, 1)
    return int(engines.systolic(shape, array, array.rows * array.cols).cycles)


# --- NVDLA ---------------------------------------------------------------------------------------------------------


def nvdla_report() -> str:
    lines = [
        "# ResNet-50 on seven configurations of NVDLA",
        "",
        "Our schedule of a ResNet-50 of seeded weights, priced by the simulator, beside the frame rates of "
        "nvdla.org/primer.html. The specs differ only in hardware figures; there is no factor per row.",
        "",
        "| spec | published, frames/s | ours | |",
        "|---|---|---|---|",
    ]
    close = 0
    with TemporaryDirectory() as folder:
        model = networks.resnet_50(Path(folder) / "resnet_50.onnx")
        for name, published in NVDLA.items():
            placed = place(model, name, Options(method="minmax", samples=1))
            programs = schedule(placed)
            seconds = sum(region_cost(program, placed.target).seconds for program in programs.values())
            close += abs(_off(1 / seconds, published)) <= 0.25
            lines.append(f"| {name} | {published} | {1 / seconds:.2f} | {_off(1 / seconds, published):+.0%} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join([*lines, "", f"Within 25%: {close} of {len(NVDLA)}.", "", *NVDLA_HISTORY])


NVDLA_HISTORY = (
    "These are not predictions: figures shared by all rows were revised with the published rates in view, and the last "
    "revision is what brought the seventh row in. What each version of the specs gave, rows in the order above:",
    "",
    "| version | errors | within 25% |",
    "|---|---|---|",
    "| 1. memory interface's burst (32 or 8 B), nv_large adds 4 elements a cycle, DRAM at its full rate "
    "| -18 -1 -8 -6 +8 +29 +29% | 5 of 7 |",
    "| 2. bursts of 64 B everywhere | -21 -2 -8 -7 +7 +27 +29% | 5 of 7 |",
    "| 3. nv_large adds 16 elements a cycle (SDP_BS, not SDP_EW); DRAM less DDR4 refresh, 4.5% "
    "| -13 -3 -9 -8 +4 +23 +26% | 6 of 7 |",
    "| 4. DRAM less LPDDR4 refresh, 7.2%, instead | the table above | the table above |",
    "",
    "The primer names no kind of DRAM, so the choice between 3 and 4 rests on Xavier's memory alone, and refresh "
    "depends on density too: 280 ns holds for 8 Gb, smaller ones take 130 ns and more. The two smallest "
    "rows stay 20% and more too fast in every version: something of a 128 KiB buffer is missing from the model. The "
    "throughput of the SDP on convolution outputs (1 or 2 elements a cycle in the smaller published specs) is not "
    "modelled.",
)
"""How the specs came to be: kept beside the result, which would otherwise look like a prediction."""


# --- speed ---------------------------------------------------------------------------------------------------------


def speed_report(scalesim: Path | None) -> str:
    """Best of several, single-threaded."""
    with TemporaryDirectory() as folder:
        model = networks.mobilenet_v2(Path(folder) / "mobilenet_v2.onnx")
        placed = place(model, "arm-npu", Options(method="minmax", samples=1))
        programs = schedule(placed)
        costs = cost(placed.partition, programs, placed.target, 0, placed.layers)
        planning = _best(lambda: schedule(placed))
        pricing = _best(lambda: cost(placed.partition, programs, placed.target, 0, placed.layers))
        loaded = qcompiler.compile(model, "arm-npu", output=Path(folder) / "net.qc", samples=1)
        image = {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}
        running = _best(lambda: loaded.run(image))
        macs, cycles = costs.totals.npu_macs, costs.totals.npu_cycles
    lines = [
        "# Speed",
        "",
        f"MobileNetV2 1.0 at 224x224 of seeded weights on arm-npu: {macs / 1e6:.0f} million multiply-accumulates, "
        f"{cycles:.0f} simulated cycles. CPU time of one thread, best of five.",
        "",
        "| | seconds |",
        "|---|---|",
        f"| schedule: tiles, memory plan | {planning:.3f} |",
        f"| static cost: command words and their price | {pricing:.3f} |",
        f"| together | {planning + pricing:.3f} |",
        f"| functional simulation, bit-exact | {running:.3f} |",
    ]
    if scalesim is not None:
        lines += _scalesim_rows(scalesim)
    return "\n".join(lines)


SCALESIM_LAYER = (49, 576, 64)
"""A 3x3 convolution of 64 channels at 7x7, as one matrix product."""


def _scalesim_rows(scalesim: Path) -> list[str]:
    """One layer through the whole of SCALE-Sim, memory model included."""
    m, k, n = SCALESIM_LAYER
    with TemporaryDirectory() as folder:
        place_of = Path(folder)
        (place_of / "layers.csv").write_text(f"Layer,M,N,K,\nlayer,{m},{n},{k},\n")
        (place_of / "layout.csv").write_text("")
        (place_of / "array.cfg").write_text(SCALESIM_CONFIG)
        started = time.perf_counter()
        subprocess.run(
            [str(scalesim), "-m", "scalesim.scale", "-c", "array.cfg", "-t", "layers.csv", "-l", "layout.csv", "-i",
             "gemm", "-p", folder, "-s", "N"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    cycles = engines.weight_stationary_cycles(m, k, n, 16, 16)
    return [
        "",
        f"SCALE-Sim 3.0.0 took {seconds:.1f} s for a [{m}, {k}] x [{k}, {n}] product on a 16x16 array: "
        f"{seconds / cycles * 1e6:.0f} microseconds a cycle of {cycles}.",
    ]


SCALESIM_CONFIG = """[general]
run_name = speed

[architecture_presets]
ArrayHeight: 16
ArrayWidth: 16
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Bandwidth : 10
Dataflow : ws
MemoryBanks: 1
ReadRequestBuffer: 32
WriteRequestBuffer: 32

[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2

[sparsity]
SparsitySupport : false
SparseRep : ellpack_block
OptimizedMapping : false
BlockSize : 8
RandomNumberGeneratorSeed : 40

[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


def _best(work: Callable[[], object], times: int = 5) -> float:
    """CPU time, so that whatever else the machine does counts less."""
    taken: list[float] = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


# --- command -------------------------------------------------------------------------------------------------------


def main(
    section: Annotated[
        list[str] | None, typer.Option(help="vela, vela-int16, systolic, nvdla or speed; all by default.")
    ] = None,
    vela: Annotated[Path, typer.Option(help="The vela program.")] = Path("vela"),
    scalesim: Annotated[Path | None, typer.Option(help="A Python that has scalesim.")] = None,
    zoo: Annotated[Path, typer.Option(help="The model zoo.")] = DEFAULT_ZOO,
) -> None:
    logging.disable(logging.WARNING)  # every model is calibrated on random inputs, on purpose
    reports: dict[str, Callable[[], str]] = {
        "systolic": systolic_report,
        "nvdla": nvdla_report,
        "speed": lambda: speed_report(scalesim),
        "vela": lambda: vela_report(vela, zoo),
        "vela-int16": lambda: vela_int16_report(vela, zoo),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in section or list(reports):
        text = reports[name]()
        (RESULTS / f"simulator-{name}.md").write_text(text + "\n")
        print(text, end="\n\n")


if __name__ == "__main__":
    typer.run(main)
