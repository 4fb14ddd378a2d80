"""The command table and its decoder."""

import numpy as np
import pytest

from qcompiler.simulator import isa


def test_codes_and_names_are_unique() -> None:
    assert len({opcode.code for opcode in isa.OPCODES}) == len(isa.OPCODES) == len(isa.BY_CODE)
    assert len({opcode.name for opcode in isa.OPCODES}) == len(isa.OPCODES)
    for opcode in isa.OPCODES:
        assert len(set(opcode.arguments)) == len(opcode.arguments), opcode.name


def test_decode_inverts_the_words_of_random_commands() -> None:
    generator = np.random.default_rng(20)
    opcodes = [isa.OPCODES[index] for index in generator.integers(len(isa.OPCODES), size=400)]
    arguments = [tuple(generator.integers(-(1 << 31), 1 << 31, size=len(opcode.arguments))) for opcode in opcodes]
    words = [word for opcode, args in zip(opcodes, arguments, strict=True) for word in (opcode.code, *args)]
    decoded = list(isa.decode(np.array(words, np.int32)))  # pyright: ignore[reportArgumentType]
    assert [command.index for command in decoded] == list(range(400))
    assert [command.opcode for command in decoded] == opcodes
    assert [command.arguments for command in decoded] == [tuple(map(int, args)) for args in arguments]


def test_arguments_by_name() -> None:
    (command,) = isa.decode([isa.ALLOC.code, 64, 1024])
    assert (command["offset"], command["bytes"]) == (64, 1024)


def test_an_unknown_code_is_an_error() -> None:
    with pytest.raises(KeyError):
        list(isa.decode([999]))
