"""Parameters of a rank as one run of elements, cut among replicas that share the state of training.

Runs begin at whole units within a parameter. bitsandbytes keeps the state of parameters with fewer elements than a unit
in 32 bits, and that of others in 8-bit blocks that begin at the first element, so units have the same blocks in a run
as in the whole.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from openchatkit.models.cuts import is_cut
from openchatkit.models.registry import family
from openchatkit.models.shards import HEAD, layer_name, shard_names
from openchatkit.training.local_stages import LocalStages

UNIT = 4096  # elements


@dataclass(frozen=True)
class Place:
    """A parameter's shard, name and number of elements here, and the number of the shard in the whole model."""

    shard: str
    name: str
    elements: int
    shard_number: int

    @property
    def key(self) -> tuple[str, str]:
        """Shard and name, by which the parameter is known."""
        return self.shard, self.name


@dataclass(frozen=True)
class Run:
    """Elements `start` to `stop` (exclusive) of a flattened parameter, which the replica `owner` updates."""

    place: Place
    start: int
    stop: int
    owner: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the parameter."""
        return self.elements == self.place.elements

    @property
    def units(self) -> int:
        """Number of sums that the gradient's norm is added up from: a unit's each, and the rest's at the end."""
        return math.ceil(self.elements / UNIT)


def list_places(stages: LocalStages) -> list[Place]:
    """Return the parameters of stages as the first part has them, so that all parts cut them into the same runs."""
    kind, config = family(stages.config), stages.config
    order = shard_names(config.num_layers)
    places = []
    for shard in stages.shards:
        shapes = dict(kind.parameter_shapes(config, shard))
        if config.tie_embeddings and shard == HEAD:
            shapes[kind.tied_weight] = (config.vocab_size, config.hidden_size)
        for name, shape in shapes.items():
            elements = math.prod(shape) // (stages.part.count if is_cut(kind.cuts(config)[name]) else 1)
            places.append(Place(shard, name, elements, order.index(shard)))
    return places


def is_tied_copy(stages: LocalStages, place: Place) -> bool:
    """Whether a parameter is the projection of a model with tied embeddings, which the embedding's shard stores."""
    return stages.config.tie_embeddings and place.key == (HEAD, family(stages.config).tied_weight)


def is_of_all_layers(stages: LocalStages, place: Place) -> bool:
    """Whether a parameter is one layer's copy of a matrix that is the same in all layers."""
    return place.name in family(stages.config).of_all_layers


def is_counted_elsewhere(stages: LocalStages, place: Place) -> bool:
    """Whether another parameter stands for this one in sums over the model: that it is a copy of."""
    is_first_layer = place.shard == layer_name(0)
    return is_tied_copy(stages, place) or (is_of_all_layers(stages, place) and not is_first_layer)


def cut_into_runs(places: Sequence[Place], owners: int) -> list[Run]:
    """Cut all elements into one run of about as many for each owner; within a parameter, runs begin at units.

    The last unit of a parameter has the rest of it, which is less than a unit.
    """
    total = sum(place.elements for place in places)
    borders = [-(-total * owner // owners) for owner in range(1, owners)]
    runs, before = [], 0
    for place in places:
        units = max(1, place.elements // UNIT)
        inner = {math.ceil((border - before) / UNIT) for border in borders}
        cuts = [0, *sorted(unit for unit in inner if 0 < unit < units)]
        for first, last in itertools.zip_longest(cuts, cuts[1:]):
            stop = place.elements if last is None else last * UNIT
            runs.append(Run(place, first * UNIT, stop, (before + first * UNIT) * owners // total))
        before += place.elements
    return runs
