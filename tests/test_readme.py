"""What the README tells a reader to type works."""

import re
import shlex
from pathlib import Path

import pytest

from ranvier.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run() -> None:
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)  # one after the other, as a reader would


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line.strip()])
def test_commands_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    assert words[0] == "ranvier"
    assert words[1] in COMMANDS
    with pytest.raises(SystemExit) as exit_:  # flags are read before --help is obeyed
        main([*words[1:], "--help"])
    assert exit_.value.code == 0


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
