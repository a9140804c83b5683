"""The torch modules of the blocks; the spec of each is in the file of the same name above."""
