"""The core on the lowest and on the newest torch and timm, by ``make test-versions``, which writes docs/versions.md.

Each has an environment of its own, which stays: the core dependencies, what runs tests, and nothing of the extras.
"""

import argparse
import platform
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
TOOLS = ("filelock", "hypothesis", "mlxtend", "packaging", "pytest", "pytest-xdist", "pyyaml", "safetensors", "scipy")
# What needs torch and timm alone; a file that needs more says so, and is skipped.
TESTS = (
    *("tests/layers", "tests/tracing", "tests/planning", "tests/calibration", "tests/zoo"),
    *("tests/test_all_or_nothing.py", "tests/test_merging.py", "tests/test_surgery.py"),
)
VERSIONS = "import platform, torch, timm; print(platform.python_version(), torch.__version__, timm.__version__)"
TABLE = """| | Python | torch | timm | passed | failed | skipped | tests |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


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
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--editable", ROOT, *TOOLS, *requirements]
    subprocess.run(install, check=True)
    return python


def run(python: Path, tests: list[str]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    report = python.parents[1] / "report.xml"
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot()[0]
    count = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}


def row(name: str, requirements: list[str], tests: list[str]) -> tuple[str, int]:
    """A line of the table, and how many failed."""
    python = environment(name, requirements)
    counts = run(python, tests)
    versions = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.split()
    shown = ", ".join(test.removeprefix("tests/") for test in tests)
    return f"| {name} | {' | '.join((*versions, *map(str, counts.values()), shown))} |", counts["failed"]


def main() -> None:
    """Run both, print the table and put it into the page, in place of the one before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS, help="what to run instead of all tests of the core")
    tests = list(parser.parse_args().tests)
    rows, failures = zip(*(row(name, wanted, tests) for name, wanted in CHOICES.items()), strict=True)
    table = f"{platform.machine()}, {platform.system()}:\n\n{TABLE}" + "\n".join(rows) + "\n"
    print(table)
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    PAGE.write_text(f"{before}<!-- table -->\n{table}<!-- end -->\n{rest.partition('<!-- end -->' + chr(10))[2]}")
    sys.exit(any(failures))


CHOICES = {"lowest": lowest(), "newest": newest()}

if __name__ == "__main__":
    main()
