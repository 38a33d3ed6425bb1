"""Who calls, and what becomes of the file with the tokens."""

import hmac
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from bilm_api.constants import Reason
from bilm_server.errors import ConfigurationError, RefusalError
from bilm_server.security.auth import Authenticator, Caller

OLD, NEW, OTHER = "old-0123456789abcdef", "new-0123456789abcdef", "other-0123456789abcdef"
PEER = "ipv4:192.0.2.7:51000"


def token_file(folder: Path, *lines: str) -> Path:
    path = folder / "tokens"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path.chmod(0o600)
    return path


def authenticator(path: Path | None) -> Authenticator:
    found = Authenticator(path)
    found.load()
    return found


def bearer(*values: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "grpc"), *(("authorization", value) for value in values)]


def name_of(found: Authenticator, token: str) -> str:
    return found.identify(bearer(f"Bearer {token}"), PEER, {}).name


def refusal(found: Authenticator, *values: str) -> str:
    with pytest.raises(RefusalError) as error:
        found.identify(bearer(*values), PEER, {"x509_common_name": [b"a certificate is no token"]})
    assert error.value.reason is Reason.UNAUTHENTICATED
    return str(error.value)


def error_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_token_names_its_caller(tmp_path: Path) -> None:
    lines = ("# rotated in spring", "", f"team-a {OLD}", f"  team-a\t{NEW}  ", f"team-b {OTHER}")
    found = authenticator(token_file(tmp_path, *lines))
    assert [name_of(found, token) for token in (OLD, NEW, OTHER)] == ["team-a", "team-a", "team-b"]
    assert found.identify(bearer(f"bEaReR {OTHER}"), PEER, {}) == Caller("team-b")


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("Bearer",),
        ("Bearer ",),
        (f"Bearer {OLD[:-1]}",),
        (f"Bearer {OLD}x",),
        (f"Bearer {OLD.upper()}",),
        (OLD,),
        (f"Basic {OLD}",),
        (f"Bearer team-a {OLD}",),
        (f"Bearer {OLD}", f"Bearer {OLD}"),
        ("Bearer # rotated in spring",),
        ("Bearer \N{SNOWMAN}",),
    ],
)
def test_anything_else_is_refused_without_quoting_it(values: Sequence[str], tmp_path: Path) -> None:
    message = refusal(authenticator(token_file(tmp_path, "# rotated in spring", f"team-a {OLD}")), *values)
    assert OLD[:-1] not in message
    assert "team-a" not in message


def test_every_token_is_compared_whichever_it_is(tmp_path: Path) -> None:
    compared: list[bytes] = []

    def equal(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, given)

    found = Authenticator(token_file(tmp_path, f"a {OLD}", f"b {NEW}", f"c {OTHER}"), equal=equal)
    found.load()
    assert name_of(found, OLD) == "a"
    assert name_of(found, OTHER) == "c"
    refusal(found, f"Bearer {OLD}x")
    assert len(compared) == 9


def test_a_change_holds_for_the_next_call(tmp_path: Path) -> None:
    found = authenticator(token_file(tmp_path, f"team {OLD}"))
    token_file(tmp_path, f"team {NEW}")  # of the same length, and perhaps at the same time on the file's clock
    assert name_of(found, NEW) == "team"
    refusal(found, f"Bearer {OLD}")


def test_links_that_are_moved_are_followed(tmp_path: Path) -> None:
    """As Kubernetes replaces a secret."""
    for name, token in (("first", OLD), ("second", NEW)):
        (tmp_path / name).mkdir()
        token_file(tmp_path / name, f"team {token}")
    (link := tmp_path / "link").symlink_to("first")
    found = authenticator(link / "tokens")
    assert name_of(found, OLD) == "team"
    (new := tmp_path / "new").symlink_to("second")
    new.replace(link)
    assert name_of(found, NEW) == "team"


@pytest.mark.parametrize("bad", [["team short"], [], [f"team {NEW}", "half-a-li"], None])
def test_a_bad_change_leaves_what_was(bad: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = token_file(tmp_path, f"team {OLD}")
    found = authenticator(path)
    if bad is None:
        path.unlink()
    else:
        token_file(tmp_path, *bad)
    for _ in range(3):
        assert name_of(found, OLD) == "team"
    assert len(error_lines(caplog)) == 1
    assert str(path) in error_lines(caplog)[0]
    token_file(tmp_path, f"team {NEW}")
    assert name_of(found, NEW) == "team"
    assert len(error_lines(caplog)) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([f"team {OLD}", "team"], "line 2: expected NAME TOKEN"),
        ([f"team {OLD} {NEW}"], "line 1: expected NAME TOKEN"),
        (["team fifteen-letters"], "line 1: the token has fewer than 16 characters"),
        ([f"team {OLD}\N{SNOWMAN}"], "line 1: expected printable characters"),
        ([f"a {OLD}", "#", f"b {OLD}"], "line 3: the token of another line"),
        (["# none yet"], "no tokens"),
    ],
)
def test_bad_files_at_the_start(lines: list[str], message: str, tmp_path: Path) -> None:
    if "fifteen" in lines[0]:
        lines = [lines[0].replace("fifteen-letters", "x" * 15)]
    with pytest.raises(ConfigurationError, match=message) as error:
        authenticator(token_file(tmp_path, *lines))
    assert OLD not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (path := tmp_path / "tokens").write_bytes(b"\xef\xbb\xbf" + f"team {'a' * 32}\r\n".encode())
    assert name_of(authenticator(path), "a" * 32) == "team"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere: No such file"):
        authenticator(tmp_path / "nowhere")
    (binary := tmp_path / "binary").write_bytes(b"team \xff\xfe secret")
    with pytest.raises(ConfigurationError, match="binary: not UTF-8") as error:
        authenticator(binary)
    assert "secret" not in str(error.value)


def test_a_file_that_everybody_can_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = token_file(tmp_path, f"team {OLD}")
    authenticator(path)
    assert not caplog.records
    path.chmod(0o604)
    authenticator(path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert OLD not in caplog.text


def test_no_token_is_kept(tmp_path: Path) -> None:
    found = authenticator(token_file(tmp_path, f"team {OLD}"))
    name_of(found, OLD)
    assert not [text for text in texts_in(found) if OLD in text]


def texts_in(thing: Any) -> Iterator[str]:
    """Every text that an object of this project's keeps, and those that it is made of."""
    if isinstance(thing, str | bytes):
        yield str(thing)
    elif isinstance(thing, Mapping):
        yield from (text for item in thing.items() for part in item for text in texts_in(part))
    elif isinstance(thing, Iterable):
        yield from (text for part in thing for text in texts_in(part))
    elif type(thing).__module__.startswith("bilm_server."):
        yield from texts_in(vars(thing))


@pytest.mark.parametrize(
    ("peer", "auth_context", "name"),
    [
        ("ipv4:192.0.2.7:51000", {}, "192.0.2.7"),
        ("ipv6:%5B2001:db8::1%5D:51000", {}, "2001:db8::1"),
        ("ipv6:[2001:db8::1]:51000", {}, "2001:db8::1"),
        ("unix:", {}, "unix"),
        ("unix:/run/bilm.sock", {}, "unix"),
        (PEER, {"transport_security_type": [b"ssl"]}, "192.0.2.7"),
        (PEER, {"x509_common_name": [b"team-a"], "x509_subject_alternative_name": [b"host"]}, "team-a"),
        (PEER, {"x509_common_name": [b""], "x509_subject_alternative_name": [b"host", b"more"]}, "host"),
        (PEER, {"x509_common_name": [b""]}, "192.0.2.7"),
        (PEER, {"x509_common_name": [b"a\nERROR forged \xff"]}, "a?ERROR forged \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_callers_without_tokens(peer: str, auth_context: dict[str, list[bytes]], name: str) -> None:
    assert authenticator(None).identify(bearer(f"Bearer {OLD}"), peer, auth_context) == Caller(name)
