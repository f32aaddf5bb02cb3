"""Parameters on disk: safetensors with a json card inside. Nothing is unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ranvier.atomic import replacing

CARD = "ranvier"
"""Key of the card among the metadata of the safetensors file."""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors and a json card to one file, atomically.

    Args:
        path: The file, by custom `*.safetensors`.
        tensors: By name; moved to the CPU.
        card: Anything json can say: settings, accuracy, versions.

    Raises:
        OSError: The file could not be written; an older one is untouched.
    """
    # One copy of each, laid out anew where the tensor is: safetensors takes no memory that tensors share.
    whole: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    plain = {name: tensor.detach().to("cpu", **whole) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata={CARD: json.dumps(dict(card))})
        except SafetensorError as error:  # how safetensors reports a failed write
            raise OSError(str(error)) from error


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Returns:
        Tensors by name, and the card.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, not a safetensors file, or not written by ranvier.
    """
    tensors, card = _read(Path(path), device)
    if card is None:
        raise ValueError(
            f"{path} is a safetensors file but carries no ranvier card, so its model and settings are unknown. "
            "To use foreign weights, build the model and call load_parameters(model, tensors)."
        )
    content = json.loads(card)
    if not isinstance(content, dict):
        raise ValueError(f"{path} carries a ranvier card that is not a json object. It was written by something else.")
    return tensors, content


def load_foreign_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from any safetensors file, whoever wrote it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or not a safetensors file.
    """
    return _read(Path(path), "cpu")[0]


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], str | None]:
    """Tensors, and the text of our card if there is one."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder. Pass a .safetensors file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Pass the path of a .safetensors file.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            card = (file.metadata() or {}).get(CARD)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated or of another kind: "
            "copy it again, or use an earlier checkpoint."
        ) from error
    return tensors, card


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Copy tensors into a model of the same structure.

    Raises:
        ValueError: Keys or shapes differ; the message names them.
    """
    own = model.state_dict()
    problems = []
    if missing := sorted(own.keys() - tensors.keys()):
        problems.append(f"{len(missing)} missing ({_few(missing)})")
    if unknown := sorted(tensors.keys() - own.keys()):
        problems.append(f"{len(unknown)} unknown ({_few(unknown)})")
    if shapes := [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]:
        problems.append(f"{len(shapes)} of another shape ({_few(shapes)})")
    if problems:
        raise ValueError(
            f"{source} belong to another model: of {len(own)} tensors, {'; '.join(problems)}. "
            "Build the model with the settings that the weights were made with."
        )
    model.load_state_dict(dict(tensors))


def save(model: nn.Module, path: str | Path, card: Mapping[str, Any] | None = None) -> None:
    """Write a model's parameters and buffers, with a card, to one safetensors file.

    >>> import tempfile
    >>> model = nn.Linear(2, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/model.safetensors", {"note": "untrained"})
    ...     load(model, f"{folder}/model.safetensors")
    {'note': 'untrained'}
    """
    save_tensors(path, model.state_dict(), card or {})


def load(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Fill `model` from a file that `save` wrote, and return its card.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken or foreign, or belongs to another model (the differing keys are named).
    """
    tensors, card = load_tensors(path)
    load_parameters(model, tensors, str(path))
    return card


def _few(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
