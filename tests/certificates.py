"""Certificates for tests: our own root and what it signs, for localhost and 127.0.0.1, valid for an hour."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Files:
    cert: str
    key: str


class Authority:
    """A root whose certificate is at `file`."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = str(folder / f"{name}.pem")
        self._sign(self._name, self._key, Path(self.file), is_root=True)

    def certificate(self, name: str) -> Files:
        key = ec.generate_private_key(ec.SECP256R1())
        cert_file, key_file = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self._sign(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key, cert_file, is_root=False)
        return Files(str(cert_file), str(key_file))

    def _sign(self, subject: x509.Name, key, file: Path, is_root: bool) -> None:
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
