"""Pictures and pages from results."""

from ranvier.report.events import draw_frames, draw_recording
from ranvier.report.page import Section, write_page
from ranvier.report.plots import accuracy_curves, conversion_errors, early_exit_curve, energy_curves, spike_raster

__all__ = [
    "Section",
    "accuracy_curves",
    "conversion_errors",
    "draw_frames",
    "draw_recording",
    "early_exit_curve",
    "energy_curves",
    "spike_raster",
    "write_page",
]
