"""Converted networks on disk: safetensors with the graph and the account on the card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ranvier.conversion.account import Account
from ranvier.conversion.spiking import SPIKING_FUNCTIONS, SPIKING_MODULES, ConvertedSNN
from ranvier.conversion.vocabulary import from_json, to_json
from ranvier.weights import load_parameters, load_tensors, save_tensors

KIND = "converted"
"""What a card of a converted network says it is."""


def save(snn: ConvertedSNN, path: str | Path, card: Mapping[str, Any] | None = None) -> None:
    """Write a converted network to one safetensors file: tensors, and on the card its graph and account.

    Args:
        snn: From `convert`.
        path: The file, by custom `*.safetensors`.
        card: More to put on the card.

    Raises:
        OSError: The file could not be written; an older one is untouched.
    """
    content = {
        **(card or {}),
        "kind": KIND,
        "graph": to_json(snn.network, SPIKING_MODULES, SPIKING_FUNCTIONS),
        "steps": snn.steps,
        "frame_dims": snn.frame_dims[0],
        "report": None if snn.report is None else snn.report.to_json(),
    }
    save_tensors(path, snn.state_dict(), content)


def load(path: str | Path) -> ConvertedSNN:
    """Read a network that `save` wrote. Nothing is unpickled, and no code of the ANN is needed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken, holds something else, or is of another version.
    """
    tensors, card = load_tensors(path)
    return from_card(tensors, card, str(path))


def from_card(tensors: Mapping[str, Tensor], card: Mapping[str, Any], source: str) -> ConvertedSNN:
    """The network of tensors and card that were read already."""
    if card.get("kind") != KIND:
        raise ValueError(f"{source} holds no converted network. Pass a file that ranvier.conversion.save wrote.")
    try:
        report = None if card["report"] is None else Account.from_json(card["report"])
        network = from_json(card["graph"], SPIKING_MODULES, SPIKING_FUNCTIONS)
        snn = ConvertedSNN(network, card["steps"], card["frame_dims"], report)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the card of {source} lacks or has something else than expected ({error}). "
            "The file was written by another version of ranvier: load it with that one."
        ) from error
    load_parameters(snn, tensors, source)
    snn.load_state_dict(dict(tensors), assign=True)  # in the data types that they were saved in
    return snn
