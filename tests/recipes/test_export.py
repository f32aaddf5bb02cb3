import json
from pathlib import Path

import pytest
import torch

from ranvier.export import NIRReceipt, from_nir
from ranvier.recipes import convert, digits, digits_ann, export, load_trained, run

QUICK = {"model": "mlp", "epochs": 2, "hidden": (16,), "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    run(digits(**QUICK, neuron="lifb"), out, quiet=True)
    return out


def test_nir_beside_the_network(folder: Path) -> None:
    receipt = export(folder, steps=3, dt=2e-3)
    assert isinstance(receipt, NIRReceipt)
    assert (receipt.dt, receipt.steps, receipt.samples) == (2e-3, 3, 100)
    assert receipt.same_predictions == 1
    assert receipt == NIRReceipt.load(folder / "model.nir.receipt.json")
    trained = load_trained(folder)
    images = torch.cat([images for images, _ in trained.batches()])
    with torch.no_grad():
        expected, found = trained.model(images, 4), from_nir(folder / "model.nir")(images, 4)
    assert torch.equal(expected.mean(0).argmax(1), found.mean(0).argmax(1))


@pytest.mark.parametrize(("format", "ending"), [("onnx", ".onnx"), ("torch", ".pt2")])
def test_other_formats(folder: Path, tmp_path: Path, format: str, ending: str) -> None:
    out = tmp_path / f"net{ending}"
    export(folder, out, format=format, steps=2, images=20)  # type: ignore[arg-type]
    assert out.exists()
    assert json.loads((tmp_path / f"net{ending}.receipt.json").read_text())["steps"] == 2


def test_a_converted_network(tmp_path: Path) -> None:
    run(digits_ann(**QUICK), tmp_path / "ann", quiet=True)
    convert(str(tmp_path / "ann"), tmp_path / "snn", steps=2, images=200, quiet=True)
    receipt = export(tmp_path / "snn", tmp_path / "snn.nir")
    assert isinstance(receipt, NIRReceipt)
    assert receipt.same_predictions == 1
    assert "initial potential" in receipt.unsaid


def test_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strict belongs to NIR"):
        export(folder, format="onnx", strict=True)
    with pytest.raises(ValueError, match="streaming belongs to onnx and torch"):
        export(folder, streaming=True)
    with pytest.raises(ValueError, match="format is 'hdf5'"):
        export(folder, format="hdf5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NIR cannot say.*reset by another neuron's spike"):
        export(folder, tmp_path / "a.nir", strict=True)
    assert not list(tmp_path.iterdir())


def test_an_ann_is_not_exported(tmp_path: Path) -> None:
    run(digits_ann(**QUICK), tmp_path / "ann", quiet=True)
    with pytest.raises(ValueError, match="holds an ANN"):
        export(tmp_path / "ann")
