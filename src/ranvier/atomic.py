"""Writing files so that a reader, or a process killed at any moment, finds the old file or the new one, never half."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".tmp"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written by the caller, that takes its place when the block ends well.

    Args:
        path: File to create or replace; its folder is created.

    Yields:
        Where to write.

    Raises:
        OSError: Writing failed (a full disk, say). The file that was there before is untouched.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("done")
    ...     Path(folder, "a.txt").read_text()
    'done'
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    except OSError as error:
        remedy = "It is a folder: name a file in it." if path.is_dir() else "Is the disk full, or the folder not yours?"
        reason = f"could not write {path} ({error}); the file before it, if any, is untouched. {remedy}"
        raise (OSError(error.errno, reason) if error.errno else OSError(reason)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that processes killed while writing left in `folder`; only where nobody else writes."""
    for leftover in folder.glob(f".*{SUFFIX}"):
        leftover.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented json, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments from json, which has no tuples but lists: `Account(**tuples(json.loads(text)))`."""
    return {key: _tuple(value) for key, value in content.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def differences(before: Any, now: Any) -> list[str]:
    """Where `now` differs from what was read from json, each as `name: before -> now`.

    >>> differences({"epochs": 3, "steps": [1, 2]}, {"epochs": 5, "steps": (1, 2)})
    ['epochs: 3 -> 5']
    """
    return _differences(before, json.loads(json.dumps(now)), "")  # as the other was, whose tuples became lists


def _differences(before: Any, now: Any, name: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name}: {before!r} -> {now!r}"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
