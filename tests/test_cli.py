import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ranvier import provenance, recipes
from ranvier.cli import COMMANDS, main


def call(*arguments: str) -> None:
    main(list(arguments))


def test_train_prints_its_table_last_and_evaluate_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    call("train", "digits", "--model", "mlp", "--epochs", "1", "--neuron", "lifb", "--out", out)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for accuracy in results["accuracy_by_step"]:
        assert f"{100 * accuracy:.2f}" in printed
    call("evaluate", out, "--steps", "2", "--out", str(tmp_path / "e.json"))
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["accuracy_by_step"] == results["accuracy_by_step"][:2]
    assert "Spikes per neuron and step" in capsys.readouterr().out


def test_train_ann_prints_its_table_last_and_evaluate_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call("train-ann", "digits", "--model", "mlp", "--epochs", "1", "--levels", "4", "--seed", "3")
    printed = capsys.readouterr().out
    out = tmp_path / "runs" / "digits-mlp-qcfs4-seed3"
    (accuracy,) = json.loads((out / "results.json").read_text())["accuracy_by_step"]
    assert f"{100 * accuracy:.2f}" in printed
    assert "digits, mlp, qcfs4, seed 3" in printed
    call("evaluate", str(out), "--out", "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["accuracy_by_step"] == [accuracy]
    assert "Spikes" not in capsys.readouterr().out  # an ANN has none
    with pytest.raises(SystemExit):
        call("train-ann", "digits", "--model", "mlp", "--epochs", "1", "--levels", "4", "--seed", "3")
    assert "--resume" in capsys.readouterr().err


def test_an_ann_becomes_a_spiking_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ann, snn = str(tmp_path / "ann"), str(tmp_path / "snn")
    call("train-ann", "digits", "--model", "mlp", "--epochs", "1", "--activation", "relu", "--out", ann)
    convert = ["convert", ann, "--steps", "2", "--images", "100", "--rounds", "0", "1", "--out", snn]
    call(*convert, "--threshold", "auto", "--bias", "auto", "--signed")
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "snn" / "results.json").read_text())
    for accuracy in results["accuracy_by_step"]:
        assert f"{100 * accuracy:.2f}" in printed
    assert results["report"]["signed"]
    assert len({one["threshold"] for one in results["report"]["candidates"]}) == 3
    call("evaluate", snn, "--early-exit")
    printed = capsys.readouterr().out
    assert f"{100 * results['accuracy_by_step'][-1]:.2f}" in printed
    assert "Early exit" in printed
    assert any(one["refit"] for one in results["report"]["candidates"])
    with pytest.raises(SystemExit):
        call(*convert)
    assert "another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(*convert, "--refit", "--keep-weights")
    assert "leave one out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(*convert, "--leaky", "--plain-mean")
    assert "leave one out" in capsys.readouterr().err
    assert len({one["readout_decay"] for one in results["report"]["candidates"]}) > 1
    call(*convert[:-1], str(tmp_path / "kept"), "--bias", "auto", "--keep-weights", "--plain-mean")
    results = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert not any(one["refit"] for one in results["report"]["candidates"])
    assert {one["readout_decay"] for one in results["report"]["candidates"]} == {1.0}


def test_early_exit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    call("train", "digits", "--model", "mlp", "--epochs", "1", "--hold-out", "200", "--out", out)
    call("evaluate", out, "--early-exit", "--max-loss", "0.01", "--out", str(tmp_path / "e.json"))
    printed = " ".join(capsys.readouterr().out.split())
    exits = json.loads((tmp_path / "e.json").read_text())["early_exit"]
    assert exits["max_loss"] == 0.01
    assert f"mean {exits['testing']['mean_steps']:.2f}" in printed
    assert f"{100 * exits['testing']['accuracy']:.2f}" in printed
    assert "chosen on 200 training images that were held out" in printed
    call("evaluate", out)
    assert "Early exit" not in capsys.readouterr().out
    for loss, message in (("-0.1", "must be a share from 0 to 1"), ("5", "half a point is max_loss=0.005")):
        with pytest.raises(SystemExit):
            call("evaluate", out, "--early-exit", "--max-loss", loss)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("evaluate", out, "--max-loss", "0.01")
    assert "belongs to early exit" in capsys.readouterr().err


def test_early_exit_is_drawn_beside_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    call("train", "digits", "--model", "mlp", "--epochs", "1", "--out", out)
    call("evaluate", out, "--out", str(tmp_path / "plain.json"))
    for name in ("exits.json", "exits"):
        call("evaluate", out, "--early-exit", "--out", str(tmp_path / name))
        assert "early_exit" in json.loads((tmp_path / name).read_text())
        with Image.open(tmp_path / "exits.png") as picture:
            assert min(picture.size) > 300
        (tmp_path / "exits.png").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits", "exits.json", "plain.json", "run"]


def test_a_crowded_machine_is_named_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(provenance, "is_crowded", lambda: True)
    with pytest.raises(SystemExit):
        call("evaluate", "nowhere")
    assert "OMP_WAIT_POLICY" in capsys.readouterr().err
    call("info")
    assert "OMP_WAIT_POLICY" not in capsys.readouterr().err


def test_methods_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--model", "mlp", "--epochs", "1", "--train-images", "200", "--out", str(tmp_path / "out")]
    rows = ["--methods", "direct", "convert", "--neurons", "lif", "--steps", "1", "2"]
    call("compare", "digits", *rows, *settings)
    printed = capsys.readouterr()
    assert "LIF, cross-entropy" in printed.out
    assert "(2 of 2)" in printed.err
    call("compare", "digits", *rows, *settings, "--resume")
    assert "of 2)" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("compare", "digit", *settings)
    assert "recipe is 'digit', but must be one of 'digits'" in capsys.readouterr().err


def test_a_converted_network_is_trained_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call("train-ann", "digits", "--model", "mlp", "--epochs", "1", "--hold-out", "100", "--out", "ann")
    convert = ["convert", "ann", "--steps", "2", "--images", "100", "--rounds", "1", "--out"]
    fine = ["--steps", "2", "--epochs", "1", "--implementation", "reference"]
    call(*convert, "nets/one")
    call(*convert, "nets/two")
    assert "held-out % T=1" in capsys.readouterr().err
    call("finetune", "nets/one", *fine)
    assert "test % T=1" in capsys.readouterr().err
    call("finetune", "--start", "nets/two/model.safetensors", *fine, "--hold-out", "100")
    assert "held-out % T=1" in capsys.readouterr().err
    assert {path.name for path in Path("runs").iterdir()} == {"one-etc-T2-seed0", "two-etc-T2-seed0"}
    for arguments, message in (
        (["nets/one", "--start", "nets/two"], "given twice"),
        ([], "nothing to start from"),
        (["nets/one", "--hold-out", "50"], "--hold-out 50"),
        (["nets/one", "--steps", "3"], "--steps 3"),
    ):
        with pytest.raises(SystemExit):
            call("finetune", *arguments[:1], *fine, *arguments[1:], "--out", "refused")
        assert message in capsys.readouterr().err
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("command", "called", "resumable"),
    [
        (["train", "digits"], "run", True),
        (["train-ann", "digits"], "run", True),
        (["finetune", "a"], "run", True),
        (["compare", "digits"], "compare", True),
        (["convert", "a"], "convert", False),
        (["export", "train"], "export", False),
        (["evaluate", "finetune"], "evaluate", False),
        (["demo"], "demo", False),
    ],
)
def test_stopping_names_resume_only_where_there_is_one(
    command: list[str],
    called: str,
    resumable: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, called, stop)
    for given in (command, None):  # as a script is called
        monkeypatch.setattr("sys.argv", ["ranvier", *command])
        with pytest.raises(SystemExit) as exit_:
            main(given)
        assert exit_.value.code == 130
        printed = capsys.readouterr().err
        assert printed.startswith("stopped")
        assert ("--resume" in printed) is resumable


def test_info_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    call("info")
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "cpu: " in printed


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ASKED_FOR_LARGE_PAGES = """
import re
import torch
from ranvier.cli import main
main(["info"])
tensor = torch.ones(10 * 2**20)
for line in open("/proc/self/smaps"):
    if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        here = int(found[1], 16) <= tensor.data_ptr() + tensor.nbytes // 2 < int(found[2], 16)
    elif here and line.startswith("VmFlags"):
        print("asked:", "hg" in line.split())
"""


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="needs Linux with transparent huge pages")
@pytest.mark.parametrize(("users", "asked"), [(None, True), ("0", False)])
def test_memory_comes_in_large_pages_unless_the_user_says_otherwise(users: str | None, asked: bool) -> None:
    """torch looks at the variable when it makes its first tensor: none may be made where modules are imported."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if users is None else {"THP_MEM_ALLOC_ENABLE": users}
    run = [sys.executable, "-c", ASKED_FOR_LARGE_PAGES]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"asked: {asked}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere.safetensors"], "does not exist"),
        (["train", "digits", "--data", "./nowhere"], "nowhere"),
        (["train", "digits", "--epochs", "1", "--batch-size", "5000"], "batch_size"),
    ],
)
def test_errors_are_one_message_without_a_traceback(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        call(*arguments)
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--epochz", "3"], "epochz"),
        (["train", "digits", "--steps", "1"], "--steps 2 or more"),
        (["train", "digits", "--method", "ect"], "etc"),
        (["train", "mnist"], "digits"),
        (["train-ann", "digits", "--neuron", "lif"], "neuron"),
        (["train-ann", "digits", "--steps", "4"], "steps"),
        (["train-ann", "digits", "--model", "spikformer"], "conv4"),
        (["train-ann", "digits", "--activation", "gelu"], "qcfs"),
        (["nonsense"], "train"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        call(*arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["train", "fashion-mnist"],
        ["train-ann"],
        ["train-ann", "cifar10-full"],
        ["finetune"],
        ["evaluate"],
        ["demo"],
        ["info"],
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        call(*command, "--help")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: ranvier" in shown
    examples = [line.strip() for line in (COMMANDS[command[0]].__doc__ or "").splitlines()] if command else []
    examples = [line for line in examples if line.startswith("ranvier ")]
    if len(command) == 1:
        assert all(f"  {line}\n" in shown for line in examples)
        assert examples or command[0] in ("demo", "info")


def test_a_second_run_needs_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "digits", "--model", "mlp", "--epochs", "1", "--out", str(tmp_path / "run")]
    call(*train)
    with pytest.raises(SystemExit):
        call(*train)
    assert "--resume" in capsys.readouterr().err
    call(*train, "--resume")
    with pytest.raises(SystemExit):
        call(*train, "--resume", "--lr", "0.5")
    assert "optimization.lr: 0.002 -> 0.5" in capsys.readouterr().err
