"""Real exporters' habits, old opsets and broken files through `import_onnx`."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from qcompiler.errors import QCompilerError
from qcompiler.graph import shape_of
from qcompiler.importer import KNOWN_DOMAINS, import_onnx
from qcompiler.verify import verify, verify_shapes

F = TensorProto.FLOAT
rng = np.random.default_rng(7)
NODE = helper.make_node


def graph_input(name: str, shape: list[int | str | None] | None, dtype: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def make(
    nodes: list[onnx.NodeProto],
    *,
    opset: int = 21,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: tuple[str, ...] = ("y",),
    weights: dict[str, np.ndarray] | None = None,
    output_type: int = F,
    domains: tuple[str, ...] = (),
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        inputs or [graph_input("x", [2, 3, 8, 8])],
        [helper.make_tensor_value_info(name, output_type, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)
    return [np.asarray(output) for output in outputs]


def imported(proto: onnx.ModelProto, folder: Path, shapes: dict[str, tuple[int, ...]] | None = None) -> ir.Model:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return import_onnx(path, shapes)


def assert_normal_form(model: ir.Model) -> None:
    verify(model, "import")
    verify_shapes(model, "import")
    assert model.graph.opset_imports[""] == 21
    assert not [node for node in model.graph if node.op_type == "Constant" or node.domain]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def random(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


POSITIVE = {name: np.abs(random(3)) + 0.1 for name in ("s", "b", "m", "v")}
SCALES = np.array([1, 1, 1.5, 3], np.float32)

OLD_FORMS: tuple[tuple[str, onnx.ModelProto], ...] = (
    ("upsample-7", make([NODE("Upsample", ["x"], ["y"], mode="nearest", scales=[1.0, 1.0, 3.0, 2.0])], opset=7)),
    ("upsample-9", make([NODE("Upsample", ["x", "s"], ["y"], mode="linear")], opset=9, weights={"s": SCALES})),
    ("resize-10", make([NODE("Resize", ["x", "s"], ["y"], mode="nearest")], opset=10, weights={"s": SCALES})),
    (
        "resize-11",
        make(
            [NODE("Resize", ["x", "r", "s"], ["y"], mode="linear", coordinate_transformation_mode="asymmetric")],
            opset=11,
            weights={"r": np.zeros(0, np.float32), "s": SCALES},
        ),
    ),
    ("clip-7", make([NODE("Clip", ["x"], ["y"], min=-0.5, max=0.75)], opset=7)),
    ("clip-7-low", make([NODE("Clip", ["x"], ["y"], min=0.0)], opset=7)),
    ("pad-7", make([NODE("Pad", ["x"], ["y"], pads=[0, 0, 1, 2, 0, 1, 2, 1], value=3.0)], opset=7)),
    ("slice-7", make([NODE("Slice", ["x"], ["y"], starts=[1, 2], ends=[3, -1], axes=[1, 2])], opset=7)),
    (
        "squeeze-7",
        make([NODE("Unsqueeze", ["x"], ["u"], axes=[0, 3]), NODE("Squeeze", ["u"], ["y"], axes=[0])], opset=7),
    ),
    ("softmax-7", make([NODE("Relu", ["x"], ["r"]), NODE("Softmax", ["r"], ["y"])], opset=7)),
    ("softmax-11-last", make([NODE("Softmax", ["x"], ["y"], axis=-1)], opset=11)),
    ("logsoftmax-11", make([NODE("LogSoftmax", ["x"], ["y"], axis=2)], opset=11)),
    ("dropout-7", make([NODE("Dropout", ["x"], ["y"], ratio=0.5)], opset=7)),
    ("batchnorm-7", make([NODE("BatchNormalization", ["x", *"sbmv"], ["y"], epsilon=1e-3)], opset=7, weights=POSITIVE)),
    ("batchnorm-8", make([NODE("BatchNormalization", ["x", *"sbmv"], ["y"])], opset=8, weights=POSITIVE)),
    ("reducemean-7", make([NODE("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)], opset=7)),
    ("reducesum-11", make([NODE("ReduceSum", ["x"], ["y"], axes=[-1])], opset=11)),
    ("split-7", make([NODE("Split", ["x"], ["a", "y"], axis=1, split=[1, 2])], opset=7, outputs=("a", "y"))),
    ("maxpool-7", make([NODE("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], auto_pad="SAME_UPPER")], opset=7)),
    (
        "depthtospace-7",
        make([NODE("DepthToSpace", ["x"], ["y"], blocksize=2)], opset=7, inputs=[graph_input("x", [1, 8, 3, 5])]),
    ),
    (
        "gridsample-16",
        make([NODE("GridSample", ["x", "g"], ["y"], mode="bilinear")], opset=16, weights={"g": random(2, 4, 5, 2)}),
    ),
    ("swish-24", make([NODE("Relu", ["x"], ["r"]), NODE("Swish", ["r"], ["y"], alpha=1.5)], opset=24, ir_version=10)),
    ("conv-22", make([NODE("Conv", ["x", "w"], ["y"])], opset=22, ir_version=10, weights={"w": random(4, 3, 3, 3)})),
)


@pytest.mark.parametrize(("name", "proto"), OLD_FORMS, ids=[name for name, _ in OLD_FORMS])
def test_every_opset_computes_the_same_after_import(name: str, proto: onnx.ModelProto, tmp_path: Path) -> None:
    model = imported(proto, tmp_path)
    assert_normal_form(model)
    x = random(*(dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim))
    for expected, got in zip(run(proto, {"x": x}), run(ir.to_proto(model), {"x": x}), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_attributes_inside_subgraphs_are_upgraded(tmp_path: Path) -> None:
    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, F, [1, 2, 5])])

    then = branch("t", [NODE("Clip", ["x"], ["c"], min=0.0), NODE("Unsqueeze", ["c"], ["t"], axes=[0])])
    otherwise = branch("e", [NODE("Unsqueeze", ["x"], ["e"], axes=[0])])
    nodes = [
        NODE("ReduceMax", ["x"], ["m"], keepdims=0),
        NODE("Greater", ["m", "zero"], ["positive"]),
        NODE("If", ["positive"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    weights = {"zero": np.zeros((), np.float32)}
    proto = make(nodes, opset=9, inputs=[graph_input("x", [2, 5])], weights=weights, ir_version=4)
    model = imported(proto, tmp_path)
    verify(model, "import")
    for x in (random(2, 5) + 5, random(2, 5) - 5):
        np.testing.assert_array_equal(run(ir.to_proto(model), {"x": x})[0], run(proto, {"x": x})[0])


def test_shape_computations_become_constants(tmp_path: Path) -> None:
    nodes = [
        NODE("Shape", ["x"], ["shape"]),
        NODE("Constant", [], ["zero"], value_int=0),
        NODE("Gather", ["shape", "zero"], ["n"]),
        NODE("Constant", [], ["axes"], value_ints=[0]),
        NODE("Unsqueeze", ["n", "axes"], ["n1"]),
        NODE("Constant", [], ["rest"], value_ints=[-1]),
        NODE("Concat", ["n1", "rest"], ["target"], axis=0),
        NODE("ConstantOfShape", ["four"], ["zeros"], value=numpy_helper.from_array(np.array([1], np.int64))),
        NODE("Concat", ["zeros", "zeros"], ["pads"], axis=0),
        NODE("Pad", ["x", "pads"], ["p"]),
        NODE("Reshape", ["p", "target"], ["y"]),
    ]
    proto = make(nodes, opset=17, inputs=[graph_input("x", ["batch", 3, 4, 4])], weights={"four": np.array([4])})
    model = imported(proto, tmp_path)
    assert_normal_form(model)
    assert [node.op_type for node in model.graph] == ["Pad", "Reshape"]


def test_quantized_weights_stay_quantized(tmp_path: Path) -> None:
    weights = {"w": np.arange(12, dtype=np.int8).reshape(4, 3), "s": np.full((), 0.1, np.float32)}
    nodes = [NODE("DequantizeLinear", ["w", "s"], ["wf"]), NODE("Gemm", ["x", "wf"], ["y"], transB=1)]
    model = imported(make(nodes, inputs=[graph_input("x", [1, 3])], weights=weights), tmp_path)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Gemm"]


def test_initializers_listed_as_inputs_are_constants(tmp_path: Path) -> None:
    inputs = [graph_input("x", [1, 3]), graph_input("w", [3, 4])]
    proto = make([NODE("MatMul", ["x", "w"], ["y"])], opset=8, inputs=inputs, weights={"w": random(3, 4)}, ir_version=3)
    model = imported(proto, tmp_path)
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_nodes_get_unique_names(tmp_path: Path) -> None:
    proto = make(
        [NODE("Relu", ["x"], ["a"]), NODE("Relu", ["a"], ["b"], name="same"), NODE("Abs", ["b"], ["y"], name="same")]
    )
    names = [node.name for node in imported(proto, tmp_path).graph]
    assert names[0] == "a"
    assert len(set(names)) == 3


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    proto = make([NODE("Twice", ["x"], ["y"], domain="local")], opset=17, domains=("local",))
    body = [NODE("Add", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    assert [node.op_type for node in imported(proto, tmp_path).graph] == ["Add"]


def test_half_precision_becomes_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = TensorProto.FLOAT16
    nodes = [
        NODE("MatMul", ["x", "w"], ["m"]),
        NODE("Cast", ["m"], ["f"], to=F),
        NODE("Exp", ["f"], ["e"]),
        NODE("Cast", ["e"], ["y"], to=half),
    ]
    inputs = [graph_input("x", [2, 3], half)]
    proto = make(nodes, opset=17, inputs=inputs, weights={"w": random(3, 4).astype(np.float16)}, output_type=half)
    model = imported(proto, tmp_path)
    assert_normal_form(model)
    x = random(2, 3)
    expected = run(proto, {"x": x.astype(np.float16)})[0]
    (got,) = run(ir.to_proto(model), {"x": x})
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.astype(np.float32), rtol=0.02)
    assert "half precision" in caplog.text


def test_fused_microsoft_operators_become_standard_ones(tmp_path: Path) -> None:
    domain = "com.microsoft"
    nodes = [
        NODE("FusedConv", ["x", "w", "b"], ["c"], domain=domain, activation="LeakyRelu", activation_params=[0.2]),
        NODE("Flatten", ["c"], ["f"]),
        NODE("FusedGemm", ["f", "g"], ["h"], domain=domain, activation="Relu", transB=1),
        NODE("BiasGelu", ["h", "k"], ["i"], domain=domain),
        NODE("QuickGelu", ["i"], ["j"], domain=domain, alpha=1.2),
        NODE("FastGelu", ["j"], ["y"], domain=domain),
    ]
    weights = {"w": random(4, 3, 3, 3), "b": random(4), "g": random(5, 144) / 12, "k": random(5)}
    proto = make(nodes, opset=17, weights=weights, domains=(domain,))
    model = imported(proto, tmp_path)
    assert_normal_form(model)
    x = random(2, 3, 8, 8)
    np.testing.assert_allclose(run(ir.to_proto(model), {"x": x})[0], run(proto, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_external_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    proto = make([NODE("MatMul", ["x", "w"], ["y"])], inputs=[graph_input("x", [2, 8])], weights={"w": random(8, 300)})
    plain = run(proto, {"x": np.ones((2, 8), np.float32)})[0]
    (tmp_path / "sub").mkdir()
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="sub/weights.bin", size_threshold=0)
    (got,) = run(ir.to_proto(import_onnx(path)), {"x": np.ones((2, 8), np.float32)})
    np.testing.assert_array_equal(got, plain)


def external(location: str, length: int = 4) -> onnx.ModelProto:
    proto = make(
        [NODE("Add", ["x", "w"], ["y"])], inputs=[graph_input("x", [1])], weights={"w": np.ones(1, np.float32)}
    )
    (tensor,) = proto.graph.initializer
    onnx.external_data_helper.set_external_data(tensor, location, length=length)
    tensor.ClearField("raw_data")
    return proto


@pytest.mark.parametrize("location", ["../secret.bin", "a/../../secret.bin", "/etc/passwd", "C:\\secret.bin", ""])
def test_external_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4)
    (tmp_path / "model").mkdir()
    with pytest.raises(QCompilerError, match="not inside the model's folder"):
        imported(external(location), tmp_path / "model")


def test_external_weights_behind_a_symbolic_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4)
    (tmp_path / "model").mkdir()
    os.symlink(tmp_path / "secret.bin", tmp_path / "model" / "w.bin")
    os.symlink(tmp_path, tmp_path / "model" / "up")
    for location in ("w.bin", "up/secret.bin"):
        with pytest.raises(QCompilerError, match="symbolic link"):
            imported(external(location), tmp_path / "model")


def test_external_weights_missing_or_truncated(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match=r"'w'.*'w\.bin', but .*does not exist"):
        imported(external("w.bin"), tmp_path)
    (tmp_path / "w.bin").write_bytes(b"\0" * 4)
    with pytest.raises(QCompilerError, match="has 4 bytes; it is truncated"):
        imported(external("w.bin", length=8), tmp_path)


# --- shapes ------------------------------------------------------------------------------------------------


def symbolic(*shape: int | str | None) -> onnx.ModelProto:
    return make([NODE("Relu", ["x"], ["y"])], inputs=[graph_input("x", list(shape))])


@pytest.mark.parametrize("batch", ["N", "batch_size", "unk__12", None])
def test_a_symbolic_batch_becomes_one(batch: str | None, tmp_path: Path) -> None:
    model = imported(symbolic(batch, 3, 5, 5), tmp_path)
    assert model.graph.outputs[0].shape == [1, 3, 5, 5]


def test_input_shape_fixes_symbols_in_every_input(tmp_path: Path) -> None:
    inputs = [graph_input("a", ["N", "T", 4]), graph_input("b", ["N", "T", 4])]
    model = imported(make([NODE("Add", ["a", "b"], ["y"])], inputs=inputs), tmp_path, {"a": (2, 7, 4)})
    assert [value.shape for value in model.graph.inputs] == [[2, 7, 4], [2, 7, 4]]
    assert model.graph.outputs[0].shape == [2, 7, 4]


def test_unknown_sizes_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError) as error:
        imported(symbolic("N", 3, "H", "W"), tmp_path)
    assert "input 'x' has shape ['N', 3, 'H', 'W']" in str(error.value)
    assert "--input-shape x=1,3,224,224" in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"imgae": (1, 3, 8, 8)}, "no input 'imgae'; did you mean 'image'?"),
        ({"image": (1, 3, 8)}, r"has 3 dimensions, but the input is \['N', 3, 'H', 'W'\]"),
        ({"image": (1, 3, 0, 8)}, "not positive"),
        ({"image": (1, 4, 8, 8)}, "changes dimension 1, which the model fixes at 3"),
    ],
)
def test_wrong_input_shapes(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    proto = make([NODE("Relu", ["image"], ["y"])], inputs=[graph_input("image", ["N", 3, "H", "W"])])
    with pytest.raises(QCompilerError, match=message):
        imported(proto, tmp_path, shapes)


def test_zero_sized_input(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="size is zero"):
        imported(symbolic(1, 0, 5), tmp_path)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    proto = make([NODE("MatMul", ["x", "w"], ["y"])], inputs=[graph_input("x", [1, 3])], weights={"w": random(4, 5)})
    with pytest.raises(QCompilerError, match="do not fit together"):
        imported(proto, tmp_path)


def test_a_data_dependent_shape_names_the_node(tmp_path: Path) -> None:
    proto = make([NODE("NonZero", ["x"], ["y"], name="find")], output_type=TensorProto.INT64)
    with pytest.raises(QCompilerError, match=r"node 'find' \(NonZero\).*depends on the data"):
        imported(proto, tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        helper.make_tensor_value_info("x", TensorProto.STRING, [1]),
        helper.make_tensor_sequence_value_info("x", F, [1]),
        helper.make_value_info("x", helper.make_optional_type_proto(helper.make_tensor_type_proto(F, [1]))),
    ],
    ids=["string", "sequence", "optional"],
)
def test_inputs_that_are_no_tensors_of_numbers(value: onnx.ValueInfoProto, tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match=r"input 'x' holds .*only tensors of numbers"):
        imported(make([NODE("Identity", ["x"], ["y"])], inputs=[value]), tmp_path)


@pytest.mark.parametrize(
    ("node", "value"),
    [
        (NODE("SequenceConstruct", ["x", "x"], ["y"]), helper.make_tensor_sequence_value_info("y", F, None)),
        (
            NODE("Optional", ["x"], ["y"]),
            helper.make_value_info("y", helper.make_optional_type_proto(helper.make_tensor_type_proto(F, None))),
        ),
        (
            NODE("Cast", ["x"], ["y"], to=TensorProto.STRING),
            helper.make_tensor_value_info("y", TensorProto.STRING, None),
        ),
    ],
    ids=["sequence", "optional", "string"],
)
def test_outputs_that_are_no_tensors_of_numbers(
    node: onnx.NodeProto, value: onnx.ValueInfoProto, tmp_path: Path
) -> None:
    proto = make([node])
    proto.graph.output[0].CopyFrom(value)
    with pytest.raises(
        QCompilerError, match=r"output 'y' holds (a sequence|an optional|strings); only tensors of numbers"
    ):
        imported(proto, tmp_path)


# --- operators ---------------------------------------------------------------------------------------------


def test_all_unknown_operators_are_named_at_once(tmp_path: Path) -> None:
    nodes = [
        NODE("Convv", ["x"], ["a"], name="first"),
        NODE("Magic", ["a"], ["b"], name="second", domain="acme"),
        NODE("Attention", ["b"], ["c"], name="third", domain="com.microsoft"),
        NODE("Gelu", ["c"], ["d"], name="fourth"),
        NODE("Magic", ["d"], ["y"], domain="acme"),
    ]
    with pytest.raises(QCompilerError) as error:
        imported(make(nodes, opset=13, domains=("acme", "com.microsoft")), tmp_path)
    for part in (
        "Convv, did you mean Conv? (first)",
        "acme.Magic of a custom domain (second, node 4 making y)",
        "com.microsoft.Attention (third)",
        "Gelu, which opset 13 does not have (fourth)",
    ):
        assert part in str(error.value)


def test_known_domains_are_those_of_onnx_and_the_rewritten_one() -> None:
    assert {"", "ai.onnx.ml", "com.microsoft"} <= set(KNOWN_DOMAINS)
    assert "acme" not in KNOWN_DOMAINS


@pytest.mark.parametrize("opset", [6, 99])
def test_opsets_out_of_range(opset: int, tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match=f"ONNX opset {opset}; 7 to "):
        imported(make([NODE("Relu", ["x"], ["y"])], opset=opset), tmp_path)


# --- broken files ------------------------------------------------------------------------------------------


def test_an_operator_without_adapter(tmp_path: Path) -> None:
    proto = make([NODE("ThresholdedRelu", ["x"], ["y"])], opset=9)
    with pytest.raises(QCompilerError, match="ThresholdedRelu"):
        imported(proto, tmp_path)


def test_a_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    onnx.save(symbolic(1, 3), tmp_path / "mobilenet.onnx")
    with pytest.raises(QCompilerError, match=r"mobilnet\.onnx does not exist.*did you mean .*mobilenet\.onnx\?"):
        import_onnx(tmp_path / "mobilnet.onnx")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="is a folder"):
        import_onnx(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a PNG image"),
        (b"\x1c\0\0\0TFL3" + b"\xff" * 40, "TensorFlow Lite"),
        (b"PK\x03\x04" + b"\0" * 40, "zip archive"),
        (b"import numpy as np\nprint('hello')\n" * 9, "is not an ONNX model"),
        (bytes(range(256)), "is not an ONNX model"),
    ],
)
def test_files_of_another_kind(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(QCompilerError, match=message):
        import_onnx(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    proto = make([NODE("Conv", ["x", "w"], ["y"])], weights={"w": random(4, 3, 3, 3)})
    data = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(QCompilerError, match=r"model\.onnx"):
        import_onnx(path)


def test_an_empty_graph(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="empty graph"):
        imported(make([]), tmp_path)


def test_a_graph_the_checker_refuses(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="not a valid ONNX model"):
        imported(make([NODE("Relu", ["nowhere"], ["y"])]), tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    weights = random(3, 4)
    weights[1, 2] = bad
    proto = make(
        [NODE("MatMul", ["x", "dense/kernel"], ["y"], name="dense")],
        inputs=[graph_input("x", [1, 3])],
        weights={"dense/kernel": weights},
    )
    with pytest.raises(QCompilerError, match=r"weights 'dense/kernel' of dense \(MatMul\).*out of 12"):
        imported(proto, tmp_path)


def test_an_infinite_mask_is_no_broken_weight(tmp_path: Path) -> None:
    weights = {"c": np.array([[True, False, True]]), "low": np.array(-np.inf, np.float32)}
    proto = make([NODE("Where", ["c", "x", "low"], ["y"])], inputs=[graph_input("x", [1, 3])], weights=weights)
    assert len(list(imported(proto, tmp_path).graph)) == 1


# --- real models -------------------------------------------------------------------------------------------


def test_every_zoo_model_imports(zoo: Path) -> None:
    for path in sorted((zoo / "models").glob("*.onnx")):
        assert_normal_form(import_onnx(path))


Feeds = Callable[[tuple[int, ...]], np.ndarray]


@pytest.mark.parametrize(
    ("name", "feed", "tolerance"),
    [
        ("resnet20_cifar10", lambda shape: random(*shape), 1e-5),
        ("squeezenet11", lambda shape: random(*shape), 1e-5),
        ("fastestdet_352", lambda shape: random(*shape), 1e-5),
        ("resnet8_tflite_int8_qdq", lambda shape: rng.integers(-128, 128, shape, dtype=np.int8), 0),
    ],
)
def test_zoo_models_compute_the_same(zoo: Path, name: str, feed: Feeds, tolerance: float) -> None:
    path = zoo / "models" / f"{name}.onnx"
    model = import_onnx(path)
    (value,) = model.graph.inputs
    assert value.shape is not None
    feeds = {value.name or "": feed(tuple(value.shape.numpy()))}
    for expected, got in zip(run(onnx.load(path), feeds), run(ir.to_proto(model), feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


class RandomReader(CalibrationDataReader):
    """Four random samples for onnxruntime's quantizer."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.samples = iter([{name: random(*shape)} for _ in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        return next(self.samples, None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_models_quantized_by_onnxruntime_compute_the_same(zoo: Path, dynamic: bool, tmp_path: Path) -> None:
    source, path = zoo / "models" / "kws_dscnn.onnx", tmp_path / "quantized.onnx"
    (value,) = import_onnx(source).graph.inputs
    name, shape = value.name or "", shape_of(value)
    if dynamic:
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    else:
        quantize_static(source, path, RandomReader(name, shape), QuantFormat.QOperator, per_channel=True)
    original, model = onnx.load(path), import_onnx(path)
    assert_normal_form(model)
    forms = {node.op_type for node in original.graph.node}
    assert forms >= ({"ConvInteger", "MatMulInteger"} if dynamic else {"QLinearConv", "QGemm", "QLinearSoftmax"})
    assert not forms & {"ConvInteger", "QLinearConv"} & {node.op_type for node in model.graph}
    feeds = {name: random(*shape)}
    np.testing.assert_allclose(run(ir.to_proto(model), feeds)[0], run(original, feeds)[0], rtol=0, atol=1.5 / 256)
