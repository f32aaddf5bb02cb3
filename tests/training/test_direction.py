"""Small forms of the two papers' claims, on digits and a narrow deep network: averages over three seeds.

The margins seen are larger than what another machine's rounding moves; no number of a paper is expected.
"""

import statistics

import pytest
import torch

from ranvier.data import Batches
from ranvier.recipes import InputFormat, digits, load_data
from ranvier.training import fit

STEPS = 8


def mean_accuracy(**settings: str) -> list[float]:
    """Accuracy in percent after 1 .. 8 steps, trained with 8."""
    curves = []
    for seed in range(3):
        recipe = digits(seed=seed, model="mlp", hidden=(48,) * 5, steps=STEPS, epochs=15, device="cpu", **settings)
        splits = load_data(recipe)
        form = InputFormat.of(splits)
        torch.manual_seed(seed)
        normal = {"normalization": form.normalization}
        progress = fit(
            form.build(recipe),
            recipe.loss,
            Batches(splits.train, 64, shuffle=True, seed=seed, drop_last=True, **normal),
            Batches(splits.test, 600, **normal),
            epochs=recipe.epochs,
            steps=STEPS,
            optimization=recipe.optimization,
            execution=recipe.execution,
            quiet=True,
        )
        curves.append(progress.history[-1]["accuracy"])
    return [100 * statistics.mean(at_step) for at_step in zip(*curves, strict=True)]


@pytest.mark.slow
def test_consistency_helps_the_first_step_and_bursts_help_most_there() -> None:
    plain = mean_accuracy(neuron="lif", method="direct")
    consistent = mean_accuracy(neuron="lif", method="etc")
    burst = mean_accuracy(neuron="lifb", method="direct")
    # Seen: +3.2 at T=1, -1.1 at T=8.
    assert consistent[0] > plain[0]
    assert consistent[0] - plain[0] > consistent[-1] - plain[-1]
    # Seen: +17 at T=1, +8 at T=8.
    assert burst[0] - plain[0] > 5
    assert burst[0] - plain[0] > burst[-1] - plain[-1]
