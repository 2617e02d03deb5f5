"""Who may call, and over what: bearer tokens and TLS. Knows neither RPCs nor the wire's messages."""

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Self

import grpc

from fusewire.service.config import ServeConfig


class CredentialError(ValueError):
    """A token file or a TLS file cannot be used; the message is for the operator."""


class Unauthenticated(Exception):
    """A call has no valid credential; the text is shown to the client."""


class NotPermitted(Exception):
    """A call has a credential, but one for another port; the text is shown to the client."""


class BearerTokens:
    """The tokens that open one port. Only their digests are kept.

    Args:
        tokens: as they are sent.
        elsewhere: those that open another port of this server.

    Raises:
        CredentialError: if there is none.
    """

    def __init__(self, tokens: Iterable[str], elsewhere: "BearerTokens | None" = None) -> None:
        self._elsewhere = elsewhere
        self._digests = tuple(sha256(token.encode()).hexdigest() for token in tokens)
        if not self._digests:
            raise CredentialError("a token file must hold at least one token")

    @classmethod
    def load(cls, file: str, elsewhere: "BearerTokens | None" = None) -> Self:
        """Read a file of tokens, one a line; blank lines and spaces around a token do not count.

        Raises:
            CredentialError: if the file cannot be read or holds no token.
        """
        lines = _read(file).decode("utf-8", errors="replace").splitlines()
        try:
            return cls((token for line in lines if (token := line.strip())), elsewhere)
        except CredentialError as error:
            raise CredentialError(f"{file}: {error}") from None

    def identify(self, authorization: str | None) -> str:
        """Return the caller's name, a digest, from the value of an `authorization` header.

        Every token is compared, each in constant time, so that timing tells nothing.

        Raises:
            Unauthenticated: if it holds no bearer token, or none that is known.
            NotPermitted: if its token is known, but opens another port only.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("authorization: a bearer token is needed")
        digest = sha256(token.strip().encode()).hexdigest()
        if self._knows(digest):
            return digest
        if self._elsewhere is not None and self._elsewhere._knows(digest):
            raise NotPermitted("authorization: the bearer token is for another port")
        raise Unauthenticated("authorization: the bearer token is not valid")

    def _knows(self, digest: str) -> bool:
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def server_credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """Read the TLS files; None where TLS is off. With a client CA, clients must present a certificate.

    Raises:
        CredentialError: if a file cannot be read.
    """
    if not config.tls_cert:
        return None
    return grpc.ssl_server_credentials(
        [(_read(config.tls_key), _read(config.tls_cert))],
        root_certificates=_read(config.tls_client_ca) if config.tls_client_ca else None,
        require_client_auth=bool(config.tls_client_ca),
    )


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise CredentialError(f"{file}: {error.strerror}") from error
