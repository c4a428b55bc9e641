"""Tables and figures from the logs."""


def write_report() -> None:
    """Write the page."""
