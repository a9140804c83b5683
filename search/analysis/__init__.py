"""Analyses of a search: baselines, paired comparisons, conclusions and validations.

This package also forecasts what a search will cost and measures how long a training takes.
"""
