"""Skip counters: device-resident, accumulating, valid under CUDA graphs; and their JSON log."""

from __future__ import annotations

import atexit
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch


class SkipStats:
    """(skipped, total) KV-tile counters on ``device``.

    Passing an instance as ``stats=`` selects the counting variant of a kernel, which adds once per
    work tile. ``total`` counts the tiles left after exact skipping. Reading synchronises; counting
    does not.

    counters: int64 ``[2]``; give a view into a larger tensor to count several layers side by side.
    """

    def __init__(
        self, device: torch.device | str = "cuda", counters: torch.Tensor | None = None
    ) -> None:
        if counters is None:
            counters = torch.zeros(2, dtype=torch.int64, device=device)
        if counters.shape != (2,) or counters.dtype != torch.int64:
            raise ValueError(
                f"SkipStats counters must be int64 [2]; got {counters.dtype} "
                f"{tuple(counters.shape)}"
            )
        self.counters = counters

    def read(self) -> tuple[int, int]:
        """(skipped, total) so far; synchronises with the device."""
        skipped, total = self.counters.tolist()
        return skipped, total

    def reset(self) -> None:
        """Zero both counters, in stream order."""
        self.counters.zero_()


@dataclass(frozen=True)
class _Step:
    """One step: its metadata, and every layer's running totals at its end, int64 ``[layers, 2]``.

    ``totals`` stays on the device until the log is written.
    """

    prefill_sequences: int
    prefill_tokens: int
    decode_tokens: int
    totals: torch.Tensor


class SkipStatsLogger:
    """Writes the skip counts of a model run as JSON: step -> layer -> {skipped, total}.

    Layers count on the device into one int64 ``[num_layers, 2]`` tensor that only ever grows, so
    captured CUDA graphs may hold views of it; a step's figure is the difference between the totals
    at its end and at the end of the step before. `end_step` copies the totals on the device, in
    stream order and without synchronising, and costs ``16 * num_layers`` bytes until the log is
    written. Only `flush`, `close` and interpreter exit read them (one synchronisation each).

    The file is ``{"num_layers": n, "steps": [{"step": 0, "prefill_sequences": …,
    "prefill_tokens": …, "decode_tokens": …, "layers": {"0": {"skipped": …, "total": …}, …}}, …]}``.
    Work after the last `end_step` is in no step. A logger is a context manager that closes itself.

    Raises:
        ValueError: ``num_layers`` is < 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_layers: int,
        device: torch.device | str = "cuda",
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"SkipStatsLogger num_layers must be >= 1; got {num_layers}")
        self.path = Path(path)
        self.num_layers = num_layers
        self._totals = torch.zeros(num_layers, 2, dtype=torch.int64, device=device)
        self._layers = [SkipStats(counters=row) for row in self._totals]
        self._pending: list[_Step] = []
        self._read = torch.zeros(num_layers, 2, dtype=torch.int64)
        self._written: list[dict[str, object]] = []
        self._closed = False
        atexit.register(self.close)

    def layer(self, index: int) -> SkipStats:
        """The counters of layer ``index``, for ``stats=``; the same object every time.

        Do not reset them: steps are differences of running totals.

        Raises:
            IndexError: ``index`` is not in [0, num_layers).
        """
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer: got {index}; allowed: 0 to {self.num_layers - 1}")
        return self._layers[index]

    def end_step(
        self, *, prefill_sequences: int = 0, prefill_tokens: int = 0, decode_tokens: int = 0
    ) -> None:
        """Everything counted since the last call was one step. Call it outside graph capture.

        Raises:
            RuntimeError: the logger is closed.
        """
        if self._closed:
            raise RuntimeError(f"SkipStatsLogger of {self.path} is closed")
        self._pending.append(
            _Step(prefill_sequences, prefill_tokens, decode_tokens, self._totals.clone())
        )

    def flush(self) -> None:
        """Read the steps that ended and write the whole log; synchronises with the device.

        The file is replaced in one operation, so a reader never sees half of it.
        """
        if self._pending:
            totals = torch.stack([step.totals for step in self._pending]).cpu()
            counts = totals.diff(dim=0, prepend=self._read[None])
            self._read = totals[-1]
            for step, layers in zip(self._pending, counts.tolist(), strict=True):
                self._written.append(self._entry(step, layers))
            self._pending.clear()
        scratch = self.path.with_name(self.path.name + ".partial")
        scratch.write_text(json.dumps({"num_layers": self.num_layers, "steps": self._written}))
        scratch.replace(self.path)

    def _entry(self, step: _Step, layers: list[list[int]]) -> dict[str, object]:
        return {
            "step": len(self._written),
            "prefill_sequences": step.prefill_sequences,
            "prefill_tokens": step.prefill_tokens,
            "decode_tokens": step.decode_tokens,
            "layers": {
                str(index): {"skipped": skipped, "total": total}
                for index, (skipped, total) in enumerate(layers)
            },
        }

    def close(self) -> None:
        """Flush once; later calls do nothing. Also runs when the interpreter exits."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        atexit.unregister(self.close)

    def __enter__(self) -> SkipStatsLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
