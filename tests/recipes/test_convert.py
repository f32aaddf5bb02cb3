import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ranvier.conversion import ConvertedSNN, Settings, load
from ranvier.data import load_digits
from ranvier.evaluation import accuracy_by_step
from ranvier.recipes import convert, digits_ann, evaluate, load_trained, run

QUICK = {"model": "mlp", "hidden": (32,), "epochs": 3, "device": "cpu"}
FAST = Settings(rounds=(2,))


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ann") / "a"
    run(digits_ann(**QUICK), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def folder(ann: Path) -> Path:
    out = ann.parent / "snn"
    convert(str(ann), out, steps=4, images=300, settings=FAST, quiet=True)
    return out


def test_what_a_conversion_leaves(ann: Path, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "results.json", "errors.png"}
    results = json.loads((folder / "results.json").read_text())
    assert len(results["accuracy_by_step"]) == 4
    trained = json.loads((ann / "results.json").read_text())
    assert results["ann_accuracy"] == pytest.approx(trained["accuracy_by_step"][0])
    assert results["report"]["chosen"]["bias"] == "ftbc"
    assert results["report"]["fitted_on"] + results["report"]["chosen_on"] == 300


def test_evaluate_gives_the_same_accuracy_again(folder: Path) -> None:
    again = evaluate(folder)
    results = json.loads((folder / "results.json").read_text())
    assert list(again.accuracy.accuracy) == results["accuracy_by_step"]
    assert again.activity is not None
    assert len(again.activity.layers) == 1


def test_fewer_steps_are_the_prefix(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert list(evaluate(folder, steps=2).accuracy.accuracy) == results["accuracy_by_step"][:2]
    with pytest.raises(ValueError, match="steps 1 to 4"):
        evaluate(folder, steps=8)


def test_an_ann_is_evaluated_without_spikes(ann: Path) -> None:
    evaluation = evaluate(ann)
    assert evaluation.activity is None
    assert len(evaluation.accuracy) == 1


def test_loads_as_a_module(folder: Path) -> None:
    trained = load_trained(folder)
    assert isinstance(trained.model, ConvertedSNN)
    assert trained.steps == 4
    alone = load(folder / "model.safetensors")
    batches = list(trained.batches())
    assert accuracy_by_step(alone, batches, 4).hits == accuracy_by_step(trained.model, batches, 4).hits


def test_a_second_conversion_needs_another_folder(ann: Path, folder: Path) -> None:
    with pytest.raises(FileExistsError, match="another --out"):
        convert(str(ann), folder, steps=4, quiet=True)


def test_first_test_images_only(ann: Path, tmp_path: Path) -> None:
    result = convert(str(ann), tmp_path, steps=2, images=100, test_images=50, bias="none", threshold="max", quiet=True)
    assert result.accuracy.total == 50
    assert result.report.chosen.threshold == "max"


def test_scored_on_the_test_set_also_after_a_recipe_that_held_images_out(tmp_path: Path) -> None:
    run(digits_ann(**QUICK, hold_out=200), tmp_path / "a", quiet=True)
    splits = load_digits()
    result = convert(str(tmp_path / "a"), tmp_path / "b", steps=2, images=100, settings=FAST, quiet=True)
    assert result.accuracy.total == len(splits.test)
    assert len(splits.test) != 200


def test_images_that_the_ann_held_out_are_not_calibrated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it saw a part of the training set only, which must not be drawn anew from all of it."""
    from ranvier import conversion

    seen: set[bytes] = set()
    original = conversion.convert

    def watched(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], **settings: Any) -> ConvertedSNN:
        batches = [images for images, _ in batches]
        seen.update(image.numpy().tobytes() for images in batches for image in images)
        return original(model, batches, **settings)

    monkeypatch.setattr(conversion, "convert", watched)
    for train_images in (None, 200):
        seen.clear()
        recipe = digits_ann(**QUICK, hold_out=200, train_images=train_images)
        run(recipe, tmp_path / f"a{train_images}", quiet=True)
        out = tmp_path / f"b{train_images}"
        convert(str(tmp_path / f"a{train_images}"), out, steps=2, images=5000, bias="none", quiet=True)
        trained = load_trained(out)
        held_out = {image.numpy().tobytes() for images, _ in trained.choosing()[0] for image in images}
        assert len(held_out) == 200
        assert len(seen) > 150
        assert not seen & held_out


def test_what_was_converted_is_no_ann(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="converted network already"):
        convert(str(folder), tmp_path, steps=4, quiet=True)


FACTORY = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def number():
    return 3

def sized(size):
    return tiny()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_anns.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path


def test_a_factory_of_ones_own(package: Path) -> None:
    result = convert(
        "my_anns:tiny", "out", weights="tiny.safetensors", data="digits", steps=2, images=100, settings=FAST, quiet=True
    )
    assert result.name == "tiny"
    again = evaluate(package / "out", source="digits")
    assert again.accuracy.accuracy == result.accuracy.accuracy


@pytest.mark.parametrize(
    ("ann", "options", "message"),
    [
        ("my_anns:tiny", {"weights": "tiny.safetensors"}, "--data"),
        ("my_anns:absent", {"weights": "tiny.safetensors", "data": "digits"}, "no function 'absent'"),
        ("my_anns:sized", {"weights": "tiny.safetensors", "data": "digits"}, "without arguments .*'size'"),
        ("my_anns:number", {"weights": "tiny.safetensors", "data": "digits"}, "returned a int"),
        ("no_such_package:tiny", {"weights": "tiny.safetensors", "data": "digits"}, "cannot import"),
        ("my_anns:tiny", {"weights": "my_anns.py", "data": "digits"}, "not a complete safetensors"),
    ],
)
def test_factories_that_do_not_fit(package: Path, ann: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(ann, "out", steps=2, quiet=True, **options)


def test_images_are_resized_for_a_factory(package: Path) -> None:
    for part, count in (("train", 8), ("test", 4)):
        for label in range(10):
            folder = package / "images" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                size = (10, 12 + number)  # neither square nor alike
                Image.fromarray(np.full(size, 20 * label + number, dtype=np.uint8)).save(folder / f"{number}.png")
    shared: dict[str, Any] = {"weights": "tiny.safetensors", "data": "images", "steps": 2, "quiet": True}
    with pytest.raises(ValueError, match="--image-size"):
        convert("my_anns:tiny", "out", **shared)
    result = convert("my_anns:tiny", "out", image_size=8, settings=FAST, **shared)
    assert result.accuracy.total == 40
    assert evaluate(package / "out").accuracy.accuracy == result.accuracy.accuracy


def test_a_factory_may_have_weights_of_its_own(package: Path) -> None:
    shared: dict[str, Any] = {"data": "digits", "steps": 2, "images": 100, "settings": FAST, "quiet": True}
    torch.manual_seed(0)  # what the file was made with
    own = convert("my_anns:tiny", "own", **shared)
    given = convert("my_anns:tiny", "given", weights="tiny.safetensors", **shared)
    assert own.accuracy.accuracy == given.accuracy.accuracy


def test_counts_that_are_none(ann: Path, tmp_path: Path) -> None:
    for name in ("images", "test_images"):
        for count in (0, -5):
            with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {count}, but must be a whole number"):
                convert(str(ann), tmp_path, steps=2, **{name: count}, quiet=True)  # type: ignore[arg-type]


def test_an_ann_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"my_anns\.tiny does not exist. Pass the folder .*with a colon"):
        convert("my_anns.tiny", tmp_path, steps=2, weights="a.safetensors", quiet=True)


def test_weights_that_are_not_there(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        convert("my_anns:tiny", "out", weights="nowhere.safetensors", data="digits", steps=2, quiet=True)


def test_weights_are_for_factories(ann: Path, tmp_path: Path) -> None:
    for name, value in (("weights", "a.safetensors"), ("image_size", 8)):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is for"):
            convert(str(ann), tmp_path, **{name: value}, steps=2, quiet=True)  # type: ignore[arg-type]
