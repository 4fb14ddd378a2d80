"""A network with weights and activations of four bits on INT4 tensor cores: trained, finetuned, compiled, emulated.

    python benchmarks/gpu_four_bits.py -o benchmarks/results/gpu-four-bits.md [--images 16]

Needs the extra `finetune` (PyTorch), scikit-learn, g++, nvcc and cuobjdump. Trains a small residual network on
scikit-learn's handwritten digits, finetunes it to four bits for cuda-gpu, compares the CUDA kernels on the emulated
driver of the tests with the numpy reference, bit for bit, and counts the instructions of the machine code.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnx_ir as ir
import typer
from gpu_device import FOR_NOTHING, Folder, add_network, build_launcher, one_region
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

from qcompiler.backends.gpu import compile_region
from qcompiler.backends.gpu_binary import cubin, unassembled
from qcompiler.backends.gpu_code import device_of
from qcompiler.compile import place
from qcompiler.finetune.finetune import finetune
from qcompiler.finetune.options import Schedule
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.quant.types import WeightRequest

EMULATOR = Path(__file__).resolve().parents[1] / "tests" / "backends" / "cuda_emulator"
sys.path.insert(0, str(EMULATOR))
import emulator  # noqa: E402  # pyright: ignore[reportMissingImports]

CHANNELS, CLASSES = 32, 10
TESTED = 450
"""The last images are not learned from."""
LEARNED = 512


def trained(images: np.ndarray, labels: np.ndarray, epochs: int = 40) -> onnx.ModelProto:
    """Four 3x3 convolutions, the second with the first's result added, the third with stride 2; mean; classes."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    shapes = ((CHANNELS, 1, 1), (CHANNELS, CHANNELS, 1), (2 * CHANNELS, CHANNELS, 2), (2 * CHANNELS, 2 * CHANNELS, 1))
    layers = [nn.Conv2d(before, after, 3, stride, 1) for after, before, stride in shapes]
    classify = nn.Linear(2 * CHANNELS, CLASSES)

    def forward(x: Any) -> Any:
        first = layers[0](x).relu()
        second = (layers[1](first) + first).relu()
        return classify(layers[3](layers[2](second).relu()).relu().mean((2, 3)))

    parameters = [p for layer in (*layers, classify) for p in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(x[batch]), y[batch]).backward()
            optimizer.step()
    return _as_onnx([(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (*layers, classify)])


def _as_onnx(numbers: list[tuple[np.ndarray, np.ndarray]]) -> onnx.ModelProto:
    tensors = [
        numpy_helper.from_array(array, f"{kind}{index}")
        for index, pair in enumerate(numbers)
        for kind, array in zip("wb", pair, strict=True)
    ]
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def conv(x: str, index: int, stride: int = 1) -> str:
        return add("Conv", [x, f"w{index}", f"b{index}"], f"conv{index}", pads=[1, 1, 1, 1], strides=[stride, stride])

    first = add("Relu", [conv("image", 0)], "relu0")
    second = add("Relu", [add("Add", [conv(first, 1), first], "sum")], "relu1")
    third = add("Relu", [conv(second, 2, 2)], "relu2")
    mean = add("GlobalAveragePool", [add("Relu", [conv(third, 3)], "relu3")], "mean")
    add("Gemm", [add("Flatten", [mean], "flat"), "w4", "b4"], "logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 1, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, CLASSES))],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def products(source: str, architecture: str, folder: Path) -> dict[str, int]:
    """Tensor core instructions in machine code, by name."""
    file = folder / "kernels.cubin"
    file.write_bytes(cubin(source, architecture))
    listing = subprocess.run(["cuobjdump", "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\bIMMA\.\d+\.\w+\.\w+", listing)
    return {name: found.count(name) for name in sorted(set(found))}


def emulated(carried: Folder, folder: Path) -> int:
    """Inferences, two of each image, whose outputs differ from the reference's."""
    build_launcher(carried.path)
    carried.finish()
    emulator.build(folder)
    command = [sys.executable, str(carried.path / "run.py"), "--case", "0", "--repeat", "1"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])["wrong"]


def accuracy(model: ir.Model, images: np.ndarray, labels: np.ndarray) -> float:
    executor = Executor(model)
    answers = [int(executor.run({"image": image[None]})["logits"].argmax()) for image in images]
    return float((np.array(answers) == labels).mean())


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the table goes.")],
    images: Annotated[int, typer.Option(help="Emulated.")] = 16,
) -> None:
    flat, target = load_digits(return_X_y=True)
    pixels, labels = np.asarray(flat, np.float32).reshape(-1, 1, 8, 8) / 16, np.asarray(target, np.int64)
    test, classes = pixels[-TESTED:], labels[-TESTED:]
    lines = ["# Four bits on tensor cores", "", f"`python benchmarks/gpu_four_bits.py -o {output}`", ""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(trained(pixels[:-TESTED], labels[:-TESTED]), folder / "digits.onnx")
        np.savez(folder / "learned.npz", image=pixels[:LEARNED])
        np.savez(folder / "test.npz", image=test, label=classes)
        options = Options(calibration=folder / "learned.npz", formats=WeightRequest("int4"), overrides=FOR_NOTHING)
        tuned = folder / "tuned.onnx"
        found = finetune(
            folder / "digits.onnx", "cuda-gpu", options, tuned, activations="int4", schedule=Schedule(epochs=30),
            evaluation=folder / "test.npz",
        )  # fmt: skip
        placed = place(tuned, "cuda-gpu", Options(overrides=FOR_NOTHING))
        assert placed.target.gpu is not None
        region, device = one_region(placed.integer, "digits"), device_of(placed.target.gpu)
        program = compile_region(region, device, unassembled)
        carried = Folder(folder / "carried")
        add_network(carried, "digits", tuned, "cuda-gpu", {"all": device}, emulator.assemble, {"image": test[:images]})
        wrong = emulated(carried, folder)
        lines += [
            f"Digits of scikit-learn, {TESTED} not learned from. Float {found.float_top1:.1%}, rounded to W4A4"
            f" {found.before.top1:.1%}, finetuned {found.after.top1:.1%}; integers of the reference"
            f" {accuracy(placed.integer, test, classes):.1%}.",
            f"CUDA kernels in emulation: {wrong} of {images} images differ from the reference.", "",
            "| operator | precision |", "|---|---|",
        ]  # fmt: skip
        weighted = [item for item in placed.partition.placements if "*" in item.precision]
        lines += [f"| {item.node} | {item.precision} |" for item in weighted]
        lines += ["", "| architecture | tensor core instructions |", "|---|---|"]
        for architecture in device.architectures:
            counts = products(program.source, architecture, folder)
            spelled = ", ".join(f"{count} {name}" for name, count in counts.items())
            lines.append(f"| {architecture} | {spelled} |")
    output.write_text("\n".join(lines) + "\n", "utf-8", newline="\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
