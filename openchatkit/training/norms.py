"""Norms of each layer's gradient, weights and optimizer state, of embedding and head, as `--log-norms` names them."""

from collections.abc import Collection

import torch
from torch import Tensor

from openchatkit.models.shards import shard_names
from openchatkit.training.rank_weights import RankWeights
from openchatkit.training.step import StepResult

_PARAMETERS = ""  # in the place of a key of the optimizer's state


class NormMeter:
    """Measures norms after a step; `kinds` are of `config.NORMS`. All ranks make theirs, and measure, together."""

    def __init__(self, weights: RankWeights, kinds: Collection[str]) -> None:
        self._weights, self._layout, self._kinds = weights, weights.layout, kinds
        self._shards = shard_names(weights.stages.config.num_layers)
        self._state_keys: list[str] = []  # of the tensors that have norms, over all ranks

    def measure(self, result: StepResult) -> dict[str, dict[str, float]]:
        """Return the keys of metrics.jsonl with norms, by shard, after a step whose result is given; the same anywhere.

        That of a gradient is of the whole sum, before it is clipped.
        """
        found: dict[str, dict[str, float]] = {}
        if "gradients" in self._kinds:
            found["gradient_norms"] = dict(zip(self._shards, result.shard_grad_norms, strict=True))
        keys = [_PARAMETERS] * ("parameters" in self._kinds)
        if "optimizer-state" in self._kinds:
            keys += self._find_state_keys()
            found["optimizer_state_norms"] = {}
        if keys:
            norms = self._sum_squares(keys).sqrt().tolist()
            for key, of_shards in zip(keys, norms, strict=True):
                name = "parameter_norms" if key == _PARAMETERS else "optimizer_state_norms"
                suffix = f"_{key}" if key else ""
                found.setdefault(name, {}).update(
                    {f"{shard}{suffix}": norm for shard, norm in zip(self._shards, of_shards, strict=True)}
                )
        return found

    def _find_state_keys(self) -> list[str]:
        """Return the keys of the optimizer's tensors on all ranks; [] before the first step that changed weights."""
        if not self._state_keys:
            states = self._weights.optimizer.state.values()
            own = {key for state in states for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
            self._state_keys = sorted(set().union(*self._layout.gather(own)))
        return self._state_keys

    @torch.no_grad()
    def _sum_squares(self, keys: Collection[str]) -> Tensor:
        """Return the squared norms of masters or of a tensor of their state, float64 [keys, shards]."""
        sums = torch.zeros(len(keys), len(self._shards), dtype=torch.float64, device=self._layout.device)
        for run in filter(self._weights.counts, self._weights.masters):
            master = self._weights.masters[run]
            tensors = {_PARAMETERS: master, **self._weights.optimizer.state.get(master, {})}
            for number, key in enumerate(keys):
                if key in tensors:
                    norm = torch.linalg.vector_norm(tensors[key].detach(), dtype=torch.float64)
                    sums[number, run.place.shard_number] += norm.square().to(sums.device)
        for add_up in (self._layout.sum_over_parts, self._layout.sum_over_replicas, self._layout.sum_over_pipeline):
            add_up(sums)
        return sums
