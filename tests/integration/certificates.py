"""Certificates in a folder, mounted and replaced as Kubernetes does it with a secret."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import trustme

NAMES = ("tls.crt", "tls.key", "ca.crt")


class Mount:
    """A folder with tls.crt, tls.key and ca.crt; what is put in replaces all three at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._version = 0
        folder.mkdir(parents=True)

    def put(self, authority: trustme.CA, certificate: trustme.LeafCert) -> None:
        chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
        self.put_files(chain, certificate.private_key_pem.bytes(), authority.cert_pem.bytes())

    def put_files(self, *contents: bytes) -> None:
        old, self._version = self._version, self._version + 1
        version = self.folder / f"..{self._version}"
        version.mkdir()
        for name, content in zip(NAMES, contents, strict=True):
            (version / name).write_bytes(content)
        new = self.folder / "..new"
        new.symlink_to(version.name)
        new.replace(self.folder / "..data")
        for name in NAMES:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        if old:
            shutil.rmtree(self.folder / f"..{old}")

    def settings(self, *, callers: bool = True) -> dict[str, str]:
        """Settings of a service with it; `callers` must show a certificate of the same authority."""
        files = {
            "tls_cert_file": str(self.folder / "tls.crt"),
            "tls_key_file": str(self.folder / "tls.key"),
            "tls_ca_file": str(self.folder / "ca.crt"),
        }
        return files | ({"tls_client_ca_file": str(self.folder / "ca.crt")} if callers else {})


def issue(authority: trustme.CA, *, days: int = 30) -> trustme.LeafCert:
    """A certificate for this machine."""
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    return authority.issue_cert("127.0.0.1", "localhost", not_after=end)
