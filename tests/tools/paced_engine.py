"""An engine process that computes nothing: every stream gets a token at a steady pace.

For measuring the front end alone, and for tests of what stands around an engine. It listens where the
real one would, says the same messages, and stops when standard input closes. Tokens are random ids of
the demo model; a request ends at its max_tokens.

Run by hand: `python -m tests.tools.paced_engine --socket PATH --step 0.0025 < FILE_OF_ONE_JSON_LINE`.
"""

import argparse
import os
import random
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from fusewire.kernels.modes import KernelMode
from fusewire.service.life_signs import LifeSigns, become_a_child
from fusewire.service.messages import (
    HEADER_BYTES,
    AddRequest,
    CancelReply,
    CancelRequest,
    EndAll,
    Ended,
    EngineReady,
    Events,
    Examine,
    ExamineReply,
    FinishRequest,
    FromEngine,
    GenerationDefaults,
    KernelModeReply,
    ModelInfo,
    Routing,
    Scheduled,
    SetKernelMode,
    StepReport,
    ToEngine,
    Token,
    decode_to_engine,
    encode,
    frame_length,
)
from tests.tools.demo_tokenizer import demo_source

PATIENCE = 4.0
CONTEXT = 32768
VOCAB = 4000
READY = EngineReady(
    model=ModelInfo("Paced", CONTEXT, VOCAB, 1, 1, 1, 1, 1, "float32", [], GenerationDefaults()),
    device="no device",
    attention_backend="none",
    kernel_backends=dict.fromkeys(KernelMode, "none"),
    routing=Routing(KernelMode.FUSED, 1),
    kv_blocks=1,
    block_size=16,
    max_running=256,
    max_step_tokens=2048,
    tokenizer=demo_source(),
)


@dataclass
class Stream:
    """One request on its way."""

    spec: AddRequest
    owner: socket.socket
    sent: int = 0
    end: str = ""


class PacedEngine:
    """Serves a unix socket; `run` returns when standard input closes."""

    def __init__(self, path: Path, step_seconds: float, signs: LifeSigns) -> None:
        self._step_seconds = step_seconds
        self._signs = signs
        self._streams: dict[str, Stream] = {}
        self._connections: list[socket.socket] = []
        self._inbox: SimpleQueue[tuple[socket.socket, ToEngine | None]] = SimpleQueue()
        self._ids = [random.Random(0).randrange(256, VOCAB) for _ in range(4099)]
        self._step = 0
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def run(self) -> None:
        threading.Thread(target=self._accept_all, daemon=True).start()
        threading.Thread(target=self._step_for_ever, daemon=True).start()
        while os.read(sys.stdin.fileno(), 1):
            pass

    def _accept_all(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            self._connections.append(sock)
            self._say(sock, READY)
            threading.Thread(target=self._read_all, args=(sock,), daemon=True).start()

    def _read_all(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as stream:
            while len(header := stream.read(HEADER_BYTES)) == HEADER_BYTES:
                self._inbox.put((sock, decode_to_engine(stream.read(frame_length(header)))))
        self._inbox.put((sock, None))

    def _step_for_ever(self) -> None:
        due = time.monotonic()
        while True:
            self._signs.ask(PATIENCE + self._step_seconds)
            due = max(due + self._step_seconds, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            while True:
                try:
                    self._apply(*self._inbox.get_nowait())
                except Empty:
                    break
            if self._streams:
                self._run_step(time.monotonic())

    def _apply(self, sock: socket.socket, message: ToEngine | None) -> None:
        match message:
            case AddRequest():
                self._streams[message.request_id] = Stream(message, sock)
            case FinishRequest(request_id=request_id, reason=reason):
                if request_id in self._streams:
                    self._streams[request_id].end = reason
            case CancelRequest(call_id=call_id, request_id=request_id, caller=caller):
                stream = self._streams.get(request_id)
                found = stream is not None and stream.spec.caller == caller
                if stream is not None and found:
                    stream.end = "cancelled"
                self._say(sock, CancelReply(call_id, found))
            case Examine(call_id=call_id):
                self._say(sock, ExamineReply(call_id, "not_available"))
            case EndAll(reason=reason):
                for stream in self._streams.values():
                    stream.end = reason
            case SetKernelMode(call_id=call_id, mode=mode):
                self._say(sock, KernelModeReply(call_id, "", mode, mode, 2, self._step))
            case None:
                self._connections.remove(sock)
                self._streams = {name: s for name, s in self._streams.items() if s.owner is not sock}

    def _run_step(self, now: float) -> None:
        self._step += 1
        events = {sock: Events() for sock in self._connections}
        tokens = len(self._streams)
        for request_id, stream in list(self._streams.items()):
            self._advance(stream, now, events[stream.owner])
            if stream.end:
                del self._streams[request_id]
        for sock, told in events.items():
            self._say(sock, self._report(told, tokens))

    def _advance(self, stream: Stream, now: float, events: Events) -> None:
        request_id = stream.spec.request_id
        if not stream.sent:
            events.scheduled.append(Scheduled(request_id, now))
        if not stream.end:
            token_id = self._ids[(self._step * 31 + stream.sent * 17) % len(self._ids)]
            events.tokens.append(Token(request_id, token_id, now))
            stream.sent += 1
            if stream.sent == stream.spec.max_tokens:
                stream.end = "length"
        if stream.end:
            events.ended.append(Ended(request_id, stream.end, "fused", "fused", "none", "none"))

    def _report(self, events: Events, tokens: int) -> StepReport:
        running = len(self._streams)
        return StepReport(
            self._step, "decode", KernelMode.FUSED, self._step_seconds, 0, tokens, running, 0, 0.5, 0, events
        )

    def _say(self, sock: socket.socket, message: FromEngine) -> None:
        with suppress(OSError):  # the reader tells that it is gone
            sock.sendall(encode(message))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--step", type=float, default=float(os.environ.get("PACED_STEP", "0.0025")))
    args = parser.parse_args()
    os.read(sys.stdin.fileno(), 1 << 16)  # the configuration, which changes nothing here
    PacedEngine(args.socket, args.step, LifeSigns(become_a_child())).run()


if __name__ == "__main__":
    main()
