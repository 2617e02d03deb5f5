"""The demo model's tokenizer with another chat template, or with tokens that the model has not."""

import json

import msgspec

from fusewire.service.tokenizer import Tokenizer
from tests.tools.demo_tokenizer import demo_source


def odd_tokenizer(template: str | None = None, added: str | None = None) -> Tokenizer:
    """Build the changed tokenizer; an added token gets the next free id."""
    source = demo_source()
    content = json.loads(source.json)
    if added is not None:
        [*_, last] = content["added_tokens"]
        content["added_tokens"].append({**last, "id": last["id"] + 1, "content": added})
    templates = source.chat_templates if template is None else {"default": template}
    return Tokenizer.build(
        msgspec.structs.replace(source, json=json.dumps(content), chat_templates=templates)
    )
