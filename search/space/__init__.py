"""What may be drawn: the search space, what of it can fit the budget, and the objectives."""
