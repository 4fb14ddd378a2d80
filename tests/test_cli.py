"""The command as a user meets it: exit codes, messages, streams, files. What bundles hold is tested in test_compile."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qcompiler import cli
from qcompiler.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = str(EXAMPLES / "digits.onnx")
CALIBRATION = str(EXAMPLES / "digits_calibration.npz")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def qcompile(*arguments: str) -> int:
    """The exit code of one invocation."""
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    return int(leaving.value.code or 0)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one paragraph a user's mistake prints; nothing on stdout and nothing written."""
    assert qcompile(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert list(Path.cwd().iterdir()) == []
    return captured.err.strip()


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "digits.qc"
    assert qcompile(DIGITS, "--calibration", CALIBRATION, "--output", str(folder)) == 0
    return folder


# --- the commands ---------------------------------------------------------------------------------------------


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile("--version") == 0
    assert capsys.readouterr().out.startswith("qcompile 0.")
    for arguments in (("--help",), ("compile", "-h"), ("run", "--help"), ("targets", "check", "--help")):
        assert qcompile(*arguments) == 0
        assert "Usage:" in capsys.readouterr().out


def test_verbs_are_the_commands() -> None:
    """A command missing from VERBS would be taken for the name of a model."""
    import typer.main

    group = typer.main.get_command(cli.app)
    assert set(cli.VERBS) == set(getattr(group, "commands", {}))


def test_compile_prints_placement_cost_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile(DIGITS, "--target", "arm-npu", "--calibration", CALIBRATION) == 0
    captured = capsys.readouterr()
    for words in ("Placement", "int8*int8", "Cost of one inference", "inferences/s", "peak SRAM", "SQNR", "logits"):
        assert words in captured.out
    assert "wrote digits.qc" in captured.out
    assert [path.name for path in Path.cwd().iterdir()] == ["digits.qc"]
    # Not a terminal: no progress, no control codes.
    assert captured.err == "" and "\x1b" not in captured.out


def test_a_bundle_holds_its_report_as_a_page(digits_bundle: Path) -> None:
    page = (digits_bundle / "report.html").read_text("utf-8")
    assert "<svg" in page and "SQNR" in page and len(page) < 100_000
    assert "report.html" in json.loads((digits_bundle / "manifest.json").read_text())["files"]


def test_pages_are_not_for_c(capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(capsys, DIGITS, "-t", "cortex-m55", "--emit", "c", "--html", "page.html")
    assert "--emit c" in message and "explain" in message
    assert "cannot write nowhere/page.html" in mistake(capsys, "explain", DIGITS, "--html", "nowhere/page.html")


def test_compile_as_json_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile("--json", DIGITS, "-c", CALIBRATION, "--samples", "16", "-o", "out/net.qc") == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err == ""
    assert printed["bundle"] == "out/net.qc"
    assert printed["report"]["calibration"] == {"method": "mse", "samples": 16, "synthetic": False}
    assert printed["report"]["self_check"]["outputs"][0]["sqnr"] > 20
    assert printed["seconds"]["build"] > 0


def test_without_calibration_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile(DIGITS) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "synthetic" in printed and "do not trust the accuracy" in printed
    assert "synthetic" in Path("digits.qc/report.txt").read_text()


def test_explain_builds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile("explain", DIGITS, "--target", "systolic-npu") == 0
    assert "Cost of one inference" in capsys.readouterr().out
    assert qcompile("explain", DIGITS, "--target", "systolic-npu", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self_check"] is None and report["totals"]["latency"] > 0
    assert list(Path.cwd().iterdir()) == []


def test_dump_writes_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile("explain", DIGITS, "--dump", "stages") == 0
    dumps = sorted(Path("stages").iterdir())
    stages = ["import", "simplify", "legalize", "quantize", "harmonize", "realize", "layout"]
    assert [dump.name for dump in dumps] == [f"{index:02}-{name}.onnx" for index, name in enumerate(stages, start=1)]
    for dump in dumps:
        assert onnx.load(dump).graph.node


def test_run(digits_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(EXAMPLES / "digits_test.npz") as data:
        images, labels = data["image"][:40], data["label"][:40]
    np.savez("in.npz", image=images)
    assert qcompile("run", str(digits_bundle), "--input", "in.npz", "--output", "out.npz") == 0
    assert "logits" in capsys.readouterr().out
    with np.load("out.npz") as outputs:
        assert (outputs["logits"].argmax(axis=1) == labels).mean() > 0.9
    # A single array serves the single input.
    np.save("in.npy", images[:1])
    assert qcompile("run", str(digits_bundle), "-i", "in.npy", "-o", "one.npz", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["logits"] == {"shape": [1, 10], "dtype": "float32"}
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["in.npy", "in.npz", "one.npz", "out.npz"]


def test_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled for two: the report estimates with two, `run` takes one or two and no more."""
    latencies: list[float] = []
    for count in ("1", "2"):
        assert qcompile("explain", DIGITS, "--target", "x86-cpu", "--threads", count, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        latencies.append(report["totals"]["latency"])
        memory = report["memory"]
        assert memory["arena"] > 0 and memory["constants"] == report["totals"]["weights"] > 0
    assert latencies[1] < latencies[0]
    message = mistake(capsys, DIGITS, "--target", "portable-c", "--emit", "c", "--threads", "2")
    assert message == "error: --emit c writes code without threads; leave out --threads."
    two = str(tmp_path / "two.qc")
    assert qcompile(DIGITS, "-t", "x86-cpu", "-c", CALIBRATION, "--threads", "2", "-o", two) == 0
    assert "host memory" in capsys.readouterr().out
    data, results = str(EXAMPLES / "digits_test.npz"), []
    with np.load(data) as arrays:
        np.savez(tmp_path / "in.npz", image=arrays["image"][:5])
    data = str(tmp_path / "in.npz")
    for count in ("1", "2"):
        output = str(tmp_path / f"out{count}.npz")
        assert qcompile("run", two, "-i", data, "-o", output, "--threads", count) == 0
        with np.load(output) as arrays:
            results.append(arrays["logits"])
    assert np.array_equal(*results)
    capsys.readouterr()
    message = mistake(capsys, "run", two, "-i", data, "-o", str(tmp_path / "x.npz"), "--threads", "3")
    assert "compiled for 2 threads and cannot use 3; compile the model again with --threads 3" in message


def test_run_never_loads_the_compiler(digits_bundle: Path) -> None:
    """A process of its own: neither onnx nor the compiler half of TVM is imported or mapped."""
    np.savez("in.npz", image=np.zeros((2, 1, 8, 8), np.float32))
    program = (
        "import sys\n"
        "from qcompiler.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'libtvm_compiler' not in maps, 'the compiler half of TVM is mapped'\n"
        "loaded = {'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'tvm.relax'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, "run", str(digits_bundle), "-i", "in.npz", "-o", "out.npz"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    with np.load("out.npz") as outputs:
        assert outputs["logits"].shape == (2, 10)


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile("targets") == 0
    assert "systolic-npu" in capsys.readouterr().out
    assert qcompile("targets", "--json") == 0
    assert "arm-npu" in [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert qcompile("targets", "show", "arm-npu") == 0
    assert "scratchpad" in capsys.readouterr().out
    assert qcompile("targets", "show", "arm-npu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["npu"]["clock"] == 5e8
    Path("mine.yaml").write_text("extends: systolic-npu\ndescription: mine\n")
    assert qcompile("targets", "check", "mine.yaml") == 0
    assert "valid" in capsys.readouterr().out


def test_the_spec_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text("utf-8")
    spec = readme.split("```yaml\n", maxsplit=1)[1].split("```", maxsplit=1)[0]
    Path("my-npu.yaml").write_text(spec)
    assert qcompile("targets", "check", "my-npu.yaml") == 0
    assert qcompile("explain", DIGITS, "--target", "my-npu.yaml", "--json") == 0
    totals = json.loads(capsys.readouterr().out.partition("\n")[2])["totals"]
    assert totals["sram"] == 64 * 1024


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Where bad input files lie, so that the working folder can be seen to stay empty."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    return folder


def _model(
    path: Path,
    op: str,
    domain: str = "",
    shape: tuple[int | str, ...] = (1, 4),
    outputs: tuple[int, ...] | None = None,
    kind: int = TensorProto.FLOAT,
) -> str:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], "node_7", domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", kind, None if kind != TensorProto.FLOAT else outputs or shape)],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return str(path)


def test_bad_models(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated = outside / "truncated.onnx"
    truncated.write_bytes(Path(DIGITS).read_bytes()[:9000])
    assert "truncated.onnx" in mistake(capsys, str(truncated))
    picture = outside / "cat.onnx"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert "PNG" in mistake(capsys, str(picture))
    assert "digits.onnx" in mistake(capsys, str(EXAMPLES / "digit.onnx"))
    unknown = mistake(capsys, _model(outside / "u.onnx", "FancyOp", "vendor"))
    assert "vendor.FancyOp" in unknown and "node_7" in unknown
    near = mistake(capsys, _model(outside / "n.onnx", "Rleu"))
    assert "did you mean Relu" in near


def test_an_operator_nobody_runs_is_named_before_any_work(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _model(outside / "det.onnx", "Det", shape=(1, 4, 4), outputs=(1,))
    images = np.full((2, 4, 4), np.nan, np.float32)
    # The calibration data is bad too, but has not been read yet.
    message = mistake(capsys, model, "-c", _calibration(outside, images))
    assert "'node_7' (Det)" in message
    sized_by_data = mistake(capsys, _model(outside / "nz.onnx", "NonZero", kind=TensorProto.INT64))
    assert "node_7" in sized_by_data


def test_symbolic_shapes_are_asked_for(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _model(outside / "dyn.onnx", "Relu", shape=(1, "width"))
    message = mistake(capsys, model)
    assert "--input-shape x=" in message and "width" in message
    assert "NAME=1,3,224,224" in mistake(capsys, model, "--input-shape", "x=1,wide")
    assert "no input 'z'" in mistake(capsys, model, "--input-shape", "z=1,4")


def test_bad_targets(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'arm-npu'" in mistake(capsys, DIGITS, "--target", "arm-nup")
    spec = outside / "mine.yaml"
    spec.write_text("extends: systolic-npu\ndescription: mine\nnpu:\n  clok: 1 GHz\n")
    message = mistake(capsys, DIGITS, "--target", str(spec))
    assert "mine.yaml:4:3" in message and "clock" in message
    spec.write_text("extends: systolic-npu\ndescription: mine\nnpu:\n  clock: 5\n")
    message = mistake(capsys, "targets", "check", str(spec))
    assert "mine.yaml:4" in message and "MHz" in message


def _calibration(outside: Path, images: np.ndarray) -> str:
    np.savez(outside / "data.npz", image=images)
    return str(outside / "data.npz")


def _images() -> np.ndarray:
    with np.load(CALIBRATION) as data:
        return data["image"][:6].copy()


def test_bad_calibration_data(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(images: np.ndarray) -> str:
        return mistake(capsys, DIGITS, "--calibration", _calibration(outside, images))

    for value, word in ((np.nan, "NaN"), (np.inf, "infinite")):
        images = _images()
        images[3, 0, 2, 2] = value
        text = message(images)
        assert word in text and "sample 3" in text and "'image'" in text
    np.savez(outside / "data.npz", imge=_images(), other=_images())
    assert "'imge'" in mistake(capsys, DIGITS, "-c", str(outside / "data.npz"))
    assert "samples, 1, 8, 8" in message(_images()[:, :, :7])
    assert "complex64" in message(_images().astype(np.complex64))
    assert "no samples" in message(_images()[:0])
    (outside / "text.npz").write_text("not an archive")
    assert "text.npz" in mistake(capsys, DIGITS, "-c", str(outside / "text.npz"))
    assert "nothing.npz" in mistake(capsys, DIGITS, "-c", str(outside / "nothing.npz"))


def test_odd_calibration_data_is_warned_of(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = _images()
    images[2] *= 255
    images[4] = 3
    assert qcompile("explain", DIGITS, "--json", "-c", _calibration(outside, images)) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("sample 2" in warning and "255 times" in warning and "'image'" in warning for warning in warnings)
    assert any("sample 4" in warning and "every value is 3" in warning for warning in warnings)


def test_bad_image_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mean a,b" in mistake(capsys, DIGITS, "--mean", "a,b")
    assert "not an image size" in mistake(capsys, DIGITS, "--resize", "big")
    assert "std must not be zero" in mistake(capsys, DIGITS, "--std", "0")


def test_output_that_cannot_be_written(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outside / "notes").write_text("notes")
    assert "is a file" in mistake(capsys, DIGITS, "-o", str(outside / "notes"))
    assert "cannot write" in mistake(capsys, DIGITS, "-o", str(outside / "notes" / "digits.qc"))
    (outside / "photos").mkdir()
    (outside / "photos" / "cat.jpg").write_bytes(b"cat")
    assert "left alone" in mistake(capsys, DIGITS, "-o", str(outside / "photos"))
    assert (outside / "photos" / "cat.jpg").read_bytes() == b"cat"
    assert "dump" in mistake(capsys, "explain", DIGITS, "--dump", str(outside / "notes" / "stages"))


def test_mistakes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        (DIGITS, "--target", "arm-nup", "--json"),
        ("explain", "nothing.onnx", "--json"),
        ("run", "nothing.qc", "-i", "in.npz", "-o", "out.npz", "--json"),
    ):
        assert qcompile(*arguments) == 2
        captured = capsys.readouterr()
        assert list(json.loads(captured.out)) == ["error"] and captured.err == ""


def test_bad_run_inputs(digits_bundle: Path, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(file: Path, output: str = "out.npz") -> str:
        return mistake(capsys, "run", str(digits_bundle), "-i", str(file), "-o", output)

    good = outside / "in.npz"
    np.savez(good, imge=np.zeros((1, 1, 8, 8), np.float32))
    assert "did you mean 'image'" in message(good)
    np.savez(good, image=np.zeros((1, 1, 9, 8), np.float32))
    assert "1×1×9×8" in message(good)
    np.savez(good, image=np.zeros((1, 1, 8, 8), np.float32))
    assert "cannot write" in message(good, str(good / "out.npz"))
    assert "does not exist" in message(outside / "nothing.npz")
    (outside / "text.npz").write_text("text")
    assert "not a readable .npz" in message(outside / "text.npz")
    np.save(outside / "objects.npy", np.array([{}], dtype=object))
    assert "not a readable .npz" in message(outside / "objects.npy")


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert qcompile(DIGITS, "--tarket", "arm-npu") == 2
    assert "--target" in capsys.readouterr().err


# --- interruption -------------------------------------------------------------------------------------------------


def test_interrupted_in_mid_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from qcompiler.backends import relax

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(relax, "build", interrupted)
    assert qcompile(DIGITS, "-c", CALIBRATION) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_control_c_leaves_nothing_behind() -> None:
    """A real signal to a real process, in the middle of the build: a fast machine would be done before it."""
    # A shell starts what runs in its background with the signal ignored, and children inherit that.
    program = (
        "import signal, time; from qcompiler.backends import relax; from qcompiler.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "relax.build = lambda *_: print('building', flush=True) or time.sleep(60); main()"
    )
    command = [sys.executable, "-c", program, DIGITS, "-c", CALIBRATION]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("building" in line for line in process.stdout)
    assert list(Path.cwd().iterdir()), "the staging folder is not there"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(Path.cwd().iterdir()) == []
