"""Conversations to text, by the Jinja template that comes with a model.

A template finds here what transformers gives it: the same settings, filters, functions and variables, in
a sandbox that can neither change what it is given nor reach out. It comes with the checkpoint, so its
running time is trusted; what it renders is bounded, since the conversation is a client's. Loads neither
torch nor transformers, and knows neither tokens nor the wire.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
SET_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        *NAMED_SPECIAL_TOKENS,
    }
)
"""What no template argument may be called, beside the model's own named tokens."""
MAX_RENDERED_CHARACTERS = 16 << 20

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which Jinja can spell and no encoding has."""
_FINAL_MARK = "END-OF-THE-FINAL-MESSAGE"
"""Stands behind a message that is to be continued; ASCII without spaces, which templates leave alone."""


class ChatTemplateError(ValueError):
    """A conversation cannot be rendered; the message is one line and may be shown to a client.

    Args:
        message: why.
        option: the field of `ChatOptions` that is to blame, if it is one of them.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class UnusableChatTemplate(ChatTemplateError):
    """No conversation can be rendered: the model has no template, or one that cannot be compiled."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a conversation may bring beside its messages; the names are those of the wire's ChatPrompt."""

    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, by name."""
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of the functions that the model may call."""
    continue_final_message: bool = False
    """Leaves the last message open, to be written on, and opens no answer of its own."""


NO_OPTIONS = ChatOptions()


class ChatTemplate:
    """A compiled chat template. Immutable, safe to use from several threads.

    Args:
        source: the template, in Jinja.
        named_tokens: the special tokens that it may use by name, for instance `eos_token`.

    Raises:
        UnusableChatTemplate: if it cannot be compiled; the message tells the line.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        self._named_tokens = dict(named_tokens)
        self._set_names = SET_NAMES.union(named_tokens)
        try:
            self._template = _make_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UnusableChatTemplate(
                f"the model's chat template cannot be used: line {error.lineno}: {_one_line(error.message)}"
            ) from error
        except Exception as error:  # Jinja compiles to Python, whose compiler has limits of its own
            raise UnusableChatTemplate(
                f"the model's chat template cannot be used: {_one_line(error)}"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_OPTIONS) -> str:
        """Render a conversation up to where the answer starts.

        Args:
            messages: each with `role` and `content`, and whatever else the template knows.
            options: what else the template is given.

        Raises:
            ChatTemplateError: if the template refuses the conversation or fails on it, an argument has a
                name that is set here, the final message cannot be continued, or the text grows too long.
        """
        if taken := sorted(self._set_names.intersection(options.template_arguments)):
            raise ChatTemplateError(f"{taken[0]} is set by the server", "template_arguments")
        turns = [_as_template_sees(message) for message in messages]
        if options.continue_final_message:
            turns[-1]["content"] += f"{_FINAL_MARK} "
        text = self._render(
            {
                **self._named_tokens,
                **options.template_arguments,
                "messages": turns,
                "tools": list(options.tools) or None,
                "documents": None,
                "add_generation_prompt": not options.continue_final_message,
            }
        )
        return _cut(text, messages[-1]["content"]) if options.continue_final_message else text

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            return _join(self._template.generate(variables))
        except ChatTemplateError:
            raise
        except _RefusedByTemplate as error:
            raise ChatTemplateError(f"the model's chat template says: {_one_line(error)}") from error
        except Exception as error:  # a template is a program, which can fail in any way
            raise ChatTemplateError("the model's chat template cannot render these messages") from error


def _as_template_sees(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message; some templates know its reasoning by another name, which transformers adds too."""
    reasoning = message.get("reasoning_content")
    return dict(message) if reasoning is None else {"thinking": reasoning, **message}


def _join(pieces: Iterable[str]) -> str:
    kept, room = [], MAX_RENDERED_CHARACTERS
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise ChatTemplateError(
                f"must hold at most {MAX_RENDERED_CHARACTERS} characters once the model's template renders it"
            )
        kept.append(piece)
    text = "".join(kept)
    if _SURROGATE.search(text):
        raise ChatTemplateError("the model's chat template renders what is no text")
    return text


def _cut(text: str, final: str) -> str:
    """Cut a text behind the content of its final message, where the last mark is.

    The mark was followed by a space. Where that is gone, the template trims contents, so the spaces that
    end this one are to go as well. A template may render a content more than once, each with a mark.
    """
    head, mark, tail = text.rpartition(_FINAL_MARK)
    if not mark or final.strip() not in text:
        raise ChatTemplateError(
            "the model's chat template does not render the final message as it is", "continue_final_message"
        )
    head = head.replace(f"{_FINAL_MARK} ", "").replace(_FINAL_MARK, "")
    return head if tail.startswith(" ") else head.rstrip()


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# ---- what a template finds ----


class _RefusedByTemplate(jinja2.TemplateError):
    """A template has called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}`, with which a template for training marks answers: renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to the closing tag; as any block, it keeps the variables that are set inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without underscored names, which could reach into Python."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace holds no {name}")
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the type's own methods, which could change what the template was given."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None, /) -> dict[Any, Any]:
        """Make a dict of equal values."""
        return dict.fromkeys(keys, value)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump as JSON without the HTML escapes of Jinja's own filter, which a model would read as text."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise _RefusedByTemplate(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002  a template may give it by this name
    return datetime.now().strftime(format)
