"""How the ranks are connected: what is stored with the results of several ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .environment import nvml_device
from .ranks import Ranks


def facts(ranks: Ranks) -> dict[str, Any]:
    """World size, nodes, backend, NCCL's version and the links between GPUs; no host names."""
    cuda = ranks.device == "cuda"
    return {
        "world_size": ranks.size,
        "nodes": ranks.nodes,
        "backend": "nccl" if cuda else "gloo",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "topology": _links() if cuda else f"{ranks.nodes} node{'s' * (ranks.nodes != 1)}, CPU processes",
    }


def _links() -> str:
    """This rank's GPU as its node sees it: active NVLinks, and whether it reaches the others' memory."""
    device, count = torch.cuda.current_device(), torch.cuda.device_count()
    reached = sum(torch.cuda.can_device_access_peer(device, other) for other in range(count) if other != device)
    nvlinks = _active_nvlinks(device)
    links = "NVLinks unknown" if nvlinks is None else f"{nvlinks} NVLinks"
    return f"{count} GPUs a node, {links} each, peer access to {reached}"


def _active_nvlinks(device: int) -> int | None:
    found = nvml_device(device)
    if found is None:
        return None
    pynvml, handle = found
    active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        with contextlib.suppress(pynvml.NVMLError):
            active += pynvml.nvmlDeviceGetNvLinkState(handle, link)
    return active
