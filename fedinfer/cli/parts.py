"""The device's and the operator's side, by the name that they have here.

In a checkout the folders `clients/` and `server/` are packages of those names; a wheel carries them as
`fedinfer_clients` and `fedinfer_server`, so that nobody gets a package called `server`. A process uses one of the two.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType


def part(name: str) -> ModuleType:
    """Import `name`, such as "clients.sdk", under whichever of its two names this process uses."""
    folder, _, module = name.partition(".")
    beside = Path(__file__).parents[2] / folder / "__init__.py"
    spec = importlib.util.find_spec(folder)
    ours = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == beside.resolve()
    return importlib.import_module(f"{folder if ours else f'fedinfer_{folder}'}.{module}")
