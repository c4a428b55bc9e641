"""A page about the conversion of one network."""
