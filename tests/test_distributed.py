"""Every implementation spread over the ranks of torchrun: right on every rank, then timed by the slowest."""

import pytest

pytestmark = pytest.mark.distributed(strategy="tensor")


def test_tensor_parallel(case, form, problem, spreads, benchmark):
    spreads.measure(case, form, problem, benchmark)


@pytest.mark.direction("backward")
def test_tensor_parallel_backward(case, form, problem, spreads, benchmark):
    spreads.measure(case, form, problem, benchmark)


@pytest.mark.direction("backward")
def test_tensor_parallel_gradients(case, form, problem, spreads):
    errors = spreads.gradient_errors(case, form, problem)
    assert max(errors.values()) <= 1, f"{case.implementation.name}: {errors} × the budget"
