"""Who may ask the dashboard for what.

It listens on loopback, but so does every page in the operator's browser reach it: hence the checks of
Host (no foreign name may resolve to it), of Origin (no other page may ask for a change) and of
Content-Type (no form may). What changes or computes something needs the credential of the gRPC port
that offers the same. Knows no address and no message.
"""

from typing import Self
from urllib.parse import urlsplit

import grpc
from aiohttp import web

from fusewire.service.auth import BearerTokens, Unauthenticated
from fusewire.service.config import is_loopback
from fusewire.service.dashboard.errors import Handler, HttpRefusal
from fusewire.service.rpc.errors import StatusError


@web.middleware
async def check_source(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what does not come from the page itself or from a program of this machine.

    421 for a Host that is not loopback; for a POST also 403 for the Origin of another page and 415 for a
    body that is not JSON.
    """
    host = request.headers.get("Host", "")
    if not _is_loopback_host(host):
        raise HttpRefusal(421, grpc.StatusCode.PERMISSION_DENIED, "Host: must be a loopback address")
    if request.method == "POST":
        origin = request.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{host}".lower():
            raise StatusError(grpc.StatusCode.PERMISSION_DENIED, "Origin: must be that of the dashboard")
        if request.content_type != "application/json":
            raise HttpRefusal(415, grpc.StatusCode.INVALID_ARGUMENT, "Content-Type: must be application/json")
    return await handler(request)


def _is_loopback_host(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


class Door:
    """The credential of one gRPC port, asked for over HTTP.

    Args:
        tokens: any of them opens it; None if the port has none.
        needs_certificate: whether the port lets in only clients with a certificate. None can be shown
            here, so then a token is the only way in.
    """

    def __init__(self, tokens: BearerTokens | None, needs_certificate: bool) -> None:
        self._tokens = tokens
        self._is_shut = tokens is None and needs_certificate

    @classmethod
    def of(cls, token_file: str, client_ca: str) -> Self:
        """Read the files that the gRPC port reads.

        Raises:
            CredentialError: if the file of tokens cannot be used.
        """
        return cls(BearerTokens.load(token_file) if token_file else None, bool(client_ca))

    @property
    def needs_token(self) -> bool:
        """Whether a bearer token is asked for."""
        return self._tokens is not None

    def identify(self, request: web.Request) -> str:
        """Return the caller's name, as the gRPC port calls it; "" where no credential is asked for.

        Raises:
            StatusError: UNAUTHENTICATED without a credential, PERMISSION_DENIED with a wrong one.
        """
        if self._is_shut:
            raise StatusError(
                grpc.StatusCode.PERMISSION_DENIED,
                "the gRPC port asks for client certificates, which a page has not; give it a token file",
            )
        if self._tokens is None:
            return ""
        authorization = request.headers.get("Authorization")
        try:
            return self._tokens.identify(authorization)
        except Unauthenticated as error:
            missing = authorization is None
            code = grpc.StatusCode.UNAUTHENTICATED if missing else grpc.StatusCode.PERMISSION_DENIED
            raise StatusError(code, str(error)) from None
