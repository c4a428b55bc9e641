"""The ``coconv`` command."""

import sys


def main() -> None:
    """Run the command; a user's mistake ends with one message and exit code 1, a wrong call with 2."""
    try:
        from coconv_surgery.cli.commands import app

        app()
    except ModuleNotFoundError as error:
        sys.exit(f"coconv: {error}: pip install 'coconv-surgery[viz,mmdet,sweep]'")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"coconv: {error}")
