"""May a convolution be split, over how many levels, and the plan of it all."""
