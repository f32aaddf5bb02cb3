import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from ranvier.evaluation import Costs
from ranvier.recipes import Result, convert, digits, digits_ann, energy, evaluate, run
from ranvier.training import CHECKPOINT

QUICK = {"model": "mlp", "epochs": 2, "hidden": (16,), "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    run(digits(**QUICK), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def ann_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "ann"
    run(digits_ann(**QUICK, levels=4, lr=1e-2), out, quiet=True)
    return out


@pytest.mark.parametrize("name", ["", "model.safetensors", CHECKPOINT])
def test_evaluate_gives_the_same_accuracy_again(folder: Path, name: str) -> None:
    again = evaluate(folder / name, source="digits")
    assert again.accuracy.accuracy == Result.load(folder / "results.json").accuracy_by_step


def test_evaluate_at_other_steps_keeps_the_prefix(folder: Path) -> None:
    longer = evaluate(folder, steps=6).accuracy
    assert longer.accuracy[:4] == Result.load(folder / "results.json").accuracy_by_step
    assert len(longer.accuracy) == 6


def test_evaluation_saves_json(folder: Path, tmp_path: Path) -> None:
    evaluate(folder).save(tmp_path / "e.json")
    saved = json.loads((tmp_path / "e.json").read_text())
    assert len(saved["accuracy_by_step"]) == 4
    assert saved["early_exit"] is None


def test_early_exit_is_chosen_on_training_images_where_none_were_held_out(folder: Path, tmp_path: Path) -> None:
    evaluation = evaluate(folder, early_exit=True, max_loss=0.02)
    exits = evaluation.early_exit
    assert exits is not None
    assert exits.max_loss == 0.02
    assert exits.chosen_on.startswith("239 images that the network was trained on")  # a fifth of 1197
    assert exits.choosing.total == 239
    assert (exits.testing.all_steps.hits, exits.testing.all_steps.ties) == (
        evaluation.accuracy.hits,
        evaluation.accuracy.ties,
    )
    assert exits.differing <= 1  # rounding
    lost = exits.choosing.all_steps.hits[-1] - sum(exits.choosing.hits)
    assert lost <= 0.02 * 239
    assert exits.choosing.mean_steps < 4
    evaluation.save(tmp_path / "e.json")
    saved = json.loads((tmp_path / "e.json").read_text())
    assert saved["early_exit"]["testing"]["stopped"] == list(exits.testing.stopped)
    assert saved["early_exit"]["chosen_on"] == exits.chosen_on
    assert len(saved["accuracy_by_step"]) == 4


def test_early_exit_is_chosen_on_held_out_images_where_there_are_some(tmp_path: Path) -> None:
    run(digits(**QUICK, hold_out=100), tmp_path / "h", quiet=True)
    exits = evaluate(tmp_path / "h", early_exit=True).early_exit
    assert exits is not None
    assert exits.chosen_on == "100 training images that were held out"
    assert (exits.choosing.total, exits.testing.total) == (100, 600)
    # Those very images: the training scored them after its last epoch.
    assert exits.choosing.all_steps.accuracy == Result.load(tmp_path / "h" / "results.json").accuracy_by_step


def test_a_conversion_leaves_alone_what_its_ann_has_not_seen(tmp_path: Path) -> None:
    run(digits_ann(**QUICK, hold_out=100), tmp_path / "ann", quiet=True)
    convert(str(tmp_path / "ann"), tmp_path / "snn", steps=2, bias="none", images=50, quiet=True)
    exits = evaluate(tmp_path / "snn", early_exit=True).early_exit
    assert exits is not None
    assert exits.chosen_on == "100 training images that were held out"
    assert exits.choosing.total == 100
    assert exits.differing <= 1  # rounding


def test_early_exit_is_drawn(folder: Path, ann_folder: Path, tmp_path: Path) -> None:
    for path in (folder, ann_folder):  # one of several steps, and one of a single step
        evaluate(path, early_exit=True, max_loss=0.02).plot(tmp_path / "exits.png", title="digits")
        with Image.open(tmp_path / "exits.png") as picture:
            assert min(picture.size) > 300
        (tmp_path / "exits.png").unlink()
    with pytest.raises(ValueError, match="nothing to draw.*early_exit=True"):
        evaluate(folder).plot(tmp_path / "exits.png")


def test_a_loss_without_early_exit_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_loss is 0.1, but belongs to early exit.*--early-exit"):
        evaluate(folder, max_loss=0.1)


def test_a_network_trained_with_hold_out_is_evaluated_on_the_test_set(tmp_path: Path) -> None:
    run(digits(**QUICK, hold_out=100), tmp_path / "h", quiet=True)
    assert evaluate(tmp_path / "h").accuracy.total == 600


def test_zero_steps_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="steps is 0, but must be a whole number of at least 1"):
        evaluate(folder, steps=0)


def test_evaluation_runs_at_the_precision_of_training(tmp_path: Path) -> None:
    result = run(digits(**QUICK | {"precision": "bfloat16"}), tmp_path, quiet=True)
    assert evaluate(tmp_path).accuracy.accuracy == result.accuracy_by_step
    assert evaluate(tmp_path, precision="float32").accuracy.total == 600


def test_gpu_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    with pytest.raises(RuntimeError, match="finds no GPU"):
        evaluate(folder, device="cuda")


def test_an_ann_is_evaluated_without_counting_spikes(ann_folder: Path, tmp_path: Path) -> None:
    evaluation = evaluate(ann_folder, steps=3, early_exit=True)
    assert evaluation.early_exit is not None
    assert evaluation.early_exit.choosing.stopped == (239, 0, 0)  # its later steps repeat the first
    assert evaluation.early_exit.testing.accuracy == evaluation.accuracy.final
    (expected,) = Result.load(ann_folder / "results.json").accuracy_by_step
    assert evaluation.accuracy.accuracy == (expected,) * 3
    assert evaluation.activity is None
    evaluation.save(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["activity"] is None
    console = Console(record=True, file=io.StringIO())
    console.print(evaluation, Result.load(ann_folder / "results.json"))
    printed = console.export_text()
    assert "digits, mlp, qcfs4, seed 0" in printed
    assert "Spikes" not in printed


def test_energy_stands_beside_accuracy(folder: Path) -> None:
    evaluation = evaluate(folder)
    spent = evaluation.energy
    assert spent is not None
    assert spent.operations.steps == 4
    assert spent.operations.samples == 500
    assert spent.operations.ann == 64 * 16 + 16 * 10
    assert evaluation.activity is not None
    alone = energy(folder, images=600)
    rates = [sum(layer.firing_rate) / 4 for layer in alone.operations.neurons]
    assert rates == pytest.approx([layer.mean_firing_rate for layer in evaluation.activity.layers], rel=0.02)
    console = Console(record=True, file=io.StringIO(), width=100)
    console.print(evaluation)
    assert "Energy for an image, over its first 1 .. 4 steps (n = 500)" in console.export_text()


def test_energy_by_costs_of_ones_own(folder: Path) -> None:
    one = energy(folder, costs=Costs("mine", 1.0, 0.0), images=100)
    assert one.operations.samples == 100
    assert one.total == pytest.approx(64 * 16)  # the first layer alone, which runs once
    with pytest.raises(ValueError, match="costs is '7nm'"):
        energy(folder, costs="7nm")


def test_early_exit_knows_the_energy(folder: Path) -> None:
    exits = evaluate(folder, early_exit=True, max_loss=0.02).early_exit
    assert exits is not None
    assert exits.energy is not None
    assert exits.energy_of_all_steps is not None
    assert 0 < exits.energy < exits.energy_of_all_steps


def test_an_ann_has_no_energy_of_spikes(ann_folder: Path) -> None:
    assert evaluate(ann_folder).energy is None
    with pytest.raises(ValueError, match="holds an ANN.*ranvier convert"):
        energy(ann_folder)


def test_what_cannot_be_counted_says_why(tmp_path: Path) -> None:
    settings = {"model": "spikformer", "epochs": 1, "device": "cpu", "batch_size": 64, "train_images": 64}
    run(digits(**settings), tmp_path / "s", quiet=True)
    evaluation = evaluate(tmp_path / "s")
    assert evaluation.energy is None
    assert "attention" in evaluation.not_counted
