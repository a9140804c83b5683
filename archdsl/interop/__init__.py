"""Models that come in from elsewhere and go out: transformers, GGUF, and retrofitting.

Checkpoints are exported as folders that transformers loads; weights of the LLaMA family are
imported; thinking steps are added to a trained model.
"""
