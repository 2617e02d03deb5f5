"""The model's tokenizer, read by transformers where the model is loaded, in the form that front ends take.

What cannot be served is refused here, before any weight is read.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from fusewire.model.checkpoint import transformers_config
from fusewire.service.messages import MAX_FRAME_BYTES, TokenizerSource
from fusewire.service.tokenizer import TokenizerError, require_byte_level

log = logging.getLogger("fusewire.engine")

_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""What a byte-level BPE tokenizer is stored as: either, whole."""
_MAX_BYTES = MAX_FRAME_BYTES // 2
"""Of its JSON, which travels in one frame with the rest of what the engine tells at first."""
_NAMED = 8
"""How many surplus tokens a warning names."""


def require_files(folder: Path) -> None:
    """Raise TokenizerError if a folder has no tokenizer at all."""
    if not any(all((folder / name).is_file() for name in names) for names in _FILES):
        raise TokenizerError(
            f"tokenizer in {folder}: there is neither tokenizer.json nor vocab.json with merges.txt"
        )


def read_tokenizer(folder: Path) -> TokenizerSource:
    """Let transformers read the tokenizer of a folder, and warn of tokens that the model does not have.

    Raises:
        TokenizerError: if there is none, or none that can be served; it names the folder.
        ModelError: if `config.json` is not one of a model that can be served.
    """
    from transformers import AutoTokenizer  # some versions bring seconds of imports along for it

    require_files(folder)
    config = transformers_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
        source = _source_of(tokenizer)
    except Exception as error:  # whatever the files can hold, it is their fault
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"tokenizer in {folder}: {problem}") from error
    _warn_of_surplus(tokenizer.get_vocab(), config.vocab_size)
    return source


def _source_of(tokenizer: object) -> TokenizerSource:
    from transformers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend):
        raise TokenizerError(f"only byte-level BPE can be served, got {type(tokenizer).__name__}")
    require_byte_level(tokenizer.backend_tokenizer)
    json = tokenizer.backend_tokenizer.to_str()
    if len(json.encode()) > _MAX_BYTES:
        raise TokenizerError(f"takes more than {_MAX_BYTES >> 20} MiB as JSON")
    templates = tokenizer.chat_template or {}
    return TokenizerSource(
        json=json,
        chat_templates=templates if isinstance(templates, dict) else {"default": templates},
        named_tokens=tokenizer.special_tokens_map,
        split_special_tokens=tokenizer.split_special_tokens,
    )


def _warn_of_surplus(vocabulary: Mapping[str, int], vocab_size: int) -> None:
    """Tell of tokens that the model cannot read: their ids have no row in the embedding."""
    surplus = sorted((index, token) for token, index in vocabulary.items() if index >= vocab_size)
    if surplus:
        named = ", ".join(f"{token!r} ({index})" for index, token in surplus[:_NAMED])
        log.warning(
            "%d of the tokenizer's tokens are beyond the model's vocabulary of %d, and a prompt that holds "
            "one is refused: %s%s",
            len(surplus),
            vocab_size,
            named,
            ", …" if len(surplus) > _NAMED else "",
        )
