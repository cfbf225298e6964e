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


HEADER = {  # of a journal, and of what it becomes
    "machine_info": {"machine": "x86_64", "cpu": {"brand_raw": "Fake CPU"}, "device": "cpu", "torch": "2.13.0", "threads": 2},
    "commit_info": {"id": "unversioned"},
    "datetime": "2026-11-22T10:00:00+00:00",
    "version": "5.3.1",
}


def finished_case(name, median=1e-4):
    """pytest-benchmark's dict of a case, as the session gives it to the journal."""
    stats = dict.fromkeys(("min", "max", "mean", "median", "q1", "q3", "ld15iqr", "hd15iqr"), median)
    stats |= {"stddev": 0.0, "iqr": 0.0, "rounds": 2, "iterations": 1, "ops": 1 / median, "total": 2 * median}
    stats |= {"iqr_outliers": 0, "stddev_outliers": 0, "outliers": "0;0", "data": [median, median]}
    info = {"implementation": name, "workload": WORKLOAD, "timer": "host", "limit_s": median / 2, "limit_bound": "memory"}
    info |= {"limit_source": "measured", "ceiling_tflops": 1.0, "ceiling_tb_per_s": 0.01, "tb_per_s": 0.005, "tflops": 0.5}
    info |= {"datasheet_tflops": None, "datasheet_tb_per_s": None, "error_over_budget": 0.25}
    test = f"test_forward[{WORKLOAD}-{name}]"
    return {
        "group": WORKLOAD,
        "name": test,
        "fullname": f"tests/test_benchmark.py::{test}",
        "params": {},
        "param": f"{WORKLOAD}-{name}",
        "extra_info": info,
        "options": {"timer": "host_clock"},
        "stats": stats,
    }
