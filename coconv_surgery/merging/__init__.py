"""Levels survive structural reparameterisation, or it is refused.

Blocks as RepVGG's, MobileOne's and RepViT's merge parallel branches, or a convolution and its norm, into one new
convolution for inference. The levels of contextual branches carry over to it where the branches agree: a 1×1
convolution, an identity and a norm act on the centre of the kernel, which all levels share. What the block returns
before and after is compared, or the kernels are where it cannot be run, and a merge that would not compute the same is
refused, such as one of a contextual 3×3 branch and a 7×7 one.

A block that holds contextual convolutions and can merge is switched to a class that sees to this, on that instance, as
a convolution is; no class that others use is changed. Levels carry over in a call of a merging method of the block. A
merge in any other way (through the class, in a property, a generator, a coroutine, a script) is refused by what it
ends in: a plain convolution that takes the place of a contextual one in such a block.
"""

from coconv_surgery.merging.blocks import keep_levels_in_merges as keep_levels_in_merges
