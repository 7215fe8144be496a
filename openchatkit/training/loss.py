"""Cross-entropy of the vocabulary projection, walked in chunks: the [tokens, vocab] logits never exist at once.

For a token with hidden state h and label y, let p = softmax(W h + b). The loss is -log p[y], and its gradient by the
logits is p - onehot(y). Both come out of one pass over a chunk, so the projection is computed once, and p stays in the
dtype of the products. What that dtype would round away is kept by way of r, the sum of p over all but y, which has
full relative precision: near certainty -log p[y] = -log(1 - r), and the gradient's entry at y is -r.
"""

import torch
from torch import Tensor, nn

from openchatkit.data.batch import IGNORE

# Tokens whose logits are alive at once. Each chunk costs one addition of the projection's whole gradient, which is why
# it is not smaller.
_CHUNK_TOKENS = 1024

# Below this probability -log p[y] is taken from the logits: p[y] may have lost digits, or be 0, in float16.
_UNLIKELY = 1e-3


class VocabularyLoss:
    """The loss of a projection to the vocabulary; keeps its two buffers of a chunk's logits from call to call."""

    def __init__(self, projection: nn.Linear) -> None:
        self.projection = projection
        self._buffers: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        scale: float = 1.0,
        sources: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """Sum of the cross-entropy over the tokens whose label is not IGNORE, times `scale`, in float32.

        hidden is [..., hidden_size], labels [...]. Where gradients are wanted, those of the projection's parameters
        are added to their `.grad` here and now, in float32, and that of `hidden` is kept for backward. The result
        must therefore be backpropagated exactly once, with a gradient of one: every factor belongs into `scale`.
        The products run in the autocast dtype, if there is one. With `sources`, int64 and shaped as labels, each
        token's loss is also added, as it is without `scale`, to its source's entry of `sums`, in float64.
        """
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.projection.weight.dtype
        trained = (labels != IGNORE).nonzero().squeeze(-1)
        if trained.numel() < labels.numel():
            hidden, labels = hidden.index_select(0, trained), labels.index_select(0, trained)
        total, losses = _Walk.apply(hidden, self, labels, scale, dtype, torch.is_grad_enabled())
        if sources is not None:
            sums.index_add_(0, sources.flatten().index_select(0, trained), losses.double())
        return total

    def buffers(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two [tokens, vocab] tensors whose contents are anything."""
        shape = (min(tokens, _CHUNK_TOKENS), self.projection.out_features)
        known = self._buffers
        if known is None or known[0].shape[0] < shape[0] or known[0].dtype != dtype:
            device = self.projection.weight.device
            known = self._buffers = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return known[0][:tokens], known[1][:tokens]


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        loss: VocabularyLoss,
        labels: Tensor,
        scale: float,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        projection = loss.projection
        # Autocast would cast the float32 pieces below, too.
        with torch.autocast(hidden.device.type, enabled=False):
            weight = projection.weight.detach().to(dtype)
            bias = None if projection.bias is None else projection.bias.detach().to(dtype)
            inputs = hidden.to(dtype)
            gradient = torch.empty_like(inputs) if with_gradients else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            each = torch.empty(inputs.shape[0], dtype=torch.float32, device=hidden.device)
            for start in range(0, inputs.shape[0], _CHUNK_TOKENS):
                piece = slice(start, start + _CHUNK_TOKENS)
                x, y = inputs[piece], labels[piece]
                logits, probabilities = loss.buffers(x.shape[0], dtype)
                torch.mm(x, weight.T, out=logits)
                if bias is not None:
                    logits += bias
                torch.softmax(logits, dim=-1, out=probabilities)
                losses, rest = _losses(logits, probabilities, y)
                total += losses.sum()
                each[piece] = losses
                if gradient is not None:
                    probabilities[torch.arange(len(y), device=y.device), y] = -rest
                    torch.mm(probabilities, weight, out=gradient[piece])
                    _add_to_grad(projection.weight, probabilities.T @ x, scale)
                    if bias is not None:
                        _add_to_grad(projection.bias, probabilities.sum(0), scale)
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(scale).to(hidden.dtype))
        ctx.mark_non_differentiable(each)
        return total * scale, each

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None, None, None


def _losses(logits: Tensor, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss in float32, and its r; the label's entry of `probabilities` becomes 0.

    logits and probabilities are [tokens, vocab], labels and what is returned [tokens].
    """
    own = (torch.arange(len(labels), device=labels.device), labels)
    likely = probabilities[own].float()
    # logsumexp = the largest logit - log of the probability that it got
    total = logits.amax(-1).float() - probabilities.amax(-1).float().log()
    unlikely_loss = total - logits[own].float()
    probabilities[own] = 0.0
    rest = probabilities.sum(-1)
    certain_loss = -torch.log1p(-rest.float().clamp(max=0.5))
    losses = torch.where(likely > 0.5, certain_loss, torch.where(likely > _UNLIKELY, -likely.log(), unlikely_loss))
    return losses, rest


def _add_to_grad(parameter: nn.Parameter, gradient: Tensor, scale: float) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype).mul_(scale)
    else:
        parameter.grad.add_(gradient, alpha=scale)
