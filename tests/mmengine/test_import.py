"""What importing the part that needs mmengine alone does."""

import pytest
from launching import python
from mmengine.registry import HOOKS, DefaultScope

from coconv_surgery.mmengine import CoConvPlanHook


def test_neither_mmdet_nor_mmcv_is_imported():
    code = "import sys, coconv_surgery.mmengine, coconv_surgery.classification\n"
    found = python(code + "print([name for name in ('mmengine', 'mmcv', 'mmdet') if name in sys.modules])").stdout
    assert found == "['mmengine']\n"


def test_without_mmengine_it_says_what_to_install():
    process = python("import coconv_surgery.mmengine", mmengine=None)
    message = "coconv_surgery.mmengine needs mmengine: pip install 'coconv-surgery[mmdet]', or [generation]"
    assert process.stderr.strip().splitlines()[-1] == f"ImportError: {message}"


@pytest.mark.parametrize("scope", ["mmengine", "mmdet"])
def test_the_hook_is_found_from_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert type(HOOKS.build({"type": "CoConvPlanHook"})) is CoConvPlanHook


def test_importing_it_anew_is_no_error():
    code = (
        "import importlib, coconv_surgery.mmengine as part\n"
        "importlib.reload(part.hooks)\n"
        "print(importlib.reload(part).CoConvPlanHook is part.hooks.CoConvPlanHook)"
    )
    assert python(code).stdout == "True\n"
