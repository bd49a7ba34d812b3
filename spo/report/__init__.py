"""The report of a run: one self-contained HTML page, PNG plots, and the headline as JSON."""

from spo.report.write import write_report

__all__ = ["write_report"]
