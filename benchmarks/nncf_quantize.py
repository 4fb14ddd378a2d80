"""Quantize a model with NNCF's defaults. Runs in an environment of its own: python nncf_quantize.py IN DATA.npz OUT."""

import sys

import nncf  # pyright: ignore[reportMissingImports]
import numpy as np
import onnx
from onnx import version_converter

OPSET = 13
"""NNCF refuses older ones, or has no scales per channel in them."""


def main(source: str, data: str, output: str) -> None:
    arrays = dict(np.load(data))
    count = len(next(iter(arrays.values())))
    samples = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    model = onnx.load(source)
    if next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")) < OPSET:
        model = version_converter.convert_version(model, OPSET)
    onnx.save(nncf.quantize(model, nncf.Dataset(samples), subset_size=count), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
