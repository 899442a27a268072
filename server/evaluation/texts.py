"""How much the served answers differ from each other: distinct n-grams and self-BLEU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rewards.models.lexical import words

_ORDERS = (1, 2, 3, 4)


def diversity(texts: Sequence[str]) -> dict[str, float | None]:
    """Return ``distinct_1``, ``distinct_2`` and ``self_bleu`` of a set of answers.

    None where there is too little text to say. All three depend on how many answers there are:
    compare sets of the same size.
    """
    tokens = [words(text) for text in texts]
    return {
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
        "self_bleu": self_bleu(tokens),
    }


def distinct(texts: Sequence[Sequence[str]], order: int) -> float | None:
    """Return the share of different n-grams among all n-grams of all texts together.

    Li et al., NAACL 2016, arXiv 1510.03055, section 5. None where there is no n-gram.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        seen.update(_grams(text, order))
    return len(seen) / seen.total() if seen else None


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Return the mean BLEU-4 of each text against all the others, in [0, 1]; high is monotonous.

    None for fewer than two texts that have words.

    Notes
    -----
    Self-BLEU: Zhu et al., SIGIR 2018, arXiv 1802.01886. BLEU: Papineni et al., ACL 2002, with the
    closest reference length; of a single sentence as sacrebleu does it: orders that the sentence
    is too short for are left out, and the k-th order without a match counts as 1 / (2^k · n-grams)
    (Chen & Cherry, WMT 2014, method 3), unless none has one: then the score is 0. An n-gram is
    clipped at its largest count in any other text, so the two largest counts of each n-gram are
    all that has to be known: time is linear in the number of texts.
    """
    spoken = [text for text in texts if text]
    if len(spoken) < 2:
        return None
    counts = [[Counter(_grams(text, order)) for order in _ORDERS] for text in spoken]
    tops: dict[tuple[str, ...], tuple[int, int]] = {}
    for of_text in counts:
        for of_order in of_text:
            for gram, count in of_order.items():
                first, second = tops.get(gram, (0, 0))
                if count > second:
                    tops[gram] = (count, first) if count > first else (first, count)
    lengths = Counter(len(text) for text in spoken)
    scores = []
    for text, of_text in zip(spoken, counts, strict=True):
        logs, n_missing = [], 0
        for of_order in of_text:
            total = of_order.total()
            if not total:
                continue
            matches = 0
            for gram, count in of_order.items():
                first, second = tops[gram]
                # Where this text has the largest count itself, the others have the second.
                matches += min(count, second if count == first else first)
            if matches:
                logs.append(math.log(matches / total))
            else:
                n_missing += 1
                logs.append(-math.log(2**n_missing * total))
        if n_missing == len(logs):
            scores.append(0.0)
            continue
        lengths[len(text)] -= 1
        closest = min((n for n in lengths if lengths[n]), key=lambda n: (abs(n - len(text)), n))
        lengths[len(text)] += 1
        penalty = min(0.0, 1.0 - closest / len(text))
        scores.append(math.exp(penalty + sum(logs) / len(logs)))
    return sum(scores) / len(scores)


def _grams(text: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[i:] for i in range(order)), strict=False))
