"""The C simulator by itself: its arithmetic against numpy, and the checks that stop a wrong driver."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qcompiler.c_code import COMPILE_FLAGS
from qcompiler.errors import QCompilerError
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.simulator import isa
from qcompiler.simulator.machine import Log, compile_simulator
from qcompiler.tools import c_compiler

STUBS = Path(__file__).resolve().parents[2] / "runtime_stubs"
EXTREMES = np.array([0, 1, -1, 2, -2, 127, -128, 255, -255, 2**30, -(2**30), 2**31 - 1, -(2**31), 2**24 + 1, 12345678])

SHIM = """
#include "qarith.h"
#define EACH for (int64_t i = 0; i < n; ++i)
void rescale(int64_t n, const int64_t *acc, const int32_t *m, const int32_t *s, int32_t variant, int64_t *out) {
    EACH out[i] = qarith_rescale(acc[i], m[i], s[i], variant);
}
void wide(int64_t n, const int64_t *acc, const int32_t *m, const int32_t *s, int32_t variant, int64_t *out) {
    EACH out[i] = qarith_rescale_wide(acc[i], m[i], s[i], variant);
}
void add(int64_t n, const int32_t *a, const int32_t *b, int32_t bits, const int32_t *f, int32_t variant, int sub,
         int64_t *out) {
    const qarith_add_factors factors = {f[0], f[1], f[2], f[3], f[4], f[5]};
    EACH out[i] = qarith_add(a[i], b[i], bits, &factors, variant, sub);
}
void high_mul(int64_t n, const int32_t *a, const int32_t *b, int64_t *out) {
    EACH out[i] = qarith_doubling_high_mul(a[i], b[i]);
}
void divide(int64_t n, const int64_t *x, const int32_t *exponent, int64_t *out) {
    EACH out[i] = qarith_rounding_divide_by_pot(x[i], exponent[i]);
}
void softmax(int64_t n, const int32_t *e, int64_t total, int32_t inverse, int32_t zero, int64_t *out) {
    EACH out[i] = qarith_softmax(e[i], total, inverse, zero);
}
"""


def link(source: Path, library: Path) -> Path:
    command = [c_compiler(), *COMPILE_FLAGS, "-shared", f"-I{STUBS / 'simulator'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("qarith")
    (folder / "shim.c").write_text(SHIM)
    return ctypes.CDLL(str(link(folder / "shim.c", folder / "shim.so")))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    subprocess.run([c_compiler(), "-shared", str(compile_simulator(folder)), "-o", str(folder / "npu.so")], check=True)
    return folder / "npu.so"


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def rescaled(
    shim: ctypes.CDLL,
    acc: np.ndarray,
    m: np.ndarray,
    s: np.ndarray,
    variant: RequantizeVariant,
    function: str = "rescale",
) -> np.ndarray:
    bits = m.astype(np.float32).view(np.int32) if variant == "float32" else m.astype(np.int32)
    out, acc, s = np.empty(len(acc), np.int64), acc.astype(np.int64), s.astype(np.int32)
    index = ctypes.c_int32(isa.VARIANTS.index(variant))
    call = getattr(shim, function)
    call(ctypes.c_int64(len(acc)), pointer(acc), pointer(bits), pointer(s), index, pointer(out))
    return out


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_rescale_is_the_definition(shim: ctypes.CDLL, variant: RequantizeVariant) -> None:
    rng = np.random.default_rng(1)
    factors = np.exp2(rng.uniform(-31, 8, 20000))
    if variant == "shift":
        factors = np.exp2(rng.integers(-31, 8, 20000).astype(np.float64))
    multiplier, shift = arithmetic.multipliers(factors, variant)
    acc = rng.integers(-(2**31), 2**31, 20000) >> rng.integers(0, 31, 20000)
    acc[: len(EXTREMES)] = EXTREMES
    np.testing.assert_array_equal(
        rescaled(shim, acc, multiplier, shift, variant), arithmetic.rescale(acc, multiplier, shift, variant)
    )


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_rescale_at_ties_and_extremes(shim: ctypes.CDLL, variant: RequantizeVariant) -> None:
    exponents = np.arange(-31, 4)
    multiplier, shift = arithmetic.multipliers(np.exp2(exponents.astype(np.float64)), variant)
    near = np.concatenate([EXTREMES, np.arange(-40, 41), 2 ** np.arange(0, 31), 3 * 2 ** np.arange(0, 29)])
    acc = np.concatenate([near, -near]).clip(-(2**31), 2**31 - 1)
    acc, index = (grid.ravel() for grid in np.meshgrid(acc, np.arange(len(exponents))))
    np.testing.assert_array_equal(
        rescaled(shim, acc, multiplier[index], shift[index], variant),
        arithmetic.rescale(acc, multiplier[index], shift[index], variant),
    )


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_wide_rescale_is_the_definition(shim: ctypes.CDLL, variant: RequantizeVariant) -> None:
    """Sums of 48 bits, whose results fit 33 (those of powers of two: any)."""
    rng = np.random.default_rng(4)
    factors = np.exp2(rng.uniform(-32, 14, 20000))
    if variant == "shift":
        factors = np.exp2(rng.integers(-31, 14, 20000).astype(np.float64))
    multiplier, shift = arithmetic.multipliers(factors, variant)
    # The largest multipliers round up to 2^15, which does not fit.
    multiplier[:100] = multiplier[:100] if variant in ("float32", "shift") else 2**31 - 1 - np.arange(100) * 400
    acc = rng.integers(-(2**47), 2**47, 20000) >> rng.integers(0, 47, 20000)
    acc[: len(EXTREMES)] = EXTREMES
    np.testing.assert_array_equal(
        rescaled(shim, acc, multiplier, shift, variant, "wide"),
        arithmetic.rescale_wide(acc, multiplier, shift, variant),
    )


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
@pytest.mark.parametrize("subtract", [0, 1])
@pytest.mark.parametrize(("bits", "limit", "step"), [(8, 255, 1), (16, 32768, 257)])
def test_additions_are_the_definition(
    shim: ctypes.CDLL, variant: RequantizeVariant, subtract: int, bits: int, limit: int, step: int
) -> None:
    rng = np.random.default_rng(2)
    a, b = (
        grid.ravel().astype(np.int32)
        for grid in np.meshgrid(np.arange(-limit, limit, 3 * step), np.arange(-limit, limit + 1, step))
    )
    for scales in [(1, 1, 1), *np.exp(rng.uniform(-6, 2, (20, 3)))]:
        scale_a, scale_b, scale_y = (float(scale) for scale in scales)
        factors = arithmetic.add_factors(scale_a, scale_b, scale_y, variant, bits=bits)
        out = np.empty(len(a), np.int64)
        index = ctypes.c_int32(isa.VARIANTS.index(variant))
        encoded = np.array(factors, np.int32)
        shim.add(ctypes.c_int64(len(a)), pointer(a), pointer(b), bits, pointer(encoded), index, subtract, pointer(out))
        wanted = arithmetic.add(a, b, factors, variant, subtract=bool(subtract), bits=bits)
        np.testing.assert_array_equal(out, wanted)


def test_high_mul_and_division(shim: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-(2**31), 2**31, 20000).astype(np.int32) for _ in range(2))
    a[:2], b[:2] = -(2**31), [-(2**31), 2**31 - 1]
    out = np.empty(len(a), np.int64)
    shim.high_mul(ctypes.c_int64(len(a)), pointer(a), pointer(b), pointer(out))
    np.testing.assert_array_equal(out, arithmetic.saturating_rounding_doubling_high_mul(a, b))
    x, exponent = a.astype(np.int64), rng.integers(0, 32, len(a)).astype(np.int32)
    shim.divide(ctypes.c_int64(len(a)), pointer(x), pointer(exponent), pointer(out))
    np.testing.assert_array_equal(out, arithmetic.rounding_divide_by_pot(x, exponent))


@pytest.mark.parametrize("length", [1, 2, 1000, 60000])
def test_softmax_is_the_definition(shim: ctypes.CDLL, length: int) -> None:
    rng = np.random.default_rng(length)
    table, inverse_scale = arithmetic.softmax_tables(0.05, 1 / 256)
    x = rng.integers(-128, 128, length)
    expected = arithmetic.softmax(x[None], table, inverse_scale, -128, (-(2**31), 2**31 - 1), np.int64)[0]
    exponentials = np.ascontiguousarray(table[x.max() - x])
    out = np.empty(length, np.int64)
    total = ctypes.c_int64(int(exponentials.astype(np.int64).sum()))
    shim.softmax(ctypes.c_int64(length), pointer(exponentials), total, inverse_scale, -128, pointer(out))
    np.testing.assert_array_equal(out, expected)


# --- the log ------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(library: Path) -> Iterator[tuple[ctypes.CDLL, Log]]:
    log = Log(library)
    log.reset()
    simulator = ctypes.CDLL(str(library))
    simulator.qrt_open(3, 4096)
    yield simulator, log
    simulator.qrt_close()


def test_the_log_decodes_to_the_calls(machine: tuple[ctypes.CDLL, Log]) -> None:
    simulator, log = machine
    for opcode in (isa.LAYER, isa.KERNEL, isa.BARRIER, isa.OFM, isa.SCALES):
        getattr(simulator, f"qrt_{opcode.name}")(*(1 for _ in opcode.arguments))
    commands = list(isa.decode(log.words().tolist()))
    assert [command.opcode.name for command in commands] == ["layer", "kernel", "barrier", "ofm", "scales"]
    assert all(set(command.arguments) <= {1} for command in commands)
    ((region, words),) = log.regions()
    assert region == 3 and np.array_equal(words, log.words())
    log.reset()
    assert len(log.words()) == 0 and log.regions() == []


def test_every_opcode_has_a_function_of_its_arity() -> None:
    header = (STUBS / "abi" / "qrt.h").read_text()
    for opcode in isa.OPCODES:
        _, _, rest = header.partition(f"int32_t qrt_{opcode.name}(")
        arguments = rest.partition(")")[0]
        assert rest and arguments.count("int32_t ") == len(opcode.arguments), opcode.name


def test_dma_and_fill_move_boxes(machine: tuple[ctypes.CDLL, Log]) -> None:
    simulator, log = machine
    source = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    target = np.zeros((3, 2, 4), np.uint8)
    simulator.qrt_bind(1, pointer(source), ctypes.c_int64(source.nbytes))
    simulator.qrt_bind(2, pointer(target), ctypes.c_int64(target.nbytes))
    simulator.qrt_alloc(64, 128)
    simulator.qrt_fill(0, 64, 0, 0, 1, 1, 128, 9)
    simulator.qrt_barrier()
    simulator.qrt_dma(0, 64, 12, 5, 1, 30 + 6 + 1, 30, 12, 3, 2, 4)
    simulator.qrt_barrier()
    simulator.qrt_dma(2, 0, 8, 4, 0, 64, 12, 5, 3, 2, 4)
    simulator.qrt_barrier()
    simulator.qrt_free(64, 128)
    np.testing.assert_array_equal(target, source[1:4, 1:4:2, 1:5])
    assert log.scratchpad_peak() == 192


def test_maps_wrap_around_rolling_buffers(machine: tuple[ctypes.CDLL, Log]) -> None:
    """A 3x3 maximum of rows 4 to 7 of an image that lie in a ring of 5 rows, into rows 2 and 3 of a ring of 3."""
    simulator, _ = machine
    rng = np.random.default_rng(0)
    image = rng.integers(-128, 128, (8, 6, 2)).astype(np.int8)
    simulator.qrt_bind(1, pointer(image), ctypes.c_int64(image.nbytes))
    out = np.zeros((3, 4, 2), np.int8)
    simulator.qrt_bind(2, pointer(out), ctypes.c_int64(out.nbytes))
    simulator.qrt_alloc(0, 60)
    simulator.qrt_alloc(100, 24)
    simulator.qrt_fill(0, 100, 0, 0, 1, 1, 24, 0)
    for row in range(4, 8):
        simulator.qrt_dma(0, row % 5 * 12, 0, 0, 1, row * 12, 0, 0, 1, 1, 12)
    simulator.qrt_barrier()
    simulator.qrt_ifm(0, 0, 4 * 12, 4, 6, 2, 12, 2, 1, 0, 0)
    simulator.qrt_wrap(0, 1, 0)
    simulator.qrt_ofm(0, 100 + 2 * 8, 2, 4, 2, 8, 2, 0, 0, -128, 127)
    simulator.qrt_wrap(2, 1, 100)
    simulator.qrt_kernel(3, 3, 1, 1, 1, 1, 0, 0)
    simulator.qrt_max_pool()
    simulator.qrt_barrier()
    simulator.qrt_dma(2, 0, 0, 0, 0, 100, 0, 0, 1, 1, 24)
    simulator.qrt_barrier()
    simulator.qrt_free(0, 60)
    simulator.qrt_free(100, 24)
    windows = np.lib.stride_tricks.sliding_window_view(image[4:], (3, 3), (0, 1)).max((-1, -2))
    np.testing.assert_array_equal(out, np.stack([windows[1], np.zeros((4, 2)), windows[0]]))


def test_setting_a_map_ends_its_wrap(machine: tuple[ctypes.CDLL, Log]) -> None:
    simulator, _ = machine
    simulator.qrt_alloc(0, 16)
    simulator.qrt_alloc(32, 4)
    simulator.qrt_ifm(0, 0, 0, 2, 1, 2, 2, 2, 1, 0, 0)
    simulator.qrt_wrap(0, 1, 4000)  # outside everything: an operation would abort
    simulator.qrt_ifm(0, 0, 0, 2, 1, 2, 2, 2, 1, 0, 0)
    simulator.qrt_ofm(0, 32, 2, 1, 2, 2, 2, 0, 0, -128, 127)
    simulator.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0)
    simulator.qrt_max_pool()
    simulator.qrt_barrier()
    simulator.qrt_free(0, 16)
    simulator.qrt_free(32, 4)


# --- violations ---------------------------------------------------------------------------------------------

PRELUDE = """
import ctypes, sys
s = ctypes.CDLL(sys.argv[1])
buffer = ctypes.create_string_buffer(100)
s.qrt_open(0, 1024)
s.qrt_bind(1, buffer, ctypes.c_int64(100))
s.qrt_alloc(0, 256)
s.qrt_alloc(512, 256)
"""

VIOLATIONS = [
    # what is wrong, calls after the prelude (commands 0 and 1 are its allocs), the message
    ("external read", "s.qrt_dma(0, 0, 0, 0, 1, 90, 0, 0, 1, 1, 11)",
     "command 2 (dma): the source is bytes 90 to 101 of base 1, which has 100"),
    ("external write", "s.qrt_fill(1, 0, 0, 60, 1, 2, 41, 0)",
     "command 2 (fill): the destination is bytes 0 to 101 of base 1, which has 100"),
    ("negative offset", "s.qrt_fill(1, -1, 0, 0, 1, 1, 5, 0)", "command 2 (fill): the destination is bytes -1 to 4"),
    ("unbound base", "s.qrt_fill(7, 0, 0, 0, 1, 1, 1, 0)", "command 2 (fill): base 7 is not bound"),
    ("unreserved scratchpad", "s.qrt_fill(0, 300, 0, 0, 1, 1, 4, 0)",
     "command 2 (fill): the destination is scratchpad bytes 300 to 304, inside no reservation"),
    ("two reservations at once", "s.qrt_fill(0, 250, 0, 0, 1, 1, 300, 0)", "inside no reservation"),
    ("freed scratchpad", "s.qrt_free(0, 256); s.qrt_fill(0, 0, 0, 0, 1, 1, 4, 0)", "command 3 (fill)"),
    ("overlapping reservations", "s.qrt_alloc(255, 16)", "command 2 (alloc): 16 bytes at 255 overlap the reservation"),
    ("reservation beyond the end", "s.qrt_alloc(1000, 32)", "command 2 (alloc): 32 bytes at 1000 do not fit"),
    ("free of what is not reserved", "s.qrt_free(0, 128)", "command 2 (free): 128 bytes at 0 are not reserved"),
    ("write after write", "s.qrt_fill(0, 0, 0, 0, 1, 1, 8, 0); s.qrt_fill(0, 7, 0, 0, 1, 1, 8, 0)",
     "command 3 (fill): the destination (bytes 7 to 15 of base 0) races with command 2"),
    ("read after write", "s.qrt_fill(0, 0, 0, 0, 1, 1, 8, 0); s.qrt_dma(1, 0, 0, 0, 0, 4, 0, 0, 1, 1, 8)",
     "command 3 (dma): the source (bytes 4 to 12 of base 0) races with command 2"),
    ("interleaved rows that meet",
     "s.qrt_fill(0, 0, 0, 8, 1, 9, 4, 0); s.qrt_fill(0, 3, 0, 16, 1, 4, 2, 0)", "races with command 2"),
    ("copy onto itself", "s.qrt_dma(0, 4, 0, 0, 0, 0, 0, 0, 1, 1, 8)", "the source overlaps the destination"),
    ("channels that do not match",
     "s.qrt_ifm(0, 0, 0, 2, 2, 4, 8, 4, 1, 0, 0); s.qrt_ofm(0, 512, 2, 2, 5, 10, 5, 0, 0, -128, 127);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_max_pool()", "command 5 (max_pool): the IFM has 4 channels"),
    ("groups that do not divide",
     "s.qrt_ifm(0, 0, 0, 2, 2, 4, 8, 4, 1, 0, 0); s.qrt_ofm(0, 512, 2, 2, 6, 12, 6, 0, 0, -128, 127);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_conv(4, 4)", "command 5 (conv): groups of 4 and 4 channels"),
    ("weights outside",
     "s.qrt_ifm(0, 0, 0, 2, 2, 4, 8, 4, 1, 0, 0); s.qrt_ofm(0, 512, 2, 2, 6, 12, 6, 0, 0, -128, 127);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_scales(1, 0, 1); s.qrt_weights(1, 80, 0, 0, 0); s.qrt_conv(4, 6)",
     "command 7 (conv): the weights is bytes 80 to 104 of base 1"),
    ("a wrapped part outside",
     "s.qrt_ifm(0, 0, 240, 4, 1, 4, 4, 4, 1, 0, 0); s.qrt_wrap(0, 2, 256);"
     "s.qrt_ofm(0, 512, 4, 1, 4, 4, 4, 0, 0, 0, 9); s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_max_pool()",
     "command 6 (max_pool): the IFM is scratchpad bytes 256 to 264, inside no reservation"),
    ("a write into the wrapped part",
     "s.qrt_fill(0, 4, 0, 0, 1, 1, 4, 0);"
     "s.qrt_ifm(0, 0, 240, 4, 1, 4, 4, 4, 1, 0, 0); s.qrt_wrap(0, 2, 0); s.qrt_ofm(0, 512, 4, 1, 4, 4, 4, 0, 0, 0, 9);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_max_pool()",
     "command 7 (max_pool): the IFM (bytes 0 to 8 of base 0) races with command 2"),
    ("an output that wraps onto what is read",
     "s.qrt_dma(1, 0, 0, 0, 0, 512, 0, 0, 1, 1, 4);"
     "s.qrt_ifm(0, 0, 0, 4, 1, 4, 4, 4, 1, 0, 0); s.qrt_ofm(0, 600, 4, 1, 4, 4, 4, 0, 0, 0, 9); s.qrt_wrap(2, 3, 512);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_max_pool()",
     "command 7 (max_pool): the OFM (bytes 512 to 516 of base 0) races with command 2"),
    ("a wrap of no map", "s.qrt_wrap(3, 0, 0)", "command 2 (wrap): there is no map 3"),
    ("a 16-bit map with a zero point",
     "s.qrt_ifm(0, 0, 0, 2, 2, 4, 16, 8, 2, 2, 1); s.qrt_ofm(0, 512, 2, 2, 4, 16, 8, 2, 0, -128, 127);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_max_pool()", "command 5 (max_pool): the IFM has the zero point 1"),
    ("a 16-bit map beyond its reservation",
     "s.qrt_ifm(0, 0, 0, 4, 8, 5, 80, 10, 2, 2, 0); s.qrt_ofm(0, 512, 4, 8, 5, 80, 10, 2, 0, -128, 127);"
     "s.qrt_kernel(1, 1, 1, 1, 1, 1, 0, 0); s.qrt_max_pool()",
     "command 5 (max_pool): the IFM is scratchpad bytes 0 to 320, inside no reservation"),
    ("a table for 16 bits",
     "s.qrt_ifm(0, 0, 0, 2, 2, 4, 16, 8, 2, 2, 0); s.qrt_ofm(0, 512, 2, 2, 4, 8, 4, 0, 0, -128, 127);"
     "s.qrt_lookup(0, 0)", "command 4 (lookup): the IFM and the OFM are of different widths"),
    ("groups of bytes", "s.qrt_weights(1, 0, 0, 0, 8)", "groups are of int4, int2 or int1 weights"),
    ("outstanding commands", "s.qrt_fill(0, 0, 0, 0, 1, 1, 8, 0); s.qrt_close()", "(close): commands are outstanding"),
    ("reservations at the end", "s.qrt_close()", "(close): 2 reservations were not freed"),
    ("no region", "s.qrt_free(0, 256); s.qrt_free(512, 256); s.qrt_close(); s.qrt_barrier()", "no region is open"),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "message"), [case[1:] for case in VIOLATIONS], ids=[case[0] for case in VIOLATIONS])
def test_a_violation_aborts_and_names_the_command(library: Path, calls: str, message: str) -> None:
    script = PRELUDE + calls
    done = subprocess.run([sys.executable, "-c", script, str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == -6, done.stderr
    assert "npu_sim: " in done.stderr and message in done.stderr


def test_interleaved_rows_that_do_not_meet_are_no_race(machine: tuple[ctypes.CDLL, Log]) -> None:
    simulator, _ = machine
    simulator.qrt_alloc(0, 256)
    simulator.qrt_fill(0, 0, 64, 8, 2, 8, 4, 1)
    simulator.qrt_fill(0, 4, 64, 8, 2, 8, 4, 2)
    simulator.qrt_barrier()
    simulator.qrt_fill(0, 2, 64, 8, 2, 8, 4, 3)
    simulator.qrt_barrier()
    simulator.qrt_free(0, 256)


# --- building -----------------------------------------------------------------------------------------------


def test_the_object_is_reproducible(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "another longer name"]
    for folder in folders:
        folder.mkdir()
    first, second = (compile_simulator(folder).read_bytes() for folder in folders)
    assert first == second


def test_it_is_portable_c99_without_warnings(tmp_path: Path) -> None:
    command = [c_compiler(), "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, f"-I{STUBS / 'abi'}", str(STUBS / "simulator" / "npu_sim.c")], check=True)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(QCompilerError, match=r"no C compiler found.*CC"):
        c_compiler()


def test_a_failing_compiler_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="could not build the NPU simulator"):
        compile_simulator(tmp_path / "missing")
