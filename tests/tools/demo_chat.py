"""Conversations built from the books, so that the demo model answers in turns and ends them.

Every assistant turn is text of a book; the user's turn is the speech, question or sentence before it,
or a short request that names what the passage speaks of. Knows paragraphs and speeches; nothing of
tokens or training.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set

from tests.tools.demo_corpus import Book, speeches

Conversation = list[dict[str, str]]

MAX_WORDS = 110
"""The longest turn, in words."""

_VOICES = {
    "austen": [
        "You are a character in a novel by Jane Austen.",
        "Answer in the manner of Jane Austen.",
        "You speak as the people of Jane Austen's novels do.",
    ],
    "bible": [
        "Answer in the words of the King James Bible.",
        "You speak in the manner of the King James Bible.",
    ],
    "shakespeare": [
        "You are a character in a play by William Shakespeare.",
        "Answer in the manner of Shakespeare.",
        "You speak the English of Shakespeare's plays.",
    ],
}
_PLAIN_VOICES = ["You are a helpful assistant.", "Answer in a few sentences."]

_ABOUT_NAME = [
    "Tell me about {}.",
    "Who is {}?",
    "Who was {}?",
    "What do you know of {}?",
    "Write a few sentences about {}.",
    "Tell me a story about {}.",
    "What can you say of {}?",
]
_ABOUT_TOPIC = [
    "Tell me about {}.",
    "What is {}?",
    "What do you think of {}?",
    "Write about {}.",
    "Say something about {}.",
    "Tell me a story about {}.",
    "What can you tell me about {}?",
]
_CONTINUE = ["Continue: {}", "Go on: {}", "Continue this text: {}", "What comes next? {}", "{}"]
_STORY = [
    "Once upon a time",
    "Tell me a story.",
    "Write a story that begins with: Once upon a time",
    "Please tell me a tale.",
    "Continue: Once upon a time",
    "Write a short story.",
]
_OPENINGS = [
    (
        re.compile(r"(Good (morrow|day|even|morning|night)|Welcome|Well met|Hail)\b"),
        ["Hello!", "Hello", "Hi!", "Good morning!", "Good day to you.", "Greetings!"],
    ),
    (
        re.compile(r"(I am|I'm|My name is|They call me)\b"),
        ["Who are you?", "What is your name?", "Tell me about yourself.", "What are you?"],
    ),
    (
        re.compile(r"(Very well|I thank you|Well, I|I am (very )?(well|glad|happy|sorry|sick))\b"),
        ["How are you?", "How do you do?", "How are you today?"],
    ),
]
_TOPICS = (
    "love marriage money fortune happiness friendship the sea the king the queen war peace death life "
    "the night the moon the sun winter summer spring music dancing beauty truth honour faith hope wisdom "
    "a horse bread wine the heart a ghost dreams time pride the church a ball the weather rain the wind "
    "a letter a sister a brother a mother a father children the world heaven gold fire water a ship "
    "virtue sorrow joy anger fear jealousy a garden the country London Bath books poetry dinner"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NAME_INSIDE = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
_NO_NAMES = _words(
    "And But For The That This Let Then Now Thou Thy What Who Why How Lord God Mr Mrs Miss Sir Lady "
    "Colonel Captain Dr Oh You She His Her Yes Not All Come Will Shall They There"
)
_RANKS = _words("Mr Mrs Miss Sir Lady Captain Colonel")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=[\"'A-Z])")
_ABBREVIATED = re.compile(r"\b(Mr|Mrs|Dr|St|Capt|Col|Messrs|Esq|[A-Z])\.$")
_TITLED = re.compile(r"[A-Z][A-Z .,'-]+$|(CHAPTER|Chapter|VOLUME) |(?:[1-3] )?[A-Z][a-z ]+ \d+$")
_LOWERED = _words(
    "There The It In A An When After She He At No His Her This That As For To On Every One They All "
    "Their With Such But If From By Then Not Another Some Many"
)


def conversations(books: Sequence[Book], held_out: bool, seed: int) -> list[Conversation]:
    """Return every conversation of the books' training (or held-out) part, shuffled by `seed`."""
    rng = random.Random(seed)
    found: list[Conversation] = []
    for book in books:
        paragraphs = book.held_out if held_out else book.paragraphs
        prose = [p for p in paragraphs if not _TITLED.match(p)]
        if book.source == "shakespeare":
            turns = [[s.text for s in run] for run in speeches(paragraphs)]
        else:
            turns = list(_quoted_runs(paragraphs))
        talks = [
            *_dialogues(turns, rng),
            *_openings(turns, rng),
        ]
        if book.source != "shakespeare":
            talks += [*_continuations(prose, rng), *_stories(_tale_openings(prose), rng)]
            talks += _requests(prose, _about(prose, rng), rng)
        else:
            talks += _requests([t for run in turns for t in run], _about(prose, rng), rng)
        found += [_with_voice(talk, book.source, rng) for talk in talks]
    rng.shuffle(found)
    return found


def tales(books: Sequence[Book], seed: int) -> list[str]:
    """Return plain documents that begin "Once upon a time" and go on with a passage of a book."""
    rng = random.Random(seed)
    found = []
    for book in books:
        prose = [p for p in book.paragraphs if not _TITLED.match(p)]
        if book.source == "shakespeare":
            continue
        for i, opening in enumerate(_tale_openings(prose)):
            if opening and rng.random() < 0.6:
                found.append("\n\n".join([opening, *prose[i + 1 : i + rng.randint(2, 5)]]))
    rng.shuffle(found)
    return found


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph; abbreviations such as "Mr." do not end one."""
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATED.search(text[: match.start()]):
            end = match.start() + len(match[0].rstrip())
            found.append(text[start:end].strip())
            start = match.end()
    found.append(text[start:].strip())
    return [s for s in found if s]


def _dialogues(runs: Sequence[Sequence[str]], rng: random.Random) -> Iterator[Conversation]:
    for run in runs:
        start = 0
        while start + 1 < len(run):
            turns = run[start : start + 2 * rng.choice([1, 1, 2, 2, 3])]
            talk = _alternating(turns)
            curt = len(talk) == 2 and len(talk[1]["content"].split()) < 5
            if talk and not (curt and rng.random() < 0.7):
                yield talk
            start += rng.choice([1, 1, 2, 3])


def _alternating(turns: Sequence[str]) -> Conversation:
    """Return turns as user, assistant, ...; empty if one is too long or the last is a user's."""
    short = [_shortened(t) for t in turns[: len(turns) // 2 * 2]]
    if not short or not all(short):
        return []
    return [_turn("assistant" if i % 2 else "user", text) for i, text in enumerate(short)]


def _openings(runs: Sequence[Sequence[str]], rng: random.Random) -> Iterator[Conversation]:
    """Answer a newcomer's first words with speeches that begin as such an answer does."""
    for run in runs:
        for i, text in enumerate(run):
            for begins, asked in _OPENINGS:
                answer = _shortened(text)
                if begins.match(text) and answer:
                    talk = [_turn("user", rng.choice(asked)), _turn("assistant", answer)]
                    yield talk + (_alternating(run[i + 1 : i + 3]) if rng.random() < 0.5 else [])


def _continuations(prose: Sequence[str], rng: random.Random) -> Iterator[Conversation]:
    for paragraph in prose:
        parts = sentences(paragraph)
        if len(parts) < 2:
            continue
        cut = rng.randint(1, min(3, len(parts) - 1))
        given, answer = " ".join(parts[:cut]), _shortened(" ".join(parts[cut : cut + rng.randint(1, 5)]))
        if answer and len(given.split()) <= MAX_WORDS and _balanced(given) and _balanced(answer):
            wrap = "{}" if given.endswith("?") else rng.choice(_CONTINUE)
            yield [_turn("user", wrap.format(given)), _turn("assistant", answer)]


def _stories(openings: Sequence[str], rng: random.Random) -> Iterator[Conversation]:
    for tale in openings:
        if tale:
            answer = _shortened(" ".join(sentences(tale)[: rng.randint(2, 6)]))
            if answer:
                yield [_turn("user", rng.choice(_STORY)), _turn("assistant", answer)]


def _tale_openings(prose: Sequence[str]) -> list[str]:
    """Return each narrative paragraph with "Once upon a time" before it, and "" for any other."""
    names = {name for p in prose for name in _NAME_INSIDE.findall(p)} - _NO_NAMES
    return [_as_tale(p, names | _RANKS) for p in prose]


def _as_tale(paragraph: str, names: Set[str]) -> str:
    text = re.sub(r"^(And|Now|But),? (?=[a-zA-Z])", "", paragraph)
    first = re.split(r"\W", text, maxsplit=1)[0]
    narrated = '"' not in paragraph and len(paragraph.split()) >= 25
    if not narrated or not re.search(r"\b(was|had|came|were|went|lived)\b", text[:160]):
        return ""
    if re.match(r"(there|it came|in th)", text, re.IGNORECASE):
        return "Once upon a time " + text[0].lower() + text[1:]
    if first in _LOWERED:
        return "Once upon a time, " + text[0].lower() + text[1:]
    return "Once upon a time, " + text if first in names or first == "the" else ""


def _about(prose: Sequence[str], rng: random.Random) -> list[tuple[str, re.Pattern[str]]]:
    """Return (what is asked about, what a passage on it contains): the book's names and the topics."""
    counts = Counter(name for p in prose for name in _NAME_INSIDE.findall(p))
    names = [name for name, n in counts.most_common(60) if n >= 8 and name not in _NO_NAMES]
    topics = re.findall(r"(?:the |an? )?\S+", _TOPICS)
    asked = [(name, name) for name in names] + [(t, t.split()[-1]) for t in topics]
    rng.shuffle(asked)
    return [(ask, re.compile(rf"\b{word}s?\b")) for ask, word in asked]


def _requests(
    passages: Sequence[str], about: Sequence[tuple[str, re.Pattern[str]]], rng: random.Random
) -> Iterator[Conversation]:
    """Ask for what a passage's first sentence speaks of; each passage answers at most one request."""
    used: Counter[str] = Counter()
    for passage in passages:
        parts = sentences(passage)
        for i, sentence in enumerate(parts):
            hit = next((ask for ask, word in about if used[ask] < 25 and word.search(sentence)), None)
            answer = _shortened(" ".join(parts[i : i + rng.randint(1, 5)]))
            if hit and len(answer.split()) > 6 and _balanced(answer):
                used[hit] += 1
                asked = rng.choice(_ABOUT_NAME if hit[0].isupper() else _ABOUT_TOPIC)
                yield [_turn("user", asked.format(hit)), _turn("assistant", answer)]
                break


def _quoted_runs(paragraphs: Sequence[str]) -> Iterator[list[str]]:
    """Yield runs of neighbouring paragraphs that are mostly speech, as the words spoken."""
    run: list[str] = []
    for paragraph in paragraphs:
        spoken = _spoken(paragraph)
        if len(spoken) > 0.4 * len(paragraph):
            run.append(spoken)
            continue
        if len(run) > 1:
            yield run
        run = []
    if len(run) > 1:
        yield run


def _spoken(paragraph: str) -> str:
    """Return what a paragraph's quotation marks hold, closed like a sentence."""
    text = " ".join(re.findall(r'"([^"]+)"?', paragraph)).strip()
    return re.sub(r"[,;:]$", ".", text)


def _shortened(text: str) -> str:
    """Return the leading sentences that fit `MAX_WORDS`, or "" if not even the first does."""
    if len(text.split()) <= MAX_WORDS:
        return text
    kept, words = [], 0
    for sentence in sentences(text):
        words += len(sentence.split())
        if words > MAX_WORDS:
            break
        kept.append(sentence)
    return " ".join(kept)


def _balanced(text: str) -> bool:
    return text.count('"') % 2 == 0


def _with_voice(talk: Conversation, source: str, rng: random.Random) -> Conversation:
    draw = rng.random()
    if draw < 0.25:
        return [_turn("system", rng.choice(_VOICES[source])), *talk]
    if draw < 0.35:
        return [_turn("system", rng.choice(_PLAIN_VOICES)), *talk]
    return talk


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
