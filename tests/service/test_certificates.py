"""When certificates expire, against what openssl says of those that it made."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from fusewire.service.certificates import not_after

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="no openssl to make certificates with"
)

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
RSA = ("-newkey", "rsa:2048")


def make(folder: Path, days: int, kind: tuple[str, ...] = EC) -> tuple[bytes, float]:
    """A self-signed certificate and when it expires."""
    file = folder / f"{days}.pem"
    make = ["openssl", "req", "-x509", *kind, "-nodes", "-days", str(days), "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", "/dev/null", "-out", file], check=True, capture_output=True)
    told = subprocess.run(
        ["openssl", "x509", "-enddate", "-noout", "-in", file], check=True, capture_output=True, text=True
    )
    return file.read_bytes(), ssl.cert_time_to_seconds(told.stdout.strip().removeprefix("notAfter="))


@pytest.mark.parametrize(("days", "kind"), [(2, EC), (2, RSA), (20_000, EC)])
def test_a_certificate_tells_when_it_expires(tmp_path: Path, days: int, kind: tuple[str, ...]) -> None:
    pem, expected = make(tmp_path, days, kind)
    assert not_after(pem) == expected


def test_of_a_chain_the_first_to_expire_counts(tmp_path: Path) -> None:
    (late, _), (early, expected) = make(tmp_path, 300), make(tmp_path, 3)
    assert not_after(b"a comment\n" + late + early) == expected


def test_what_is_no_certificate_is_a_value_error(tmp_path: Path) -> None:
    pem, _ = make(tmp_path, 2)
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    broken = [ssl.DER_cert_to_PEM_cert(der[:size]).encode() for size in range(0, len(der), 7)]
    for text in (b"", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----", *broken):
        with pytest.raises(ValueError, match=r"."):
            not_after(text)
