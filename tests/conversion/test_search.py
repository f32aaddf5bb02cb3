from dataclasses import replace

import pytest
import torch
from torch import nn

from ranvier.conversion import Search, Settings
from ranvier.conversion.progress import Progress
from ranvier.conversion.search import as_good, choose, divergence

IMAGES = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))


def ann() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


class Counter(Progress):
    """Counts what it is told."""

    def __init__(self) -> None:
        super().__init__(wanted=False)
        self.shown: list[str] = []

    def show(self, what: str) -> None:
        self.shown.append(what)


@pytest.mark.parametrize(
    ("refit", "leaky", "steps"), [(False, False, 2), (True, False, 2), (True, True, 2), (True, True, 1)]
)
@pytest.mark.parametrize("bias", ["none", "light", "potential", "ftbc", "auto"])
@pytest.mark.parametrize("threshold", ["max", "auto"])
@torch.no_grad()
def test_the_progress_bar_ends_where_it_was_said_to(threshold, bias, refit, leaky, steps) -> None:  # type: ignore[no-untyped-def]
    bar = Counter()
    settings = Settings(rounds=(0, 3, 1), step_sizes=(0.4, 0.1), batch_size=15)
    search = Search(ann(), IMAGES, steps=steps, settings=settings, bar=bar)
    kinds, biases = search.thresholds_to_try(threshold), search.biases_to_try(bias)
    expected = search.passes(kinds, biases, refit, leaky)
    bar.shown.clear()
    search.try_all(kinds, biases)
    if refit:
        search.try_refit()
    if leaky:
        search.try_leaky()
    search.finish()
    assert len(bar.shown) == expected


@torch.no_grad()
def test_every_trial_can_be_built_again_with_what_it_scored() -> None:
    search = Search(ann(), IMAGES, steps=3, settings=Settings(rounds=(1, 4)))
    search.try_all(("max", "mmse"), ("none", "light", "potential", "ftbc"))
    search.try_refit()
    search.try_leaky()
    assert len(search.trials) == 2 * (3 + 2 * 2) + 2 + 2 * len(search.settings.readout_decays)
    for trial in search.trials:
        errors, hits, far = search.measure(search.rebuild(trial))
        assert errors == trial.logit_error
        assert far == trial.candidate.divergence
        assert torch.equal(hits, trial.hits)


@torch.no_grad()
def test_one_step_has_nothing_to_forget() -> None:
    search = Search(ann(), IMAGES, steps=1)
    search.try_all(("max",), ("none",))
    search.try_leaky()
    assert len(search.trials) == 1


@torch.no_grad()
def test_a_readout_that_forgets_is_tried_once() -> None:
    search = Search(ann(), IMAGES, steps=3, settings=Settings(readout_decays=(0.5, 0.0)))
    search.try_all(("max",), ("none",))
    search.try_leaky()
    search.trials = search.trials[1:2]  # as if it were the best
    search.try_leaky()
    assert [trial.candidate.readout_decay for trial in search.trials] == [0.5]
    assert search.finish().readout_decay == 0.5


@torch.no_grad()
def test_weights_fitted_to_a_network_that_forgets_are_scored_as_they_are_built() -> None:
    search = Search(ann(), IMAGES, steps=3, settings=Settings(readout_decays=(0.5,)))
    search.try_all(("max",), ("none",))
    search.try_leaky()
    search.trials = search.trials[1:]
    search.try_refit()
    fitted = search.trials[-1]
    assert fitted.candidate.refit
    assert fitted.candidate.readout_decay == search.rebuild(fitted).readout_decay == 1
    assert search.measure(search.rebuild(fitted))[0] == fitted.logit_error


@torch.no_grad()
def test_refit_starts_from_the_best_of_every_threshold() -> None:
    search = Search(ann(), IMAGES, steps=3, settings=Settings(rounds=(1, 4)))
    search.try_all(("max", "mmse"), ("none", "ftbc"))
    search.try_refit()
    refitted = [trial.candidate for trial in search.trials if trial.candidate.refit]
    assert [one.threshold for one in refitted] == ["max", "mmse"]
    for one in refitted:
        best = search.best(
            [t for t in search.trials if t.candidate.threshold == one.threshold and not t.candidate.refit]
        )
        assert one.bias == best.candidate.bias
        further = len(search.images.fitting) if one.bias == "ftbc" else 0
        assert one.rounds == best.candidate.rounds + further


def test_divergence_forgives_scale_and_offset_and_nothing_else() -> None:
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits) == pytest.approx(0, abs=1e-6)
    # A power of ten's tenth is on the grid of scales: exact but for rounding.
    assert divergence(logits, logits * 10**-0.5 + 3) == pytest.approx(0, abs=1e-5)
    noise = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    slight, strong = (divergence(logits, logits + size * noise) for size in (0.1, 1.0))
    assert 1e-4 < slight < strong


def test_divergence_by_hand() -> None:
    """Two classes, one sample, the wrong sign: the flattest answer that the grid has is the best, k = 0.1."""
    wanted = torch.tensor([[2.0, 0.0]])
    p = float(torch.sigmoid(torch.tensor(2.0)))
    q = float(torch.sigmoid(torch.tensor(-0.1)))
    by_hand = p * torch.log(torch.tensor(p / q)) + (1 - p) * torch.log(torch.tensor((1 - p) / (1 - q)))
    assert divergence(wanted, torch.tensor([[0.0, 1.0]])) == pytest.approx(float(by_hand), rel=1e-5)


@torch.no_grad()
def test_a_silent_network_is_never_right() -> None:
    """All logits equal: an argmax that takes the first would score class 0."""
    silent = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)).eval()
    search = Search(silent, [(IMAGES, torch.zeros(60, dtype=torch.int64))], steps=2)
    snn = search.build("max")
    for neuron in snn.neurons.values():
        neuron.threshold.fill_(1e6)
        neuron.v_init.zero_()
    _, hits, _ = search.measure(snn)
    assert hits.sum() == 0


@torch.no_grad()
def test_a_longer_look_decides_among_those_that_a_first_one_cannot_tell_apart() -> None:
    images = torch.rand(700, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(3))
    quick = Settings(rounds=(1, 4), fit_at_most=100, first_look=150, batch_size=50)
    search = Search(ann(), images, steps=1, settings=quick)
    assert (search.images.fitted, sum(map(len, search.images.choosing))) == (100, 600)
    search.try_all(("max", "mmse"), ("none", "light", "ftbc"))
    assert {len(trial.hits) for trial in search.trials} == {150}
    first = as_good(search.trials)
    assert 1 < len(first) < len(search.trials)  # else this proves nothing
    best = search.best()
    assert search.best() is best  # and measures nothing again
    settled = {id(trial) for trial in search.trials if len(trial.hits) == 600}
    assert id(best) in settled
    assert len(settled) == len(first)
    for trial in search.trials:
        errors, hits, far = search.measure(
            search.rebuild(trial), None if id(trial) in settled else search.first_batches
        )
        assert (errors, far) == (trial.logit_error, trial.candidate.divergence)
        assert torch.equal(hits, trial.hits)
    # The same choice as when all had seen all images at once, among those that were kept.
    whole = Search(ann(), images, steps=1, settings=replace(quick, first_look=600))
    whole.try_all(("max", "mmse"), ("none", "light", "ftbc"))
    kept = {(t.candidate.threshold, t.candidate.bias, t.candidate.rounds) for t in first}
    among = [t for t in whole.trials if (t.candidate.threshold, t.candidate.bias, t.candidate.rounds) in kept]
    same = choose(among).candidate
    assert replace(same, logit_error=0.0, divergence=0.0) == replace(best.candidate, logit_error=0.0, divergence=0.0)
    assert same.logit_error == pytest.approx(best.candidate.logit_error)  # the sums have other parts
    assert same.divergence == pytest.approx(best.candidate.divergence)
    search.finish()
    assert search.finish().report.chosen_on == 600
