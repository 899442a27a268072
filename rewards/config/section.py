"""What every section of a rewards file has in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from rewards.base import SCORE

# Names are shown in clients, metric labels and command lines: letters, digits and _ - . only.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]


class Section(BaseModel):
    """A section: no unknown fields, no conversions, never changed.

    Attributes
    ----------
    LATER : frozenset of str
        Fields that came after the first calibrations. What was not set is not dumped, so that the
        fingerprint of a file that does without them stays what it was.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in dump(self).items()
            if name not in self.LATER or getattr(self, name) != fields[name].get_default()
        }


class Scored(Section):
    """The section of a scorer."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return (SCORE,)


def checked_url(url: str) -> SplitResult:
    """Return the parts of an address that texts are posted to.

    Raises
    ------
    ValueError
        When it is none, or holds a secret.
    """
    try:
        parts = urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or parts.scheme not in ("http", "https"):
        raise ValueError("the url must be http://host:port/path or https://host/path")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("no user, password or fragment in the url; see token_file")
    return parts
