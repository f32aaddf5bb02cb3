"""The command line: names typed functions, nothing else."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from ranvier import kernels, provenance, recipes
from ranvier.checks import check_choice
from ranvier.conversion import Settings
from ranvier.evaluation import Costs
from ranvier.evaluation.early_exit import MAX_LOSS
from ranvier.kernels import Precision
from ranvier.recipes import AnnRecipe, FinetuneRecipe, Recipe
from ranvier.recipes.catalogue import ANN_RECIPES, RECIPES
from ranvier.recipes.compare import ComparedMethod
from ranvier.recipes.network import ActivationName, ModelName, NeuronName

# A recipe is a subcommand whose flags are the fields of the recipe, with its values as defaults.
AnyRecipe = tyro.extras.subcommand_type_from_defaults(
    {name: recipe() for name, recipe in RECIPES.items()},
    {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()},
    prefix_names=False,
)
AnyAnnRecipe = tyro.extras.subcommand_type_from_defaults(
    {name: recipe() for name, recipe in ANN_RECIPES.items()},
    {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in ANN_RECIPES.items()},
    prefix_names=False,
)


def train(
    recipe: Annotated[AnyRecipe, tyro.conf.arg(name="")],  # type: ignore[valid-type]
    *,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Train a network by a recipe.

    Leaves results.json, model.safetensors, metrics.jsonl and the checkpoint in the output folder, and prints the
    accuracy at every time step last.

    For example:
      ranvier train digits
      ranvier train fashion-mnist --data PATH_OR_HUB_ID --method etc --neuron lifb --steps 4
      ranvier train fashion-mnist --data PATH --out runs/a --resume
      ranvier train cifar10 --epochs 100 --seed 1 --hold-out 5000

    Args:
        recipe: What to train; `ranvier train RECIPE --help` lists its settings.
        out: Output folder; by default runs/NAME-MODEL-METHOD-NEURON-STEPS-seed.
        resume: Go on where the run in the output folder stopped; starts it if there is none.
    """
    result = recipes.run(recipe, out or default_folder(recipe), resume=resume)
    if provenance.process_rank() == 0:
        Console().print(result)


def default_folder(recipe: Recipe | AnnRecipe | FinetuneRecipe) -> Path:
    """Where a run goes if the user does not say."""
    return Path("runs", f"{recipe.name}-{recipe.label}-seed{recipe.seed}".lstrip("-"))


def train_ann(
    recipe: Annotated[AnyAnnRecipe, tyro.conf.arg(name="")],  # type: ignore[valid-type]
    *,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Train an ANN that `ranvier convert` can turn into a spiking network.

    Leaves results.json, model.safetensors, metrics.jsonl and the checkpoint in the output folder.

    For example:
      ranvier train-ann digits
      ranvier train-ann cifar10 --data PATH_OR_HUB_ID --activation qcfs --levels 8
      ranvier train-ann fashion-mnist --data PATH --model resnet20 --activation relu --out runs/ann

    Args:
        recipe: What to train; `ranvier train-ann RECIPE --help` lists its settings.
        out: Output folder; by default runs/NAME-MODEL-ACTIVATION-seed.
        resume: Go on where the run in the output folder stopped; starts it if there is none.
    """
    train(recipe, out=out, resume=resume)


def convert(
    ann: Annotated[str, tyro.conf.Positional],
    *,
    steps: int = 8,
    data: str | None = None,
    weights: Path | None = None,
    threshold: Literal["max", "percentile", "mmse", "balance", "qcfs", "auto"] = "mmse",
    bias: Literal["none", "light", "potential", "ftbc", "auto"] = "ftbc",
    signed: bool = False,
    refit: bool = False,
    keep_weights: bool = False,
    leaky: bool = False,
    plain_mean: bool = False,
    images: int = 2600,
    test_images: int | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Convert a trained ANN to a spiking network of few steps, without backpropagation.

    Leaves model.safetensors (for ranvier evaluate), results.json and errors.png in the output folder, and prints what
    was chosen, what was lost in which layer, and the test accuracy at every time step last.

    For example:
      ranvier convert runs/cifar10-resnet20-qcfs8-seed0 --steps 8
      ranvier convert runs/cifar10-resnet20-qcfs8-seed0 --steps 4 --threshold auto --bias auto --data PATH
      ranvier convert runs/cifar10-resnet20-relu-seed0 --steps 4 --bias auto --signed
      ranvier convert my_package.models:resnet18 --weights resnet18.safetensors --data PATH_OR_HUB_ID --steps 8

    Args:
        ann: Folder or file of an ANN that train-ann made, or package.module:factory.
        steps: Time steps T.
        data: Data set to use instead of the one on the card.
        weights: Safetensors file with the parameters of what the factory builds; without it those it has.
        threshold: Where neurons fire; auto tries percentile, mmse, and max (qcfs where
            ceilings were learned).
        bias: Correction of the neurons; auto tries none, light, ftbc, --refit and --leaky.
        signed: Let neurons that fired too often take spikes back: far more accurate from T = 2 on, if the hardware can
            send negative spikes.
        refit: Try weights of each layer that are fitted to the spikes that reach it, whatever the bias.
        keep_weights: Leave the weights of the ANN as they are, with --bias auto too.
        leaky: Try a readout that forgets, whatever the bias: the first steps, which tell little, count less.
        plain_mean: Let all steps count alike, with --bias auto too.
        images: Training images to calibrate on, none of those that the ANN's recipe held out; up to 600 are fitted on,
            and the others decide between settings.
        test_images: Score on the first so many test images; by default on all.
        image_size: Resize images to this height and width, for the factory's network.
        mean: Mean of each channel that the factory's network was trained with; by default that of the training images.
        std: Standard deviation, likewise.
        settings: Fine print.
        device: cpu or cuda.
        out: Output folder; by default runs/ANN-THRESHOLD-BIAS-TSTEPS, with -signed, -refit,
            -keep-weights, -leaky and -plain-mean where they are.
    """
    name = ann.rpartition(":")[2] if ":" in ann else Path(ann).resolve().name
    if refit and keep_weights:
        raise ValueError("Both --refit and --keep-weights were given: leave one out.")
    if leaky and plain_mean:
        raise ValueError("Both --leaky and --plain-mean were given: leave one out.")
    options = "-signed" * signed + "-refit" * refit + "-keep-weights" * keep_weights
    options += "-leaky" * leaky + "-plain-mean" * plain_mean
    result = recipes.convert(
        ann,
        out or Path("runs", f"{name}-{threshold}-{bias}{options}-T{steps}"),
        steps=steps,
        weights=weights,
        data=data,
        threshold=threshold,
        bias=bias,
        signed=signed,
        refit=True if refit else False if keep_weights else None,
        leaky=True if leaky else False if plain_mean else None,
        images=images,
        test_images=test_images,
        settings=settings,
        image_size=image_size,
        mean=mean,
        std=std,
        device=device,
    )
    Console().print(result)


def finetune(
    network: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[START]")] = "",
    recipe: Annotated[FinetuneRecipe, tyro.conf.arg(name="")] = FinetuneRecipe(),  # noqa: B008 - frozen
    *,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Train a converted network further: weights, thresholds, biases and initial potentials.

    Conversion gives most of the accuracy at once; a few epochs of training give the rest at few time steps. Gradients
    pass through the spikes (direct, etc, tet), or through the ANN that the spikes correct (proxy), which has no initial
    potentials, so that these stay. Leaves what train leaves, and model.safetensors is again a converted network.

    With --hold-out N the ANN must have been trained with --hold-out N: only those images are new to the network.

    For example:
      ranvier finetune runs/cifar10-resnet20-qcfs8-seed0-mmse-ftbc-T4 --steps 4
      ranvier finetune runs/a-snn --steps 2 --epochs 5 --method proxy --lr 1e-4 --data PATH

    Args:
        network: Folder of a converted network, or its model.safetensors.
        recipe: How to train.
        out: Output folder; by default runs/START-METHOD-STEPS-seed.
        resume: Go on where the run in the output folder stopped; starts it if there is none.
    """
    if network and recipe.start not in ("", network):
        raise ValueError(f"start is given twice, as {network} and as --start {recipe.start}. Pass one of them.")
    train(replace(recipe, start=network or recipe.start), out=out, resume=resume)


def compare(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="{" + ",".join(RECIPES) + "}")],
    *,
    steps: tuple[int, ...] = (1, 2, 4, 8),
    methods: tuple[ComparedMethod, ...] | None = None,
    neurons: tuple[NeuronName, ...] = ("lif", "lifb"),
    seeds: tuple[int, ...] = (0,),
    each: bool = False,
    activation: ActivationName = "qcfs",
    data: str | None = None,
    model: ModelName | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    train_images: int | None = None,
    precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    download: bool = False,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Train and convert one architecture by every method, and score all of them after several numbers of time steps.

    They share data, augmentation, epochs, batch size and optimizer. Leaves results.json, accuracy.png, energy.png,
    report.html and every network in the output folder, and prints the table last.

    For example:
      ranvier compare digits
      ranvier compare fashion-mnist --data PATH_OR_HUB_ID --steps 1 2 4 8 --epochs 5
      ranvier compare fashion-mnist --data PATH --methods etc proxy convert --neurons lifb --seeds 0 1 2
      ranvier compare cifar10 --data PATH --model resnet20 --epochs 20 --out runs/cifar10 --resume

    Args:
        recipe: Data, architecture and training, as of ranvier train.
        steps: Numbers of time steps T.
        methods: Of direct, tet, etc, proxy (trained), convert, signed (converted from an ANN, without and with signed
            spikes) and finetune (converted and trained further for three epochs); by default all that data,
            architecture and steps allow.
        neurons: Of direct, tet and etc.
        seeds: Of initial weights, order, augmentation and calibration images; the table has mean and standard
            deviation.
        each: Train a network for each number of steps, instead of one for the most that is read after fewer.
        activation: Of the ANN that is converted.
        data: Data set instead of that of the recipe.
        model: Architecture instead of that of the recipe; likewise the following.
        epochs: Times the training set is gone through.
        batch_size: Images per update.
        lr: Peak learning rate.
        train_images: Train on so many images only.
        precision: Of convolutions and linear layers.
        device: Where to run; auto takes a GPU if there is one.
        download: Fetch recordings that are missing.
        out: Output folder; by default runs/compare-RECIPE-MODEL.
        resume: Go on where a comparison stopped, or add methods, neurons or seeds to it.
    """
    check_choice("recipe", recipe, tuple(RECIPES))
    asked = {
        "data": data,
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "train_images": train_images,
        "precision": precision,
        "device": device,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    changed = RECIPES[recipe](**changes, **({"download": True} if download else {}))
    comparison = recipes.compare(
        changed,
        out or Path("runs", f"compare-{recipe}-{changed.network.model}"),
        steps=steps,
        methods=methods,
        neurons=neurons,
        seeds=seeds,
        each=each,
        activation=activation,
        resume=resume,
    )
    Console().print(comparison)


def evaluate(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    data: str | None = None,
    steps: int | None = None,
    device: str = "cpu",
    precision: Precision | None = None,
    early_exit: bool = False,
    max_loss: float = MAX_LOSS,
    out: Path | None = None,
) -> None:
    """Evaluate a trained or converted network: accuracy at every time step, firing rate of every layer, energy.

    With --early-exit also what it gives to stop each image at the first step at which the network is sure enough. How
    sure is chosen on images that the recipe held out, or else on training images. The network is surer of those and
    more often right than on new ones, so that more or less than --max-loss may be lost.

    For example:
      ranvier evaluate runs/fashion-mnist-conv4-etc-lif-T4-seed0
      ranvier evaluate model.safetensors --data PATH --steps 8 --out evaluation.json
      ranvier evaluate runs/cifar10-sew-resnet18-etc-lif-T4-seed0 --early-exit --max-loss 0.002

    Args:
        checkpoint: Folder of a run, or its model.safetensors or checkpoint.safetensors.
        data: Data set to use instead of the one on the card.
        steps: Time steps; by default those of training.
        device: cpu or cuda.
        precision: By default that of training; auto takes what is fast here.
        early_exit: Also measure early exit.
        max_loss: Accuracy that early exit may lose where it is chosen, as a share: 0.005 is half a point.
        out: Also write the numbers to this json file, and with --early-exit draw what other thresholds would give, in a
            png file of the same name.
    """
    report = recipes.evaluate(
        checkpoint,
        source=data,
        steps=steps,
        device=device,
        precision=precision,
        early_exit=early_exit,
        max_loss=max_loss,
    )
    if out is not None:
        report.save(out)
        if early_exit:
            picture = out.with_suffix(".png") if out.suffix == ".json" else Path(f"{out}.png")
            report.plot(picture, title=str(checkpoint))
    Console().print(report)


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    format: Literal["nir", "onnx", "torch"] = "nir",
    data: str | None = None,
    steps: int | None = None,
    dt: float = 1e-3,
    strict: bool = False,
    streaming: bool = False,
    images: int = 100,
    out: Path | None = None,
) -> None:
    """Write a trained or converted network to a file for other tools, read it back, and print what is the same.

    Burst neurons are decoupled for NIR first. What NIR cannot say is named, and written as metadata that ranvier reads.
    The receipt is also left beside the file, as FILE.receipt.json.

    For example:
      ranvier export runs/digits-mlp-etc-lifb-T4-seed0 --format nir --dt 1e-3
      ranvier export runs/digits-mlp-etc-lifb-T4-seed0 --format onnx --steps 2
      ranvier export model.safetensors --format onnx --streaming --out one_step.onnx

    Args:
        checkpoint: Folder of a run, or its model.safetensors or checkpoint.safetensors.
        format: nir for neuromorphic tools, onnx for ONNX runtimes, torch for torch.export.
        data: Data set to compare on instead of the one on the card.
        steps: Time steps of the comparison, and of onnx and torch files; by default those of training.
        dt: Seconds of a time step (nir).
        strict: Refuse what NIR cannot say instead of writing it as metadata (nir).
        streaming: Write a single step with explicit state (onnx, torch).
        images: Test images to compare on.
        out: The file; by default model.nir, model.onnx or model.pt2 beside the network.
    """
    receipt = recipes.export(
        checkpoint,
        out,
        format=format,
        source=data,
        steps=steps,
        dt=dt,
        strict=strict,
        streaming=streaming,
        images=images,
    )
    Console().print(receipt)


def energy(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    data: str | None = None,
    steps: int | None = None,
    costs: str = "45nm",
    multiply_accumulate: float | None = None,
    accumulate: float | None = None,
    images: int = 500,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Count what a network computes for an image, layer by layer, and what energy that needs beside its ANN.

    Counted is the network as hardware runs it: normalisation folded, bursts decoupled, an accumulate for every output
    that a spike reaches. The assumptions are printed below the table.

    For example:
      ranvier energy runs/digits-mlp-etc-lifb-T4-seed0
      ranvier energy model.safetensors --data PATH --costs 45nm-int8 --out energy.json
      ranvier energy model.safetensors --multiply-accumulate 1e-12 --accumulate 2e-13

    Args:
        checkpoint: Folder of a run, or its model.safetensors or checkpoint.safetensors.
        data: Data set to use instead of the one on the card.
        steps: Time steps; by default those of training.
        costs: Table of costs, 45nm, 45nm-neurons or 45nm-int8.
        multiply_accumulate: Energy of your own instead [J], with --accumulate.
        accumulate: Energy of an accumulate [J].
        images: Test images to count on.
        device: cpu or cuda.
        out: Also write the numbers to this json file.
    """
    chosen: str | Costs = costs
    if multiply_accumulate is not None or accumulate is not None:
        if multiply_accumulate is None or accumulate is None:
            raise ValueError("Pass both --multiply-accumulate and --accumulate, in joules, or neither.")
        chosen = Costs("yours", multiply_accumulate, accumulate)
    result = recipes.energy(checkpoint, source=data, steps=steps, costs=chosen, images=images, device=device)
    if out is not None:
        result.save(out)
    Console().print(result)


def show(
    path: Annotated[Path, tyro.conf.Positional],
    *,
    data: str | None = None,
    steps: int | None = None,
    index: int = 0,
    out: Path | None = None,
) -> None:
    """Draw a recording of an event camera, or what a spiking network sees and sends for one test image.

    For example:
      ranvier show PATH/Train/0/00002.bin
      ranvier show recording.aedat --steps 20 --out pictures
      ranvier show runs/simulated-digits-dvs-conv4-etc-lif-T10-seed0 --index 3

    Args:
        path: A recording (.bin, .aedat, .dat), or the folder of a run, or its model.safetensors.
        data: Data set to use instead of the one on the card.
        steps: Frames of a recording, 10 by default; or time steps of the network, by default those of training.
        index: Which test image, counted from 0.
        out: Folder for the pictures; by default runs/show/NAME.
    """
    Console(highlight=False).print(str(recipes.show(path, out, source=data, steps=steps, index=index)), soft_wrap=True)


def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Compare neurons, training methods and conversion on the bundled digits, and train on simulated events of them.

    Takes two minutes on two cores and downloads nothing. Prints one table, accuracy at T = 1 .. 4; leaves
    results.json, pictures and report.html in the output folder.

    Args:
        out: Output folder; what it held before is replaced.
        seed: Decides initial weights, order and augmentation.
    """
    Console().print(recipes.demo(out, seed=seed))


def info() -> None:
    """Print versions, devices, and which implementation of the neurons would run and why."""
    import torch

    console = Console(highlight=False)
    for name, version in provenance.versions().items():
        console.print(f"{name:12} {version}")
    console.print(f"{'commit':12} {provenance.commit() or 'none: installed package'}")
    console.print(f"{'cpu':12} {provenance.device_name('cpu')}")
    console.print(f"{'c++':12} {provenance.cpp_compiler() or 'none found'}")
    gpus = [provenance.device_name(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    console.print(f"{'gpu':12} {', '.join(gpus) or 'none'}")
    console.print("neurons")
    for device in ["cpu"] + ["cuda"] * bool(gpus):
        console.print(f"  large inputs: {kernels.explain(device, 2**20)}")
        console.print(f"  small inputs: {kernels.explain(device, 2**9)}")
    console.print(f"convolutions\n  cpu: {kernels.explain_convolutions()}")
    console.print("precision")
    for device in ["cpu"] + ["cuda"] * bool(gpus):
        choice = kernels.choose_precision("auto", device)
        console.print(f"  {device}: {choice.precision} ({choice.reason})")


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "train-ann": train_ann,
    "convert": convert,
    "finetune": finetune,
    "compare": compare,
    "evaluate": evaluate,
    "energy": energy,
    "export": export,
    "show": show,
    "info": info,
}

RESUMABLE = ("train", "train-ann", "finetune", "compare")

CROWDED = (
    "Other programs keep cores busy that threads of this one will wait for, which can make it many times slower. "
    "OMP_WAIT_POLICY=PASSIVE in the environment helps, and so does OMP_NUM_THREADS=1."
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that a user can mend are printed without a traceback."""
    provenance.ask_for_large_pages()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] != ["info"] and not {"-h", "--help"} & set(arguments) and provenance.is_crowded():
        Console(stderr=True).print(CROWDED, highlight=False)
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="ranvier",
            description="Accurate spiking neural networks that answer in one to a few time steps.",
            args=arguments,
            config=(
                tyro.conf.CascadeSubcommandArgs,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.HelptextFromCommentsOff,
            ),
        )
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]error[/]: {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        command = next(iter(arguments), "")
        resumable = "; the same command with --resume goes on from the last checkpoint" * (command in RESUMABLE)
        Console(stderr=True).print(f"stopped{resumable}")
        sys.exit(130)


def _plain(error: BaseException) -> str:
    from rich.markup import escape

    return escape(str(error))
