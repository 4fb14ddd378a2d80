"""Accelerator regions of real networks: emitted TFLite equals our integers (all twelve: benchmarks/emission.py)."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the extra 'ethosu' is not installed")

from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qcompiler.compile import place
from qcompiler.emit.tflite import tflite_of
from qcompiler.emit.tosa import tosa_of
from qcompiler.options import Options


@pytest.mark.parametrize(
    "name",
    ["mnist_cnn", "kws_dscnn", "resnet8_tflite_int8_qdq", "mobilenet_v1_025_128_tflite_qat_qdq", "resnet20_cifar10"],
)
def test_reference_kernels_give_our_integers(zoo, run_reference, feeds_of, name):
    placed = place(zoo / "models" / f"{name}.onnx", "arm-npu", Options(method="minmax", samples=2))
    regions = [region for region in placed.partition.regions if region.backend == "npu"]
    assert regions
    rng = np.random.default_rng(len(name))
    for placed_region in regions:
        # Every operator's result is compared: ten classes would hide much.
        every = tuple(value for node in placed_region.nodes for value in node.outputs)
        region = replace(placed_region, outputs=every)
        interpreter = Interpreter(
            model_content=tflite_of(region), experimental_op_resolver_type=OpResolverType.BUILTIN_REF
        )
        interpreter.allocate_tensors()
        for _ in range(3):
            feeds = feeds_of(region, rng)
            for detail, array in zip(interpreter.get_input_details(), feeds, strict=True):
                interpreter.set_tensor(detail["index"], array)
            interpreter.invoke()
            got = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
            for want, have in zip(run_reference(placed.integer, region, feeds), got, strict=True):
                assert want.dtype == have.dtype
                np.testing.assert_array_equal(have, want)
        assert tosa_of(region).count("tosa.conv2d") >= 2
