"""The ``coconv`` command.

It is beside :mod:`coconv_surgery` rather than within it, so that help and completion do not wait for torch: what a
command needs of the library, it imports when it runs.
"""

import sys


def main() -> None:
    """Run the command; a user's mistake ends with one message and exit code 1, a wrong call with 2."""
    try:
        from coconv_cli.app import app
    except ModuleNotFoundError as error:
        sys.exit(f"coconv: {error.name} is not installed: pip install 'coconv-surgery[cli]'")
    app(prog_name="coconv")
