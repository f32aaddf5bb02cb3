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


@pytest.mark.parametrize("folder", sorted(DOCS.glob("results/networks/*/")), ids=lambda folder: folder.name)
def test_networks_of_the_results_are_those_of_their_runs(folder: Path) -> None:
    import json

    import torch

    from ranvier.recipes import load_trained

    trained = load_trained(folder)
    result = json.loads((folder / "results.json").read_text())
    assert trained.card["result"] == result
    assert "/" not in result["recipe"]["data"].replace("uoft-cs/", ""), "a path of somebody's machine"
    images = torch.zeros(2, trained.form.channels, trained.form.image_size, trained.form.image_size)
    with torch.no_grad():
        logits = trained.model.eval()(images, 1)
    assert logits.shape == (1, 2, len(trained.form.classes))
    assert torch.equal(logits[0, 0], logits[0, 1])
    assert logits.isfinite().all()
