"""What a model must pass before it may serve: a wrong score raises no error by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from rewards.base import BatchedScorer, FloatArray, Message, Sample, Tokens

# Three lengths, so that a batch of them has padding.
_PROMPT = "What is the capital of France, and what is it known for?"
_ANSWERS = (
    "Paris.",
    "The capital of France is Paris, known for its museums, its bridges and its bread.",
    "I do not know. " * 12,
)


def trial_inputs(scorer: BatchedScorer) -> list[Tokens]:
    """Return a few model inputs of different lengths."""
    question = Message(role="user", content=_PROMPT)
    return scorer.encode([scorer.render(Sample((question,), answer)) for answer in _ANSWERS])


def check_vocabulary(
    inputs: Sequence[Tokens], unknown: int | None, specials: Collection[int]
) -> None:
    """Refuse a tokenizer without a vocabulary: what transformers makes of a missing file.

    Parameters
    ----------
    inputs : sequence of Tokens
        Plain English sentences, encoded.
    unknown : int or None
        The token that stands for unknown words.
    specials : collection of int
        Tokens that the tokenizer adds by itself.

    Raises
    ------
    ValueError
        When it knows no word of them. Message without the model's name.
    """
    ids = [token for tokens in inputs for token in tokens.ids]
    if all(token == unknown for token in ids if token not in specials or token == unknown):
        raise ValueError(
            "its tokenizer knows no word of a plain English sentence; the tokenizer files "
            "(tokenizer.json, or a vocabulary) are missing or empty"
        )


def check_padding(scorer: BatchedScorer, inputs: Sequence[Tokens], rtol: float) -> None:
    """Refuse a model whose score of a text depends on what it is batched with.

    Parameters
    ----------
    scorer : BatchedScorer
    inputs : sequence of Tokens
        Of different lengths.
    rtol : float
        Largest accepted difference, relative to one plus the score.

    Raises
    ------
    ValueError
        When scores differ by more, or are not finite. Message without the model's name.
    """
    together = scorer.forward(inputs)
    alone = np.concatenate([scorer.forward([tokens]) for tokens in inputs])
    if not (np.isfinite(together).all() and np.isfinite(alone).all()):
        raise ValueError(
            "it gives scores that are not finite; its weights are damaged, or overflow in this "
            "dtype (try dtype: float32)"
        )
    gap = np.max(np.abs(together - alone) / (1.0 + np.abs(alone)))
    if gap > rtol:
        raise ValueError(
            f"a text scores {gap:.2g} differently alone than padded in a batch (limit {rtol:g}); "
            "this architecture mishandles padding and cannot be batched here"
        )


def check_end(
    scorer: BatchedScorer,
    inputs: Sequence[Tokens],
    score: Callable[[Tokens, int], FloatArray],
    n_embeddings: int,
    rtol: float,
) -> None:
    """Refuse a model that takes an end of its text for padding, and so is read elsewhere.

    Parameters
    ----------
    scorer : BatchedScorer
    inputs : sequence of Tokens
    score : callable
        Gives the outputs of one input when the model is told that padding is another token.
    n_embeddings : int
        Tokens that the model knows.
    rtol : float
        Largest accepted difference, relative to one plus the score.

    Raises
    ------
    ValueError
        When scores change with the padding token although nothing is padded.
    """
    for tokens in inputs:
        used = set(tokens.ids)
        other = next((token for token in range(n_embeddings) if token not in used), None)
        if other is None:
            continue
        told = score(tokens, other)
        gap = np.max(np.abs(scorer.forward([tokens]) - told) / (1.0 + np.abs(told)))
        if gap > rtol:
            raise ValueError(
                "it looks for padding to find the token that it is read at, and its padding token "
                "stands in the text too, so another token is read; give its tokenizer and "
                "config.json a pad_token of their own"
            )
