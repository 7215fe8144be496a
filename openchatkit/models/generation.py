"""Greedy decoding with a whole model: the likeliest token after each prompt, again and again."""

from collections.abc import Callable, Collection, Sequence

import torch

from openchatkit.models.stage import Stage


@torch.inference_mode()
def greedy(
    stage: Stage,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    is_done: Callable[[list[int]], bool] = lambda new: False,
    on_step: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt, one token at least, by up to `max_new_tokens`; returns the new tokens of each.

    One of `eos_ids` ends a row and is not part of it; a row for whose new tokens `is_done` is true ends with them.
    `on_step` is called after each token of the batch. Prompts of several lengths are filled up from the left with a
    token that no other sees.
    """
    device = stage.projection.weight.device
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    starts = document_starts = None
    if min(map(len, prompts)) < longest:
        starts = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
        places = torch.arange(longest, device=device)
        document_starts = torch.where(places < starts, places, starts)
    cache = stage.new_cache(len(prompts), longest + max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        hidden = stage(rows, document_starts, cache=cache)
        rows, document_starts = stage.logits(hidden[:, -1:]).argmax(-1), starts
        for number, token in enumerate(rows[:, 0].tolist()):
            if number not in going:
                continue
            if token not in eos_ids:
                new[number].append(token)
            if token in eos_ids or is_done(new[number]):
                going.remove(number)
        on_step()
        if not going:
            break
    return new
