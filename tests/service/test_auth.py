"""Token files and the names of callers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.service.auth import (
    BearerTokens,
    CredentialError,
    NotPermitted,
    Unauthenticated,
    server_credentials,
)
from fusewire.service.config import ServeConfig

TOKEN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@given(st.lists(TOKEN, min_size=1, max_size=5, unique=True), TOKEN)
def test_only_known_tokens_are_let_in_each_with_a_name_of_its_own(tokens: list[str], other: str) -> None:
    bearer = BearerTokens(tokens)
    names = [bearer.identify(f"Bearer {token}") for token in tokens]
    assert len(set(names)) == len(tokens)
    assert not set(names) & set(tokens)
    if other not in tokens:
        with pytest.raises(Unauthenticated):
            bearer.identify(f"Bearer {other}")


def test_a_token_of_another_port_is_known_and_not_let_in() -> None:
    bearer = BearerTokens(["one"], BearerTokens(["two", "one"]))
    bearer.identify("Bearer one")
    with pytest.raises(NotPermitted):
        bearer.identify("Bearer two")
    with pytest.raises(Unauthenticated):
        bearer.identify("Bearer three")


def test_a_file_holds_a_token_a_line(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("\n  one \r\n\ntwo")
    bearer = BearerTokens.load(str(tmp_path / "tokens"))
    assert bearer.identify("Bearer one") != bearer.identify("bearer  two")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(CredentialError, match="tokens"):
        BearerTokens.load(str(tmp_path / "tokens"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CredentialError, match="absent"):
        BearerTokens.load(str(tmp_path / "absent"))
    with pytest.raises(CredentialError, match="absent"):
        server_credentials(ServeConfig(tls_cert=str(tmp_path / "absent"), tls_key=str(tmp_path / "absent")))


def test_without_tls_there_are_no_credentials() -> None:
    assert server_credentials(ServeConfig()) is None
