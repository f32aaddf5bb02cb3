import json
from pathlib import Path

import pytest
import torch

from ranvier.conversion import ConvertedSNN, load
from ranvier.recipes import FinetuneRecipe, Result, convert, digits_ann, evaluate, export, load_trained, run

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
    with pytest.raises(ValueError, match="nothing to start from.*--start"):
        run(FinetuneRecipe().override(**FINE), tmp_path / "a", quiet=True)
    with pytest.raises(ValueError, match="no converted network.*ranvier convert"):
        run(recipe(snn.parent / "ann"), tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match="biases for 2 steps.*trained at 4.*--steps 4"):
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


def test_a_checkpoint_alone_is_no_network(folder: Path) -> None:
    with pytest.raises(ValueError, match="converted network in training.*--resume"):
        load_trained(folder / "checkpoint.safetensors")
