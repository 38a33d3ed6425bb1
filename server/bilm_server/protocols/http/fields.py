"""JSON objects, field by field: a wrong type, value or name is refused with the path of the field."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import orjson
from bilm_api.constants import Reason

from bilm_server.protocols.http.messages import HttpRefusalError

T = TypeVar("T")


def parse_json(body: bytes) -> "BodyFields":
    """Return the fields of a body.

    Strings are Unicode without lone surrogates and numbers are finite, as the parser refuses all others.

    Raises:
        HttpRefusalError: it isn't a JSON object.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise HttpRefusalError(f"the body isn't JSON in UTF-8: byte {error.pos}") from None
    return BodyFields(found, "")


class BodyFields:
    """The fields of one object; what is null counts as not set."""

    def __init__(self, value: object, path: str) -> None:
        """Take an object.

        Args:
            value: as it was parsed.
            path: of the object, "" for the outermost.

        Raises:
            HttpRefusalError: it is no object.
        """
        if not isinstance(value, dict):
            raise wrong(path, "expected an object")
        self._value: Mapping[str, Any] = value
        self._path = path

    def path(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self._path}.{name}" if self._path else name

    def check_names(self, known: Collection[str]) -> None:
        """Refuse fields of other names; the message can't quote them."""
        if not self._value.keys() <= set(known):
            place = f"{self._path}: " if self._path else ""
            raise HttpRefusalError(f"{place}unknown field (expected {', '.join(sorted(known))})", field=self._path)

    def get(self, name: str) -> Any:
        """Return a field's value, None where it isn't set."""
        return self._value.get(name)

    def text(self, name: str) -> str:
        """Return a string, "" where it isn't set."""
        value = self.get(name)
        if not isinstance(value, str | None):
            raise wrong(self.path(name), "expected a string")
        return value or ""

    def flag(self, name: str) -> bool:
        """Return a boolean, False where it isn't set."""
        value = self.get(name)
        if not isinstance(value, bool | None):
            raise wrong(self.path(name), "expected true or false")
        return bool(value)

    def object(self, name: str) -> "BodyFields":
        """Return an object's fields; none are set where it isn't."""
        value = self.get(name)
        return BodyFields({} if value is None else value, self.path(name))

    def choice(self, name: str, known: Mapping[str, T], default: str, reason: Reason = Reason.MALFORMED_REQUEST) -> T:
        """Return what one of some strings stands for."""
        value = self.get(name)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in known:
            raise wrong(self.path(name), f"expected one of {', '.join(known)}", reason)
        return known[value]


def wrong(path: str, message: str, reason: Reason = Reason.MALFORMED_REQUEST) -> HttpRefusalError:
    """Return the refusal of a field's value."""
    return HttpRefusalError(f"{path or 'body'}: {message}", reason=reason, field=path)
