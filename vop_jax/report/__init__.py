"""Comparison of finished runs: a table, plots, a page, and the paper's results."""

from vop_jax.report.runs import FinishedRun as FinishedRun
from vop_jax.report.runs import grouped as grouped
from vop_jax.report.runs import markdown as markdown
from vop_jax.report.runs import read_run as read_run
