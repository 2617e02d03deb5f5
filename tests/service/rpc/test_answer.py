"""The answer's state machine: what a client gets depends on the tokens, not on how they are grouped."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.model.sampling_params import SamplingParams
from fusewire.service.messages import (
    AddRequest,
    Ended,
    RequestEvent,
    Scheduled,
    Token,
)
from fusewire.service.rpc.answer import Answer, AnswerOptions, kernel_report
from fusewire.v1 import generation_pb2 as pb
from fusewire.v1.kernel_pb2 import KernelPath
from tests.tools.front_end_rig import demo_tokenizer

NOTHING_MORE = AnswerOptions()
TEXT = st.text(st.sampled_from("ab 你👋🏽é"), max_size=12)


def make_answer(options: AnswerOptions = NOTHING_MORE, **fields) -> Answer:
    request = AddRequest("id", [1, 2, 3], SamplingParams(), max_tokens=99, arrival=10.0, **fields)
    return Answer(request, options, demo_tokenizer())


def events_of(token_ids: list[int], **ended) -> list[RequestEvent]:
    """A request that was scheduled at 11 and got a token every second from 13 on."""
    tokens = [Token("id", token_id, 13.0 + index) for index, token_id in enumerate(token_ids)]
    return [Scheduled("id", 11.0), *tokens, Ended("id", **({"reason": "length"} | ended))]


def take_all(answer: Answer, groups: list[list[RequestEvent]]) -> tuple[list[pb.Delta], pb.Finished]:
    responses = [response for group in groups for response in answer.take(group)]
    assert responses[0].WhichOneof("event") == "started"
    assert {response.WhichOneof("event") for response in responses[1:]} <= {"delta"}
    return [response.delta for response in responses[1:]], answer.finished().finished


def joined(deltas: list[pb.Delta]) -> tuple[str, list[int]]:
    text = "".join(delta.text for delta in deltas)
    return text, [token_id for delta in deltas for token_id in delta.token_ids]


@given(TEXT, st.lists(TEXT.filter(bool), max_size=2), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_any_grouping_gives_the_same_answer(text: str, stop: list[str], include: bool, data) -> None:
    events = events_of(demo_tokenizer().encode(text))
    cuts = sorted({0, len(events), *data.draw(st.lists(st.integers(1, len(events))))})
    options = AnswerOptions(stop=tuple(stop), include_stop=include, token_ids=True)
    one_by_one = take_all(make_answer(options), [[event] for event in events])
    grouped = take_all(make_answer(options), [events[low:high] for low, high in pairwise(cuts)])
    assert one_by_one[1] == grouped[1]
    assert joined(one_by_one[0]) == joined(grouped[0])
    whole, _ = joined(grouped[0])
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends:
        matched = grouped[1].matched_stop
        assert whole == text[: min(ends)].removesuffix("" if include else matched)
    else:
        assert whole == text
        assert grouped[1].reason == pb.FINISH_REASON_LENGTH


def test_what_is_ready_comes_in_one_delta_and_the_first_token_does_not_wait() -> None:
    answer = make_answer()
    [scheduled, *tokens, ended] = events_of(demo_tokenizer().encode("one two three four"))
    assert [r.WhichOneof("event") for r in answer.take([scheduled])] == ["started"]
    assert [r.delta.text for r in answer.take(tokens[:1])] == ["one"]
    assert [r.delta.text for r in answer.take(tokens[1:])] == [" two three four"]
    assert list(answer.take([ended])) == []


def test_phases_are_cut_at_arrival_scheduling_first_and_last_token() -> None:
    _, finished = take_all(make_answer(), [events_of([1000, 1001, 1002])])
    timings = finished.timings
    assert (timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds) == (1, 2, 2)
    assert timings.time_to_first_token_seconds == 3


def test_tokens_after_a_stop_string_count_neither_in_usage_nor_in_time() -> None:
    ids = demo_tokenizer().encode("a stop and more")
    answer = make_answer(AnswerOptions(stop=("stop",), token_ids=True))
    deltas, finished = take_all(answer, [events_of(ids)])
    counted = finished.usage.completion_tokens
    assert 0 < counted < len(ids)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids[:counted]
    assert finished.timings.decode_seconds == counted - 1
    assert finished.reason == pb.FINISH_REASON_STOP


def test_a_special_token_matches_no_stop_string_and_leaves_no_text_when_it_stops() -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode("one<|im_end|> two<|endoftext|>")
    assert len(tokenizer.special_ids.intersection(ids)) == 2
    options = AnswerOptions(stop=("<|im_end|>",), include_stop=True, token_ids=True)
    answer = make_answer(options, stop_ids=[ids[-1]])
    deltas, finished = take_all(answer, [events_of(ids, reason="stop", stop_id=ids[-1])])
    assert joined(deltas) == ("one two", ids)
    assert finished.matched_stop == str(ids[-1])


def test_a_request_that_never_ran_has_an_account_without_phases() -> None:
    answer = make_answer()
    deltas, finished = take_all(answer, [[Ended("id", "cancelled")]])
    assert deltas == []
    assert finished.timings == pb.PhaseTimings()
    account = answer.account("cancelled")
    assert (account.path, account.queue_seconds, account.prefill_seconds) == ("", None, None)


@pytest.mark.parametrize(
    ("prefill", "decode", "backends", "path"),
    [
        ("fused", "fused", ("one", "one", "one"), "fused"),
        ("fused", "fused", ("one", "other", "mixed"), "fused"),
        ("unfused", "", ("torch-cpu", "", "torch-cpu"), "unfused"),
        ("unfused", "fused", ("torch-cpu", "one", "mixed"), "mixed"),
        ("unfused", "fused_norm", ("torch-cpu", "torch-cpu", "torch-cpu"), "mixed"),
        ("fused", "mixed", ("one", "mixed", "mixed"), "mixed"),
        ("", "", ("", "", ""), ""),
    ],
)
def test_the_kernel_report_tells_path_and_backend_by_phase(
    prefill: str, decode: str, backends: tuple[str, str, str], path: str
) -> None:
    ended = Ended(
        "id",
        "length",
        prefill_path=prefill,
        decode_path=decode,
        prefill_backend=backends[0],
        decode_backend=backends[1],
    )
    report = kernel_report(ended)
    assert (report.prefill_backend, report.decode_backend, report.backend) == backends
    names = [name.upper() or "UNSPECIFIED" for name in (prefill, decode)]
    assert [KernelPath.Name(p).removeprefix("KERNEL_PATH_") for p in (report.prefill, report.decode)] == names
    answer = make_answer()
    list(answer.take([ended]))
    assert answer.account("length").path == path
