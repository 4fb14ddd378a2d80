"""The command `qcompile`.

Results go to stdout, everything else to stderr. A user's mistake is one paragraph and exit code 2; with --json it is
`{"error": …}` on stdout. Heavy imports wait until a command needs them.
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args
from zipfile import BadZipFile

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from qcompiler.errors import QCompilerError
from qcompiler.options import WeightOperators
from qcompiler.quant.types import (
    TECHNIQUES,
    ActivationType,
    HalfType,
    Quality,
    RangeMethod,
    Scheme,
    Technique,
    WeightRequest,
    WeightType,
    WideType,
)

if TYPE_CHECKING:
    from qcompiler.bundle import Bundle
    from qcompiler.dataset import ImageOptions
    from qcompiler.options import Options
    from qcompiler.report import Report
    from qcompiler.search.budget import Budget, Goal

WIDTH_WITHOUT_TERMINAL = 160
USAGE_ERROR, INTERRUPTED = 2, 130
DEFAULT_TARGET = "arm-npu"

EXAMPLES = "Examples:\n\n" + "\n\n".join(
    (
        "qcompile model.onnx --target arm-npu --calibration samples.npz",
        "qcompile model.onnx -t my-chip.yaml -c photos/ --resize 224 --mean 123.7,116.3,103.5 --std 58.4",
        "qcompile run model.qc --input in.npz --output out.npz",
        "qcompile explain model.onnx --target systolic-npu --html report.html",
        "qcompile debug model.onnx --calibration samples.npz",
        "qcompile quantize model.onnx -t x86-cpu --weights int4 --group-size 32 --activations float -o small.onnx",
        "qcompile search model.onnx -t systolic-npu -c samples.npz --evaluate labelled.npz --max-drop 1%",
        "qcompile finetune model.onnx -t systolic-npu -c samples.npz --weights int4 --activations int4 -o tuned.onnx",
        "qcompile bench model.onnx --targets arm-npu,systolic-npu --set memories.sram.size=64KiB",
        "qcompile model.onnx --target cortex-m55 --emit c -o firmware/model",
        "qcompile targets check my-chip.yaml",
    )
)

HELP = (
    "Compile a trained ONNX model to INT8 code for a CPU with or without an accelerator, run it bit-exactly on the "
    "bundled simulator, and report what it costs.\n\n`qcompile MODEL …` is short for `qcompile compile MODEL …`."
)

app = typer.Typer(
    name="qcompile",
    help=HELP,
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
targets_app = typer.Typer(help="List, show and check target specs.", invoke_without_command=True)
app.add_typer(targets_app, name="targets")

VERBS = ("compile", "quantize", "finetune", "run", "explain", "debug", "bench", "search", "tune", "targets")
GROUP_OPTIONS = ("--help", "-h", "--version")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. An invocation that does not begin with a verb is a compilation."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in VERBS + GROUP_OPTIONS:
        given.insert(0, "compile")
    app(given, prog_name="qcompile")


# --- options ------------------------------------------------------------------------------------------------

Model = Annotated[Path, typer.Argument(help="The ONNX file, float or already quantized.", show_default=False)]
TargetName = Annotated[
    str, typer.Option("--target", "-t", metavar="NAME|SPEC.yaml", help="A bundled target or a spec of your own.")
]
CalibrationData = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="DATA",
        help="Representative inputs: an .npz (one array per input, first axis samples), a folder of .npy or .npz "
        "files, or a folder of images. Without it, ranges come from synthetic inputs.",
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="NAME=1,3,224,224", help="Shape of an input with symbolic dimensions."),
]
DumpFolder = Annotated[
    Path | None, typer.Option("--dump", metavar="DIR", help="Write the graph after every stage as ONNX.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
Method = Annotated[RangeMethod, typer.Option(help="How activation ranges are chosen.")]
SampleLimit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Calibrate with the first N samples only.")]
Resize = Annotated[str | None, typer.Option(metavar="N|HxW", help="Images: scale to this size.")]
Mean = Annotated[str, typer.Option(metavar="M[,M,M]", help="Images: subtract from pixels of 0 to 255.")]
Std = Annotated[str, typer.Option(metavar="S[,S,S]", help="Images: then divide by.")]
Layout = Annotated[Literal["NCHW", "NHWC"], typer.Option(help="Images: order of axes.")]
Color = Annotated[Literal["rgb", "bgr", "gray"], typer.Option(help="Images: channels.")]
KeepFloat = Annotated[
    list[str] | None,
    typer.Option("--float", metavar="LAYER", help="Keep this operator in float; may be repeated; all for every one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the target spec, for example memories.sram.size=512KiB; may be repeated.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, help="CPU threads that share large layers, instead of the target's own number."
    ),
]
TileFile = Annotated[
    Path | None,
    typer.Option("--database", metavar="FILE", help="What qcompile tune measured; by default in the user's cache."),
]
RepairQuality = Annotated[
    Quality,
    typer.Option(
        "--quality",
        help="How long to learn better weights and biases from the calibration data: not at all, about a minute, or up "
        "to ten.",
    ),
]
WithoutRepair = Annotated[
    list[str] | None,
    typer.Option(
        "--no-repair",
        metavar="NAME",
        help=f"Leave a technique of --quality out, may be repeated: {', '.join(TECHNIQUES)}.",
    ),
]
Weights = Annotated[
    WeightType,
    typer.Option(
        help="int4, int2, binary: store weights in four, two or one bits, but for the first and last layers, if the "
        "target has them."
    ),
]
Activations = Annotated[
    ActivationType,
    typer.Option(
        help="int16: compute in sixteen bits, if the target has them. dynamic: keep tensors in float, and quantize "
        "what is multiplied by its own range at run time, on the CPU; needs no calibration data. float: quantize the "
        "weights of matrix products only."
    ),
]
AllLayers = Annotated[
    bool, typer.Option("--all-layers", help="--weights is for the first and last layers too.", show_default=False)
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size", metavar="N", min=8, help="So many weights of an output share a scale: 32 and 128 are usual."
    ),
]
RoundingScheme = Annotated[
    Scheme | None,
    typer.Option(
        "--scheme",
        help="How weights with float activations are rounded: to nearest, on grids fitted to the weights, or by what "
        "--calibration says of the outputs. By default --quality decides.",
    ),
]
Float16 = Annotated[
    list[str] | None,
    typer.Option("--float16", metavar="LAYER", help="Keep this layer in 16-bit floats; all for every one. Repeatable."),
]
BFloat16 = Annotated[
    list[str] | None, typer.Option("--bfloat16", metavar="LAYER", help="The same in bfloat16; may be repeated.")
]
Prune = Annotated[
    str | None,
    typer.Option(
        metavar="FRACTION|2:4",
        help="Make so many weights zero, or two of every four neighbours along the input channels, and let the others "
        "make up for it.",
    ),
]
LayerWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--layer-weights",
        metavar="LAYER=int4|int4/32|…",
        help="For this layer only, and in groups of so many; may be repeated.",
    ),
]
LayerActivations = Annotated[
    list[str] | None,
    typer.Option(
        "--layer-activations",
        metavar="LAYER=int16|int8",
        help="What this layer reads; may be repeated. Tensors are brought from one type to the other where it must be.",
    ),
]
FormatsFile = Annotated[
    Path | None,
    typer.Option("--formats", metavar="FILE", help="Formats by layer, as `qcompile search` writes them."),
]
_BUDGET = "Budget"
MaxDrop = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=_BUDGET,
        help="Choose a format for each layer's weights that loses at most this much accuracy, for example 1%: points "
        "of top-1, or power of the outputs' error.",
    ),
]
MaxLatency = Annotated[
    str | None, typer.Option(metavar="TIME", rich_help_panel=_BUDGET, help="Likewise, within this latency: 3ms.")
]
MaxEnergy = Annotated[
    str | None, typer.Option(metavar="ENERGY", rich_help_panel=_BUDGET, help="Likewise, within this energy: 40uJ.")
]
MaxWeights = Annotated[
    str | None, typer.Option(metavar="SIZE", rich_help_panel=_BUDGET, help="Likewise, within these bytes: 250KiB.")
]
MinLatency = Annotated[
    bool, typer.Option("--min-latency", rich_help_panel=_BUDGET, help="The least latency within the budget.")
]
MinEnergy = Annotated[
    bool, typer.Option("--min-energy", rich_help_panel=_BUDGET, help="The least energy within the budget.")
]
MinWeights = Annotated[
    bool, typer.Option("--min-weights", rich_help_panel=_BUDGET, help="The fewest bytes within the budget.")
]
HtmlFile = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Write the timeline for ui.perfetto.dev.")
]


# --- commands -----------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"qcompile {metadata.version('qcompiler')} (TVM {metadata.version('apache-tvm')})")
        raise typer.Exit


@app.callback()
def top(
    _version: Annotated[
        bool, typer.Option("--version", help="Print versions and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before the verb."""


@app.command("compile", epilog=EXAMPLES)
def compile_command(
    model: Model,
    target: TargetName = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The bundle to write; MODEL.qc here if not given."),
    ] = None,
    input_shape: InputShapes = None,
    dump: DumpFolder = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
    html: HtmlFile = None,
    trace: TraceFile = None,
    weights: Weights = "int8",
    layer_weights: LayerWeights = None,
    activations: Activations = "int8",
    layer_activations: LayerActivations = None,
    all_layers: AllLayers = False,
    group_size: GroupSize = None,
    scheme: RoundingScheme = None,
    prune: Prune = None,
    float16: Float16 = None,
    bfloat16: BFloat16 = None,
    quality: RepairQuality = "fast",
    no_repair: WithoutRepair = None,
    runtime: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.c",
            help="Link this driver (runtime_stubs/driver has one) in place of the simulator; may be repeated.",
        ),
    ] = None,
    threads: Threads = None,
    tuned: Annotated[
        bool, typer.Option("--tuned/--no-tuned", help="CPU layers: take the tiles that qcompile tune found best.")
    ] = True,
    database: TileFile = None,
    formats: FormatsFile = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_energy: MaxEnergy = None,
    max_weights: MaxWeights = None,
    min_latency: MinLatency = False,
    min_energy: MinEnergy = False,
    min_weights: MinWeights = False,
    emit: Annotated[
        Literal["c", "tflite", "tosa", "vela"] | None,
        typer.Option(
            help="c: for microcontrollers, write a folder of C that make builds. Others: put the accelerator's part "
            "into the bundle as TFLite or TOSA, or as an Ethos-U command stream that Arm's Vela makes."
        ),
    ] = None,
) -> None:
    """Compile a model into a bundle, check it against the original, and report placement and cost."""

    limits = Limits(max_drop, max_latency, max_energy, max_weights, min_latency, min_energy, min_weights)
    chosen = Formats(
        weights, layer_weights, activations, all_layers, formats, group_size, scheme, prune,
        _halves(float16, bfloat16), layer_activations,
    )  # fmt: skip

    def options(progress: "ConsoleProgress") -> "Options":
        given = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            chosen, quality, dump, threads, _tile_file(database) if tuned else None, no_repair,
        )  # fmt: skip
        return _within_budget(model, target, given, chosen, limits, progress)

    if emit == "c":
        with _mistakes(as_json), _console_progress() as progress:
            from qcompiler.emit_c import emit_c

            if runtime:
                raise QCompilerError("--emit c is for chips without an accelerator; leave out --runtime.")
            if threads is not None:
                raise QCompilerError("--emit c writes code without threads; leave out --threads.")
            if html is not None or trace is not None:
                raise QCompilerError(
                    "--emit c writes sources and no report; `qcompile explain` takes --html and --trace for any target."
                )
            emitted = emit_c(model, target, output or Path(f"{model.stem}.c"), options(progress), progress=progress)
            progress.finish()
        if as_json:
            _print_json({**asdict(emitted), "path": str(emitted.path)})
        else:
            _stdout().print(Text(emitted.summary()))
        return
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.compile import build

        bundle = build(
            model,
            target,
            options(progress),
            output=output or Path(f"{model.stem}.qc"),
            emit=emit,
            html=html,
            trace=trace,
            runtime=runtime or (),
            progress=progress,
        )
        report = bundle.report
        timings = progress.finish()
    if as_json:
        _print_json({"bundle": str(bundle.path), "report": report.to_dict(), "seconds": timings})
        return
    _print_report(report)
    slowest = sorted(timings.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in slowest)
    _stdout().print(Text(f"\nwrote {bundle.path} in {sum(timings.values()):.1f} s ({listed})"))


@app.command()
def explain(
    model: Model,
    target: TargetName = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    input_shape: InputShapes = None,
    dump: DumpFolder = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
    html: HtmlFile = None,
    trace: TraceFile = None,
    weights: Weights = "int8",
    layer_weights: LayerWeights = None,
    activations: Activations = "int8",
    layer_activations: LayerActivations = None,
    all_layers: AllLayers = False,
    group_size: GroupSize = None,
    threads: Threads = None,
    formats: FormatsFile = None,
    prune: Prune = None,
    float16: Float16 = None,
    bfloat16: BFloat16 = None,
) -> None:
    """Show what would run where, why, and at what cost, without building anything.

    Neither depends on the values of the ranges, so no calibration data is needed.
    """
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.compile import explain as explain_model

        options = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            Formats(weights, layer_weights, activations, all_layers, formats, group_size, prune=prune,
                    layer_activations=layer_activations,
                    half=_halves(float16, bfloat16)), dump=dump,
            threads=threads,
        )  # fmt: skip
        report = explain_model(model, target, options, html=html, trace=trace, progress=progress)
        progress.finish()
    if as_json:
        _print_json(report.to_dict())
    else:
        _print_report(report)


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="The file to write.")],
    target: TargetName = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    operators: Annotated[
        WeightOperators,
        typer.Option(
            "--operators",
            help="How products with weights in groups are written: as onnxruntime's MatMulNBits, which has fast "
            "kernels, or with the standard DequantizeLinear.",
        ),
    ] = "matmulnbits",
    input_shape: InputShapes = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
    weights: Weights = "int8",
    layer_weights: LayerWeights = None,
    activations: Activations = "int8",
    layer_activations: LayerActivations = None,
    all_layers: AllLayers = False,
    group_size: GroupSize = None,
    scheme: RoundingScheme = None,
    formats: FormatsFile = None,
    quality: RepairQuality = "fast",
    no_repair: WithoutRepair = None,
) -> None:
    """Write the quantized model as ONNX, for other runtimes: QuantizeLinear and DequantizeLinear with weights stored.

    The formats are those the target would compute in.
    """
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.quantized_file import quantize_file

        options = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            Formats(weights, layer_weights, activations, all_layers, formats, group_size, scheme,
                    layer_activations=layer_activations),
            quality, without_repair=no_repair,
        )  # fmt: skip
        written = quantize_file(model, target, options, output, operators, progress=progress)
        progress.finish()
    if as_json:
        _print_json({**asdict(written), "path": str(written.path)})
    else:
        _stdout().print(Text(written.summary()))


@app.command()
def finetune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="TUNED.onnx", help="The file to write.")],
    target: TargetName = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Samples to measure on, as for --calibration. An .npz may hold classes as label or labels. Without "
            "it every eighth sample of --calibration is kept from training for that.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The class of each sample of --evaluate: an .npy, or text with one per line."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Times every sample is learned from.")] = 60,
    rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="RATE",
            min=1e-8,
            max=1,
            help="How far a step goes at the beginning, as a share of a tensor's size; by default the formats decide.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Samples to a step.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides the order of samples.")] = 0,
    weights: Weights = "int8",
    layer_weights: LayerWeights = None,
    activations: Annotated[
        Literal["int8", "int4"],
        typer.Option(help="int4: sixteen levels of an 8-bit tensor, but for inputs and outputs of the network."),
    ] = "int8",
    all_layers: Annotated[
        bool,
        typer.Option(
            "--all-layers",
            help="Few bits for the first and last layers and the network's inputs too.",
            show_default=False,
        ),
    ] = False,
    input_shape: InputShapes = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
) -> None:
    """Train a float model with the roundings of the target's formats, and write it quantized. Needs PyTorch.

    The float model is the teacher, so samples need no labels; an array label or labels in --calibration counts too.
    `qcompile TUNED.onnx` compiles what is written.
    """
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.finetune.finetune import finetune as train
        from qcompiler.finetune.options import Schedule
        from qcompiler.finetune.results import render

        options = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            Formats(weights, layer_weights, "int8", all_layers),
        )  # fmt: skip
        found = train(
            model, target, options, output, activations=activations, schedule=Schedule(epochs, rate, batch, seed),
            evaluation=evaluate, labels=labels, progress=progress,
        )  # fmt: skip
        seconds = progress.finish()["train"]
    if as_json:
        _print_json({**found.to_dict(), "seconds": seconds})
        return
    _stdout().print(render(found))
    _stdout().print(Text(f"{found.written.summary()}; trained for {seconds:.0f} s"))


@app.command()
def debug(
    model: Model,
    target: TargetName = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    input_shape: InputShapes = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
    weights: Weights = "int8",
    layer_weights: LayerWeights = None,
    activations: Activations = "int8",
    layer_activations: LayerActivations = None,
    all_layers: AllLayers = False,
    group_size: GroupSize = None,
    formats: FormatsFile = None,
    prune: Prune = None,
    float16: Float16 = None,
    bfloat16: BFloat16 = None,
) -> None:
    """Find the layers whose quantization hurts, say why, and name the option that helps."""
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.diagnose import debug as diagnose
        from qcompiler.diagnose_report import render

        options = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            Formats(weights, layer_weights, activations, all_layers, formats, group_size, prune=prune,
                    layer_activations=layer_activations,
                    half=_halves(float16, bfloat16)),
        )  # fmt: skip
        diagnosis = diagnose(model, target, options, progress=progress)
        progress.finish()
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        _stdout().print(render(diagnosis))


@app.command()
def bench(
    model: Model,
    targets: Annotated[
        str, typer.Option("--targets", "-t", metavar="A,B,…", help="Bundled targets or specs, with commas between.")
    ] = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Compare each target also with this change, for example memories.sram.size=512KiB; several changes at "
            "a time with semicolons between. May be repeated.",
        ),
    ] = None,
    input_shape: InputShapes = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    threads: Threads = None,
) -> None:
    """Compare targets, and changes to them, side by side, without building anything.

    With calibration data the quantized model is also run beside the float one.
    """
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.bench import bench as compare
        from qcompiler.bench import render

        comparison = compare(
            model,
            [name for name in targets.split(",") if name],
            [[part.strip() for part in text.split(";")] for text in variants or ()],
            _options(
                calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), threads=threads
            ),
            progress=progress,
        )
        progress.finish()
    if as_json:
        _print_json(comparison.to_dict())
        return
    _stdout().print(Text(f"{comparison.model}, one inference", style="bold"), render(comparison))


@app.command()
def search(
    model: Model,
    target: TargetName = DEFAULT_TARGET,
    calibration: CalibrationData = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Other samples to run points on, as for --calibration. An .npz may hold classes as label or labels.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The class of each sample of --evaluate: an .npy, or text with one per line."
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the front and the chosen formats go; MODEL.search here if not given."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Also compile what was chosen, into this bundle."),
    ] = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_energy: MaxEnergy = None,
    max_weights: MaxWeights = None,
    min_latency: MinLatency = False,
    min_energy: MinEnergy = False,
    min_weights: MinWeights = False,
    input_shape: InputShapes = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
    activations: Activations = "int8",
    quality: RepairQuality = "balanced",
) -> None:
    """Choose a format for each layer's weights: the best accuracy for the cost, or the least cost for the accuracy.

    Without a budget, at most 1% of accuracy is given away.
    """
    limits = Limits(max_drop, max_latency, max_energy, max_weights, min_latency, min_energy, min_weights)
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.compile import build
        from qcompiler.search.files import save as save_found
        from qcompiler.search.results import render
        from qcompiler.search.search import search as search_formats

        options = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            Formats(activations=activations), quality,
        )  # fmt: skip
        found = search_formats(
            model, target, options, limits.budget(), evaluation=evaluate, labels=labels, progress=progress
        )
        folder = save or Path(f"{model.stem}.search")
        file = save_found(found, folder)
        bundle = build(model, target, found.options, output=output, progress=progress) if output is not None else None
        progress.finish()
    if as_json:
        written = {"folder": str(folder), "formats": str(file), "bundle": str(bundle.path) if bundle else None}
        _print_json({"search": found.search.to_dict(), **written})
        return
    _stdout().print(render(found.search))
    _stdout().print(Text(f"\nwrote {folder}; `qcompile {model} … --quality {quality} --formats {file}` compiles it"))
    if bundle is not None:
        _stdout().print(Text(f"wrote {bundle.path}"))


@app.command()
def tune(
    model: Model,
    target: TargetName = "x86-cpu",
    calibration: CalibrationData = None,
    database: TileFile = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is known already, too.")] = False,
    candidates: Annotated[int, typer.Option(metavar="N", min=2, help="Tiles to measure of each layer.")] = 8,
    input_shape: InputShapes = None,
    as_json: AsJson = False,
    method: Method = "mse",
    samples: SampleLimit = None,
    resize: Resize = None,
    mean: Mean = "0",
    std: Std = "1",
    layout: Layout = "NCHW",
    color: Color = "rgb",
    keep_float: KeepFloat = None,
    overrides: Overrides = None,
    weights: Weights = "int8",
    layer_weights: LayerWeights = None,
    activations: Activations = "int8",
    all_layers: AllLayers = False,
    threads: Threads = None,
) -> None:
    """Measure on this machine which tiles suit the CPU layers of a model best, for later compilations.

    Results are kept by layer shape, CPU, number of threads and version of the code. Options about formats change
    what layers there are; calibration data does not.
    """
    with _mistakes(as_json), _console_progress() as progress:
        from qcompiler.tune import tune as measure

        options = _options(
            calibration, input_shape, method, samples, Pixels(resize, mean, std, layout, color), keep_float, overrides,
            Formats(weights, layer_weights, activations, all_layers), threads=threads,
        )  # fmt: skip
        found = measure(
            model, target, options, database=database, again=again, candidates=candidates, progress=progress
        )
        progress.finish()
    if as_json:
        _print_json({**asdict(found), "database": str(found.database)})
    else:
        _stdout().print(Text(found.summary()))


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="The folder MODEL.qc.", show_default=False)],
    inputs: Annotated[Path, typer.Option("--input", "-i", metavar="IN.npz", help="One array per input of the model.")],
    outputs: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.npz", help="Where the outputs go.")],
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="Use at most N of the threads the bundle was compiled for."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a bundle on an .npz of inputs; the first axis may hold any number of samples."""
    with _mistakes(as_json):
        from qcompiler.bundle import load

        compiled = load(bundle, threads=threads)
        arrays = _read_arrays(inputs, compiled)
        started = time.perf_counter()
        results = compiled.run(arrays)
        seconds = time.perf_counter() - started
        _write_arrays(outputs, results)
    if as_json:
        shown = {name: {"shape": array.shape, "dtype": str(array.dtype)} for name, array in results.items()}
        _print_json({"bundle": str(bundle), "output": str(outputs), "outputs": shown, "seconds": seconds})
        return
    table = Table("output", "shape", "dtype")
    for name, array in results.items():
        table.add_row(Text(name), Text("×".join(map(str, array.shape))), str(array.dtype))
    _stdout().print(table)
    _stdout().print(Text(f"wrote {outputs}, {seconds:.2f} s"))


@targets_app.callback()
def targets_list(context: typer.Context, as_json: AsJson = False) -> None:
    """List the bundled targets."""
    if context.invoked_subcommand is not None:
        return
    with _mistakes(as_json):
        from qcompiler.target_loader import list_targets

        summaries = list_targets()
    if as_json:
        _print_json([{"name": summary.name, "description": summary.description} for summary in summaries])
        return
    table = Table("target", "description")
    for summary in summaries:
        table.add_row(Text(summary.name), Text(summary.description))
    _stdout().print(table)


@targets_app.command("show")
def targets_show(
    name: Annotated[str, typer.Argument(metavar="NAME|SPEC.yaml", show_default=False)], as_json: AsJson = False
) -> None:
    """Print everything a target says, inheritance resolved; as JSON in bytes, Hz, pJ and W."""
    with _mistakes(as_json):
        from qcompiler.target_describe import describe
        from qcompiler.target_loader import load_target

        target = load_target(name)
    if as_json:
        _print_json(target.model_dump(mode="json"))
        return
    for section in describe(target):
        table = Table(*section.columns, title=section.title, title_justify="left", title_style="bold")
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        _stdout().print(table)


@targets_app.command("check")
def targets_check(
    file: Annotated[Path, typer.Argument(metavar="SPEC.yaml", show_default=False)], as_json: AsJson = False
) -> None:
    """Check a spec of your own; every problem is printed with its line and column."""
    with _mistakes(as_json):
        from qcompiler.target_loader import load_target

        # A file without a slash or a suffix would be looked up among the bundled names.
        target = load_target(file if file.suffix in (".yaml", ".yml") else Path.cwd() / file)
    if as_json:
        _print_json({"file": str(file), "target": target.name})
    else:
        _stdout().print(Text(f"{file} is a valid target spec: {target.name}, {target.description}"))


# --- reading options and data ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """The options about images, as typed."""

    resize: str | None
    mean: str
    std: str
    layout: Literal["NCHW", "NHWC"]
    color: Literal["rgb", "bgr", "gray"]


@dataclass(frozen=True)
class Formats:
    """The options about number formats, as typed."""

    weights: WeightType = "int8"
    by_layer: list[str] | None = None
    activations: ActivationType = "int8"
    all_layers: bool = False
    file: Path | None = None
    group: int | None = None
    scheme: Scheme | None = None
    prune: str | None = None
    half: dict[str, HalfType] = field(default_factory=dict)
    layer_activations: list[str] | None = None


EIGHT_BITS = Formats()


@dataclass(frozen=True)
class Limits:
    """The options of a budget, as typed."""

    max_drop: str | None
    max_latency: str | None
    max_energy: str | None
    max_weights: str | None
    min_latency: bool
    min_energy: bool
    min_weights: bool

    def budget(self) -> "Budget":
        """Raises QCompilerError where it makes no sense."""
        from qcompiler.search.budget import GOALS, parse_budget

        least = (self.min_latency, self.min_energy, self.min_weights)
        wanted: list[Goal] = [goal for goal, flag in zip(GOALS, least, strict=True) if flag]
        if len(wanted) > 1:
            raise QCompilerError(f"--min-{wanted[0]} and --min-{wanted[1]} exclude each other: limit the other one.")
        return parse_budget(
            self.max_drop, self.max_latency, self.max_energy, self.max_weights, wanted[0] if wanted else None
        )


def _within_budget(
    model: Path, target: str, options: "Options", formats: Formats, limits: Limits, progress: "ConsoleProgress"
) -> "Options":
    """The options, with formats chosen by a search if there is a budget."""
    budget = limits.budget()
    if budget.is_empty:
        return options
    from qcompiler.search.search import search as search_formats

    chosen = (formats.by_layer, formats.layer_activations, formats.file, formats.group)
    if formats.weights != "int8" or any(item for item in chosen):
        raise QCompilerError(
            "a budget lets the compiler choose formats by layer; leave out --weights, --layer-weights, "
            "--layer-activations, --group-size and --formats, or the budget."
        )
    return search_formats(model, target, options, budget, sweep=False, progress=progress).options


def _options(
    calibration: Path | None,
    input_shape: list[str] | None,
    method: RangeMethod,
    samples: int | None,
    pixels: Pixels,
    keep_float: list[str] | None = None,
    overrides: list[str] | None = None,
    formats: Formats = EIGHT_BITS,
    quality: Quality = "fast",
    dump: Path | None = None,
    threads: int | None = None,
    tiles: Path | None = None,
    without_repair: list[str] | None = None,
) -> "Options":
    """Read what was typed. Raises QCompilerError where it makes no sense."""
    from qcompiler.options import Options
    from qcompiler.quant.prune import parse as parse_prune

    by_layer, groups = _layer_weights(formats.by_layer or [])
    request = WeightRequest(
        formats.weights,
        by_layer,
        formats.activations,
        formats.all_layers,
        formats.group,
        formats.scheme,
        groups,
        _layer_activations(formats.layer_activations or []),
    )
    if formats.file is not None:
        from qcompiler.formats_file import read_formats

        if request != WeightRequest():
            raise QCompilerError(f"--formats {formats.file} says all formats; leave out --weights and the like.")
        held = read_formats(formats.file)
        request, keep_float = held.formats, [*(keep_float or ()), *held.keep_float]
        formats = replace(formats, half={**held.half, **formats.half})
    return Options(
        calibration=calibration,
        input_shapes=_input_shapes(input_shape or []),
        method=method,
        samples=samples,
        images=_image_options(pixels),
        keep_float=keep_float or (),
        overrides=[*(overrides or ()), *([] if threads is None else [f"host.threads={threads}"])],
        formats=request,
        prune=None if formats.prune is None else parse_prune(formats.prune),
        half=formats.half,
        quality=quality,
        without_repair=[_technique(name) for name in without_repair or ()],
        tiles=tiles,
        dump=dump,
    )


def _technique(name: str) -> Technique:
    known: dict[str, Technique] = {each: each for each in TECHNIQUES}
    if name not in known:
        raise QCompilerError(f"--no-repair knows no technique {name!r}; there are {', '.join(TECHNIQUES)}.")
    return known[name]


def _tile_file(database: Path | None) -> Path:
    from qcompiler.tile_database import default_path

    return default_path() if database is None else database


def _halves(float16: list[str] | None, bfloat16: list[str] | None) -> dict[str, HalfType]:
    halves: tuple[tuple[HalfType, list[str]], ...] = (("float16", float16 or []), ("bfloat16", bfloat16 or []))
    return {layer: half for half, layers in halves for layer in layers}


def _input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            shape = ()
        if not (name and equals and shape):
            raise QCompilerError(f"--input-shape {text}: write NAME=1,3,224,224, the input's name and its sizes.")
        shapes[name] = shape
    return shapes


def _layer_weights(texts: Sequence[str]) -> tuple[dict[str, WeightType], dict[str, int]]:
    """Types by layer, and sizes of groups where they are given."""
    chosen: dict[str, WeightType] = {}
    groups: dict[str, int] = {}
    for text in texts:
        layer, _, form = text.rpartition("=")
        dtype, in_groups, size = form.partition("/")
        if not layer or dtype not in get_args(WeightType) or (in_groups and not size.isdecimal()):
            raise QCompilerError(
                f"--layer-weights {text}: write LAYER=int4 or LAYER=int8 (or int2, binary), with the layer's name as "
                "reported; LAYER=int4/32 for groups of 32."
            )
        chosen[layer] = cast(WeightType, dtype)
        if in_groups:
            groups[layer] = int(size)
    return chosen, groups


def _layer_activations(texts: Sequence[str]) -> dict[str, WideType]:
    chosen: dict[str, WideType] = {}
    for text in texts:
        layer, _, dtype = text.rpartition("=")
        if not layer or dtype not in get_args(WideType):
            raise QCompilerError(
                f"--layer-activations {text}: write LAYER=int16 or LAYER=int8, with the layer's name as reported."
            )
        chosen[layer] = cast(WideType, dtype)
    return chosen


def _image_options(pixels: Pixels) -> "ImageOptions":
    from qcompiler.dataset import ImageOptions, parse_size

    return ImageOptions(
        resize=None if pixels.resize is None else parse_size(pixels.resize),
        mean=_numbers("--mean", pixels.mean),
        std=_numbers("--std", pixels.std),
        layout=pixels.layout,
        color=pixels.color,
    )


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise QCompilerError(f"{option} {text}: write one number, or one per channel with commas between.") from None


def _read_arrays(file: Path, bundle: "Bundle") -> dict[str, np.ndarray]:
    """The arrays of an .npz, or of an .npy for a model with one input."""
    try:
        data = np.load(file, allow_pickle=False)
        if isinstance(data, np.ndarray):
            names = [tensor.name for tensor in bundle.inputs]
            if len(names) != 1:
                raise QCompilerError(
                    f"{file} holds one array but {bundle.path} takes {', '.join(names)}; give an .npz."
                )
            return dict.fromkeys(names, data)
        with data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise QCompilerError(f"{file} does not exist; give an .npz with one array per input.") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise QCompilerError(f"{file} is not a readable .npz: {error}.") from None


def _write_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz whole or not at all."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        try:
            with partial.open("wb") as stream:
                # The signature offers options by keyword; a file of arrays has only names.
                np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise QCompilerError(f"cannot write {file}: {error.strerror}.") from None


# --- output -------------------------------------------------------------------------------------------------


def _stdout() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL)


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))


def _print_report(report: "Report") -> None:
    from qcompiler.report import render

    _stdout().print(render(report))


@contextmanager
def _mistakes(as_json: bool) -> Iterator[None]:
    """Turn a user's mistake and Ctrl-C into a message and an exit code."""
    try:
        yield
    except QCompilerError as error:
        if as_json:
            _print_json({"error": str(error)})
        else:
            Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(USAGE_ERROR) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None


class ConsoleProgress:
    """Shows the stage at work on a terminal and remembers how long each took."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._stage = ""
        self._started = time.perf_counter()
        self._timings: dict[str, float] = {}

    def stage(self, name: str) -> None:
        self._close()
        self._stage, self._started = name, time.perf_counter()
        self._task = self._bar.add_task(name, total=None)

    def advance(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=f"{self._stage} {done}/{total}", completed=done, total=total)

    def finish(self) -> dict[str, float]:
        """Seconds by stage."""
        self._close()
        return dict(self._timings)

    def _close(self) -> None:
        if self._task is None:
            return
        self._timings[self._stage] = self._timings.get(self._stage, 0.0) + time.perf_counter() - self._started
        self._bar.remove_task(self._task)
        self._task = None


@contextmanager
def _console_progress() -> Iterator[ConsoleProgress]:
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield ConsoleProgress(bar)
