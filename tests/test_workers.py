"""Each pytest-xdist worker on a GPU of its own."""

import os

import pytest
import torch

from attn_impls.harness import workers


@pytest.mark.parametrize(
    ("visible", "worker", "expected"),
    [(None, "gw0", "0"), (None, "gw1", "1"), (None, "gw2", "0"), ("3,5", "gw1", "5"), ("3,5", "gw0", "3")],
)
def test_workers_take_the_visible_gpus_in_turn(monkeypatch, visible, worker, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this starts CUDA, which then sees no change"))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_without_xdist_nothing_is_pinned(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers.pin()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
