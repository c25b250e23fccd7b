"""The operators: their namespace in torch.ops, and the compiled part that registers most of them.

Several builds for the Hugging Face Hub may be loaded in one process: tools/hub_kernel.py gives each a
namespace of its own, and a line in place of the one that imports _C.
"""

import torch

from . import _C  # noqa: F401  (registers the compiled operators)

NAMESPACE = "g2rl"

ops = getattr(torch.ops, NAMESPACE)


def qualified(name: str) -> str:
    """The operator's name with its namespace, as torch.library takes it."""
    return f"{NAMESPACE}::{name}"


def _compiled(name: str, device: str) -> bool:
    """Whether the compiled part has this operator for tensors on "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified(name), device.upper())


HAS_CPU = _compiled("head_features", "cpu")  # a build of Triton kernels alone has no C++
GROUP_DEVICES = tuple(device for device in ("cpu", "cuda") if _compiled("group_geometry", device))
