"""Recipes: typed functions that return every setting of one training, and the run that carries it out."""

from ranvier.recipes.cifar10 import cifar10
from ranvier.recipes.demo import Demo, demo
from ranvier.recipes.digits import digits
from ranvier.recipes.fashion_mnist import fashion_mnist, fashion_mnist_full
from ranvier.recipes.network import NetworkSettings
from ranvier.recipes.recipe import Recipe
from ranvier.recipes.run import Evaluation, InputFormat, Result, Trained, evaluate, load_data, load_trained, run

__all__ = [
    "Demo",
    "Evaluation",
    "InputFormat",
    "NetworkSettings",
    "Recipe",
    "Result",
    "Trained",
    "cifar10",
    "demo",
    "digits",
    "evaluate",
    "fashion_mnist",
    "fashion_mnist_full",
    "load_data",
    "load_trained",
    "run",
]
