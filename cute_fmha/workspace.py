"""Workspaces of split-KV: int32 counters, zero between launches, then partial results."""

from __future__ import annotations

import torch

COUNTER_BYTES = 64 << 10
"""Head of every workspace: int32 counters, at a fixed place, so that calls of different shapes and
backends may share one."""

_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}


def stream_workspace(device: torch.device, nbytes: int) -> torch.Tensor:
    """The library's own workspace of the current stream, grown to ``nbytes``.

    Under CUDA-graph capture the memory belongs to the graph, so it is not kept: the capture
    records its zeroing, and every replay starts from zeroed counters.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    workspace = _workspaces.get((device, stream))
    if workspace is None or workspace.numel() < nbytes:
        size = max(nbytes, 1 << (nbytes - 1).bit_length())
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        _workspaces[device, stream] = workspace
    return workspace


def workspace_of(
    given: torch.Tensor | None, device: torch.device, needed: int, num_splits: int = 1
) -> torch.Tensor:
    """``needed`` bytes: of the workspace of the call, or of the library's own. ``num_splits`` is
    for the message; 0: automatic.

    Raises:
        ValueError: the call's is too small.
    """
    if given is None:
        return stream_workspace(device, needed)[:needed]
    if given.numel() < needed:
        several = f"{num_splits or 'automatic'} splits of this problem need"
        who = "this problem needs" if num_splits == 1 else several
        raise ValueError(
            f"workspace: got {given.numel()} bytes; {who} {needed} "
            f"(make_workspace(device, nbytes={needed}))"
        )
    return given[:needed]
