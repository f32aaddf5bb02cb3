import importlib
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from ranvier.recipes import demo


def test_demo_leaves_table_pictures_and_report(tmp_path: Path) -> None:
    shown = demo(tmp_path, epochs=1, model="mlp", hidden=(16, 16), crop_padding=0)
    results = json.loads((tmp_path / "results.json").read_text())
    trained = ["LIF, cross-entropy", "LIFB, cross-entropy", "LIF, consistency", "LIFB, consistency", "proxy learning"]
    assert list(results) == [*trained, "converted", "LIFB, simulated events"]
    assert all(len(result["accuracy_by_step"]) == 4 for result in results.values())
    for name in ("accuracy.png", "energy.png", "raster.png", "events.png", "frames.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 250
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    console = Console(record=True, width=100)
    console.print(shown)
    assert "T=4" in console.export_text()


@pytest.mark.parametrize("content", ['{"accuracy_by_step": [0.5]}', '{"accur'])
def test_results_of_something_else_stay(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(FileExistsError, match="Choose another --out"):
        demo(tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_an_earlier_demo_is_replaced_and_other_folders_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Began(Exception):
        pass

    def begin(*_: object, **__: object) -> None:
        raise Began

    monkeypatch.setattr(importlib.import_module("ranvier.recipes.demo"), "compare", begin)
    for folder in ("comparison", "networks", "events", "demo-networks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results.json").write_text('{"LIFB, consistency": {}, "ReLU ANN, converted": {}}')  # before `compare`
    with pytest.raises(Began):
        demo(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"comparison", "networks", "events", "results.json"}
