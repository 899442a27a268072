"""Attention in bfloat16 on a CPU, as two products of matrices that oneDNN multiplies.

torch's own kernel for this multiplies through MKL, which leaves AVX512_BF16 idle on AMD: it is no
faster in bfloat16 than in float32. Two products with the scores written out between them take half
to 70 % of its time from 32 tokens on (one thread, 4 or 12 heads of 64). Scores deviate from float32
as with torch's kernel: equally on trained reward models, 1 to 1.2 times as much on random ones of
sharp attention. Processors with AMX are left alone: there torch's kernel uses it.

transformers lets an attention be named, and asks that name's function for each layer. What this one
does not do (causal layers, shared keys, position biases, caps) goes on to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "palette_products"
_DTYPE = torch.bfloat16
# Scores that are written out at once: more do not stay in the cache, and all would be memory that
# the budget does not know of (2 bytes each, three times).
_MOST_SCORES = 1 << 20
_ELSEWHERE = ("position_bias", "cache", "softcap")


def attend_by_products(model: Any) -> bool:
    """Let a model attend so where that is faster; return whether it does."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    suits: bool = (
        isinstance(model, PreTrainedModel)
        and model.device.type == "cpu"
        and model.dtype == _DTYPE
        and model.config._attn_implementation == "sdpa"
        and capabilities.get("avx512_bf16", False)
        and not capabilities.get("amx_bf16", False)
    )
    if suits:
        AttentionInterface.register(_NAME, attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)
    return suits


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the values that each token attends to, shape (n_texts, n_tokens, n_heads, size).

    Parameters
    ----------
    module : Module
    query, key, value : Tensor, shape (n_texts, n_heads, n_tokens, size)
    attention_mask : Tensor of bool, broadcast to (n_texts, n_heads, n_tokens, n_tokens), or None
        Where a token may look; None is everywhere, or in a causal layer at what is before it.
    dropout, scaling, is_causal, **others
        As transformers gives them to its own `sdpa_attention_forward`.
    """
    n_texts, n_heads, n_tokens, size = query.shape
    looks_back = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scores_of_text = n_heads * n_tokens * key.shape[2]
    if (
        dropout > 0
        or scores_of_text > 4 * _MOST_SCORES
        or key.shape[1] != n_heads
        or looks_back
        or (attention_mask is not None and attention_mask.dtype != torch.bool)
        or any(others.get(name) is not None for name in _ELSEWHERE)
    ):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
        return found
    query = query * (size**-0.5 if scaling is None else scaling)
    bias = None
    if attention_mask is not None:
        # Not infinity: padding may look nowhere at all, and NaN would spread from there.
        bias = query.new_zeros(()).masked_fill(
            ~attention_mask.expand(n_texts, -1, -1, -1), torch.finfo(query.dtype).min / 2
        )
    given = query.new_empty(n_texts, n_tokens, n_heads, value.shape[3])
    step = max(1, _MOST_SCORES // scores_of_text)
    for start in range(0, n_texts, step):
        texts = slice(start, start + step)
        scores = torch.matmul(query[texts], key[texts].transpose(2, 3))
        if bias is not None:
            scores += bias[texts]
        given[texts] = torch.matmul(scores.softmax(dim=-1), value[texts]).transpose(1, 2)
    return given, None
