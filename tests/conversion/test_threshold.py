"""Thresholds against the definitions, applied to the activations themselves rather than to their histogram."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, fx, nn

from ranvier.conversion import Activations, observe, thresholds
from ranvier.conversion.threshold import BALANCE_ITERATIONS, BALANCE_RATE, BINS, THRESHOLDS, Threshold, fractions
from ranvier.conversion.trace import trace
from ranvier.conversion.vocabulary import SITES
from ranvier.nn import QCFS

RELU = nn.ReLU()


def activations(*batches: Tensor) -> Activations:
    """What `observe` makes of these values, which a ReLU passes on."""
    graph = fx.symbolic_trace(nn.Sequential(OrderedDict(act=nn.ReLU())))
    return observe(graph, ["act"], batches)["act"]


def long_tailed(samples: int = 4000, channels: int = 3, seed: int = 0) -> Tensor:
    """Activations `[N, C]` as layers have them: a third silent, a long tail, channels of unlike scale."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, channels, generator=generator).abs() ** 1.5
    values *= torch.rand(samples, channels, generator=generator) > 1 / 3
    return values * torch.tensor([1.0, 0.1, 7.0])[:channels]


def bins(values: Tensor) -> Tensor:
    """Width of one bin of each channel."""
    return values.amax(0) / BINS


def find(kind: Threshold, observed: Activations, **given: object) -> Tensor:
    return thresholds(kind, observed, RELU, **{"steps": 4, **given})  # type: ignore[arg-type]


# --- observation


def test_histogram_by_hand() -> None:
    # Top 2048: one bin is 1 wide. Values round up to the upper end of their bin.
    observed = activations(torch.tensor([[-3.0], [0.0], [0.5], [1.0], [1.5], [2048.0]]))
    assert observed.top.tolist() == [2048.0]
    assert observed.counts.shape == (1, BINS + 1)
    assert {int(k): int(observed.counts[0, k]) for k in observed.counts[0].nonzero()} == {0: 2, 1: 2, 2: 1, BINS: 1}
    assert observed.values[0, :3].tolist() == [0.0, 1.0, 2.0]


def test_all_positions_of_all_batches_count_once_in_their_channel() -> None:
    values = long_tailed(600).view(10, 60, 3).transpose(1, 2).reshape(10, 3, 6, 10)
    observed = activations(values[:4], values[4:])
    flat = values.transpose(0, 1).flatten(1)
    assert torch.equal(observed.top, flat.amax(1))
    assert observed.counts.sum(1).tolist() == [600.0] * 3
    assert torch.equal(observed.counts[:, 0], (flat == 0).sum(1).double())
    # Each value lies at most one bin below what stands for it, so that means do: 1e-3 of a bin is taken off first.
    mean = (observed.counts * observed.values).sum(1) / 600
    gap = (mean - flat.double().mean(1)) / (observed.top / BINS)
    assert ((gap > -2e-3) & (gap < 1)).all()


def test_a_level_stays_on_its_bin() -> None:
    """Quantised activations of 3 / 8 of the maximum fall on bin 768 of 2048, though the product may round above it."""
    for ceiling in torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1:
        levels = torch.arange(9) * (ceiling / 8)
        assert activations(levels.view(-1, 1)).counts[0].nonzero().flatten().tolist() == [256 * k for k in range(9)]


def test_merged_is_one_channel_with_all_values() -> None:
    observed = Activations(torch.tensor([1.0, 4.0, 0.0]), torch.zeros(3, BINS + 1))
    observed.counts[0, BINS] = 3.0  # 1, a quarter of the largest
    observed.counts[0, 1] = 2.0  # 1 / 2048, a quarter of a bin of what is up to 4: rounds up
    observed.counts[1, BINS] = 5.0
    observed.counts[1, 7] = 6.0
    observed.counts[2, 0] = 7.0
    merged = observed.merged()
    assert merged.top.tolist() == [4.0]
    assert merged.counts.shape == (1, BINS + 1)
    found = {int(k): int(merged.counts[0, k]) for k in merged.counts[0].nonzero()}
    assert found == {0: 7, 1: 2, 7: 6, BINS // 4: 3, BINS: 5}


def test_hooks_are_gone_and_nothing_remembers_a_graph() -> None:
    ann = fx.symbolic_trace(nn.Sequential(OrderedDict(fc=nn.Linear(4, 5), act=nn.ReLU())))
    observed = observe(ann, ["act"], iter([torch.rand(6, 4), torch.rand(3, 4)]))["act"]  # an iterator, read once
    assert observed.counts.sum(1).tolist() == [9.0] * 5
    assert not observed.top.requires_grad
    assert not ann.get_submodule("act")._forward_hooks


def test_all_sites_of_a_traced_ann_are_observed() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)
    images = torch.rand(9, 4)
    ann = trace(nn.Sequential(*layers), images)
    sites = [name for name, module in ann.named_modules() if isinstance(module, SITES)]
    observed = observe(ann, sites, [images[:5], images[5:]])
    assert list(observed) == sites
    with torch.no_grad():
        first = layers[0](images).relu()
        second = layers[2](first).relu()
    for one, expected in zip(observed.values(), (first, second), strict=True):
        # One linear layer in float32, its sums in another order.
        assert torch.allclose(one.top, expected.amax(0), rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_an_error() -> None:
    graph = fx.symbolic_trace(nn.Sequential(OrderedDict(fc=nn.Linear(4, 5), act=nn.ReLU())))
    with pytest.raises(RuntimeError):
        observe(graph, ["act"], [torch.rand(2, 4), torch.rand(2, 9)])
    assert not graph.get_submodule("act")._forward_hooks


# --- kinds


def test_max() -> None:
    values = long_tailed()
    assert torch.equal(find("max", activations(values)), values.amax(0))
    assert torch.equal(find("max", activations(values), per_channel=False), values.amax().expand(3))


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile(percentile: float) -> None:
    values = long_tailed()
    exact = torch.quantile(values.double(), percentile / 100, dim=0, interpolation="lower")
    gap = (find("percentile", activations(values), percentile=percentile) - exact) / bins(values)
    # It rounds up to the end of its bin; 1e-3 of a bin is taken off first, and float32 rounds 2048 bins by 2e-4.
    assert ((gap > -2e-3) & (gap < 1)).all()
    exact = torch.quantile(values.double(), percentile / 100, interpolation="lower")
    found = find("percentile", activations(values), percentile=percentile, per_channel=False)
    assert (found == found[0]).all()
    # Merging rounds up once more: two bins of the widest channel at most.
    assert -4e-3 < (found[0] - exact) / bins(values).max() < 2


def test_percentile_leaves_out_just_as_many() -> None:
    """999 of 1000 values lie at 1 or below: 99.9 %, though 99.9 / 100 is a rounding error more than 0.999."""
    values = torch.ones(1000, 1)
    values[3] = 2048.0
    assert find("percentile", activations(values), percentile=99.9).tolist() == [1.0]
    assert find("percentile", activations(values), percentile=99.91).tolist() == [2048.0]


def test_a_channel_below_its_percentile_gets_its_own_largest() -> None:
    """Active once in 2000: the quantile is 0, and the largest of another channel would all but silence this one."""
    values = torch.ones(2000, 2) * torch.tensor([50.0, 0.0])
    values[7, 1] = 0.25
    assert find("percentile", activations(values), percentile=99.9).tolist() == [50.0, 0.25]


def errors_of_candidates(values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """All candidates `[95, C]`, and the root mean square of q(a) - a over the values themselves for each of them."""
    values = values.double()
    candidates = fractions().double().unsqueeze(1) * values.amax(0)
    sent = (steps * values / candidates.unsqueeze(1) + 0.5).floor().clamp(0, steps) * candidates.unsqueeze(1) / steps
    return candidates, (sent - values).square().mean(1).sqrt()


def reached(found: Tensor, candidates: Tensor, errors: Tensor) -> Tensor:
    """Error of the candidates that were found."""
    index = (found - candidates).abs().argmin(0, keepdim=True)
    assert torch.allclose(candidates.gather(0, index)[0], found.double(), rtol=1e-6)  # it is one of them, in float32
    return errors.gather(0, index)[0]


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_mmse_equals_a_search_over_the_values(steps: int) -> None:
    """From v_init = 1/2, |q(a) - a| changes by no more than a does, and a bin moves a by no more than its width."""
    values = long_tailed()
    candidates, errors = errors_of_candidates(values, steps)
    best = errors.amin(0)
    found = reached(find("mmse", activations(values), steps=steps), candidates, errors)
    assert (found <= best + 2 * bins(values)).all()  # one bin for the candidate found, one for the best
    assert (best + 2 * bins(values) < errors[0]).all()  # the maximum itself would not do
    values = values.flatten().unsqueeze(1)
    candidates, errors = errors_of_candidates(values, steps)
    merged = find("mmse", activations(long_tailed()), steps=steps, per_channel=False)
    assert (merged == merged[0]).all()
    # Merging rounds up once more.
    assert (reached(merged[:1], candidates, errors) <= errors.amin(0) + 4 * bins(values)).all()


@pytest.mark.parametrize("halves", [0, 1])
def test_mmse_from_other_initial_potentials(halves: int) -> None:
    """Values on bins, so that the histogram knows them exactly, and a search in whole numbers.

    With a = top k / 2048 and theta = top n / 100, q(a) = theta / T clip(floor(100 T k / (2048 n) + halves / 2), 0, T).
    """
    steps = 3
    values = (long_tailed(channels=1) / long_tailed(channels=1).max() * BINS).round()
    k, n = values.long().view(1, -1), 100 - torch.arange(len(fractions())).view(-1, 1)
    sent = ((200 * steps * k + halves * BINS * n) // (2 * BINS * n)).clamp(0, steps)
    errors = (sent * n / 100 / steps - k / BINS).double().square().mean(1)
    (found,) = find("mmse", activations(values), steps=steps, v_init=halves / 2)
    error = errors[int((100 - found / BINS * 100).round())]
    # What lies within 1e-4 steps of firing does fire: so few values move no error by a percent.
    assert error <= 1.01 * errors.min()
    assert errors[0] > 1.2 * errors.min()


def test_mmse_by_hand() -> None:
    """Nine in ten at 1, the tenth at 4, one step.

    Up to theta = 2 all fire, and the error is 0.9 (theta - 1)^2 + 0.1 (4 - theta)^2, least at 1.3, where it is 0.81;
    above, those at 1 are silent, at a cost of 0.9 alone. Among hundredths of 4 lie 1.28 and 1.32, equally good.
    """
    values = torch.ones(100, 1)
    values[:10] = 4.0
    (found,) = find("mmse", activations(values), steps=1).tolist()
    assert found == pytest.approx(1.28, abs=1e-6) or found == pytest.approx(1.32, abs=1e-6)  # float32


@pytest.mark.parametrize("v_init", [0.0, 0.5])
def test_mmse_of_quantised_activations_is_their_ceiling(v_init: float) -> None:
    """As many steps as levels transmit them without error: nothing below the ceiling can be better.

    From v_init = 0 a level that a rounding error keeps from firing would cost a whole step.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 8, (2000, 60), generator=generator) / 7 * (torch.rand(60, generator=generator) + 0.1)
    assert torch.equal(find("mmse", activations(values), steps=7, v_init=v_init), values.amax(0))


def test_balance_equals_its_iteration_over_the_values() -> None:
    """The iteration never spreads: values at most a bin higher give a threshold at most a bin higher."""
    values = long_tailed()
    theta = torch.zeros(3, dtype=torch.float64)
    for _ in range(BALANCE_ITERATIONS):
        theta = theta + BALANCE_RATE * 2 * (values.double() - theta).clamp_min(0).mean(0)
    gap = (find("balance", activations(values)) - theta) / bins(values)
    assert ((gap > -2e-3) & (gap < 1)).all()


def test_balance_by_hand() -> None:
    """All at 2: theta += 0.2 (2 - theta), so that 2 - theta shrinks by 0.8 each time, to nothing."""
    assert find("balance", activations(torch.full((10, 1), 2.0))).tolist() == pytest.approx([2.0], rel=1e-6)  # float32


def test_qcfs_is_the_learned_ceiling_for_all_channels() -> None:
    activation = QCFS(levels=4, ceiling_init=1.75)
    for per_channel in (True, False):
        found = thresholds("qcfs", activations(long_tailed()), activation, 4, per_channel=per_channel)
        assert found.tolist() == [1.75] * 3
        assert not found.requires_grad
        found.add_(1.0)
    assert activation.ceiling.item() == 1.75  # not shared


def test_qcfs_of_a_relu_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"layer3\.act is a ReLU\. Use threshold='mmse', or train .* rv\.nn\.QCFS"):
        find("qcfs", activations(long_tailed()), name="layer3.act")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="threshold is 'mean', but must be one of 'max'"):
        find("mean", activations(long_tailed()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_threshold_is_positive_one_per_channel_and_memory_of_its_own(kind: Threshold, per_channel: bool) -> None:
    values = long_tailed()
    values[:, 1] = 0.0
    observed = activations(values)
    found = thresholds(kind, observed, QCFS(ceiling_init=3.0), 4, per_channel=per_channel)
    assert (found.shape, found.dtype) == ((3,), torch.float32)
    assert (found > 0).all()
    top = observed.top.clone()
    found.fill_(-1.0)
    assert torch.equal(observed.top, top)


@pytest.mark.parametrize("kind", ["max", "percentile", "mmse", "balance"])
def test_silent_channels_get_the_largest_activation_of_the_layer(kind: Threshold) -> None:
    values = long_tailed()
    values[:, 1] = 0.0
    found = find(kind, activations(values))
    assert found[1] == values.max()
    loud = find(kind, activations(values[:, [0, 2]]))
    assert torch.equal(found[[0, 2]], loud)  # the others are not disturbed


@pytest.mark.parametrize("kind", ["max", "percentile", "mmse", "balance"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_layer_that_was_silent_throughout_stays_silent(kind: Threshold, per_channel: bool) -> None:
    """A threshold of zero would fire at no input at all, because a tie fires."""
    found = find(kind, activations(torch.full((10, 2), -1.0)), per_channel=per_channel)
    assert found.tolist() == pytest.approx([1e-6] * 2)
