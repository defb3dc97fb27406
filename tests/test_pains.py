"""Every promise in the table of docs/guarantees.md has a test that carries its number."""

import ast
import re
import tomllib
from functools import cache

import pytest
from test_house import PACKAGES, ROOT, SOURCES, imports, tree

ROW = re.compile(r"^\| (\d{2}) \| .+ \| `(test_\w+)` \|$", re.MULTILINE)
CLAIMED = dict(ROW.findall((ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")))
KERNELS = {"flash_attn", "xformers", "deepspeed", "triton", "vllm", "unsloth", "apex", "liger_kernel"}
"""What has to be compiled, or fits one version of a driver."""
BROUGHT = {"numpy", "pyarrow", "tokenizers", "huggingface_hub", "pydantic_core", "typing_extensions"}
"""What torch, transformers, datasets and pydantic cannot do without themselves."""
ASKED_FOR = {"deepspeed": "zero", "jsonschema": "graders", "langdetect": "graders"}
"""What only one setting uses, and the extra that brings it; nothing imports it before it is asked for."""
OTHER_NAMES = {"ruamel": "ruamel.yaml"}


@cache
def names_of_tests() -> set[str]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    functions = [node for file in files for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


def test_the_table_is_read() -> None:
    expected = [
        "01",
        "02",
        "05",
        "06",
        "07",
        "08",
        "09",
        "10",
        "11",
        "12",
        "13",
        "14",
        "15",
        "16",
        "17",
        "19",
        "20",
        "22",
        "23",
        "24",
        "25",
    ]
    assert sorted(CLAIMED) == expected


@pytest.mark.parametrize("number", sorted(CLAIMED))
def test_every_promise_has_a_test_with_its_number(number: str) -> None:
    assert CLAIMED[number] in names_of_tests() and CLAIMED[number].startswith(f"test_pain_{number}_")


def third_party() -> set[str]:
    """Return the top-level packages that the project imports, its own and the standard library left out."""
    import sys

    names = {name.partition(".")[0] for file in SOURCES for name in imports(file)}
    return names - {*PACKAGES, *sys.stdlib_module_names}


def requirements(name: str) -> set[str]:
    """Return the names that a list of pyproject.toml requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project[name] if name == "dependencies" else project["optional-dependencies"][name]
    return {re.split(r"[<>=;\s]", line)[0] for line in wanted}


def test_pain_19_one_install_of_wheels_is_all_that_is_imported() -> None:
    needed = {OTHER_NAMES.get(name, name) for name in third_party()}
    needed -= BROUGHT | ASKED_FOR.keys()
    assert needed <= requirements("dependencies"), "imported, but not required"
    assert all(name in requirements(extra) for name, extra in ASKED_FOR.items())
    at_top = {
        name.split(".")[0]
        for file in SOURCES
        for node in tree(file).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        )
    }
    assert not at_top & ASKED_FOR.keys(), "imported by all"
    assert not KERNELS & {name.replace("-", "_") for name in requirements("dependencies")}
    assert not (KERNELS - ASKED_FOR.keys()) & third_party(), (
        "an accelerator that not everybody has is imported"
    )


def test_pain_19_every_requirement_is_pinned_in_the_tested_set() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines if "==" in line}
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in requirements("dependencies")}
    assert wanted - pinned == set()
