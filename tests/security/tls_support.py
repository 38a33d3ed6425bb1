"""Certificates made for a test, in files; it has no tests of its own."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

_DAY = datetime.timedelta(days=1)
_HOST = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])


@dataclass(frozen=True)
class Identity:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: PrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self._key_pem(serialization.NoEncryption())

    @property
    def locked_key_pem(self) -> bytes:
        return self._key_pem(serialization.BestAvailableEncryption(b"a password"))

    def _key_pem(self, encryption: serialization.KeySerializationEncryption) -> bytes:
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """Into STEM.pem and STEM.key, in place of what is there."""
        certificate, key = folder / f"{stem}.pem", folder / f"{stem}.key"
        replace(certificate, self.certificate_pem)
        replace(key, self.key_pem)
        return certificate, key


class Authority:
    """Signs certificates, each for a day around now and for this machine."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("an authority of the tests")
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = _builder(self._name, self._name, self._key).add_extension(constraints, critical=True)
        self.identity = Identity(certificate.sign(self._key, hashes.SHA256()), self._key)

    @property
    def pem(self) -> bytes:
        return self.identity.certificate_pem

    def write(self, folder: Path) -> Path:
        replace(path := folder / "ca.pem", self.pem)
        return path

    def issue(
        self, common_name: str, *, expired: bool = False, for_host: bool = True, key: PrivateKey | None = None
    ) -> Identity:
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(common_name), self._name, key, expired=expired)
        if for_host:
            builder = builder.add_extension(_HOST, critical=False)
        return Identity(builder.sign(self._key, hashes.SHA256()), key)


def replace(path: Path, content: bytes) -> None:
    """At once, as tools that rotate secrets do it."""
    new = path.with_name(f"{path.name}.new")
    new.touch(mode=0o600)
    new.write_bytes(content)
    new.replace(path)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, *, expired: bool = False
) -> x509.CertificateBuilder:
    end = datetime.datetime.now(datetime.UTC) + (-_DAY if expired else _DAY)
    return x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), end - 2 * _DAY, end)
