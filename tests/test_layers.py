"""Data flows one way: every module imports only from layers below its own, or from its own folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ranvier"

LAYERS = (
    ("checks", "provenance", "atomic"),
    ("dynamics", "losses", "data"),
    ("kernels",),
    ("nn",),
    ("models",),
    ("weights", "report"),
    ("conversion",),
    ("evaluation",),
    ("training", "export"),
    ("recipes",),
    ("cli",),
    ("__main__",),
)
"""Lowest first. Folders on one line are siblings: they do not import each other."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
BAGS = {"utils", "util", "common", "base", "misc", "helpers"}


def part_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """Top-level parts of ranvier that a module imports, also inside functions and for type checking."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write `from ranvier.x import y`, not a relative import"
            whole = node.module == "ranvier"
            names += [f"ranvier.{alias.name}" for alias in node.names] if whole else [node.module or ""]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("ranvier.")}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_only_from_below(module: Path) -> None:
    part = part_of(module)
    imported = imported_parts((ROOT / module).read_text())
    if part == "__init__":  # the top package may re-export anything
        return
    for other in imported - {part, "__version__"}:
        assert LEVEL[other] < LEVEL[part], (
            f"{module} (layer {LEVEL[part]}) imports ranvier.{other} (layer {LEVEL[other]}); "
            "move the shared piece down, or pass it in as an argument"
        )


def test_every_part_has_a_layer() -> None:
    assert {part_of(module) for module in MODULES} - {"__init__"} <= set(LEVEL)
    assert len(MODULES) > 20


def test_no_bag_of_things() -> None:
    """A file or folder named so holds pieces that belong with their callers."""
    assert [str(module) for module in MODULES if BAGS & {part.removesuffix(".py") for part in module.parts}] == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import torch\nfrom ranvier.nn.time import Carry", {"nn"}),
        ("from ranvier import kernels, losses", {"kernels", "losses"}),
        ("def f():\n    import ranvier.data.images", {"data"}),
        ("from ranviers.nn import x", set()),
    ],
)
def test_imports_are_found(source: str, parts: set[str]) -> None:
    assert imported_parts(source) == parts


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="not a relative import"):
        imported_parts("from .time import Carry")
