"""The search for tiles: what is measured, what is remembered, and what compiling makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from qcompiler import bundle, host_cpu, tile_database
from qcompiler.backends.base import host_code
from qcompiler.backends.tiles import ConvTile, Tiling, best_guess
from qcompiler.cli import main
from qcompiler.compile import build
from qcompiler.errors import QCompilerError
from qcompiler.options import Options
from qcompiler.target_loader import load_target
from qcompiler.tile_database import Measured, TileDatabase
from qcompiler.tune import tune

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"
TARGET = "x86-cpu"

pytestmark = pytest.mark.skipif(host_cpu.architecture() != "x86_64", reason="measures x86 code")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of two candidates each."""
    path = tmp_path_factory.mktemp("cache") / "deep" / "tiles.json"
    found = tune(DIGITS, TARGET, database=path, candidates=2)
    assert found.workloads == found.measured > 1 and found.database == path
    assert 0 < found.seconds <= found.guessed_seconds
    return path


def test_what_is_known_is_not_measured_again(tuned: Path) -> None:
    before = tuned.read_bytes()
    found = tune(DIGITS, TARGET, database=tuned, candidates=2)
    assert found.measured == found.changed == 0 and found.workloads > 1
    assert tuned.read_bytes() == before
    # Another number of threads is another matter, if some kernel is large enough; the rest is known.
    assert tune(DIGITS, TARGET, Options(overrides=["host.threads=2"]), database=tuned, candidates=2).measured < 2


def test_another_cpu_and_another_version_start_anew(tuned: Path, tmp_path: Path) -> None:
    here, there = (host_code(load_target(name).host) for name in (TARGET, "x86-plain"))
    assert tile_database.load(tuned, here).measured
    assert not tile_database.load(tuned, there).measured
    data = json.loads(tuned.read_text())
    old = tmp_path / "old.json"
    old.write_text(json.dumps({**data, "code": "0"}))
    assert not tile_database.load(old, here).measured
    measured = {"w": Measured(1, 1, 2.0, 3.0)}
    tile_database.save(old, TileDatabase(tile_database.load(old, here).cpu, measured))
    assert tile_database.load(old, here).measured == measured
    assert list(json.loads(old.read_text())["cpus"].values()) == [{"w": {"pixels": 1, "blocks": 1, "seconds": 2.0,
                                                                         "guessed_seconds": 3.0}}]  # fmt: skip


def test_only_candidates_are_chosen() -> None:
    tiling = Tiling("w", (ConvTile(4, 2), ConvTile(2, 1)))
    for pixels, wanted in ((2, ConvTile(2, 1)), (3, ConvTile(4, 2))):
        assert TileDatabase("cpu", {"w": Measured(pixels, 1, 1.0, 1.0)}).choose(tiling) == wanted
    assert TileDatabase("cpu").choose(tiling) == best_guess(tiling)


def test_tiles_change_the_code_and_no_result(tuned: Path, tmp_path: Path) -> None:
    """With the worst guesses for tiles: other code, equal outputs; equal databases give equal bundles."""
    host = host_code(load_target(TARGET).host)
    asked: dict[str, Tiling] = {}

    class Listening(TileDatabase):
        def choose(self, tiling: Tiling) -> ConvTile:
            asked[tiling.workload] = tiling
            return best_guess(tiling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_database, "load", lambda path, host: Listening("cpu"))
        plain = build(DIGITS, TARGET, Options(calibration=CALIBRATION, tiles=tuned), output=tmp_path / "plain.qc")
    worst = {name: tiling.candidates[-1] for name, tiling in asked.items()}
    assert all(tile != best_guess(asked[name]) for name, tile in worst.items())
    database = tmp_path / "worst.json"
    measured = {name: Measured(tile.pixels, tile.blocks, 1.0, 1.0) for name, tile in worst.items()}
    tile_database.save(database, TileDatabase(tile_database.load(database, host).cpu, measured))
    options = Options(calibration=CALIBRATION, tiles=database)
    one, two = (build(DIGITS, TARGET, options, output=tmp_path / f"{name}.qc") for name in ("one", "two"))
    library = bundle.LIBRARY
    assert (one.path / library).read_bytes() == (two.path / library).read_bytes()
    assert (one.path / library).read_bytes() != (plain.path / library).read_bytes()
    assert plain.report.tuning is None
    assert one.report.tuning is not None and one.report.tuning.tuned == one.report.tuning.kernels == len(asked)
    with np.load(EXAMPLES / "digits_test.npz") as data:
        images = {"image": data["image"][:20]}
    assert np.array_equal(one.run(images)["logits"], plain.run(images)["logits"])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match=r"on the CPU they are for only, and arm-cpu is another"):
        tune(DIGITS, "arm-cpu", database=tmp_path / "tiles.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"pixels": 3}')
    with pytest.raises(QCompilerError, match=r"broken.json is no tile database of qcompile tune"):
        tune(DIGITS, TARGET, database=broken)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(QCompilerError, match=r"(cannot read|cannot write) the tile database"):
        tune(DIGITS, TARGET, database=blocked / "tiles.json")
    assert broken.read_text() == '{"pixels": 3}'


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache is where XDG_CACHE_HOME says; compile uses it unless told not to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def qcompile(*arguments: str) -> str:
        with pytest.raises(SystemExit) as leaving:
            main([*arguments, "--target", TARGET, "--calibration", str(CALIBRATION)])
        assert leaving.value.code == 0
        return capsys.readouterr().out

    found = json.loads(qcompile("tune", str(DIGITS), "--candidates", "2", "--json"))
    assert found["database"] == str(tmp_path / "cache" / "qcompiler" / "tiles.json") and found["measured"] > 1
    again = " ".join(qcompile("tune", str(DIGITS), "--candidates", "2").split())
    assert f"{found['measured']} known before" in again
    assert " tuned" in qcompile(str(DIGITS), "-o", "a.qc")
    assert "CPU kernels tuned" not in qcompile(str(DIGITS), "-o", "b.qc", "--no-tuned")
    # A database that is not there is one that knows nothing.
    assert "CPU kernels tuned" not in qcompile(str(DIGITS), "-o", "c.qc", "--database", "none.json")
