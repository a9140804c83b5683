"""Makes exported models known to transformers: ``import archdsl.hub``, then ``from_pretrained``
loads them without remote code."""

from archdsl.interop.hf_model import ArchdslConfig, ArchdslForCausalLM

__all__ = ["ArchdslConfig", "ArchdslForCausalLM"]
