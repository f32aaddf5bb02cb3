"""The account of a conversion: what was chosen, what was lost where, what it cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from ranvier.atomic import tuples, write_json
from ranvier.conversion.bias import Bias
from ranvier.conversion.threshold import Threshold
from ranvier.report import conversion_errors


@dataclass(frozen=True)
class LayerAccount:
    """One layer of neurons, measured on the images that settings were chosen on.

    Attributes:
        name: Activation of the ANN that the layer stands for.
        channels: C.
        threshold: Mean over channels, in the unit of the activation.
        error_before: Relative mean error of each step without correction,
            `sum_c |E y[t, c] - E a[c]| / sum_c E a[c]`, y transmitted and a the activation.
        error_after: The same after correction.
        firing_rate: Spikes per neuron at each step.
        dead: Share of channels that never fired.
        saturated: Share of channels that fired everywhere at every step.
        infeasible: Share of channels whose mean activation exceeds the threshold, so that no bias can reach it.
    """

    name: str
    channels: int
    threshold: float
    error_before: tuple[float, ...]
    error_after: tuple[float, ...]
    firing_rate: tuple[float, ...]
    dead: float
    saturated: float
    infeasible: float


@dataclass(frozen=True)
class Candidate:
    """One combination of settings and how it did.

    Attributes:
        threshold: Kind of threshold.
        bias: Kind of correction.
        rounds: FTBC rounds.
        step_size: FTBC step size.
        refit: Whether weights were fitted to the spikes.
        divergence: From the answers of the ANN after all steps [nats], see `ranvier.conversion.search.divergence`.
        logit_error: Squared difference to the ANN's logits after all steps, over the variance of those.
        accuracy: On the images chosen on, after all steps; against their labels or the answers of the ANN.
        readout_decay: Of a readout that forgets, see `ranvier.dynamics.leaky_mean`; 1 for one that does not.
    """

    threshold: Threshold
    bias: Bias
    rounds: int
    step_size: float
    refit: bool
    divergence: float
    logit_error: float
    accuracy: float
    readout_decay: float = 1.0

    def __str__(self) -> str:
        ftbc = f" ({self.rounds} rounds of {self.step_size:g})" if self.bias == "ftbc" else ""
        fitted = ", weights refitted" if self.refit else ""
        leaky = f", readout decay {self.readout_decay:g}" if self.readout_decay != 1 else ""
        return f"threshold {self.threshold}, bias {self.bias}{ftbc}{fitted}{leaky}"


@dataclass(frozen=True)
class Account:
    """What a conversion did.

    Attributes:
        steps: T that was calibrated for.
        chosen: The settings that the network has.
        candidates: All settings that were tried, in order.
        scored_against: What counted as right: `labels`, or `answers of the ANN`.
        signed: Whether neurons may take spikes back.
        fitted_on: Images that thresholds and biases were computed from.
        chosen_on: Images that settings were chosen and errors were measured on.
        held_out: Whether the latter are apart from the former.
        logit_error: After 1 .. T steps, as in `Candidate`.
        layers: In the order in which they run.
        seconds: By stage.
        bytes_added: Thresholds, biases and initial potentials that the spiking network has beyond the ANN's weights.
        bytes_currents: Currents of the largest layer for one batch: what calibration held at a time.
        versions: Of python, torch and ranvier.
        device: Where it ran.
    """

    steps: int
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    scored_against: str
    signed: bool
    fitted_on: int
    chosen_on: int
    held_out: bool
    logit_error: tuple[float, ...]
    layers: tuple[LayerAccount, ...]
    seconds: dict[str, float]
    bytes_added: int
    bytes_currents: int
    versions: dict[str, str]
    device: str

    @property
    def total_seconds(self) -> float:
        """Time that the conversion took."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.chosen}{', signed spikes' * self.signed}; {self.total_seconds:.1f} s"

    def __rich__(self) -> Group:
        """Tables for the terminal: layers, and the choices where there were some."""
        where = "held-out images" if self.held_out else "images that were fitted on"
        layers = Table(
            title=f"Conversion to {self.steps} steps: {self.chosen}{', signed spikes' * self.signed}",
            caption="errors: relative mean error before and after correction, at the first and the last step; "
            "channels: dead never fire, always fire at every step, above have a mean activation above their threshold; "
            f"measured on {self.chosen_on} {where}, fitted on {self.fitted_on}; {self.total_seconds:.1f} s, "
            f"{self.bytes_added / 1024:.0f} KiB added",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        layers.add_column("layer", overflow="fold")
        for title in ("C", "thr.", "error t=1", f"t={self.steps}", "rate", "dead", "always", "above"):
            layers.add_column(title, justify="right", no_wrap=True)
        for layer in self.layers:
            layers.add_row(
                layer.name,
                str(layer.channels),
                f"{layer.threshold:.3g}",
                f"{layer.error_before[0]:.2f} {layer.error_after[0]:.2f}",
                f"{layer.error_before[-1]:.2f} {layer.error_after[-1]:.2f}",
                f"{sum(layer.firing_rate) / len(layer.firing_rate):.3f}",
                *(f"{100 * share:.0f} %" for share in (layer.dead, layer.saturated, layer.infeasible)),
            )
        if len(self.candidates) == 1:
            return Group(layers)
        tried = Table(
            title="Settings tried",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            caption=f"accuracy against {self.scored_against}; what is within two standard errors of the best is told "
            "apart by the divergence from the ANN",
        )
        settings = ("threshold", "bias", "rounds", "step", "refit", "decay")
        for title in (*settings, "divergence", "logit error", "accuracy %"):
            tried.add_column(title, justify="right")
        for one in self.candidates:
            tried.add_row(
                one.threshold,
                one.bias,
                str(one.rounds) if one.bias == "ftbc" else "",
                f"{one.step_size:g}" if one.bias == "ftbc" else "",
                "yes" if one.refit else "",
                f"{one.readout_decay:g}" if one.readout_decay != 1 else "",
                f"{one.divergence:.4f}",
                f"{one.logit_error:.4f}",
                f"{100 * one.accuracy:.2f}",
                style="bold" if one == self.chosen else None,
            )
        return Group(tried, layers)

    def plot(self, path: str | Path) -> None:
        """Draw the error of every layer and step, before and after correction."""
        conversion_errors(
            [layer.name for layer in self.layers],
            [layer.error_before for layer in self.layers],
            [layer.error_after for layer in self.layers],
            title=f"Relative mean error, {self.chosen}",
            path=path,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write everything as json."""
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The account that `to_json` wrote."""
        values = tuples(content)
        values["chosen"] = Candidate(**content["chosen"])
        values["candidates"] = tuple(Candidate(**one) for one in content["candidates"])
        values["layers"] = tuple(LayerAccount(**tuples(layer)) for layer in content["layers"])
        return cls(**values)
