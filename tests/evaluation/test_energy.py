"""Energy against counts times costs, by hand."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from ranvier.evaluation import (
    COSTS,
    Costs,
    Energy,
    LayerOperations,
    NeuronOperations,
    Operations,
    count_operations,
    energy,
)
from ranvier.models import mlp
from ranvier.nn import LIFB

OPERATIONS = Operations(
    (
        LayerOperations("stem", (0.0, 0.0, 0.0), (1000.0, 0.0, 0.0), 1000.0),
        LayerOperations("head", (200.0, 400.0, 300.0), (0.0, 0.0, 0.0), 4000.0),
    ),
    (NeuronOperations("fire", 50, (20.0, 30.0, 30.0), (0.0, 10.0, 0.0), pairs=True),),
    samples=8,
)
ESTIMATE = Energy(OPERATIONS, COSTS["45nm"])

costs = st.floats(0, 1e-9)


def loader(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images, torch.zeros(len(images)))]


def printed(estimate: Energy, width: int = 90) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(estimate)
    return console.export_text()


# Costs


def test_horowitz() -> None:
    """Horowitz 2014, figure 1.1.9 [pJ]: float32 3.7 and 0.9; int8 0.2 a multiplication, int32 0.1 an addition."""
    assert COSTS["45nm"].multiply_accumulate == pytest.approx((3.7 + 0.9) * 1e-12)
    assert COSTS["45nm"].accumulate == 0.9e-12
    assert COSTS["45nm"].update == 0
    assert COSTS["45nm-int8"].multiply_accumulate == pytest.approx((0.2 + 0.1) * 1e-12)
    assert COSTS["45nm-int8"].accumulate == 0.1e-12
    leaky = COSTS["45nm-neurons"]
    assert replace(leaky, name="45nm", update=0.0, source=COSTS["45nm"].source) == COSTS["45nm"]
    assert leaky.update == leaky.multiply_accumulate
    assert next(iter(COSTS)) == "45nm"  # what is shown first
    for name, table in COSTS.items():
        assert table.name == name
        assert "Horowitz 2014" in table.source


@pytest.mark.parametrize("wrong", [-1e-12, math.nan, math.inf])
@pytest.mark.parametrize("field", ["multiply_accumulate", "accumulate", "update"])
def test_impossible_costs_raise(field: str, wrong: float) -> None:
    with pytest.raises(ValueError, match="a cost of 'mine' is .*, but must be at least 0, in joules"):
        Costs(**{"name": "mine", "multiply_accumulate": 1e-12, "accumulate": 1e-12, field: wrong})


# Sums


def test_by_hand() -> None:
    """4.6 pJ x 1000 and 0.9 pJ x 200, 400, 300; the ANN 4.6 pJ x 5000."""
    assert ESTIMATE.by_step == pytest.approx((4780e-12, 360e-12, 270e-12))
    assert ESTIMATE.after == pytest.approx((4780e-12, 5140e-12, 5410e-12))
    assert ESTIMATE.total == pytest.approx(5410e-12)
    assert ESTIMATE.ann == pytest.approx(23e-9)


def test_updates_are_charged_at_every_step() -> None:
    """50 burst neurons are 100 after decoupling."""
    charged = Energy(OPERATIONS, COSTS["45nm-neurons"])
    assert [a - b for a, b in zip(charged.by_step, ESTIMATE.by_step, strict=True)] == pytest.approx([460e-12] * 3)
    assert charged.ann == ESTIMATE.ann


@given(mac=costs, ac=costs, update=costs, factor=st.floats(0, 100))
def test_costs_scale_and_add(mac: float, ac: float, update: float, factor: float) -> None:
    def of(*prices: float) -> Energy:
        return Energy(OPERATIONS, Costs("mine", *prices))

    whole = of(mac, ac, update)
    scaled = of(factor * mac, factor * ac, factor * update)
    parts = (of(mac, 0.0), of(0.0, ac), of(0.0, 0.0, update))
    # Float64 sums of three numbers, in another order.
    assert scaled.by_step == pytest.approx([factor * value for value in whole.by_step], rel=1e-12, abs=1e-300)
    assert whole.total == pytest.approx(sum(part.total for part in parts), rel=1e-12, abs=1e-300)
    assert whole.ann == parts[0].ann


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=8))
def test_after_is_a_running_sum(accumulates: list[float]) -> None:
    none = (0.0,) * len(accumulates)
    layer = LayerOperations("a", tuple(accumulates), none, 1.0)
    estimate = Energy(Operations((layer,), (NeuronOperations("n", 1, none, none),), 1), Costs("mine", 1.0, 2.0))
    assert estimate.by_step == pytest.approx([2 * count for count in accumulates])
    for t in range(len(accumulates)):
        assert estimate.after[t] == pytest.approx(2 * math.fsum(accumulates[: t + 1]))
    assert estimate.total == estimate.after[-1]


# Of a network


def test_of_a_network() -> None:
    torch.manual_seed(0)
    model = mlp([12, 8, 3], neuron=LIFB)
    batch = 3 * torch.rand(5, 12)
    found = energy(model, loader(batch), 4)
    assert found == Energy(count_operations(model, loader(batch), 4), COSTS["45nm"])
    assert found.total > found.by_step[0] > 0
    assert energy(model, loader(batch)[:0] + loader(batch) * 2, 4, batches=1) == found
    own = Costs("mine", 0.0, 1e-12, source="a paper")
    assert energy(model, loader(batch), 4, costs=own).total == pytest.approx(3 * sum(found.operations.spikes) * 1e-12)
    assert energy(model, loader(batch), 4, costs="45nm-int8").costs is COSTS["45nm-int8"]
    assert energy(model, [(batch.expand(4, 5, 12), torch.zeros(5))]).ann == found.ann


def test_a_silent_network_costs_its_first_layer() -> None:
    model = mlp([12, 8, 3])
    nn.init.zeros_(model.encoder[1].weight)
    found = energy(model, loader(torch.rand(5, 12)), 4)
    assert found.by_step == (12 * 8 * 4.6e-12, 0, 0, 0)
    assert found.ann == pytest.approx((12 * 8 + 8 * 3) * 4.6e-12)


def test_unknown_table_and_empty_loader_raise() -> None:
    model = mlp([12, 8, 3])
    with pytest.raises(ValueError, match=r"costs is '7nm', but must be .*45nm.*45nm-neurons.*45nm-int8"):
        energy(model, loader(torch.rand(5, 12)), 4, costs="7nm")
    with pytest.raises(ValueError, match="the loader gave no samples"):
        energy(model, [], 4)


# Shown and saved


def test_one_line_first_then_what_it_rests_on() -> None:
    summary, *assumptions = str(ESTIMATE).splitlines()
    assert summary == "estimated 5.41 nJ for an image over 3 steps, against 23 nJ for the ANN: 23.5 % (n = 8)"
    assert assumptions == [f"- {line}" for line in ESTIMATE.assumptions]
    text = "\n".join(assumptions)
    assert "costs 45nm: 4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate (Horowitz 2014" in text
    assert "images hold analog values" in text
    assert "in layers on analog values (stem)" in text
    assert "a burst is two spikes" in text
    assert "100 neurons are updated at every step: not charged" in text
    assert "no memory access" in text


def test_assumptions_follow_what_was_counted() -> None:
    layers = tuple(replace(layer, multiply_accumulates=(0.0,) * 3) for layer in OPERATIONS.layers)
    events = Energy(replace(OPERATIONS, layers=layers, whole_images=True), Costs("mine", 1e-12, 1e-13, 5e-14))
    text = "\n".join(events.assumptions)
    assert "images hold whole numbers, and a value of n counts as n spikes" in text
    assert "in layers on analog values (none)" in text
    assert "costs mine: 1 pJ a multiply-accumulate, 0.1 pJ an accumulate (given by the caller, no source)" in text
    assert "100 neurons are updated at every step: charged at 0.05 pJ each" in text


def test_tables() -> None:
    text = printed(ESTIMATE)
    assert "Operations for an image, over all 3 steps (n = 8)" in text
    assert "Energy for an image, over its first 1 .. 3 steps (n = 8)" in text
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in text.splitlines()]
    assert ["1", "20", "200", "1,000", "4.78 nJ", "20.8 %"] in rows
    assert ["2", "60", "600", "1,000", "5.14 nJ", "22.3 %"] in rows
    assert ["3", "90", "900", "1,000", "5.41 nJ", "23.5 %"] in rows
    assert ["ANN", "", "", "5,000", "23 nJ", "100.0 %"] in rows
    flat = " ".join(text.split())
    assert all(line in flat for line in ESTIMATE.assumptions)


def test_a_source_in_brackets_is_shown() -> None:
    own = Energy(OPERATIONS, Costs("mine", 1e-12, 1e-13, source="[Smith 2030]"))
    assert "[Smith 2030]" in printed(own)


@pytest.mark.parametrize(
    ("cost", "shown"),
    [
        (1e-16, "0.5 pJ"),
        (1e-13, "500 pJ"),
        (1e-12, "5 nJ"),
        (1e-9, "5 µJ"),
        (1e-6, "5 mJ"),
        (1e-3, "5 J"),
        (1.9999e-13, "1 nJ"),
    ],
)
def test_prefixes(cost: float, shown: str) -> None:
    assert f"against {shown} for the ANN" in str(Energy(OPERATIONS, Costs("mine", cost, 0.0)))


def test_without_a_cost_of_the_ann_there_is_no_ratio() -> None:
    free = Energy(OPERATIONS, Costs("mine", 0.0, 1e-12))
    assert "against 0 pJ for the ANN (n = 8)" in str(free)
    assert "900 pJ" in printed(free)


def test_saved(tmp_path: Path) -> None:
    ESTIMATE.save(tmp_path / "energy.json")
    saved = json.loads((tmp_path / "energy.json").read_text())
    assert saved["energy_by_step"] == list(ESTIMATE.by_step)
    assert saved["energy_after"] == list(ESTIMATE.after)
    assert (saved["energy"], saved["energy_ann"]) == (ESTIMATE.total, ESTIMATE.ann)
    assert saved["costs"]["accumulate"] == 0.9e-12
    assert saved["operations"]["layers"][1]["accumulates"] == [200, 400, 300]
    assert saved["assumptions"] == list(ESTIMATE.assumptions)
