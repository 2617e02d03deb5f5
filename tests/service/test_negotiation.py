"""Which of its formats a scrape gets, by what its client says that it takes."""

import pytest

from fusewire.service.negotiation import prefers_openmetrics, takes_gzip

PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    "accept",
    [
        PROMETHEUS_3,
        "application/openmetrics-text",
        "text/plain;q=0.5, Application/OpenMetrics-Text; version=1.0.0; q=0.7",
        "application/openmetrics-text;version=2.0.0, application/openmetrics-text;version=1.0.0;q=0.5",
        "application/openmetrics-text, text/plain;q=bad",
        "text/plain;q=0.1, application/openmetrics-text;q=0.2, */*",  # which is of all but these
    ],
)
def test_openmetrics_is_for_who_likes_it_best(accept: str) -> None:
    assert prefers_openmetrics(accept)


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "text/plain",
        "*/*",
        "application/openmetrics-text;q=0",
        "text/plain, application/openmetrics-text;q=0.9",
        "application/openmetrics-text;q=0.1, */*;q=0.2",
        "application/openmetrics-text;version=2.0.0",
        "application/openmetrics-text;version=none",
        "application/openmetrics-text;q=nan",
        "application/openmetrics-textual",
        'text/html;title="a, application/openmetrics-text"',
    ],
)
def test_text_is_for_everyone_else(accept: str) -> None:
    assert not prefers_openmetrics(accept)


@pytest.mark.parametrize(
    "encodings",
    [
        "gzip",
        "gzip, deflate",
        "GZIP",
        "x-gzip",
        "br, gzip;q=0.1",
        "*",
        "identity;q=0.5, *",
        "deflate;q=1.0, GZip ; Q=0.5",
    ],
)
def test_gzip_is_for_who_takes_it(encodings: str) -> None:
    assert takes_gzip(encodings)


@pytest.mark.parametrize(
    "encodings",
    [
        "",
        "gzip;q=0",
        "gzip; q=0.000, *",
        "x-gzipped",
        "notgzip",
        "br",
        "*;q=0",
        "identity, gzip;q=0.5",
        "gzip;q=2",
        "gzip;q=-1",
    ],
)
def test_gzip_is_not_for_who_does_not_take_it_or_likes_it_less(encodings: str) -> None:
    assert not takes_gzip(encodings)
