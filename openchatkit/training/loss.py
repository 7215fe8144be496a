"""Cross-entropy of the vocabulary projection, taken chunk by chunk: the [tokens, vocab] logits never exist at once.

For a token with hidden state h and label y, let p = softmax(W h + b). The loss is -log p[y], and its gradient by the
logits is p - onehot(y). Both come out of one pass over a chunk, so the projection is computed once, and p stays in the
dtype of the products. That dtype rounds 1 - p[y] away near certainty, but not r, the sum of p over all labels but y:
there -log p[y] = -log(1 - r), and the gradient's entry at y is -r.

A projection may have only some of the vocabulary's rows, the others being on other ranks. Then softmax over this rank's
rows becomes p by a factor a token, this rank's share of the sum of all exponentials. Ranks exchange a few numbers a
token, never logits.

float16 cannot hold small entries of p, nor the gradient of W, a sum over many tokens, before it is scaled. There p is
float32, and so are the gradients until they are scaled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openchatkit.data.batch import IGNORE
from openchatkit.libraries import pytorch

# Tokens whose logits exist at once. Each chunk adds the whole gradient of the projection once, so fewer would be slow.
CHUNK_TOKENS = 1024

# Below this probability -log p[y] comes from the logits: p[y] may have lost digits, or be 0, in float16.
_UNLIKELY = 1e-3

# Multiplies p before a product in float16: its largest entry, 1, stays within float16's range, and entries down to
# 2e-12 do not become 0.
_FLOAT16_FACTOR = 2.0**15


class VocabularyLoss:
    """Loss of a projection to the vocabulary; its two buffers for a chunk's logits are kept from call to call.

    With a `group`, the projection has the vocabulary's rows from `first` on, and the group's ranks have the others.
    """

    def __init__(
        self,
        projection: nn.Linear,
        *,
        group: dist.ProcessGroup | None = None,
        first: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.projection, self.group, self.first, self.chunk_tokens = projection, group, first, chunk_tokens
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
        """Return the sum of the cross-entropy over the tokens whose label is not IGNORE, times `scale`, in float32.

        hidden is [..., hidden_size], labels [...]. If gradients are enabled, those of the projection's parameters are
        added to their `.grad` in this call already, in float32, and that of `hidden` is kept for backward. The result
        must therefore be backpropagated exactly once, with a gradient of one: every factor belongs into `scale`.
        The products run in the autocast dtype, if there is one. With `sources`, int64 and shaped as labels, each
        token's loss is also added, without `scale`, to its source's entry of `sums`, in float64.

        With a group, every rank of it calls with the same tokens. The loss is the whole one, with the same bits on all,
        and the gradient of `hidden` is this rank's share of the sum over ranks.

        Labels and sources should be on the CPU, whatever the device of `hidden` and `sums`: shapes depend on the number
        of trained tokens, and reading it from a GPU would wait until that has finished all its work.
        """
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.projection.weight.dtype
        trained = (labels != IGNORE).nonzero().squeeze(-1)
        all_trained = trained.numel() == labels.numel()
        per_token = [labels] if sources is None else [labels, sources.flatten()]
        trained, labels, *sources_of_trained = _move(
            [trained, *(values.index_select(0, trained) for values in per_token)], hidden.device
        )
        if not all_trained:
            hidden = hidden.index_select(0, trained)
        apply: Callable[..., tuple[Tensor, Tensor]] = _LossWithGradientsInForward.apply
        total, losses = apply(hidden, self, labels, scale, dtype, torch.is_grad_enabled())
        for numbers in sources_of_trained:
            assert sums is not None, "losses by source need a tensor to add them to"
            sums.index_add_(0, numbers, losses.double())
        return total

    def buffers(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return two uninitialised [tokens, vocab] tensors: one of `dtype` for logits, one for probabilities."""
        shape = (min(tokens, self.chunk_tokens), self.projection.out_features)
        known = self._buffers
        if known is None or known[0].shape[0] < shape[0] or known[0].dtype != dtype:
            device = self.projection.weight.device
            dtypes = (dtype, torch.float32 if dtype == torch.float16 else dtype)
            logits, probabilities = (torch.empty(shape, dtype=each, device=device) for each in dtypes)
            known = self._buffers = logits, probabilities
        return known[0][:tokens], known[1][:tokens]


class _LossWithGradientsInForward(torch.autograd.Function):
    """The summed loss and each token's; forward computes all gradients too, backward hands on that of `hidden`."""

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
            gradient = torch.empty_like(hidden if dtype == torch.float16 else inputs) if with_gradients else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            each = torch.empty(inputs.shape[0], dtype=torch.float32, device=hidden.device)
            for start in range(0, inputs.shape[0], loss.chunk_tokens):
                piece = slice(start, start + loss.chunk_tokens)
                x, y = inputs[piece], labels[piece]
                logits, probabilities = loss.buffers(x.shape[0], dtype)
                torch.mm(x, weight.T, out=logits)
                if bias is not None:
                    logits += bias
                torch.softmax(logits, dim=-1, dtype=probabilities.dtype, out=probabilities)
                places = _place_labels(y, None if loss.group is None else loss.first, probabilities.shape[1])
                losses, rest, share = _token_losses(logits, probabilities, places, loss.group)
                total += losses.sum()
                each[piece] = losses
                if gradient is not None:
                    if share is not None:
                        probabilities.mul_(share.unsqueeze(-1))
                    places.put(probabilities, -rest)
                    if dtype == torch.float16:
                        # The logits are not needed any more: their memory can hold the operands of the products.
                        by_hidden, by_weight, factor = _float16_products(probabilities, weight, x, scratch=logits)
                        gradient[piece] = by_hidden.mul_(scale / factor)
                        _add_to_grad(projection.weight, by_weight, scale / factor)
                    else:
                        torch.mm(probabilities, weight, out=gradient[piece])
                        _add_to_grad(projection.weight, probabilities.T @ x, scale)
                    if bias is not None:
                        _add_to_grad(projection.bias, probabilities.sum(0), scale)
        if gradient is not None:
            ctx.save_for_backward(gradient if dtype == torch.float16 else gradient.mul_(scale).to(hidden.dtype))
        ctx.mark_non_differentiable(each)
        return total * scale, each

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None, None, None, None


def _float16_products(
    probabilities: Tensor, weight: Tensor, x: Tensor, *, scratch: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Return p W and p^T x in float32, both times a factor, and that factor.

    probabilities [tokens, vocab] are float32, weight [vocab, hidden_size], x [tokens, hidden_size] and the scratch of
    the probabilities' shape float16.
    """
    if pytorch.widens_products(x.device):
        torch.mul(probabilities, _FLOAT16_FACTOR, out=scratch)
        return pytorch.mm_in_float32(scratch, weight), pytorch.mm_in_float32(scratch.T, x), _FLOAT16_FACTOR
    return probabilities @ weight.float(), probabilities.T @ x.float(), 1.0


def _move(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return int64 tensors of one length on a device; one asynchronous copy brings all of them to a GPU."""
    if device.type == tensors[0].device.type:
        return tensors
    return list(pytorch.send(torch.stack(tensors), device).unbind())


@dataclass(frozen=True)
class _Places:
    """Entries of [tokens, rows] tensors that belong to the tokens' labels; `here` is false where they are elsewhere.

    `here` is None where all of them are here.
    """

    at: tuple[Tensor, Tensor]
    here: Tensor | None

    def get(self, values: Tensor) -> Tensor:
        """Return the labels' entries in float32, [tokens], 0 for those elsewhere."""
        found = values[self.at].float()
        return found if self.here is None else found.where(self.here, 0.0)

    def put(self, values: Tensor, entries: Tensor | float) -> None:
        """Write the labels' entries, a number or [tokens], but for those elsewhere."""
        values[self.at] = entries if self.here is None else torch.where(self.here, entries, values[self.at])


def _place_labels(labels: Tensor, first: int | None, rows: int) -> _Places:
    """Find the labels, int64 [tokens], among the vocabulary's `rows` rows from `first` on; None stands for all rows."""
    tokens = torch.arange(len(labels), device=labels.device)
    if first is None:
        return _Places((tokens, labels), None)
    labels = labels - first
    return _Places((tokens, labels.clamp(0, rows - 1)), (labels >= 0) & (labels < rows))


def _token_losses(
    logits: Tensor, probabilities: Tensor, places: _Places, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each token's loss in float32, its r, and what makes p of `probabilities`, all [tokens], None being 1.

    logits and probabilities are [tokens, rows]; the label's entry of `probabilities` becomes 0.
    """
    p, logit = places.get(probabilities), places.get(logits)
    # logsumexp = the largest logit - log of its probability
    logsumexp = logits.amax(-1).float() - probabilities.amax(-1).float().log()
    places.put(probabilities, 0.0)
    rest, share = probabilities.sum(-1), None
    if group is not None:
        largest = logsumexp.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        exponential = (logsumexp - largest).exp()
        sums = torch.stack([exponential, exponential * p, exponential * rest, logit])
        dist.all_reduce(sums, group=group)
        total, p, rest, logit = sums[0], sums[1] / sums[0], sums[2] / sums[0], sums[3]
        share, logsumexp = exponential / total, largest + total.log()
    certain_loss = -torch.log1p(-rest.float().clamp(max=0.5))
    unlikely_loss = logsumexp - logit
    losses = torch.where(p > 0.5, certain_loss, torch.where(p > _UNLIKELY, -p.log(), unlikely_loss))
    return losses, rest.to(probabilities.dtype), share


def _add_to_grad(parameter: Tensor, gradient: Tensor, scale: float) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(pytorch.gradient_dtype(parameter)).mul_(scale)
    else:
        parameter.grad.add_(gradient, alpha=scale)
