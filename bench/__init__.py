"""Measurements: run.py times, report.py writes the tables, results/ holds what was measured.

Not part of the installed package. Run from the repository: `python -m bench.run --suite cpu`.
"""
