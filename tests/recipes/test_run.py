import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ranvier.nn import QCFS
from ranvier.recipes import AnnRecipe, Result, convert, digits, digits_ann, evaluate, load_data, load_trained, run
from ranvier.training import CHECKPOINT

QUICK = {"model": "mlp", "epochs": 2, "hidden": (16,), "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    run(digits(**QUICK), out, quiet=True)
    return out


def test_what_a_run_leaves(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.json", "model.safetensors", "metrics.jsonl", CHECKPOINT}
    results = json.loads((folder / "results.json").read_text())
    assert len(results["accuracy_by_step"]) == 4
    assert results["seed"] == 0
    assert results["seconds"] > 0
    assert {"python", "torch", "ranvier"} <= results["versions"].keys()
    assert results["evaluated_on"] == "test set"


def test_result_is_the_last_epoch(folder: Path) -> None:
    result = Result.load(folder / "results.json")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert list(result.accuracy_by_step) == last["accuracy"]
    assert result.epochs == last["epoch"] == 2


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
    assert exits.testing.all_steps == evaluation.accuracy
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


def test_a_conversion_may_have_seen_what_its_ann_has_not(tmp_path: Path) -> None:
    run(digits_ann(**QUICK, hold_out=100), tmp_path / "ann", quiet=True)
    convert(str(tmp_path / "ann"), tmp_path / "snn", steps=2, bias="none", images=50, quiet=True)
    exits = evaluate(tmp_path / "snn", early_exit=True).early_exit
    assert exits is not None
    assert exits.chosen_on.startswith("100 training images that were held out from the ANN's training (the conversion")
    assert exits.differing <= 1  # rounding


def test_images_to_choose_on_are_never_test_images(folder: Path) -> None:
    trained = load_trained(folder)
    chosen = {image.numpy().tobytes() for images, _ in trained.choosing()[0] for image in images}
    tested = {image.numpy().tobytes() for images, _ in trained.batches() for image in images}
    splits = load_data(trained.recipe)
    normalization = trained.form.normalization
    seen = {normalization(image.unsqueeze(0))[0].numpy().tobytes() for image in splits.train.images}
    assert chosen <= seen
    assert not chosen & tested


def test_a_loss_without_early_exit_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_loss is 0.1, but belongs to early exit.*--early-exit"):
        evaluate(folder, max_loss=0.1)


def test_hold_out_leaves_the_test_set_alone(tmp_path: Path) -> None:
    result = run(digits(**QUICK, hold_out=100), tmp_path / "h", quiet=True)
    assert result.evaluated_on == "100 held-out training images"
    assert all(round(100 * accuracy) == pytest.approx(100 * accuracy) for accuracy in result.accuracy_by_step)


def test_a_network_trained_with_hold_out_is_evaluated_on_the_test_set(tmp_path: Path) -> None:
    run(digits(**QUICK, hold_out=100), tmp_path / "h", quiet=True)
    assert evaluate(tmp_path / "h").accuracy.total == 600


def test_zero_steps_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="at least one time step"):
        evaluate(folder, steps=0)


def test_a_finished_run_keeps_its_results(folder: Path) -> None:
    before = (folder / "results.json").read_bytes()
    again = run(digits(**QUICK), folder, resume=True, quiet=True)
    assert again == Result.load(folder / "results.json")
    assert (folder / "results.json").read_bytes() == before
    with pytest.raises(FileExistsError, match="--resume"):
        run(digits(**QUICK), folder, quiet=True)


def test_results_without_their_checkpoint_are_not_overwritten(tmp_path: Path) -> None:
    run(digits(**QUICK), tmp_path, quiet=True)
    (tmp_path / CHECKPOINT).unlink()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="another --out"):
            run(digits(**QUICK), tmp_path, resume=resume, quiet=True)


def test_evaluation_runs_at_the_precision_of_training(tmp_path: Path) -> None:
    result = run(digits(**QUICK | {"precision": "bfloat16"}), tmp_path, quiet=True)
    assert evaluate(tmp_path).accuracy.accuracy == result.accuracy_by_step
    assert evaluate(tmp_path, precision="float32").accuracy.total == 600


def test_gpu_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    with pytest.raises(RuntimeError, match="finds no GPU"):
        evaluate(folder, device="cuda")


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        run(digits(**QUICK), tmp_path / "file", quiet=True)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--out of a run"):
        load_trained(tmp_path)


def test_card_without_recipe(tmp_path: Path) -> None:
    from ranvier.weights import save

    save(torch.nn.Linear(1, 1), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no recipe on its card"):
        load_trained(tmp_path)


def test_data_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for index in range(3):
                Image.fromarray(random.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{index}.png")
    with pytest.raises(ValueError, match="10 classes"):
        evaluate(folder, source=str(tmp_path / "set"))
    wide = digits(**QUICK | {"data": str(tmp_path / "set"), "batch_size": 2, "method": "direct"})
    assert len(run(wide, tmp_path / "out", quiet=True).accuracy_by_step) == 4


def test_oblong_images_name_the_remedy(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            Image.fromarray(np.zeros((8, 12), dtype=np.uint8)).save(place / "0.png")
    with pytest.raises(ValueError, match="--image-size 12"):
        run(digits(**QUICK | {"data": str(tmp_path / "set"), "batch_size": 2}), tmp_path / "out", quiet=True)


ANN = QUICK | {"levels": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def ann_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ann") / "a"
    run(digits_ann(**ANN), out, quiet=True)
    return out


def test_what_the_training_of_an_ann_leaves(ann_folder: Path) -> None:
    assert {path.name for path in ann_folder.iterdir()} == {
        "results.json",
        "model.safetensors",
        "metrics.jsonl",
        CHECKPOINT,
    }
    result = Result.load(ann_folder / "results.json")
    assert len(result.accuracy_by_step) == 1  # an ANN answers once
    assert result.accuracy_by_step[0] > 0.3  # of ten classes, after two short epochs
    assert result.firing_rate is None  # and does not spike
    assert result.firing_rate_by_layer == {}
    assert result.recipe["network"]["levels"] == 4


def test_a_trained_ann_comes_back_as_it_was(ann_folder: Path) -> None:
    for name in ("", "model.safetensors", CHECKPOINT):
        trained = load_trained(ann_folder / name)
        assert isinstance(trained.recipe, AnnRecipe)
        assert trained.steps == 1
        ceilings = [module.ceiling.item() for module in trained.model.modules() if isinstance(module, QCFS)]
        assert len(ceilings) == 1
        assert ceilings[0] != 4.0  # it was learned, and it was kept


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


def test_an_ann_resumes_its_own_recipe_only(ann_folder: Path, tmp_path: Path) -> None:
    recipe = digits_ann(**ANN)
    assert run(recipe, ann_folder, resume=True, quiet=True) == Result.load(ann_folder / "results.json")
    for other in (recipe.override(levels=8), digits(**QUICK)):
        with pytest.raises(ValueError, match="network"):
            run(other, ann_folder, resume=True, quiet=True)


def test_label_smoothing_reaches_the_loss(tmp_path: Path) -> None:
    """All weight on all classes alike: nothing to learn, and the loss cannot fall below log 10."""
    quick = digits_ann(**QUICK | {"epochs": 1}, label_smoothing=1.0)
    run(quick, tmp_path, quiet=True)
    (record,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record["loss"] >= np.log(10)
