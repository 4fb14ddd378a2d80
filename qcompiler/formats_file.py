"""Formats by layer as a file: what `qcompile search` writes and `--formats FILE` reads."""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcompiler.errors import QCompilerError
from qcompiler.options import Options
from qcompiler.quant.types import HalfType, WeightRequest


class FormatsFile(BaseModel):
    """JSON. `formats` has the fields of `WeightRequest`, those that are left out as by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = ""
    """File name of the model it was made for, for people to read."""
    target: str = ""
    formats: WeightRequest
    keep_float: tuple[str, ...] = Field(default=(), alias="float")
    """Names of layers left in float."""
    half: Mapping[str, HalfType] = Field(default_factory=dict)
    """Layers in 16-bit floats."""


def write_formats(file: str | os.PathLike[str], options: Options, *, model: str, target: str) -> None:
    """Write the formats that options ask for. Raises QCompilerError if the file cannot be written."""
    held = FormatsFile(
        model=model, target=target, formats=options.formats, float=tuple(options.keep_float), half=options.half
    )
    try:
        Path(file).write_text(held.model_dump_json(indent=1, by_alias=True) + "\n", "utf-8", newline="\n")
    except OSError as error:
        raise QCompilerError(f"cannot write {file}: {error.strerror}.") from None


def read_formats(file: str | os.PathLike[str]) -> FormatsFile:
    """Raises QCompilerError if it is not such a file."""
    try:
        return FormatsFile.model_validate_json(Path(file).read_bytes())
    except OSError as error:
        raise QCompilerError(f"--formats {file}: {error.strerror}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise QCompilerError(
            f"--formats {file} is no file of formats{f' at {where}' if where else ''}: {first['msg']}. "
            "`qcompile search` writes such files."
        ) from None
