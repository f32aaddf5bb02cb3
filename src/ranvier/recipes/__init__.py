"""Recipes: typed functions that return every setting of one training, and the run that carries it out."""

from ranvier.recipes.cifar10 import cifar10, cifar10_ann, cifar10_ann_full
from ranvier.recipes.convert import ConversionResult, convert
from ranvier.recipes.demo import Demo, demo
from ranvier.recipes.digits import digits, digits_ann
from ranvier.recipes.evaluate import Evaluation, energy, evaluate
from ranvier.recipes.export import export
from ranvier.recipes.fashion_mnist import fashion_mnist, fashion_mnist_ann, fashion_mnist_full, fashion_mnist_proxy
from ranvier.recipes.hub import from_pretrained, push_to_hub
from ranvier.recipes.network import AnnSettings, NetworkSettings, ProxySettings
from ranvier.recipes.recipe import AnnRecipe, FinetuneRecipe, Recipe, TrainingRecipe
from ranvier.recipes.run import InputFormat, Result, Trained, load_data, load_trained, run

__all__ = [
    "AnnRecipe",
    "AnnSettings",
    "ConversionResult",
    "Demo",
    "Evaluation",
    "FinetuneRecipe",
    "InputFormat",
    "NetworkSettings",
    "ProxySettings",
    "Recipe",
    "Result",
    "Trained",
    "TrainingRecipe",
    "cifar10",
    "cifar10_ann",
    "cifar10_ann_full",
    "convert",
    "demo",
    "digits",
    "digits_ann",
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
    "push_to_hub",
    "run",
]
