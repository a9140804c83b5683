"""Statistics without any knowledge of models: paired differences and Pareto fronts."""
