"""A pytest plugin of the installed package: says why options are unknown when a file outside this folder follows `--impl`.

pytest takes what follows an option that it does not know yet for a test file, and looks for pytest.ini and conftest.py there.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    for option, value in pairwise(args):
        if option == "--impl" and Path(value).exists() and early_config.inipath is None and Path("pytest.ini").exists():
            raise pytest.UsageError(
                f"--impl {value}: pytest takes a file of another folder for a test there; write --impl={value}, with an ="
            )
