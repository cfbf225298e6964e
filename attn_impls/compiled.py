"""torch.compile of the handcrafted attention. Inductor may rewrite it into fused attention: see the kernel that ran."""

import shutil

import torch

from attn_impls import Unsupported, Workload, attention
from attn_impls.handcrafted import handcrafted


@attention("compiled", dispatches=True, compiles="seconds")
def compiled(w: Workload):
    if torch.get_default_device().type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise Unsupported("torch.compile on a CPU needs a C++ compiler, and there is none on PATH")
    torch._dynamo.reset()
    return torch.compile(handcrafted(w), dynamic=False, fullgraph=True)
