"""The typed target: units, constraints, rules, detection of the host, description."""

from pathlib import Path

import numpy as np
import pytest

from qcompiler import host_cpu
from qcompiler.target import (
    BYTE_UNITS,
    RULE_FIELDS,
    Bandwidth,
    Bound,
    DmaPath,
    Duration,
    Host,
    Match,
    OpFacts,
    OpRule,
    Refusal,
    parse_unit,
)
from qcompiler.target_describe import describe
from qcompiler.target_loader import list_targets, load_target

ARM = load_target("arm-npu")


# --- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("512 KiB", 524288), ("512KiB", 524288), ("0.5 MiB", 524288), ("1e3 B", 1000), (" 7 B ", 7)]
)
def test_parse_unit(text: str, value: float) -> None:
    assert parse_unit(text, BYTE_UNITS) == value


@pytest.mark.parametrize("text", ["512", 512, "KiB", "512 kb", "512 KiB/s", "", None, "5 5 B"])
def test_parse_unit_names_the_units_allowed(text: object) -> None:
    with pytest.raises(ValueError, match=r"\(B, KiB, MiB, GiB\)"):
        parse_unit(text, BYTE_UNITS)


def test_durations_and_bandwidths_in_cycles() -> None:
    assert Duration.model_validate("100 ns").cycles(500e6) == pytest.approx(50)
    assert Duration.model_validate("12 cycles").cycles(500e6) == 12
    assert Duration.model_validate("1 cycle").cycles(1) == 1
    assert Bandwidth.model_validate("4 GB/s").per_cycle(500e6) == pytest.approx(8)
    assert Bandwidth.model_validate("16 B/cycle").per_cycle(500e6) == 16


def test_dma_paths() -> None:
    one_way, both = DmaPath.model_validate("flash -> sram"), DmaPath.model_validate("dram <-> sram")
    assert one_way.joins("flash", "sram")
    assert not one_way.joins("sram", "flash")
    assert both.joins("dram", "sram")
    assert both.joins("sram", "dram")
    assert (str(one_way), str(both)) == ("flash -> sram", "dram <-> sram")


# --- constraints and rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "admitted", "refused"),
    [
        ("1..3", (1, 2, 3), (0, 4)),
        ("<= 64", (0, 64), (65,)),
        ("..64", (0, 64), (65,)),
        (">= 2", (2, 99), (1,)),
        ("2..", (2, 99), (1,)),
        (1, (1,), (0, 2)),
        (True, (True,), (False,)),
        ([1, 2, 4], (1, 2, 4), (3,)),
        ("linear", ("linear",), ("nearest",)),
    ],
)
def test_bounds(written: object, admitted: tuple[int, ...], refused: tuple[int, ...]) -> None:
    bound = Bound.model_validate(written)
    assert all(bound.admits(value) for value in admitted)
    assert not any(bound.admits(value) for value in refused)


def _conv(**facts: int | bool) -> OpFacts:
    usual = {
        "kernel_h": 3, "kernel_w": 3, "kernel_area": 9, "stride_h": 1, "stride_w": 1, "dilation_h": 1,
        "dilation_w": 1, "group": 1, "depthwise": False, "constant_weights": True,
    }  # fmt: skip
    return OpFacts("Conv", "int8*int8", {**usual, **facts})


def test_the_first_rule_that_holds_wins() -> None:
    dense, depthwise = ARM.match(_conv()), ARM.match(_conv(group=32, depthwise=True))
    assert isinstance(dense, Match)
    assert isinstance(depthwise, Match)
    assert (dense.rule.note, depthwise.rule.note) == ("convolution", "depthwise convolution")
    on_vector = load_target("systolic-npu").match(_conv(group=32, depthwise=True))
    assert isinstance(on_vector, Match)
    assert on_vector.engine == "vpu"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (_conv(kernel_h=65, kernel_area=195), "kernel height is 65, the rule for Conv admits ..64"),
        (_conv(stride_w=4), "horizontal stride is 4, the rule for Conv admits 1..3"),
        (_conv(dilation_h=3), "vertical dilation is 3, the rule for Conv admits 1..2"),
        (_conv(group=4), "number of groups is 4, the rule for Conv admits 1; or depthwise convolution is no, the "
                         "rule for Conv admits yes"),
        (OpFacts("Conv", "float32*float32", {}), "Conv in float32*float32 is not among int8*int8, uint8*int8,"),
        (OpFacts("LSTM", "int8", {}), "arm-npu has no rule for LSTM"),
        (OpFacts("MaxPool", "int8", {}, result="int16"), "MaxPool in int8->int16 is not among int8, uint8, int16"),
        (OpFacts("Softmax", "float32", {}), "Softmax in float32 is not among int8, uint8, int16"),
    ],
)  # fmt: skip
def test_refusals_say_why(facts: OpFacts, reason: str) -> None:
    refusal = ARM.match(facts)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_a_rule_lists_outputs_of_another_width() -> None:
    assert isinstance(ARM.match(OpFacts("Requantize", "int8", {}, result="int16")), Match)
    assert isinstance(ARM.match(OpFacts("Conv", "int16*int8", {}, result="int8")), Match)


@pytest.mark.parametrize(
    ("chip", "facts", "lacking"),
    [
        ("gemmini", OpFacts("Add", "int16", {}), "int16 activations"),
        ("gemmini", OpFacts("Requantize", "int8", {}, result="int16"), "int16 activations"),
        ("vta", OpFacts("Conv", "int8*int4", {"group": 1}), "int4 weights"),
        ("edge-tpu", OpFacts("Gemm", "int16*int8", {}), "int16 activations"),
    ],
)
def test_inherited_rules_bring_no_types(chip: str, facts: OpFacts, lacking: str) -> None:
    refusal = load_target(chip).match(facts)
    assert isinstance(refusal, Refusal) and refusal.reason == f"{chip} has no {lacking}"


def test_a_chip_prefers_a_type_it_has() -> None:
    wide = ARM.preferring("int16")
    assert wide.quantization.activations.dtypes == ("int16", "int8", "uint8")
    assert wide.npu == ARM.npu and ARM.preferring("int8") == ARM


def test_an_absent_fact_constrains_nothing() -> None:
    assert isinstance(ARM.match(OpFacts("Conv", "int8*int8", {})), Match)


def test_a_target_without_accelerator_refuses_everything() -> None:
    refusal = load_target("x86-avx2").match(_conv())
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "this target has no accelerator"


def test_random_facts_never_break_a_rule() -> None:
    """Whatever the numbers, a match's constraints hold and a refusal's do not."""
    generator = np.random.default_rng(11)
    matches = 0
    for _ in range(300):
        group = int(generator.integers(1, 3))
        sizes = {field: int(generator.integers(1, 6)) for field in ("stride_h", "stride_w", "dilation_h", "dilation_w")}
        facts = _conv(kernel_h=int(generator.integers(1, 80)), group=group, depthwise=group > 1, **sizes)
        match ARM.match(facts):
            case Match(rule):
                matches += 1
                assert _holds(rule, facts)
            case Refusal():
                assert ARM.npu is not None
                assert not any(_holds(rule, facts) for rule in ARM.npu.rules if facts.op in rule.ops)
    assert 10 < matches < 290


def _holds(rule: OpRule, facts: OpFacts) -> bool:
    return all(bound.admits(facts.facts[field]) for field, bound in rule.where.items() if field in facts.facts)


def test_rules_speak_known_words() -> None:
    for summary in list_targets():
        npu = load_target(summary.name).npu
        for rule in npu.rules if npu else ():
            assert set(rule.where) <= set(RULE_FIELDS)


# --- memories ---------------------------------------------------------------------------------------------------------


def test_memories_by_kind() -> None:
    npu = ARM.npu
    assert npu is not None
    assert (npu.memory_name("scratchpad"), npu.memory_name("external"), npu.weight_memory) == ("sram", "dram", "flash")
    assert npu.scratchpad is npu.memories["sram"]
    assert npu.path_between("flash", "sram") == "dma"
    assert npu.path_between("sram", "flash") is None


# --- the host ---------------------------------------------------------------------------------------------------------


def test_the_machines_own_cpu_is_detected() -> None:
    host = load_target("x86-cpu").host
    assert host.is_this_machine
    target = host.resolved_tvm_target()
    assert target["kind"] == "llvm"
    assert target["mcpu"] == host_cpu.detect().mcpu
    flags = host_cpu.kernel_flags()
    if flags is not None and host_cpu.architecture() == "x86_64":
        assert ("avx512vnni" in host.features()) == ("avx512_vnni" in flags)
        assert ("avx2" in host.features()) == ("avx2" in flags)


def test_a_detected_target_builds_code_that_runs() -> None:
    import tvm
    from tvm import te

    a = te.placeholder((64,), "int32")
    doubled = te.compute((64,), lambda index: a[index] * 2)
    described = {
        key: list(item) if isinstance(item, tuple) else item
        for key, item in load_target("x86-cpu").host.resolved_tvm_target().items()
    }
    assert isinstance(a, te.Tensor)
    assert isinstance(doubled, te.Tensor)
    built = tvm.compile(te.create_prim_func([a, doubled]), target=tvm.target.Target(described))
    source = tvm.runtime.tensor(np.arange(64, dtype=np.int32))
    result = tvm.runtime.tensor(np.zeros(64, np.int32))
    built(source, result)
    assert np.array_equal(result.numpy(), np.arange(64) * 2)


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("x86-avx512vnni", "avx512vnni", "amx-int8"),
        ("x86-avx2", "avx2", "avx512f"),
        ("x86-plain", "sse2", "avx2"),
        ("arm-cpu", "dotprod", "i8mm"),
        ("arm-cpu-neon", "neon", "dotprod"),
        ("arm-cpu-i8mm", "i8mm", "sve"),
    ],
)
def test_named_hosts_have_the_features_of_their_cpu(name: str, has: str, lacks: str) -> None:
    host = load_target(name).host
    assert not host.is_this_machine
    assert host.resolved_tvm_target() == host.tvm_target
    assert has in host.features()
    assert lacks not in host.features()


def test_rates_follow_the_features() -> None:
    rates = {name: load_target(f"x86-{name}").host.rates()["uint8*int8"] for name in ("avx512vnni", "avx2", "plain")}
    assert rates == {"avx512vnni": 64, "avx2": 16, "plain": 8}
    assert ARM.host.rates() == ARM.host.mac_rate


def test_mattr_adds_and_removes_features() -> None:
    known = load_target("x86-avx512vnni").host
    cut = known.model_copy(update={"tvm_target": {**known.tvm_target, "mattr": ("-avx512vnni", "+avxvnni")}})
    assert isinstance(cut, Host)
    assert "avx512vnni" not in cut.features()
    assert "avxvnni" in cut.features()


def test_features_a_hypervisor_masks_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse2 avx fma\nbugs\t\t: none\n")
    assert host_cpu.kernel_flags(cpuinfo) == {"fpu", "sse2", "avx", "fma"}
    assert host_cpu.kernel_flags(tmp_path / "none") is None
    monkeypatch.setattr(host_cpu, "kernel_flags", lambda: frozenset({"fpu", "sse2", "avx", "fma"}))
    cpu = host_cpu.detect.__wrapped__()
    assert not {"avx2", "avx512f", "avx512vnni"} & cpu.features
    if "avx2" in host_cpu.detect().features:
        assert "avx2" in cpu.masked


# --- description ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arm-npu", "systolic-npu", "arm-cpu"])
def test_describe_gives_full_tables(name: str) -> None:
    target = load_target(name)
    tables = {table.title.split(" (")[0]: table for table in describe(target)}
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
    assert len(tables["Sources"].rows) == len(target.sources)
    if target.npu is not None:
        assert len(tables["Rules"].rows) == len(target.npu.rules)
        assert {row[0] for row in tables["Memories"].rows} == set(target.npu.memories)
        assert len(tables["Rates"].rows) >= sum(len(engine.precisions) for engine in target.npu.engines.values())


def test_describe_shows_figures_with_units() -> None:
    cells = [cell for table in describe(ARM) for row in table.rows for cell in row]
    for shown in ("2 MiB", "0.5 GB/s", "64 cycles", "128 MAC/cycle", "500 MHz", "flash -> sram, dram <-> sram"):
        assert shown in cells, shown
