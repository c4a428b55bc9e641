"""ProGAN and CoProGAN, trained and measured: Tables 2 and 7.

A config imports :mod:`coconv_surgery.generation.training`, which registers what it names with MMEngine; the other
modules do without that.
"""
