"""Quantize the digits network in PyTorch and export it: python torch_quantize.py IN DATA.npz OUT.

`torch.ao.quantization.FakeQuantize` around every layer: uint8 activations by the calibration data's extremes, int8
weights per output channel. Runs in an environment of its own (torch, onnx).
"""

import sys

import numpy as np
import onnx
import torch  # pyright: ignore[reportMissingImports]
from onnx import numpy_helper
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.ao.quantization import (  # pyright: ignore[reportMissingImports]
    FakeQuantize,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    disable_observer,
)


def activation() -> FakeQuantize:
    """uint8 by minimum and maximum."""
    return FakeQuantize(observer=MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)


class Quantized(nn.Module):
    """A layer with rounded weights and results."""

    def __init__(self, layer: nn.Module, weight: np.ndarray, bias: np.ndarray, then: nn.Module) -> None:
        super().__init__()
        self.layer, self.then, self.activation = layer, then, activation()
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
        self.weight = FakeQuantize(
            observer=PerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def forward(self, x):
        w, b = self.weight(self.layer.weight), self.layer.bias
        if isinstance(self.layer, nn.Conv2d):
            return self.activation(self.then(nn.functional.conv2d(x, w, b, padding=1)))
        return self.activation(self.then(nn.functional.linear(x, w, b)))


def digits(source: str) -> nn.Module:
    """The network of examples/digits.onnx."""
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in onnx.load(source).graph.initializer}

    def layer(name: str, made: nn.Module, then: nn.Module) -> Quantized:
        return Quantized(made, arrays[f"{name}.weight"], arrays[f"{name}.bias"], then)

    return nn.Sequential(
        activation(),
        layer("conv_0", nn.Conv2d(1, 12, 3, padding=1), nn.ReLU()),
        layer("conv_2", nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2),
        layer("conv_5", nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        activation(),
        layer("gemm_8", nn.Linear(32, 10), nn.Identity()),
    )


def main(source: str, data: str, output: str) -> None:
    with np.load(data) as arrays:
        images = torch.tensor(arrays["image"])
    network = digits(source).eval()
    with torch.no_grad():
        network(images)
        network.apply(disable_observer)
        torch.onnx.export(
            network,
            (images[:1],),
            output,
            input_names=["image"],
            output_names=["logits"],
            opset_version=17,
            dynamo=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
