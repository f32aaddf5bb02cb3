import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ranvier import models
from ranvier.training import Optimization, Progress, load_checkpoint, read_progress, save_checkpoint
from ranvier.weights import load_tensors, save, save_tensors


def make(seed: int = 0, width: int = 6) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = models.mlp([4, width, 3])
    optimizer = Optimization().build(model)
    model(torch.rand(5, 4), steps=2).sum().backward()
    optimizer.step()
    return model, optimizer


def flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entries in state.items() for name, value in entries.items()}


def test_round_trip_restores_everything(tmp_path: Path) -> None:
    model, optimizer = make(0)
    progress = Progress(epoch=2, batch=3, step=11, seconds=1.5, history=[{"epoch": 1, "loss": 0.1}])
    torch.manual_seed(5)
    random.seed(5)
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, progress, {"lr": 0.1})
    expected = torch.rand(3), random.random()

    other, other_optimizer = make(1)
    restored = load_checkpoint(tmp_path / "c.safetensors", other, other_optimizer, {"lr": 0.1})
    assert restored == progress == read_progress(tmp_path / "c.safetensors")
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert flat(optimizer).keys() == flat(other_optimizer).keys()
    for name, value in flat(optimizer).items():
        assert torch.equal(flat(other_optimizer)[name], value)
    before, after = optimizer.state_dict()["param_groups"], other_optimizer.state_dict()["param_groups"]
    assert json.dumps(before) == json.dumps(after)


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    model, optimizer = make()
    save_checkpoint(tmp_path / "c", model, optimizer, Progress(), {"recipe": {"lr": 0.1, "steps": 4}})
    with pytest.raises(ValueError, match=r"recipe.lr: 0.1 -> 0.2.*--out"):
        load_checkpoint(tmp_path / "c", model, optimizer, {"recipe": {"lr": 0.2, "steps": 4}})


def test_settings_of_nested_tuples_are_the_same_run(tmp_path: Path) -> None:
    """As the path of a simulated camera: the file has lists of lists for them."""
    run = {"saccades": {"path": ((0.0, 0.5), (0.5, -0.5))}, "betas": (0.9, 0.99)}
    save_checkpoint(tmp_path / "c.safetensors", *make(0), Progress(step=3), run)
    assert load_checkpoint(tmp_path / "c.safetensors", *make(1), run).step == 3
    other = {**run, "saccades": {"path": ((0.0, 0.5), (0.5, 0.5))}}
    with pytest.raises(ValueError, match=r"differs in saccades.path: .*-0.5.* -> "):
        load_checkpoint(tmp_path / "c.safetensors", *make(1), other)


def test_another_model_is_refused_and_keys_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", *make(width=6), Progress(), {})
    with pytest.raises(ValueError, match=r"belong to another model.*\[6, 4\] instead of \[7, 4\]"):
        load_checkpoint(tmp_path / "c", *make(width=7), {})


def test_weights_are_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make()
    save(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no training state"):
        load_checkpoint(tmp_path / "model.safetensors", model, optimizer, {})


def test_truncated_file(tmp_path: Path) -> None:
    model, optimizer = make()
    path = tmp_path / "c"
    save_checkpoint(path, model, optimizer, Progress(), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_checkpoint(path, model, optimizer, {})


@pytest.mark.parametrize("change", [{"format": 99}, {"progress": {"epoch": 1}}])
def test_other_versions_are_refused(tmp_path: Path, change: dict) -> None:
    model, optimizer = make()
    save_checkpoint(tmp_path / "c", model, optimizer, Progress(), {})
    tensors, card = load_tensors(tmp_path / "c")
    save_tensors(tmp_path / "c", tensors, card | change)
    with pytest.raises(ValueError, match="version"):
        load_checkpoint(tmp_path / "c", model, optimizer, {})


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    path = tmp_path / "c"
    save_checkpoint(path, model, optimizer, Progress(step=1), {})
    before = path.read_bytes()

    def full(*arguments: object, **keywords: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ranvier.weights.save_file", full)
    with pytest.raises(OSError, match="untouched"):
        save_checkpoint(path, model, optimizer, Progress(step=2), {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c"]
