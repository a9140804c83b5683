"""Statistics that are independent of models: paired differences and Pareto fronts."""
