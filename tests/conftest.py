"""Shared fixtures."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of real models, or a skip that says where it was looked for."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "zoo"
    folder = Path(os.environ.get("QCOMPILER_ZOO", default))
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"no model zoo in {folder}; set QCOMPILER_ZOO to its folder")
    return folder
