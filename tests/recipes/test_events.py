"""Event recipes from recordings to results, on a few simulated or written ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranvier.data import load_digits, simulated_events
from ranvier.data.events import FrameSet, FrameSplits, build_splits
from ranvier.recipes import (
    Result,
    energy,
    evaluate,
    export,
    load_data,
    load_trained,
    nmnist,
    run,
    simulated_digits_dvs,
)
from ranvier.recipes.recipe import read_recipe
from ranvier.training.loop import _Training
from ranvier.weights import load_tensors, save_tensors

QUICK: dict[str, Any] = {
    "model": "mlp",
    "hidden": (16,),
    "steps": 5,
    "epochs": 2,
    "device": "cpu",
    "implementation": "reference",
    "precision": "float32",
}


LEARNING = {**QUICK, "hidden": (64,), "epochs": 8, "lr": 1e-2, "crop_padding": 0}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANVIER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    run(simulated_digits_dvs(**LEARNING), out, quiet=True)
    return out


def write_nmnist(folder: Path, each: int = 4) -> Path:
    """Recordings in which a digit is a column: learnable at sight, in the layout and format of N-MNIST."""
    random = np.random.RandomState(0)
    for split, count in (("Train", each), ("Test", 1)):
        for digit in range(10):
            place = folder / split / str(digit)
            place.mkdir(parents=True)
            for number in range(count):
                times = np.sort(random.randint(0, 300_000, 200))
                rows, polarities = random.randint(0, 34, 200), random.randint(0, 2, 200)
                columns = np.full(200, 3 * digit + 2)
                fields = [columns, rows, polarities << 7 | times >> 16, times >> 8 & 255, times & 255]
                (place / f"{number + 1:05}.bin").write_bytes(np.stack(fields, 1).astype(np.uint8).tobytes())
    return folder


def test_a_run_on_simulated_recordings(folder: Path) -> None:
    result = Result.load(folder / "results.json")
    assert len(result.accuracy_by_step) == 5
    assert result.accuracy_by_step[-1] > 0.3  # chance is 0.1
    assert result.recipe["saccades"]["sensor"] == 16
    trained = load_trained(folder)
    assert (trained.steps, trained.form.channels, trained.form.image_size) == (5, 2, 16)
    assert trained.form.normalization is None
    images, _ = next(iter(trained.batches()))
    assert images.shape == (5, images.shape[1], 2, 16, 16)
    assert torch.equal(images, images.round())  # raw counts
    assert evaluate(folder).accuracy.accuracy == result.accuracy_by_step


def test_frames_are_those_of_the_simulated_camera() -> None:
    recipe = simulated_digits_dvs(steps=3, bins="count")
    splits = load_data(recipe)
    assert isinstance(splits, FrameSplits)
    again = build_splits(simulated_events(load_digits(), recipe.saccades), recipe.frames, progress=False)
    some = torch.tensor([5, 0])
    assert torch.equal(splits.test.read(some), again.test.read(some))
    assert splits.train.name.startswith("simulated digits")


def test_fewer_steps_are_the_first_frames(folder: Path) -> None:
    whole = Result.load(folder / "results.json").accuracy_by_step
    assert evaluate(folder, steps=2).accuracy.accuracy == whole[:2]
    assert energy(folder, steps=2, images=50).by_step == energy(folder, images=50).by_step[:2]
    with pytest.raises(ValueError, match="has 5 frames of each recording, but 6 steps"):
        evaluate(folder, steps=6)


def test_early_exit_and_files_of_sequences(folder: Path, tmp_path: Path) -> None:
    exits = evaluate(folder, early_exit=True, max_loss=0.05).early_exit
    assert exits is not None
    assert exits.differing <= 1  # rounding
    receipt = export(folder, tmp_path / "a.nir", images=20)
    assert (receipt.steps, receipt.samples) == (5, 20)
    assert receipt.same_predictions == 1.0
    with pytest.raises(ValueError, match="--streaming"):
        export(folder, tmp_path / "a.onnx", format="onnx", images=20)
    export(folder, tmp_path / "a.onnx", format="onnx", streaming=True, images=20)


def test_a_run_on_recordings_in_files(tmp_path: Path) -> None:
    data = write_nmnist(tmp_path / "nmnist")
    recipe = nmnist(**QUICK, data=str(data), batch_size=10, lr=1e-2, crop_padding=0).override(epochs=15)
    result = run(recipe, tmp_path / "a", quiet=True)
    assert result.accuracy_by_step[-1] > 0.8
    # The folder of the recordings is not part of what a run is, so that it can go on elsewhere.
    moved = (tmp_path / "nmnist").rename(tmp_path / "moved")
    assert evaluate(tmp_path / "a", source=str(moved)).accuracy.accuracy == result.accuracy_by_step
    again = run(recipe.override(data=str(moved), download=False), tmp_path / "a", resume=True, quiet=True)
    assert again.accuracy_by_step == result.accuracy_by_step


def test_a_broken_recording_stops_the_run_or_is_left_out(tmp_path: Path) -> None:
    data = write_nmnist(tmp_path / "nmnist")
    broken = data / "Train" / "3" / "00002.bin"
    broken.write_bytes(broken.read_bytes()[:-2])
    recipe = nmnist(**QUICK, data=str(data), batch_size=10)
    with pytest.raises(ValueError, match=r"00002\.bin"):
        run(recipe, tmp_path / "a", quiet=True)
    with pytest.warns(UserWarning, match=r"00002\.bin"):
        splits = load_data(recipe.override(skip_unreadable=True))
    assert len(splits.train) == 39


def test_held_out_and_balanced(tmp_path: Path) -> None:
    data = write_nmnist(tmp_path / "nmnist")
    splits = load_data(nmnist(**QUICK, data=str(data), hold_out=10, train_images=20))
    assert isinstance(splits.train, FrameSet)
    assert (len(splits.train), len(splits.test)) == (20, 10)
    assert splits.test.labels.tolist() == list(range(10))
    run(nmnist(**QUICK, data=str(data), balanced=True, batch_size=10), tmp_path / "b", quiet=True)
    assert json.loads((tmp_path / "b" / "results.json").read_text())["recipe"]["events"]["balanced"]


def test_proxy_learning_on_recordings(tmp_path: Path) -> None:
    result = run(simulated_digits_dvs(**LEARNING, method="proxy"), tmp_path / "p", quiet=True)
    assert result.accuracy_by_step[-1] > 0.3  # chance is 0.1


@pytest.mark.parametrize("method", ["etc", "tet", "proxy"])
def test_a_run_on_mixed_recordings(tmp_path: Path, method: str) -> None:
    recipe = simulated_digits_dvs(**{**LEARNING, "method": method, "mix": 0.5})
    result = run(recipe, tmp_path / "a", quiet=True)
    assert result.accuracy_by_step[-1] > 0.3  # chance is 0.1
    assert result.recipe["events"]["mix"] == 0.5
    assert evaluate(tmp_path / "a").accuracy.accuracy == result.accuracy_by_step
    again = run(recipe, tmp_path / "a", resume=True, quiet=True)
    assert again.accuracy_by_step == result.accuracy_by_step
    (tmp_path / "a" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"another run; it differs in recipe\.events\.mix: 0\.5"):
        run(recipe.override(mix=0.0), tmp_path / "a", resume=True, quiet=True)


def test_a_mixed_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = simulated_digits_dvs(**{**QUICK, "mix": 0.5, "epochs": 2})
    whole = run(recipe, tmp_path / "whole", quiet=True)

    class Stop(Exception):
        pass

    finish = _Training.finish_epoch
    with pytest.MonkeyPatch.context() as patch:

        def stop_after_one(training: Any, test: Any) -> Any:
            finish(training, test)
            raise Stop

        patch.setattr(_Training, "finish_epoch", stop_after_one)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "stopped", quiet=True)
    resumed = run(recipe, tmp_path / "stopped", resume=True, quiet=True)
    assert resumed.accuracy_by_step == whole.accuracy_by_step
    run(recipe.override(mix=0.0), tmp_path / "plain", quiet=True)
    weights = {name: load_trained(tmp_path / name).model.state_dict() for name in ("whole", "stopped", "plain")}
    for name, value in weights["whole"].items():
        assert torch.equal(weights["stopped"][name], value)
    assert any(not torch.equal(weights["plain"][name], value) for name, value in weights["whole"].items())


def test_runs_from_before_mixing_still_load_and_resume(tmp_path: Path) -> None:
    recipe = simulated_digits_dvs(**{**QUICK, "epochs": 1})
    assert "mix" not in recipe.identity()["events"]
    assert recipe.override(mix=0.5).identity()["events"]["mix"] == 0.5
    content = recipe.to_json()
    del content["events"]["mix"]
    assert read_recipe(content) == recipe
    result = run(recipe, tmp_path / "a", quiet=True)
    model = tmp_path / "a" / "model.safetensors"
    tensors, card = load_tensors(model)
    del card["recipe"]["events"]["mix"]
    save_tensors(model, tensors, card)
    assert load_trained(tmp_path / "a").recipe == recipe
    assert evaluate(tmp_path / "a").accuracy.accuracy == result.accuracy_by_step
    model.unlink()
    assert load_trained(tmp_path / "a").recipe.events == recipe.events  # of the checkpoint
    again = run(recipe, tmp_path / "a", resume=True, quiet=True)
    assert again.accuracy_by_step == result.accuracy_by_step


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="bins"):
        nmnist(bins="space")
    for mix in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"mix is {mix}, but is a probability"):
            nmnist(mix=mix)
