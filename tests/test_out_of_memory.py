"""What is said of a check that runs out of memory, and what it costs."""

import pytest
import torch

from attn_impls import Workload
from attn_impls.harness import session
from attn_impls.harness.case import Case, out_of_memory
from attn_impls.registry import discover

W = "b1-h2-s32-d16-fp32"


def test_a_limit_on_the_process_s_memory_is_said():
    told = "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 70.00 GiB is free. 3.00 GiB allowed; x"
    said = out_of_memory(torch.OutOfMemoryError(told))
    assert said == "tried to allocate 20.00 MiB, of 79.10 GiB 70.00 GiB were free and 3.00 GiB allowed"


def test_a_check_that_runs_out_of_memory_costs_its_case_only(suite, monkeypatch):
    case = Case(Workload.parse(W), discover()["sdpa"], "cpu")
    released = []
    monkeypatch.setattr(session, "release", lambda device, failure: released.append((device, failure)))
    with (
        pytest.raises(pytest.fail.Exception, match=f"the check of {W} ran out of memory: OutOfMemoryError: no room"),
        suite.outcome(case),
    ):
        raise torch.OutOfMemoryError("no room")
    assert [device for device, _ in released] == [suite.device]
