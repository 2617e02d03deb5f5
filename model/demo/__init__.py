"""The embedded demo model: where its files lie.

A Qwen3-architecture model of 7 million parameters in Hugging Face format, shipped as package data; its
model card is README.md beside this file. Knows a path only, and imports no torch.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Return the folder that holds config.json, the tokenizer's files and model.safetensors."""
    return Path(__file__).parent
