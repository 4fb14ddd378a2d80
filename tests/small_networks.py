"""What tests of formats share: small networks written to a file, and the comparison of what they compile to."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends import npu, relax
from qcompiler.compile import Placed, schedule
from qcompiler.graph import value_name
from qcompiler.integer.reference import execute
from qcompiler.runtime import Executable


def random_weights(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorProto]:
    """Constants by name, scaled so that sums of products keep the size of what is multiplied."""
    return [
        numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)
        for name, shape in shapes.items()
    ]


def save_network(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[TensorProto],
    x_shape: Sequence[int],
    y_shape: Sequence[int],
) -> Path:
    """The network from x to y, each node going by the name of its output."""
    for node in nodes:
        node.name = node.output[0]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)
    graph = helper.make_graph(nodes, path.stem, [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def check_bit_exact(done: Placed, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The one output of the compiled model, after comparing it with the reference's."""
    (name,) = (value_name(value) for value in done.integer.graph.outputs)
    wanted = execute(done.integer, feeds)[name]
    programs_of = schedule(done)
    lowered = relax.lower(
        done.integer, done.partition, done.target, lambda region: npu.region_function(programs_of[region.name], 0)
    )
    relax.build(lowered, done.target.host, folder / "model.so")
    (got,) = Executable(folder / "model.so", lowered.parameters).run([feeds[value] for value in feeds])
    np.testing.assert_array_equal(got, wanted)
    return got
