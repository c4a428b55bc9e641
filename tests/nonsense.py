"""What nobody means to give, and the check that it is taken or refused in words of the package's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

import coconv_surgery

PACKAGE = str(Path(coconv_surgery.__file__).parent)
# Made anew for every use: a generator is used up.
NONSENSE = {
    "None": lambda: None,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "x": lambda: "x",
    "": lambda: "",
    "bytes": lambda: b"x",
    "[]": lambda: [],
    "[None]": lambda: [None],
    "{}": lambda: {},
    "{1: 2}": lambda: {1: 2},
    "object": object,
    "class": lambda: int,
    "generator": lambda: (each for each in (1, "x")),
    "array": lambda: np.array(2),
    "array of 2": lambda: np.array([1.5, 2]),
    "tensor": lambda: torch.tensor(2),
    "10**30": lambda: 10**30,
    "True": lambda: True,
}


def check(call, name, value, taken):
    """Check that a call takes a value if it should, and else says what is wrong with the argument of that name."""
    if taken:
        call(value)
        return
    with pytest.raises((OSError, TypeError, ValueError), match=rf"\b{name}\b") as error:
        call(value)
    assert str(error.traceback[-1].path).startswith(PACKAGE), "raised from deep inside"
