"""What people read: tables of costs, the outline of a model, differences, memory, the catalogue.

Each function returns data or renderable tables; only the command line prints.
"""
