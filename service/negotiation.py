"""What an HTTP client takes, by its headers Accept and Accept-Encoding (RFC 9110, section 12).

Knows the formats of metrics, and nobody that serves them.
"""

from typing import NamedTuple
from urllib.request import parse_http_list

OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_VERSION = "1.0.0"
TEXT_RANGES = ("text/plain", "text/*", "*/*")
"""What names Prometheus' text format, the most specific first."""


class Taken(NamedTuple):
    """One element of such a header."""

    name: str
    """In lower case."""
    quality: float
    """0, for what is not taken, to 1."""
    version: str
    """The parameter `version`; empty without one."""


def read_taken(header: str) -> list[Taken]:
    """Read the elements of a header; one whose quality cannot be read is not taken."""
    found = []
    for element in parse_http_list(header):
        name, *parameters = element.split(";")
        pairs = (parameter.partition("=") for parameter in parameters)
        given = {key.strip().lower(): value.strip().strip('"') for key, _, value in pairs}
        found.append(Taken(name.strip().lower(), _quality(given.get("q", "1")), given.get("version", "")))
    return found


def _quality(text: str) -> float:
    try:
        quality = float(text)
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0


def prefers_openmetrics(accept: str) -> bool:
    """Whether a client that says so in Accept names OpenMetrics 1.0 and likes no text format better."""
    taken = read_taken(accept)
    usable = [each for each in taken if each.name != OPENMETRICS or each.version in ("", OPENMETRICS_VERSION)]
    best: dict[str, float] = {}
    for each in usable:
        best[each.name] = max(each.quality, best.get(each.name, 0.0))
    text = next((best[name] for name in TEXT_RANGES if name in best), 0.0)
    return 0 < best.get(OPENMETRICS, 0.0) >= text


def takes_gzip(accept_encoding: str) -> bool:
    """Whether a client that says so in Accept-Encoding takes gzip, and no plain text rather than that."""
    taken = {element.name: element.quality for element in read_taken(accept_encoding)}
    gzip = taken.get("gzip", taken.get("x-gzip", taken.get("*", 0.0)))
    return 0 < gzip >= taken.get("identity", 0.0)
