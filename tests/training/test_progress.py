import json
from pathlib import Path

import pytest

from ranvier.training.progress import Display, Metrics

RECORD = {"epoch": 1, "loss": 0.5, "accuracy": [0.1, 0.2]}


def test_metrics_append_one_line_per_epoch(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, [])
    metrics.add(RECORD)
    metrics.add(RECORD | {"epoch": 2})
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_resuming_drops_records_that_will_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3, "lo')  # killed while writing
    Metrics(tmp_path, [{"epoch": 1}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_no_folder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Metrics(None, []).add(RECORD)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, [], tensorboard=True)
    metrics.add(RECORD)
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "accuracy/T1", "accuracy/T2"} <= set(events.Tags()["scalars"])
    assert events.Scalars("accuracy/T2")[0].value == pytest.approx(0.2)


def test_missing_tensorboard_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install"):
        Metrics(tmp_path, [], tensorboard=True)


def test_display_is_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(10, 0, show=False) as display:
        display.update(1, 1, 1, "")
        display.say("hello")
    assert capsys.readouterr() == ("", "")


def test_display_says_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(10, 0, show=True) as display:
        display.say("epoch 1")
    assert "epoch 1" in capsys.readouterr().err
