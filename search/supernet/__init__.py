"""Supernets: one training serves all depths and capacities of a layout (``--strategy shared``)."""
