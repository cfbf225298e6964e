"""What flex says that it cannot do."""

import pytest
import torch

from attn_impls import Unsupported, Workload
from attn_impls.registry import discover


def test_flex_says_what_its_kernel_has_no_room_for(monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    with pytest.raises(Unsupported, match="shared memory"):
        discover()["flex"](Workload.parse("b1-h1-q1kv64-d576v512-bf16"))
