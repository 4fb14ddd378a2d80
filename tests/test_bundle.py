import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qcompiler import bundle as bundles
from qcompiler import host_cpu
from qcompiler.bundle import Cpu, Tensor, load, staging, write_json, write_manifest
from qcompiler.errors import QCompilerError

HERE = Cpu(host_cpu.architecture(), ())
NETWORK = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }'
)


def _fill(folder: Path, mark: str = "one", cpu: Cpu = HERE) -> None:
    """The least that is a bundle: it loads, though it has no code to run."""
    model = folder.parent / "net.onnx"
    onnx.save(NETWORK, model)
    write_json(folder / bundles.TARGET, {"name": "some-npu", "mark": mark})
    (folder / bundles.LIBRARY).write_bytes(b"\x7fELF")
    x, y = Tensor("image", (1, 3, 4), "float32", None), Tensor("logits", (1, 5), "float32", None)
    write_manifest(folder, model, "some-npu", cpu, (x,), (y,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    output = tmp_path / "net.qc"
    with staging(output) as stage:
        _fill(stage)
    return output


def test_written_whole_and_loaded(folder: Path) -> None:
    bundle = load(folder)
    assert bundle.target == "some-npu"
    assert bundle.inputs[0].shape == (1, 3, 4)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["net.onnx", "net.qc"]


def test_the_hash_of_the_model_covers_weights_in_other_files(tmp_path: Path) -> None:
    def hashed(weight: float, *, external: bool) -> str:
        folder = tmp_path / f"{weight} {external}"
        (folder / "net.qc").mkdir(parents=True)
        model = onnx.ModelProto.FromString(NETWORK.SerializeToString())
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.full(2, weight, np.float32), "w"))
        onnx.save(model, folder / "net.onnx", save_as_external_data=external, location="weights.bin", size_threshold=0)
        write_json(folder / "net.qc" / bundles.TARGET, {})
        write_manifest(folder / "net.qc", folder / "net.onnx", "some-npu", HERE, (), ())
        if not external:
            assert load(folder / "net.qc").manifest.model_sha256 == bundles.sha256(folder / "net.onnx")
        return load(folder / "net.qc").manifest.model_sha256

    assert len({hashed(weight, external=external) for weight in (1, 2) for external in (False, True)}) == 4


def test_replaces_a_bundle(folder: Path) -> None:
    with staging(folder) as stage:
        assert load(folder).target == "some-npu", "the old bundle is whole until the new one is"
        _fill(stage, mark="two")
    assert json.loads((folder / bundles.TARGET).read_text())["mark"] == "two"
    load(folder)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["net.onnx", "net.qc"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_everything_as_it_was(folder: Path, failure: type[BaseException]) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(failure), staging(folder) as stage:
        _fill(stage, mark="two")
        raise failure
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(file.name for file in folder.parent.iterdir()) == ["net.onnx", "net.qc"]


def test_a_failed_move_restores_the_old_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def fail_into_place(source: Path, destination: Path) -> None:
        if destination == folder and not source.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(os, "replace", fail_into_place)
    with pytest.raises(OSError, match="No space"), staging(folder) as stage:
        _fill(stage, mark="two")
    assert json.loads((folder / bundles.TARGET).read_text())["mark"] == "one"
    assert sorted(file.name for file in folder.parent.iterdir()) == ["net.onnx", "net.qc"]


def test_something_else_in_the_way_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(QCompilerError, match="not a bundle; it is left alone"), staging(foreign):
        pytest.fail("the work began although its result has no place")
    (foreign / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(QCompilerError, match="not a bundle"), staging(foreign):
        pytest.fail("a manifest.json of another program is not a bundle")
    file = tmp_path / "notes"
    file.write_text("notes")
    with pytest.raises(QCompilerError, match="is a file"), staging(file):
        pytest.fail("a file was about to be replaced")
    with pytest.raises(QCompilerError, match="cannot write"), staging(file / "net.qc"):
        pytest.fail("a folder cannot stand under a file")
    assert (foreign / "cat.jpg").read_bytes() == b"cat" and file.read_text() == "notes"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "net.qc").mkdir()
    with staging(tmp_path / "net.qc") as stage:
        _fill(stage)
    load(tmp_path / "net.qc")


def test_load_refuses_what_is_not_a_bundle(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(QCompilerError, match="is not a folder"):
        load(tmp_path / "net.onnx")
    with pytest.raises(QCompilerError, match=r"has no manifest\.json"):
        load(tmp_path)
    manifest = folder / bundles.MANIFEST
    text = manifest.read_text()
    for damage, message in (
        (text[: len(text) // 2], "it is not JSON"),
        ('{"name": "a web app"}', "not one that qcompile writes"),
        (text.replace('"format_version": 1', '"format_version": 99'), "bundle format 99"),
        (text.replace('"inputs"', '"inlets"'), "damaged at inputs"),
        (text.replace('"model.so"', '"../model.so"'), "outside the bundle"),
    ):
        manifest.write_text(damage)
        with pytest.raises(QCompilerError, match=message):
            load(folder)


def test_load_refuses_damaged_files(folder: Path) -> None:
    code = folder / bundles.LIBRARY
    original = code.read_bytes()
    code.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(QCompilerError, match="its hash differs"):
        load(folder)
    code.unlink()
    with pytest.raises(QCompilerError, match=r"model\.so is missing"):
        load(folder)


def test_a_moved_bundle_still_loads(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, elsewhere)
    assert load(elsewhere).target == "some-npu"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"imge": np.zeros((1, 3, 4), np.float32)}, "did you mean 'image'"),
        ({}, "'image' is not given"),
        ({"image": np.zeros((1, 4, 3), np.float32)}, "shape 1×4×3 where the model takes 1×3×4"),
        ({"image": np.zeros((3, 4), np.float32)}, "shape 3×4"),
        ({"image": np.float32(1)}, r"shape \(\)"),
        ({"image": np.zeros((0, 3, 4), np.float32)}, "hold no sample"),
        ({"image": np.zeros((1, 3, 4), np.complex64)}, "is complex64"),
        ({"image": np.zeros((1, 3, 4), np.int64)}, "without loss"),
        ({"image": np.array([["a"] * 4] * 3)[None]}, "<U1"),
    ],
)
def test_run_refuses_wrong_inputs(folder: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(QCompilerError, match=message):
        load(folder).run(inputs)


@pytest.mark.parametrize(
    ("cpu", "message"),
    [(Cpu("riscv64", ()), "built for riscv64"), (Cpu(host_cpu.architecture(), ("warp_drive",)), "uses warp_drive")],
)
def test_code_for_another_cpu_is_not_run(tmp_path: Path, cpu: Cpu, message: str) -> None:
    with staging(tmp_path / "net.qc") as stage:
        _fill(stage, cpu=cpu)
    bundle = load(tmp_path / "net.qc")
    with pytest.raises(QCompilerError, match=message):
        bundle.run({"image": np.zeros((1, 3, 4), np.float32)})
