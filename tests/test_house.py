"""The house's rules, read from the files: who imports whom, how long things are, what is never written."""

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_templates", "finetune", "align")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
SMALL = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
FORBIDDEN = {"data_templates": {"finetune", "align"}, "finetune": {"align"}, "align": set()}
WINGS = (
    "recipe",
    "distributed",
    "adapters",
    "planner",
    "data",
    "generation",
    "training",
    "engines",
    "stages",
)
"""finetune's wings, the lowest first. One import goes upwards: recipe.discovery reads what adapters declare
of themselves (adapters.traits); they declare their settings with recipe.settings and recipe.errors."""
CHECKS = ("assert_close", "assert_allclose", "check_schema", "validate")
"""Functions of libraries that raise where an assertion would."""
COMPARING = {
    "allclose",
    "equal",
    "isclose",
    "gradcheck",
    "startswith",
    "endswith",
    "isdisjoint",
    "isinstance",
}
COMPARING |= {"exists", "is_file", "is_dir", "isfinite", "any", "all", "isnan", "is_correct"}
"""Functions whose truth is a fact: a comparison, a kind, or what is there."""

LONGEST_FILE, LONGEST_FUNCTION = 400, 60
SHORT_FILE = 80
"""A shorter file with one importer is a part of that importer."""
REGISTRIES = ("data_templates", "finetune.adapters", "finetune.graders", "finetune.stages", "align.stages")
REGISTRIES += ("align.preference.losses", "finetune.evaluation.layouts")
"""Folders with one file for each thing that a recipe names; their own parts begin with an underscore."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in SOURCES}


@cache
def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(text(file), str(file))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        yield child
        yield from nodes(child)


def imports(file: Path) -> set[str]:
    """Return the dotted names that a file imports, inside functions too."""
    found: set[str] = set()
    for node in nodes(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(file: Path) -> set[str]:
    """Return the modules of this project that a file imports."""
    own = set()
    for name in imports(file):
        parent = name.rpartition(".")[0]
        own |= {module for module in (name, parent) if module in MODULES}
    return own - {module_name(file)} - set(PACKAGES)


@cache
def import_graph() -> dict[str, set[str]]:
    return {name: own_imports(file) for name, file in MODULES.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, none where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_the_search_for_cycles_finds_one() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_graph_is_the_project_s() -> None:
    assert len(import_graph()) > 50 and sum(map(len, import_graph().values())) > 100
    assert "finetune.adapters.traits" in import_graph()["finetune.recipe.discovery"]
    assert "finetune.training.trainer" in import_graph()["finetune.stages.sft"], (
        "imports inside functions count"
    )


def test_no_import_goes_in_a_circle() -> None:
    assert cycle(import_graph()) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_layers_import_downwards_alone(package: str) -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if name.split(".")[0] == package and other.split(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


def test_templates_need_the_standard_library_alone() -> None:
    import sys

    allowed = {*sys.stdlib_module_names, "data_templates"}
    for name, file in MODULES.items():
        if name.startswith("data_templates"):
            foreign = {imported for imported in imports(file) if imported.split(".")[0] not in allowed}
            assert foreign == set(), name


def test_recipes_hold_no_code() -> None:
    assert list((ROOT / "recipes").rglob("*.py")) == []
    assert len(list((ROOT / "recipes").rglob("*.yaml"))) > 5


def wing(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "finetune" and len(parts) > 1 else ""


@pytest.mark.parametrize(("upper", "lower"), list(pairwise(WINGS[::-1])))
def test_wings_of_finetune_import_downwards_alone(upper: str, lower: str) -> None:
    below = WINGS[: WINGS.index(upper)]
    wrong = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if wing(name) in below and wing(other) == upper and (wing(name), upper) != ("recipe", "adapters")
    ]
    assert wrong == []
    assert any(
        wing(other) in below
        for name in import_graph()
        if wing(name) == upper
        for other in import_graph()[name]
    ), lower


def test_the_planner_has_one_door() -> None:
    used = {other for name in import_graph() if wing(name) != "planner" for other in import_graph()[name]}
    assert {other for other in used if wing(other) == "planner"} == {"finetune.planner.estimate"}


def test_the_recipe_knows_no_adapter_by_name() -> None:
    reached = {other for name in import_graph() if wing(name) == "recipe" for other in import_graph()[name]}
    assert {other for other in reached if wing(other) == "adapters"} == {"finetune.adapters.traits"}


def test_what_adapters_need_of_the_recipe_needs_no_adapter() -> None:
    need = {
        other
        for name in import_graph()
        if wing(name) == "adapters"
        for other in import_graph()[name]
        if wing(other) == "recipe"
    }
    assert need == {"finetune.recipe.settings", "finetune.recipe.errors", "finetune.recipe.compatibility"}
    assert {other for name in need for other in import_graph()[name] if wing(other) == "adapters"} == set()


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(text(file).splitlines()) for file in SMALL}
    assert len(lengths) > 300
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def fragments(lengths: dict[str, int], importers: dict[str, set[str]]) -> list[str]:
    """Return the modules that are parts of their only importer."""
    return [
        f"{name} ({length} lines): fold it into {', '.join(importers[name]) or 'what it is for'}"
        for name, length in lengths.items()
        if length < SHORT_FILE
        and len(importers[name]) <= 1
        and (name.rpartition(".")[0] not in REGISTRIES or name.rpartition(".")[2].startswith("_"))
    ]


def test_fragments_are_found() -> None:
    lengths = {"finetune.a": 79, "finetune.b": 80, "finetune.adapters.c": 20, "finetune.adapters._d": 20}
    importers = {name: {"finetune.e"} for name in lengths}
    assert fragments(lengths, importers) == [
        "finetune.a (79 lines): fold it into finetune.e",
        "finetune.adapters._d (20 lines): fold it into finetune.e",
    ]
    assert fragments({"finetune.a": 79}, {"finetune.a": {"finetune.e", "finetune.f"}}) == []


def test_short_files_have_several_importers() -> None:
    importers: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, file in MODULES.items():
        for node in ast.walk(tree(file)):  # what only a type checker reads counts too
            found: set[str] = set()
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = {f"{node.module}.{alias.name}" for alias in node.names}
            for other in (found | {one.rpartition(".")[0] for one in found}) & MODULES.keys() - {name}:
                importers[other].add(name)
    exempt = {name for name, file in MODULES.items() if file.name in ("__init__.py", "__main__.py")}
    lengths = {name: len(text(file).splitlines()) for name, file in MODULES.items() if name not in exempt}
    assert fragments(lengths, importers) == []


def test_functions_are_short() -> None:
    long = {
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for file in SMALL
        for node in ast.walk(tree(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert long == {}


def test_no_room_is_called_utils() -> None:
    names = {"utils", "util", "helpers", "misc", "common"}
    assert [str(file) for file in SMALL if file.stem.strip("_") in names] == []


def wrong_handlers(file: Path) -> Iterator[str]:
    """Yield the places where a file catches everything in silence, or drops an error."""
    lines = text(file).splitlines()
    for handler in (node for node in ast.walk(tree(file)) if isinstance(node, ast.ExceptHandler)):
        broad = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
        if broad:  # allowed where foreign code raises what it likes, told on the line and raised again
            if "  # " not in lines[handler.lineno - 1]:
                yield f"{file}:{handler.lineno} catches everything and does not say why"
            if not any(isinstance(node, ast.Raise) for node in ast.walk(handler)):
                yield f"{file}:{handler.lineno} catches everything and raises nothing"
        if all(isinstance(node, ast.Pass) for node in handler.body):
            yield f"{file}:{handler.lineno} drops an error"


def test_errors_are_caught_by_name_and_never_dropped() -> None:
    assert [wrong for file in SOURCES for wrong in wrong_handlers(file)] == []


def prints(file: Path) -> Iterator[str]:
    """Yield the places where a file prints without the escapes of the project's own terminal."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "Console", "rich.print", "click.echo", "click.secho") or called.startswith(
                ("sys.stdout.write", "sys.stderr.write")
            ):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {called}"


def test_all_output_is_escaped() -> None:
    # Texts of data, models and files have control characters. These two modules show them as escapes.
    places = [place for file in SOURCES for place in prints(file)]
    assert {place.split(":")[0] for place in places} == {"finetune/recipe/terminal.py"}


def compares(test: ast.expr) -> bool:
    """Tell whether an assertion compares something; ``assert trained(model)`` holds for almost anything."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in COMPARING:
            return True
    return False


def asserts(function: ast.AST, helpers: dict[str, ast.AST], depth: int = 0) -> bool:
    """Tell whether a test can fail by itself: a comparison, pytest.raises, or a helper that has one."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and compares(node.test):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("pytest.raises", "pytest.fail") or called.split(".")[-1] in CHECKS:
                return True
            if depth < 2 and called in helpers and asserts(helpers[called], helpers, depth + 1):
                return True
    return False


def test_a_test_of_truth_alone_is_found() -> None:
    hollow = ["assert result", "assert trained(model)", "assert checks['start']['passed'] and found.action"]
    sound = ["assert not result", "assert torch.equal(a, b)", "assert names == []", "check(1)"]
    helpers = {"check": ast.parse("assert value > 0")}
    assert [text for text in hollow if asserts(ast.parse(text), helpers)] == []
    assert [text for text in sound if not asserts(ast.parse(text), helpers)] == []


def test_every_test_can_fail() -> None:
    empty, hollow = [], []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        functions = {node.name: node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)}
        tests = {name: node for name, node in functions.items() if name.startswith("test_")}
        empty += [] if tests else [str(file)]
        hollow += [f"{file}: {name}" for name, node in tests.items() if not asserts(node, functions)]
    assert empty == [], "no test in it"
    assert hollow == []
