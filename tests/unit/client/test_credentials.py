"""What commands take from the files that their flags name."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from bilm_client.batch.main import main as bilm_embed
from bilm_client.cli.credentials import CredentialsError, channel_credentials, read_token
from bilm_client.cli.health_check import main as bilm_health

from tests.security.tls_support import Authority

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def test_plaintext_is_what_nothing_asks_for() -> None:
    assert channel_credentials() is None


def test_a_file_implies_tls(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("me").write(tmp_path, "me")
    assert isinstance(channel_credentials(tls=True), grpc.ChannelCredentials)
    assert isinstance(channel_credentials(ca_file=authority.write(tmp_path)), grpc.ChannelCredentials)
    assert isinstance(channel_credentials(cert_file=certificate, key_file=key), grpc.ChannelCredentials)


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("me").write(tmp_path, "me")
    _, other = authority.issue("other").write(tmp_path, "other")
    (locked := tmp_path / "locked").write_bytes(authority.issue("me").locked_key_pem)
    (garbage := tmp_path / "garbage").write_bytes(b"\xffgarbage")
    nowhere = tmp_path / "nowhere"
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ca_file": nowhere}, f"{nowhere}: No such file"),
        ({"ca_file": tmp_path}, f"{tmp_path}: Is a directory"),
        ({"ca_file": garbage}, f"{garbage}: no certificates"),
        ({"ca_file": key}, f"{key}: no certificates"),
        ({"cert_file": certificate}, "go together"),
        ({"key_file": key}, "go together"),
        ({"cert_file": nowhere, "key_file": key}, f"{nowhere}: No such file"),
        ({"cert_file": certificate, "key_file": other}, f"{certificate}, {other}: not a certificate chain and the key"),
        ({"cert_file": certificate, "key_file": locked}, f"{certificate}, {locked}: not .* without a password"),
        ({"cert_file": garbage, "key_file": key}, f"{garbage}, {key}: not a certificate chain"),
    )
    for files, message in cases:
        with pytest.raises(CredentialsError, match=message):
            channel_credentials(**files)


def test_a_token_with_white_space_around_it(tmp_path: Path) -> None:
    (path := tmp_path / "token").write_bytes(b"\r\n " + TOKEN.encode() + b"\r\n")
    assert read_token(path) == TOKEN
    assert read_token(None) is None


@pytest.mark.parametrize("content", [b"", b" \n", b"team-a " + TOKEN.encode(), b"\xff" + TOKEN.encode(), b"a\x00b"])
def test_anything_else_is_no_token_and_not_quoted(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "token").write_bytes(content)
    with pytest.raises(CredentialsError, match="expected one token") as error:
        read_token(path)
    assert TOKEN not in str(error.value)


def test_a_missing_token_file(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="nowhere: No such file"):
        read_token(tmp_path / "nowhere")


def test_a_byte_order_mark_is_no_part_of_a_token_and_none_of_pem(authority: Authority, tmp_path: Path) -> None:
    (path := tmp_path / "token").write_bytes(b"\xef\xbb\xbf" + TOKEN.encode() + b"\r\n")
    assert read_token(path) == TOKEN
    path.write_bytes(TOKEN.encode("utf-16"))
    with pytest.raises(CredentialsError, match=f"{path}: the text is UTF-16, little-endian, expected UTF-8"):
        read_token(path)
    certificate, key = authority.issue("me").write(tmp_path, "me")
    for file in (certificate, key):
        content = file.read_bytes()
        file.write_bytes(b"\xef\xbb\xbf" + content)
        with pytest.raises(CredentialsError, match=f"{file}: begins with a byte order mark"):
            channel_credentials(cert_file=certificate, key_file=key)
        file.write_bytes(content)


@pytest.mark.parametrize("flag", ["--ca-file", "--cert-file", "--token-file"])
def test_commands_stop_at_a_bad_file(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text := tmp_path / "text").write_text("a line\n")
    assert bilm_embed([str(text), str(tmp_path / "out.npz"), flag, str(tmp_path / "nowhere")]) == 2
    assert bilm_health([flag, str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    reason = "go together" if flag == "--cert-file" else "nowhere: No such file"
    assert told.count(reason) == 2
    assert told.startswith("bilm-embed: ")
