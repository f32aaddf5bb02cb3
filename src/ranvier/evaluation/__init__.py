"""Measures: accuracy by time step, early exit, firing rates, operations and energy."""

from ranvier.evaluation.accuracy import AccuracyByStep, accuracy_by_step, score_by_step
from ranvier.evaluation.activity import Activity, LayerActivity, firing_rates, record_spikes
from ranvier.evaluation.early_exit import Answers, EarlyExit, ExitCurve, Exits, early_exit, run_until_confident
from ranvier.evaluation.energy import COSTS, Costs, Energy, energy
from ranvier.evaluation.operations import LayerOperations, NeuronOperations, Operations, count_operations

__all__ = [
    "COSTS",
    "AccuracyByStep",
    "Activity",
    "Answers",
    "Costs",
    "EarlyExit",
    "Energy",
    "ExitCurve",
    "Exits",
    "LayerActivity",
    "LayerOperations",
    "NeuronOperations",
    "Operations",
    "accuracy_by_step",
    "count_operations",
    "early_exit",
    "energy",
    "firing_rates",
    "record_spikes",
    "run_until_confident",
    "score_by_step",
]
