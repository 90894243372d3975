"""The same bytes on every run, on GPUs too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Products on GPUs add in the same order on every run only with this, and PyTorch reads it before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(*, gradients: bool = True) -> Iterator[None]:
    """Kernels that add in the same order on every run; a resumed run then gives the same bytes.

    Args:
        gradients: refuse operators that have no such kernel. With PyTorch's "warn only" attention's gradient would add
            in any order. Without gradients that is enough, and lets models through that have another such operator.
    """
    settings: Any = torch.utils.deterministic
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not gradients)
    # Has no deterministic backward pass. Forward, two runs differed on an H100 as well.
    torch.backends.cuda.enable_cudnn_sdp(False)
    settings.fill_uninitialized_memory = False  # a debugging aid that doubles the number of kernels
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        settings.fill_uninitialized_memory = fill
