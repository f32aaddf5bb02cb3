"""The whole conversion: what it leaves alone, what it refuses, and that its report is true of what it returns."""

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier import models
from ranvier.conversion import Account, Candidate, ConversionError, ConvertedSNN, Settings, convert, trace
from ranvier.conversion.bias import BIASES, VARIANTS, ftbc
from ranvier.conversion.calibration import CalibrationImages, gather
from ranvier.conversion.search import Search, Trial, choose
from ranvier.conversion.threshold import THRESHOLDS
from ranvier.data import load_digits
from ranvier.nn import QCFS, Readout, TimeFolded
from ranvier.nn.structure import Activation, Chain, Concat, conv_norm

from .dyadic import exact, images

STEPS = 3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def mlp(*, bias: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers = [nn.Linear(6, 16, bias=bias), activation(), nn.Linear(16, 12, bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(12, 4, bias=bias))


class ConvNet(nn.Module):
    """Normalisation, dropout, and a pooling that takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.dropout = nn.Dropout()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)))


def trained() -> tuple[ConvNet, Tensor]:
    """In training mode, with statistics; and images."""
    ann, x = ConvNet(), torch.rand(60, 1, 6, 6)
    for _ in range(3):
        ann(x)
    return ann, x


def report_of(snn: ConvertedSNN) -> Account:
    assert snn.report is not None
    return snn.report


def parts(x: Tensor, settings: Settings) -> CalibrationImages:
    """How a conversion with these settings splits its images."""
    return gather(
        x,
        batch_size=settings.batch_size,
        held_out=settings.held_out,
        fit_at_most=settings.fit_at_most,
        seed=settings.seed,
        device=torch.device("cpu"),
    )


@torch.no_grad()
def measured(snn: ConvertedSNN, ann: nn.Module, x: Tensor, labels: Tensor | None = None) -> tuple[list[float], Tensor]:
    """Logit errors after 1 .. T steps and hits after T, as documented, in float64 and without batches."""
    wanted, logits = ann(x).double(), snn(x, snn.steps).double()
    variance = wanted.var(0, correction=0).mean()
    errors = [float((logits[:t].mean(0) - wanted).square().mean() / variance) for t in range(1, snn.steps + 1)]
    answers = wanted.argmax(1) if labels is None else labels
    return errors, logits.mean(0).argmax(1) == answers


def test_the_ann_is_left_as_it_is() -> None:
    ann, x = trained()
    ann.features[1].eval()  # modes may be mixed
    ann.head.weight.requires_grad_(False)
    modes = [module.training for module in ann.modules()]
    grads = [parameter.requires_grad for parameter in ann.parameters()]
    before = copy.deepcopy(ann.state_dict())
    for bias, refit in (("ftbc", True), ("potential", False)):
        snn = convert(ann, x, steps=STEPS, bias=bias, refit=refit)
        for tensor in snn.state_dict().values():
            tensor.zero_()
    assert [module.training for module in ann.modules()] == modes
    assert [parameter.requires_grad for parameter in ann.parameters()] == grads
    assert all(torch.equal(tensor, before[key]) for key, tensor in ann.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ann.modules())


def test_a_network_in_training_mode_is_converted_as_in_evaluation() -> None:
    ann, x = trained()
    training = convert(ann, x, steps=STEPS)
    assert ann.training
    evaluation = convert(ann.eval(), x, steps=STEPS)
    assert torch.equal(training(x, STEPS), evaluation(x, STEPS))
    assert report_of(training).candidates == report_of(evaluation).candidates


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("refit", [False, True])
def test_the_report_is_true_of_the_network(threshold: Any, bias: Any, refit: bool) -> None:
    """Whatever was chosen, the network that comes back is the one that was measured: layers without biases, too."""
    ann = mlp(bias=not refit, activation=QCFS if threshold == "qcfs" else nn.ReLU)
    x = torch.randn(400, 6)
    settings = Settings(rounds=(0, 2), batch_size=100, per_channel=bias != "light", v_init=0.5)
    signed = bias == "ftbc"
    snn = convert(ann, x, steps=STEPS, threshold=threshold, bias=bias, refit=refit, signed=signed, settings=settings)
    report = report_of(snn)
    held_out = torch.cat(parts(x, settings).choosing)
    errors, hits = measured(snn, ann, held_out)
    # float32 sums over 160 images; no spike is moved, since the same batches run through the same network.
    assert report.logit_error == pytest.approx(errors, rel=1e-4)
    assert report.chosen.logit_error == report.logit_error[-1]
    assert report.chosen.accuracy == pytest.approx(float(hits.float().mean()))
    assert len(report.candidates) == (1 + len(settings.step_sizes) if bias == "ftbc" else 1) + refit
    assert report.chosen in report.candidates
    assert {candidate.threshold for candidate in report.candidates} == {threshold}
    assert {candidate.bias for candidate in report.candidates} == {bias}
    assert all(neuron.signed is signed for neuron in snn.neurons.values())


@torch.no_grad()
def test_layers_of_the_report() -> None:
    """Errors, rates and shares by definition, from what the neurons send on the held-out images."""
    ann, x = trained()
    ann.eval()
    settings = Settings(rounds=(3,), batch_size=20, held_out=0.35)  # 21 images, which are batches of 11 and of 10
    snn = convert(ann, x, steps=STEPS, threshold="percentile", bias="ftbc", settings=settings)
    plain = convert(ann, x, steps=STEPS, threshold="percentile", bias="none", settings=settings)
    held_out = torch.cat(parts(x, settings).choosing)
    graph = trace(ann, held_out)
    report = report_of(snn)
    assert [layer.name for layer in report.layers] == list(snn.neurons)
    found: dict[str, Any] = {}

    def keep(network: nn.Module, key: str, name: str) -> None:
        network.register_forward_hook(lambda _, __, y: found.__setitem__(f"{key} {name}", y))

    for name in snn.neurons:
        keep(graph.get_submodule(name), "a", name)
        keep(snn.neurons[name], "after", name)
        keep(plain.neurons[name], "before", name)
    graph(held_out), snn(held_out, STEPS), plain(held_out, STEPS)
    for layer in report.layers:
        a = found[f"a {layer.name}"].transpose(0, 1).flatten(1).mean(1)
        for key, reported in (("before", layer.error_before), ("after", layer.error_after)):
            sent = found[f"{key} {layer.name}"].transpose(1, 2).flatten(2).mean(2)
            errors = (sent - a).abs().sum(1) / a.sum()
            assert reported == pytest.approx(errors.tolist(), rel=1e-4)  # float32 sums
        fired = found[f"after {layer.name}"] != 0
        by_channel = fired.transpose(1, 2).flatten(2).double().mean(2)
        threshold = snn.neurons[layer.name].threshold
        assert layer.channels == len(threshold)
        assert layer.threshold == pytest.approx(float(threshold.mean()))
        assert layer.firing_rate == pytest.approx(by_channel.mean(1).tolist(), rel=1e-4)
        assert layer.dead == pytest.approx(float((by_channel == 0).all(0).float().mean()))
        assert layer.saturated == pytest.approx(float((by_channel == 1).all(0).float().mean()))
        assert layer.infeasible == pytest.approx(float((a > threshold).float().mean()))
    assert sum(sum(layer.error_after) for layer in report.layers) < sum(
        sum(layer.error_before) for layer in report.layers
    )


def test_dead_channels_never_fire() -> None:
    """Not those that are silent at some step, as all are at the first one when potentials start at 0."""
    ann, x = trained()
    ann.features[4].bias.data[0] = -100.0
    settings = Settings(v_init=0.0)
    snn = convert(ann, x, steps=16, threshold="max", bias="none", settings=settings)
    for layer, share in zip(report_of(snn).layers, (0.0, 1 / 8), strict=True):
        assert layer.firing_rate[0] < 0.01
        assert layer.dead == pytest.approx(share)


def test_the_rest_of_the_report() -> None:
    ann, x = trained()
    snn = convert(ann, x, steps=STEPS, settings=Settings(rounds=(1,), held_out=0.25, batch_size=20), refit=True)
    report = report_of(snn)
    assert (report.steps, report.fitted_on, report.chosen_on, report.held_out) == (STEPS, 45, 15, True)
    assert report.seconds.keys() == {"trace", "thresholds", "biases", "weights", "choosing", "measuring"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    # Threshold, v_init and one bias per step in float32, for 6 and 8 channels.
    assert report.bytes_added == 4 * (2 + STEPS) * (6 + 8)
    # The layer before the max-pooling fires after it: 3 x 3 positions in both layers. All 15 images are one batch.
    assert report.bytes_currents == 4 * STEPS * 15 * 8 * 3 * 3
    assert report.device
    assert "torch" in report.versions
    everything = convert(ann, x, steps=STEPS, bias="none", settings=Settings(held_out=0))
    assert (report_of(everything).fitted_on, report_of(everything).chosen_on) == (60, 60)
    assert report_of(everything).held_out is False


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor]:
    """A small network that was trained on 400 digits, and those."""
    data = load_digits()
    x = data.train.images[:400].flatten(1) / 255
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(ann.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(ann(x), data.train.labels[:400]).backward()
        optimizer.step()
    return ann, x


def rule(trials: list[Trial]) -> Trial:
    """The choice as documented: the least divergence of all that are within two standard errors of the best."""
    best = max(trials, key=lambda trial: (trial.hits.mean(), -trial.candidate.divergence)).hits.double()
    leads = [best - trial.hits for trial in trials]
    close = [lead.mean() <= 2 * lead.std(correction=0) / len(best) ** 0.5 for lead in leads]
    return min(itertools.compress(trials, close), key=lambda trial: trial.candidate.divergence)


@pytest.mark.parametrize("signed", [False, True])
def test_auto_tries_everything_and_chooses_by_the_documented_rule(
    digits: tuple[nn.Module, Tensor], signed: bool
) -> None:
    ann, x = digits
    settings = Settings(rounds=(0, 1, 4), batch_size=80, step_sizes=(0.3, 0.6))
    search = Search(ann, x, steps=2, signed=signed, settings=settings)
    search.try_all(("max", "percentile", "mmse"), ("none", "light", "ftbc"))
    tried = [
        (one.threshold, one.bias, one.rounds, one.step_size) for one in (trial.candidate for trial in search.trials)
    ]
    kinds = [("none", 0, 0.0), ("light", 0, 0.0), *(("ftbc", n, size) for size in (0.3, 0.6) for n in (1, 4))]
    assert tried == [(threshold, *kind) for threshold in ("max", "percentile", "mmse") for kind in kinds]

    assert search.best() is rule(search.trials)

    starts = [rule([trial for trial in search.trials if trial.candidate.threshold == kind]) for kind in search.found]
    before = len(search.trials)
    search.try_refit()
    for start, fitted in zip(starts, search.trials[before:], strict=True):
        assert fitted.candidate.refit
        assert fitted.candidate.threshold == start.candidate.threshold
        assert fitted.candidate.bias == start.candidate.bias
        with_ftbc = len(search.images.fitting) if start.candidate.bias == "ftbc" else 0
        assert fitted.candidate.rounds == start.candidate.rounds + with_ftbc

    starts = [rule([trial for trial in search.trials if trial.candidate.threshold == kind]) for kind in search.found]
    before = len(search.trials)
    search.try_leaky()
    leaky = [trial.candidate for trial in search.trials[before:]]
    for (start, decay), one in zip(itertools.product(starts, settings.readout_decays), leaky, strict=True):
        scores = {name: getattr(one, name) for name in ("divergence", "logit_error", "accuracy")}
        assert one == dataclasses.replace(start.candidate, readout_decay=decay, **scores)
    assert search.best() is rule(search.trials)

    held_out = torch.cat(parts(x, settings).choosing)
    for trial in search.trials:  # also those that others went on from
        errors, hits = measured(search.rebuild(trial), ann, held_out)
        assert trial.logit_error == pytest.approx(errors, rel=1e-4)  # float32 sums
        assert torch.equal(trial.hits, hits.float())

    report = report_of(convert(ann, x, steps=2, threshold="auto", bias="auto", signed=signed, settings=settings))
    assert report.candidates == tuple(trial.candidate for trial in search.trials)
    assert report.chosen == rule(search.trials).candidate
    assert not any(
        one.accuracy > report.chosen.accuracy and one.divergence < report.chosen.divergence for one in report.candidates
    )


@pytest.mark.parametrize(("bias", "refit", "tried"), [("auto", None, 1), ("auto", False, 0), ("ftbc", None, 0)])
def test_weights_are_fitted_where_the_correction_is_chosen(bias: Any, refit: bool | None, tried: int) -> None:
    settings = Settings(rounds=(1,), batch_size=20)
    snn = convert(mlp(), torch.randn(100, 6), steps=2, threshold="max", bias=bias, refit=refit, settings=settings)
    assert sum(one.refit for one in report_of(snn).candidates) == tried


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trial_stays_what_was_measured(variant: Any) -> None:
    """Neither what is fitted further, starting from it, nor what is done to a network built from it changes it."""
    x = torch.randn(100, 6)
    search = Search(
        mlp(), x, steps=2, settings=Settings(rounds=(2,), step_sizes=(0.4,), batch_size=20, variant=variant)
    )
    search.try_all(("max",), ("ftbc",))
    (first,) = search.trials
    before = search.rebuild(first)(x, 2)
    search.try_refit()
    for tensor in search.rebuild(first).state_dict().values():
        tensor.zero_()
    assert torch.equal(search.rebuild(first)(x, 2), before)


def trial(hits: str, divergence: float) -> Trial:
    row = torch.tensor([float(hit) for hit in hits])
    candidate = Candidate("max", "none", 0, 0.0, False, divergence, 1.0, float(row.mean()))
    return Trial(candidate, (1.0,), row, {})


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        # 3 hits of 8 more and none less: mean lead 3/8, standard error sqrt(3/8 5/8) / sqrt(8) = 0.171. It counts.
        ([("11111110", 0.9), ("11110000", 0.1)], 0),
        # 2 of 8: mean lead 2/8, standard error sqrt(2/8 6/8) / sqrt(8) = 0.153. It does not.
        ([("11111110", 0.9), ("11111000", 0.1)], 1),
        # 4 more and 1 less: mean lead 3/8, standard error sqrt(5/8 - 9/64) / sqrt(8) = 0.246. It does not.
        ([("11111110", 0.9), ("11100001", 0.1)], 1),
        ([("11110000", 0.5), ("00001111", 0.4), ("11110000", 0.3)], 2),
        ([("11110000", 0.3), ("11110000", 0.3)], 0),
        ([("11111111", 0.9), ("00000000", 0.0)], 0),
    ],
)
def test_the_rule_on_paper(trials: list[tuple[str, float]], chosen: int) -> None:
    candidates = [trial(*one) for one in trials]
    assert choose(candidates) is candidates[chosen]
    assert rule(candidates) is candidates[chosen]


def test_auto_for_learned_ceilings() -> None:
    ann = mlp(activation=QCFS)
    snn = convert(ann, torch.randn(100, 6), steps=2, threshold="auto", bias="none")
    assert [one.threshold for one in report_of(snn).candidates] == ["qcfs", "percentile", "mmse"]


def test_a_search_by_hand() -> None:
    """As its docstring shows."""
    x = torch.randn(60, 6)
    search = Search(mlp(), x, steps=4)
    search.try_all(("max", "mmse"), ("none", "ftbc"))
    shapes = [search.rebuild(trial)(x, 4).shape for trial in search.trials]
    assert len(shapes) == 2 * (1 + 4 * 2)  # none, which is no rounds, too; rounds of two step sizes
    assert set(shapes) == {(4, 60, 4)}
    with pytest.raises(ValueError, match="bias is 'gradient'"):
        search.try_all(("max",), ("gradient",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold is 'median'"):
        search.try_all(("median",), ("none",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps is 0"):
        Search(mlp(), x, steps=0)


@pytest.mark.parametrize(
    ("bias", "leaky", "tried"),
    [("none", None, False), ("none", True, True), ("auto", None, True), ("auto", False, False)],
)
def test_readouts_that_forget_are_tried_with_auto_or_where_asked_for(
    bias: Any, leaky: bool | None, tried: bool
) -> None:
    settings = Settings(rounds=(1,), readout_decays=(0.5, 0.25))
    snn = convert(mlp(), torch.randn(60, 6), steps=3, bias=bias, leaky=leaky, settings=settings)
    decays = {one.readout_decay for one in report_of(snn).candidates}
    assert decays == ({1.0, 0.5, 0.25} if tried else {1.0})
    assert snn.readout_decay == report_of(snn).chosen.readout_decay


def test_rounds_and_step_sizes_that_are_tried() -> None:
    settings = Settings(rounds=(2, 0, 5, 2), step_sizes=(0.2, 0.5), batch_size=30)
    snn = convert(mlp(), torch.randn(100, 6), steps=2, bias="ftbc", settings=settings)
    tried = [(one.rounds, one.step_size) for one in report_of(snn).candidates]
    assert tried == [(0, 0.2), (2, 0.2), (5, 0.2), (2, 0.5), (5, 0.5)]
    assert 0 in [one.rounds for one in report_of(convert(mlp(), torch.randn(50, 6), steps=2)).candidates]


def test_later_rounds_go_on_from_earlier_ones() -> None:
    """Five rounds among others are five rounds by themselves, batch by batch."""
    ann, x = mlp(), torch.randn(100, 6)
    together = report_of(convert(ann, x, steps=2, settings=Settings(rounds=(0, 2, 5), batch_size=20)))
    alone = report_of(convert(ann, x, steps=2, settings=Settings(rounds=(5,), batch_size=20)))
    assert together.candidates[-1] == alone.candidates[-1]
    assert len(alone.candidates) == len(Settings().step_sizes) > 1


def test_rounds_take_one_batch_after_the_other() -> None:
    ann, x = mlp(), torch.randn(100, 6)
    settings = Settings(rounds=(5,), batch_size=20, step_sizes=(0.3,), variant="V2")
    snn = convert(ann, x, steps=STEPS, threshold="max", bias="ftbc", settings=settings)
    search = Search(ann, x, steps=STEPS, settings=settings)
    by_hand = search.build("max")
    batches = parts(x, settings).fitting
    assert len(batches) == 3
    with torch.no_grad():
        for batch in (*batches, *batches[:2]):
            ftbc(trace(ann, x), by_hand, batch, STEPS, step_size=0.3, variant="V2")
    for neuron, expected in zip(snn.neurons.values(), by_hand.neurons.values(), strict=True):
        assert torch.equal(neuron.bias, expected.bias)
        assert torch.equal(neuron.threshold, expected.threshold)


def test_fitted_weights_are_refused_where_they_do_not_help() -> None:
    """50 inputs and 20 images to fit on: what fits those does not fit others."""
    torch.manual_seed(2)
    ann = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 4))
    x = torch.randn(200, 6)
    snn = convert(ann, x, steps=16, threshold="max", bias="none", refit=True, settings=Settings(held_out=0.9))
    kept, fitted = report_of(snn).candidates
    assert (kept.refit, fitted.refit) == (False, True)
    assert fitted.divergence > kept.divergence
    assert fitted.accuracy < kept.accuracy
    assert report_of(snn).chosen == kept
    assert torch.equal(snn.network.get_submodule("2").weight, ann[2].weight)


def test_fitted_weights_are_taken_where_they_help() -> None:
    ann, x = mlp(), torch.randn(2000, 6)
    snn = convert(ann, x, steps=1, threshold="max", bias="none", refit=True)
    kept, fitted = report_of(snn).candidates
    assert fitted.logit_error < kept.logit_error / 2
    assert report_of(snn).chosen == fitted
    assert not torch.equal(snn.network.get_submodule("2").weight, ann[2].weight)


def test_labels() -> None:
    ann, x = mlp(), torch.randn(120, 6)
    with torch.no_grad():
        answers = ann(x).argmax(1)
    loader = [(x[start : start + 40], answers[start : start + 40]) for start in (0, 40, 80)]
    without = report_of(convert(ann, x, steps=2, bias="none"))
    right = report_of(convert(ann, loader, steps=2, bias="none"))
    wrong = report_of(convert(ann, [(images, (labels + 1) % 4) for images, labels in loader], steps=2, bias="none"))
    assert (without.scored_against, right.scored_against) == ("answers of the ANN", "labels")
    assert right.candidates == without.candidates
    assert without.chosen.accuracy > 0.5
    assert wrong.chosen.accuracy <= 1 - without.chosen.accuracy + 1e-6  # float32 means of hits
    assert wrong.chosen.logit_error == without.chosen.logit_error


def test_batches_and_iterators_give_what_a_tensor_gives() -> None:
    ann, x = mlp(), torch.randn(100, 6)
    whole = convert(ann, x, steps=2)
    for calibration in ([x[:70], x[70:]], (batch for batch in x.split(9))):
        assert torch.equal(convert(ann, calibration, steps=2)(x, 2), whole(x, 2))


def test_the_seed_decides() -> None:
    ann, x = mlp(), torch.randn(100, 6)

    def run(seed: int) -> tuple[Tensor, tuple[Candidate, ...]]:
        torch.rand(seed + 1)  # the state of the global generator must not matter
        snn = convert(ann, x, steps=2, refit=True, settings=Settings(seed=seed))
        return torch.cat([tensor.flatten() for tensor in snn.state_dict().values()]), report_of(snn).candidates

    first, second, other = run(0), run(0), run(1)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[1] != other[1]


def test_randomness_is_not_used_up() -> None:
    before = torch.get_rng_state()
    convert(mlp_once := mlp(), images(20, 6), steps=2)
    torch.set_rng_state(before)
    mlp()
    state = torch.get_rng_state()
    convert(mlp_once, images(20, 6), steps=2, refit=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("threshold", ["max", "qcfs"])
def test_the_first_steps_are_a_conversion_to_fewer(threshold: Any) -> None:
    """As the docstring promises; bit for bit where all numbers are exact in binary (see `dyadic`)."""
    ann = exact(mlp(activation=QCFS if threshold == "qcfs" else nn.ReLU))
    for module in ann.modules():
        if isinstance(module, QCFS):
            module.ceiling.data.fill_(4.0)
    x = images(64, 6)
    settings = Settings(rounds=(3,), step_sizes=(0.5,), batch_size=16, held_out=0.5)
    six = convert(ann, x, steps=6, threshold=threshold, bias="ftbc", settings=settings)
    for steps in (1, 2, 4):
        fewer = convert(ann, x, steps=steps, threshold=threshold, bias="ftbc", settings=settings)
        assert torch.equal(fewer(x, steps), six(x, steps))
        assert fewer.steps == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"threshold": "median"}, "threshold is 'median'.*'max'.*'auto'"),
        ({"bias": "gradient"}, "bias is 'gradient'.*'ftbc'.*'auto'"),
        ({"threshold": "qcfs"}, "1 is a ReLU"),
        ({"calibration": torch.randn(1, 6)}, "1 image.*held_out=0"),
        ({"calibration": torch.randn(0, 6)}, "empty"),
        ({"calibration": []}, "empty"),
        ({"calibration": torch.randn(20, 6).index_fill(0, torch.tensor([3]), torch.nan)}, "image 3 holds NaN"),
        ({"calibration": torch.randn(20, 6).index_fill(0, torch.tensor([0]), torch.inf)}, "image 0 holds NaN or inf"),
        ({"calibration": [torch.randn(4, 6), torch.randn(4, 5)]}, r"shape \[5\], but the first had \[6\]"),
        ({"calibration": [(torch.randn(4, 6), torch.zeros(3).long())]}, "4 images need torch.int64"),
        ({"calibration": [(torch.randn(4, 6), torch.full((4,), 7))]}, "out of range for 4 classes"),
        ({"calibration": torch.randn(20, 5)}, r"cannot take calibration images of shape \[8, 5\]"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"calibration": torch.randn(20, 6), "steps": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        convert(mlp(), given.pop("calibration"), **given)


@pytest.mark.parametrize("calibration", [torch.zeros(20, 6).long(), [[1.0, 2.0]], [torch.zeros(4).long()]])
def test_calibrations_without_images(calibration: Any) -> None:
    with pytest.raises(TypeError, match="calibration batch 0"):
        convert(mlp(), calibration, steps=2)


def test_settings_take_effect() -> None:
    ann, x = mlp(), torch.randn(200, 6)

    def run(**settings: Any) -> list[tuple[Tensor, Tensor]]:
        threshold = settings.pop("threshold", "max")
        snn = convert(ann, x, steps=2, threshold=threshold, bias="none", settings=Settings(**settings))
        return [(neuron.threshold, neuron.v_init) for neuron in snn.neurons.values()]

    for (top, start), (same, other_start) in zip(run(), run(v_init=0.25), strict=True):
        assert torch.equal(start, 0.5 * top)
        assert torch.equal(same, top)
        assert torch.equal(other_start, 0.25 * top)
    for (top, _), (layer, _) in zip(run(), run(per_channel=False), strict=True):
        assert torch.equal(layer, top.max().expand_as(top))
        assert len(top.unique()) > 1
    for (high, _), (low, _) in zip(
        run(threshold="percentile", percentile=99.0), run(threshold="percentile", percentile=95.0), strict=True
    ):
        assert (low < high).float().mean() > 0.5
    for one, other, differ in (
        ({"v_init": 0.0}, {"mmse_shift": 0.0}, False),
        ({"v_init": 0.5}, {"mmse_shift": 0.0}, True),
    ):
        found = [torch.cat([threshold for threshold, _ in run(threshold="mmse", **kind)]) for kind in (one, other)]
        assert torch.equal(*found) is not differ


def test_what_is_no_network_or_no_settings_is_refused() -> None:
    images = torch.rand(10, 4)
    with pytest.raises(TypeError, match=r"ann is a function, .*load_trained"):
        convert(lambda x: x, images, steps=2)  # type: ignore[arg-type]
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(TypeError, match="settings are a dict"):
        convert(ann, images, steps=2, settings={"rounds": (1,)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": ()}, "rounds is"),
        ({"rounds": 5}, "rounds is 5, but must list"),
        ({"rounds": (0.5,)}, "whole number of rounds"),
        ({"step_sizes": 0.4}, "step_sizes is 0.4, but must list"),
        ({"step_sizes": (float("nan"),)}, "step_sizes is .nan,., but must list at least one number"),
        ({"step_sizes": ("a",)}, "step_sizes is .'a',., but must list at least one number"),
        ({"mmse_shift": 7}, "mmse_shift is 7, but must be None or lie between 0 and 1"),
        ({"per_channel": "no"}, "per_channel is 'no', but must be True or False"),
        ({"rounds": (-1, 2)}, "none negative"),
        ({"step_sizes": (0.0,)}, "greater than 0"),
        ({"step_sizes": ()}, "step_sizes"),
        ({"readout_decays": 0.5}, "readout_decays is 0.5, but must list"),
        ({"readout_decays": (1.0,)}, "at least 0 and below 1"),
        ({"readout_decays": (float("nan"),)}, "at least 0 and below 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"percentile": 0.0}, "percentile"),
        ({"percentile": 101.0}, "percentile"),
        ({"held_out": 1.0}, "held_out"),
        ({"v_init": 1.5}, "v_init"),
        ({"variant": "V9"}, "variant"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**arguments)


def test_a_random_forward_is_refused() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.dropout(self.first(x).relu(), 0.5, training=True))

    with pytest.raises(ConversionError, match="dropout.*on in evaluation"):
        convert(Random(), torch.randn(20, 6), steps=2)


@pytest.mark.parametrize("bias", ["none", "light", "potential", "ftbc"])
def test_one_image_and_constant_images(bias: Any) -> None:
    one = convert(mlp(), torch.randn(1, 6), steps=2, bias=bias, settings=Settings(held_out=0))
    with pytest.warns(UserWarning, match="all 20 calibration images are the same"):
        constant = convert(mlp(), torch.ones(20, 6), steps=2, bias=bias, refit=True)
    with pytest.warns(UserWarning, match="all 20 calibration images are the same"):
        zero = convert(mlp(bias=False), torch.zeros(20, 6), steps=2, bias=bias, threshold="max")
    for snn in (one, constant, zero):
        assert snn(torch.randn(5, 6), 2).isfinite().all()
        assert all(math.isfinite(error) for error in report_of(snn).logit_error)
        assert all((neuron.threshold > 0).all() for neuron in snn.neurons.values())


def test_images_of_another_size() -> None:
    """Where the ANN takes them; potentials belong to the neurons of one size."""
    ann, x = trained()
    larger = torch.rand(4, 1, 10, 8)
    snn = convert(ann, x, steps=64, threshold="max", bias="ftbc", settings=Settings(rounds=(0,), held_out=0.1))
    with torch.no_grad():
        wanted = ann.eval()(larger)
    logits = snn(larger, 64)
    assert logits.shape == (64, 4, 4)
    # At T = 64 the mean is close to the ANN: a few spikes of 64 are missing or too many.
    assert (logits.mean(0) - wanted).abs().max() < 0.2 * wanted.abs().max()
    potential = convert(ann, x, steps=2, bias="potential")
    with pytest.raises(ValueError, match="images of the size that calibration used"):
        potential(larger, 2)


@pytest.mark.parametrize("activation", [nn.ReLU, QCFS])
def test_a_network_of_ranvier(activation: Any) -> None:
    ann = models.resnet20(neuron=lambda channels: activation())
    x = torch.rand(40, 3, 8, 8)
    ann(x, steps=1)  # statistics
    snn = convert(ann, x, steps=2, threshold="auto", settings=Settings(rounds=(0, 2), batch_size=20))
    report = report_of(snn)
    assert len(report.layers) == 19
    assert len(report.candidates) == 3 * (1 + 2)
    errors, _ = measured(
        snn, lambda x: ann.eval()(x, steps=1)[0], torch.cat(parts(x, Settings(batch_size=20)).choosing)
    )
    assert report.logit_error == pytest.approx(errors, rel=1e-2)  # as above; deeper, with folded normalisations


def test_a_network_of_branches_side_by_side() -> None:
    """Spikes of several layers and currents, concatenated: the logits approach the ANN's, and stream."""

    def relu() -> Activation:
        return Activation(nn.ReLU())

    grown = Concat(Chain(), Chain(conv_norm(4, 4), relu()), conv_norm(4, 2))
    body = Chain(relu(), grown, conv_norm(10, 6), relu(), Concat(Chain(), Chain()), TimeFolded(nn.AvgPool2d(4)))
    ann, x = models.Network(conv_norm(2, 4), body, Readout(48, 5)).double(), torch.rand(40, 2, 8, 8).double()
    for _ in range(20):
        ann(x, steps=1)  # statistics
    ann.eval()
    distances = []
    for steps in (4, 32, 256):
        snn = convert(ann, x, steps=steps, threshold="max", bias="none")
        assert list(snn.neurons) == ["body.0", "body.1.branches.1.1", "body.3"]
        with torch.no_grad():
            expected = ann(x, steps=1)[0]
            distances.append(float((snn(x, steps).mean(0) - expected).square().mean().sqrt() / expected.std()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02  # found: 0.008 of the spread of the logits
    first, state = snn(x, 3, return_state=True)
    # A convolution may add in another order at another batch size, in float64 by 1e-16.
    torch.testing.assert_close(torch.cat([first, snn(x, 4, state=state)]), snn(x, 7), rtol=1e-9, atol=1e-9)


def test_float64() -> None:
    ann, x = mlp().double(), torch.randn(60, 6).double()
    for bias in BIASES:
        snn = convert(ann, x, steps=2, bias=bias, refit=True)
        assert snn(x, 2).dtype == torch.float64


def same_answers(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Share of images whose logits agree at every step."""
    return float(((logits - others).abs().amax((0, 2)) < 1e-4).double().mean())


def test_what_comes_back_moves_and_is_complete() -> None:
    """All tensors move with `.to`, whatever correction replaced them."""
    for bias in BIASES:
        snn = convert(mlp(bias=False), torch.randn(200, 6), steps=2, bias=bias, refit=True)
        double = copy.deepcopy(snn).double()
        assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}
        x = torch.randn(10, 6)
        # float64 instead of float32: a spike may move, but not in more than one image of ten.
        assert same_answers(double(x.double(), 2), snn(x, 2)) >= 0.9
        assert {tensor.device.type for tensor in snn.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    ann, x = trained()
    ann.cuda()
    for bias in BIASES:
        snn = convert(ann, x, steps=STEPS, bias=bias, refit=True)
        assert {tensor.device.type for tensor in snn.state_dict().values()} == {"cuda"}
        assert report_of(snn).device == torch.cuda.get_device_name()
        on_gpu, on_cpu = snn(x.cuda(), STEPS).cpu(), snn.cpu()(x, STEPS)
        # Convolutions add in another order; a spike that moves for it moves the logits of a few images.
        assert same_answers(on_gpu, on_cpu) >= 0.9


def test_inference_mode() -> None:
    """What was converted inside of it is usable outside, with gradients for the image: no inference tensors."""
    ann, x = mlp(), torch.randn(60, 6)
    with torch.inference_mode():
        snn = convert(ann, x, steps=2, refit=True)
    assert not any(tensor.is_inference() for tensor in snn.state_dict().values())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_progress_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # with which rich takes anything for a terminal
        monkeypatch.delenv(name, raising=False)
    convert(mlp(), torch.randn(60, 6), steps=2, progress=True, refit=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("terminal")
def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    convert(mlp(), torch.randn(60, 6), steps=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "converting" in shown.err
    convert(mlp(), torch.randn(60, 6), steps=2)
    assert capsys.readouterr() == ("", "")


def test_a_failed_conversion_leaves_the_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConversionError):
        convert(nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 2)), torch.randn(20, 6), steps=2, progress=True)
    assert capsys.readouterr().out == ""


def test_combinations_run() -> None:
    """Everything with everything, on a network with a shortcut, pooling and normalisation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.enter(x))
            x = F.relu(self.conv(F.relu(x)) + x)
            return self.head(F.avg_pool2d(x, 3).flatten(1))

    ann, x = Net().eval(), torch.rand(24, 1, 6, 6)
    settings = Settings(rounds=(0, 1), batch_size=10)
    for bias, signed in itertools.product((*BIASES, "auto"), (False, True)):
        snn = convert(ann, x, steps=2, threshold="max", bias=bias, signed=signed, refit=True, settings=settings)
        assert snn(x, 2).isfinite().all()


def test_half_precision_is_refused() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).half()
    with pytest.raises(TypeError, match=r"parameters of torch.float16.*ann.float\(\)"):
        convert(ann, torch.rand(10, 4).half(), steps=2)
