"""``python -m coconv_surgery`` is the ``coconv`` command, as ``torchrun -m`` wants it."""

from coconv_cli import main

main()
