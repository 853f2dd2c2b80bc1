"""What every setting is asked at the door: whether it is a number of its kind and inside its limits."""

import math
from collections.abc import Iterable
from typing import Any

MOST = 1_000_000  # of anything that is counted: what is larger fits no memory, or takes no end
MOST_SEED = 2**32 - 1
LATER = {"later": True}  # of a field that came after runs were stored: at its default it is no part of their settings


def whole(name: str, value: object, least: int, most: int = MOST) -> None:
    """Raise ValueError, which names the setting and what is allowed, unless value is an int in least..most."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not least <= value <= most:
        limits = f"be at least {least}" if most == MOST and value < least else f"lie in {least}..{most}"
        raise ValueError(f"{name} must {limits}, got {value}")


def seed(value: object) -> None:
    """Raise ValueError unless value is an int in 0..2^32 - 1."""
    whole("seed", value, least=0, most=MOST_SEED)


def different(name: str, values: object) -> None:
    """Raise ValueError, which names the setting, unless values is a tuple of different ints of at least 1."""
    if not isinstance(values, tuple):
        raise ValueError(f"{name} must be a tuple of whole numbers, got {values!r}")
    for value in values:
        whole(f"each of {name} {values}", value, least=1)
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must be different numbers, got {values}")


def flag(name: str, value: object) -> None:
    """Raise ValueError, which names the setting, unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def one_of(name: str, value: object, allowed: Iterable) -> None:
    """Raise ValueError, which names the setting and what is allowed, unless value is one of these."""
    if value not in (known := tuple(allowed)):
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(map(str, known))}")


def finite(name: str, value: object, above: float = -math.inf) -> None:
    """Raise ValueError, which names the setting, unless value is a finite int or float above a limit."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value <= above:
        raise ValueError(f"{name} must be above {above:g}, got {value}")


def has_numbers(device: Any) -> None:
    """Raise ValueError for a model on "meta", where tensors have shapes and no numbers."""
    if device.type == "meta":
        raise ValueError("the model is on meta, which knows shapes and no numbers: use to_empty and load its weights")
