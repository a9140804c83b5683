"""How the primitives are computed, one file each beside its spec one folder up."""
