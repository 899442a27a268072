"""Linear layers whose weights lie in memory as the processor's matrix product wants them.

torch multiplies float32 matrices on a CPU with MKL, which leaves half of an AMD core idle, and
orders bfloat16 weights anew at each call. oneDNN, which torch brings along, takes weights that were
ordered once: 2.3 times as fast in float32 and 1.05 to 1.7 times in bfloat16 (AVX-512, one thread),
with sums in another order, 1e-6 apart. The same call is what torch's own compiler emits.

A block that is a linear layer and a GELU, as most encoders have, takes both in one call: what is in
between, the largest tensor of a pass, need not be fetched from the system: 3 to 8 % in float32.
"""

from __future__ import annotations

import platform
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.pytorch_utils import Conv1D

# Rows per product for which oneDNN chooses the order; others work, and gain nearly as much.
_ROWS = 1024
# Smaller layers are heads: nothing to gain, and callers look at their weights.
_FEWEST_OUTPUTS = 32
_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with the weight in oneDNN's order.

    Parameters
    ----------
    weight : Tensor, shape (n_outputs, n_inputs)
    bias : Tensor, shape (n_outputs,), or None

    Attributes
    ----------
    weight : Tensor
        Opaque: its shape and dtype can be asked for, its numbers cannot.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self.weight: Tensor = ops._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
        self.bias = None if bias is None else bias.detach()
        self.has_gelu = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, shape (..., n_outputs), through a GELU if it has one."""
        after: tuple[Any, ...] = ("gelu", [], "none") if self.has_gelu else ("none", [], "")
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *after)
        return found


def can_pack(device: str) -> bool:
    """Return whether layers on this device can be packed: oneDNN's order is that of x86."""
    return (
        torch.device(device).type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(model: nn.Module) -> int:
    """Replace the linear layers of a model by packed ones, one at a time; return how many.

    What has hooks, is a subclass (quantised layers), or shares its weight is left alone.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    n_packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = _packed(child, users)
            if packed is not None:
                setattr(parent, name, packed)
                n_packed += 1
        _take_gelu(parent)
    return n_packed


def _take_gelu(block: nn.Module) -> None:
    """Let the packed layer of a block of that and a GELU do both.

    That the block does the one after the other and nothing besides is its habit, not a promise:
    who packs compares the scores.
    """
    children = dict(block.named_children())
    if [type(child) for child in children.values()] == [PackedLinear, GELUActivation]:
        (_, layer), (name, gelu) = cast("list[tuple[str, Any]]", list(children.items()))
        if gelu.act is nn.functional.gelu and not (gelu._forward_hooks or gelu._forward_pre_hooks):
            layer.has_gelu = True
            setattr(block, name, nn.Identity())


def _packed(layer: nn.Module, users: dict[int, int]) -> PackedLinear | None:
    if type(layer) not in (nn.Linear, Conv1D) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight is None or weight.dtype not in _DTYPES or users[id(weight)] > 1:
        return None
    # Conv1D is GPT-2's name for a linear layer with its weight transposed.
    ordered = weight.T if type(layer) is Conv1D else weight
    return PackedLinear(ordered, bias) if len(ordered) >= _FEWEST_OUTPUTS else None
