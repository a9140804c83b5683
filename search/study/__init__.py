"""The study: trials in an Optuna storage, their sampling, their records and what was spent."""
