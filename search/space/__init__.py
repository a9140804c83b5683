"""The search space, the part of it that fits the budget, and the objectives of a search."""
