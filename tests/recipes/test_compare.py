import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ranvier.recipes import (
    Comparison,
    Recipe,
    Result,
    compare,
    digits,
    energy,
    evaluate,
    run,
    simulated_digits_dvs,
)
from ranvier.recipes.compare import METHODS, ROWS
from ranvier.recipes.digits import digits_ann


def small(**overrides: Any) -> Recipe:
    return digits(**{"epochs": 1, "model": "mlp", "hidden": (16,), "crop_padding": 0, "train_images": 400} | overrides)


def test_every_method_is_a_row_with_an_accuracy_at_every_step(tmp_path: Path) -> None:
    shown = compare(small(), tmp_path, steps=(3, 1), neurons=("lifb",), quiet=True)
    assert shown.steps == (1, 3)
    rows = [row for row in ROWS if row.neuron in (None, "lifb")]
    assert {row.method for row in rows} == METHODS.keys()
    assert shown.names == tuple(row.name for row in rows)
    for outcome in shown.outcomes:
        assert len(outcome.accuracy) == 2
        assert all(0 <= value <= 1 for value in outcome.accuracy)
        assert outcome.energy is not None
        assert 0 < outcome.energy[0] < outcome.energy[1]
        assert outcome.energy_ann == shown.ann_energy > 0
        assert outcome.seconds > 0
        assert all((tmp_path / folder / "model.safetensors").exists() for folder in outcome.networks)
    assert Comparison.load(tmp_path / "results.json").outcomes == shown.outcomes
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Proxy learning: " in page
    assert "Converted: " in page


def test_a_row_is_what_the_commands_give(tmp_path: Path) -> None:
    methods = ("etc", "convert", "finetune")
    shown = compare(small(), tmp_path / "all", steps=(1, 2), methods=methods, neurons=("lif",), quiet=True)
    etc, converted, finetuned = shown.outcomes
    trained = run(small(method="etc", neuron="lif", steps=2), tmp_path / "one", quiet=True)
    assert etc.accuracy == trained.accuracy_by_step
    assert etc.firing_rate == trained.firing_rate
    assert etc.energy == energy(tmp_path / "one").after
    shared = {"epochs": 1, "model": "mlp", "hidden": (16,), "crop_padding": 0, "train_images": 400}
    ann = run(digits_ann(**shared), tmp_path / "ann", quiet=True)
    assert shown.anns[0].accuracy == ann.accuracy_by_step[-1] == shown.ann_accuracy
    networks = tmp_path / "all/networks"
    for index, t in enumerate((1, 2)):
        made = json.loads((networks / f"converted-T{t}-seed0/results.json").read_text())
        assert made["report"]["steps"] == t
        assert converted.accuracy[index] == made["accuracy_by_step"][-1]
        evaluated = evaluate(networks / f"converted-T{t}-seed0")
        assert converted.energy[index] == evaluated.energy.total
    assert converted.firing_rate == evaluated.activity.mean_firing_rate
    conversion = sum(made["report"]["seconds"].values())  # for the most steps
    assert converted.seconds == pytest.approx(shown.anns[0].seconds + conversion)
    further = Result.load(networks / "finetune-T2-seed0/results.json")
    assert finetuned.accuracy == further.accuracy_by_step
    assert finetuned.seconds == pytest.approx(shown.anns[0].seconds + conversion + further.seconds)


@pytest.mark.parametrize(
    ("steps", "settings", "said", "not_said"),
    [
        ((1, 2), {"methods": ("proxy",)}, ["1 epoch on", "trained once, for 2 steps"], ["A conversion", "recording"]),
        ((1, 2), {"methods": ("proxy",), "each": True}, ["trained for each T"], ["trained once"]),
        ((2,), {"methods": ("proxy", "convert")}, ["Converted: "], ["read after fewer", "for each T."]),
        ((1, 2), {"methods": ("convert",)}, ["A conversion was made for each T"], ["read after fewer"]),
    ],
)
def test_the_page_says_what_was_done(
    tmp_path: Path, steps: tuple[int, ...], settings: dict[str, Any], said: list[str], not_said: list[str]
) -> None:
    compare(small(train_images=100), tmp_path, steps=steps, quiet=True, **settings)
    page = (tmp_path / "report.html").read_text()
    assert all(part in page for part in said)
    assert not any(part in page for part in not_said)


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
    assert both.facts["seed"] == "0, 1"
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


def test_pictures_and_page_follow_numbers_that_were_saved_without_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": (1, 2), "methods": ("proxy",), "quiet": True}
    compare(small(), tmp_path, **settings)
    page = tmp_path / "report.html"
    before = page.read_text()
    page.write_text("stale")
    compare(small(), tmp_path, **settings, resume=True)
    assert page.read_text() == before


def test_a_start_that_failed_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch"):
        compare(small(train_images=20), tmp_path, steps=(1, 2), methods=("direct",), quiet=True)
    assert compare(small(), tmp_path, steps=(1, 2), methods=("proxy",), quiet=True).outcomes


def test_going_on_elsewhere_takes_the_data_that_are_passed(tmp_path: Path) -> None:
    """The folder of the images and that of the comparison may be called otherwise, but not hold other images."""
    write_class_folders(tmp_path / "a", seed=0)
    settings: dict[str, Any] = {"steps": (1, 2), "quiet": True, "resume": True}
    out = tmp_path / "out"
    compare(small(data=str(tmp_path / "a"), batch_size=8), out, methods=("convert",), **settings)
    (tmp_path / "a").rename(tmp_path / "b")
    spelled = tmp_path / "x" / ".." / "out"
    moved = small(data=str(tmp_path / "b"), batch_size=8, method="proxy", neuron="lifb")  # which do not matter
    shown = compare(moved, spelled, methods=("convert", "finetune"), **settings)
    assert shown.names == ("converted", "converted, finetuned")
    write_class_folders(tmp_path / "c", seed=1)
    with pytest.raises(ValueError, match=r"differs in input\.mean"):
        compare(small(data=str(tmp_path / "c"), batch_size=8), out, methods=("proxy",), **settings)


def write_class_folders(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for part in ("train", "test"):
        for label in ("dark", "light"):
            (folder / part / label).mkdir(parents=True)
            for number in range(16):
                pixels = generator.integers(0, 128, (8, 8), dtype=np.uint8) + (128 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / label / f"{number}.png")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"methods": ("proxy",), "neurons": ("if",)}, "neurons"),
        ({"methods": ("convert",), "each": True}, "each"),
        ({"methods": ("proxy",), "activation": "relu"}, "activation"),
    ],
)
def test_arguments_without_effect_are_named(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect"):
        compare(small(train_images=100), tmp_path, steps=(1,), quiet=True, **settings)


def test_settings_of_one_method_are_not_idle_in_the_rows_of_others(tmp_path: Path) -> None:
    recipe = small(train_images=100, temperature=2.0, burst_init=1.5, logit_scale=2.0)
    compare(recipe, tmp_path, steps=(1, 2), methods=("direct", "proxy"), neurons=("lif",), quiet=True)


def test_recordings_are_compared_without_conversions(tmp_path: Path) -> None:
    recipe = simulated_digits_dvs(epochs=1, model="mlp", hidden=(16,), crop_padding=0, train_images=100)
    shown = compare(recipe, tmp_path, steps=(1, 2), neurons=("lif",), quiet=True)
    assert shown.names == ("LIF, cross-entropy", "LIF, TET", "LIF, consistency", "proxy learning")
    assert shown.notes() == ""
    assert "only the beginning of each recording" in (tmp_path / "report.html").read_text()


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
        ({"seeds": ()}, "seeds are"),
        ({"seeds": (0, -1)}, "seeds are"),
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
