"""What a model costs, in closed form and without torch: parameters, FLOPs, cache and memory.

Each block adds its sizes to a `Bill`; `cost` turns the bill of a whole model into a `Receipt`.
Checked against counts on the meta device and against measured memory in the tests.
"""
