"""What the results of a search mean: baselines, paired comparisons, conclusions, validations.

It also forecasts what a search will cost and measures how long a training takes.
"""
