import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_neurons_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("neurons_page", DOCS / "neurons.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run: python docs/neurons.py"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_commands_in_the_docs_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re
    import shlex

    from ranvier.cli import main

    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "ranvier" not in words:
                continue
            with pytest.raises(SystemExit) as exit_:
                main([*words[words.index("ranvier") + 1 :], "--help"])
            assert exit_.value.code == 0, line
