"""Pictures and pages from results."""

from ranvier.report.page import Section, write_page
from ranvier.report.plots import accuracy_curves, spike_raster

__all__ = ["Section", "accuracy_curves", "spike_raster", "write_page"]
