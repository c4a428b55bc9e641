"""The wheel and the sdist, each installed alone into an environment that has the core dependencies and nothing else."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SMOKE = """
import importlib.util
import timm
import coconv_surgery as cs
import coconv_surgery.cli

for other in ("matplotlib", "mmengine", "mmdet", "onnx", "pytest"):
    assert importlib.util.find_spec(other) is None, other
model = timm.create_model("resnet18")
plain = {name: type(module) for name, module in model.named_modules()}
cs.convert(model)
print(cs.get_plan(model).table())
print(cs.get_plan(model).summary())
cs.revert(model)
assert {name: type(module) for name, module in model.named_modules()} == plain
print(cs.__version__, cs.__file__)
"""


def build(folder: Path, source: Path, *kinds: str) -> None:
    """Build distributions of a source tree by the tools that are installed, without a network."""
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", folder, source]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(folder, ROOT, "--sdist", "--wheel")
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(built) -> Path:
    sdist = next(built.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(built, filter="data")
    return built / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def rebuilt(unpacked) -> Path:
    build(unpacked / "dist", unpacked, "--wheel")
    return next((unpacked / "dist").glob("*.whl"))


def needed(name: str, found: dict[str, Path]) -> dict[str, Path]:
    """What a distribution puts at the top of site-packages, and what all that it needs without extras does."""
    for requirement in map(Requirement, distribution(name).requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            top = {file.parts[0] for file in distribution(requirement.name).files or ()} - {"..", "__pycache__"}
            new = {part: Path(distribution(requirement.name).locate_file(part)) for part in top}
            if not new.keys() <= found.keys():
                found.update(new)
                needed(requirement.name, found)
    return found


@pytest.fixture
def empty(tmp_path) -> Path:
    """The interpreter of an environment that sees the core dependencies, by links, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for name, path in needed("coconv-surgery", {}).items():
        (packages / name).symlink_to(path)
    return tmp_path / "venv" / "bin" / "python"


def install(wheel: Path, python: Path) -> None:
    options = ("--quiet", "--no-index", "--no-deps")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True)


def test_the_wheel_works_alone_in_an_environment_of_core_dependencies(wheel, empty, tmp_path):
    install(wheel, empty)
    smoke = subprocess.run([empty, "-I", "-c", SMOKE], capture_output=True, text=True, cwd=tmp_path)
    assert smoke.returncode == 0, smoke.stderr
    assert "20 convs: 12 converted" in smoke.stdout
    version, file = smoke.stdout.splitlines()[-1].split()
    assert wheel.name.startswith(f"coconv_surgery-{version}-")
    assert Path(file).is_relative_to(tmp_path)


def test_the_command_alone_says_what_it_needs(wheel, empty, tmp_path):
    install(wheel, empty)
    # Recent versions of what timm needs bring click along.
    next(tmp_path.glob("venv/lib/python*/site-packages")).joinpath("click").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [empty.with_name("coconv"), "plan", "resnet18"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "coconv: click is not installed: pip install 'coconv-surgery[cli]'\n"


def test_the_wheel_holds_the_package_its_types_configs_and_licence_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    information = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"coconv_cli", "coconv_surgery", information}
    assert {"coconv_surgery/py.typed", f"{information}/licenses/LICENSE"} <= set(names)
    assert "coconv_surgery/reporting/page.html" in names
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    assert {f"coconv_surgery/.mim/{config}" for config in configs} <= set(names)


def test_the_sdist_holds_what_tests_and_readers_need(unpacked):
    for name in ("README.md", "LICENSE", "CITATION.cff", "Makefile", "constraints.txt", "tests/conftest.py", "docs"):
        assert (unpacked / name).exists(), name


def test_the_sdist_builds_the_same_wheel(rebuilt, wheel):
    assert rebuilt.read_bytes() == wheel.read_bytes()
