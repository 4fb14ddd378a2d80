"""Train the example model: a small CNN on scikit-learn's 8×8 handwritten digits, in plain numpy.

    python examples/train_digits.py        # ten seconds; needs scikit-learn

Writes digits.onnx (the trained network), digits_calibration.npz (training images) and digits_test.npz (images and
labels the training never saw) beside this file. The same seed gives the same weights on the same machine.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

SEED = 7
EPOCHS = 60
BATCH = 64
TEST_IMAGES = 450
CALIBRATION_IMAGES = 128
HERE = Path(__file__).resolve().parent


@dataclass
class Parameter:
    """A trainable array and its Adam moments."""

    value: np.ndarray
    gradient: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, value: np.ndarray) -> "Parameter":
        value = value.astype(np.float32)
        return cls(value, np.zeros_like(value), np.zeros_like(value), np.zeros_like(value))

    def step(self, rate: float, count: int) -> None:
        self.mean = 0.9 * self.mean + 0.1 * self.gradient
        self.variance = 0.999 * self.variance + 0.001 * self.gradient**2
        mean, variance = self.mean / (1 - 0.9**count), self.variance / (1 - 0.999**count)
        self.value = (self.value - rate * mean / (np.sqrt(variance) + 1e-8)).astype(np.float32)


class Conv:
    """3×3 convolution, stride 1, padding 1, on [N,C,H,W]; weights [O,C,3,3]."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        self.weight = Parameter.of(rng.normal(0, np.sqrt(2 / (inputs * 9)), (outputs, inputs, 3, 3)))
        self.bias = Parameter.of(np.zeros(outputs))
        self.parameters = (self.weight, self.bias)

    def forward(self, x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        self.shape = x.shape
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        n, c, h, w = x.shape
        self.columns = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * h * w, c * 9)
        y = self.columns @ self.weight.value.reshape(len(self.bias.value), -1).T + self.bias.value
        return y.reshape(n, h, w, -1).transpose(0, 3, 1, 2)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        n, c, h, w = self.shape
        rows = dy.transpose(0, 2, 3, 1).reshape(n * h * w, -1)
        self.weight.gradient = (rows.T @ self.columns).reshape(self.weight.value.shape)
        self.bias.gradient = rows.sum(axis=0)
        columns = (rows @ self.weight.value.reshape(rows.shape[1], -1)).reshape(n, h, w, c, 3, 3)
        dx = np.zeros((n, c, h + 2, w + 2), np.float32)
        for ky in range(3):
            for kx in range(3):
                dx[:, :, ky : ky + h, kx : kx + w] += columns[..., ky, kx].transpose(0, 3, 1, 2)
        return dx[:, :, 1:-1, 1:-1]


class Relu:
    parameters: tuple[Parameter, ...] = ()

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.mask = x > 0
        return x * self.mask

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return dy * self.mask


class MaxPool:
    """2×2, stride 2."""

    parameters: tuple[Parameter, ...] = ()

    def forward(self, x: np.ndarray) -> np.ndarray:
        n, c, h, w = x.shape
        windows = x.reshape(n, c, h // 2, 2, w // 2, 2)
        y = windows.max(axis=(3, 5), keepdims=True)
        first = windows == y
        self.share = first / first.sum(axis=(3, 5), keepdims=True)
        return y[:, :, :, 0, :, 0]

    def backward(self, dy: np.ndarray) -> np.ndarray:
        dx = self.share * dy[:, :, :, None, :, None]
        n, c, h, _, w, _ = dx.shape
        return dx.reshape(n, c, 2 * h, 2 * w).astype(np.float32)


class GlobalAveragePool:
    """[N,C,H,W] to [N,C]."""

    parameters: tuple[Parameter, ...] = ()

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.shape = x.shape
        return x.mean(axis=(2, 3))

    def backward(self, dy: np.ndarray) -> np.ndarray:
        _, _, h, w = self.shape
        return np.broadcast_to(dy[:, :, None, None] / (h * w), self.shape).astype(np.float32)


class Linear:
    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        self.weight = Parameter.of(rng.normal(0, np.sqrt(1 / inputs), (outputs, inputs)))
        self.bias = Parameter.of(np.zeros(outputs))
        self.parameters = (self.weight, self.bias)

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.x = x
        return x @ self.weight.value.T + self.bias.value

    def backward(self, dy: np.ndarray) -> np.ndarray:
        self.weight.gradient, self.bias.gradient = dy.T @ self.x, dy.sum(axis=0)
        return dy @ self.weight.value


Layer = Conv | Relu | MaxPool | GlobalAveragePool | Linear


def network(rng: np.random.Generator) -> tuple[Layer, ...]:
    return (
        Conv(rng, 1, 12),
        Relu(),
        Conv(rng, 12, 16),
        Relu(),
        MaxPool(),
        Conv(rng, 16, 32),
        Relu(),
        GlobalAveragePool(),
        Linear(rng, 32, 10),
    )


def logits(layers: tuple[Layer, ...], x: np.ndarray) -> np.ndarray:
    for layer in layers:
        x = layer.forward(x)
    return x


def train(layers: tuple[Layer, ...], images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    steps_per_epoch = len(images) // BATCH
    total, count = EPOCHS * steps_per_epoch, 0
    for epoch in range(EPOCHS):
        order, losses = rng.permutation(len(images)), []
        for step in range(steps_per_epoch):
            batch = order[step * BATCH : (step + 1) * BATCH]
            scores = logits(layers, images[batch])
            scores -= scores.max(axis=1, keepdims=True)
            probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            losses.append(-np.log(probabilities[np.arange(BATCH), labels[batch]] + 1e-12).mean())
            probabilities[np.arange(BATCH), labels[batch]] -= 1
            gradient = probabilities.astype(np.float32) / BATCH
            for layer in reversed(layers):
                gradient = layer.backward(gradient)
            count += 1
            rate = 4e-3 * 0.5 * (1 + np.cos(np.pi * count / total))
            for layer in layers:
                for parameter in layer.parameters:
                    parameter.step(rate, count)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3}  loss {np.mean(losses):.4f}")


ONNX_FORM: dict[type[Layer], tuple[str, dict[str, int | list[int]]]] = {
    Conv: ("Conv", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Relu: ("Relu", {}),
    MaxPool: ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    GlobalAveragePool: ("GlobalAveragePool", {}),
    Linear: ("Gemm", {"transB": 1}),
}


def to_onnx(layers: tuple[Layer, ...]) -> onnx.ModelProto:
    """The network as opset 17 ONNX: input `image` [1,1,8,8] with pixels 0 to 16, output `logits` [1,10]."""
    nodes, initializers, value = [], [], "image"
    for position, layer in enumerate(layers):
        op, attributes = ONNX_FORM[type(layer)]
        name = f"{op.lower()}_{position}"
        inputs = [value]
        for suffix, parameter in zip(("weight", "bias"), layer.parameters, strict=False):
            initializers.append(numpy_helper.from_array(parameter.value, f"{name}.{suffix}"))
            inputs.append(f"{name}.{suffix}")
        value = "logits" if layer is layers[-1] else f"{name}_out"
        node = helper.make_node(op, inputs, [value], name)
        node.attribute.extend(helper.make_attribute(key, setting) for key, setting in attributes.items())
        nodes.append(node)
        if isinstance(layer, GlobalAveragePool):
            nodes.append(helper.make_node("Flatten", [value], ["features"], "flatten"))
            value = "features"
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    rng = np.random.default_rng(SEED)
    pixels, digits = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 1, 8, 8)
    labels = np.asarray(digits, np.int64)
    order = rng.permutation(len(images))
    test, rest = order[:TEST_IMAGES], order[TEST_IMAGES:]
    layers = network(rng)
    # The network sees pixels 0..16 as they are, so the division by 16 is trained into the first weights.
    train(layers, images[rest], labels[rest], rng)
    accuracy = (logits(layers, images[test]).argmax(axis=1) == labels[test]).mean()
    size = sum(parameter.value.size for layer in layers for parameter in layer.parameters)
    print(f"{size} parameters, accuracy on {TEST_IMAGES} held-out images {accuracy:.1%}")
    onnx.save(to_onnx(layers), HERE / "digits.onnx")
    np.savez_compressed(HERE / "digits_calibration.npz", image=images[rest[:CALIBRATION_IMAGES]])
    np.savez_compressed(HERE / "digits_test.npz", image=images[test], label=labels[test])


if __name__ == "__main__":
    main()
