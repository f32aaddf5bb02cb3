"""What a recipe is: every setting of one training, as a value."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self, get_type_hints

from ranvier.atomic import tuples
from ranvier.checks import check_choice, check_count, check_positive
from ranvier.data import Augmentation, SaccadeSettings
from ranvier.data.events import FrameAugmentation, FrameSettings
from ranvier.data.events.frames import Bins
from ranvier.models import Network
from ranvier.recipes.network import AnnSettings, NetworkSettings, ProxySettings
from ranvier.training import DirectLoss, Execution, Optimization, ProxyLoss, proxy_network


@dataclass(frozen=True)
class TrainingRecipe:
    """Every setting of one training but what is trained: see `Recipe` and `AnnRecipe`.

    The parts are values of the layers that use them. `override` changes fields by name wherever they live, as the flags
    of the command line do: `fashion_mnist().override(method="direct", neuron="lifb", epochs=3)`.
    """

    name: str
    """Name of the data set in results."""
    data: str
    """Folder of parquet files or class folders, Hugging Face hub id, or `digits` (bundled)."""
    epochs: int = 10
    """Times the training set is gone through."""
    batch_size: int = 128
    """Images per update, over all processes."""
    seed: int = 0
    """Decides initial weights, order and augmentation."""
    hold_out: int = 0
    """Evaluate on this many held-out training images and leave the test set alone; for choosing settings."""
    train_images: int | None = None
    """Train on so many images only, some of every class; None takes all. For quick looks and small budgets."""
    image_size: int | None = None
    """Resize images, or frames of recordings, to this height and width; None keeps them."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_positive(name, getattr(self, name))
        if self.train_images is not None:
            check_count("train_images", self.train_images)

    @property
    def label(self) -> str:
        """What is trained and how, in few words."""
        return self.name

    def override(self, **settings: Any) -> Self:
        """A copy with other values for the named fields, wherever in the recipe they live.

        Raises:
            ValueError: There is no such field; the message names the nearest ones.

        >>> Recipe("digits", "digits").override(lr=0.01, neuron="lifb").optimization.lr
        0.01
        """
        places = self.places()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in places:
                near = difflib.get_close_matches(name, places, n=3)
                hint = f"Did you mean {' or '.join(near)}?" if near else f"Fields are: {', '.join(sorted(places))}."
                raise ValueError(f"a recipe has no field {name!r}. {hint}")
            changes.setdefault(places[name], {})[name] = value
        top = changes.pop("", {})
        parts = {part: replace(getattr(self, part), **values) for part, values in changes.items()}
        return replace(self, **top, **parts)

    def places(self) -> dict[str, str]:
        """For each field that `override` knows, the part that holds it; `""` for the recipe itself."""
        places: dict[str, str] = {}
        for own in fields(self):
            part = getattr(self, own.name)
            places |= {inner.name: own.name for inner in fields(part)} if is_dataclass(part) else {own.name: ""}
        return places

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed: all but places, memory and how often files are written."""
        content = asdict(self)
        del content["data"]
        for name in ("device", "memory", "checkpoint_seconds", "tensorboard"):
            del content["execution"][name]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` or `identity` wrote.

        Raises:
            ValueError: A field is unknown: the file is from another version.
        """
        values = {"data": "", **content}
        if "proxy" in get_type_hints(cls):
            values.setdefault("proxy", {})  # cards of earlier versions lack it
        try:
            for name, kind in get_type_hints(cls).items():
                if isinstance(kind, type) and is_dataclass(kind):
                    values[name] = kind(**tuples(values[name]))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the recipe on this card does not fit this version of ranvier ({error}). "
                "Read it with the version that wrote it; the card names it."
            ) from error


@dataclass(frozen=True)
class Recipe(TrainingRecipe):
    """Every setting of the training of a spiking network.

    With method `proxy` all neurons are those of `proxy`, whatever the network settings say of theirs.
    """

    steps: int = 4
    """Time steps T."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    loss: DirectLoss = field(default_factory=DirectLoss)
    proxy: ProxySettings = field(default_factory=ProxySettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("steps", self.steps)
        self.loss.check_steps(self.steps)

    @property
    def is_proxy(self) -> bool:
        """Whether this is proxy learning."""
        return self.loss.method == "proxy"

    @property
    def objective(self) -> DirectLoss | ProxyLoss:
        """The loss of a batch."""
        return self.proxy.loss if self.is_proxy else self.loss

    def build(self, num_classes: int, in_channels: int, image_size: int) -> Network:
        """The network for images of that shape; arguments as in `NetworkSettings.build`."""
        implementation = self.execution.implementation
        network = self.network.build(num_classes, in_channels, image_size, implementation)
        return proxy_network(network, self.proxy.form, implementation=implementation) if self.is_proxy else network

    @property
    def label(self) -> str:
        """What is trained and how, in few words."""
        if self.is_proxy:
            variant = "" if self.proxy.variant == "improved" else f"-{self.proxy.variant}"
            return f"{self.network.model}-proxy{variant}-T{self.steps}"
        return f"{self.network.model}-{self.loss.method}-{self.network.neuron}-T{self.steps}"

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed; of proxy learning only where that is the method."""
        content = super().identity()
        if not self.is_proxy:
            del content["proxy"]
        return content


@dataclass(frozen=True)
class AnnRecipe(TrainingRecipe):
    """Every setting of the training of an ANN that is to be converted."""

    network: AnnSettings = field(default_factory=AnnSettings)
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.loss  # refuses what cannot be, before any work

    @property
    def steps(self) -> int:
        """An ANN answers once."""
        return 1

    @property
    def loss(self) -> DirectLoss:
        """Cross-entropy."""
        return DirectLoss("direct", label_smoothing=self.label_smoothing)

    @property
    def objective(self) -> DirectLoss:
        """The loss of a batch."""
        return self.loss

    def build(self, num_classes: int, in_channels: int, image_size: int) -> Network:
        """The network for images of that shape; arguments as in `AnnSettings.build`."""
        return self.network.build(num_classes, in_channels, image_size, self.execution.implementation)

    @property
    def label(self) -> str:
        """What is trained, in few words."""
        levels = self.network.levels if self.network.activation == "qcfs" else ""
        return f"{self.network.model}-{self.network.activation}{levels}"


@dataclass(frozen=True)
class FinetuneRecipe(TrainingRecipe):
    """Every setting of training a converted network further, all its parts: weights, thresholds, biases, potentials.

    With method `proxy` the initial potentials stay as they are: an ANN has none.
    """

    name: str = ""
    """Name of the data set in results; that of the converted network if empty."""
    data: str = ""
    """Data set; that of the converted network if empty."""
    image_size: int | None = None
    """Resize images to this height and width; None resizes as for the converted network, if at all."""
    epochs: int = 3
    """Times the training set is gone through."""
    start: str = ""
    """Folder or file of the converted network; on the command line START does without the flag."""
    steps: int = 4
    """Time steps T."""
    surrogate_width: float = 1.0
    """Half-width of the triangle that stands for the gradient of a spike, in thresholds."""
    loss: DirectLoss = field(default_factory=DirectLoss)
    optimization: Optimization = field(default_factory=lambda: Optimization(lr=2e-4))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("steps", self.steps)
        check_positive("surrogate_width", self.surrogate_width)
        self.loss.check_steps(self.steps)

    @property
    def objective(self) -> DirectLoss | ProxyLoss:
        """The loss of a batch."""
        return ProxyLoss() if self.loss.method == "proxy" else self.loss

    @property
    def label(self) -> str:
        """What is trained and how, in few words."""
        return f"{_name_of(self.start)}-{self.loss.method}-T{self.steps}"


def _name_of(start: str) -> str:
    """Name of a network by its folder: the file in it is called the same everywhere."""
    if not start:
        return "converted"
    path = Path(start).resolve()
    if path.suffix != ".safetensors":
        return path.name
    return path.parent.name if path.stem == "model" else f"{path.parent.name}-{path.stem}"


@dataclass(frozen=True)
class EventSettings:
    """From recordings of an event camera to frames and batches."""

    recordings: str = "nmnist"
    """Data sheet of the recordings: nmnist, ncaltech101, cifar10-dvs or dvs-gesture."""
    bins: Bins = "time"
    """Frames of equal time, or of equal count of events."""
    balanced: bool = False
    """Draw recordings with replacement, each class as often as the others."""
    mix: float = 0.0
    """Probability that a region of a recording is replaced by that of another one (EventMix)."""
    skip_unreadable: bool = False
    """Leave recordings out that cannot be read, and say which, instead of stopping."""
    download: bool = False
    """Fetch recordings that are missing; goes on where an earlier attempt stopped."""

    def __post_init__(self) -> None:
        check_choice("bins", self.bins, ("time", "count"))
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix is {self.mix}, but is a probability: from 0 to 1.")


@dataclass(frozen=True)
class EventRecipe(Recipe):
    """Every setting of the training of a spiking network on recordings of an event camera, one frame a step.

    `image_size` resizes frames; None keeps the pixels of the sensor. `data` is the folder of the recordings; empty
    means the folder that downloads go to.
    """

    steps: int = 10
    """Time steps T, and frames of a recording."""
    data: str = ""
    """Folder of the recordings; empty for the folder that downloads go to."""
    augmentation: FrameAugmentation = field(default_factory=FrameAugmentation)  # type: ignore[assignment]
    """Random roll, crop, flip and event drop, the same for all frames of a recording."""
    events: EventSettings = field(default_factory=EventSettings)

    @property
    def frames(self) -> FrameSettings:
        """How recordings are cut into frames."""
        return FrameSettings(self.steps, self.events.bins, self.image_size)

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed; how recordings come to the machine need not."""
        content = super().identity()
        del content["events"]["download"]
        if not self.events.mix:
            del content["events"]["mix"]  # runs of earlier versions lack it
        return content


@dataclass(frozen=True)
class SimulatedEventRecipe(EventRecipe):
    """Every setting of the training of a spiking network on *simulated* recordings of images.

    `data` is the image set that the simulated camera looks at.
    """

    data: str = "digits"
    """Images that the camera looks at: folder, hub id or `digits`."""
    saccades: SaccadeSettings = field(default_factory=SaccadeSettings)


def read_recipe(content: Mapping[str, Any]) -> Recipe | AnnRecipe | FinetuneRecipe | TrainingRecipe:
    """The recipe on a card, whichever kind it is; a network that others trained has only the part about its data.

    Raises:
        ValueError: A field is unknown: the file is from another version.
    """
    if "saccades" in content:
        return SimulatedEventRecipe.from_json(content)
    if "events" in content:
        return EventRecipe.from_json(content)
    if "start" in content:
        return FinetuneRecipe.from_json(content)
    if "network" not in content:
        return TrainingRecipe.from_json(content)
    is_ann = "activation" in content["network"]
    return AnnRecipe.from_json(content) if is_ann else Recipe.from_json(content)
