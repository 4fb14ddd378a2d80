"""What a search leaves on disk."""

import json
import os
from pathlib import Path

from qcompiler.errors import QCompilerError
from qcompiler.formats_file import write_formats
from qcompiler.search.results import as_csv
from qcompiler.search.search import Found
from qcompiler.views.front import front_page

FORMATS, FRONT_JSON, FRONT_CSV, FRONT_PAGE = "formats.json", "front.json", "front.csv", "front.html"


def save(found: Found, folder: str | os.PathLike[str]) -> Path:
    """Write the front as JSON, CSV and a page, and the chosen formats for `qcompile --formats`.

    Returns:
        The file of the chosen formats.

    Raises:
        QCompilerError: the folder cannot be written.
    """
    place = Path(folder)
    result = found.search
    texts = {
        FRONT_JSON: json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n",
        FRONT_CSV: as_csv(result),
        FRONT_PAGE: front_page(result),
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (place / name).write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise QCompilerError(f"cannot write into {place}: {error.strerror}.") from None
    write_formats(place / FORMATS, found.options, model=result.model, target=result.target)
    return place / FORMATS
