"""Training: one loop, its loss functions, optimizer, checkpoints."""

from ranvier.training.checkpoints import Progress, load_checkpoint, read_progress, save_checkpoint
from ranvier.training.direct import DirectLoss
from ranvier.training.loop import (
    CHECKPOINT,
    Execution,
    autocast,
    channels_last,
    end_processes,
    fit,
    lay_out,
    start_processes,
)
from ranvier.training.optimization import Optimization
from ranvier.training.proxy import (
    PUBLISHED_FORM,
    PUBLISHED_LOSS,
    ProxyForm,
    ProxyLoss,
    proxy_network,
)

__all__ = [
    "CHECKPOINT",
    "PUBLISHED_FORM",
    "PUBLISHED_LOSS",
    "DirectLoss",
    "Execution",
    "Optimization",
    "Progress",
    "ProxyForm",
    "ProxyLoss",
    "autocast",
    "channels_last",
    "end_processes",
    "fit",
    "lay_out",
    "load_checkpoint",
    "proxy_network",
    "read_progress",
    "save_checkpoint",
    "start_processes",
]
