"""A gate file: the reference values of one model's gate, as `leanvlm calibrate gate` writes and `export` reads them.

An image's complexity is judged against a model's own mean: the effective rank of what its projector makes of an image, and
the entropy of its tower's attention, mean nothing for another model. So the file names the weights that it was measured on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from leanvlm.runtime.bundle import file_sha256
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.outputs import json_bytes
from leanvlm.runtime.records import Between, load_json, read
from leanvlm.runtime.specs import SourceSpec

# 2: without constants of the rank estimator, which holds for every model now.
SCHEMA = 2
Reference = Annotated[float, Between(1e-6, 1e6)]


@dataclass(frozen=True)
class GateFile:
    """What was measured on a model's images.

    Attributes:
        model: Name of the checkpoint.
        sha256: Checksum over its weight files, as a manifest records it.
        images: How many images were measured, at least 1.
        source: What they were, in words.
        erank_ref: Mean exact effective rank of the centred projector features, over 0.
        entropy_ref: Mean entropy of the class token's attention in nats, over 0.
        figures: Spread of both quantities, and how well the estimate in the graph agrees with the exact rank.
        versions: Of the tools used.
    """

    model: str
    sha256: str
    images: Annotated[int, Between(1, 2**53)]
    source: str
    erank_ref: Reference
    entropy_ref: Reference
    figures: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def pruner_fields(self) -> dict[str, Any]:
        """Return the pruner parameters that the file sets."""
        return {"erank_ref": self.erank_ref, "entropy_ref": self.entropy_ref}

    def check_source(self, path: Path, source: SourceSpec) -> None:
        """Check that the file was measured on these weights.

        Raises:
            InputError: It was measured on others.
        """
        if self.sha256 != source.sha256:
            raise InputError(
                f"--gate-file {path} was measured on {self.model} (weights {self.sha256[:12]}…), not on {source.id} "
                f"(weights {source.sha256[:12]}…); run `leanvlm calibrate gate` for this model"
            )

    def record(self, path: Path) -> dict[str, Any]:
        """Return what the manifest says of where the gate's values come from."""
        return {"file": path.name, "sha256": file_sha256(path), "source": self.source, "images": self.images}

    def to_bytes(self) -> bytes:
        """Return the file, which `read_gate_file` reads back to an equal one."""
        return json_bytes({"schema": SCHEMA, **dataclasses.asdict(self)})


def read_gate_file(path: Path) -> GateFile:
    """Read a gate file.

    Raises:
        InputError: It cannot be read, is of another schema, or a value is missing or impossible.
    """
    data = load_json(path, InputError)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"--gate-file {path} is not a gate file of schema {SCHEMA}; `leanvlm calibrate gate` writes one")
    fields = {key: value for key, value in data.items() if key != "schema"}
    return read(GateFile, fields, f"--gate-file {path} is not a valid gate file", InputError)
