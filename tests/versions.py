"""The core on the lowest and on the newest torch and timm, by ``make test-versions``, which writes docs/versions.md.

Each has an environment of its own, which stays: the core's dependencies, the command's, and what runs tests.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from packaging.requirements import Requirement

from coconv_surgery.bench.report import cpu_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
TOOLS = ("filelock", "hypothesis", "mlxtend", "packaging", "pytest", "pyyaml", "safetensors", "scipy")
# What needs torch and timm alone; a file that needs more says so, and is skipped.
TESTS = (
    *("tests/layers", "tests/tracing", "tests/planning", "tests/calibration", "tests/zoo"),
    *("tests/test_all_or_nothing.py", "tests/test_merging.py", "tests/test_surgery.py"),
)
VERSIONS = "import platform, torch, timm; print(platform.python_version(), torch.__version__, timm.__version__)"
TABLE = """| | Python | torch | timm | passed | failed | known to fail | skipped |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
START, END = "<!-- table -->\n", "<!-- end -->\n"


class Counts(NamedTuple):
    """Tests by what became of them."""

    passed: int
    failed: int
    known_to_fail: int
    skipped: int


def core() -> list[Requirement]:
    """What `import coconv_surgery` needs, as pyproject.toml has it."""
    (line,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', line)]


def lowest() -> list[str]:
    return [str(requirement).replace(">=", "==") + ".*" for requirement in core()]


def newest() -> list[str]:
    return [requirement.name for requirement in core()]


def environment(name: str, requirements: list[str]) -> Path:
    """The interpreter of an environment that has these, made or brought up to date."""
    folder = ROOT / f".venv-{name}"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--editable", f"{ROOT}[cli]"]
    subprocess.run([*install, *TOOLS, *requirements], check=True)
    return python


def run(python: Path, tests: list[str]) -> Counts:
    """Run tests in one process; what they print is kept in the environment."""
    report, log = python.parents[1] / "report.xml", python.parents[1] / "tests.log"
    command = [python, "-m", "pytest", "-q", "--show-capture=no", f"--junitxml={report}", *tests]
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, check=False, stdout=output, stderr=subprocess.STDOUT)
    (suite,) = ElementTree.parse(report).getroot()
    tests_, failures, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    known = len(suite.findall(".//skipped[@type='pytest.xfail']"))
    return Counts(tests_ - failures - errors - skipped, failures + errors, known, skipped - known)


def row(name: str, python: Path, counts: Counts) -> str:
    """A line of the table."""
    versions = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.split()
    return f"| {name} | {' | '.join((*versions, *map(str, counts)))} |\n"


def main() -> None:
    """Run both side by side, print the table and put it into the page, in place of the one before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS, help="what to run instead of all tests of the core")
    tests = list(parser.parse_args().tests)
    pythons = [environment(name, requirements) for name, requirements in CHOICES.items()]
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(run, pythons, [tests] * len(pythons)))
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    shown = ", ".join(f"`{test}`" for test in tests)
    rows = "".join(map(row, CHOICES, pythons, results))
    table = f"{machine}. Of {shown}:\n\n{TABLE}{rows}"
    print(table)
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}{table}{END}{rest.partition(END)[2]}")
    sys.exit(any(counts.failed for counts in results))


CHOICES = {"lowest": lowest(), "newest": newest()}

if __name__ == "__main__":
    main()
