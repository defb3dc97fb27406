"""Examples in docstrings give what they show."""

import doctest
import importlib

from test_house import MODULES


def test_every_example_is_right() -> None:
    names = [name for name, file in MODULES.items() if ">>> " in file.read_text(encoding="utf-8")]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert {name: result for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted for result in results.values()) > 80
