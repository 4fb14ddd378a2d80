"""Networks quantized in PyTorch and exported to ONNX come in as they are: every scale and every rounding."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest

from qcompiler.compile import compile as compile_model
from qcompiler.compile import place
from qcompiler.integer.reference import execute

if TYPE_CHECKING:
    from torch import nn  # pyright: ignore[reportMissingImports]

SHAPE = (3, 10, 9)
SAMPLES = 64


def samples_of(rng: np.random.Generator, count: int) -> np.ndarray:
    """Noise around a mean of each channel, the largest of which is the class."""
    return (rng.normal(size=(count, 3, 1, 1)) + 0.5 * rng.normal(size=(count, *SHAPE))).astype(np.float32)


def trained_network(per_channel: bool) -> "nn.Module":
    """A convolutional network after a few steps of quantization-aware training with PyTorch's own tools.

    Convolutions fused with Relu, one of them depthwise; a residual sum, pools, a classifier. Exporters only know
    fake quantization with constant parameters, so that is what is left of it.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.ao import quantization as ao  # pyright: ignore[reportMissingImports]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantize, self.quantize_mean = ao.QuantStub(), ao.QuantStub()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
            self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU())
            self.add = nn.quantized.FloatFunctional()
            self.second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
            self.classify = nn.Linear(12, 5)

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            x = self.first(self.quantize(x))
            x = self.add.add(x, self.depthwise(x))
            x = self.second(nn.functional.max_pool2d(x, 2))
            return self.classify(self.quantize_mean(x.mean((2, 3))))

    class Rounding(nn.Module):
        """Fake quantization whose parameters are constants."""

        def __init__(self, learned: ao.FakeQuantize) -> None:
            super().__init__()
            self.scale, self.zero_point = learned.calculate_qparams()
            self.limits = (learned.quant_min, learned.quant_max)
            self.axis = learned.ch_axis

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            if self.scale.numel() > 1:
                zero_point = self.zero_point.to(torch.int32)
                return torch.fake_quantize_per_channel_affine(x, self.scale, zero_point, self.axis, *self.limits)
            return torch.fake_quantize_per_tensor_affine(x, float(self.scale), int(self.zero_point), *self.limits)

    torch.manual_seed(0)
    network = Network().train()
    for block in (network.first, network.depthwise, network.second):
        ao.fuse_modules_qat(block, ["0", "1"], inplace=True)
    # Version 0 fakes quantization with an operator of its own; later ones fuse it with the observer.
    whole = ao.get_default_qat_qconfig("qnnpack", version=0)
    weights = ao.default_per_channel_weight_fake_quant if per_channel else whole.weight
    network.qconfig = ao.QConfig(activation=whole.activation, weight=weights)
    ao.prepare_qat(network, inplace=True)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        x = torch.from_numpy(samples_of(rng, 32))
        loss = nn.functional.cross_entropy(network(x), x.mean((2, 3)).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, ao.FakeQuantize):
                setattr(module, name, Rounding(child))
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per_channel", "target", "dynamo"),
    [(True, "systolic-npu", True), (False, "x86-cpu", False)],
    ids=["per-channel-dynamo", "per-tensor-torchscript"],
)
def test_quantization_aware_training_comes_in(per_channel: bool, target: str, dynamo: bool, tmp_path: Path) -> None:
    """They give the same outputs as onnxruntime, but for sums that fall between two integers."""
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")
    path = tmp_path / "qat.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor, the exporter its other half
        network = trained_network(per_channel)
        torch.onnx.export(network, (torch.zeros(1, *SHAPE),), path, dynamo=dynamo, opset_version=18 if dynamo else 17)
    samples = samples_of(np.random.default_rng(1), SAMPLES)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    theirs = np.concatenate([np.asarray(session.run(None, {name: sample[None]})[0]) for sample in samples])

    bundle = compile_model(path, target, output=tmp_path / "m.qc")
    ours = bundle.run({name: samples})[session.get_outputs()[0].name]

    products = [
        placement for placement in bundle.report.placements if placement.op in ("Conv", "DepthwiseConv", "Gemm")
    ]
    assert [placement.precision for placement in products] == ["int8*int8" if per_channel else "uint8*int8"] * 4
    placed = place(path, target)
    for index in range(0, SAMPLES, 16):
        (expected,) = execute(placed.integer, {name: samples[index : index + 1]}).values()
        np.testing.assert_array_equal(ours[index : index + 1], expected)
    assert np.unique(theirs).size > 30
    steps = np.abs(ours - theirs) / np.diff(np.unique(theirs)).min()
    assert np.mean(steps > 0.5) < 0.01, f"{np.sum(steps > 0.5)} of {steps.size} outputs differ"
    assert steps.max() < 1.5
    with torch.no_grad():
        original = network(torch.from_numpy(samples)).numpy()
    assert np.mean(original.argmax(1) == ours.argmax(1)) > 0.95
