"""Tests of an extra that is not installed are left out, and the summary says so; with ``--all-extras`` they fail.

A plugin, as pytest asks no conftest.py about a folder whose own cannot be imported.
"""

import pytest

# Of the extras that `.[test]` does not bring.
PACKAGES = {"mmcv", "mmdet", "mmengine", "pebble", "torch_fidelity", "torchmetrics", "transformers"}
left_out: dict[str, str] = {}


def pytest_addoption(parser):
    parser.addoption("--all-extras", action="store_true", help="leave out no tests, whatever is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    call = getattr(report, "call", None)  # a plugin may have made the report
    package = missing(call.excinfo.value) if call is not None and call.excinfo else None
    if package and not collector.config.getoption("all_extras"):
        left_out[str(collector.path)] = package
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), None, f"left out, as {package} is not installed")
    return report


def missing(error: BaseException | None) -> str | None:
    """The package whose lack an error comes from."""
    while error is not None:
        if isinstance(error, ImportError):
            package = (error.name or "").partition(".")[0]
            if package in PACKAGES:
                return package
            if error.path in left_out:  # half imported already
                return left_out[error.path]
        # A conftest.py that cannot be imported is an error that holds the error.
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
