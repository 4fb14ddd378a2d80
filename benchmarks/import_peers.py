"""Small networks quantized by other toolchains, for tests/data: the example's digits network, 64 calibration images.

    python benchmarks/import_peers.py [--nncf PYTHON] [--torch PYTHON] [--into DIR]

onnxruntime's two formats are made here; NNCF and PyTorch where their Pythons are named, of environments of their own
(nncf, onnx, onnxruntime; torch, onnx). tests/test_peers.py compiles the files and compares with onnxruntime.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples" / "digits.onnx"
DATA = HERE.parent / "examples" / "digits_calibration.npz"
SAMPLES = 64


class _Images(CalibrationDataReader):
    """One image at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._feeds = iter([{"image": image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self._feeds, {})


def main(
    nncf: Annotated[Path | None, typer.Option(help="Python of an environment with NNCF")] = None,
    torch: Annotated[Path | None, typer.Option(help="Python of an environment with PyTorch")] = None,
    into: Annotated[Path, typer.Option(help="folder for the files")] = HERE.parent / "tests" / "data",
) -> None:
    """Quantize by each toolchain at hand."""
    with np.load(DATA) as arrays:
        images = arrays["image"][:SAMPLES]
    for name, form in (("onnxruntime_qdq", QuantFormat.QDQ), ("onnxruntime_qoperator", QuantFormat.QOperator)):
        quantize_static(MODEL, into / f"digits_{name}.onnx", _Images(images), quant_format=form, per_channel=True)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "images.npz"
        np.savez(samples, allow_pickle=False, image=images)
        for python, script, name in ((nncf, "nncf_quantize.py", "nncf"), (torch, "torch_quantize.py", "torch")):
            if python is not None:
                command = [str(python), str(HERE / script), str(MODEL), str(samples), str(into / f"digits_{name}.onnx")]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    typer.run(main)
