"""All recipes that come with ranvier, by name."""

from ranvier.recipes.cifar10 import cifar10, cifar10_ann, cifar10_ann_full, cifar10_sprint
from ranvier.recipes.digits import digits, digits_ann
from ranvier.recipes.events import (
    dvs_cifar10,
    dvs_gesture,
    ncaltech101,
    nmnist,
    simulated_cifar10_dvs,
    simulated_digits_dvs,
    simulated_fashion_mnist_dvs,
)
from ranvier.recipes.fashion_mnist import fashion_mnist, fashion_mnist_ann, fashion_mnist_full, fashion_mnist_proxy

RECIPES = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-full": fashion_mnist_full,
    "fashion-mnist-proxy": fashion_mnist_proxy,
    "cifar10": cifar10,
    "cifar10-sprint": cifar10_sprint,
    "nmnist": nmnist,
    "dvs-cifar10": dvs_cifar10,
    "ncaltech101": ncaltech101,
    "dvs-gesture": dvs_gesture,
    "simulated-digits-dvs": simulated_digits_dvs,
    "simulated-fashion-mnist-dvs": simulated_fashion_mnist_dvs,
    "simulated-cifar10-dvs": simulated_cifar10_dvs,
}
"""Of spiking networks, by the names that the command line has for them."""

ANN_RECIPES = {
    "digits": digits_ann,
    "fashion-mnist": fashion_mnist_ann,
    "cifar10": cifar10_ann,
    "cifar10-full": cifar10_ann_full,
}
"""Of ANNs to convert."""
