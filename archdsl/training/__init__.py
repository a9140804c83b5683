"""Train models: the settings, the training loop, checkpoints after every interruption, progress.

``archdsl.train`` is the public function. The learning-rate schedule is in
`archdsl.training.config`, the optimizer and one training step are in `archdsl.training.trainer`.
"""
