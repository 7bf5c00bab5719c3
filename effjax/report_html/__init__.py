"""The before/after report as one self-contained HTML page: a function of the same data that report.json holds."""

from effjax.report_html.page import render as render
