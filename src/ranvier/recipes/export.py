"""Networks on disk as files for other tools."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ranvier.checks import check_choice
from ranvier.export import NIRReceipt, Receipt, to_nir, to_onnx, to_program
from ranvier.recipes.evaluate import spiking_network
from ranvier.recipes.recipe import EventRecipe
from ranvier.recipes.trained import Trained, sample

Format = Literal["nir", "onnx", "torch"]
ENDINGS: dict[str, str] = {"nir": ".nir", "onnx": ".onnx", "torch": ".pt2"}


def export(
    path: str | Path,
    out: str | Path | None = None,
    *,
    format: Format = "nir",
    source: str | None = None,
    steps: int | None = None,
    dt: float = 1e-3,
    strict: bool = False,
    streaming: bool = False,
    images: int = 100,
) -> NIRReceipt | Receipt:
    """Write a network on disk to a file for other tools, with a receipt beside it, `FILE.receipt.json`.

    Args:
        path: Folder of a run, or a file of it.
        out: The file; None for one beside the network, `model.nir`, `model.onnx` or `model.pt2`.
        format: `nir` for neuromorphic tools, `onnx` for ONNX runtimes, `torch` for torch.export.
        source: Data set to compare on instead of the one it was trained on.
        steps: T of the comparison, and of ONNX and torch files; None for that of training.
        dt: Seconds of a step (nir).
        strict: Refuse what NIR cannot say instead of writing it as metadata (nir).
        streaming: Write a single step with explicit state (onnx, torch).
        images: How many test images to compare on.

    Raises:
        ConversionError: A part of the network that the format cannot say; it is named.
        OSError: The file cannot be written; an older one is untouched.
        ValueError: The network is an ANN or has biases for fewer steps, or options that do not belong to the format.
    """
    check_choice("format", format, tuple(ENDINGS))
    if format != "nir" and strict:
        raise ValueError(f"strict belongs to NIR, but the format is {format}. Leave it out.")
    if format == "nir" and streaming:
        raise ValueError("streaming belongs to onnx and torch: a NIR graph is one step by nature. Leave it out.")
    trained = spiking_network(path)
    steps = trained.steps if steps is None else steps
    trained.check_steps(steps)
    path = Path(path)
    if out is None:
        folder = path if path.is_dir() else path.parent
        out = folder / f"model{ENDINGS[format]}"
    compared = _images(trained, source, images, steps)
    if format != "nir" and isinstance(trained.recipe, EventRecipe):
        if not streaming:
            raise ValueError(
                f"the network takes a sequence of frames, but {format} files of all steps at once take a constant "
                "image. Pass --streaming: the file then takes the frames one by one, with explicit state."
            )
        compared = compared[0]
    receipt: NIRReceipt | Receipt
    if format == "nir":
        receipt = to_nir(trained.model, out, dt=dt, images=compared, steps=steps, strict=strict)
    else:
        write = to_onnx if format == "onnx" else to_program
        receipt = write(trained.model, out, images=compared, steps=steps, streaming=streaming)
    receipt.save(f"{out}.receipt.json")
    return receipt


def _images(trained: Trained, source: str | None, count: int, steps: int) -> Tensor:
    """Test images, prepared as the network expects them."""
    batches = sample(trained.batches(source, steps=steps).images, trained.form, "cpu", steps, count)
    # Sequences are time-first, [T, B, ...].
    return torch.cat([images for images, _ in batches], dim=1 if isinstance(trained.recipe, EventRecipe) else 0)
