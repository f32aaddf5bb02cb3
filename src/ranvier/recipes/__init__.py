"""Recipes: typed functions that return every setting of one training, and the run that carries it out."""

from ranvier.recipes.cifar10 import cifar10, cifar10_ann, cifar10_ann_full, cifar10_sprint
from ranvier.recipes.compare import compare
from ranvier.recipes.comparison import Comparison, Outcome
from ranvier.recipes.convert import ConversionResult, convert
from ranvier.recipes.demo import demo
from ranvier.recipes.digits import digits, digits_ann
from ranvier.recipes.evaluate import Evaluation, energy, evaluate
from ranvier.recipes.events import (
    dvs_cifar10,
    dvs_gesture,
    ncaltech101,
    nmnist,
    simulated_cifar10_dvs,
    simulated_digits_dvs,
    simulated_fashion_mnist_dvs,
)
from ranvier.recipes.export import export
from ranvier.recipes.fashion_mnist import fashion_mnist, fashion_mnist_ann, fashion_mnist_full, fashion_mnist_proxy
from ranvier.recipes.hub import from_pretrained, push_to_hub
from ranvier.recipes.network import AnnSettings, NetworkSettings, ProxySettings
from ranvier.recipes.recipe import (
    AnnRecipe,
    EventRecipe,
    EventSettings,
    FinetuneRecipe,
    Recipe,
    SimulatedEventRecipe,
    TrainingRecipe,
)
from ranvier.recipes.run import Result, run
from ranvier.recipes.show import Shown, show
from ranvier.recipes.trained import InputFormat, Trained, load_data, load_trained

__all__ = [
    "AnnRecipe",
    "AnnSettings",
    "Comparison",
    "ConversionResult",
    "Evaluation",
    "EventRecipe",
    "EventSettings",
    "FinetuneRecipe",
    "InputFormat",
    "NetworkSettings",
    "Outcome",
    "ProxySettings",
    "Recipe",
    "Result",
    "Shown",
    "SimulatedEventRecipe",
    "Trained",
    "TrainingRecipe",
    "cifar10",
    "cifar10_ann",
    "cifar10_ann_full",
    "cifar10_sprint",
    "compare",
    "convert",
    "demo",
    "digits",
    "digits_ann",
    "dvs_cifar10",
    "dvs_gesture",
    "energy",
    "evaluate",
    "export",
    "fashion_mnist",
    "fashion_mnist_ann",
    "fashion_mnist_full",
    "fashion_mnist_proxy",
    "from_pretrained",
    "load_data",
    "load_trained",
    "ncaltech101",
    "nmnist",
    "push_to_hub",
    "run",
    "show",
    "simulated_cifar10_dvs",
    "simulated_digits_dvs",
    "simulated_fashion_mnist_dvs",
]
