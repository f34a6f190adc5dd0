"""The file of recorded results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from silicon.model import Case, Outcome

FILE = Path(__file__).with_name("silicon_h200.npz")


@dataclass
class Record:
    """Results by the case's name, tensor maps by what they describe; `about`: of the machine;
    `errors`: of the kernels that must not run."""

    about: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    encodings: dict[str, bytes] = field(default_factory=dict)
    errors: dict[str, tuple[str, str]] = field(default_factory=dict)  # digest, error

    def add(self, case: Case, outcome: Outcome) -> None:
        self.digests[case.name] = case.digest()
        self.outcomes[case.name] = outcome

    def of(self, case: Case) -> Outcome | None:
        """The results of this case, if it is still the same."""
        same = self.digests.get(case.name) == case.digest()
        return self.outcomes[case.name] if same else None

    def drop_but(self, cases: Sequence[Case]) -> None:
        """Forgets what is not the result of one of these cases as they are."""
        kept = {case.name for case in cases if self.of(case) is not None}
        self.outcomes = {name: o for name, o in self.outcomes.items() if name in kept}
        self.digests = {name: d for name, d in self.digests.items() if name in kept}

    def save(self, path: str | os.PathLike[str]) -> None:
        pieces: list[bytes] = []
        offset, cases = 0, {}
        for name, outcome in self.outcomes.items():
            arrays = []
            for array in outcome.outputs:
                pieces.append(np.ascontiguousarray(array).tobytes())
                arrays.append([offset, str(array.dtype), list(array.shape)])
                offset += len(pieces[-1])
            cases[name] = [self.digests[name], arrays, [m.hex() for m in outcome.maps]]
        index = {
            "about": self.about,
            "cases": cases,
            "encodings": {text: m.hex() for text, m in self.encodings.items()},
            "errors": self.errors,
        }
        text = json.dumps(index, separators=(",", ":")).encode()
        np.savez_compressed(
            path,
            index=np.frombuffer(text, np.uint8),
            data=np.frombuffer(b"".join(pieces), np.uint8),
        )


def read(path: str | os.PathLike[str] = FILE) -> Record:
    with np.load(path) as file:
        index, data = json.loads(file["index"].tobytes()), file["data"].tobytes()
    record = Record(about=index["about"])
    for name, (digest, arrays, maps) in index["cases"].items():
        outputs = []
        for offset, dtype, shape in arrays:
            count = int(np.prod(shape))
            outputs.append(np.frombuffer(data, dtype, count, offset).reshape(shape))
        record.digests[name] = digest
        record.outcomes[name] = Outcome(outputs, [bytes.fromhex(m) for m in maps])
    record.errors = {name: (a, b) for name, (a, b) in index.get("errors", {}).items()}
    record.encodings = {text: bytes.fromhex(m) for text, m in index["encodings"].items()}
    return record


def summary(cases: Sequence[Case]) -> str:
    """A name for a list of cases: equal where the same cases would run."""
    import hashlib

    return hashlib.sha256("".join(case.digest() for case in cases).encode()).hexdigest()[:16]
