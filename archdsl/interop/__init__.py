"""Exchange models with other software.

Export checkpoints as folders that transformers loads, import weights of the LLaMA family from
transformers folders and GGUF files, and add thinking steps to a trained model (retrofit).
"""
