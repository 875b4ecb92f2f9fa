"""What every section of a config shares: frozen, strict types, no unknown key."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """One section of a config: exact types, unknown keys refused, never changed."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
    )

    def was_given(self, key: str) -> bool:
        """Whether `key` was set by someone; null or an empty list is the same as leaving it out."""
        return key in self.model_fields_set and getattr(self, key) not in (None, ())


def as_tuple(value: Any) -> Any:
    """A list as a tuple, and one value as a tuple of one, so that a scalar may stand for a list."""
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,)


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]
Count = Annotated[int, Field(ge=1)]
