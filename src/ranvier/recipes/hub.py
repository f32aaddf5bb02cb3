"""Networks on the Hugging Face hub: a run's folder there, and back."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ranvier.conversion import ConvertedSNN
from ranvier.recipes.convert import LAYOUT, describe_neurons
from ranvier.recipes.recipe import AnnRecipe, EventRecipe, FinetuneRecipe, Recipe, SimulatedEventRecipe, read_recipe
from ranvier.recipes.trained import MODEL, RESULTS, Trained, load_trained
from ranvier.weights import load_tensors, save_tensors

CONFIG = "config.json"
README = "README.md"
BEGIN, END = "<!-- ranvier: begin -->", "<!-- ranvier: end -->"
"""What lies between them in a README is replaced by the next push; the rest is the user's."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", flags=re.ASCII)


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish a trained or converted network: one commit with its weights, its settings and a model card.

    The commit holds `model.safetensors`, `config.json` (the card, and in plain fields data set, T, accuracy at every t,
    neuron, reset, threshold, layout, seed, commit, versions) and `README.md`. Everything is checked first: nothing is
    sent where the folder is incomplete. Paths of this machine, to the data or to the network that training started
    from, are not published. Of a README that is in the repository already only the part between the marks of an earlier
    push is replaced, so that a licence and words of yours stay; one without marks stays as it is.

    Args:
        path: Folder of a finished run or conversion, or its `model.safetensors`.
        repo_id: `owner/name`; created if it does not exist.
        private: Whether only you see it; refused if it exists and is public. False leaves a new repository to the
            default of its owner, which is public unless an organisation says otherwise.
        revision: Branch, created if it does not exist; None for `main`.
        message: Of the commit; None says what is trained.
        token: As in `huggingface_hub`; None for that of `hf auth login`.

    Returns:
        Address of the repository, or of the branch in it.

    Raises:
        FileNotFoundError: There is no such folder or file, or it lacks a part.
        ValueError: The file is broken, foreign, or of another run than the results beside it.
        PermissionError: The hub refuses the token, or the repository is public and `private` was asked for.
        ConnectionError: The hub was not reached, or failed.

    >>> push_to_hub("runs/digits-conv4-etc-lif-T4-seed0", "owner/name", private=True)  # doctest: +SKIP
    'https://huggingface.co/owner/name'
    """
    hub = _huggingface_hub()
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id is {repo_id!r}, but must be owner/name.")
    bundle = _bundle(Path(path).expanduser())
    message = message or f"{bundle.title}, {_percent(bundle.config['accuracy_by_step'][-1])} at T = {bundle.steps}"
    api = hub.HfApi(token=token, library_name="ranvier")
    with tempfile.TemporaryDirectory() as folder, _errors_of_pushing(hub, repo_id):
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise PermissionError(
                f"{repo_id} exists and is public, but private=True was asked for. Nothing was sent. "
                "Make it private in its settings on the hub, choose another name, or pass private=False."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
            url = f"{url}/tree/{revision}"
        old = _readme_of(hub, api, repo_id, revision, folder)
        files: dict[str, Path | bytes] = {
            MODEL: bundle.publishable(Path(folder)),
            CONFIG: (json.dumps(bundle.config, indent=2) + "\n").encode(),
        }
        if (new := _merged(old, bundle.readme(repo_id, revision))) != old:
            files[README] = new.encode()
        operations = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
        ]
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return url


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Trained:
    """A trained or converted network from the hub, or from a folder or file as in `load_trained`.

    Only `model.safetensors` is downloaded, once, and compared with the checksum that the hub gives. The network is
    built from the card in it. Nothing is unpickled, and no code of the repository is run.

    Args:
        source: `owner/name` on the hub; or a folder of a run or a file, which goes first where both exist.
        revision: Branch, tag or commit; None for `main`. A commit gives the same weights for ever.
        cache_dir: Where downloads are kept; None for the cache of `huggingface_hub`.
        token: As in `huggingface_hub`, for private repositories; None for that of `hf auth login`.
        local_files_only: Take what was downloaded before, and use no network.

    Returns:
        The network in evaluation mode, its recipe, and the input that it expects.

    Raises:
        FileNotFoundError: No such folder, repository, revision, or no `model.safetensors` in it.
        PermissionError: The repository is gated, or the token is not accepted.
        ConnectionError: The hub was not reached and nothing is in the cache; the message says how to go without.
        ValueError: The file is broken, was not written by ranvier, or is of another version.

    >>> from ranvier.recipes import digits, run
    >>> with tempfile.TemporaryDirectory() as out:
    ...     result = run(digits(model="mlp", epochs=1, device="cpu"), out, quiet=True)
    ...     from_pretrained(out).steps
    4
    """
    local = Path(source).expanduser()
    if local.exists():
        if revision is not None:
            raise ValueError(
                f"{source} is a folder or file here, which has no revision {revision!r}. "
                "Leave revision out, or run where no folder of that name lies to load it from the hub."
            )
        return load_trained(local)
    if not isinstance(source, str) or not HUB_ID.fullmatch(source) or local.suffix == ".safetensors":
        raise FileNotFoundError(
            f"there is no folder or file {str(source)!r} (working directory: {Path.cwd()}). "
            f"Pass the folder of a run, its {MODEL}, or owner/name of a repository on the Hugging Face hub."
        )
    path = _download(source, revision, cache_dir, token, local_files_only)
    _check_intact(path, source)
    try:
        return load_trained(path)
    # The card comes from strangers: what it lacks, or has in another form, shows wherever it is used first.
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{MODEL} of {source} gives no network ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class _Bundle:
    """What is published of one network."""

    file: Path
    card: dict[str, Any]
    trained: Trained
    config: dict[str, Any]

    @property
    def steps(self) -> int:
        return self.trained.steps

    @property
    def title(self) -> str:
        """What it is, in few words."""
        recipe, ann = self.trained.recipe, self.card.get("ann", "ann")
        label = f"{ann}-converted-T{self.steps}" if self._is_converted else recipe.label
        if isinstance(recipe, FinetuneRecipe):
            label = f"{ann}-converted-{recipe.loss.method}-T{self.steps}"
        return f"{label} on {recipe.name}"

    def publishable(self, folder: Path) -> Path:
        """The file, or a copy in `folder` whose card is the one of the config, without paths of this machine."""
        tensors, card = load_tensors(self.file)
        if card == self.card:
            return self.file
        save_tensors(folder / MODEL, tensors, self.card)
        return folder / MODEL

    def readme(self, repo_id: str, revision: str | None) -> str:
        """A short model card in Markdown."""
        config = self.config
        rows = "\n".join(f"| {t} | {_percent(value)} |" for t, value in enumerate(config["accuracy_by_step"], 1))
        where = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
        seed, commit = (f"{key} {'not recorded' if config[key] is None else config[key]}" for key in ("seed", "commit"))
        epoch = "" if self.trained.is_calibrated else "; it is that of the last epoch, not of the best"
        tag = (
            "spiking-neural-network" if self._is_converted or isinstance(self.trained.recipe, Recipe) else "ann-to-snn"
        )
        versions = ", ".join(f"{name} {config['versions'].get(name, '?')}" for name in ("ranvier", "torch"))
        return f"""\
---
library_name: ranvier
pipeline_tag: image-classification
tags:
- {tag}
---

{BEGIN}
# {self.title}

{self._what()}

| steps | accuracy |
|---:|---:|
{rows}

Measured on: {config["evaluated_on"]}; one run, {seed}. The answer after t steps is the argmax of the mean of the
first t logits, and a tie counts as a miss{epoch}.

```python
import ranvier as rv

trained = rv.recipes.from_pretrained({where})
logits = {"trained.model(frames)" if self._sees_events else f"trained.model(images, steps={self.steps})"}
```

{self._input()} All settings are in `{CONFIG}`.
Made with {versions}, {commit}.

No licence is stated here: whoever publishes the network adds `license:` to the head of this file.
{END}
"""

    @property
    def _is_converted(self) -> bool:
        return isinstance(self.trained.model, ConvertedSNN)

    @property
    def _sees_events(self) -> bool:
        return isinstance(self.trained.recipe, EventRecipe)

    def _input(self) -> str:
        """What goes in and what comes out."""
        form = self.trained.form
        size, logits = form.image_size, f"`logits` are `[T, B, {len(form.classes)}]`."
        if self._sees_events:
            return (
                f"`frames` are `[T, B, {form.channels}, {size}, {size}]`, T = {self.steps} frames of each recording: "
                "how many events of each\npolarity, darker and brighter, each pixel has in each frame. There is no "
                f"normalization. {logits}"
            )
        return (
            f"`images` are `[B, {form.channels}, {size}, {size}]`, made from bytes by\n"
            f"`trained.form.normalization`; {logits}"
        )

    def _what(self) -> str:
        if isinstance(self.trained.model, ConvertedSNN):
            return self._what_was_converted(self.trained.model)
        config, recipe = self.config, self.trained.recipe
        if isinstance(recipe, AnnRecipe):
            return f"An ANN for image classification (`{recipe.label}`), made to be converted to a spiking network."
        assert isinstance(recipe, Recipe)
        task = "image classification"
        if self._sees_events:
            simulated = isinstance(recipe, SimulatedEventRecipe)
            task = f"the classification of {'*simulated* ' if simulated else ''}recordings of an event camera"
        if recipe.is_proxy:
            form = recipe.proxy.form
            worth = "1" if form.worth == "one" else "their threshold"
            answer = "spikes of neurons" if form.readout == "spikes" else "current"
            how = (
                f"initial potential {form.v_init:g} times the threshold and spikes worth {worth}; it answers with the "
                f"{answer} after the last layer. Trained by proxy learning (`{recipe.proxy.variant}`, target "
                f"`{recipe.proxy.loss.target}`)."
            )
        else:
            how = f"trained directly with the loss `{config['method']}`."
        return (
            f"A spiking network for {task} in T = {self.steps} steps: `{config['network']}` with "
            f"`{config['neuron']}` neurons, {config['reset']} reset, threshold {config['v_threshold']:g}, {how}"
        )

    def _what_was_converted(self, model: ConvertedSNN) -> str:
        card, recipe = self.card, self.trained.recipe
        ann = f"an ANN (`{card['ann']}`)" if "ann" in card else "an ANN"
        if isinstance(recipe, FinetuneRecipe):
            if "ann_accuracy" in card:
                ann += f" that has {_percent(card['ann_accuracy'])} on {card['ann_images']} test images"
            ann += f", then trained further with `{recipe.loss.method}`"
        else:
            ann += f" that has {_percent(card['result']['ann_accuracy'])} on the same images"
        takes_back = any(neuron.signed for neuron in model.neurons.values())
        signed = ", which may take spikes back (negative spikes)" if takes_back else ""
        return (
            f"A spiking network for image classification in T = {self.steps} steps, converted from {ann}. "
            f"Integrate-and-fire neurons with soft reset and one threshold per channel{signed}."
        )


def _bundle(path: Path) -> _Bundle:
    """Everything about the network in `path`; raises where a part is missing."""
    file = path / MODEL if path.is_dir() else path
    if path.is_dir():
        missing = [name for name in (MODEL, RESULTS) if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} lacks {' and '.join(missing)}, so nothing was sent. Both are written when a run ends: let it "
                "end with --resume, or pass the folder of another."
            )
    _, card = load_tensors(file)
    if card.get("kind") == "checkpoint":
        raise ValueError(f"{path} is a checkpoint of a training. Pass the run's folder or its {MODEL}.")
    trained = load_trained(file)
    accuracy = list(card.get("result", {}).get("accuracy_by_step", ()))
    if len(accuracy) != trained.steps:
        raise ValueError(
            f"the card of {file} has accuracies of {len(accuracy)} steps instead of {trained.steps}, so nothing was "
            "sent. Publish what `ranvier train` or `ranvier convert` wrote."
        )
    if path.is_dir():
        beside = json.loads((path / RESULTS).read_text())["accuracy_by_step"]
        if list(beside) != accuracy:
            raise ValueError(
                f"{RESULTS} in {path} has accuracies {beside}, but the card of {MODEL} has {accuracy}: they are of "
                "different runs, so nothing was sent. Put the files of one run together."
            )
    card = _without_paths(card)
    trained = replace(trained, recipe=read_recipe(card["recipe"]), card=card)
    return _Bundle(file, card, trained, {**_plain_fields(trained, card), "card": card})


def _plain_fields(trained: Trained, card: Mapping[str, Any]) -> dict[str, Any]:
    """What everybody asks first, without knowledge of our cards."""
    recipe, result = trained.recipe, card["result"]
    fields: dict[str, Any] = {
        "library_name": "ranvier",
        "kind": card.get("kind", "trained"),
        "data_set": recipe.name,
        "data": recipe.data or None,
        "steps": trained.steps,
        "accuracy_by_step": list(result["accuracy_by_step"]),
        "layout": LAYOUT,
    }
    if isinstance(recipe, FinetuneRecipe):
        assert isinstance(trained.model, ConvertedSNN)
        return {
            **fields,
            **describe_neurons(trained.model),
            "method": recipe.loss.method,
            **{key: result[key] for key in ("evaluated_on", "seed", "commit", "versions")},
        }
    if isinstance(trained.model, ConvertedSNN):
        report = card.get("report") or {}
        return {
            **fields,
            **describe_neurons(trained.model),
            "evaluated_on": f"{result['total']} images of the test set",
            # Cards of earlier versions have neither seed nor commit, and few versions.
            "seed": card.get("seed"),
            "commit": card.get("commit"),
            "versions": card.get("versions") or report.get("versions", {}),
        }
    assert isinstance(recipe, Recipe | AnnRecipe)
    return {
        **fields,
        "network": recipe.network.model,
        "method": recipe.loss.method,
        **(_neurons(recipe) if isinstance(recipe, Recipe) else dict.fromkeys(("neuron", "reset", "v_threshold"))),
        **({"simulated": isinstance(recipe, SimulatedEventRecipe)} if isinstance(recipe, EventRecipe) else {}),
        **{key: result[key] for key in ("evaluated_on", "seed", "commit", "versions")},
    }


def _neurons(recipe: Recipe) -> dict[str, Any]:
    """The neurons that are in the network; proxy learning puts its own there."""
    if not recipe.is_proxy:
        network = recipe.network
        return {"neuron": network.neuron, "reset": network.reset, "v_threshold": network.v_threshold}
    form = recipe.proxy.form
    names = ("reset", "v_threshold", "v_init", "worth", "readout")
    return {"neuron": "if", **{name: getattr(form, name) for name in names}}


def _is_local(data: str) -> bool:
    """Whether `data` of a recipe is a folder of this machine, and neither a name on the hub nor the bundled digits."""
    if data in ("", "digits"):
        return False
    return Path(data).expanduser().exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", data)


def _without_paths(card: dict[str, Any]) -> dict[str, Any]:
    """The card without paths of this machine, where the data lie and what training started from, in its recipes."""

    def without(recipe: dict[str, Any]) -> dict[str, Any]:
        hidden = {"data": _is_local(recipe.get("data", "")), "start": True}
        return {name: "" if hidden.get(name) else value for name, value in recipe.items()}

    card = {**card, "recipe": without(card["recipe"])}
    if "recipe" in card["result"]:
        card["result"] = {**card["result"], "recipe": without(card["result"]["recipe"])}
    return card


def _merged(old: str | None, new: str) -> str:
    """The new README, or an old one with the part of an earlier push replaced."""
    if old is None:
        return new
    if BEGIN not in old or END not in old:
        return old
    before, rest = old.split(BEGIN, 1)
    return before + new[new.index(BEGIN) : new.index(END)] + END + rest.split(END, 1)[1]


def _readme_of(hub: Any, api: Any, repo_id: str, revision: str | None, folder: str) -> str | None:
    """The README that the repository has; fetched anew, because a cached one may be older."""
    try:
        path = api.hf_hub_download(repo_id, README, revision=revision, cache_dir=Path(folder, "cache"))
    except hub.errors.LocalEntryNotFoundError:  # the hub was not reached: not the same as no file
        raise
    except hub.errors.EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _download(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """Path of the model in the cache, downloaded if need be."""
    hub = _huggingface_hub()
    errors = hub.errors
    at = f"revision {revision!r} of {repo_id}" if revision else repo_id
    try:
        return Path(
            hub.hf_hub_download(
                repo_id,
                MODEL,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                library_name="ranvier",
            )
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} is gated: its owner asks for an agreement. Accept it at {hub.constants.ENDPOINT}/{repo_id}, "
            "then log in with `hf auth login` or pass token=."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is neither a folder {repo_id!r} here (working directory: {Path.cwd()}) nor a repository of that "
            "name on the hub that you may see. Check the name; if it is private, log in with `hf auth login` or pass "
            "token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}. Pass a branch, tag or commit that it has, or leave revision out."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if _status(error.__cause__) in (401, 403):
            raise _refused(at, error.__cause__) from error
        raise ConnectionError(
            _how_to_go_without_network(hub, repo_id, revision, cache_dir, error, local_files_only)
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{at} has no {MODEL}, so it holds no network of ranvier. For foreign weights, build the model and call "
            "ranvier.weights.load_parameters(model, ranvier.weights.load_foreign_tensors(file))."
        ) from error
    except (errors.HTTPError, OSError) as error:
        if _status(error) in (401, 403):
            raise _refused(at, error) from error
        raise ConnectionError(
            f"the download of {MODEL} from {at} broke off ({type(error).__name__}: {_line(error)}). "
            "Nothing of it was kept: call again. Is the disk full?"
        ) from error


def _refused(what: str, error: BaseException | None) -> PermissionError:
    return PermissionError(
        f"the hub refuses {what} ({_line(error)}). Log in anew with `hf auth login`, or pass another token=."
    )


def _how_to_go_without_network(
    hub: Any,
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    error: Exception,
    local_files_only: bool,
) -> str:
    reason = "local_files_only=True" if local_files_only else f"not reached: {_line(error.__cause__ or error)}"
    place = Path(cache_dir or hub.constants.HF_HUB_CACHE)
    return (
        f"{MODEL} of {repo_id} ({revision or 'main'}) is not in the cache {place}, and the hub was not asked or "
        f"did not answer ({reason}). With a network, call again"
        f"{' without local_files_only' if local_files_only else ''}. Without one, fetch "
        f"{hub.hf_hub_url(repo_id, MODEL, revision=revision)} elsewhere, put the file into a folder here, and pass "
        f'that: from_pretrained("FOLDER/{MODEL}").'
    )


def _check_intact(path: Path, repo_id: str) -> None:
    """Raise unless the cached file has the checksum that the hub stated, which is its name in the cache."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{64}", name):  # stored without links, or not as a large file: no checksum is kept
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != name:
        raise ValueError(
            f"the download of {MODEL} from {repo_id} is damaged: its checksum is {found[:12]}... instead of "
            f"{name[:12]}.... Delete {path.resolve()} and call again."
        )


@contextmanager
def _errors_of_pushing(hub: Any, repo_id: str) -> Iterator[None]:
    """Turns what the hub's client raises into errors that say what to do."""
    try:
        yield
    except PermissionError:
        raise
    except (hub.errors.HTTPError, OSError) as error:
        if _status(error) in (401, 403, 404):
            raise PermissionError(
                f"the hub does not let this token write to {repo_id} ({_line(error)}). Nothing was committed. "
                "Log in with `hf auth login` and a token that may write, or pass token=; is the owner right?"
            ) from error
        raise ConnectionError(
            f"{repo_id} was not pushed ({type(error).__name__}: {_line(error)}). "
            "Call again: what has arrived is not sent twice."
        ) from error


def _status(error: BaseException | None) -> int | None:
    """Status of the answer that made the client raise, if there was an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error: BaseException | None) -> str:
    """The client's message in one line."""
    return " ".join(str(error).split())


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(f"the hub needs {error.name}. Install it with: pip install huggingface_hub") from error
    return huggingface_hub
