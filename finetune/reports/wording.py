"""Numbers as people read them: a real minus, thousands apart, as many digits as say something."""

from __future__ import annotations

MINUS = "−"
NONE = "–"


def decimal(value: float | None, digits: int = 4) -> str:
    """A number with so many digits behind the point; very small ones as a power of ten."""
    if value is None:
        return NONE
    if value and abs(value) < 0.5 * 10**-digits:
        return power(value)
    return f"{value:.{digits}f}".replace("-", MINUS)


def power(value: float | None) -> str:
    """Two digits and a power of ten, where that is shorter than the number: 3.1e−05, 0.31."""
    if value is None:
        return NONE
    form = f"{value:.2g}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"
    return form.replace("-", MINUS)


def signed(value: float | None, digits: int = 4) -> str:
    """A difference, its sign always there."""
    if value is None:
        return NONE
    shown = decimal(value, digits)
    return f"+{shown}" if value > 0 else shown


def percent(value: float | None) -> str:
    """A share of 1 in percent."""
    return NONE if value is None else f"{100 * value:.1f} %".replace("-", MINUS)


def points(value: float | None) -> str:
    """A difference of two shares, its sign always there."""
    if value is None:
        return NONE
    return f"+{percent(value)}" if value > 0 else percent(value)


def whole(value: float | None) -> str:
    """A count."""
    return NONE if value is None else f"{round(value):,}"


def p_value(value: float | None) -> str:
    """A probability."""
    return NONE if value is None else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as the two units that matter."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def metric(name: str) -> str:
    """A metric's name in words."""
    return name.replace("_", " ")
