"""The main job: every implementation on every workload, checked, then timed in CUDA-synchronised pedantic rounds."""


def test_forward(case, problem, suite, benchmark):
    suite.measure(case, problem, benchmark)
