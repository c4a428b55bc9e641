"""Contextual convolution: the operation, the module, its levels, and the switch of a class in place."""
