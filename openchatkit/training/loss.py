"""Cross-entropy of the vocabulary projection, walked in chunks: the [tokens, vocab] logits never exist at once.

For a token with hidden state h and label y, the loss is logsumexp(W h + b) - (W h + b)[y], and its gradient by the
logits is softmax(W h + b) - onehot(y). Both come out of one pass over a chunk, so the projection is computed once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openchatkit.data.dataset import IGNORE

# Tokens whose logits are alive at once, and how many of those rows the softmax takes at a time. On a CPU a block of
# rows in float32 should stay in the cache; on a GPU, fewer and larger kernels win.
_CHUNK_TOKENS = 1024
_BLOCK_TOKENS = {"cpu": 128}


def projected_cross_entropy(hidden: Tensor, projection: nn.Linear, labels: Tensor, *, scale: float = 1.0) -> Tensor:
    """Sum of the cross-entropy over the tokens whose label is not IGNORE, times `scale`, in float32.

    hidden is [..., hidden_size], labels [...]. Where gradients are wanted, those of the projection's parameters are
    added to their `.grad` here and now, in float32, and that of `hidden` is kept for backward. The result must
    therefore be backpropagated exactly once, with a gradient of one: every factor belongs into `scale`.
    The products run in the autocast dtype, if there is one.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = projection.weight.dtype
    trained = (labels != IGNORE).nonzero().squeeze(-1)
    if trained.numel() < labels.numel():
        hidden, labels = hidden.index_select(0, trained), labels.index_select(0, trained)
    return _ProjectedCrossEntropy.apply(hidden, projection, labels, scale, dtype, torch.is_grad_enabled())


class _ProjectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        projection: nn.Linear,
        labels: Tensor,
        scale: float,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> Tensor:
        # Autocast would cast the float32 pieces below, too.
        with torch.autocast(hidden.device.type, enabled=False):
            weight = projection.weight.to(dtype)
            bias = None if projection.bias is None else projection.bias.to(dtype)
            inputs = hidden.to(dtype)
            gradient = torch.empty_like(inputs) if with_gradients else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            for start in range(0, inputs.shape[0], _CHUNK_TOKENS):
                piece = slice(start, start + _CHUNK_TOKENS)
                logits = F.linear(inputs[piece], weight, bias)
                total += _loss_and_logit_gradient(logits, labels[piece], scale if with_gradients else None)
                if gradient is not None:
                    torch.mm(logits, weight, out=gradient[piece])
                    _add_to_grad(projection.weight, logits.T @ inputs[piece])
                    if projection.bias is not None:
                        _add_to_grad(projection.bias, logits.sum(0, dtype=torch.float32))
        if gradient is not None:
            ctx.save_for_backward(gradient.to(hidden.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None, None, None


def _loss_and_logit_gradient(logits: Tensor, labels: Tensor, scale: float | None) -> Tensor:
    """The summed loss of a chunk; with a `scale`, `logits` is overwritten by the scaled gradient."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    rows = _BLOCK_TOKENS.get(logits.device.type, logits.shape[0])
    for block, wanted in zip(logits.split(rows), labels.split(rows), strict=True):
        log_probabilities = torch.log_softmax(block, dim=-1, dtype=torch.float32)
        wanted = wanted.unsqueeze(-1)
        total -= log_probabilities.gather(-1, wanted).sum()
        if scale is not None:
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(-1, wanted, gradient.new_full(wanted.shape, -1.0))
            block.copy_(gradient.mul_(scale))
    return total


def _add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient
