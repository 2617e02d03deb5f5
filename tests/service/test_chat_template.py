"""Chat templates against transformers' rendering of the same, and what is refused.

Templates of the wild join the corpus by FUSEWIRE_TEST_TEMPLATES, a list of files separated as in PATH:
Jinja sources, or `tokenizer_config.json` files that hold one.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.service import chat_template
from fusewire.service.chat_template import (
    ChatOptions,
    ChatTemplate,
    ChatTemplateError,
    UnusableChatTemplate,
)
from fusewire.service.tokenizer import Tokenizer

DEMO = Path(str(files("fusewire.model.demo")))
STYLES = Path(__file__).parent / "chat_templates"
EACH = "{% for m in messages %}"
CORPUS: dict[str, str] = {
    "generation": EACH + "{% if m.role == 'assistant' %}{% generation %}<a>{{ m.content }}</a>\n"
    "{% endgeneration %}{% else %}<u>{{ m.content }}</u>{% endif %}{% endfor %}",
    "generation trims": EACH
    + "  {%- generation -%}  \n {{ m.content }} \n{%- endgeneration %}  \n{% endfor %}",
    "generation lines": EACH
    + "\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n\n",
    "generation scope": "{% set x = 1 %}{% set n = namespace(x=1) %}" + EACH + "{% generation %}"
    "{% set x = 2 %}{% set n.x = n.x + loop.index %}{{ x }}{% endgeneration %}{{ x }}{{ n.x }}{% endfor %}",
    "generation inside": "{% macro say(m) %}{% generation %}{% generation %}{{ m.content }}"
    "{% endgeneration %}!{% endgeneration %}{% endmacro %}" + EACH + "{% set said %}{{ say(m) }}{% endset %}"
    "{% filter upper %}{{ said }}{% generation %}x{% endgeneration %}{% endfilter %}{% endfor %}",
    "loop controls": EACH
    + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}{{ m.content }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "tojson": EACH
    + "{# content #}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m | tojson(ensure_ascii=true) }}"
    "{{ m | tojson(sort_keys=True, separators=(',', ':')) }}{% endfor %}{{ tools | tojson(indent=4) }}",
    "messages whole": "{# content #}{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}",
    "strftime_now": "{{ strftime_now('%Y') }}{{ strftime_now(format='%Y') }}"
    + EACH
    + "{{ m.content }}{% endfor %}",
    "raise_exception": EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set n = namespace({'a': 1}, found=false, self=3) %}"
    + EACH
    + "{% if m.content %}{% set n.found = m.content %}{% endif %}{% endfor %}"
    "{{ n.found }}{{ n.a }}{{ n.self }}",
    "namespace underscore": "{% set n = namespace(_a=1) %}",
    "namespace set underscore": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a'], 1) }}",
    "dict changes": "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "macro": "{% macro turn(m, end='</s>') %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ end }}\n"
    "{% endmacro %}" + EACH + "{{ turn(m) }}{{ turn(m, end='') -}}{% endfor %}",
    "call": "{% macro box() %}<{{ caller() }}>{% endmacro %}"
    + EACH
    + "{% call box() %}{{ m.content }}{% endcall %}{% endfor %}",
    "whitespace": "\n  {%- for m in messages -%}\n  {{ m.content }}  \n\n"
    "  {%+ if true %} x {% endif +%}\n\n{% endfor %}\n\n",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}"
    + EACH
    + "{{ m.content + eos_token }}{% endfor %}",
    "keys": EACH + "{{ m.keys() | list }}{{ m.tool_calls is defined }}{{ m.tool_call_id is defined }}"
    "{{ m.reasoning_content is defined }}{{ m.thinking }}{{ m.get('tool_calls') }}{% endfor %}",
    "arguments": EACH + "{{ m.content }}{% endfor %}{{ enable_thinking is defined }}{{ enable_thinking }}"
    "{{ x }}{{ x.y }}{{ style | default('plain') }}",
    "tool use": "{% for t in tools %}{{ t.function.name }}:"
    "{% for k, v in t.function.parameters.properties.items() %}{{ k }}={{ v.type }};{% endfor %}{% endfor %}"
    + EACH
    + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{{ m.tool_call_id }}{% endfor %}",
    "filters": EACH
    + "{{ m.role | trim | length }}{{ m.content | replace('<', '(') | e }}{{ m | items | list }}"
    "{{ m.content.split('\n') | join('|') }}{{ m.content[:3] | upper }}{% endfor %}"
    "{{ messages | map(attribute='role') | unique | join }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "trims": EACH + "<{{ m.content | trim }}>{% endfor %}",
    "drops the last": "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
    "twice": EACH + "{{ m.content }}{% endfor %}" + EACH + "{{ m.content }}.{% endfor %}",
    "escapes": EACH + "{{ m.content | tojson }}{% endfor %}",
    "undefined": "{{ messages[0].nothing.at.all }}",
    "dunder": "{{ messages.__class__.__mro__ }}",
    "mutates": "{% set _ = messages.append(1) %}",
    "attribute error": "{{ 5 | dictsort }}",
    "recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "divides": "{{ 1 / 0 }}",
}
REFUSES_ALL = {
    "namespace underscore",
    "namespace set underscore",
    "dict changes",
    "undefined",
    "dunder",
    "mutates",
    "attribute error",
    "recursion",
    "divides",
}
"""Templates that can render nothing, in transformers neither."""


def _templates() -> dict[str, str]:
    wild = [Path(name) for name in os.environ.get("FUSEWIRE_TEST_TEMPLATES", "").split(os.pathsep) if name]
    found = CORPUS | {file.stem: file.read_text("utf-8") for file in sorted(STYLES.glob("*.jinja"))}
    for file in wild:
        text = file.read_text("utf-8")
        found[str(file)] = json.loads(text)["chat_template"] if file.suffix == ".json" else text
    return found


TEMPLATES = _templates()

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the <b>weather</b> & more, in 東京.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "東京", "days": 2}}}
TEXT_CALL = {"id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}


def say(*turns: str | dict[str, Any]) -> list[dict[str, Any]]:
    """Turns of user and assistant, one after the other; a dict is a turn as it is."""
    roles = ("user", "assistant")
    return [
        turn if isinstance(turn, dict) else {"role": roles[index % 2], "content": turn}
        for index, turn in enumerate(turns)
    ]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def result(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


THEIR_MARK = "CONTINUE_FINAL_MESSAGE_TAG"
THOUGHT = "<think>\nLet me see.\n</think>\n\nYes."
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": say("Hello"),
    "empty": say("", "", ""),
    "spaces": [system("  \n "), {"role": "user", "content": " a \n\n"}, assistant("\n b  ")],
    "system": [system("Be brief."), {"role": "user", "content": "Hi"}],
    "late system": [*say("Hi", "Ho"), system("Now in verse.")],
    "special tokens": say("<|im_end|>\n<|im_start|>system\nx<|endoftext|>", "[gMASK]<sop><|user|>", "</s>"),
    "thoughts": say("a", THOUGHT, "b", THOUGHT),
    "thoughts now": say("a", THOUGHT),
    "broken thoughts": say(
        "a", "<think>\nno end", "b", "no start</think>c", "</think></think><think>", "<think>"
    ),
    "reasoning": say(
        "a", assistant("b", reasoning_content="\nhm\n"), "c", assistant("", reasoning_content="")
    ),
    "reasoning and tags": say("a", assistant(THOUGHT, reasoning_content="other")),
    "unicode": say("é e\u0301 漢字 👩‍👩‍👧‍👦 \u202e\u200b\x00\x1b\u2028\ufeff", "\U0010ffff", "ß"),
    "html": say("<b>&amp; \"'</b> {{ messages }} {% raw %}", "\\n \\u0041 %s {0}"),
    "long lines": say("x" * 100_000, "y \n" * 30_000),
    "tool call": say("w?", assistant("", tool_calls=[CALL]), result("5°"), assistant("Cold.")),
    "two calls": say(
        "w?",
        assistant("Let me see.", tool_calls=[CALL, TEXT_CALL], reasoning_content="two"),
        result("5°", tool_call_id="c0"),
        result('{"t": 7}', tool_call_id="c1"),
    ),
    "stray result": [result("<tool_response>")],
    "many": say(*(f"turn {number}" for number in range(200))),
}
OPTIONS: dict[str, ChatOptions] = {
    "plain": ChatOptions(),
    "no thinking": ChatOptions(template_arguments={"enable_thinking": False}),
    "tools": ChatOptions(tools=[TOOL, TOOL], template_arguments={"x": {"y": [1, 2.5, None]}, "style": "<é>"}),
    "continued": ChatOptions(continue_final_message=True),
}


@cache
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@cache
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, theirs().special_tokens_map)


def ours(source: str, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str | None:
    try:
        return compiled(source).render(messages, options)
    except ChatTemplateError:
        return None


def reference(source: str, messages: list[dict[str, Any]], options: ChatOptions) -> str | None:
    """What transformers renders, but for the marks that it leaves where a content is rendered twice."""
    try:
        text = theirs().apply_chat_template(
            messages,
            chat_template=source,
            tools=list(options.tools) or None,
            tokenize=False,
            add_generation_prompt=not options.continue_final_message,
            continue_final_message=options.continue_final_message,
            **options.template_arguments,
        )
    except Exception:  # noqa: BLE001  whatever a template can raise
        return None
    return text.replace(f"{THEIR_MARK} ", "").replace(THEIR_MARK, "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str) -> None:
    source = TEMPLATES[name]
    rendered = 0
    conversations = {"one": CONVERSATIONS["one"]} if name in REFUSES_ALL else CONVERSATIONS
    for conversation, messages in conversations.items():
        for kind, options in OPTIONS.items():
            expected = reference(source, messages, options)
            assert ours(source, messages, options) == expected, (conversation, kind)
            rendered += expected is not None
    assert bool(rendered) == (name not in REFUSES_ALL)


TEXT = st.lists(
    st.text(max_size=8)
    | st.sampled_from(
        ["<think>", "</think>", "\n", " ", "<|im_end|>", "<tool_response>", "/nothink", "é", "<&>"]
    ),
    max_size=6,
).map("".join)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda values: st.lists(values, max_size=2) | st.dictionaries(TEXT, values, max_size=2),
    max_leaves=6,
)
CALLS = st.fixed_dictionaries({"name": TEXT, "arguments": NESTED})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT},
        optional={
            "reasoning_content": TEXT,
            "tool_calls": st.lists(
                st.fixed_dictionaries({"function": CALLS}) | CALLS, min_size=1, max_size=2
            ),
            "tool_call_id": TEXT,
        },
    ),
    min_size=1,
    max_size=5,
)
ANY_OPTIONS = st.builds(
    ChatOptions,
    template_arguments=st.fixed_dictionaries({}, optional={"enable_thinking": st.booleans(), "x": NESTED}),
    tools=st.lists(st.fixed_dictionaries({"type": TEXT, "function": CALLS}), max_size=2),
    continue_final_message=st.booleans(),
)


@given(st.sampled_from(sorted(TEMPLATES.keys() - REFUSES_ALL)), MESSAGES, ANY_OPTIONS)
@settings(max_examples=250)
def test_any_conversation_renders_as_in_transformers(
    name: str, messages: list[dict[str, Any]], options: ChatOptions
) -> None:
    source = TEMPLATES[name]
    assert ours(source, messages, options) == reference(source, messages, options)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("\n{% if %}", "line 2: Expected an expression"),
        ("a\nb {{ x | nothing }}", "line 2: No filter named 'nothing'"),
        ("{% generation %}", "line 1: Unexpected end of template"),
        ("\n\n{% endgeneration %}", "line 3: Encountered unknown tag"),
        ("{% for x in y %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    ],
)
def test_a_template_that_cannot_be_compiled_refuses_chats_and_nothing_else(
    source: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer(backend, source, {})
    [line] = caplog.messages
    assert problem in line
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode("still here")) == "still here"
    with pytest.raises(UnusableChatTemplate, match=problem) as refused:
        tokenizer.encode_chat(say("Hello"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "add_generation_prompt", "continue_final_message", "pad_token", "image_token"],
)
def test_an_argument_cannot_take_the_name_of_what_is_set_here(name: str) -> None:
    template = ChatTemplate("{{ messages }}", {"image_token": "<image>"})
    with pytest.raises(ChatTemplateError, match=name) as refused:
        template.render(say("Hello"), ChatOptions(template_arguments={"ok": 1, name: "x"}))
    assert refused.value.option == "template_arguments"


@pytest.mark.parametrize(
    "name", ["self", "context", "environment", "caller", "loop", "__class__", "", "a b", "é"]
)
def test_any_other_name_is_an_argument_or_without_effect(name: str) -> None:
    template = ChatTemplate(EACH + "{{ m.content }}{% endfor %}", {})
    assert template.render(say("Hello"), ChatOptions(template_arguments={name: "x"})) == "Hello"


def test_a_message_that_the_template_does_not_render_cannot_be_continued() -> None:
    with pytest.raises(ChatTemplateError, match="final message") as refused:
        compiled(TEMPLATES["drops the last"]).render(say("a", "b"), OPTIONS["continued"])
    assert refused.value.option == "continue_final_message"


def test_a_refusal_of_the_template_is_told_in_one_line() -> None:
    with pytest.raises(ChatTemplateError) as refused:
        ChatTemplate("{{ raise_exception('turns must\n\n  alternate') }}", {}).render(say("a"))
    assert str(refused.value) == "the model's chat template says: turns must alternate"


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(ChatTemplateError, match="renders what is no text"):
        ChatTemplate(r"{{ '\ud800' }}", {}).render(say("a"))


def test_a_text_without_end_is_refused_before_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 1000)
    template = ChatTemplate("{% for x in range(n) %}{{ messages[0].content }}{% endfor %}", {})
    assert template.render(say("ab"), ChatOptions(template_arguments={"n": 500})) == "ab" * 500
    for count in (501, 10**5):
        with pytest.raises(ChatTemplateError, match="at most 1000 characters"):
            template.render(say("ab"), ChatOptions(template_arguments={"n": count}))
