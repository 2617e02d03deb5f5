"""How one request chooses its next token: the knobs, resolved and ready for the sampler.

Torch-free, since requests carry it over the wire between front end and engine. Knows nothing of
defaults: the front end has filled every knob before one of these exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgspec


@dataclass(frozen=True, slots=True)
class Limits:
    """The values that a knob may have."""

    low: float
    high: float
    low_is_allowed: bool = True

    def problem(self, value: float) -> str:
        """Say what is wrong with a value; empty if nothing is. What is no number is out of every range."""
        if self.low < value <= self.high or (self.low_is_allowed and value == self.low):
            return ""
        allowed = (
            f"{self.low:g} to {self.high:g}"
            if self.low_is_allowed
            else f"above {self.low:g} and at most {self.high:g}"
        )
        return f"must be {allowed}, got {value if isinstance(value, int) else format(value, 'g')}"


LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "temperature": Limits(0, 100),
        "top_k": Limits(0, 2**32 - 1),
        "top_p": Limits(0, 1, low_is_allowed=False),
        "min_p": Limits(0, 1),
        "repetition_penalty": Limits(0, 10, low_is_allowed=False),
        "presence_penalty": Limits(-2, 2),
        "frequency_penalty": Limits(-2, 2),
    }
)
"""Of a request and of a model's generation_config.json alike; the proto's comments state them."""


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """Sampling knobs of one request. Ranges, `LIMITS`, are checked where requests enter, not here."""

    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Unsigned 64-bit; with the token's position it determines every random number."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer (CTRL, 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each generated token."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logit of each generated token."""
    logit_bias: dict[int, float] = {}
    """Added to the logits by token id; minus infinity bans a token."""
    logprobs: int = 0
    """Report the chosen token's log-probability and this many likeliest ones; 0 reports nothing."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and no random number is needed."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
