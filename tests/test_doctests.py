"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import fedinfer

MODULES = [m.name for m in pkgutil.walk_packages(fedinfer.__path__, "fedinfer.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert sum(len(doctest.DocTestFinder().find(importlib.import_module(name))) > 0 for name in MODULES) > 10
