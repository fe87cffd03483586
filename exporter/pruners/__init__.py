"""Pruners: which image tokens to keep. A name, a class, and parameters as `name:field=value,…`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from leanvlm.exporter.pruners.agile import AgilePruner
from leanvlm.exporter.pruners.attention import AttentionPruner
from leanvlm.exporter.pruners.base import Kept, Pruner, VisionTokens
from leanvlm.exporter.pruners.cenprune import CenPruner
from leanvlm.exporter.pruners.divprune import DivPruner
from leanvlm.exporter.pruners.hybrid import HybridPruner
from leanvlm.exporter.pruners.none import NoPruner
from leanvlm.exporter.pruners.prumerge import PruMergePruner
from leanvlm.exporter.pruners.random_sample import RandomPruner
from leanvlm.exporter.pruners.scope import ScopePruner
from leanvlm.exporter.pruners.uniform import UniformPruner
from leanvlm.exporter.pruners.visionzip import VisionZipPruner
from leanvlm.exporter.pruners.vispruner import VisPruner
from leanvlm.runtime.errors import UnsupportedPrunerError

__all__ = ["PRUNERS", "AgilePruner", "AttentionPruner", "Kept", "NoPruner", "Pruner", "VisionTokens", "parse"]

PRUNERS: dict[str, type[Pruner]] = {
    "agile": AgilePruner,
    "attention": AttentionPruner,
    "cenprune": CenPruner,
    "divprune": DivPruner,
    "hybrid": HybridPruner,
    "none": NoPruner,
    "prumerge": PruMergePruner,
    "random": RandomPruner,
    "scope": ScopePruner,
    "uniform": UniformPruner,
    "visionzip": VisionZipPruner,
    "vispruner": VisPruner,
}


def parse(spec: str, **defaults: Any) -> Pruner:
    """Make a pruner from its spec string, such as `agile:gate=entropy,step=0.02`.

    Args:
        spec: `name` or `name:field=value,…`.
        **defaults: Field values to use where the spec names none; those that the pruner has no field for are passed over.

    Raises:
        UnsupportedPrunerError: An unknown name or field, or a value that the field does not take.
    """
    name, _, rest = spec.partition(":")
    if name not in PRUNERS:
        raise UnsupportedPrunerError(f"pruner {name!r} is not known; known: {', '.join(PRUNERS)}")
    cls: Any = PRUNERS[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {key: value for key, value in defaults.items() if key in fields}
    for item in filter(None, rest.split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key in fields and not equals:
            raise UnsupportedPrunerError(f"pruner {name!r}: {key} has no value; write {key}=…")
        if key not in fields:
            known = ", ".join(fields)
            raise UnsupportedPrunerError(f"pruner {name!r} has no parameter {key!r}; it has: {known}")
        values[key] = _value(name, key, fields[key], text)
    pruner: Pruner = cls(**values)
    return pruner


def _value(pruner: str, key: str, kind: Any, text: str) -> Any:
    """Read `text` as the type of a dataclass field: a literal choice, an int, a float or a bool."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text in choices:
            return text
        raise UnsupportedPrunerError(f"{pruner}: {key}={text!r} is not one of {', '.join(map(str, choices))}")
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedPrunerError(f"{pruner}: {key}={text!r} is not a valid {kind.__name__}") from error
