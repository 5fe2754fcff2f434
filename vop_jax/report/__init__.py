"""Finished runs beside each other: a table, plots, a page."""

from vop_jax.report.runs import Run as Run
from vop_jax.report.runs import grouped as grouped
from vop_jax.report.runs import markdown as markdown
from vop_jax.report.runs import read_run as read_run
