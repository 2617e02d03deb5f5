"""The embedded model's tokenizer without an engine that tells it, and without transformers."""

import json
from functools import cache

from fusewire.model import demo
from fusewire.service.messages import TokenizerSource
from fusewire.service.tokenizer import Tokenizer


@cache
def demo_source() -> TokenizerSource:
    """What an engine that serves the embedded model tells of its tokenizer, but for the JSON's layout."""
    config = json.loads((demo.path() / "tokenizer_config.json").read_text("utf-8"))
    return TokenizerSource(
        json=(demo.path() / "tokenizer.json").read_text("utf-8"),
        chat_templates={"default": config["chat_template"]},
        named_tokens={name: config[name] for name in ("eos_token", "pad_token")},
    )


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.build(demo_source())
