"""transformers' `generate` on the kind of requests that `fusewire bench engine` runs.

    python -m tests.benchmarks.transformers_yardstick --model DIR --out transformers.json

Batches of 1 and 32 prompts of 128 random tokens with answers of 32, greedy, and single prompts of
several lengths answered with one token; sdpa attention, the checkpoint's weights in bf16 (float32 on a
CPU). Times are the host's, with the device idle before and after.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusewire.model import demo
from fusewire.service.bench.engine_results import Decode, Prefill, Yardstick
from fusewire.service.bench.engine_session import environment, model_shape
from fusewire.service.bench.engine_table import yardstick_text
from fusewire.service.bench.results import save

ATTENTION = "sdpa"
PROMPT_TOKENS = 128
ANSWER_TOKENS = 32
BATCHES = (1, 32)
PREFILL_TOKENS = (16, 128, 1024, 4096)
ROUNDS = 3


def load(folder: Path, device: torch.device) -> PreTrainedModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
    return model.to(device).eval()


def answer(model: PreTrainedModel, batch: int, prompt_tokens: int, answer_tokens: int) -> float:
    """Seconds in which a batch of fresh prompts is answered in full."""
    ids = torch.randint(model.config.vocab_size, (batch, prompt_tokens), device=model.device)
    wait(model.device)
    started = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=answer_tokens,
        max_new_tokens=answer_tokens,
        pad_token_id=0,
    )
    wait(model.device)
    seconds = time.perf_counter() - started
    assert output.shape == (batch, prompt_tokens + answer_tokens)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_answers(model: PreTrainedModel, batch: int, prompt_tokens: int, answer_tokens: int) -> list[float]:
    answer(model, batch, prompt_tokens, answer_tokens)  # untimed
    return [answer(model, batch, prompt_tokens, answer_tokens) for _ in range(ROUNDS)]


def measure(model: PreTrainedModel, yardstick: Yardstick, options: argparse.Namespace) -> None:
    for batch in options.batches:
        found = Decode(
            requests=batch,
            prompt_tokens=PROMPT_TOKENS,
            answer_tokens=options.answer_tokens,
            first=time_answers(model, batch, PROMPT_TOKENS, 1),
            whole=time_answers(model, batch, PROMPT_TOKENS, options.answer_tokens),
        )
        yardstick.decode.append(found)
    for tokens in options.prefill_tokens:
        yardstick.prefill.append(Prefill(tokens=tokens, first=time_answers(model, 1, tokens, 1)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo.path(), help="folder (default: the demo model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--prefill-tokens", type=int, nargs="*", default=list(PREFILL_TOKENS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    model = load(options.model, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    dtype = str(model.dtype).removeprefix("torch.")
    command = "python -m tests.benchmarks.transformers_yardstick --model FOLDER"
    yardstick = Yardstick(
        environment=environment(command, name, "transformers"),
        model=model_shape(options.model, options.model.name, dtype),
        attention=model.config._attn_implementation,
        prefill=[],
        decode=[],
    )
    with torch.inference_mode():
        measure(model, yardstick, options)
    save(yardstick, options.out)
    print(yardstick_text(yardstick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
