"""Writes docs/neurons.md from the docstrings of the code: `python docs/neurons.py`. A test holds the page to them."""

import inspect
import re
from pathlib import Path

from ranvier import dynamics

PAGE = Path(__file__).with_suffix(".md")
NEURONS = {
    "IF": "if_scan",
    "LIF": "lif_scan",
    "PLIF": "plif_scan",
    "LIFB": "lifb_scan",
    "LIFPair": "lif_pair_scan",
    "AffineIF": "affine_scan",
}
CONVERSION = {"QCFS": "qcfs", "ConvertedIF": "converted_scan"}
SURROGATES = ("Triangle", "ATan", "Sigmoid", "Rectangle")

INTRODUCTION = """\
# Neurons and surrogates

Written by `python docs/neurons.py` from the docstrings of `ranvier.dynamics`, which is where the equations are
computed. Everything faster is tested against them.

Shared by all that are trained: time-first input `[T, B, ...]`; a start from rest unless a state is passed; a tie
(`h = v_threshold`) fires; the potential is kept in float32 or better; the reset is not differentiated unless
`detach_reset=False`. The gradient of a spike is the derivative of a surrogate, by default a triangle of half-width 0.5.
"""


def equations(docstring: str) -> str:
    """First indented block of a docstring."""
    block = re.search(r"\n\n((?:    .*\n|\n)+?)\n*(?=\S)", inspect.cleandoc(docstring) + "\n")
    assert block is not None
    return inspect.cleandoc(block[1]).rstrip()


def section(name: str, docstring: str, remark: str = "") -> str:
    """One heading with what it is, its equations and where they come from."""
    text = inspect.cleandoc(docstring)
    source = re.search(r"^Source: (.*?)(?:\n\n|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    parts = [f"### {name}", text.splitlines()[0], f"```\n{equations(docstring)}\n```"]
    if remark:
        parts.append(remark)
    if source:
        parts.append("Source: " + " ".join(source[1].split()))
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    learned = {"PLIF": "Learned: `decay`, one per layer.", "LIFB": "Learned: `strength`, one per channel."}
    neurons = [
        section(f"`rv.nn.{name}`", getattr(dynamics, scan).__doc__, learned.get(name, ""))
        for name, scan in NEURONS.items()
    ]
    remarks = {
        "QCFS": "An activation of ANNs, without time. Learned: `ceiling`, one per layer.",
        "ConvertedIF": "Found by `ranvier.conversion`: `threshold`, `bias` and `v_init`; no gradient passes through a "
        "spike. After `make_trainable` (`ranvier finetune`) they are parameters, and spikes have the gradient of a "
        "surrogate. It starts from `v_init`, not from rest; a tie fires.",
    }
    conversion = [
        section(f"`rv.nn.{name}`", getattr(dynamics, function).__doc__, remarks[name])
        for name, function in CONVERSION.items()
    ]
    surrogates = [section(f"`rv.dynamics.{name}`", getattr(dynamics, name).__doc__) for name in SURROGATES]
    parts = [INTRODUCTION.rstrip(), "## Neurons", *neurons, "## Conversion", *conversion, "## Surrogates", *surrogates]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
