"""Training a converted network further: what a run of it starts from, and what it leaves."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ranvier import conversion
from ranvier.conversion import ConvertedSNN
from ranvier.dynamics import Triangle
from ranvier.nn.proxy import ProxyActivation
from ranvier.nn.structure import Activation
from ranvier.recipes.recipe import FinetuneRecipe
from ranvier.recipes.trained import InputFormat, Trained, load_trained


@dataclass(frozen=True)
class Start:
    """What a run of a `FinetuneRecipe` starts from.

    Attributes:
        recipe: With what it takes over from the network: name, data and image size.
        model: The network, everything in it a parameter.
        form: The input that it expects.
        origin: Of its card: the ANN that it was made from, and the accuracy of that.
    """

    recipe: FinetuneRecipe
    model: ConvertedSNN
    form: InputFormat
    origin: dict[str, Any]


def prepare(recipe: FinetuneRecipe) -> Start:
    """Read the converted network that a recipe starts from, and make everything in it a parameter.

    Raises:
        FileNotFoundError: There is no such network.
        ValueError: It was not converted, has biases for fewer steps, or has seen the images that are to be held out.
    """
    trained = converted_network(recipe.start)
    trained.check_steps(recipe.steps)
    _check_held_out(recipe, trained)
    known = trained.recipe
    recipe = replace(
        recipe,
        name=recipe.name or known.name,
        data=recipe.data or known.data,
        image_size=recipe.image_size or known.image_size,
    )
    assert isinstance(trained.model, ConvertedSNN)
    return Start(recipe, _trainable(trained.model, recipe), trained.form, _origin(trained.card))


def finish(start: Start, path: str | Path, card: Mapping[str, Any]) -> None:
    """Write the network, now trained, as a converted network like the one that it was.

    Args:
        start: From `prepare`.
        path: The file.
        card: Recipe, input and results; what its ANN was is added.

    Raises:
        OSError: The file could not be written; an older one is untouched.
    """
    for name, neuron in start.model.neurons.items():
        start.model.network.set_submodule(name, Activation(neuron))  # without the mode of an ANN
    conversion.save(start.model, path, {**card, **start.origin, "held_out": start.recipe.hold_out})


def converted_network(path: str | Path) -> Trained:
    """A converted network on disk.

    Raises:
        FileNotFoundError: There is no network.
        ValueError: It was not converted.
    """
    if not str(path):
        raise ValueError(
            "nothing to start from. Pass the folder of a converted network: ranvier finetune FOLDER, or start=FOLDER."
        )
    trained = load_trained(path)
    if not isinstance(trained.model, ConvertedSNN):
        raise ValueError(f"{path} holds no converted network. Make one of an ANN first: ranvier convert {path}")
    return trained


def _check_held_out(recipe: FinetuneRecipe, trained: Trained) -> None:
    """Raise if images that are to be scored have been trained or calibrated on before."""
    count = recipe.hold_out
    if count and trained.held_out != count:
        raise ValueError(
            f"hold_out is {count}, but {recipe.start} was made with {trained.held_out or 'no'} training images held "
            f"out: its ANN or its conversion has seen some of those {count}. Train the ANN with --hold-out {count} and "
            "convert it, or leave --hold-out out."
        )


def _trainable(model: ConvertedSNN, recipe: FinetuneRecipe) -> ConvertedSNN:
    """The network with everything in it a parameter; what the method cannot reach stays as it is."""
    model.requires_grad_(True)
    for name, neuron in model.neurons.items():
        neuron.make_trainable(recipe.steps, Triangle(recipe.surrogate_width))
        if recipe.loss.method == "proxy":
            # An ANN has no initial potentials, and several processes wait for a gradient of every parameter.
            neuron.v_init.requires_grad_(False)
            model.network.set_submodule(name, ProxyActivation(neuron, "own"))
    model.steps = recipe.steps
    model.readout_decay = 1.0  # training makes the first steps tell as much as the others
    return model


def _origin(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of the ANN: that of a conversion, or of a network that was trained further before."""
    result = card.get("result", {})
    stated = {
        "ann": card.get("ann"),
        "ann_accuracy": card.get("ann_accuracy", result.get("ann_accuracy")),
        "ann_images": card.get("ann_images", result.get("total")),
    }
    return {name: value for name, value in stated.items() if value is not None}
