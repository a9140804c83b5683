"""Measure how good a trained model is.

Held-out loss, sweeps of the compute dial and tasks of lm-evaluation-harness. FLOPs are those that
were executed. ``archdsl.evaluate`` is the public function.
"""
