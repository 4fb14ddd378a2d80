"""Peak memory of calibrating a MobileNetV2-shaped network on ImageNet-sized images, beside onnxruntime's calibrator.

    python benchmarks/calibration_memory.py [--images 512] [--others 16,32]

Images are made one by one, so that none is kept by anything but the calibrator. Each measurement is a process of its
own; what is printed is by how much its resident set grew from after imports and loading the model to its peak. Exits
with 1 if ours grows by 400 MB or more. onnxruntime's histogram calibrator keeps every activation of every image, so it
gets fewer of them.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from networks import mobilenet_v2

from qcompiler.quant.types import RangeMethod

ALLOWED = 400e6
RESULTS = Path(__file__).parent / "results"
Measurement = tuple[float, float]
"""Growth in bytes, seconds."""


class Images:
    """Random images, made when asked for."""

    synthetic = False

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for seed in range(self.count):
            random = np.random.default_rng(seed)
            yield {"image": random.standard_normal((1, 3, 224, 224), np.float32)}


def _growth(work: Callable[[], object]) -> Measurement:
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - before, time.perf_counter() - start


def ours(path: Path, count: int, method: RangeMethod) -> Measurement:
    from qcompiler.calibrate import calibrate
    from qcompiler.importer import import_onnx
    from qcompiler.pipeline import SIMPLIFY, run_passes

    model = run_passes(import_onnx(path), SIMPLIFY, stage="simplify")
    return _growth(lambda: calibrate(model, Images(count), method))


def theirs(path: Path, count: int) -> Measurement:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(Images(count))

        # Its documentation asks for None at the end, its annotation forbids it.
        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return next(self.images, None)

    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            path, augmented_model_path=f"{folder}/augmented.onnx", calibrate_method=CalibrationMethod.Entropy
        )

        def work() -> None:
            calibrator.collect_data(Reader())
            calibrator.compute_data()

        return _growth(work)


def _apart(measure: Callable[[], Measurement]) -> Measurement:
    """In a fresh process, so that no peak hides another."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def main(
    images: Annotated[int, typer.Option(help="images ours sees")] = 512,
    others: Annotated[str, typer.Option(help="images onnxruntime's sees, by comma")] = "16,32",
) -> None:
    """Measure, print, write, judge."""
    with tempfile.TemporaryDirectory() as folder:
        path = mobilenet_v2(Path(folder) / "mobilenet_v2.onnx")
        few = images // 8
        runs: tuple[tuple[RangeMethod, int], ...] = (("mse", few), ("auto", few), ("mse", images))
        rows = [(f"qcompiler, {method}", count, _apart(partial(ours, path, count, method))) for method, count in runs]
        for count in map(int, others.split(",")):
            rows.append(("onnxruntime, entropy", count, _apart(partial(theirs, path, count))))
    lines = [
        "# Memory of calibration, MobileNetV2 shape, 224x224 images",
        "",
        f"Made by `benchmarks/calibration_memory.py --images {images} --others {others}`. Growth is the peak resident",
        "set less that before calibrating.",
        "",
        "| calibrator | images | growth, MB | MB an image | seconds an image |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {count} | {grown / 1e6:.0f} | {grown / 1e6 / count:.2f} | {seconds / count:.2f} |"
            for name, count, (grown, seconds) in rows
        ),
        "",
    ]
    typer.echo("\n".join(lines))
    (RESULTS / "calibration-memory.md").write_text("\n".join(lines))
    sys.exit(max(grown for name, _, (grown, _) in rows if name.startswith("qcompiler")) >= ALLOWED)


if __name__ == "__main__":
    typer.run(main)
