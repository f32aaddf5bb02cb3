"""Small forms of the two papers' claims, on digits and a narrow deep network: averages over three seeds.

The margins seen are larger than what another machine's rounding moves; no number of a paper is expected.
"""

import statistics
from typing import Any

import pytest
import torch

from ranvier import losses
from ranvier.data import Batches
from ranvier.recipes import InputFormat, digits, load_data
from ranvier.training import fit

STEPS = 8


def trained(**settings: Any) -> tuple[list[float], float]:
    """Test accuracy in percent after 1 .. 8 steps, trained with 8, and how far the steps' outputs lie apart."""
    curves, divergences = [], []
    for seed in range(3):
        recipe = digits(seed=seed, model="mlp", hidden=(48,) * 5, steps=STEPS, epochs=10, device="cpu", **settings)
        splits = load_data(recipe)
        form = InputFormat.of(splits)
        torch.manual_seed(seed)
        model = form.build(recipe)
        normal = {"normalization": form.normalization}
        test = Batches(splits.test, 600, **normal)
        progress = fit(
            model,
            recipe.loss,
            Batches(splits.train, 64, shuffle=True, seed=seed, drop_last=True, **normal),
            test,
            epochs=recipe.epochs,
            steps=STEPS,
            optimization=recipe.optimization,
            execution=recipe.execution,
            quiet=True,
        )
        curves.append(progress.history[-1]["accuracy"])
        with torch.no_grad():
            logits = model.eval()(next(iter(test))[0], steps=STEPS)
        divergences.append(float(losses.temporal_consistency(logits)))
    accuracy = [100 * statistics.mean(at_step) for at_step in zip(*curves, strict=True)]
    return accuracy, statistics.mean(divergences)


@pytest.mark.slow
def test_consistency_draws_the_first_step_to_the_last_and_bursts_help_it_most() -> None:
    plain, plain_divergence = trained(neuron="lif", method="direct")
    consistent, divergence = trained(neuron="lif", method="etc", consistency_weight=4.0)
    burst, _ = trained(neuron="lifb", method="direct")
    seen = f"{plain}, {plain_divergence:.4f}; {consistent}, {divergence:.4f}; {burst}"
    assert divergence < plain_divergence / 2, seen
    assert consistent[-1] - consistent[0] < plain[-1] - plain[0], seen
    assert burst[0] > plain[0], seen
    assert burst[0] - plain[0] > burst[-1] - plain[-1], seen
