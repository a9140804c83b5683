"""Reports: cost receipts, the outline of a model, differences of specs, memory, the catalogue.

Each function returns data or tables that rich can render; only the command line prints them.
"""
