from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ranvier.recipes import Comparison, Outcome
from ranvier.recipes.comparison import AnnOutcome


@pytest.fixture
def shown(tmp_path: Path) -> Comparison:
    def outcome(name: str, seed: int, *accuracy: float, energy: tuple[float, float] | None = (1e-6, 2e-6)) -> Outcome:
        return Outcome(name, seed, accuracy, 0.125, 90.0, ("networks/a",), energy, None if energy is None else 4e-6)

    outcomes = (
        outcome("LIF, consistency", 0, 0.5, 0.75),
        outcome("LIF, consistency", 1, 0.6, 0.85, energy=(3e-6, 4e-6)),
        outcome("converted", 0, 0.25, 0.9, energy=None),
    )
    anns = (AnnOutcome(0, 0.95, 30.0, "networks/ann"),)
    return Comparison("digits, mlp", (1, 4), outcomes, tmp_path, anns, {"activation": "qcfs"}, {"seed": "0"})


def test_rows_have_mean_and_deviation_over_seeds(shown: Comparison) -> None:
    assert shown.columns() == ["network", "T=1", "T=4", "firing rate, T=4", "µJ, T=4", "seconds, T=4"]
    # deviations of two values: their difference over the root of two
    assert shown.rows(emphasize="*{}*".format) == [
        ["LIF, consistency (n=2)", "*55.0±7.1*", "80.0±7.1", "0.125", "3", "90"],
        ["converted (n=1)", "25.0", "*90.0*", "0.125", "-", "90"],
    ]
    assert shown.energy_rows() == [["LIF, consistency (n=2)", "2", "3"]]
    assert shown.notes() == (
        "The QCFS ANN that was converted: 95.0 %, 4 µJ for an image, 30 s. Mean and standard deviation over seeds."
    )


def test_of_one_seed_nothing_is_said_of_seeds(shown: Comparison) -> None:
    one = replace(shown, outcomes=shown.outcomes[::2], anns=())
    assert [row[0] for row in one.rows()] == ["LIF, consistency", "converted"]
    assert one.notes() == ""


def test_table_fits_a_narrow_terminal(shown: Comparison) -> None:
    console = Console(record=True, width=80)
    console.print(replace(shown, out=Path("k[/x]5")))
    text = console.export_text()
    for part in ("digits, mlp: test accuracy %", "55.0±7.1", "QCFS ANN", "T=4", "LIF, consistency (n=2)", "k[/x]5"):
        assert part in text


def test_pictures_and_page(shown: Comparison) -> None:
    shown.draw()
    shown.write_page("How it was done.")
    page = (shown.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "How it was done." in page
    assert "Energy for an image" in page


def test_saved_and_read_back(shown: Comparison) -> None:
    shown.save(shown.out / "results.json")
    assert Comparison.load(shown.out / "results.json") == shown


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for content in ('{"accuracy_by_step": [0.5]}', "[1]", '{"outcomes": [{"who": 1}], "anns": [], "steps": [1]}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="not what ranvier compare writes"):
            Comparison.load(tmp_path / "results.json")
