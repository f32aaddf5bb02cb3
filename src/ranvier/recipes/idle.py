"""Settings without effect: who sets one learns of it when the run begins."""

import functools
import warnings
from collections.abc import Iterator

from ranvier.conversion import Settings
from ranvier.recipes.catalogue import ANN_RECIPES, RECIPES
from ranvier.recipes.network import GAINED, ProxySettings
from ranvier.recipes.recipe import (
    AnnRecipe,
    EventRecipe,
    FinetuneRecipe,
    Recipe,
    SimulatedEventRecipe,
    TrainingRecipe,
)
from ranvier.training import DirectLoss

AnyRecipe = Recipe | AnnRecipe | FinetuneRecipe

Idle = tuple[str, str, str]
"""The part of a recipe that holds a setting (`""` for the recipe itself), its name, and with what it has no effect."""


def warn_of_idle_settings(recipe: AnyRecipe) -> None:
    """Warn of every setting that was changed though nothing in this training uses it.

    Changed means: it differs from the recipe of that name, if one comes with ranvier, or else from the default.
    Runs call this once; building, changing and reading a recipe says nothing.

    >>> from ranvier.recipes.digits import digits
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     warn_of_idle_settings(digits(neuron="if", tau=3.0))
    >>> str(told[0].message)
    'tau=3.0 has no effect with neuron if.'
    """
    usual = _usual_recipes().get((type(recipe), recipe.name)) or type(recipe)(recipe.name, "")
    told = set()
    for part, name, with_what in _idle(recipe):
        value, default = (getattr(getattr(one, part) if part else one, name) for one in (recipe, usual))
        if value != default and (part, name) not in told:
            told.add((part, name))
            warnings.warn(f"{name}={value} has no effect with {with_what}.", stacklevel=3)
    if isinstance(recipe, Recipe) and isinstance(usual, Recipe):
        changed = recipe.proxy not in (usual.proxy, ProxySettings())
        if changed and not recipe.is_proxy:
            warnings.warn(
                f"the settings of proxy learning have no effect with method {recipe.loss.method}.", stacklevel=3
            )


def warn_of_idle_conversion_settings(
    settings: Settings, steps: int, threshold: str, bias: str, *, leaky: bool | None
) -> None:
    """Warn of all fine print that was changed though nothing in this conversion uses it.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     warn_of_idle_conversion_settings(Settings(percentile=99.0), 4, "mmse", "ftbc", leaky=None)
    >>> str(told[0].message)
    'percentile=99.0 has no effect with threshold mmse.'
    """
    usual = Settings()
    level = 4  # who called `convert`, behind its decorator
    users: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "percentile": ("threshold", threshold, ("percentile", "auto")),
        "mmse_shift": ("threshold", threshold, ("mmse", "auto")),
        "per_channel": ("threshold", threshold, ("max", "percentile", "mmse", "balance", "auto")),
        "variant": ("bias", bias, ("ftbc", "auto")),
        "rounds": ("bias", bias, ("ftbc", "auto")),
        "step_sizes": ("bias", bias, ("ftbc", "auto")),
    }
    for name, (kind, chosen, all_users) in users.items():
        value = getattr(settings, name)
        changed = (tuple(value) if isinstance(value, list) else value) != getattr(usual, name)
        if chosen not in all_users and changed:
            warnings.warn(f"{name}={value} has no effect with {kind} {chosen}.", stacklevel=level)
    decays = settings.readout_decays
    if tuple(decays) != usual.readout_decays and not (bias == "auto" if leaky is None else leaky):
        warnings.warn(f"readout_decays={decays} has no effect without leaky=True or bias auto.", stacklevel=level)
    if leaky and steps == 1:
        warnings.warn("leaky=True has no effect with steps=1: there is nothing to forget.", stacklevel=level)


@functools.cache
def _usual_recipes() -> dict[tuple[type, str], TrainingRecipe]:
    # What a recipe brings itself was not set by the user, so nothing is said of it.
    made: list[TrainingRecipe] = [recipe() for recipe in (*RECIPES.values(), *ANN_RECIPES.values())]
    return {(type(recipe), recipe.name): recipe for recipe in made}


def _idle(recipe: AnyRecipe) -> Iterator[Idle]:
    """Settings that this training does not use, changed or not."""
    if recipe.optimization.optimizer == "sgd":
        yield "optimization", "betas", "optimizer sgd"
    if recipe.data == "digits" and not isinstance(recipe, EventRecipe):
        yield "", "image_size", "the bundled digits, which stay 8x8"
    if isinstance(recipe, AnnRecipe):
        yield from _of_ann(recipe)
    else:
        yield from _of_loss(recipe.loss)
    if isinstance(recipe, Recipe):
        yield from _of_network(recipe)
    if isinstance(recipe, SimulatedEventRecipe):
        for name in ("recordings", "download", "skip_unreadable"):
            yield "events", name, "simulated recordings"
    if isinstance(recipe, FinetuneRecipe) and recipe.loss.method == "proxy":
        yield "", "surrogate_width", "method proxy"


def _of_loss(loss: DirectLoss) -> Iterator[Idle]:
    users = {
        "consistency_weight": ("etc",),
        "temperature": ("etc",),
        "tet_weight": ("tet",),
        "label_smoothing": ("direct", "etc", "tet"),
    }
    for name, methods in users.items():
        if loss.method not in methods:
            yield "loss", name, f"method {loss.method}"


def _of_network(recipe: Recipe) -> Iterator[Idle]:
    settings = recipe.network
    if recipe.is_proxy:
        # All neurons are those of the proxy settings; but the threshold scales the normalisation of ResNet-19.
        of_neurons = ("neuron", "reset", "tau", "burst_init", "statistics")
        for name in (*of_neurons, *["v_threshold"] * (settings.model != "resnet19")):
            yield "network", name, "method proxy"
        if recipe.proxy.loss.target != "cross_entropy":
            yield "proxy", "logit_scale", f"target {recipe.proxy.loss.target}"
    if settings.neuron != "lifb":
        yield "network", "burst_init", f"neuron {settings.neuron}"
    if settings.neuron == "if":
        yield "network", "tau", "neuron if"
    if settings.model != "mlp":
        yield "network", "hidden", f"model {settings.model}"
    else:
        yield "network", "statistics", "model mlp"
    if settings.model not in GAINED:
        yield "network", "gain", f"model {settings.model}"


def _of_ann(recipe: AnnRecipe) -> Iterator[Idle]:
    settings = recipe.network
    if settings.activation != "qcfs":
        for name in ("levels", "ceiling_init"):
            yield "network", name, f"activation {settings.activation}"
    if settings.model != "mlp":
        yield "network", "hidden", f"model {settings.model}"
