"""The main job: every implementation on every workload, checked, then timed in CUDA-synchronised pedantic rounds."""

import pytest


def test_forward(case, problem, suite, benchmark):
    suite.measure(case, problem, benchmark)


@pytest.mark.direction("backward")
def test_backward(case, problem, suite, benchmark):
    suite.measure(case, problem, benchmark)


@pytest.mark.direction("forward+backward")
def test_forward_backward(case, problem, suite, benchmark):
    suite.measure(case, problem, benchmark)
