"""Compare a compiled digits bundle with the float model on images the training never saw.

python examples/evaluate_digits.py build/digits.qc
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

import qcompiler

HERE = Path(__file__).resolve().parent


def main(bundle_folder: str) -> None:
    with np.load(HERE / "digits_test.npz") as data:
        images, labels = data["image"], data["label"]
    bundle = qcompiler.load(bundle_folder)
    compiled = bundle.run({"image": images})["logits"]
    session = onnxruntime.InferenceSession(HERE / "digits.onnx", providers=["CPUExecutionProvider"])
    reference = np.concatenate([np.asarray(session.run(["logits"], {"image": image[None]})[0]) for image in images])
    print(f"accuracy on {len(labels)} held-out images of handwritten digits")
    print(f"  float     {(reference.argmax(axis=1) == labels).mean():7.2%}   digits.onnx under ONNX Runtime")
    print(f"  compiled  {(compiled.argmax(axis=1) == labels).mean():7.2%}   {bundle_folder}, INT8 for {bundle.target}")


if __name__ == "__main__":
    main(sys.argv[1])
