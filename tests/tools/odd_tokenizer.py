"""The demo model's tokenizer with another chat template, or with tokens that the model has not."""

import json
from pathlib import Path

from fusewire.model import demo
from fusewire.service.tokenizer import Tokenizer


def odd_tokenizer(folder: Path, template: str | None = None, added: str | None = None) -> Tokenizer:
    """Write the changed files into an empty folder and load them; an added token gets the next free id."""
    content = json.loads((demo.path() / "tokenizer.json").read_text("utf-8"))
    if added is not None:
        [*_, last] = content["added_tokens"]
        content["added_tokens"].append({**last, "id": last["id"] + 1, "content": added})
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    config = json.loads((demo.path() / "tokenizer_config.json").read_text("utf-8"))
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return Tokenizer.load(folder)
