"""How good a trained model is: held-out loss, the compute dial, and lm-evaluation-harness tasks.

``evaluate`` is the public function. FLOPs are those that were executed.
"""
