"""Write a lowered model as a folder of C that `make` builds.

====================  ==========================================================================================
model.h               the interface: sizes, quantization, model_run and the conversions from and to float
model.c               the arena and the calls; model_weights.c: the constants; model_kernels.h: declarations of both
model_kernels.o       TVM's kernels for the chip, or model_kernels.c where the spec asks for C
test_vectors.[ch]     inputs and the outputs the numpy reference has for them
main.c, board…        the example program and what it needs of the board (`runtime_stubs/baremetal`)
Makefile              builds libmodel.a and model.elf; `make run` runs it in the emulator
====================  ==========================================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from qcompiler.backends.base import host_code
from qcompiler.backends.mcu import ArenaPlace, Call, ConstantPlace, Copy, InputPlace, McuProgram, Place, Port
from qcompiler.backends.mcu_functions import RawFunction, c_source, generate, is_llvm
from qcompiler.backends.npu_memory import aligned
from qcompiler.errors import QCompilerError
from qcompiler.target import BareMetal, Host, did_you_mean

FLOAT_TOLERANCE = 1e-5
"""Of the largest element: floats follow exponentials, whose last bits are the C library's."""

_LINE = 110
_BOARDS = "baremetal"

_C_TYPES: Mapping[str, str] = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "int64": "int64_t",
    "bool": "int8_t",
    "float32": "float",
    "float64": "double",
}


@dataclass(frozen=True)
class TestVector:
    """One sample, as `model_run` takes and gives it: arrays in the order of the program's ports."""

    __test__ = False
    """Not a test class, whatever pytest thinks of the name."""

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]


def write_c(folder: Path, program: McuProgram, host: Host, vectors: Sequence[TestVector]) -> None:
    """Write all files into an existing folder. `host.bare_metal` must be given."""
    assert host.bare_metal is not None
    target = host_code(host).target
    _write(folder / "model.h", _header(program))
    _write(folder / "model.c", _glue(program))
    _write(folder / "model_kernels.h", _kernels_header(program))
    _write(folder / "model_weights.c", _weights(program))
    module = generate(program.module.module, target)
    if is_llvm(target):
        module.write_to_file(str(folder / "model_kernels.o"))
    else:
        _write(folder / "model_kernels.c", c_source(module, program.module.functions))
    _write(folder / "test_vectors.h", _vectors_header(vectors))
    _write(folder / "test_vectors.c", _vectors_source(program, vectors))
    boards = files("qcompiler.runtime_stubs") / _BOARDS
    with as_file(boards) as stubs:
        _copy_board(stubs, host.bare_metal.board, folder)
    _write(folder / "Makefile", _makefile(host.bare_metal, compiled=is_llvm(target)))


def _write(file: Path, text: str) -> None:
    file.write_text(text, "utf-8", newline="\n")


def _copy_board(stubs: Path, board: str, folder: Path) -> None:
    """The example and the board's own files; shared sources only if the board's makefile names them."""
    known = tuple(sorted(path.parent.name for path in stubs.glob("*/board.mk")))
    if board not in known:
        raise QCompilerError(
            f"host.bare_metal.board is {board!r}; runtime_stubs/{_BOARDS} has no such board{did_you_mean(board, known)}"
        )
    own = sorted((stubs / board).iterdir())
    makefile = (stubs / board / "board.mk").read_text("utf-8")
    shared = [stubs / name for name in ("board.h", "main.c")]
    shared += [file for file in sorted(stubs.glob("*.c")) if file.name in makefile.split()]
    for file in [*own, *shared]:
        if file.suffix in (".c", ".h", ".ld", ".mk"):
            _write(folder / file.name, file.read_text("utf-8"))


# --- arrays ------------------------------------------------------------------------------------------------


def _array(name: str, array: np.ndarray, alignment: int, *, linkage: str = "") -> str:
    numbers = array.reshape(-1).tolist()
    if array.dtype.kind == "f":
        # Hexadecimal floats are exact; C has no literal for infinities.
        words = [_float(number, suffix="f" if array.dtype == np.float32 else "") for number in numbers]
    else:
        words = [str(int(number)) for number in numbers]
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) + 1 > _LINE:
            lines.append(line)
            line = ""
        line += f"{word},"
    body = "\n".join([*lines, line])
    kind = _C_TYPES[str(array.dtype)]
    return f"{linkage}const _Alignas({alignment}) {kind} {name}[{max(array.size, 1)}] = {{\n{body}\n}};\n"


def _float(number: float, suffix: str) -> str:
    if np.isnan(number):
        return '__builtin_nanf("")'
    if np.isinf(number):
        return "-__builtin_inff()" if number < 0 else "__builtin_inff()"
    return f"{number.hex()}{suffix}"


def _weights(program: McuProgram) -> str:
    parts = ['#include "model_kernels.h"\n']
    parts += [
        _array(f"model_constant{index}", array, program.alignment) for index, array in enumerate(program.constants)
    ]
    return "\n".join(parts)


# --- model.h -----------------------------------------------------------------------------------------------


def _header(program: McuProgram) -> str:
    lines = [
        "/* A compiled model. Static memory only; not reentrant: calls share one arena. */",
        "#ifndef MODEL_H",
        "#define MODEL_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        "/* Scratch memory in .bss, and the constants' share of read-only memory. */",
        f"#define MODEL_ARENA_BYTES {program.arena.peak}",
        f"#define MODEL_CONSTANT_BYTES {program.constant_bytes}",
        f"#define MODEL_INPUTS {len(program.inputs)}",
        f"#define MODEL_OUTPUTS {len(program.outputs)}",
        "",
    ]
    for kind, ports in (("INPUT", program.inputs), ("OUTPUT", program.outputs)):
        for index, port in enumerate(ports):
            lines += _port_lines(f"MODEL_{kind}{index}", port)
    lines += [
        "/* All buffers passed here start at multiples of this: kernels load whole vectors. */",
        f"#define MODEL_ALIGNMENT {program.alignment}",
        "",
        "/* Run the model once. Returns 0. */",
        f"int model_run({_run_parameters(program)});",
        "",
    ]
    lines += [f"{declaration};" for declaration in _border_declarations(program)]
    lines += [
        "",
        "#ifdef MODEL_PROFILE",
        "/* Yours to define: called after each kernel with its name. */",
        "void model_step(const char *kernel);",
        "#endif",
    ]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "#endif", ""]
    return "\n".join(lines)


def _port_lines(prefix: str, port: Port) -> list[str]:
    shape = "x".join(map(str, port.shape)) or "scalar"
    lines = [
        f"/* {_comment(port.name)}: {port.dtype} {shape} */",
        f"#define {prefix}_TYPE {_C_TYPES[port.dtype]}",
        f"#define {prefix}_ELEMENTS {port.elements}",
    ]
    if port.quantization is not None:
        lines += [
            f"#define {prefix}_SCALE {_float(float(np.float32(port.quantization.scale)), 'f')}"
            f" /* {port.quantization.scale:.9g}: real = (q - zero point) * scale */",
            f"#define {prefix}_ZERO_POINT ({port.quantization.zero_point})",
        ]
    return [*lines, ""]


def _comment(name: str) -> str:
    """A name from the user's file, made unable to end the comment it stands in."""
    return "".join(letter if letter.isprintable() else "?" for letter in name).replace("*/", "* /")


def _run_parameters(program: McuProgram) -> str:
    inputs = [f"const {_C_TYPES[port.dtype]} *input{index}" for index, port in enumerate(program.inputs)]
    outputs = [f"{_C_TYPES[port.dtype]} *output{index}" for index, port in enumerate(program.outputs)]
    return ", ".join([*inputs, *outputs]) or "void"


def _border_declarations(program: McuProgram) -> list[str]:
    declared = [
        f"void {port.border.function}(const float *real, {_C_TYPES[port.dtype]} *quantized)"
        for port in program.inputs
        if port.border is not None
    ]
    declared += [
        f"void {port.border.function}(const {_C_TYPES[port.dtype]} *quantized, float *real)"
        for port in program.outputs
        if port.border is not None
    ]
    return declared


# --- model.c -----------------------------------------------------------------------------------------------


def _kernels_header(program: McuProgram) -> str:
    lines = ["/* TVM's kernels and the model's constants: what model.c calls and passes. */"]
    lines += ["#ifndef MODEL_KERNELS_H", "#define MODEL_KERNELS_H", "", "#include <stdint.h>", ""]
    lines += [f"{_prototype(function)};" for function in program.module.functions]
    lines += [
        f"extern const {_C_TYPES[str(array.dtype)]} model_constant{index}[{max(array.size, 1)}];"
        for index, array in enumerate(program.constants)
    ]
    return "\n".join([*lines, "", "#endif", ""])


def _prototype(function: RawFunction) -> str:
    pointers = [f"{_C_TYPES[argument.dtype]} *{argument.name}" for argument in function.arguments]
    pointers += ["uint8_t *workspace"] if function.workspace else []
    return f"void {function.name}({', '.join(pointers)})"


def _glue(program: McuProgram) -> str:
    kinds = {function.name: function for function in program.module.functions}
    lines = ['#include "model.h"', "", "#include <string.h>", "", '#include "model_kernels.h"', ""]
    if program.arena.peak:
        lines += [f"static _Alignas({program.alignment}) uint8_t arena[MODEL_ARENA_BYTES];", ""]
    lines += ["#ifdef MODEL_PROFILE", "#define STEP(kernel) model_step(kernel)", "#else"]
    lines += ["#define STEP(kernel) ((void)0)", "#endif", ""]
    lines += [f"int model_run({_run_parameters(program)}) {{"]
    for step in program.steps:
        if isinstance(step, Call):
            lines += [f"    {_call(step, kinds, program)};", f'    STEP("{step.function}");']
        else:
            lines += [f"    {_copy(step, program)};"]
    lines += ["    return 0;", "}"]
    for declaration, port in zip(
        _border_declarations(program),
        [port for port in (*program.inputs, *program.outputs) if port.border is not None],
        strict=True,
    ):
        assert port.border is not None
        function = kinds[port.border.kernel]
        into = declaration.startswith("void model_quantize")
        values = ["real", "quantized"] if into else ["quantized", "real"]
        given = [values[0], *(f"model_constant{index}" for index in port.border.constants), values[1]]
        lines += ["", f"{declaration} {{", f"    {_invocation(function, given)};", "}"]
    return "\n".join([*lines, ""])


def _call(step: Call, functions: Mapping[str, RawFunction], program: McuProgram) -> str:
    return _invocation(functions[step.function], [_expression(place, program) for place in step.arguments])


def _invocation(function: RawFunction, values: Sequence[str]) -> str:
    """A call; kernels take pointers without const, and write only where they should."""
    kinds = [_C_TYPES[argument.dtype] for argument in function.arguments] + ["uint8_t"] * bool(function.workspace)
    return f"{function.name}({', '.join(f'({kind} *){value}' for kind, value in zip(kinds, values, strict=True))})"


def _copy(step: Copy, program: McuProgram) -> str:
    return f"memcpy({_expression(step.destination, program)}, {_expression(step.source, program)}, {step.bytes})"


def _expression(place: Place, program: McuProgram) -> str:
    if isinstance(place, InputPlace):
        return f"input{place.index}"
    if isinstance(place, ConstantPlace):
        return f"model_constant{place.index}"
    if isinstance(place, ArenaPlace):
        return f"(arena + {program.arena.offset_of(place.name)})"
    return f"output{place.index}"


# --- test vectors ------------------------------------------------------------------------------------------


def _vectors_header(vectors: Sequence[TestVector]) -> str:
    return "\n".join(
        [
            "/* Samples and what the model must answer. */",
            "#ifndef TEST_VECTORS_H",
            "#define TEST_VECTORS_H",
            "",
            "#include <stdint.h>",
            "",
            f"#define TEST_VECTORS {len(vectors)}u",
            "",
            "/* Run the model on a sample; its outputs stay until the next call. */",
            "void test_vector_run(uint32_t sample);",
            "",
            "/* Whether the outputs are those expected: integers exactly, floats within "
            f"{FLOAT_TOLERANCE:g} of the largest. */",
            "int test_vector_equal(uint32_t sample);",
            "",
            "#endif",
            "",
        ]
    )


def _vectors_source(program: McuProgram, vectors: Sequence[TestVector]) -> str:
    parts = ['#include "test_vectors.h"', "", '#include "model.h"', ""]
    for index, port in enumerate(program.inputs):
        arrays = [vector.inputs[index] for vector in vectors]
        parts.append(_vector_array(f"input{index}", port, arrays, program.alignment))
    for index, port in enumerate(program.outputs):
        arrays = [vector.outputs[index] for vector in vectors]
        parts.append(_vector_array(f"expected{index}", port, arrays, program.alignment))
        parts.append(f"static _Alignas(MODEL_ALIGNMENT) {_C_TYPES[port.dtype]} output{index}[{port.elements}];\n")
    given = [
        f"input{index} + sample * {_stride(port, program.alignment)}u" for index, port in enumerate(program.inputs)
    ]
    given += [f"output{index}" for index in range(len(program.outputs))]
    parts += [f"void test_vector_run(uint32_t sample) {{ model_run({', '.join(given)}); }}", ""]
    parts += ["int test_vector_equal(uint32_t sample) {"]
    for index, port in enumerate(program.outputs):
        parts += _comparison(index, port, program.alignment)
    parts += ["    return 1;", "}", ""]
    return "\n".join(parts)


def _vector_array(name: str, port: Port, arrays: Sequence[np.ndarray], alignment: int) -> str:
    joined = np.zeros((max(len(arrays), 1), _stride(port, alignment)), port.dtype)
    for row, array in zip(joined, arrays, strict=False):
        row[: port.elements] = array.reshape(-1)
    return _array(name, joined, alignment, linkage="static ")


def _stride(port: Port, alignment: int) -> int:
    """Elements from one sample to the next, whose start is aligned."""
    return aligned(port.bytes, alignment) // np.dtype(port.dtype).itemsize


def _comparison(index: int, port: Port, alignment: int) -> list[str]:
    got, wanted = f"output{index}[i]", f"expected{index}[sample * {_stride(port, alignment)}u + i]"
    loop = f"    for (uint32_t i = 0; i < {port.elements}u; i++)"
    if not port.dtype.startswith("float"):
        return [f"{loop} {{", f"        if ({got} != {wanted}) return 0;", "    }"]
    return [
        f"    float largest{index} = 0;",
        f"{loop} {{",
        f"        const float size = {wanted} < 0 ? -{wanted} : {wanted};",
        f"        if (size > largest{index}) largest{index} = size;",
        "    }",
        f"{loop} {{",
        f"        const float error = {got} - {wanted};",
        f"        const float limit = {FLOAT_TOLERANCE:g}f * largest{index};",
        "        if (!(error <= limit && error >= -limit)) return 0;",
        "    }",
    ]


# --- Makefile ----------------------------------------------------------------------------------------------


def _makefile(chip: BareMetal, *, compiled: bool) -> str:
    prefix = chip.compiler.removesuffix("gcc")
    kernels = "model_kernels.o"
    return "\n".join(
        [
            "# make: libmodel.a and model.elf; make run, make profile: the example in the emulator; make size.",
            f"CC := {chip.compiler}",
            f"AR := {chip.archiver or f'{prefix}ar'}",
            f"SIZE := {chip.size_tool or f'{prefix}size'}",
            f"EMULATOR := {' '.join(_shell_word(word) for word in chip.emulator)}",
            *_needed("$(CC)", chip.compiler_package),
            *(line for tool, package in chip.tools.items() for line in _needed(tool, package)),
            # Integers wrap and floats round as in the reference.
            "CFLAGS := -std=gnu11 -O2 -fwrapv -ffp-contract=off -Wall -Wextra -ffunction-sections -fdata-sections",
            f"CFLAGS += {' '.join(chip.flags)} $(CFLAGS_EXTRA)",
            "include board.mk",
            "",
            f"KERNELS := {kernels}",
            "EXAMPLE := main.o test_vectors.o $(BOARD_SOURCES:.c=.o)",
            "",
            "all: libmodel.a model.elf",
            "",
            "model.elf: $(EXAMPLE) libmodel.a",
            "\t$(CC) $(CFLAGS) $(EXAMPLE) libmodel.a $(BOARD_LDFLAGS) "
            f"{' '.join(['-Wl,--gc-sections', *chip.libraries])} -o $@",
            "",
            "libmodel.a: model.o model_weights.o $(KERNELS)",
            "\trm -f $@",
            "\t$(AR) rcs $@ $^",
            "",
            "$(BOARD_SOURCES:.c=.o): CFLAGS += $(BOARD_CFLAGS)",
            "",
            "%.o: %.c $(wildcard *.h)",
            "\t$(CC) $(CFLAGS) -c $< -o $@",
            "",
            "run: model.elf",
            f"\t@command -v $(firstword $(EMULATOR)) >/dev/null || {{ echo '$(firstword $(EMULATOR)) is missing; "
            f"install {chip.emulator_package} (apt-get install {chip.emulator_package})' >&2; exit 1; }}",
            "\t$(EMULATOR) ./$<",
            "",
            "size: model.elf libmodel.a",
            "\t$(SIZE) -t libmodel.a",
            "\t$(SIZE) model.elf",
            "",
            "profile:",
            "\t$(MAKE) --no-print-directory clean",
            "\t$(MAKE) --no-print-directory run CFLAGS_EXTRA=-DMODEL_PROFILE",
            "\t$(MAKE) --no-print-directory clean",
            "",
            "clean:",
            "\trm -f libmodel.a model.elf model.o model_weights.o $(EXAMPLE)" + ("" if compiled else " $(KERNELS)"),
            "",
            ".PHONY: all run size profile clean",
            "",
        ]
    )


def _needed(tool: str, package: str) -> list[str]:
    """Stop with one line if a tool is missing."""
    return [
        f"ifeq ($(shell command -v {tool}),)",
        f"$(error {tool} is missing; install {package} (apt-get install {package}))",
        "endif",
    ]


def _shell_word(word: str) -> str:
    return f"'{word}'" if any(letter in word for letter in ' ,;&|<>()$`\\"*?') else word
