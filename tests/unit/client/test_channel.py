from __future__ import annotations

import pytest

from hibug2.channel import open_channel, target
from hibug2.errors import UserError


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("localhost:50051", ("", "localhost:50051")),
        ("dns:///gateway:50051", ("", "dns:///gateway:50051")),
        ("https://gateway", ("https", "gateway:443")),
        ("https://gateway/", ("https", "gateway:443")),
        ("https://gateway:8443", ("https", "gateway:8443")),
        ("http://gateway", ("http", "gateway:80")),
        ("https://[::1]", ("https", "[::1]:443")),
        ("https://[::1]:8443", ("https", "[::1]:8443")),
    ],
)
def test_an_address_says_where_and_whether_with_tls(address, found):
    assert target(address) == found


def test_a_file_that_cannot_be_read_is_told_with_its_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HIBUG2_TLS_CA_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"HIBUG2_TLS_CA_FILE: .*none cannot be read"):
        open_channel("https://gateway")


def test_a_certificate_goes_with_its_key(monkeypatch, tmp_path):
    (tmp_path / "tls.crt").write_bytes(b"-")
    monkeypatch.setenv("HIBUG2_TLS_CERT_FILE", str(tmp_path / "tls.crt"))
    with pytest.raises(UserError, match="HIBUG2_TLS_KEY_FILE"):
        open_channel("https://gateway")
