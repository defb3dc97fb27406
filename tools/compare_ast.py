"""Prove that two checkouts differ in names alone: equal syntax trees once a table of renames is applied.

    git worktree add ../before HEAD~1
    python tools/compare_ast.py ../before . tools/renames.tsv

Files are matched by their path, moved ones by the table's ``module`` rows. Docstrings, comments and layout
are left out. Then, node by node:

* The trees have the same shape; imports are compared as sets, since their order follows their names.
* A local variable may have any new name, one for one in its function.
* A name that other code can reach (module level, class member, attribute, keyword, parameter) is equal or
  stands in the table with that new name.
* In each function the map from old to new names is one to one, so that nothing is shadowed that was not.
* Every string that changed is listed (``--strings``). An f-string may order its expressions anew.

Exit status: 0 equal, 1 not.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from renames import Renames, read_renames

FOLDERS = ("data_templates", "finetune", "align", "tests", "benchmarks", "tools")
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
IDENTIFIERS = {
    ast.Attribute: "attr",
    ast.keyword: "arg",
    ast.FunctionDef: "name",
    ast.AsyncFunctionDef: "name",
    ast.ClassDef: "name",
    ast.arg: "arg",
    ast.ExceptHandler: "name",
    ast.MatchAs: "name",
    ast.MatchStar: "name",
    ast.Name: "id",
}
"""The field that holds a node's identifier."""


@dataclass
class Scope:
    """The names seen in one function or module, both ways."""

    label: str
    locals: set[str]
    forward: dict[str, str] = field(default_factory=dict)
    backward: dict[str, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """One pair of files."""

    path: str
    renames: Renames
    problems: list[str] = field(default_factory=list)
    strings: list[tuple[int, str, str]] = field(default_factory=list)

    def compare(self, old: str, new: str) -> None:
        """Compare two sources."""
        before, after = without_docstrings(ast.parse(old)), without_docstrings(ast.parse(new))
        self._imports(before, after)
        self._pair(before, after, [Scope("module", set())])

    def _problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(f"{self.path}:{getattr(node, 'lineno', 0)}: {text}")

    def _imports(self, old: ast.Module, new: ast.Module) -> None:
        """Compare what the two files import, wherever in the file."""
        before = {self._moved(name) for name in imported(old)}
        after = set(imported(new))
        for name in sorted(before - after):
            if not any(self._is_renamed(name, other) for other in after):
                self._problem(old, f"import of {name} is gone")
        for name in sorted(after - before):
            if not any(self._is_renamed(other, name) for other in before):
                self._problem(new, f"new import of {name}")

    def _moved(self, name: str) -> str:
        """Return a dotted name after the moves of modules."""
        for module, moved in self.renames.modules.items():
            if name == module or name.startswith(module + "."):
                return moved + name[len(module) :]
        return name

    def _is_renamed(self, old: str, new: str) -> bool:
        """Return whether only the last part differs, as the table has it."""
        (package, _, name), (other_package, _, other) = old.rpartition("."), new.rpartition(".")
        return package == other_package and other in self.renames.names.get(name, ())

    def _pair(self, old: ast.AST, new: ast.AST, scopes: list[Scope]) -> None:
        """Compare two nodes and what is below them."""
        if type(old) is not type(new):
            self._problem(new, f"{type(old).__name__} became {type(new).__name__}")
            return
        if isinstance(old, Function) and isinstance(new, Function):
            self._function(old, new, scopes)
            return
        if isinstance(old, ast.JoinedStr) and isinstance(new, ast.JoinedStr):
            self._format(old, new, scopes)
            return
        self._identifier(old, new, scopes)
        self._fields(old, new, scopes)

    def _fields(self, old: ast.AST, new: ast.AST, scopes: list[Scope]) -> None:
        for name in old._fields:
            if name == IDENTIFIERS.get(type(old)):
                continue
            self._values(name, getattr(old, name, None), getattr(new, name, None), (old, new), scopes)

    def _values(
        self, name: str, old: object, new: object, nodes: tuple[ast.AST, ast.AST], scopes: list[Scope]
    ) -> None:
        """Compare a field: a node, a list of them, or a constant."""
        if isinstance(old, list) and isinstance(new, list):
            before, after = without_imports(old), without_imports(new)
            if len(before) != len(after):
                self._problem(nodes[1], f"{len(before)} {name} became {len(after)}")
                return
            for one, other in zip(before, after, strict=True):
                self._values(name, one, other, nodes, scopes)
        elif isinstance(old, ast.AST) and isinstance(new, ast.AST):
            self._pair(old, new, scopes)
        elif (
            isinstance(old, str) and isinstance(new, str) and isinstance(nodes[0], (ast.Global, ast.Nonlocal))
        ):
            self._name(old, new, nodes[1], scopes)
        elif isinstance(old, str) and isinstance(new, str) and isinstance(nodes[0], ast.Constant):
            if old != new:
                self.strings.append((getattr(nodes[1], "lineno", 0), old, new))
        elif old != new:
            self._problem(nodes[1], f"{name} was {old!r}, is {new!r}")

    def _format(self, old: ast.JoinedStr, new: ast.JoinedStr, scopes: list[Scope]) -> None:
        """Compare two f-strings: the same expressions, in any order; another text is a changed string."""
        left = [one for one in old.values if isinstance(one, ast.FormattedValue)]
        right = [one for one in new.values if isinstance(one, ast.FormattedValue)]
        if len(left) != len(right):
            self._problem(new, f"f-string: {len(left)} expressions became {len(right)}")
            return
        for other in right:
            one = next((one for one in left if self._equal(one, other, scopes)), left[0])
            left.remove(one)
            self._pair(one, other, scopes)
        texts = ["".join(map(literal, side.values)) for side in (old, new)]
        if texts[0] != texts[1]:
            self.strings.append((new.lineno, texts[0], texts[1]))

    def _equal(self, old: ast.AST, new: ast.AST, scopes: list[Scope]) -> bool:
        """Return whether two expressions are equal, without a trace in the maps of names."""
        trial = Comparison(self.path, self.renames)
        trial._pair(old, new, deepcopy(scopes))
        return not trial.problems

    def _function(self, old: Function, new: Function, scopes: list[Scope]) -> None:
        """Compare two functions: their head in the scope around them, their body in one of their own."""
        if not isinstance(old, ast.Lambda) and not isinstance(new, ast.Lambda):
            self._identifier(old, new, scopes)
        label = f"{scopes[-1].label}.{getattr(new, 'name', 'lambda')}"
        inner = [*scopes, Scope(label, bound(old))]
        for name in old._fields:
            if name in ("name", "args"):
                continue
            here = inner if name == "body" else scopes
            self._values(name, getattr(old, name, None), getattr(new, name, None), (old, new), here)
        for one, other in zip(parameters(old), parameters(new), strict=False):
            self._name(one.arg, other.arg, other, inner, is_parameter=not isinstance(old, ast.Lambda))
            self._values("annotation", one.annotation, other.annotation, (one, other), scopes)
        if len(list(parameters(old))) != len(list(parameters(new))):
            self._problem(new, "another number of parameters")
        for kind in ("defaults", "kw_defaults"):
            self._values(kind, getattr(old.args, kind), getattr(new.args, kind), (old, new), scopes)

    def _identifier(self, old: ast.AST, new: ast.AST, scopes: list[Scope]) -> None:
        """Compare the identifier of a node, if it has one."""
        kind = IDENTIFIERS.get(type(old))
        if kind is None:
            return
        before, after = getattr(old, kind), getattr(new, kind)
        if before is None or after is None:
            if before != after:
                self._problem(new, f"{before!r} became {after!r}")
        elif isinstance(old, (ast.Attribute, ast.keyword)):
            if before != after:
                self._in_table(before, after, new)
        else:
            self._name(before, after, new, scopes)

    def _name(
        self, old: str, new: str, node: ast.AST, scopes: list[Scope], *, is_parameter: bool = False
    ) -> None:
        """Compare a name, and hold the innermost scope's map to one to one."""
        scope = scopes[-1]
        local = any(old in one.locals for one in scopes[1:])
        if old != new and (is_parameter or not local):
            self._in_table(old, new, node)
        if len(scopes) > 1 and scope.forward.setdefault(old, new) != new:
            self._problem(node, f"{scope.label}: {old} became both {scope.forward[old]} and {new}")
        if len(scopes) > 1 and scope.backward.setdefault(new, old) != old:
            self._problem(node, f"{scope.label}: {scope.backward[new]} and {old} both became {new}")

    def _in_table(self, old: str, new: str, node: ast.AST) -> None:
        if new not in self.renames.names.get(old, ()):
            self._problem(node, f"{old} became {new}, which the table does not have")


def parameters(function: Function) -> Iterator[ast.arg]:
    """Yield the parameters of a function in order."""
    words = function.args
    yield from (*words.posonlyargs, *words.args)
    yield from (one for one in (words.vararg,) if one)
    yield from words.kwonlyargs
    yield from (one for one in (words.kwarg,) if one)


def bound(function: Function) -> set[str]:
    """Return the names that a function binds: its parameters and what it assigns."""
    names = {one.arg for one in parameters(function)}
    todo: list[ast.AST] = list(function.body) if isinstance(function.body, list) else [function.body]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        todo += ast.iter_child_nodes(node)
    return names


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Drop strings that are statements: docstrings, and those that follow a constant."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not is_docstring(one)]  # type: ignore[attr-defined]
    return tree


def is_docstring(node: ast.AST) -> bool:
    """Return whether a statement is a string alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def literal(node: ast.expr) -> str:
    """Return the text of a part of an f-string, braces for an expression."""
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def without_imports(nodes: list[object]) -> list[object]:
    """Drop imports, which are compared as a set."""
    return [one for one in nodes if not isinstance(one, (ast.Import, ast.ImportFrom))]


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(root: Path) -> dict[str, str]:
    """Return a checkout's Python files by path."""
    files = [file for folder in FOLDERS for file in (root / folder).rglob("*.py")]
    return {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in sorted(files)}


def moved(path: str, renames: Renames) -> str:
    """Return where a file of the older checkout is in the newer one."""
    name = path.removesuffix(".py").replace("/", ".")
    return path_of(renames.modules.get(name, name))


def path_of(module: str) -> str:
    """Return a module's file."""
    return module.replace(".", "/") + ".py"


def main() -> int:
    """Read the command line and compare."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("old", type=Path, help="the checkout before")
    parser.add_argument("new", type=Path, help="the checkout after")
    parser.add_argument("table", type=Path, nargs="?", help="the renames, see renames.py")
    parser.add_argument("--strings", action="store_true", help="print every string that changed")
    words = parser.parse_args()
    renames = read_renames(words.table) if words.table else Renames()
    before, after = sources(words.old), sources(words.new)
    # A table covers many commits: rows of moves that this pair of checkouts does not have are left out.
    moves = {
        old: new for old, new in renames.modules.items() if path_of(new) in after and path_of(old) in before
    }
    renames = replace(renames, modules=moves)
    pairs = {moved(path, renames): path for path in before}
    problems = [f"{path}: only before" for path in sorted(pairs.keys() - after.keys())]
    problems += [f"{path}: only after" for path in sorted(after.keys() - pairs.keys())]
    total = 0
    for path in sorted(pairs.keys() & after.keys()):
        comparison = Comparison(path, renames)
        comparison.compare(before[pairs[path]], after[path])
        problems += comparison.problems
        total += len(comparison.strings)
        for line, old, new in comparison.strings if words.strings else ():
            print(f"{path}:{line}: {old!r} -> {new!r}")
    print("\n".join(problems))
    print(f"{len(pairs)} files, {len(problems)} differences, {total} strings changed")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
