"""Results of runs, side by side: tables, plots, and one page that holds them."""

from experiments.report.page import write_report as write_report
from experiments.report.runs import Run as Run
from experiments.report.runs import Summary as Summary
from experiments.report.runs import load_run as load_run
from experiments.report.studies import write_study as write_study
from experiments.report.tables import terminal_table as terminal_table
