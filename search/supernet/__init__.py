"""One training that serves all depths and capacities of a layout (``--strategy shared``)."""
