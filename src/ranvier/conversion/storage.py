"""Converted networks, and other graphs, on disk: safetensors with the graph and its report on the card."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ranvier.atomic import tuples
from ranvier.conversion.account import Account
from ranvier.conversion.decouple import DecoupledSNN, Decoupling, Size
from ranvier.conversion.spiking import SPIKING_FUNCTIONS, SPIKING_MODULES, ConvertedSNN, GraphSNN
from ranvier.conversion.vocabulary import from_json, to_json
from ranvier.nn import ConvertedIF
from ranvier.nn.converted import check_thresholds, fixed_copy
from ranvier.weights import load_parameters, load_tensors, save_tensors

KIND = "converted"
"""What a card of a converted network says it is."""

DECOUPLED, GRAPH = "decoupled", "graph"
"""What cards of other graphs say they are: those that `decouple` made, and all others."""


def save(snn: GraphSNN, path: str | Path, card: Mapping[str, Any] | None = None) -> None:
    """Write a converted network to one safetensors file: tensors, and on the card its graph and account.

    Args:
        snn: From `convert`; or another graph, from `decouple` or `ranvier.export.from_nir`.
        path: The file, by custom `*.safetensors`.
        card: More to put on the card.

    Raises:
        OSError: The file could not be written; an older one is untouched.
        TypeError: `snn` is something else, or has neurons that are none of `ranvier.nn`.
        ValueError: A threshold is not greater than 0.
    """
    if not isinstance(snn, GraphSNN):
        raise TypeError(
            f"snn is a {type(snn).__name__}, but must be what convert, decouple or from_nir made. Keep the parameters "
            "of another network with ranvier.weights.save."
        )
    snn = fixed_copy(snn)
    _check(snn, "the network")
    content = {**(card or {}), **_card_of(snn), "image_size": snn.image_size, "readout_decay": snn.readout_decay}
    content["graph"] = to_json(snn.network, SPIKING_MODULES, SPIKING_FUNCTIONS)
    save_tensors(path, snn.state_dict(), content)


def _card_of(snn: GraphSNN) -> dict[str, Any]:
    """What there is to say of each kind."""
    if isinstance(snn, ConvertedSNN):
        report = None if snn.report is None else snn.report.to_json()
        return {"kind": KIND, "steps": snn.steps, "frame_dims": snn.frame_dims[0], "report": report}
    if isinstance(snn, DecoupledSNN):
        return {"kind": DECOUPLED, "frame_dims": snn.frame_dims, "report": asdict(snn.report)}
    return {"kind": GRAPH, "frame_dims": snn.frame_dims}


def load(path: str | Path) -> GraphSNN:
    """Read a network that `save` wrote. Nothing is unpickled, and no code of the ANN is needed.

    Returns:
        A network of the class that was saved, a `ConvertedSNN` as a rule.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken, holds something else, or is of another version, or a threshold in it is not
            greater than 0.
    """
    tensors, card = load_tensors(path)
    return _of_any_kind(tensors, card, str(path))


def from_card(tensors: Mapping[str, Tensor], card: Mapping[str, Any], source: str) -> ConvertedSNN:
    """The converted network of tensors and card that were read already."""
    snn = _of_any_kind(tensors, card, source)
    if not isinstance(snn, ConvertedSNN):
        raise ValueError(f"{source} holds a {card['kind']} network. Read it with ranvier.conversion.load.")
    return snn


def _of_any_kind(tensors: Mapping[str, Tensor], card: Mapping[str, Any], source: str) -> GraphSNN:
    if card.get("kind") not in (KIND, DECOUPLED, GRAPH):
        raise ValueError(f"{source} holds no converted network. Pass a file that ranvier.conversion.save wrote.")
    try:
        snn = _built(card)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the card of {source} lacks or has something else than expected ({error}). "
            "The file was written by another version of ranvier: load it with that one."
        ) from error
    load_parameters(snn, tensors, source)
    snn.load_state_dict(dict(tensors), assign=True)  # in the data types that they were saved in
    _check(snn, source)
    return snn


def _built(card: Mapping[str, Any]) -> GraphSNN:
    """The network of a card, its tensors still to come."""
    network = from_json(card["graph"], SPIKING_MODULES, SPIKING_FUNCTIONS)
    size = card.get("image_size")  # which earlier versions did not write
    size = tuple(size) if isinstance(size, list) else size
    decay = card.get("readout_decay", 1.0)  # likewise
    if card["kind"] == KIND:
        account = None if card["report"] is None else Account.from_json(card["report"])
        return ConvertedSNN(network, card["steps"], card["frame_dims"], account, size, readout_decay=decay)
    frame_dims = tuple(card["frame_dims"])
    if card["kind"] == GRAPH:
        return GraphSNN(network, frame_dims, size, readout_decay=decay)
    report: dict[str, Any] = tuples(card["report"])
    sizes = {name: Size(**report[name]) for name in ("before", "after")}
    return DecoupledSNN(network, frame_dims, Decoupling(**{**report, **sizes}), size, readout_decay=decay)


def _check(snn: GraphSNN, what: str) -> None:
    for name, neuron in snn.sites.items():
        if isinstance(neuron, ConvertedIF):
            check_thresholds(neuron, f"{name} of {what}")
