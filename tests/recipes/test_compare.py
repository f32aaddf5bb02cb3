import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from ranvier.recipes import Comparison, Recipe, compare, digits, run, simulated_digits_dvs
from ranvier.recipes.compare import METHODS, ROWS
from ranvier.recipes.digits import digits_ann


def small(**overrides: Any) -> Recipe:
    return digits(**{"epochs": 1, "model": "mlp", "hidden": (16,), "crop_padding": 0, "train_images": 400} | overrides)


def test_every_method_is_a_row_with_an_accuracy_at_every_step(tmp_path: Path) -> None:
    shown = compare(small(), tmp_path, steps=(4, 1, 2), neurons=("lifb",), quiet=True)
    assert shown.steps == (1, 2, 4)
    rows = [row for row in ROWS if row.neuron in (None, "lifb")]
    assert {row.method for row in rows} == METHODS.keys()
    assert shown.names == tuple(row.name for row in rows)
    for outcome in shown.outcomes:
        assert len(outcome.accuracy) == 3
        assert all(0 <= value <= 1 for value in outcome.accuracy)
        assert outcome.energy is not None
        assert 0 < outcome.energy[0] < outcome.energy[1] < outcome.energy[2]
        assert outcome.energy_ann == shown.ann_energy > 0
        assert outcome.seconds > 0
        assert all((tmp_path / folder / "model.safetensors").exists() for folder in outcome.networks)
    assert Comparison.load(tmp_path / "results.json").outcomes == shown.outcomes
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Proxy learning: " in page
    assert "Converted: " in page


def test_a_row_is_what_the_commands_give(tmp_path: Path) -> None:
    shown = compare(small(), tmp_path / "all", steps=(1, 2), methods=("etc", "convert"), neurons=("lif",), quiet=True)
    trained = run(small(method="etc", neuron="lif", steps=2), tmp_path / "one", quiet=True)
    assert shown.of("LIF, consistency")[0].accuracy == trained.accuracy_by_step
    shared = {"epochs": 1, "model": "mlp", "hidden": (16,), "crop_padding": 0, "train_images": 400}
    ann = run(digits_ann(**shared), tmp_path / "ann", quiet=True)
    assert shown.anns[0].accuracy == ann.accuracy_by_step[-1] == shown.ann_accuracy
    for index, t in enumerate((1, 2)):
        made = json.loads((tmp_path / f"all/networks/converted-T{t}-seed0/results.json").read_text())
        assert made["report"]["steps"] == t
        assert shown.of("converted")[0].accuracy[index] == made["accuracy_by_step"][-1]


def test_each_trains_a_network_for_each_number_of_steps(tmp_path: Path) -> None:
    shown = compare(small(), tmp_path, steps=(1, 2), methods=("direct", "etc"), neurons=("lif",), each=True, quiet=True)
    direct, etc = shown.outcomes
    assert len(direct.networks) == len(etc.networks) == 2
    assert direct.accuracy[0] == etc.accuracy[0]  # at one step there is nothing to be consistent with
    for outcome in shown.outcomes:
        for index, folder in enumerate(outcome.networks):
            result = json.loads((tmp_path / folder / "results.json").read_text())
            assert len(result["accuracy_by_step"]) == index + 1
            assert result["accuracy_by_step"][-1] == outcome.accuracy[index]


def test_going_on_keeps_what_is_there_and_adds_rows_and_seeds(tmp_path: Path) -> None:
    def go(**changes: Any) -> Comparison:
        return compare(small(), tmp_path, **{"steps": (1, 2), "methods": ("proxy",), "quiet": True} | changes)

    first = go()
    with pytest.raises(FileExistsError, match="--resume"):
        go()
    network = tmp_path / first.outcomes[0].networks[0] / "model.safetensors"
    before = network.stat().st_mtime_ns
    both = go(methods=("direct", "proxy"), neurons=("lif",), seeds=(1, 0), resume=True)
    assert network.stat().st_mtime_ns == before
    assert [(one.name, one.seed) for one in both.outcomes] == [
        ("LIF, cross-entropy", 0),
        ("LIF, cross-entropy", 1),
        ("proxy learning", 0),
        ("proxy learning", 1),
    ]
    assert first.outcomes[0] in both.outcomes
    assert both.facts["seeds"] == "0, 1"
    with pytest.raises(ValueError, match=r"steps: \[1, 2\] -> \[1, 3\]"):
        go(steps=(1, 3), resume=True)
    with pytest.raises(ValueError, match=r"recipe.epochs: 1 -> 2"):
        compare(small(epochs=2), tmp_path, steps=(1, 2), methods=("proxy",), resume=True, quiet=True)


def test_a_comparison_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    settings: dict[str, Any] = {"steps": (1, 2), "methods": ("convert", "finetune"), "quiet": True}
    with monkeypatch.context() as patch:
        # Called when the first conversion is on disk.
        patch.setattr(importlib.import_module("ranvier.recipes.compare"), "firing_rates", stop)
        with pytest.raises(Stopped):
            compare(small(), tmp_path, **settings)
    assert Comparison.load(tmp_path / "results.json").outcomes == ()
    made = tmp_path / "networks/converted-T1-seed0/model.safetensors"
    before = made.stat().st_mtime_ns
    shown = compare(small(), tmp_path, **settings, resume=True)
    assert shown.names == ("converted", "converted, finetuned")
    assert made.stat().st_mtime_ns == before


def test_recordings_are_compared_without_conversions(tmp_path: Path) -> None:
    recipe = simulated_digits_dvs(epochs=1, model="mlp", hidden=(16,), crop_padding=0, train_images=100)
    shown = compare(recipe, tmp_path, steps=(1, 2), neurons=("lif",), quiet=True)
    assert shown.names == ("LIF, cross-entropy", "LIF, TET", "LIF, consistency", "proxy learning")
    assert shown.ann_line() == ""


def test_a_network_whose_spikes_cannot_be_counted_has_no_energy(tmp_path: Path) -> None:
    recipe = digits(model="spikformer", epochs=1, train_images=64)
    shown = compare(recipe, tmp_path, steps=(1,), methods=("direct",), neurons=("lif",), quiet=True)
    assert shown.outcomes[0].energy is None
    assert shown.rows()[0][-2] == "-"
    assert not (tmp_path / "energy.png").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": ()}, "no steps"),
        ({"steps": (0, 1)}, "steps is 0"),
        ({"methods": ("ftbc",)}, "methods is 'ftbc'"),
        ({"neurons": ("alif",)}, "neurons is 'alif'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"steps": (1,), "methods": ("etc",)}, "there is one"),
        ({"methods": ("direct",), "neurons": ()}, "nothing to compare"),
        ({"methods": ()}, "nothing to compare"),
        ({"recipe": small(hold_out=100)}, "hold_out is 100"),
        ({"recipe": small(model="spikformer"), "methods": ("convert",)}, "no ANN"),
        ({"recipe": simulated_digits_dvs(), "methods": ("signed",)}, "recordings"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**{"recipe": small(), "out": tmp_path / "out", "quiet": True} | settings)
    assert not (tmp_path / "out").exists()
