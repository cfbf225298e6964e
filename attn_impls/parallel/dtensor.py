"""DTensor: q, k, v as tensors sharded on their heads, PyTorch choosing how SDPA runs on them. A variant to measure.

https://docs.pytorch.org/docs/stable/distributed.tensor.html
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Unsupported
from .plan import Form, Share, Spread
from .tensor import Core

# how DTensor says that it cannot shard an operator
NO_RULE = ("sharding strategy", "sharding rule", "mixed torch.Tensor and DTensor", "mixed Tensor and DTensor")


class DTensorCore(Core):
    """SDPA called once on the whole workload's DTensors; each rank keeps its own heads."""

    rehearses = False

    def __init__(self, spread: Spread):
        if not spread.implementation.name.startswith("sdpa"):
            raise Unsupported("DTensor knows how to shard SDPA only")
        super().__init__(spread)
        with torch.device(spread.device):
            self.kernels = [spread.implementation(self.partition.padded)]  # DTensors have the whole workload's shape

    def rehearse(self, share: list[Share]) -> None:
        """Nothing: DTensor's first call takes all ranks."""

    def connect(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        super().connect()
        if self.partition.sharing > 1:
            raise Unsupported("DTensor cannot give two ranks one KV head")
        self.mesh = init_device_mesh(self.spread.device, (self.spread.size,))

    def attend(self, share: list[Share]) -> list[torch.Tensor]:
        from torch.distributed.tensor import DTensor, Shard

        dtensors = [DTensor.from_local(tensor, self.mesh, [Shard(1)], run_check=False) for tensor in share[0]]
        try:
            out: Any = self.kernels[0](*dtensors)
        except (NotImplementedError, RuntimeError) as error:  # an operator without a sharding rule, or one given a plain mask
            known = isinstance(error, NotImplementedError) or any(sign in str(error) for sign in NO_RULE)
            if not known:
                raise
            raise Unsupported(f"DTensor: {str(error).strip().splitlines()[0][:160]}") from None
        if out.placements != (Shard(1),):
            raise Unsupported(f"DTensor: SDPA's output came back as {out.placements}, not sharded on heads")
        return [out.to_local()]


FORMS = (Form("dtensor", DTensorCore),)
