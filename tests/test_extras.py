"""Without the packages of other extras, pytest collects what `.[test]` can run, and names the rest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from extras import PACKAGES

HIDE = f"import sys\nsys.modules |= dict.fromkeys({sorted(PACKAGES)})\n"


@pytest.mark.long
@pytest.mark.parametrize(("options", "code"), [((), 0), (("--all-extras",), 2)])
def test_what_needs_another_extra_is_left_out_by_name(tmp_path, options, code):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-2000:]
    named = re.search(r"tests/mmdet: left out, as mm\w+ is not installed", done.stdout)
    assert (named is not None) == (code == 0)
