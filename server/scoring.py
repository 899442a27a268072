"""From a candidate to what the rewards see."""

from __future__ import annotations

from rewards import Sample
from server.backends.base import Candidate, Prompt


def sample_of(prompt: Prompt, candidate: Candidate) -> Sample:
    """Return the candidate in its conversation, with the sampler's own log-probabilities."""
    return Sample(
        messages=prompt.messages,
        answer=candidate.text,
        token_logprobs=tuple(token.logprob for token in candidate.tokens),
    )
