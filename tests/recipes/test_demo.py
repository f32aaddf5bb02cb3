import json
from pathlib import Path

from PIL import Image
from rich.console import Console

from ranvier.recipes import demo


def test_demo_leaves_table_pictures_and_report(tmp_path: Path) -> None:
    shown = demo(tmp_path, epochs=1, model="mlp", hidden=(16, 16), crop_padding=0)
    results = json.loads((tmp_path / "results.json").read_text())
    trained = ["LIF, cross-entropy", "LIF, consistency", "LIFB, cross-entropy", "LIFB, consistency"]
    assert list(results) == [*trained, "ReLU ANN, converted", "LIFB, consistency, simulated events"]
    assert all(len(result["accuracy_by_step"]) == 4 for result in results.values())
    for name in ("accuracy.png", "raster.png", "events.png", "frames.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 250
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    console = Console(record=True, width=100)
    console.print(shown)
    assert "T=4" in console.export_text()
    demo(tmp_path, epochs=1, model="mlp", hidden=(16, 16), crop_padding=0)  # again, over the first
