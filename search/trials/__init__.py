"""One trial: the proxy that stands for a model, its training, its scores and their storage."""
