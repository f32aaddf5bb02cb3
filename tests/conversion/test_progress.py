"""The bar counts what it is told of, and shows nothing where there is no terminal."""

import pytest

from ranvier.conversion.progress import Progress


def test_passes_are_counted_and_notes_are_not() -> None:
    with Progress(wanted=True) as bar:
        bar.show("tracing")
        bar.expect(3)
        bar.show("threshold max")
        bar.show("threshold mmse")
        bar.note("a longer look")
        (task,) = bar.bar.tasks
        assert (task.completed, task.total, task.description) == (2, 3, "a longer look")


@pytest.mark.parametrize(("wanted", "terminal"), [(True, False), (False, True), (True, True)])
def test_only_a_terminal_that_wants_it_shows_a_bar(
    wanted: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    with Progress(wanted) as bar:
        bar.expect(1)
        bar.show("threshold max")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert bool(shown.err) is (wanted and terminal)
