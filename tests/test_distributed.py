"""Every implementation spread over the ranks of torchrun: right on every rank, then timed by the slowest."""

import pytest

from attn_impls.parallel import Form
from attn_impls.parallel.tensor import Core

pytestmark = pytest.mark.distributed(strategy="tensor")


def test_tensor_parallel(case, form, problem, spreads, benchmark):
    spreads.measure(case, form, problem, benchmark)


def test_tensor_parallel_gradients(case, problem, spreads):
    errors = spreads.gradient_errors(case, Form("core", Core), problem)
    assert max(errors.values()) <= 1, f"{case.implementation.name}: {errors} × the budget"
