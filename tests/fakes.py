"""Stand-ins that several test files share."""


class Rounds:
    """pytest-benchmark's fixture reduced to its rounds: the same calls in the same order, nothing recorded."""

    enabled, has_error = True, False

    def pedantic(self, target, setup, teardown, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()
            teardown()


MACHINE = {"cpu": {"brand_raw": "Fake CPU"}, "gpu": None, "torch": "2.13.0", "cuda": None, "cudnn": None, "driver": None}
WORKLOAD = "b1-h2-s128-d64-bf16"


def saved_case(name, seconds=1e-3, paired=None, workload=WORKLOAD, direction="forward", ceiling=1.0, throttled=False, **more):
    """pytest-benchmark's dict of a case, as far as comparisons read it; paired: its vs_sdpa."""
    info = {"workload": workload, "implementation": name, "direction": direction, "vs_sdpa": paired, "dtype": "bf16"}
    info |= {"ceiling_tflops": ceiling, "sm_clock_unsteady": throttled} | more
    return {
        "fullname": f"tests/test_benchmark.py::test_{direction}[{workload}-{name}]",
        "stats": {"median": seconds},
        "extra_info": info,
    }


def saved_run(*cases, **machine):
    """pytest-benchmark's JSON document of a run."""
    commit = {"id": "0123456789abcdef"}
    return {
        "machine_info": MACHINE | machine,
        "commit_info": commit,
        "datetime": "2026-11-25T04:00:00",
        "benchmarks": list(cases),
    }
