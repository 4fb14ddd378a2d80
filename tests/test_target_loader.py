"""Target specs: what loads, what inherits, and where each mistake is said to be."""

from pathlib import Path

import pytest

from qcompiler.errors import QCompilerError
from qcompiler.target import RULE_FIELDS, MacArray, Systolic, Target
from qcompiler.target_loader import list_targets, load_target

NPU = """\
description: a small NPU
sources: [made up]
quantization:
  activations: {dtypes: [int8]}
  weights: {dtypes: [int8]}
  requantize: tosa
npu:
  clock: 1 GHz
  idle_power: 5 mW
  memories:
    sram:
      {kind: scratchpad, size: 64 KiB, bandwidth: 16 B/cycle, latency: 2 cycles, energy: {read: 1 pJ/B, write: 2 pJ/B}}
    dram:
      kind: external
      size: 1 GiB
      bandwidth: 3.2 GB/s
      latency: 100 ns
      energy: {read: 100 pJ/B, write: 120 pJ/B}
  dma:
    dma: {paths: [dram <-> sram], channels: 1, bandwidth: 8 B/cycle, setup: 10 cycles}
  engines:
    mxu:
      geometry: {kind: systolic, rows: 8, cols: 4, dataflow: weight_stationary}
      precisions: {int8*int8: {rate: 32 MAC/cycle, energy: 0.1 pJ}}
    vpu:
      geometry: {kind: simd, lanes: 8, element_rate: {elementwise: 8 element/cycle}}
  rules:
    - {ops: [Conv, Gemm], engine: mxu, precisions: [int8*int8], where: {group: 1, stride_h: 1..2}}
    - {ops: [Add], engine: vpu}
  crossing: {sync: 1 us, bandwidth: 3.2 GB/s}
host:
  tvm_target: {kind: llvm}
  clock: 2 GHz
  mac_rate: {float32: 4 MAC/cycle}
  element_rate: 2 element/cycle
  mac_energy: 1 pJ
  byte_energy: 10 pJ/B
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(QCompilerError) as caught:
        load_target(path)
    return str(caught.value)


def place_of(path: Path, needle: str, occurrence: int = 1) -> str:
    """file:line:column of a piece of text."""
    text, start = path.read_text(), -1
    for _ in range(occurrence):
        start = text.index(needle, start + 1)
    line = text.count("\n", 0, start) + 1
    return f"{path}:{line}:{start - text.rfind(chr(10), 0, start)}"


# --- bundled specs ---------------------------------------------------------------------------------------------


def test_list_targets_names_every_bundled_spec() -> None:
    summaries = {summary.name: summary.description for summary in list_targets()}
    assert set(summaries) >= {
        "arm-cpu", "arm-npu", "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256",
        "ethos-u65-512", "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048",
        "systolic-npu", "x86-cpu", "x86-avx512vnni", "x86-avx2", "x86-plain",
    }  # fmt: skip
    assert all(summaries.values())
    assert list(summaries) == sorted(summaries)


@pytest.mark.parametrize("name", [summary.name for summary in list_targets()])
def test_every_bundled_spec_loads(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.sources


@pytest.mark.parametrize(("name", "rate"), [("32", 32), ("64", 64), ("128", 128), ("256", 256)])
def test_mac_rates_follow_from_the_geometry(name: str, rate: int) -> None:
    target = load_target(f"ethos-u55-{name}")
    assert target.npu is not None
    engine = target.npu.engines["mac"]
    assert isinstance(engine.geometry, MacArray)
    height, width, depth = engine.geometry.ublock
    # One micro-block takes 8 input channels a cycle.
    assert height * width * depth * 8 == rate
    assert all(cost.rate == rate for pair, cost in engine.precisions.items() if not pair.startswith("int16"))


def test_arm_npu_is_the_ethos_u55_128() -> None:
    alias, original = load_target("arm-npu"), load_target("ethos-u55-128")
    assert (alias.npu, alias.host, alias.quantization) == (original.npu, original.host, original.quantization)
    assert alias.name == "arm-npu"


def test_u65_drops_the_inherited_flash() -> None:
    npu = load_target("ethos-u65-256").npu
    assert npu is not None
    assert set(npu.memories) == {"sram", "dram"}
    assert npu.weight_memory == "dram"
    assert npu.memories["sram"].latency.value == 32  # inherited
    assert npu.scratchpad.size == 384 * 1024


# --- a spec of one's own ------------------------------------------------------------------------------------------


def test_units_and_names(tmp_path: Path) -> None:
    target = load_target(str(write(tmp_path, NPU, "tiny-npu.yaml")))
    assert target.name == "tiny-npu"
    npu = target.npu
    assert npu is not None
    assert npu.clock == 1e9
    assert npu.scratchpad.size == 65536
    assert npu.external.bandwidth.per_cycle(npu.clock) == pytest.approx(3.2)
    assert npu.external.latency.cycles(npu.clock) == pytest.approx(100)
    assert npu.idle_power == pytest.approx(5e-3)
    assert npu.engines["mxu"].precisions["int8*int8"].energy == 0.1
    assert npu.path_between("sram", "dram") == "dma"


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, NPU, "base.yaml")
    child = write(
        tmp_path,
        "extends: base.yaml\ndescription: faster\nsources: [measured]\nnpu:\n  clock: 2 GHz\n  memories:\n"
        "    sram: {size: 1 MiB}\n  rules:\n    - {ops: [Gemm], engine: mxu, precisions: [int8*int8]}\n",
    )
    target = load_target(child)
    npu = target.npu
    assert npu is not None
    assert (target.name, target.description) == ("mine", "faster")
    assert target.sources == ("measured", "made up")
    assert npu.scratchpad.size == 2**20
    assert npu.scratchpad.bandwidth.value == 16
    assert [rule.ops for rule in npu.rules] == [("Gemm",)]


def test_a_geometry_of_another_kind_replaces_the_inherited_one(tmp_path: Path) -> None:
    child = write(
        tmp_path,
        "extends: arm-npu\ndescription: systolic instead\nnpu:\n  engines:\n    mac:\n"
        "      geometry: {kind: systolic, rows: 4, cols: 4, dataflow: output_stationary}\n"
        "  rules: [{ops: [Conv], engine: mac, precisions: [int8*int8]}]\n",
    )
    npu = load_target(child).npu
    assert npu is not None
    assert npu.engines["mac"].geometry == Systolic(kind="systolic", rows=4, cols=4, dataflow="output_stationary")


def test_an_accelerator_extends_that_of_another_spec(tmp_path: Path) -> None:
    write(tmp_path, NPU, "base.yaml")
    text = "extends: base.yaml\ndescription: two\ndsp:\n  extends: vector-dsp\n  clock: 1 GHz\n"
    target = load_target(write(tmp_path, text))
    inherited = load_target("vector-dsp")
    assert list(target.accelerators) == ["npu", "dsp"] and inherited.npu is not None
    assert target.dsp == inherited.npu.model_copy(update={"clock": 1e9})
    assert target.npu == load_target(tmp_path / "base.yaml").npu
    assert set(inherited.sources) < set(target.sources) and len(set(target.sources)) == len(target.sources)


def test_an_accelerator_that_extends_nothing_of_its_kind_is_placed(tmp_path: Path) -> None:
    write(tmp_path, NPU, "base.yaml")
    message = complaint(write(tmp_path, "extends: base.yaml\ndescription: two\ndsp:\n  extends: arm-cpu\n"))
    assert message == f"dsp.extends: arm-cpu has no npu or dsp section ({tmp_path}/mine.yaml:4:12)"
    message = complaint(write(tmp_path, "extends: base.yaml\ndescription: two\ndsp:\n  extends: mine.yaml\n"))
    assert message == f"extends: mine.yaml -> mine.yaml goes round in a circle ({tmp_path}/mine.yaml:4:12)"


def test_rules_of_every_accelerator_are_read(tmp_path: Path) -> None:
    write(tmp_path, NPU, "base.yaml")
    text = "extends: base.yaml\ndescription: two\ndsp:\n  extends: base.yaml\n  rules: [{ops: [Ad], engine: vpu}]\n"
    assert complaint(write(tmp_path, text)).startswith("dsp.rules[0].ops[0]: there is no operator 'Ad', did you mean")


def test_an_override_names_the_accelerator_where_there_are_several() -> None:
    changed = load_target("npu-dsp", ["dsp.memories.sram.size=64KiB", "npu.clock=2 GHz"])
    assert changed.dsp is not None and changed.npu is not None
    assert changed.dsp.scratchpad.size == 65536 and changed.npu.clock == 2e9
    with pytest.raises(QCompilerError, match=r"several accelerators; say npu\.clock or dsp\.clock"):
        load_target("npu-dsp", ["clock=2 GHz"])


def test_null_removes(tmp_path: Path) -> None:
    write(tmp_path, NPU, "base.yaml")
    assert load_target(write(tmp_path, "extends: base.yaml\ndescription: CPU only\nnpu: null\n")).npu is None


def test_yaml_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = NPU.replace("read: 100 pJ/B, write: 120 pJ/B}", "<<: *cheap, write: 9 pJ/B}").replace(
        "energy: {read: 1 pJ/B", "energy: &cheap {read: 1 pJ/B"
    )
    npu = load_target(write(tmp_path, text)).npu
    assert npu is not None
    assert (npu.external.energy.read, npu.external.energy.write) == (1, 9)


# --- mistakes, each with its place --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "path", "words", "at"),
    [
        ("bandwidth: 3.2 GB/s\n", "bandwith: 3.2 GB/s\n", "npu.memories.dram.bandwith",
         "unknown key, did you mean 'bandwidth'?", "bandwith"),
        ("requantize: tosa", "requantise: tosa", "quantization.requantise", "unknown key, did you mean 'requantize'?",
         "requantise"),
        ("npu:\n", "nnpu:\n", "nnpu", "unknown key, did you mean 'npu'?", "nnpu"),
        ("lanes: 8,", "lames: 8,", "npu.engines.vpu.geometry.lames", "unknown key, did you mean 'lanes'?", "lames"),
        ("clock: 1 GHz", "clock: 1000000000", "npu.clock", "1000000000 needs a number and a unit (Hz, kHz, MHz, GHz)",
         "1000000000"),
        ("size: 1 GiB", "size: 1 GB", "npu.memories.dram.size", "'GB' is not a unit of this figure (B, KiB, MiB, GiB)",
         "1 GB"),
        ("latency: 100 ns", "latency: 100", "npu.memories.dram.latency",
         "100 needs a number and a unit (cycles, ns, us, ms, s)", "100\n"),
        ("channels: 1,", "channels: 0,", "npu.dma.dma.channels", "input should be greater than or equal to 1", "0, b"),
        ("requantize: tosa", "requantize: tfl", "quantization.requantize",
         "'tfl' is not one of 'float32', 'tflite', 'tosa' or 'shift'", "tfl"),
        ("kind: simd", "kind: vector", "npu.engines.vpu.geometry", "kind 'vector' is not one of", "{kind: vector"),
        ("{kind: simd, lanes", "{lanes", "npu.engines.vpu.geometry",
         "needs a kind (mac_array, systolic, dot_array or simd)", "{lanes"),
        ("stride_h: 1..2", "strideh: 1..2", "npu.rules[0].where.strideh",
         "unknown constraint, did you mean 'stride_h'?", "strideh"),
        ("stride_h: 1..2", "stride_h: 3..2", "npu.rules[0].where.stride_h", "3..2 admits nothing", "3..2"),
        ("engine: vpu}", "engine: vpx}", "npu.rules[1].engine", "no engine 'vpx', did you mean 'vpu'?", "vpx"),
        ("ops: [Conv, Gemm]", "ops: [Conv, Gem]", "npu.rules[0].ops[1]",
         "there is no operator 'Gem', did you mean 'Gemm'?", "Gem]"),
        ("ops: [Add], engine: vpu", "ops: [Add], engine: mxu", "npu.rules[1].ops[0]",
         "a systolic array runs Conv, ConvTranspose, Gemm, MatMul only, not Add", "Add]"),
        ("precisions: [int8*int8]", "precisions: [int8*int4]", "npu.rules[0].precisions[0]",
         "the engine 'mxu' has no rate for 'int8*int4'", "int8*int4"),
        ("precisions: [int8*int8]", "precisions: [int8*imt8]", "npu.rules[0].precisions[0]",
         "'imt8' is not a type, did you mean 'int8'?", "int8*imt8"),
        ("[dram <-> sram]", "[dram <-> srm]", "npu.dma.dma.paths[0]", "no memory 'srm', did you mean 'sram'?",
         "dram <-> srm"),
        ("[dram <-> sram]", "[dram to sram]", "npu.dma.dma.paths[0]", "'dram to sram' is not a path", "dram to"),
        ("[dram <-> sram]", "[dram -> sram]", "npu.dma", "needs a path sram -> dram", "dma: {"),
        ("kind: external", "kind: scratchpad", "npu.memories", "needs exactly one of kind scratchpad", "sram:"),
        ("{float32: 4 MAC/cycle}", "{int8*int8: 4 MAC/cycle}", "host.mac_rate", "needs a rate for float32",
         "{int8*int8: 4"),
    ],
)  # fmt: skip
def test_mistakes_are_placed(tmp_path: Path, old: str, new: str, path: str, words: str, at: str) -> None:
    assert NPU.count(old) >= 1
    file = write(tmp_path, NPU.replace(old, new, 1))
    message = complaint(file)
    assert message.startswith(f"{path}: {words}"), message
    assert message.endswith(f"({place_of(file, at)})"), message


def test_missing_key_names_its_mapping(tmp_path: Path) -> None:
    file = write(tmp_path, NPU.replace("      size: 1 GiB\n", ""))
    assert complaint(file) == f"npu.memories.dram.size: is missing ({place_of(file, 'dram:')})"


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, NPU.replace("size: 1 GiB", "size: 1").replace("clock: 2 GHz", "clock: 2"))
    lines = complaint(file).splitlines()
    assert [line.split(":")[0] for line in lines] == ["npu.memories.dram.size", "host.clock"]


def test_a_mistake_in_an_inherited_file_is_placed_there(tmp_path: Path) -> None:
    base = write(tmp_path, NPU.replace("rows: 8", "rows: nine"), "base.yaml")
    child = write(tmp_path, "extends: base.yaml\ndescription: child\n")
    assert f"({place_of(base, 'nine')})" in complaint(child)


def test_a_missing_parent(tmp_path: Path) -> None:
    file = write(tmp_path, "extends: other.yaml\n")
    assert f"extends: there is no file {tmp_path / 'other.yaml'} ({file}:1:10)" == complaint(file)
    named = write(tmp_path, "extends: arm-npv\n")
    assert complaint(named).startswith("extends: unknown target 'arm-npv'; did you mean 'arm-npu'?")
    listed = write(tmp_path, "extends: [arm-npu]\n")
    assert complaint(listed) == f"extends: needs the name or the path of one target ({listed}:1:10)"


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: c.yaml\n", "b.yaml")
    write(tmp_path, "extends: b.yaml\n", "c.yaml")
    message = complaint(tmp_path / "a.yaml")
    assert message == f"extends: b.yaml -> c.yaml -> b.yaml goes round in a circle ({tmp_path / 'c.yaml'}:1:10)"
    alone = write(tmp_path, "extends: mine.yaml\n")
    assert "mine.yaml -> mine.yaml goes round in a circle" in complaint(alone)


def test_yaml_that_is_not_yaml(tmp_path: Path) -> None:
    file = write(tmp_path, "npu: {clock: 1 GHz\nhost: 3\n")
    assert complaint(file).startswith("not valid YAML: ")
    assert f"({file}:2:5)" in complaint(file)
    twice = write(tmp_path, "description: a\nname: x\ndescription: b\n")
    assert "found duplicate key" in complaint(twice)
    assert f"({twice}:3:1)" in complaint(twice)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "3\n"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    assert complaint(file) == f"a target spec is a mapping such as `name: my-npu`, this is not ({file}:1:1)"


def test_binary_and_unreadable_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"name: \xff\xfe\x00")
    assert "is not a text file in UTF-8" in complaint(file)
    (tmp_path / "folder.yaml").mkdir()
    assert complaint(tmp_path / "folder.yaml").startswith(f"cannot read the target spec {tmp_path / 'folder.yaml'}")
    assert complaint(tmp_path / "none.yaml").startswith(f"there is no target spec {tmp_path / 'none.yaml'}")
    file.write_bytes(b"name: a\x00b\n")
    assert complaint(file).startswith("not valid YAML: ")


def test_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(QCompilerError) as caught:
        load_target("arm_npu")
    message = str(caught.value)
    assert message.startswith("unknown target 'arm_npu'; did you mean 'arm-npu'?")
    assert "systolic-npu" in message
    assert message.endswith("a path to a YAML spec works too")


def test_scalars_where_mappings_belong(tmp_path: Path) -> None:
    file = write(tmp_path, NPU.replace("  tvm_target: {kind: llvm}\n", "  tvm_target: llvm\n"))
    assert f"({place_of(file, 'llvm')})" in complaint(file)
    cut = write(tmp_path, "description: a\nsources: [b]\nnpu: 3\n")
    assert "npu: input should be a valid dictionary" in complaint(cut)


def test_loading_twice_gives_equal_targets() -> None:
    first, second = load_target("systolic-npu"), load_target("systolic-npu")
    assert isinstance(first, Target)
    assert first == second


# --- the documentation ----------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "target-specs.md"


def test_the_documents_quick_start_loads(tmp_path: Path) -> None:
    example = DOCUMENT.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    npu = load_target(write(tmp_path, example, "my-npu.yaml")).npu
    assert npu is not None
    assert npu.scratchpad.size == 512 * 1024
    array = npu.engines["mxu"].geometry
    assert isinstance(array, Systolic)
    assert (array.rows, array.cols, array.dataflow) == (32, 32, "weight_stationary")


def test_the_document_names_every_constraint() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [field for field in RULE_FIELDS if f"`{field}`" not in text] == []


# --- overrides ------------------------------------------------------------------------------------------------


def test_overrides_replace_single_values() -> None:
    plain = load_target("arm-npu")
    changed = load_target("arm-npu", ["memories.sram.size=512KiB", "npu.clock = 1 GHz", "host.threads=3"])
    assert plain.npu is not None and changed.npu is not None
    assert changed.npu.scratchpad.size == 512 * 1024 and changed.npu.clock == 1e9 and changed.host.threads == 3
    assert changed.name == "arm-npu with memories.sram.size=512KiB, npu.clock=1GHz, host.threads=3"
    # What is not named stays as it was.
    assert changed.npu.scratchpad.bandwidth == plain.npu.scratchpad.bandwidth
    assert changed.npu.rules == plain.npu.rules and changed.quantization == plain.quantization


def test_overrides_reach_into_lists_and_set_what_the_spec_leaves_out() -> None:
    changed = load_target("arm-npu", ["rules.0.note=tried", "channel_alignment=16"])
    assert changed.npu is not None
    assert changed.npu.rules[0].note == "tried" and changed.npu.channel_alignment == 16
    assert changed.npu.rules[1:] == (load_target("arm-npu").npu or changed.npu).rules[1:]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memories.srm.size=512KiB", "npu.memories.srm: npu.memories has no 'srm', did you mean 'sram'?"),
        ("memories.sram.siz=512KiB", "npu.memories.sram.siz: unknown key, did you mean 'size'?"),
        ("memories.sram.size=512KB", "npu.memories.sram.size: 'KB' is not a unit of this figure (B, KiB, MiB, GiB)"),
        ("clocks=1 MHz", "clocks: unknown key, did you mean 'clock'?"),
        ("rules.0.ops=[Cov]", "npu.rules[0].ops[0]: there is no operator 'Cov', did you mean 'Conv'?"),
        ("rules.99.ops=[Conv]", "npu.rules.99: npu.rules has no '99'"),
    ],
)
def test_a_wrong_override_is_placed_at_its_key(override: str, message: str) -> None:
    with pytest.raises(QCompilerError) as caught:
        load_target("arm-npu", [override])
    assert str(caught.value) == f"{message} (--set {override})"


@pytest.mark.parametrize("override", ["memories.sram.size", "=1", "a..b=1", "clock=["])
def test_an_override_that_is_none(override: str) -> None:
    with pytest.raises(QCompilerError, match=r"write KEY=VALUE|not valid YAML"):
        load_target("arm-npu", [override])
