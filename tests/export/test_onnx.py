import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ranvier
from ranvier.export import ExportError, Receipt, to_onnx
from ranvier.export import onnx as exporter

from .networks import STEPS, build

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Exporting takes seconds: each family once, those with most to go wrong in both forms.
FILES = {
    "mlp-lifb": {"all": STEPS, "stream": STEPS},
    "mlp-affine": {"stream": STEPS},
    "vgg": {"all": STEPS},
    "converted": {"all": STEPS},
    "converted-signed": {"stream": STEPS},
    "spikformer": {"stream": 2},
    "resnet20": {"stream": 2},
    "dense": {"all": 2, "stream": 2},
    "sew-resnet18": {"stream": 2},
}
CASES = [(name, form == "stream", steps) for name, forms in FILES.items() for form, steps in forms.items()]


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports made so far, by family and form."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, bool], Receipt] = {}

    def get(name: str, streaming: bool, steps: int = STEPS) -> Receipt:
        if (name, streaming) not in made:
            model, images = build(name)
            path = folder / f"{name}-{streaming}.onnx"
            made[name, streaming] = to_onnx(
                model, path, images=images, steps=steps, streaming=streaming, class_names=["ant", "bee", "cat"]
            )
        return made[name, streaming]

    return get


def run(receipt: Receipt, frames: list[Tensor]) -> Tensor:
    """Logits `[T, B, K]` from ONNX Runtime, by what the file says of its inputs alone."""
    session = onnxruntime.InferenceSession(receipt.path, providers=["CPUExecutionProvider"])
    if not receipt.streaming:
        return torch.from_numpy(session.run(["logits"], {"images": frames[0].numpy()})[0])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    _, *states = session.get_inputs()
    sizes = [[len(frames[0]) if size == "batch" else size for size in state.shape] for state in states]
    carried = [np.zeros(size, kinds[state.type]) for size, state in zip(sizes, states, strict=True)]
    logits = []
    for frame in frames:
        feed = dict(zip([state.name for state in states], carried, strict=True))
        now, *carried = session.run(None, {"images": frame.numpy(), **feed})
        logits.append(torch.from_numpy(now))
    return torch.stack(logits)


@pytest.mark.parametrize(("name", "streaming", "steps"), CASES)
def test_onnx_runtime_computes_the_same(name: str, streaming: bool, steps: int, exported: Any) -> None:
    """No spike flips with these seeds, so that logits agree to rounding, here at a batch size of its own."""
    receipt = exported(name, streaming, steps)
    assert receipt.checked_with == f"onnxruntime {onnxruntime.__version__}"
    assert receipt.batch_sizes == (8, 1)
    assert receipt.flipped == 0
    assert receipt.agreement == 1
    model, _ = build(name)
    _, images = build(name, batch=5)
    expected = model(images, steps)
    assert expected.std() > 100 * receipt.tolerance
    torch.testing.assert_close(run(receipt, [images] * steps), expected, rtol=0, atol=receipt.tolerance)


def test_a_stream_takes_images_of_each_step(exported: Any) -> None:
    receipt = exported("converted-signed", True)
    model, _ = build("converted-signed")
    frames = torch.rand(STEPS, 4, 1, 8, 8)
    torch.testing.assert_close(run(receipt, list(frames)), model(frames), rtol=0, atol=receipt.tolerance)


def test_a_stream_ends_where_its_biases_do(exported: Any) -> None:
    receipt = exported("converted-signed", True)
    with pytest.raises(Exception, match="out of data bounds"):
        run(receipt, [torch.rand(1, 1, 8, 8)] * (STEPS + 1))


def test_what_the_file_says(exported: Any) -> None:
    receipt = exported("mlp-lifb", True)
    proto = onnx.load(receipt.path)
    onnx.checker.check_model(proto, full_check=True)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {port.name: list(port.shape) for port in (*receipt.inputs, *receipt.outputs)}
    assert list(shapes) == ["images", "state_0", "state_1", "logits", "next_state_0", "next_state_1"]
    assert shapes["images"] == ["batch", 3, 2, 2]
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata.pop("ranvier.commit") == (ranvier.provenance.commit() or "")
    assert json.loads(metadata.pop("ranvier.state")) == {
        "state_0": "potentials of body.layers.0",
        "state_1": "potentials of body.layers.2",
    }
    assert metadata == {
        "ranvier.version": ranvier.provenance.versions()["ranvier"],
        "ranvier.torch": torch.__version__,
        "ranvier.steps": str(STEPS),
        "ranvier.streaming": "true",
        "ranvier.layout": "[B, K]",
        "ranvier.class_names": '["ant", "bee", "cat"]',
    }
    assert {entry.domain for entry in proto.opset_import} == {""}, "standard operators only"
    assert receipt.opset == proto.opset_import[0].version >= 18


def test_layout_of_all_steps(exported: Any) -> None:
    proto = onnx.load(exported("mlp-lifb", False).path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert (metadata["ranvier.layout"], metadata["ranvier.streaming"]) == ("[T, B, K]", "false")
    assert exported("mlp-lifb", False).outputs[0].shape == (STEPS, "batch", 3)


def test_weights_are_inside_and_nothing_private_is(exported: Any) -> None:
    receipt = exported("vgg", False)
    content = Path(receipt.path).read_bytes()
    assert len(content) == receipt.bytes
    model, _ = build("vgg")
    assert model.readout[1].weight.numpy().tobytes() in content
    assert not list(Path(receipt.path).parent.glob("*.data"))
    for private in (ranvier.__file__, torch.__file__, str(Path.home())):
        assert str(Path(private).parent).encode() not in content or Path(private).parent == Path("/")
    assert b"stack_trace" not in content


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither warnings (errors in these tests) nor log lines of the exporter."""
    model, images = build("mlp-lif")
    receipt = to_onnx(model, tmp_path / "net.onnx", images=images, steps=1, opset=21)
    assert receipt.opset == 21
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_fixed_batch(tmp_path: Path) -> None:
    model, images = build("ann")
    receipt = to_onnx(model, tmp_path / "net.onnx", images=images[:4], steps=2, dynamic_batch=False)
    assert receipt.inputs[0].shape == (4, 12)
    assert receipt.batch_sizes == (4,)
    assert receipt.outputs[0].shape == (2, 4, 3)
    torch.testing.assert_close(run(receipt, [images[:4]]), model(images[:4], 2), rtol=0, atol=receipt.tolerance)


def test_without_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert importlib.util.find_spec("onnxruntime") is None
    model, images = build("mlp-lif")
    receipt = to_onnx(model, tmp_path / "net.onnx", images=images, steps=2, streaming=True)
    assert receipt.checked_with == f"onnx.reference {onnx.__version__}, because onnxruntime is not installed"
    assert receipt.flipped == 0
    assert receipt.difference < receipt.tolerance


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    model, images = build("mlp-lif")
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript .*pip install 'ranvier\[export\]'"):
        to_onnx(model, tmp_path / "net.onnx", images=images, steps=1)
    assert list(tmp_path.iterdir()) == []


def test_opsets_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    model, images = build("mlp-lif")
    with pytest.raises(ValueError, match=r"opset is 7, but the exporter of torch .* could only write 18"):
        to_onnx(model, tmp_path / "net.onnx", images=images, steps=1, opset=7)
    assert list(tmp_path.iterdir()) == []


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LARGEST", 1000)
    model, images = build("mlp-lif")
    with pytest.raises(ValueError, match=r"bytes of weights, but an ONNX file holds 1,000. Use to_program"):
        to_onnx(model, tmp_path / "net.onnx", images=images, steps=1)


def test_paths(tmp_path: Path) -> None:
    model, images = build("mlp-lif")
    with pytest.raises(ValueError, match=r"net.pt2, but must end in .onnx"):
        to_onnx(model, tmp_path / "net.pt2", images=images, steps=1)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not write .*net.onnx"):
        to_onnx(model, tmp_path / "file" / "net.onnx", images=images, steps=1)


def test_bad_input_is_told_before_anything_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "capture_network", None)
    model, _ = build("mlp-lif")
    for wrong, error in ((torch.rand(3, 8, 12), ValueError), (torch.rand(8, 11), ValueError), (None, TypeError)):
        with pytest.raises(error, match="images"):
            to_onnx(model, tmp_path / "net.onnx", images=wrong, steps=1)
    with pytest.raises(TypeError, match="model is a Linear"):
        to_onnx(torch.nn.Linear(12, 3), tmp_path / "net.onnx", images=torch.rand(8, 12), steps=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie that fires no more: `>=` written as `>`."""
    model, images = build("ann")
    model = ranvier.models.mlp([4, 4, 3], neuron=ranvier.nn.IF)
    model.encoder[1].weight.copy_(torch.eye(4))
    images = torch.full((8, 4), 0.5)
    translate = exporter._translate

    def broken(*arguments: Any) -> Any:
        proto = translate(*arguments)
        for node in proto.graph.node:
            if node.op_type == "GreaterOrEqual":
                node.op_type = "Greater"
        return proto

    old = tmp_path / "net.onnx"
    old.write_text("old")
    monkeypatch.setattr(exporter, "_translate", broken)
    with pytest.raises(ExportError, match="in 9 of 9 samples by more than rounding"):
        to_onnx(model, old, images=images, steps=1)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/export.md shows, in order."""
    page = Path(__file__).parents[2] / "docs" / "export.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    with torch.no_grad():
        logits = names["model"](names["images"], 4)
    assert np.array_equal(names["answers"], logits.mean(0).argmax(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2", "step.onnx"]
