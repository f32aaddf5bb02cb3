import json
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ranvier.conversion import ConvertedSNN, Settings, load, save
from ranvier.recipes import FinetuneRecipe, Result, convert, digits_ann, evaluate, export, load_trained, run
from ranvier.recipes.finetune import prepare
from ranvier.weights import load_tensors, save_tensors

QUICK = {"model": "mlp", "epochs": 3, "hidden": (32,), "device": "cpu", "activation": "relu"}
FINE = {"epochs": 2, "batch_size": 64, "precision": "float32", "implementation": "reference", "device": "cpu"}


@pytest.fixture(scope="module")
def snn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ann")
    run(digits_ann(**QUICK), out / "ann", quiet=True)
    convert(str(out / "ann"), out / "snn", steps=2, images=400, quiet=True)
    return out / "snn"


def recipe(start: Path, **settings: object) -> FinetuneRecipe:
    return FinetuneRecipe(start=str(start), steps=2).override(**FINE | settings)


@pytest.fixture(scope="module")
def folder(snn: Path) -> Path:
    out = snn.parent / "fine"
    run(recipe(snn, lr=2e-3, epochs=4), out, quiet=True)
    return out


def test_training_goes_on_from_the_conversion_and_gains(snn: Path, folder: Path) -> None:
    before = json.loads((snn / "results.json").read_text())["accuracy_by_step"]
    after = Result.load(folder / "results.json")
    assert after.accuracy_by_step[0] > before[0] + 0.02  # an MLP of 32 neurons has much to gain at T = 1
    start, end = load(snn / "model.safetensors"), load(folder / "model.safetensors")
    changed = {name for name, value in end.state_dict().items() if not value.equal(start.state_dict()[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"weight", "bias", "threshold", "v_init"}
    assert after.recipe["name"] == "digits"


def test_a_readout_that_forgets_is_given_up(snn: Path, tmp_path: Path) -> None:
    """Training makes the first steps tell as much as the others, and its losses are of the logits of each step."""
    start = load(snn / "model.safetensors")
    start.readout_decay = 0.5
    save(start, tmp_path / "model.safetensors", load_tensors(snn / "model.safetensors")[1])
    model = load_trained(tmp_path).model
    assert isinstance(model, ConvertedSNN)
    assert model.readout_decay == 0.5
    assert prepare(recipe(tmp_path)).model.readout_decay == 1.0


def test_no_epoch_would_change_nothing(snn: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing the network stays the converted one: training starts where conversion ended."""
    run(recipe(snn, lr=1e-12, epochs=1, weight_decay=0.0), tmp_path / "f", quiet=True)
    assert evaluate(tmp_path / "f").accuracy.hits == evaluate(snn).accuracy.hits


def test_the_result_is_a_converted_network(folder: Path, tmp_path: Path) -> None:
    trained = load_trained(folder)
    assert isinstance(trained.model, ConvertedSNN)
    assert trained.steps == 2
    assert trained.precision == "float32"
    assert evaluate(folder).accuracy.accuracy == Result.load(folder / "results.json").accuracy_by_step
    receipt = export(folder, tmp_path / "f.nir")
    assert receipt.same_predictions == 1  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_network_and_a_finished_run_its_results(snn: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(recipe(snn), tmp_path / name, quiet=True)
    one, other = (load(tmp_path / name / "model.safetensors").state_dict() for name in ("one", "other"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    again = run(recipe(snn), tmp_path / "one", resume=True, quiet=True)
    assert again == Result.load(tmp_path / "one" / "results.json")


def test_what_cannot_be_trained_further(snn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to start from.*ranvier finetune FOLDER"):
        run(FinetuneRecipe().override(**FINE), tmp_path / "a", quiet=True)
    with pytest.raises(ValueError, match="no converted network.*ranvier convert"):
        run(recipe(snn.parent / "ann"), tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match=r"biases for steps 1 to 2, but 4 .* convert the ANN with --steps 4\."):
        run(FinetuneRecipe(start=str(snn), steps=4).override(**FINE), tmp_path / "c", quiet=True)
    with pytest.raises(ValueError, match="etc compares time steps"):
        FinetuneRecipe(start=str(snn), steps=1)


def test_proxy_learning_starts_from_a_conversion_too(snn: Path, tmp_path: Path) -> None:
    before = json.loads((snn / "results.json").read_text())["accuracy_by_step"]
    result = run(recipe(snn, method="proxy", lr=2e-3, epochs=4), tmp_path / "p", quiet=True)
    assert result.accuracy_by_step[-1] > before[-1]
    start, end = load(snn / "model.safetensors"), load(tmp_path / "p" / "model.safetensors")
    changed = {name for name, value in end.state_dict().items() if not value.equal(start.state_dict()[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"weight", "bias", "threshold"}  # an ANN has no initial potentials
    assert evaluate(tmp_path / "p").accuracy.accuracy == result.accuracy_by_step


def test_proxy_learning_gives_every_parameter_that_is_trained_a_gradient(snn: Path) -> None:
    """Several processes wait for all of them: one that the ANN never uses ends the run."""
    start = prepare(recipe(snn, method="proxy"))
    images, labels = next(iter(load_trained(snn).batches()))
    value, _ = start.recipe.objective(start.model, images, labels, 2)
    value.backward()
    trained = {name: parameter for name, parameter in start.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    start = prepare(recipe(snn, method="etc"))  # through spikes everything learns
    assert all(parameter.requires_grad for parameter in start.model.parameters())


@pytest.mark.slow
def test_proxy_learning_on_two_processes(snn: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [
        *("-m", "ranvier", "finetune", str(snn), "--steps", "2", "--method", "proxy", "--epochs", "2"),
        *("--device", "cpu", "--implementation", "reference", "--precision", "float32", "--out", str(tmp_path / "out")),
    ]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Result.load(tmp_path / "out" / "results.json").processes == 2


# Images that were held out


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("held-out")
    run(digits_ann(**QUICK, hold_out=100), out / "ann", quiet=True)
    convert(str(out / "ann"), out / "snn", steps=2, images=400, settings=Settings(rounds=(1,)), quiet=True)
    return out / "snn"


def test_images_that_the_network_has_seen_are_not_held_out(snn: Path, held_out: Path, tmp_path: Path) -> None:
    remedy = "Train the ANN with --hold-out 100 and convert it"
    with pytest.raises(ValueError, match=f"hold_out is 100, but .* with no training images held out.*{remedy}"):
        run(recipe(snn, hold_out=100), tmp_path / "a", quiet=True)
    with pytest.raises(ValueError, match=r"hold_out is 50, but .* with 100 training images held out"):
        run(recipe(held_out, hold_out=50), tmp_path / "b", quiet=True)
    tensors, card = load_tensors(held_out / "model.safetensors")
    del card["held_out"]  # of an earlier version, which calibrated on held-out images
    save_tensors(tmp_path / "earlier.safetensors", tensors, card)
    with pytest.raises(ValueError, match=f"its conversion has seen some of those 100.*{remedy}"):
        run(recipe(tmp_path / "earlier.safetensors", hold_out=100), tmp_path / "c", quiet=True)
    assert not (tmp_path / "a").exists()


def test_images_that_the_ann_held_out_can_be_held_out_again(held_out: Path, tmp_path: Path) -> None:
    result = run(recipe(held_out, hold_out=100, epochs=1), tmp_path / "a", quiet=True)
    assert result.evaluated_on == "100 held-out training images"
    trained = load_trained(tmp_path / "a")
    assert trained.held_out == 100
    choosing, what = trained.choosing()
    assert what == "100 training images that were held out"
    ann, _ = load_trained(held_out.parent / "ann").choosing()
    assert torch.equal(choosing.images.images, ann.images.images)  # type: ignore[union-attr]
    assert evaluate(tmp_path / "a", early_exit=True).early_exit.choosing.all_steps.accuracy == result.accuracy_by_step  # type: ignore[union-attr]
    # From there it can go on so, but not after a training that has seen them.
    run(recipe(tmp_path / "a", hold_out=100, epochs=1), tmp_path / "b", quiet=True)
    run(recipe(tmp_path / "a", epochs=1), tmp_path / "c", quiet=True)
    assert load_trained(tmp_path / "c").held_out == 0
    with pytest.raises(ValueError, match="with no training images held out"):
        run(recipe(tmp_path / "c", hold_out=100), tmp_path / "d", quiet=True)


# Input and names


def test_images_are_resized_as_they_were_for_the_ann(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for index in range(10):
                pixels = random.integers(100 * number, 100 * number + 99, (12, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    settings = QUICK | {"data": str(tmp_path / "set"), "batch_size": 5, "image_size": 6, "epochs": 1}
    run(digits_ann(**settings), tmp_path / "ann", quiet=True)
    fast = Settings(rounds=(1,))
    convert(str(tmp_path / "ann"), tmp_path / "snn", steps=2, images=15, settings=fast, quiet=True)
    fine = recipe(tmp_path / "snn", batch_size=5, epochs=1)
    result = run(fine, tmp_path / "fine", quiet=True)
    assert result.recipe["image_size"] == 6
    assert evaluate(tmp_path / "fine").accuracy.accuracy == result.accuracy_by_step
    with pytest.raises(
        ValueError, match=r"takes images of 6x6 pixels, but those of set/test have 12x12\. .*--image-size 6"
    ):
        run(fine.override(image_size=12), tmp_path / "other", quiet=True)


def test_more_steps_than_it_was_trained_at_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="convert the ANN with --steps 3 and train that further"):
        evaluate(folder, steps=3)


def test_two_networks_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def label(start: str) -> str:
        return FinetuneRecipe(start=start, steps=2).label

    assert label("runs/one") == label("runs/one/") == label("runs/one/model.safetensors") == "one-etc-T2"
    assert label("runs/two/model.safetensors") == "two-etc-T2"
    assert label("nets/a.safetensors") == "nets-a-etc-T2"
    assert label(".") == f"{tmp_path.name}-etc-T2"
    assert label("") == "converted-etc-T2"


def test_settings_without_effect_are_told_once(snn: Path, tmp_path: Path) -> None:
    idle = recipe(snn, method="proxy", epochs=1, surrogate_width=0.5, label_smoothing=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(idle, tmp_path / "p", quiet=True)
        evaluate(tmp_path / "p")
        load_trained(tmp_path / "p").recipe.override(epochs=3)
    assert sorted(str(one.message) for one in told) == [
        "label_smoothing=0.1 has no effect with method proxy.",
        "surrogate_width=0.5 has no effect with method proxy.",
    ]
    assert {one.filename for one in told} == {__file__}  # who called run


def test_the_card_says_what_it_was_made_from(snn: Path, folder: Path, tmp_path: Path) -> None:
    before = json.loads((snn / "results.json").read_text())
    expected = {"ann": "mlp-relu", "ann_accuracy": before["ann_accuracy"], "ann_images": 600, "held_out": 0}
    card = load_tensors(folder / "model.safetensors")[1]
    assert {name: card[name] for name in expected} == expected
    run(recipe(folder, epochs=1), tmp_path / "again", quiet=True)
    card = load_tensors(tmp_path / "again" / "model.safetensors")[1]
    assert {name: card[name] for name in expected} == expected


def test_a_checkpoint_alone_is_no_network(folder: Path) -> None:
    with pytest.raises(ValueError, match="converted network in training.*--resume"):
        load_trained(folder / "checkpoint.safetensors")
