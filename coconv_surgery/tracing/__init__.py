"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""
