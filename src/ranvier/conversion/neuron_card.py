"""Neurons on the card of a network: what kind they are, and what to build them with. Their tensors stand beside it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ranvier.dynamics import ATan, Rectangle, Sigmoid, Surrogate, Triangle
from ranvier.nn import IF, LIF, LIFB, PLIF, AffineIF, ConvertedIF, LIFPair, Neuron

PLAIN: dict[str, type[Neuron]] = {"IF": IF, "LIF": LIF, "LIFPair": LIFPair, "PLIF": PLIF}
"""Neurons that are built from the fields of their parameters."""

SURROGATES: dict[str, type[Any]] = {kind.__name__: kind for kind in (ATan, Rectangle, Sigmoid, Triangle)}


def neuron_to_card(neuron: Neuron) -> dict[str, Any]:
    """What `neuron_from_card` builds a neuron of the same kind, settings and shapes from, in json's own types.

    A converted neuron has no `kind`, since cards once had no other neurons.

    Raises:
        TypeError: A neuron, or a surrogate, that is none of ranvier's.
    """
    if isinstance(neuron, ConvertedIF):
        return {
            "num_channels": len(neuron.threshold),
            "steps": len(neuron.bias),
            "shape": list(neuron.v_init.shape) if neuron.v_init.ndim > 1 else None,
            "signed": neuron.signed,
            "binary": neuron.binary,
        }
    kind = type(neuron).__name__
    if type(neuron) not in (AffineIF, LIFB, *PLAIN.values()):
        raise TypeError(
            f"a {kind} cannot be kept in a file: only neurons of ranvier.nn can. Keep the parameters of the network "
            "that it was made from, ranvier.weights.save, and make it again."
        )
    settings = {**vars(neuron.params), "surrogate": _surrogate_to_card(neuron.params.surrogate)}
    if isinstance(neuron, LIFB):
        settings["num_channels"] = len(neuron.strength)
    if isinstance(neuron, AffineIF):
        settings["shapes"] = {name: list(buffer.shape) for name, buffer in neuron.named_buffers()}
    return {"kind": kind, **settings}


def neuron_from_card(**card: Any) -> Neuron:
    """Build what `neuron_to_card` wrote; its tensors are to be loaded."""
    kind = card.pop("kind", "ConvertedIF")
    if kind == "ConvertedIF":
        return ConvertedIF(**card)
    card["surrogate"] = _surrogate_from_card(card["surrogate"])
    if kind == "AffineIF":
        constants: dict[str, Any] = {name: torch.ones(sizes) for name, sizes in card.pop("shapes").items()}
        if not card.pop("leaky"):
            constants["tau"] = None
        return AffineIF(**constants, **card)
    if kind == "LIFB":
        return LIFB(**card)
    if kind not in PLAIN:
        raise ValueError(
            f"a neuron is a {kind!r}, which is not known here. The file was written by another version of ranvier: "
            "load it with that one."
        )
    return PLAIN[kind](**card)


def _surrogate_to_card(surrogate: Surrogate) -> dict[str, Any]:
    kind = type(surrogate)
    if kind not in SURROGATES.values():
        raise TypeError(
            f"the surrogate is a {kind.__name__}, which cannot be kept in a file. Use one of "
            f"{', '.join(SURROGATES)} of ranvier.dynamics."
        )
    return {"kind": kind.__name__, **asdict(surrogate)}  # type: ignore[call-overload]


def _surrogate_from_card(card: Mapping[str, Any]) -> Any:
    settings = dict(card)
    return SURROGATES[settings.pop("kind")](**settings)
