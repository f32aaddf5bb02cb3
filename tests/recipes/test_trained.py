"""Networks on disk: what comes back, on which data, for how many steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ranvier.conversion import ConvertedSNN, Settings
from ranvier.recipes import (
    convert,
    digits,
    digits_ann,
    energy,
    evaluate,
    export,
    load_data,
    load_trained,
    run,
    show,
)
from ranvier.weights import load_tensors, save, save_tensors

QUICK = {"model": "mlp", "epochs": 1, "hidden": (16,), "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    run(digits(**QUICK), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of an ANN that held 100 images out."""
    out = tmp_path_factory.mktemp("held-out")
    run(digits_ann(**QUICK, hold_out=100), out / "ann", quiet=True)
    convert(str(out / "ann"), out / "snn", steps=2, images=200, settings=Settings(rounds=(1,)), quiet=True)
    return out / "snn"


def write_images(folder: Path, *, size: int = 8, count: int = 3) -> str:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 255, (size, size), dtype=np.uint8)).save(place / f"{index}.png")
    return str(folder)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--out of a run"):
        load_trained(tmp_path)


def test_card_without_recipe(tmp_path: Path) -> None:
    save(torch.nn.Linear(1, 1), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no recipe on its card"):
        load_trained(tmp_path)


# Images that were held out


def test_images_to_choose_on_are_never_test_images(folder: Path) -> None:
    trained = load_trained(folder)
    chosen = {image.numpy().tobytes() for images, _ in trained.choosing()[0] for image in images}
    tested = {image.numpy().tobytes() for images, _ in trained.batches() for image in images}
    splits = load_data(trained.recipe)
    normalization = trained.form.normalization
    seen = {normalization(image.unsqueeze(0))[0].numpy().tobytes() for image in splits.train.images}
    assert chosen <= seen
    assert not chosen & tested


@pytest.mark.parametrize("train_images", [None, 300])
def test_what_is_held_out_is_in_neither_part_where_the_test_set_stays(train_images: int | None) -> None:
    recipe = digits(hold_out=300, train_images=train_images)
    whole, held_out, kept = load_data(digits()), load_data(recipe).test, load_data(recipe, keep_test_set=True)
    assert torch.equal(kept.test.images, whole.test.images)
    assert len(kept.train) == (train_images or len(whole.train) - 300)
    rows = [{image.numpy().tobytes() for image in part.images} for part in (kept.train, held_out)]
    assert not rows[0] & rows[1]


def test_what_was_held_out_is_said_as_it_is(folder: Path, held_out: Path, tmp_path: Path) -> None:
    assert load_trained(folder).held_out == 0
    assert load_trained(held_out.parent / "ann").held_out == 100
    trained = load_trained(held_out)
    assert trained.held_out == 100
    assert trained.choosing()[1] == "100 training images that were held out"
    tensors, card = load_tensors(held_out / "model.safetensors")
    del card["held_out"]  # conversions of earlier versions calibrated on any training images
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    earlier = load_trained(tmp_path)
    assert earlier.held_out == 0
    assert earlier.choosing()[1].startswith("100 training images that were held out from the ANN's training (what came")
    del card["recipe"]["network"], card["recipe"]["label_smoothing"]
    card["recipe"]["hold_out"] = 0
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    assert load_trained(tmp_path).choosing()[1].startswith("239 images that the network may have been trained on")


# Data of another kind


def test_data_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "set")
    with pytest.raises(ValueError, match="10 classes"):
        evaluate(folder, source=data)
    wide = digits(**QUICK | {"data": data, "batch_size": 2, "method": "direct"})
    assert len(run(wide, tmp_path / "out", quiet=True).accuracy_by_step) == 4


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    """ResNet-20 pools globally: it would run on any size, and answer otherwise than it was trained to."""
    data, larger = write_images(tmp_path / "set"), write_images(tmp_path / "larger", size=12)
    settings = {"model": "resnet20", "epochs": 1, "device": "cpu", "batch_size": 2, "method": "direct", "steps": 1}
    run(digits(**settings, data=data), tmp_path / "a", quiet=True)
    message = r"takes images of 8x8 pixels, but those of larger/test have 12x12\. .*--image-size 8"
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "a", source=larger)
    run(digits(**settings, data=larger, image_size=8), tmp_path / "b", quiet=True)
    for source in (data, larger):  # images are resized as they were for training
        assert evaluate(tmp_path / "b", source=source).accuracy.total == 6


# Steps


@pytest.mark.parametrize("call", [evaluate, energy, export, show], ids=lambda call: call.__name__)
def test_more_steps_than_biases_are_refused_before_anything_runs(held_out: Path, tmp_path: Path, call: object) -> None:
    message = r"biases for steps 1 to 2, but 5 steps were asked for\..*--steps 2, or convert the ANN with --steps 5\."
    out = {} if call in (evaluate, energy) else {"out": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        call(held_out, steps=5, source="nowhere", **out)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


def test_biases_that_do_not_depend_on_the_step_serve_any_number(held_out: Path, folder: Path, tmp_path: Path) -> None:
    convert(str(held_out.parent / "ann"), tmp_path / "snn", steps=2, bias="none", images=200, quiet=True)
    load_trained(tmp_path / "snn").check_steps(1000)
    load_trained(folder).check_steps(1000)
    with pytest.raises(ValueError, match="1 to 2, but 3 steps"):
        load_trained(held_out).check_steps(3)
    load_trained(held_out).check_steps(2)
    forgetful = load_trained(tmp_path / "snn")
    assert isinstance(forgetful.model, ConvertedSNN)
    forgetful.model.readout_decay = 0.5
    forgetful.check_steps(2)
    with pytest.warns(UserWarning, match=r"1000 steps .* decay of 0\.5 was chosen for 2: more gain little"):
        forgetful.check_steps(1000)
