"""How every Triton kernel of the package is launched: with one statement of what is asked of the compiler."""

from __future__ import annotations

from typing import Any

# A product and the sum that takes it up are one operation, rounded once: fewer instructions behind the tiles'
# products, and x - logsumexp from an exact x. Triton does so by default up to 3.9 and not from 3.10 on.
OPTIONS = {"enable_fp_fusion": True}


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
    """Runs `kernel` on `grid` programs. Keywords are the kernel's arguments, num_warps and num_stages."""
    kernel[grid](*args, **keywords, **OPTIONS)
