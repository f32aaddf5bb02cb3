"""Weights on disk: a broken, foreign or unfitting file is named, and a failed save keeps the old one."""

import errno
import json
import os
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ranvier
from ranvier import weights
from ranvier.nn import LIFB, BatchNorm


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    built = nn.Sequential(nn.Conv2d(2, 4, 3), BatchNorm(4), LIFB(4))
    built[1].running_mean.uniform_()
    with torch.no_grad():
        built[2].strength.uniform_()
    return built


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.safetensors"
    card = {"accuracy": [0.5, 0.75], "steps": 4, "note": "ö", "nested": {"a": None}}
    saved, fresh = model(0), model(1)
    weights.save(saved, path, card)
    assert weights.load(fresh, path) == card
    assert saved.state_dict().keys() == fresh.state_dict().keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


def test_tensors_keep_dtype_shape_and_values(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tensors = {
        "half": torch.randn(2, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": shared.T,
        "expanded": torch.ones(1, 3).expand(2, 3),
        "shared": shared,
        "trains": torch.ones(2, requires_grad=True),
    }
    weights.save_tensors(tmp_path / "a.safetensors", tensors, {})
    loaded, card = weights.load_tensors(tmp_path / "a.safetensors")
    assert card == {}
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
        assert not loaded[name].requires_grad


def test_missing_file(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.safetensors", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))} {what}"):
            weights.load(model(), path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(model(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a complete safetensors file .*truncated"):
        weights.load(model(), path)


@pytest.mark.parametrize("content", [b"not a safetensors file, but longer than a header", b"\x80\x04\x95" + bytes(40)])
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a complete safetensors file"):
        weights.load(model(), path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(ValueError, match=r"carries no ranvier card.*load_parameters"):
        weights.load_tensors(path)
    assert torch.equal(weights.load_foreign_tensors(path)["weight"], torch.zeros(2))


def test_foreign_tensors_are_also_ours(tmp_path: Path) -> None:
    weights.save(model(), tmp_path / "a.safetensors")
    assert weights.load_foreign_tensors(tmp_path / "a.safetensors").keys() == model().state_dict().keys()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.load_foreign_tensors(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        weights.load_foreign_tensors(tmp_path / "c.safetensors")


def test_wrong_keys_and_shapes_are_named() -> None:
    fresh = model()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    tensors = dict(before)
    del tensors["1.running_var"]
    tensors["head.weight"] = torch.zeros(3)
    tensors["2.strength"] = torch.zeros(8)
    with pytest.raises(ValueError, match="belong to another model") as caught:
        weights.load_parameters(fresh, tensors, "model.safetensors")
    message = str(caught.value)
    assert message.startswith("model.safetensors belong to another model: of 7 tensors, ")
    assert "1 missing (1.running_var)" in message
    assert "1 unknown (head.weight)" in message
    assert "1 of another shape (2.strength [8] instead of [4])" in message
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_long_lists_of_keys_are_cut() -> None:
    with pytest.raises(ValueError, match=r"7 missing \(0\.bias, 0\.weight, 1\.bias, 1\.running_mean, \.\.\.\)"):
        weights.load_parameters(model(), {})


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(model(0), path, {"run": 1})
    content = path.read_bytes()

    def full(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(content[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*a\.safetensors .*No space left") as caught:
        weights.save(model(1), path, {"run": 2})
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_really_fails_keeps_the_old_file(tmp_path: Path) -> None:
    """With a limit on file sizes the writer itself fails, in its own way, as on a full disk."""
    path = tmp_path / "a.safetensors"
    weights.save(model(0), path, {"run": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match=r"could not write .*a\.safetensors"):
            weights.save(nn.Linear(512, 512), path, {"run": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights.load(model(1), path) == {"run": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_card_that_json_cannot_say_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(model(), path, {"run": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        weights.save(model(), path, {"run": object()})
    assert weights.load(model(), path) == {"run": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_card_is_readable_without_ranvier(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(model(), path, {"steps": 4})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["ranvier"]) == {"steps": 4}


def test_nothing_is_unpickled() -> None:
    """Loading a pickle runs whatever code its author chose."""
    pattern = re.compile(r"\b(pickle|dill|joblib|cloudpickle)\b|\btorch\.(load|save)\(|allow_pickle\s*=\s*True")
    sources = sorted(Path(ranvier.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
