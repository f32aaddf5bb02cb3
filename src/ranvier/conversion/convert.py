"""From a trained ANN and some images to a spiking network."""

from typing import Literal

import torch
from torch import nn

from ranvier.checks import check_choice, check_count
from ranvier.conversion.bias import BIASES, Bias
from ranvier.conversion.calibration import Calibration
from ranvier.conversion.progress import Progress
from ranvier.conversion.search import Search, Settings
from ranvier.conversion.spiking import ConvertedSNN
from ranvier.conversion.threshold import THRESHOLDS, Threshold
from ranvier.kernels.full_float32 import full_float32


@full_float32()
def convert(
    ann: nn.Module,
    calibration: Calibration,
    *,
    steps: int,
    threshold: Threshold | Literal["auto"] = "mmse",
    bias: Bias | Literal["auto"] = "ftbc",
    signed: bool = False,
    refit: bool | None = None,
    leaky: bool | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> ConvertedSNN:
    """Make a spiking network of a trained ANN, from forward passes on a few images.

    Every activation becomes a layer of integrate-and-fire neurons with soft reset, whose spikes carry the threshold;
    batch normalisation is folded; the last layer stays analog. Then neurons are corrected so that they stand for their
    activations from the first step on. The ANN is left as it is, and converted as it runs in evaluation mode, whatever
    mode it is in.

    Nothing is taken on trust: where there is a choice (`auto`, rounds of FTBC including none, fitted weights), it is
    made on calibration images that were held out, after all `steps`: by accuracy, where they come without labels
    against the ANN's own answers. What lies within two standard errors of the best, too close for so few images to
    tell, is told apart by how far the answers diverge from the ANN's: see `ranvier.conversion.search.divergence`.

    Args:
        ann: A module that maps images `[B, ...]` to logits `[B, K]` and is made of convolutions, linear layers, ReLU
            and the like, see `trace`; or a network of `ranvier.models` built with activations.
        calibration: Images of the training set, prepared as for training: a tensor, or batches with or without labels.
            600 are fitted on; the more there are beyond, the better the choice.
        steps: T, for which the network is calibrated.
        threshold: `max`, `percentile`, `mmse`, `balance`, `qcfs` (learned ceilings), or `auto`: see `thresholds`.
        bias: `none`, `light` (constant), `potential` (initial potentials), `ftbc` (one per step); `auto` tries none,
            light, ftbc, fitted weights and readouts that forget.
        signed: Whether neurons that fired too often may take spikes back (SNM). Far more accurate from T = 2 on, if
            the hardware can send negative spikes.
        refit: Whether to try to fit the weights of each layer to the spikes that reach it, by least squares: see
            `Refit`. None tries it where bias is `auto`.
        leaky: Whether to try a readout that forgets, so that the first steps, at which few spikes have come that far,
            count less: see `ranvier.dynamics.leaky_mean`. None tries it where bias is `auto`.
        settings: The fine print.
        progress: Show a progress bar if there is a terminal.

    Returns:
        The network; `.report` says what was chosen and lost. With `bias="ftbc"`, where the thresholds do not depend on
        T (all but mmse), the first t steps are what a conversion with steps=t and as many rounds gives.

    Raises:
        ConversionError: The ANN has something that cannot be converted; the message names it, its line and a remedy.
        TypeError: `ann` is no module, the calibration is not made of images, or `settings` are no `Settings`.
        ValueError: Empty, inconsistent or non-finite calibration, or settings out of range.

    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> snn = convert(ann, torch.rand(50, 4), steps=8, threshold="max", bias="none")
    >>> snn(torch.rand(5, 4), steps=8).shape
    torch.Size([8, 5, 3])
    """
    steps = check_count("steps", steps)
    check_choice("threshold", threshold, (*THRESHOLDS, "auto"))
    check_choice("bias", bias, (*BIASES, "auto"))
    if not isinstance(ann, nn.Module):
        raise TypeError(
            f"ann is a {type(ann).__name__}, but must be a torch.nn.Module. Build the network and load its weights "
            "first; one that ranvier trained is ranvier.recipes.load_trained(folder).model."
        )
    settings = Settings() if settings is None else settings
    if not isinstance(settings, Settings):
        raise TypeError(f"settings are a {type(settings).__name__}, but must be ranvier.conversion.Settings(...).")
    refit = bias == "auto" if refit is None else refit
    leaky = bias == "auto" if leaky is None else leaky
    with torch.inference_mode(False), torch.no_grad(), Progress(progress) as bar:
        search = Search(ann, calibration, steps=steps, signed=signed, settings=settings, bar=bar)
        kinds, biases = search.thresholds_to_try(threshold), search.biases_to_try(bias)
        bar.expect(search.passes(kinds, biases, refit, leaky))
        search.try_all(kinds, biases)
        if refit:
            search.try_refit()
        if leaky:
            search.try_leaky()
        return search.finish()
