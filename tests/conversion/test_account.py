"""The account of a conversion: kept as json, printed with its numbers, drawn."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from ranvier.conversion import Account, Candidate, LayerAccount, Settings, convert

PLAIN = Candidate("mmse", "none", 0, 0.0, False, 0.3, 0.5, 0.8125)
CORRECTED = Candidate("mmse", "ftbc", 3, 0.4, False, 0.0456, 0.0123, 0.9375)
REFITTED = Candidate("mmse", "ftbc", 3, 0.4, True, 0.0567, 0.0234, 0.9062)

ACCOUNT = Account(
    steps=3,
    chosen=CORRECTED,
    candidates=(PLAIN, CORRECTED, REFITTED),
    scored_against="labels",
    signed=False,
    fitted_on=600,
    chosen_on=400,
    held_out=True,
    logit_error=(0.75, 0.25, 0.0123),
    layers=(
        LayerAccount("stem.act", 16, 1.2345, (0.91, 0.5, 0.33), (0.12, 0.1, 0.07), (0.1, 0.2, 0.6), 0.25, 0.125, 0.5),
        LayerAccount("block.act", 32, 0.75, (0.82, 0.5, 0.44), (0.21, 0.1, 0.05), (0.5, 0.5, 0.5), 0.0, 0.0, 0.0),
    ),
    seconds={"trace": 0.25, "biases": 2.0},
    bytes_added=2048,
    bytes_currents=10**6,
    versions={"python": "3.11", "torch": "2.13"},
    device="cpu",
)


def printed(account: Account, width: int = 100) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(account)
    return console.export_text()


def test_json_round_trip(tmp_path: Path) -> None:
    ACCOUNT.save(tmp_path / "account.json")
    content = json.loads((tmp_path / "account.json").read_text())
    assert content["layers"][1]["threshold"] == 0.75
    assert Account.from_json(content) == ACCOUNT
    assert Account.from_json(ACCOUNT.to_json()) == ACCOUNT  # without the detour through a file
    assert isinstance(Account.from_json(content).layers[0].error_after, tuple)


def test_total_and_one_line() -> None:
    assert ACCOUNT.total_seconds == 2.25
    assert str(ACCOUNT) == "3 steps, threshold mmse, bias ftbc (3 rounds of 0.4); 2.2 s"
    assert str(replace(ACCOUNT, signed=True, chosen=REFITTED)) == (
        "3 steps, threshold mmse, bias ftbc (3 rounds of 0.4), weights refitted, signed spikes; 2.2 s"
    )
    assert str(PLAIN) == "threshold mmse, bias none"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_printed_tables_show_the_numbers(width: int) -> None:
    text = printed(ACCOUNT, width)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if ".act" in line}
    for layer in ACCOUNT.layers:
        row = rows[layer.name]
        assert row[1] == str(layer.channels)
        assert row[2] == f"{layer.threshold:.3g}"
        for error in (layer.error_before[0], layer.error_before[-1], layer.error_after[0], layer.error_after[-1]):
            assert f"{error:.2f}" in row
    assert "0.300" in rows["stem.act"]  # mean of 0.1, 0.2, 0.6
    assert [word for word in rows["stem.act"] if word in ("25", "12", "50")] == ["25", "12", "50"]
    for what in ("400", "600", "held-out", "labels", "2.2 s", "2 KiB"):
        assert what in text
    for one in ACCOUNT.candidates:
        assert f"{one.logit_error:.4f}" in text
        assert f"{100 * one.accuracy:.2f}" in text
    assert "…" not in text  # nothing is cut off


def test_printed_account_names_what_it_is_of() -> None:
    text = " ".join(printed(replace(ACCOUNT, signed=True, held_out=False)).split())
    assert "Conversion to 3 steps: threshold mmse, bias ftbc (3 rounds of 0.4), signed spikes" in text
    assert "images that were fitted on" in text
    assert "held-out" not in text


def test_one_candidate_is_no_choice() -> None:
    alone = replace(ACCOUNT, candidates=(CORRECTED,))
    assert "tried" in printed(ACCOUNT)
    assert "tried" not in printed(alone)
    assert "stem.act" in printed(alone)


def test_plot(tmp_path: Path) -> None:
    ACCOUNT.plot(tmp_path / "errors.png")
    with Image.open(tmp_path / "errors.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 800


def test_the_account_of_a_conversion_survives_json() -> None:
    """As `convert` fills it, with types that json knows: no tensors, no numpy numbers."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.randn(40, 6, generator=generator)
    report = convert(ann, images, steps=4, settings=Settings(rounds=(0, 2))).report
    assert report is not None
    assert Account.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert (report.steps, report.fitted_on, report.chosen_on, report.held_out) == (4, 24, 16, True)
    assert report.chosen in report.candidates
    assert [layer.channels for layer in report.layers] == [9, 8]
    assert all(len(layer.error_after) == len(layer.firing_rate) == 4 for layer in report.layers)
    assert all(layer.name in printed(report) for layer in report.layers)
