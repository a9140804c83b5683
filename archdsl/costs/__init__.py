"""Costs of a model in closed form and without torch: parameters, FLOPs, cache and memory.

Each block adds its sizes to a `Bill`, and `archdsl.cost` turns the bill of a model into a
`Receipt`. The tests compare the results with counts on the meta device and with measured memory.
"""
