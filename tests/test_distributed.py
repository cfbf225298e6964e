"""Every implementation spread over the ranks of torchrun: right on every rank, then timed by the slowest."""

import pytest

pytestmark = pytest.mark.distributed(strategy="tensor")


def test_tensor_parallel(case, form, problem, spreads, benchmark):
    spreads.measure(case, form, problem, benchmark)
