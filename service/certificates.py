"""Tells when TLS certificates expire.

Reads of X.509's DER only the way to the validity, so that no library of cryptography is needed for one date.
"""

import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
VERSION = 0xA0
TIME_FORMATS = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}
"""UTCTime, which stands for years before 2050, and GeneralizedTime."""


def not_after(chain: bytes) -> float:
    """When the first certificate of a PEM file expires, in Unix time: a chain is of use no longer.

    Raises:
        ValueError: if there is no certificate in it, or one that cannot be read.
    """
    found = PEM.findall(chain.decode("latin-1"))
    if not found:
        raise ValueError("no certificate")
    return min(_not_after(ssl.PEM_cert_to_DER_cert(each)) for each in found)


def _not_after(der: bytes) -> float:
    """Go to the signed part, and there past version, serial, algorithm and issuer to the validity."""
    (_, certificate), *_ = _elements(der)
    (_, signed), *_ = _elements(certificate)
    fields = [content for tag, content in _elements(signed) if tag != VERSION]
    if len(fields) < 4:
        raise ValueError("not a certificate")
    _, (tag, text), *_ = _elements(fields[3])
    if tag not in TIME_FORMATS:
        raise ValueError("not a certificate")
    return datetime.strptime(text.decode("ascii"), TIME_FORMATS[tag]).replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut a sequence's content into tags and contents."""
    place = 0
    while place < len(der):
        if place + 2 > len(der):
            raise ValueError("a certificate is cut short")
        tag, length = der[place], der[place + 1]
        place += 2
        if length & 0x80:  # the length of the length
            size = length & 0x7F
            length = int.from_bytes(der[place : place + size])
            place += size
        if place + length > len(der):
            raise ValueError("a certificate is cut short")
        yield tag, der[place : place + length]
        place += length
