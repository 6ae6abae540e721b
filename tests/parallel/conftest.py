"""Slow imports, once, before ranks are forked."""

import torch._dynamo
import torch.distributed._functional_collectives
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
