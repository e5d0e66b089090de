"""How the code is laid out: imports point down, files stay small, nothing names a machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from hartist.tokenizer.residual_loop import nearest_codes
from small import normal

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "hartist"
MAX_LINES = 350

LAYERS = (
    {"errors", "memory", "precision"},
    {"scales", "files"},
    {"config", "checkpoint", "pixels", "layers"},
    {"tokenizer", "residual", "text"},
    {"transformer"},
    {"generation"},
    {"data", "evaluation", "interop", "presets", "serving", "training"},
    {"commands"},
    {"cli", "__main__"},
)
"""Bottom to top. A module may import from its own layer and those below it."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `hartist`; the package itself is left out."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            names[".".join(parts)] = path
    return names


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """What runs when the module is imported: not functions, not what only type checkers read."""
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node):
            continue
        found.append(node)
        for field in ("body", "orelse", "finalbody"):
            found += statements(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            found += statements(handler.body)
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that are imported along with the one at `path`."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            origin = node.module or ""
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner.removeprefix("hartist.") in known else origin)
    return {name.removeprefix("hartist.") for name in found if name.startswith("hartist.")}


def test_every_module_has_its_layer() -> None:
    strangers = {name.split(".")[0] for name in modules()} - set(RANK)
    assert not strangers, f"put {strangers} into LAYERS"


def test_imports_point_down() -> None:
    known = modules()
    upward = [
        f"{name} imports {imported}"
        for name, path in known.items()
        for imported in sorted(imports(path, known))
        if RANK[imported.split(".")[0]] > RANK[name.split(".")[0]]
    ]
    assert not upward


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(path, known) & set(known) for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(known)


def test_the_checks_above_see_imports_at_all() -> None:
    known = modules()
    assert {"config", "transformer.blocks", "residual.mlp"} <= imports(known["transformer.model"], known)
    assert "transformer.initialise" not in imports(known["transformer.model"], known)  # inside a function
    assert "transformer.model" not in imports(known["transformer.initialise"], known)  # for type checkers


def test_files_are_small() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_every_module_says_what_it_is() -> None:
    silent = [
        name
        for name, path in modules().items()
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_every_module_is_in_the_architecture_page() -> None:
    page = ROOT / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("docs/architecture.md is not there")
    text = page.read_text(encoding="utf-8")
    paths = [path for path in modules().values() if path.name != "__init__.py"]
    missing = []
    for path in paths:
        whole = path.relative_to(PACKAGE).as_posix()
        alike = sum(other.name == path.name for other in paths)
        mentions = len(re.findall(rf"(?<![\w-]){re.escape(path.name)}\b", text))
        # in a tree the folder stands above the name, so names that occur twice must be there twice
        if whole not in text and mentions < alike:
            missing.append(whole)
    assert not missing


def test_no_file_names_a_place_on_some_machine() -> None:
    places = re.compile(r"(?<![\w.])/(?:" + "|".join(["work", "tmp", "root", "home"]) + ")/")
    kinds = {".py", ".md", ".toml", ".txt", ".html", ".css", ".js", ".yml", ".yaml", ".cfg"}
    files = [ROOT / "pyproject.toml", *ROOT.glob("*.md")]
    for folder in ("src", "tests", "docs"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if places.search(line)
    ]
    assert not found


def test_nothing_is_unpickled_but_by_weights_only() -> None:
    loose = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, options = ast.unparse(node.func), [ast.unparse(keyword) for keyword in node.keywords]
            if called.startswith("pickle.") or (called == "torch.load" and "weights_only=True" not in options):
                loose.append(f"{name}:{node.lineno}")
    assert not loose


def test_shapes_are_checked_while_testing() -> None:
    with pytest.raises(TypeCheckError):
        nearest_codes(normal(2, 3, 4), normal(5, 3))  # codes of another width
    with pytest.raises(TypeCheckError):
        nearest_codes(torch.zeros(2, 3, 4, dtype=torch.long), normal(5, 4))
