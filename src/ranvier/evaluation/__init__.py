"""Measures: accuracy by time step, firing rates."""

from ranvier.evaluation.accuracy import AccuracyByStep, accuracy_by_step, score_by_step
from ranvier.evaluation.activity import Activity, LayerActivity, firing_rates, record_spikes

__all__ = [
    "AccuracyByStep",
    "Activity",
    "LayerActivity",
    "accuracy_by_step",
    "firing_rates",
    "record_spikes",
    "score_by_step",
]
