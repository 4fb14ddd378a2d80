"""Running passes: order, verification, blame and dumps; and the listed stages on real models."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.importer import import_onnx
from qcompiler.pipeline import SIMPLIFY, Dumper, harmonize, legalize, run_passes
from qcompiler.target_loader import load_target
from qcompiler.verify import VerificationError

FLOAT = ir.DataType.FLOAT


def small_model() -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(FLOAT))
    y = ir.Value(name="y", shape=ir.Shape([2, 3]), type=ir.TensorType(FLOAT))
    node = g.make_node("Relu", [x], [y], name="relu")
    return ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)


class Rename(ir.passes.InPlacePass):
    """Append a letter to the node's name."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        (node,) = model.graph
        node.name = f"{node.name}{self.letter}"
        return ir.passes.PassResult(model, modified=True)


class LoseShape(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.outputs[0].shape = None
        return ir.passes.PassResult(model, modified=True)


class WrongShape(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.outputs[0].shape = ir.Shape([7, 7])
        return ir.passes.PassResult(model, modified=True)


class Crash(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise KeyError("oops")


class Refuse(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise QCompilerError("this model cannot be compiled")


def test_passes_run_in_order() -> None:
    model = run_passes(small_model(), (Rename("a"), Rename("b"), Rename("c")), stage="test")
    assert [node.name for node in model.graph] == ["reluabc"]


def test_a_pass_that_breaks_the_model_is_named() -> None:
    with pytest.raises(VerificationError, match=r"after LoseShape \(pass 2 of 3 in simplify\): node 'relua' \(Relu\)"):
        run_passes(small_model(), (Rename("a"), LoseShape(), Rename("b")), stage="simplify")


def test_wrong_shapes_are_found_at_the_end_of_a_stage() -> None:
    with pytest.raises(VerificationError, match="after simplify: "):
        run_passes(small_model(), (WrongShape(),), stage="simplify")


def test_a_crash_keeps_its_type_and_names_the_pass() -> None:
    with pytest.raises(KeyError) as error:
        run_passes(small_model(), (Crash(),), stage="legalize")
    assert error.value.__notes__ == ["in Crash (pass 1 of 1 in legalize)"]


def test_a_refusal_reaches_the_user_as_it_is() -> None:
    with pytest.raises(QCompilerError) as error:
        run_passes(small_model(), (Refuse(),), stage="legalize")
    assert not hasattr(error.value, "__notes__")


def test_dumps_are_numbered_onnx_files(tmp_path: Path) -> None:
    dumper = Dumper(tmp_path / "new" / "folder")
    model = small_model()
    model.graph.opset_imports["qcompiler"] = 1
    run_passes(model, (Rename("a"),), stage="simplify", dumper=dumper)
    run_passes(model, (), stage="legalize", dumper=dumper)
    assert [path.name for path in dumper.written] == ["01-simplify.onnx", "02-legalize.onnx"]
    proto = onnx.load(dumper.written[0])
    onnx.checker.check_model(proto, full_check=True)
    assert [node.name for node in proto.graph.node] == ["relua"]
    assert {entry.domain for entry in proto.opset_import} == {"", "qcompiler"}


def test_a_dump_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QCompilerError, match="cannot be written"):
        run_passes(small_model(), (), stage="simplify", dumper=Dumper(tmp_path / "file"))


# --- the stages on real models -----------------------------------------------------------------------------


def execute(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    outputs = ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)
    return [np.asarray(output) for output in outputs]


def test_simplify_keeps_what_zoo_models_compute_and_is_settled_after_one_run(zoo: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted((zoo / "models").glob("*.onnx")):
        model = import_onnx(path)
        before = ir.to_proto(model)
        run_passes(model, SIMPLIFY, stage="simplify")
        feeds = {}
        for value in model.graph.inputs:
            dtype = g.dtype_of(value)
            x = rng.normal(size=g.shape_of(value))
            feeds[g.value_name(value)] = (
                x if dtype.kind == "f" else x * 30 + (128 if dtype == np.uint8 else 0)
            ).astype(dtype)
        for expected, got in zip(execute(before, feeds), execute(ir.to_proto(model), feeds), strict=True):
            scale = max(1.0, float(np.abs(expected.astype(np.float64)).max()))
            tolerance = 1e-5 * scale if expected.dtype == np.float32 else 1
            np.testing.assert_allclose(got.astype(np.float64), expected, rtol=0, atol=tolerance, err_msg=path.name)
        assert [type(change).__name__ for change in SIMPLIFY if change(model).modified] == [], path.name


def test_simplify_folds_the_shortcut_of_resnet20(zoo: Path) -> None:
    model = import_onnx(zoo / "models" / "resnet20_cifar10.onnx")
    run_passes(model, SIMPLIFY, stage="simplify")
    assert Counter(node.op_type for node in model.graph) == {
        "Conv": 19,
        "Relu": 19,
        "Add": 9,
        "Slice": 2,
        "Pad": 2,
        "AveragePool": 1,
        "Reshape": 1,
        "Gemm": 1,
    }


@pytest.mark.parametrize("name", ["arm-npu", "systolic-npu", "x86-cpu"])
def test_legalize_and_harmonize_keep_what_quantized_models_compute(zoo: Path, name: str) -> None:
    rng = np.random.default_rng(3)
    target = load_target(name)
    for path in sorted((zoo / "models").glob("*_qdq.onnx")):
        model = import_onnx(path)
        run_passes(model, SIMPLIFY, stage="simplify")
        before = ir.to_proto(model)
        run_passes(model, legalize(target), stage="legalize")
        run_passes(model, harmonize(target), stage="harmonize")
        (value,) = model.graph.inputs
        info = np.iinfo(g.dtype_of(value))
        x = rng.integers(info.min, info.max, g.shape_of(value), endpoint=True, dtype=info.dtype)
        feeds = {g.value_name(value): x}
        for expected, got in zip(execute(before, feeds), execute(ir.to_proto(model), feeds), strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=path.name)
        again = (*legalize(target), *harmonize(target))
        assert [type(change).__name__ for change in again if change(model).modified] == [], path.name
