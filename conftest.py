"""What holds for all tests, those in docstrings included."""

pytest_plugins = ["extras"]
