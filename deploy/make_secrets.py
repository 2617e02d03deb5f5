"""Writes a random secret into each named file of a folder, unless the file is there.

Run by the service `secrets` of compose.yaml, with the folders as volumes that nobody else writes to.
Knows nothing of what a secret is for.
"""

import secrets
import sys
from pathlib import Path

READABLE = 0o444
"""Its reader has a uid of its own; the folder keeps everybody else out."""


def make(file: Path) -> None:
    """Write a secret of 256 bits, as one line without an end; a file that is there stays as it is."""
    if file.exists():
        return
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(secrets.token_urlsafe(32))
    unfinished.chmod(READABLE)
    unfinished.replace(file)
    print(f"made {file}")


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names:
        make(Path(folder) / name)
