"""What the ``coconv`` command does, without the command line itself, which is :mod:`coconv_cli`."""
