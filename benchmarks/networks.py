"""Networks of published shape with seeded weights, for measurements in which only the shape counts."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, repeats, first stride of the inverted residuals (Sandler et al. 2018, table 2)."""
RESNET_50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Inner channels, blocks, first stride of the stages (He et al. 2015, table 1)."""

RESNET_18 = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels and first stride of the stages of two blocks (the same, table 1)."""
MOBILENET_V1 = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1),
    (1024, 2), (1024, 1),
)  # fmt: skip
"""Channels and stride of the separable convolutions (Howard et al. 2017, table 1)."""


class _Builder:
    """Convolutions with batch normalization already folded in."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: list[str], **attributes: int | list[int]) -> str:
        output = f"t{len(self.nodes)}"
        node = helper.make_node(op, inputs, [output])
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return output

    def constant(self, *shape: int, scale: float) -> str:
        name = f"w{len(self.weights)}"
        values = self.random.standard_normal(shape, np.float32) * np.float32(scale)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, source: str, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        fan_in = inputs // groups * kernel * kernel
        weights = self.constant(outputs, inputs // groups, kernel, kernel, scale=(2 / fan_in) ** 0.5)
        return self.add(
            "Conv",
            [source, weights, self.constant(outputs, scale=0.1)],
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
            group=groups,
        )

    def classifier(self, source: str, features: int, classes: int = 1000) -> str:
        flat = self.add("Flatten", [self.add("GlobalAveragePool", [source])])
        weights = self.constant(features, classes, scale=features**-0.5)
        return self.add("Gemm", [flat, weights, self.constant(classes, scale=0.1)])

    def save(self, output: str, path: Path) -> Path:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 224, 224])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 1000])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, path)
        return path


def mobilenet_v2(path: Path, seed: int = 0) -> Path:
    """MobileNetV2 1.0 at 224x224: 301 million multiply-accumulates."""
    net = _Builder(seed)

    def relu6(source: str) -> str:
        return net.add("Clip", [source, "zero", "six"])

    net.weights += [
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("zero", 0), ("six", 6))
    ]
    out, depth = relu6(net.conv("image", 3, 32, 3, 2)), 32
    for expansion, channels, repeats, first in MOBILENET_V2:
        for index in range(repeats):
            stride = first if index == 0 else 1
            inner = depth * expansion
            wide = relu6(net.conv(out, depth, inner, 1)) if expansion > 1 else out
            narrow = net.conv(relu6(net.conv(wide, inner, inner, 3, stride, inner)), inner, channels, 1)
            out = net.add("Add", [out, narrow]) if stride == 1 and depth == channels else narrow
            depth = channels
    return net.save(net.classifier(relu6(net.conv(out, depth, 1280, 1)), 1280), path)


def resnet_50(path: Path, seed: int = 0) -> Path:
    """ResNet-50 at 224x224, strides in the 1x1 convolutions as first published: 3.86 billion multiply-accumulates."""
    net = _Builder(seed)

    def relu(source: str) -> str:
        return net.add("Relu", [source])

    out = relu(net.conv("image", 3, 64, 7, 2))
    out, depth = net.add("MaxPool", [out], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), 64
    for inner, blocks, first in RESNET_50:
        for index in range(blocks):
            stride = first if index == 0 else 1
            narrow = relu(net.conv(out, depth, inner, 1, stride))
            wide = net.conv(relu(net.conv(narrow, inner, inner, 3)), inner, 4 * inner, 1)
            skip = net.conv(out, depth, 4 * inner, 1, stride) if index == 0 else out
            out, depth = relu(net.add("Add", [wide, skip])), 4 * inner
    return net.save(net.classifier(out, depth), path)


def resnet_18(path: Path, seed: int = 0) -> Path:
    """ResNet-18 at 224x224: 1.8 billion multiply-accumulates."""
    net = _Builder(seed)

    def relu(source: str) -> str:
        return net.add("Relu", [source])

    out = relu(net.conv("image", 3, 64, 7, 2))
    out, depth = net.add("MaxPool", [out], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), 64
    for channels, first in RESNET_18:
        for stride in (first, 1):
            inner = net.conv(relu(net.conv(out, depth, channels, 3, stride)), channels, channels, 3)
            skip = net.conv(out, depth, channels, 1, stride) if depth != channels else out
            out, depth = relu(net.add("Add", [inner, skip])), channels
    return net.save(net.classifier(out, depth), path)


def mobilenet_v1(path: Path, seed: int = 0) -> Path:
    """MobileNetV1 1.0 at 224x224: 569 million multiply-accumulates."""
    net = _Builder(seed)

    def relu(source: str) -> str:
        return net.add("Relu", [source])

    out, depth = relu(net.conv("image", 3, 32, 3, 2)), 32
    for channels, stride in MOBILENET_V1:
        out = relu(net.conv(relu(net.conv(out, depth, depth, 3, stride, depth)), depth, channels, 1))
        depth = channels
    return net.save(net.classifier(out, depth), path)


def published(name: str, path: Path, seed: int = 0) -> Path:
    """One of the networks that the onnx package ships without weights ("densenet121"), with seeded ones."""
    source = files("onnx") / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    model = onnx.load_from_string(source.read_bytes())
    random = np.random.default_rng(seed)
    shapes = {tensor.name: tuple(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            continue
        shape = shapes[node.input[0]]
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = random.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
        # Vectors are biases, and the scales and variances of normalizations: near one, and positive.
        values = values if len(shape) > 1 else np.float32(1) + np.float32(0.02) * np.abs(values)
        node.CopyFrom(helper.make_node("Constant", [], list(node.output), value=numpy_helper.from_array(values)))
    onnx.save(model, path)
    return path
