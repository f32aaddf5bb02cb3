"""Measures: accuracy by time step, early exit, firing rates, operations and energy."""

from ranvier.evaluation.accuracy import AccuracyByStep, accuracy_by_step, score_by_step
from ranvier.evaluation.activity import Activity, LayerActivity, firing_rates, record_spikes
from ranvier.evaluation.early_exit import EarlyExit, ExitCurve, Exits, early_exit
from ranvier.evaluation.energy import COSTS, Costs, Energy, energy
from ranvier.evaluation.operations import LayerOperations, NeuronOperations, Operations, count_operations
from ranvier.evaluation.streaming import Answers, run_until_confident

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
