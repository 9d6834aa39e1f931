"""stub"""

from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Adaptation:
    names: tuple[str, ...] = ()
    splits_prompts: bool = True
    inputs: dict[str, Any] = field(default_factory=dict)


def refuse(config: Any) -> None: ...
def adapt(model: Any, layers: Any) -> Adaptation:
    return Adaptation()
