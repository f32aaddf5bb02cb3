"""Checkpoints: everything that training needs to go on, in one file that is written atomically."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.atomic import differences
from ranvier.weights import load_parameters, load_tensors, save_tensors

FORMAT = 1


@dataclass
class Progress:
    """Where training stands; all of it goes into the checkpoint."""

    epoch: int = 0
    """Epochs finished."""
    batch: int = 0
    """Batches finished in the present epoch."""
    step: int = 0
    """Updates made."""
    seconds: float = 0.0
    """Time spent, over all runs that resumed one another."""
    best_accuracy: float = -1.0
    """Highest accuracy at T that an evaluation has seen."""
    best_epoch: int = -1
    """Epoch (from 1) of that evaluation."""
    epoch_loss: float = 0.0
    """Sum of the losses of the present epoch's batches."""
    epoch_seconds: float = 0.0
    """Time spent in the present epoch."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per finished epoch, as in metrics.jsonl."""


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, run: Mapping[str, Any]
) -> None:
    """Write model, optimizer, random states, progress and the description of the run.

    Args:
        path: File to replace.
        model: Its state dict goes under `model/`.
        optimizer: Its tensors go under `optimizer/`, its numbers into the card.
        progress: Position and history.
        run: What is being run; a resume with another run is refused.

    Raises:
        OSError: The file could not be written; the checkpoint before it is untouched.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in model.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    card = {
        "format": FORMAT,
        "kind": "checkpoint",
        "run": dict(run),
        "progress": asdict(progress),
        "optimizer": {"param_groups": state["param_groups"], "state": numbers},
        "python_random": [version, list(words), gauss],
    }
    save_tensors(path, tensors, card)


def read_progress(path: str | Path) -> Progress:
    """Where the checkpoint at `path` stands."""
    return _progress(_card_of(path)[1], path)


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> Progress:
    """Restore what `save_checkpoint` wrote, in place, random states included.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or foreign, of another format, of another run or of another model.
    """
    tensors, card = _card_of(path)
    progress = _progress(card, path)
    if changed := differences(card["run"], run):
        raise ValueError(
            f"{path} belongs to another run; it differs in {'; '.join(changed)}. "
            "Resume with the settings it was started with, or choose another --out for a new run."
        )
    groups = _groups(tensors)
    load_parameters(model, groups.get("model", {}), str(path))
    state: dict[int, dict[str, Any]] = {int(index): dict(rest) for index, rest in card["optimizer"]["state"].items()}
    for name, value in groups.get("optimizer", {}).items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": card["optimizer"]["param_groups"]})
    _restore_layouts(optimizer)
    torch.set_rng_state(groups["random"]["cpu"])
    if "cuda" in groups["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(groups["random"]["cuda"])
    version, words, gauss = card["python_random"]
    random.setstate((version, tuple(words), gauss))
    return progress


def _restore_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their parameters.

    Files hold contiguous tensors, but the weights of convolutions are channels-last, and fused optimizers walk through
    a parameter and its moments side by side in memory: in another layout they pair moments with the wrong weights.
    """
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                placed = torch.empty_like(parameter, dtype=value.dtype, memory_format=torch.preserve_format)
                entries[name] = placed.copy_(value)


def _card_of(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, card = load_tensors(path)
    if card.get("kind") != "checkpoint":
        raise ValueError(f"{path} holds weights but no training state. Resume from checkpoint.safetensors of a run.")
    if card["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {card['format']}, this version of ranvier reads {FORMAT}. "
            "Resume with the version that wrote it, or start again from its weights."
        )
    return tensors, card


def _progress(card: Mapping[str, Any], path: str | Path) -> Progress:
    known = {field.name for field in fields(Progress)}
    if known != card["progress"].keys():
        raise ValueError(f"{path} was written by another version of ranvier: its progress has other fields.")
    return Progress(**card["progress"])


def _groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part of their name before the first slash."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, rest = name.split("/", 1)
        groups.setdefault(group, {})[rest] = value
    return groups
