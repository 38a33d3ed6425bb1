"""JSON objects, field by field: a wrong type, value or name is refused with the path of the field."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

import orjson
from bilm_api.constants import Priority, Reason

from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.errors import RefusalError
from bilm_server.protocols.http.messages import HttpRefusalError

T = TypeVar("T")

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_PRIORITIES: Final = {priority.value: priority for priority in Priority}


def parse_json(body: bytes) -> "BodyFields":
    """Return the fields of a body.

    Strings are Unicode without lone surrogates and numbers are finite, as the parser refuses all others.

    Raises:
        HttpRefusalError: it isn't a JSON object.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise HttpRefusalError(f"the body isn't JSON in UTF-8: {_place(body, error)}") from None
    return BodyFields(found, "")


def _place(body: bytes, error: orjson.JSONDecodeError) -> str:
    """Return where a body is at fault; the parser says character 0 of what isn't UTF-8."""
    try:
        body.decode()
    except UnicodeDecodeError as undecodable:
        return f"byte {undecodable.start} isn't UTF-8"
    return f"line {error.lineno}, column {error.colno}"


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
        """Refuse fields of other names; the message quotes those only that are like a name, as none quotes a text."""
        for name in self._value:
            if name not in known:
                path = self.path(name) if _NAME.fullmatch(name) else self._path
                raise HttpRefusalError(
                    f"{path or 'body'}: unknown field (expected {', '.join(sorted(known))})", field=path
                )

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

    def priority(self) -> Priority:
        """Return what the field `priority` says."""
        return self.choice("priority", _PRIORITIES, Priority.INTERACTIVE, Reason.PRIORITY_INVALID)

    def choice(self, name: str, known: Mapping[str, T], default: str, reason: Reason = Reason.MALFORMED_REQUEST) -> T:
        """Return what one of some strings stands for."""
        value = self.get(name)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in known:
            raise wrong(self.path(name), f"expected one of {', '.join(known)}", reason)
        return known[value]


def check_count(limits: RequestLimits, n_sentences: int, path: str) -> None:
    """Check how many sentences a field has.

    Raises:
        HttpRefusalError: SENTENCES_MISSING or TOO_MANY_SENTENCES, naming the field.
    """
    try:
        limits.check_count(n_sentences)
    except RefusalError as refusal:
        raise wrong(path, f"found {n_sentences} (expected 1 to {limits.sentences})", refusal.reason) from None


def wrong(path: str, message: str, reason: Reason = Reason.MALFORMED_REQUEST) -> HttpRefusalError:
    """Return the refusal of a field's value."""
    return HttpRefusalError(f"{path or 'body'}: {message}", reason=reason, field=path)
