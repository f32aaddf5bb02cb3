"""Networks on the hub. The hub is a server of this file's own, spoken to by the real client of `huggingface_hub`."""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
import types
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ranvier.conversion import Settings
from ranvier.recipes import (
    FinetuneRecipe,
    convert,
    digits,
    digits_ann,
    evaluate,
    from_pretrained,
    load_trained,
    push_to_hub,
    run,
    simulated_digits_dvs,
)
from ranvier.recipes.hub import BEGIN, END, _is_local, _merged
from ranvier.weights import load_tensors, save_tensors

QUICK = {"model": "mlp", "epochs": 1, "hidden": (16,), "device": "cpu"}
REPO = "someone/digits-snn"
PUBLISHED = {"model.safetensors", "config.json", "README.md"}
PLAIN = {
    "data_set", "steps", "accuracy_by_step", "neuron", "reset", "v_threshold", "layout", "commit", "seed", "versions",
}  # fmt: skip


class Hub:
    """Repositories in memory, and what was asked of them."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # id -> branch -> file -> content
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.commits: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.writer = "may-write"
        self.cuts: list[int] = []  # where the next downloads break off
        self.broken: set[str] = set()  # files that the server fails to give
        self.damage = False
        self.down = False
        self.url = ""

    def put(self, name: str, content: bytes, repo: str = REPO, branch: str = "main") -> None:
        self.repos.setdefault(repo, {}).setdefault(branch, {})[name] = content

    def get(self, name: str, repo: str = REPO, branch: str = "main") -> bytes:
        return self.repos[repo][branch][name]


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's interface that uploads and downloads use. Weights come from another host, as there."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.down:
            self.answer(503)
        elif match := re.fullmatch(r"/cdn/(\w+)", path):
            assert not self.token, "the token went to another host"
            self.send_file(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            if match[1] in hub.repos:
                self.json({"id": match[1], "private": match[1] in hub.private, "sha": "0" * 40, "siblings": []})
            else:
                self.refuse(404, "RepoNotFound")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        else:
            raise AssertionError(path)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        if self.token == "expired":
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif name in hub.broken:
            self.answer(500)
        elif self.token == "blocked":
            self.answer(403, X_Error_Message="not from here")
        elif repo not in hub.repos or (repo in hub.private and self.token != hub.writer):
            self.refuse(401, "RepoNotFound")
        elif repo in hub.gated and self.token != hub.writer:
            self.refuse(403, "GatedRepo")
        elif revision not in hub.repos[repo]:
            self.refuse(404, "RevisionNotFound")
        elif name not in hub.repos[repo][revision]:
            self.refuse(404, "EntryNotFound")
        else:
            content = hub.repos[repo][revision][name]
            commit = hashlib.sha1(b"".join(hub.repos[repo][revision].values())).hexdigest()
            if name.endswith(".safetensors"):
                sha = hashlib.sha256(content).hexdigest()
                place = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha}"
                size = str(len(content))
                self.answer(302, Location=place, X_Repo_Commit=commit, X_Linked_Etag=f'"{sha}"', X_Linked_Size=size)
            else:
                self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def send_file(self, sha: str) -> None:
        hub = self.hub
        files = (file for repo in hub.repos.values() for branch in repo.values() for file in branch.values())
        content = next(file for file in files if hashlib.sha256(file).hexdigest() == sha)
        if hub.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            hub.requests.append(f"from byte {start}")
        self.end_headers()
        cut = hub.cuts.pop() if hub.cuts else None
        self.wfile.write(content[start:cut])
        self.close_connection = cut is not None

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"POST {path}")
        if hub.down:
            self.answer(500)
        elif path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.json({"errors": [], "warnings": []})
        elif self.token != hub.writer:
            self.answer(403, X_Error_Message="you do not have the required permissions")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo not in hub.repos and wanted.get("visibility") == "private":
                hub.private.add(repo)
            status = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, {"main": {}})
            self.json({"url": f"{hub.url}/{repo}"}, status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path):
            repo, action, branch = match.groups()
            getattr(self, action)(repo, branch, body)
        else:
            raise AssertionError(path)

    def branch(self, repo: str, branch: str, body: bytes) -> None:
        branches = self.hub.repos[repo]
        status = 409 if branch in branches else 200
        branches.setdefault(branch, dict(branches["main"]))
        self.json({}, status)

    def preupload(self, repo: str, branch: str, body: bytes) -> None:
        files = json.loads(body)["files"]
        self.json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})

    def commit(self, repo: str, branch: str, body: bytes) -> None:
        header, *files = (json.loads(line) for line in body.splitlines())
        contents = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in files}
        self.hub.commits.append({"repo": repo, "branch": branch, "summary": header["value"]["summary"], **contents})
        self.hub.repos[repo][branch] |= contents
        self.json({"commitUrl": f"{self.hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of our own, with an empty cache and nobody logged in."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    without_waiting(monkeypatch)
    huggingface_hub.utils.disable_progress_bars()
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.utils.enable_progress_bars()


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits longer and longer between attempts."""
    import time

    at_once = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", at_once)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    run(digits(**QUICK, steps=3, reset="soft", v_threshold=0.75, seed=5), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ann") / "a"
    run(digits_ann(**QUICK), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def converted(ann: Path) -> Path:
    out = ann.parent / "snn"
    convert(str(ann), out, steps=2, images=200, settings=Settings(rounds=(1,), seed=7), quiet=True)
    return out


def push(path: Path, **options: Any) -> str:
    return push_to_hub(path, REPO, token="may-write", **options)


def logits(trained: Any) -> torch.Tensor:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return trained.model(images, steps=trained.steps)


# What is published


def test_a_run_is_one_commit(hub: Hub, folder: Path) -> None:
    assert push(folder) == f"{hub.url}/{REPO}"
    (commit,) = hub.commits
    assert commit.keys() == PUBLISHED | {"repo", "branch", "summary"}
    assert (commit["repo"], commit["branch"]) == (REPO, "main")
    assert commit["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    results = json.loads((folder / "results.json").read_text())
    final = f"{100 * results['accuracy_by_step'][-1]:.2f} %"
    assert commit["summary"] == f"mlp-etc-lif-T3 on digits, {final} at T = 3"


def test_config_of_a_run(hub: Hub, folder: Path) -> None:
    push(folder)
    config = json.loads(hub.get("config.json"))
    results = json.loads((folder / "results.json").read_text())
    assert config["card"] == load_tensors(folder / "model.safetensors")[1]
    expected = {
        "data_set": "digits", "data": "digits", "steps": 3, "neuron": "lif", "reset": "soft", "v_threshold": 0.75,
        "seed": 5, "evaluated_on": "test set", "kind": "trained", "network": "mlp", "method": "etc",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    for key in ("accuracy_by_step", "versions", "commit"):
        assert config[key] == results[key]
    assert config["layout"].startswith("[T, B, ...]")
    assert config.keys() >= PLAIN


def test_readme_of_a_run(hub: Hub, folder: Path) -> None:
    push(folder)
    text = hub.get("README.md").decode()
    for t, accuracy in enumerate(json.loads((folder / "results.json").read_text())["accuracy_by_step"], 1):
        assert f"\n| {t} | {100 * accuracy:.2f} % |\n" in text
    assert "\nlicense:" not in text
    assert "No licence is stated" in text
    for words in (
        "last epoch, not",
        "seed 5",
        "`lif` neurons, soft reset, threshold 0.75",
        "`[B, 1, 8, 8]`",
        "ranvier 0",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) < 200


def test_code_of_the_readme_runs(hub: Hub, folder: Path) -> None:
    push(folder)
    (code,) = re.findall(r"```python\n(.*?)```", hub.get("README.md").decode(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 3
    names: dict[str, Any] = {"images": torch.rand(4, 1, 8, 8)}
    exec(code, names)
    assert names["logits"].shape == (3, 4, 10)


def test_what_is_pushed_comes_back(hub: Hub, folder: Path) -> None:
    push(folder)
    trained = from_pretrained(REPO)
    assert torch.equal(logits(trained), logits(load_trained(folder)))
    assert trained.recipe == load_trained(folder).recipe
    assert not trained.model.training


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_converted_network(hub: Hub, converted: Path, whole_folder: bool) -> None:
    push(converted if whole_folder else converted / "model.safetensors")
    config = json.loads(hub.get("config.json"))
    results = json.loads((converted / "results.json").read_text())
    assert config.keys() >= PLAIN
    assert config["accuracy_by_step"] == results["accuracy_by_step"]
    assert (config["steps"], config["neuron"], config["reset"], config["seed"]) == (2, "if", "soft", 7)
    (name,) = config["v_threshold"]
    threshold = load_trained(converted).model.neurons[name].threshold
    assert config["v_threshold"][name] == [threshold.min().item(), threshold.max().item()]
    assert config["commit"] == results["commit"]
    text = hub.get("README.md").decode()
    assert "converted from an ANN (`mlp-qcfs8`)" in text
    assert "Measured on: 600 images of the test set; one run, seed 7." in text
    assert "spiking-neural-network" in text
    assert "negative spikes" not in text
    assert torch.equal(logits(from_pretrained(REPO)), logits(load_trained(converted)))


def test_a_converted_network_with_signed_spikes(hub: Hub, ann: Path, tmp_path: Path) -> None:
    convert(str(ann), tmp_path, steps=2, images=100, settings=Settings(rounds=(1,)), signed=True, quiet=True)
    push(tmp_path)
    assert "negative spikes" in hub.get("README.md").decode()
    assert hub.commits[0]["summary"].startswith("mlp-qcfs8-converted-T2 on digits, ")


def test_card_of_a_converted_network_is_complete(converted: Path) -> None:
    card = load_tensors(converted / "model.safetensors")[1]
    assert card.keys() >= {"steps", "neuron", "reset", "v_threshold", "layout", "commit", "seed", "versions"}
    assert len(card["result"]["accuracy_by_step"]) == card["steps"]
    assert card["recipe"]["name"] == "digits"


def test_a_converted_network_of_an_earlier_version(hub: Hub, converted: Path, tmp_path: Path) -> None:
    """Its card has neither seed nor commit, and versions in its report only."""
    tensors, card = load_tensors(converted / "model.safetensors")
    for key in ("neuron", "reset", "v_threshold", "layout", "seed", "versions", "commit"):
        del card[key]
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    push(tmp_path / "model.safetensors")
    config = json.loads(hub.get("config.json"))
    assert config.keys() >= PLAIN
    assert config["seed"] is None
    assert config["reset"] == "soft"
    assert config["versions"] == card["report"]["versions"]
    assert "seed not recorded" in hub.get("README.md").decode()


FINE = {"epochs": 1, "device": "cpu", "precision": "float32", "implementation": "reference"}


@pytest.mark.parametrize("method", ["etc", "proxy"])
def test_a_converted_network_that_was_trained_further(hub: Hub, converted: Path, tmp_path: Path, method: str) -> None:
    start = tmp_path / "secret-project" / "snn"
    shutil.copytree(converted, start)
    run(FinetuneRecipe(start=str(start), steps=2, seed=3).override(**FINE, method=method), tmp_path / "a", quiet=True)
    assert b"secret-project" in (tmp_path / "a" / "model.safetensors").read_bytes()
    push(tmp_path / "a")
    (commit,) = hub.commits
    assert not [name for name in PUBLISHED if b"secret-project" in commit[name]]
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    final = f"{100 * results['accuracy_by_step'][-1]:.2f} %"
    assert commit["summary"] == f"mlp-qcfs8-converted-{method}-T2 on digits, {final} at T = 2"
    config = json.loads(commit["config.json"])
    assert config.keys() >= PLAIN
    expected = {
        "kind": "converted", "method": method, "steps": 2, "neuron": "if", "reset": "soft", "seed": 3,
        "evaluated_on": "test set", "data": "digits", "commit": results["commit"], "versions": results["versions"],
        "accuracy_by_step": results["accuracy_by_step"],
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    (name,) = config["v_threshold"]
    threshold = load_trained(tmp_path / "a").model.neurons[name].threshold
    assert config["v_threshold"][name] == [threshold.min().item(), threshold.max().item()]
    text = commit["README.md"].decode()
    ann = json.loads((converted / "results.json").read_text())["ann_accuracy"]
    origin = f"an ANN (`mlp-qcfs8`) that has {100 * ann:.2f} % on 600 test images"
    assert f"converted from {origin}, then trained further with `{method}`. Integrate-and-fire" in text
    assert "Measured on: test set; one run, seed 3." in text
    assert "last epoch, not" in text
    assert "\n- spiking-neural-network\n" in text
    again = from_pretrained(REPO)
    assert again.recipe.start == ""
    assert torch.equal(logits(again), logits(load_trained(tmp_path / "a")))
    assert [hits / 600 for hits in evaluate(tmp_path / "a").accuracy.hits] == results["accuracy_by_step"]


def test_one_that_was_trained_further_by_an_earlier_version(hub: Hub, converted: Path, tmp_path: Path) -> None:
    """Its card does not say what it was made from."""
    run(FinetuneRecipe(start=str(converted), steps=2).override(**FINE), tmp_path / "a", quiet=True)
    tensors, card = load_tensors(tmp_path / "a" / "model.safetensors")
    for key in ("ann", "ann_accuracy", "ann_images", "held_out"):
        del card[key]
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    push(tmp_path / "model.safetensors")
    assert "converted from an ANN, then trained further with `etc`." in hub.get("README.md").decode()
    assert hub.commits[0]["summary"].startswith("ann-converted-etc-T2 on digits, ")


@pytest.mark.parametrize(
    ("settings", "neurons", "words"),
    [
        (
            {"neuron": "lifb", "v_threshold": 0.75},
            {
                "neuron": "if", "reset": "soft", "v_threshold": 1.0, "v_init": 0.5, "worth": "threshold",
                "readout": "membrane",
            },
            "`if` neurons, soft reset, threshold 1, initial potential 0.5 times the threshold and spikes worth their "
            "threshold; it answers with the current after the last layer. Trained by proxy learning (`improved`, "
            "target `cross_entropy`).",
        ),
        (
            {"variant": "published", "proxy_threshold": 0.25},
            {"neuron": "if", "reset": "hard", "v_threshold": 0.25, "v_init": 0.0, "worth": "one", "readout": "spikes"},
            "`if` neurons, hard reset, threshold 0.25, initial potential 0 times the threshold and spikes worth 1; it "
            "answers with the spikes of neurons after the last layer. Trained by proxy learning (`published`, target "
            "`counts`).",
        ),
    ],
    ids=["improved", "published"],
)  # fmt: skip
def test_a_network_of_proxy_learning_has_the_neurons_of_that(
    hub: Hub, tmp_path: Path, settings: dict[str, Any], neurons: dict[str, Any], words: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # neurons are set that are not used
        run(digits(**QUICK, **settings, method="proxy", steps=2), tmp_path, quiet=True)
    push(tmp_path)
    config = json.loads(hub.get("config.json"))
    assert {name: config[name] for name in neurons} == neurons
    assert config["method"] == "proxy"
    text = hub.get("README.md").decode()
    assert words in text
    assert "lif" not in text.lower().replace("license", "")
    assert "directly" not in text


def test_a_network_that_saw_simulated_recordings(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path / "cache"))
    run(simulated_digits_dvs(**QUICK, steps=3), tmp_path / "a", quiet=True)
    push(tmp_path / "a")
    config = json.loads(hub.get("config.json"))
    expected = {"simulated": True, "data_set": "simulated-digits-dvs", "neuron": "lif", "reset": "hard", "steps": 3}
    assert {key: config[key] for key in expected} == expected
    assert config.keys() >= PLAIN
    text = hub.get("README.md").decode()
    assert "for the classification of *simulated* recordings of an event camera in T = 3 steps: `mlp` with" in text
    assert "`frames` are `[T, B, 2, 16, 16]`, T = 3 frames of each recording" in text
    for word in ("bytes", "trained.form.normalization", "image classification", "images"):
        assert word not in text.replace("pipeline_tag: image-classification", "")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    frames, _ = next(iter(load_trained(tmp_path / "a").batches()))
    names: dict[str, Any] = {"frames": frames}
    exec(code, names)
    assert names["logits"].shape == (3, frames.shape[1], 10)


def test_a_network_that_saw_recordings(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real camera: only the card is looked at, so that of the simulated one is changed."""
    monkeypatch.setenv("RANVIER_CACHE", str(tmp_path / "cache"))
    run(simulated_digits_dvs(**QUICK, steps=2), tmp_path / "a", quiet=True)
    tensors, card = load_tensors(tmp_path / "a" / "model.safetensors")
    for recipe in (card["recipe"], card["result"]["recipe"]):
        del recipe["saccades"]
        recipe |= {"name": "nmnist", "data": str(tmp_path / "secret-project")}
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    push(tmp_path / "model.safetensors")
    assert not [name for name in PUBLISHED if b"secret-project" in hub.get(name)]
    assert json.loads(hub.get("config.json"))["simulated"] is False
    text = hub.get("README.md").decode()
    assert "for the classification of recordings of an event camera in T = 2 steps" in text
    assert "simulated" not in text


def test_an_ann(hub: Hub, ann: Path) -> None:
    push(ann)
    config = json.loads(hub.get("config.json"))
    assert (config["steps"], config["neuron"], config["reset"]) == (1, None, None)
    text = hub.get("README.md").decode()
    assert "An ANN for image classification (`mlp-qcfs8`)" in text
    assert "spiking-neural-network" not in text
    assert torch.equal(logits(from_pretrained(REPO)), logits(load_trained(ann)))


def test_private(hub: Hub, folder: Path) -> None:
    push(folder, private=True)
    assert hub.private == {REPO}
    push(folder, private=True)
    with pytest.raises(FileNotFoundError, match="if it is private"):
        from_pretrained(REPO)
    assert from_pretrained(REPO, token="may-write").steps == 3


def test_private_is_not_published(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = {"main": {}}
    with pytest.raises(PermissionError, match=r"is public, but private=True.*Nothing was sent"):
        push(folder, private=True)
    assert not hub.commits


def test_revision(hub: Hub, folder: Path) -> None:
    for _ in range(2):
        assert push(folder, revision="v2", message="second") == f"{hub.url}/{REPO}/tree/v2"
    assert {(commit["branch"], commit["summary"]) for commit in hub.commits} == {("v2", "second")}
    assert hub.repos[REPO]["main"] == {}
    assert 'revision="v2"' in hub.get("README.md", branch="v2").decode()
    assert from_pretrained(REPO, revision="v2").steps == 3


def test_words_of_the_user_stay(hub: Hub, folder: Path, ann: Path) -> None:
    push(folder)
    own = hub.get("README.md").decode().replace("---\nlibrary", "---\nlicense: mit\nlibrary") + "\nThanks to all.\n"
    hub.put("README.md", own.encode())
    push(ann)
    text = hub.get("README.md").decode()
    assert text.startswith("---\nlicense: mit\n")
    assert text.endswith("\nThanks to all.\n")
    assert "mlp-qcfs8" in text
    assert "mlp-etc-lif" not in text


def test_words_on_a_branch_stay(hub: Hub, folder: Path) -> None:
    push(folder, revision="v2")
    hub.put("README.md", b"written by hand", branch="v2")
    push(folder, revision="v2")
    assert hub.get("README.md", branch="v2") == b"written by hand"
    assert "README.md" not in hub.commits[1]


def test_a_readme_that_cannot_be_read_is_not_replaced(hub: Hub, folder: Path) -> None:
    push(folder)
    hub.broken.add("README.md")
    with pytest.raises(ConnectionError, match="was not pushed"):
        push(folder)
    assert len(hub.commits) == 1


marks = st.text().filter(lambda text: BEGIN not in text and END not in text)


@given(before=marks, old=marks, after=marks, new=marks)
def test_only_what_lies_between_the_marks_is_replaced(before: str, old: str, after: str, new: str) -> None:
    generated = f"head{BEGIN}{new}{END}tail"
    merged = _merged(f"{before}{BEGIN}{old}{END}{after}", generated)
    assert merged == f"{before}{BEGIN}{new}{END}{after}"
    assert _merged(merged, generated) == merged
    assert _merged(before, generated) == before
    assert _merged(None, generated) == generated


def test_paths_of_this_machine_stay_here(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "secret-project" / "images"
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (data / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f"{index}.png")
    out = tmp_path / "out"
    run(digits(**QUICK, data=str(data), batch_size=2, name="pets"), out, quiet=True)
    before = (out / "model.safetensors").read_bytes()
    assert b"secret-project" in before
    push(out)
    (commit,) = hub.commits
    assert not [name for name in PUBLISHED if b"secret-project" in commit[name]]
    assert (out / "model.safetensors").read_bytes() == before
    config = json.loads(commit["config.json"])
    assert (config["data_set"], config["data"]) == ("pets", None)
    trained = from_pretrained(REPO)
    assert torch.equal(logits(trained), logits(load_trained(out)))
    assert trained.form == load_trained(out).form
    with pytest.raises(ValueError, match="does not say where its data are"):
        trained.batches()


def test_path_on_the_card_of_a_converted_network(hub: Hub, converted: Path, tmp_path: Path) -> None:
    tensors, card = load_tensors(converted / "model.safetensors")
    card["recipe"]["data"] = "/home/someone/images"
    save_tensors(tmp_path / "model.safetensors", tensors, card)
    push(tmp_path / "model.safetensors")
    assert not [name for name in PUBLISHED if b"/home/someone" in hub.get(name)]
    assert from_pretrained(REPO).recipe.data == ""


@pytest.mark.parametrize(
    ("data", "local"),
    [
        ("digits", False), ("", False), ("mnist", False), ("owner/name", False), ("a/b/c", True), ("/data", True),
        ("~/data", True), ("./data", True), ("C:\\data", True), ("here", True), ("owner/here", True),
    ],
)  # fmt: skip
def test_what_is_a_path_of_this_machine(
    data: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As loading decides: a folder first, then a name on the hub."""
    (tmp_path / "here").mkdir()
    (tmp_path / "owner" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert _is_local(data) is local


# What is not published


def without(folder: Path, tmp_path: Path, *names: str) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in names:
        (copy / name).unlink()
    return copy


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["model.safetensors"], "lacks model.safetensors, so nothing was sent"),
        (["results.json"], r"lacks results\.json"),
        (["model.safetensors", "results.json"], r"lacks model.safetensors and results\.json.*--resume"),
    ],
)
def test_incomplete_folders(hub: Hub, folder: Path, tmp_path: Path, missing: list[str], message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        push(without(folder, tmp_path, *missing))
    assert not hub.requests


def test_results_of_another_run(hub: Hub, folder: Path, tmp_path: Path) -> None:
    copy = without(folder, tmp_path)
    results = json.loads((copy / "results.json").read_text())
    results["accuracy_by_step"][0] += 0.1
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"of different runs, so nothing was sent"):
        push(copy)
    assert not hub.requests


def test_files_that_are_no_finished_network(hub: Hub, folder: Path, tmp_path: Path) -> None:
    tensors, card = load_tensors(folder / "model.safetensors")
    save_tensors(tmp_path / "unscored.safetensors", tensors, {**card, "result": {}})
    save_tensors(tmp_path / "cardless.safetensors", tensors, {})
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    for path, message in (
        (folder / "checkpoint.safetensors", "is a checkpoint"),
        (tmp_path / "unscored.safetensors", "accuracies of 0 steps instead of 3"),
        (tmp_path / "cardless.safetensors", "no recipe on its card"),
        (tmp_path / "half.safetensors", "not a complete safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            push(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        push(tmp_path / "none.safetensors")
    assert not hub.requests


def test_repository_without_owner(hub: Hub, folder: Path) -> None:
    for repo in ("name", "a/b/c", "owner/", "https://huggingface.co/owner/name"):
        with pytest.raises(ValueError, match=r"must be owner/name"):
            push_to_hub(folder, repo)
    assert not hub.requests


@pytest.mark.parametrize("token", [False, "may-read"])
def test_token_that_may_not_write(hub: Hub, folder: Path, token: str | bool) -> None:
    with pytest.raises(PermissionError, match=r"does not let this token write.*hf auth login"):
        push_to_hub(folder, REPO, token=token)
    assert not hub.commits


def test_hub_that_fails_while_pushing(hub: Hub, folder: Path) -> None:
    hub.down = True
    with pytest.raises(ConnectionError, match=r"was not pushed .*500.*Call again"):
        push(folder)


def test_hub_that_is_not_reached_while_pushing(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"was not pushed \(ConnectError.*Call again"):
        push(folder)


# What is loaded


def test_local_paths_come_first(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / REPO)
    for source in (REPO, Path(REPO), f"{REPO}/model.safetensors", f"{REPO}/checkpoint.safetensors"):
        assert from_pretrained(source).steps == 3
    with pytest.raises(ValueError, match="no revision 'v2'"):
        from_pretrained(REPO, revision="v2")
    assert not hub.requests


@pytest.mark.parametrize("source", ["runs/a/b", "./a", "model", Path("owner/name"), "runs/model.safetensors", "~/x"])
def test_paths_that_are_not_there_are_not_asked_for(hub: Hub, source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder or file .*owner/name"):
        from_pretrained(source)
    assert not hub.requests


def test_no_such_repository(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a folder 'someone/digits-snn' here .* nor a repository"):
        from_pretrained(REPO)


def test_no_such_revision(hub: Hub, folder: Path) -> None:
    push(folder)
    with pytest.raises(FileNotFoundError, match="has no revision 'v9'"):
        from_pretrained(REPO, revision="v9")


def test_no_network_in_the_repository(hub: Hub) -> None:
    hub.put("pytorch_model.bin", b"")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors.*load_parameters"):
        from_pretrained(REPO)


def test_gated_repository(hub: Hub, folder: Path) -> None:
    push(folder)
    hub.gated.add(REPO)
    with pytest.raises(PermissionError, match=rf"gated: .*Accept it at {hub.url}/{REPO}"):
        from_pretrained(REPO)
    assert from_pretrained(REPO, token="may-write").steps == 3


@pytest.mark.parametrize("token", ["expired", "blocked"])
def test_token_that_may_not_read(hub: Hub, folder: Path, token: str) -> None:
    push(folder)
    with pytest.raises(PermissionError, match=rf"refuses {REPO} .*hf auth login"):
        from_pretrained(REPO, token=token)


def test_nothing_but_the_weights_is_downloaded_and_only_once(hub: Hub, folder: Path) -> None:
    push(folder)
    hub.requests.clear()
    for _ in range(2):
        from_pretrained(REPO)
    asked = [request for request in hub.requests if request.startswith("GET")]
    assert len(asked) == 1
    assert re.fullmatch(r"GET /cdn/\w+", asked[0])
    assert {request.split("/")[-1] for request in hub.requests if "HEAD" in request} == {"model.safetensors"}


def test_new_weights_are_seen(hub: Hub, folder: Path, ann: Path) -> None:
    push(folder)
    assert from_pretrained(REPO).steps == 3
    push(ann)
    assert from_pretrained(REPO).steps == 1


@pytest.mark.parametrize("how", ["server is gone", "local_files_only", "offline mode", "hub is down"])
def test_without_network(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What is in the cache loads; otherwise the message says where to put which file."""
    push(folder)
    cache = tmp_path / "own cache"
    from_pretrained(REPO, cache_dir=cache)
    options = {"local_files_only": how == "local_files_only"}
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    if how == "server is gone":
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    elif how == "offline mode":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
    hub.down = how == "hub is down"
    hub.requests.clear()
    assert from_pretrained(REPO, cache_dir=cache, **options).steps == 3
    with pytest.raises(ConnectionError, match=r"not in the cache .*hub-cache") as refusal:
        from_pretrained(REPO, **options)
    message = str(refusal.value)
    assert f"/{REPO}/resolve/main/model.safetensors elsewhere" in message
    assert 'from_pretrained("FOLDER/model.safetensors")' in message
    assert ("without local_files_only" in message) == (how == "local_files_only")
    assert ("503" in message) == (how == "hub is down")
    assert how == "hub is down" or not hub.requests
    place = tmp_path / "FOLDER"
    place.mkdir()
    (place / "model.safetensors").write_bytes(hub.get("model.safetensors"))
    assert from_pretrained(place / "model.safetensors").steps == 3


def test_a_download_that_breaks_off_goes_on(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    push(folder)
    hub.cuts = [5000]
    assert torch.equal(logits(from_pretrained(REPO)), logits(load_trained(folder)))
    assert "from byte 5000" in hub.requests


def test_a_download_that_always_breaks_off(hub: Hub, folder: Path) -> None:
    push(folder)
    hub.cuts = [5000] * 50
    with pytest.raises(ConnectionError, match=rf"from {REPO} broke off .*Nothing of it was kept"):
        from_pretrained(REPO)
    hub.cuts = []
    assert from_pretrained(REPO).steps == 3


def test_a_damaged_download(hub: Hub, folder: Path) -> None:
    """A flipped bit in a weight is no error of the format: only the checksum tells."""
    push(folder)
    hub.damage = True
    with pytest.raises(ValueError, match=r"is damaged: its checksum.*Delete (.*) and call again") as refusal:
        from_pretrained(REPO)
    hub.damage = False
    place = re.search(r"Delete (.*) and call", str(refusal.value))
    assert place is not None
    Path(place[1]).unlink()
    assert from_pretrained(REPO).steps == 3


def test_files_that_are_not_ours(hub: Hub, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save

    whole = (folder / "model.safetensors").read_bytes()
    for content, message in (
        (save({"weight": torch.zeros(2)}), "carries no ranvier card"),
        (whole[: len(whole) // 2], "not a complete safetensors file"),
        (b"not weights", "not a complete safetensors file"),
    ):
        hub.put("model.safetensors", content)
        with pytest.raises(ValueError, match=rf"model.safetensors of {REPO} gives no network .*{message}"):
            from_pretrained(REPO)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {}},
        {"recipe": "digits"},
        {"recipe": {"name": "a", "data": "b"}},
        {"input": {}},
        {"input": None},
        {"kind": "checkpoint"},
        {"kind": "converted"},
        {"recipe": {"network": {"activation": 1}}},
    ],
    ids=str,
)
def test_cards_of_strangers(hub: Hub, folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors, card = load_tensors(folder / "model.safetensors")
    save_tensors(tmp_path / "m.safetensors", tensors, {**card, **changes})
    hub.put("model.safetensors", (tmp_path / "m.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"of {REPO} gives no network"):
        from_pretrained(REPO)


def test_card_of_a_network_that_nobody_trained(hub: Hub, folder: Path, tmp_path: Path) -> None:
    tensors, card = load_tensors(folder / "model.safetensors")
    for key in ("network", "loss", "steps"):
        del card["recipe"][key]
    save_tensors(tmp_path / "m.safetensors", tensors, card)
    hub.put("model.safetensors", (tmp_path / "m.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"of {REPO} gives no network"):
        from_pretrained(REPO)


def test_client_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push_to_hub(folder, REPO), lambda: from_pretrained(REPO)):
        with pytest.raises(ImportError, match="pip install huggingface_hub"):
            call()
    with contextlib.chdir(folder):
        assert from_pretrained(".").steps == 3
