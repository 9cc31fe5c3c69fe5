"""One run as `report.json` and as a page that needs nothing else."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedinfer.errors import NonFinite
from fedinfer.files import replace_file

__all__ = ["write_report"]


def write_report(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`; return both paths.

    Every section of `report` may be missing or None: the page leaves it out. Byte counts of `headline.hospitals` are of
    the whole training, those of `encrypted_query` of one query.

    Guarantees: each file is whole or as before; the same report makes the same bytes; text from `report` cannot become
    markup.
    Raises: NonFinite, with nothing written, if a number is NaN or infinite.
    """
    from fedinfer.report.page import render_page

    for place in _non_finite(report, "report"):
        raise NonFinite(f"{place}: got NaN or infinity, expected a finite number, or None where there is none")
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # The page shows what the file says: both come from the same text.
    page = render_page(json.loads(text))
    json_path, html_path = folder / "report.json", folder / "report.html"
    # A file name may hold bytes that are no UTF-8; as an escape it stays valid in either format.
    replace_file(json_path, text.encode("utf-8", "backslashreplace"))
    replace_file(html_path, page.encode("utf-8", "xmlcharrefreplace"))
    return json_path, html_path


def _non_finite(value: object, place: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _non_finite(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _non_finite(item, f"{place}[{index}]")
