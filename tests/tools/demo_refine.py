"""Teach a trained demo model not to loop when it decodes greedily.

Sequence-level unlikelihood (Welleck et al., arXiv:1908.04319): the model continues training prompts
greedily, and each of its tokens that completes a 4-gram already written is made less likely; an ordinary
cross entropy on fresh rows, in the same step, holds its loss. A few minutes on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Callable[[int, int], tuple[Tensor, Tensor]]
"""(count, length) -> ids and targets, each [count, length]; targets hold -100 where not learnt."""

NGRAM = 4
UNLIKELIHOOD_WEIGHT = 0.25


def refine(model: Any, rows: Rows, steps: int, lr: float, report: Callable[[dict[str, float]], None]) -> None:
    """Train a transformers causal model in place for `steps` steps, its rate falling to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    prompts, prompt_tokens, new_tokens = 24, 24, 72
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        ids, _ = rows(prompts, prompt_tokens)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
        )
        repeats = repeated(written)
        repeats[:, :prompt_tokens] = False
        p = _probability(model, written)
        unlikelihood = -(torch.log1p(-p.clamp(max=0.999)) * repeats[:, 1:]).sum() / repeats.sum().clamp(min=1)
        ids, targets = rows(16, 256)
        cross_entropy = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        (UNLIKELIHOOD_WEIGHT * unlikelihood + cross_entropy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        share = repeats[:, prompt_tokens:].float().mean().item()
        report({"step": step, "repeated": share, "cross_entropy": cross_entropy.item()})


def repeated(ids: Tensor) -> Tensor:
    """Say of each token of [rows, length] whether it completes an n-gram that its row already held."""
    grams = ids.unfold(1, NGRAM, 1)  # [rows, length - NGRAM + 1, NGRAM]
    same = (grams[:, :, None] == grams[:, None]).all(-1).tril(diagonal=-1).any(-1)
    return F.pad(same, (NGRAM - 1, 0))


def _probability(model: Any, ids: Tensor) -> Tensor:
    """Return the probability of each token but the first, [rows, length - 1]."""
    logits = model(ids[:, :-1]).logits.float()
    return logits.softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
