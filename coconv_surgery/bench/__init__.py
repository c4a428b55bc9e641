"""How fast contextual convolution is beside the plain one, and what surgery costs."""
