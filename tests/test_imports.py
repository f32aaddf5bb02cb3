"""What `import ranvier` costs and loads, and what its folders export."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

import ranvier

OPTIONAL = ("triton", "matplotlib", "datasets", "accelerate", "kornia", "sklearn", "pyarrow", "tyro", "PIL", "pandas")
"""Loaded where they are used. Torch may bring Triton itself."""

SUBPACKAGES = [info.name for info in pkgutil.iter_modules(ranvier.__path__, "ranvier.") if info.ispkg]


def in_a_new_process(code: str) -> Any:
    """What `code`, run in an interpreter of its own, prints as json."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def loaded_by(module: str) -> set[str]:
    return set(in_a_new_process(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))


def test_optional_packages_stay_out() -> None:
    added = loaded_by("ranvier") - loaded_by("torch")
    assert "ranvier.nn" in added
    assert sorted(added & set(OPTIONAL)) == []


def test_import_takes_little_longer_than_that_of_torch() -> None:
    """CPU time, interleaved, the least of five to fifteen: other processes on the machine only ever add to it.

    Without garbage collection, which importing torch makes due sooner or later: whether it is just before or just after
    the line that is measured says nothing about ranvier.
    """

    def seconds(module: str) -> float:
        return in_a_new_process(f"import gc, time; gc.disable(); import {module}; print(time.process_time())")

    rounds: list[tuple[float, float]] = []
    for _ in range(3):
        rounds += [(seconds("torch"), seconds("ranvier")) for _ in range(5)]
        torch_alone, ranvier_and_torch = map(min, zip(*rounds, strict=True))
        if ranvier_and_torch < 1.3 * torch_alone:
            return
    assert ranvier_and_torch < 1.3 * torch_alone


@pytest.mark.parametrize("name", ["ranvier", *SUBPACKAGES])
def test_exported_names_exist_sorted_and_are_documented(name: str) -> None:
    package = importlib.import_module(name)
    exported = package.__all__
    assert exported == sorted(exported, key=constants_classes_functions)
    assert len(set(exported)) == len(exported)
    assert package.__doc__
    for export in exported:
        value = getattr(package, export)
        if export != "__version__":
            assert documented(package, export, value), f"{name}.{export} has no docstring"


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_nothing_public_is_left_out_of_all(name: str) -> None:
    """A name that a folder's `__init__` imports is exported; submodules are reached by their own path."""
    package = importlib.import_module(name)
    tree = ast.parse(inspect.getsource(package))
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == set(package.__all__)


def test_subpackages_are_reached_from_the_top() -> None:
    """`import ranvier as rv; rv.<folder>` works without importing the folder by name."""
    folders = {name.removeprefix("ranvier.") for name in SUBPACKAGES}
    reached = in_a_new_process(
        f"import json, ranvier as rv; print(json.dumps([getattr(rv, name).__name__ for name in {sorted(folders)}]))"
    )
    assert reached == [f"ranvier.{name}" for name in sorted(folders)]
    assert folders - set(ranvier.__all__) == set()
    assert dir(ranvier) == ranvier.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ranvier.nothing  # noqa: B018


def constants_classes_functions(name: str) -> tuple[int, list[tuple[int, str]]]:
    """The order in which linters sort `__all__`: `resnet9` comes before `resnet19`."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, parts)


def documented(package: ModuleType, name: str, value: object) -> bool:
    """A docstring of its own; for a type alias or constant, the string below its assignment."""
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        return bool(value.__doc__ and value.__doc__.strip()) and not is_generated(value)
    for module in [module for key, module in sys.modules.items() if key.startswith(f"{package.__name__}.")]:
        body = ast.parse(inspect.getsource(module)).body
        for statement, following in pairwise(body):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
    return False


def is_generated(value: object) -> bool:
    """Dataclasses and named tuples without a docstring get their signature as one."""
    return inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
