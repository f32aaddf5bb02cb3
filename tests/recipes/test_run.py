import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ranvier.export import NIRReceipt
from ranvier.kernels import precision
from ranvier.nn import QCFS, ProxyActivation
from ranvier.recipes import AnnRecipe, Result, digits, digits_ann, evaluate, export, load_trained, run
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


def test_hold_out_leaves_the_test_set_alone(tmp_path: Path) -> None:
    result = run(digits(**QUICK, hold_out=100), tmp_path / "h", quiet=True)
    assert result.evaluated_on == "100 held-out training images"
    assert all(round(100 * accuracy) == pytest.approx(100 * accuracy) for accuracy in result.accuracy_by_step)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_run_keeps_the_precision_that_it_had(
    has_bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: has_bfloat16)
    recipe = digits(**QUICK, precision="auto", train_images=200)
    result = run(recipe, tmp_path / "a", quiet=True)
    expected = "bfloat16" if has_bfloat16 else "float32"
    assert result.recipe["execution"]["precision"] == expected
    assert load_trained(tmp_path / "a").precision == expected
    assert run(recipe, tmp_path / "a", resume=True, quiet=True).seconds == result.seconds
    # On a processor of the other kind it does not go on as something else, unless it is told to.
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: not has_bfloat16)
    with pytest.raises(ValueError, match="precision"):
        run(recipe, tmp_path / "a", resume=True, quiet=True)
    assert run(recipe.override(precision=expected), tmp_path / "a", resume=True, quiet=True).seconds == result.seconds


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


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        run(digits(**QUICK), tmp_path / "file", quiet=True)


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


PROXY = {**QUICK, "method": "proxy", "steps": 2, "lr": 1e-2}


@pytest.mark.parametrize("variant", ["improved", "published"])
def test_proxy_learning_leaves_a_spiking_network_like_any_other(tmp_path: Path, variant: str) -> None:
    result = run(digits(**PROXY, variant=variant), tmp_path, quiet=True)
    trained = load_trained(tmp_path)
    assert trained.steps == 2
    assert not any(module.analog for module in trained.model.modules() if isinstance(module, ProxyActivation))
    assert result.firing_rate is not None
    evaluation = evaluate(tmp_path)
    assert evaluation.accuracy.accuracy == result.accuracy_by_step
    assert evaluation.energy is not None  # it was traced
    assert not evaluation.not_counted
    receipt = export(tmp_path, images=20)
    assert isinstance(receipt, NIRReceipt)
    assert (tmp_path / "model.nir").exists()
    again = run(digits(**PROXY, variant=variant), tmp_path, resume=True, quiet=True)
    assert again == Result.load(tmp_path / "results.json")
    with pytest.raises(ValueError, match="proxy"):
        run(
            digits(**PROXY, variant=variant, v_init=0.0, logit_scale=None, biases=True),
            tmp_path,
            resume=True,
            quiet=True,
        )
