"""Contextual convolution for the networks you already have."""
