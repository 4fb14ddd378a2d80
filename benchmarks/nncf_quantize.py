"""Quantize a model with NNCF's defaults. Runs in an environment of its own: python nncf_quantize.py IN DATA.npz OUT."""

import sys

import nncf  # pyright: ignore[reportMissingImports]
import numpy as np
import onnx


def main(source: str, data: str, output: str) -> None:
    arrays = dict(np.load(data))
    count = len(next(iter(arrays.values())))
    samples = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(samples), subset_size=count), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
