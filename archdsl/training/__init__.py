"""Training: the settings, the loop, checkpoints that a crash cannot harm, and progress.

``train`` is the public function. The learning-rate schedule is in `archdsl.training.config`.
"""
