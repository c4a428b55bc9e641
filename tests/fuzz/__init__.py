"""Random networks, random operations on them, and what has to hold after each."""
