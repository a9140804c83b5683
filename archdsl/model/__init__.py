"""A spec as a torch model: building it, saving it, dialling it, and measuring what it executed.

``build`` is the public function. The model meets blocks only through the protocols of `archdsl.nn`.
"""
