"""What every setting is asked at the door: whether it is a number of its kind and inside its limits."""

import math


def whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError, which names the setting and what is allowed, unless value is an int in least..most."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least or (most is not None and value > most):
        limits = f"be at least {least}" if most is None else f"lie in {least}..{most}"
        raise ValueError(f"{name} must {limits}, got {value}")


def finite(name: str, value: object) -> None:
    """Raise ValueError, which names the setting, unless value is a finite int or float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
