from pathlib import Path

import pytest

from ranvier.report import Section, accuracy_curves, write_page


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    accuracy_curves({"a": [0.5]}, path=tmp_path / "a.png")
    write_page(
        tmp_path / "page.html",
        title="a < b",
        lead="lead",
        sections=[Section("table", columns=["x"], rows=[["<1>"]]), Section("picture", image=tmp_path / "a.png")],
        facts={"torch": "2"},
    )
    text = (tmp_path / "page.html").read_text()
    assert "a &lt; b" in text
    assert "&lt;1&gt;" in text
    assert "base64," in text
    assert "http" not in text


def test_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "p.html", title="", lead="", sections=[Section("s", image=tmp_path / "no.png")], facts={})
