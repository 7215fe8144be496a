"""`training/plan/` against what is really allocated and sent; `make_layout` for thousands of ranks in one process.

torch's fake process group takes part in collectives without anyone else: numbers are meaningless, counts are real.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from model_configs import NEOX
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openchatkit.distributed.layout import Layout, balanced_layers, make_layout, stage_layers
from openchatkit.distributed.seams import Enter, Gather, Leave, Scatter
from openchatkit.libraries import pytorch
from openchatkit.loading.hardware import DTYPES
from openchatkit.models.cuts import Part
from openchatkit.models.neox_options import NeoxOptions
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, shard_names
from openchatkit.models.stage import Stage
from openchatkit.paths import ROOT
from openchatkit.tools.planning import command as planning
from openchatkit.training.buckets import BUCKET
from openchatkit.training.fully_sharded import FullyShardedWeights, MatrixSharding, own_rows
from openchatkit.training.gradients import Gradients
from openchatkit.training.local_stages import LocalStages, join_parts
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.optimization import OPTIMIZERS
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.pipeline import Pipeline
from openchatkit.training.plan import memory, parameters, work
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.times import Machines, estimate
from openchatkit.training.plan.traffic import Traffic, rank_traffic
from openchatkit.training.precision import autocast
from openchatkit.training.schedules import SCHEDULES
from openchatkit.training.weights import Weights

CPU = torch.device("cpu")
TINY = dataclasses.replace(NEOX, num_layers=8, intermediate_size=96)
NETWORKS = {
    "parallel": TINY,
    "serial": dataclasses.replace(TINY, parallel_residual=False),
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "gptj": dataclasses.replace(TINY, family="gptj", attention_bias=False),
}
NEOX_20B = dataclasses.replace(
    TINY,
    vocab_size=50432,
    hidden_size=6144,
    num_layers=44,
    num_heads=64,
    intermediate_size=24576,
    max_position_embeddings=2048,
    rotary_dim=24,
)
GPT3_175B = dataclasses.replace(
    TINY,
    vocab_size=50304,
    hidden_size=12288,
    num_layers=96,
    num_heads=96,
    intermediate_size=49152,
    max_position_embeddings=2048,
    rotary_dim=32,
)
# Model, pipeline size, replicas, tensor size, schedule, stages a rank, micro-batches.
LARGE = {
    "20B on 96": (NEOX_20B, 4, 12, 2, "1f1b", 1, 32),
    "20B on 1,024": (NEOX_20B, 4, 64, 4, "interleaved", 2, 8),
    "20B on 8,192": (NEOX_20B, 4, 256, 8, "zero-bubble-v", 2, 4),
    "175B on 96": (GPT3_175B, 12, 1, 8, "1f1b", 1, 128),
    "175B on 1,024": (GPT3_175B, 16, 8, 8, "interleaved", 2, 32),
    "175B on 8,192": (GPT3_175B, 16, 64, 8, "gpipe", 1, 16),
}


def planned(config, pipeline_size=1, replicas=1, tensor_size=1, schedule="gpipe", stages_a_rank=1, m=1, **options):
    layers = stage_layers(config.num_layers, stages=pipeline_size * stages_a_rank, layers_per_stage=0)
    return PlannedRun(
        config=config,
        layers=tuple(layers),
        pipeline_size=pipeline_size,
        replicas=replicas,
        tensor_size=tensor_size,
        schedule=schedule,
        micro_batches=m,
        **options,
    )


@contextlib.contextmanager
def fake_ranks(rank, world_size):
    """A process group in which this process is one rank, and nobody is any other."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def lay_out(monkeypatch, rank, **sizes) -> tuple[Layout, list[list[int]]]:
    """`make_layout` as it is, but that gloo's group is a fake one too; also returns the ranks of each group it made."""
    original, made = dist.new_group, []

    def new_group(ranks=None, *, timeout, backend=None):
        made.append(list(range(dist.get_world_size())) if ranks is None else ranks)
        return original(ranks, timeout=timeout)

    with monkeypatch.context() as patched:
        patched.setattr(dist, "new_group", new_group)
        return make_layout(rank=rank, device=CPU, timeout=timedelta(seconds=5), **sizes), made


def members(group, rank):
    return [rank] if group is None else dist.get_process_group_ranks(group)


# The layout of thousands of ranks.


@pytest.mark.parametrize(
    ("pipeline_size", "replicas", "tensor_size"),
    [(4, 12, 2), (16, 8, 8), (2, 512, 1), (1, 1024, 1), (16, 64, 8), (8192 // 8, 1, 8), (1, 1024, 8)],
    ids=str,
)
def test_every_rank_of_thousands_has_its_groups(monkeypatch, pipeline_size, replicas, tensor_size):
    sizes = {"pipeline_size": pipeline_size, "replicas": replicas, "tensor_size": tensor_size}
    world = pipeline_size * replicas * tensor_size
    found = {}
    for rank in sorted({0, 1, world // 3, world // 2, world - 1}):
        with fake_ranks(rank, world):
            layout, made = lay_out(monkeypatch, rank, join_ends=True, **sizes)
            assert (layout.world_size, layout.rank, dist.get_world_size()) == (world, rank, world)
            found[rank] = {
                name: members(getattr(layout, name), rank) for name in ("tensor", "pipeline", "data", "control")
            }
            place = (layout.replica, layout.pipeline_rank, layout.tensor_rank)
            assert (place[0] * pipeline_size + place[1]) * tensor_size + place[2] == rank
            check_groups(found[rank], layout)
            ends = members(layout.ends, rank)
            own = found[rank]["pipeline"]
            assert ends == ([own[0], own[-1]] if rank in (own[0], own[-1]) and len(own) > 1 else [rank])
        check_partition(made, sizes, world)


def check_groups(groups, layout):
    rank = layout.rank
    first = rank - layout.tensor_rank
    assert groups["tensor"] == list(range(first, first + layout.tensor_size))  # neighbours, so within a machine
    start = layout.replica * layout.pipeline_size * layout.tensor_size + layout.tensor_rank
    assert groups["pipeline"] == [start + stage * layout.tensor_size for stage in range(layout.pipeline_size)]
    of_replica = layout.pipeline_size * layout.tensor_size
    assert groups["data"] == [rank % of_replica + number * of_replica for number in range(layout.replicas)]
    assert groups["control"] == list(range(layout.world_size))


def check_partition(made, sizes, world):
    """The groups of a kind, which are made one after the other, have each rank exactly once."""
    made = list(made)
    assert made.pop() == list(range(world))  # control
    for kind in ("tensor_size", "pipeline_size", "replicas"):
        if sizes[kind] in (1, world):
            continue
        number = world // sizes[kind]
        groups, made = made[:number], made[number:]
        assert {len(group) for group in groups} == {sizes[kind]}
        assert sorted(itertools.chain(*groups)) == list(range(world))
    if sizes["pipeline_size"] > 2:
        assert sorted({rank for group in made for rank in group}) == sorted(itertools.chain(*made))
        assert len(made) == world // sizes["pipeline_size"]
    else:
        assert not made


@pytest.mark.long
@pytest.mark.parametrize("world", [1024, 8192])
def test_all_ranks_agree_on_their_groups(monkeypatch, world):
    """Every rank of 1,024 and every seventh of 8,192 makes the same groups in the same order, as NCCL demands."""
    sizes = {"pipeline_size": 8, "replicas": world // 64, "tensor_size": 8}
    first = None
    for rank in range(0, world, 1 if world == 1024 else 7):
        with fake_ranks(rank, world):
            layout, made = lay_out(monkeypatch, rank, join_ends=True, **sizes)
            names = ("tensor", "pipeline", "data", "control")
            check_groups({name: members(getattr(layout, name), rank) for name in names}, layout)
        first = first or made
        assert made == first


# All ranks of a replica together are the model.


@pytest.mark.parametrize("name", LARGE)
def test_ranks_add_up_to_the_model(name):
    run = planned(*LARGE[name][:-1], m=LARGE[name][-1], dp_mode="sharded", recompute=False)
    assert run.world_size == int(name.split(" on ")[1].replace(",", ""))
    config, parts = run.config, run.tensor_size
    kind = family(config)
    whole = uncut = once = 0
    for shard in shard_names(config.num_layers):
        for parameter, shape in kind.parameter_shapes(config, shard).items():
            size = torch.Size(shape).numel()
            whole += size
            uncut += size * (kind.cuts(config)[parameter] == "whole")
            once += size * (kind.cuts(config)[parameter] == "once")
    first = [parameters.count_rank(run, rank, 0) for rank in range(run.pipeline_size)]
    other = [parameters.count_rank(run, rank, parts - 1) for rank in range(run.pipeline_size)]
    # What is cut adds up to the whole, parameters of the first part are there once, uncut ones on every part.
    held = sum(count.elements for count in first) + (parts - 1) * sum(count.elements for count in other)
    assert held - (parts - 1) * uncut == whole
    assert sum(count.uncut for count in first) == sum(count.uncut for count in other) == uncut
    assert sum(count.elements for count in first) - sum(count.elements for count in other) == once
    hidden = config.hidden_size
    assert whole == config.num_layers * (12 * hidden**2 + 13 * hidden) + 2 * config.vocab_size * hidden + 2 * hidden
    assert {"20B": 20554567680, "175B": 175197806592}[name.split()[0]] == whole


@pytest.mark.parametrize("name", LARGE)
def test_bytes_and_messages_of_all_ranks_add_up(name):
    run = planned(*LARGE[name][:-1], m=LARGE[name][-1], dp_mode="sharded", recompute=False)
    stages = sorted(itertools.chain(*(run.stages_of(rank) for rank in range(run.pipeline_size))))
    assert stages == list(range(len(run.layers)))
    ranks = range(run.pipeline_size)
    held = [memory.rank_bytes(run, rank) for rank in ranks]
    counts = [parameters.count_rank(run, rank) for rank in ranks]
    for each, count in zip(held, counts, strict=True):
        matrices, others = count.matrices, count.elements - count.matrices
        state = 2 * matrices + 4 * others + 4 * count.elements + (4 * matrices + 8 * count.elements) / run.replicas
        assert each.weights + each.gradients + each.masters + each.moments == pytest.approx(state)
        assert each.total == pytest.approx(sum(vars(each).values()))
        assert min(vars(each).values()) >= 0
    traffic = [rank_traffic(run, rank) for rank in ranks]
    sent = sum((each["pipeline"] for each in traffic), Traffic())
    assert sent == sum((each["received"] for each in traffic), Traffic())
    borders = len(run.layers) - 1 - (run.schedule == "zero-bubble-v")  # a V turns within the last rank
    assert sent.messages == 2 * borders * run.micro_batches
    assert sent.bytes == sent.messages * run.seq_length * run.config.hidden_size * 2


@pytest.mark.parametrize("name", [name for name, large in LARGE.items() if SCHEDULES[large[4]].takes_several])
def test_every_send_of_the_schedule_has_its_receive(name):
    """By torch's own list of actions, with the messages that it adds to them."""
    run = planned(*LARGE[name][:-1], m=LARGE[name][-1], recompute=False)
    kind = SCHEDULES[run.schedule].torch_class.removeprefix("Schedule")
    lists = get_schedule_ops(kind, run.pipeline_size, run.micro_batches, run.stages_a_rank, with_comms=True)
    names = [[str(action.computation_type) for action in actions] for actions in lists]
    for rank, actions in enumerate(names):
        traffic = rank_traffic(run, rank)
        assert sum("SEND" in each for each in actions) == traffic["pipeline"].messages
        assert sum("RECV" in each for each in actions) == traffic["received"].messages
    for one, other, step in (("SEND_F", "RECV_F", 1), ("SEND_B", "RECV_B", -1)):
        ends = []
        for end in (one, other):
            found = [a for actions in lists for a in actions if str(a.computation_type).endswith(end)]
            ends.append(sorted((a.stage_index, a.microbatch_index) for a in found))
        assert [(stage + step, number) for stage, number in ends[0]] == ends[1]


# Against what is really sent and kept.


def make_rank(config, run, layout):
    stages = {}
    for number in run.stages_of(layout.pipeline_rank):
        part = Part(layout.tensor_rank, layout.tensor_size)
        ends = {"embed": number == 0, "head": number == len(run.layers) - 1}
        again = {"recompute": run.recompute, "selective": run.selective}
        stages[number] = Stage(config, *run.layers[number], part=part, **ends, **again)
        stages[number].init_weights(0)
        join_parts(stages[number], layout, splits_tokens=run.sequence_parallel)
    return LocalStages(stages)


def make_pipeline(stages, layout, run):
    loss = VocabularyLoss(stages.projection, group=layout.tensor) if stages.has_head else torch.add
    return Pipeline(
        stages,
        layout,
        schedule=run.schedule,
        micro_batches=run.micro_batches,
        micro_batch_size=run.micro_batch_size,
        seq_length=run.seq_length,
        dtype=DTYPES[run.precision],
        loss=loss,
    )


class Counter:
    """Messages and all-reduces of this process, by their group."""

    def __init__(self, monkeypatch):
        self.sent = self.received = Traffic()
        self.gathered = Traffic()
        self.sums = {}
        self._monkeypatch = monkeypatch

    def __enter__(self):
        reduce, counter = dist.all_reduce, self

        class Operation(dist.P2POp):
            def __init__(self, op, tensor, *args, **kwargs):
                super().__init__(op, tensor, *args, **kwargs)
                way = "sent" if op is dist.isend else "received"
                setattr(counter, way, getattr(counter, way) + Traffic(1, tensor.nbytes))

        def receive(tensor, *args, **kwargs):
            tensor.fill_(1)  # a neighbour's vote that shapes are known

        def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
            self.sums[group] = self.sums.get(group, Traffic()) + Traffic(1, tensor.nbytes)
            return reduce(tensor, op, group)

        def gather(output, tensor, group=None):
            self.gathered += Traffic(1, output.nbytes)
            output.view(-1, *tensor.shape).copy_(tensor)

        def scatter(output, tensor, group=None):
            self.gathered += Traffic(1, tensor.nbytes)
            output.copy_(tensor[: len(output)])

        self._patch = self._monkeypatch.context()
        patched = self._patch.__enter__()
        patched.setattr(dist, "P2POp", Operation)
        patched.setattr(dist, "recv", receive)
        patched.setattr(dist, "all_reduce", all_reduce)
        patched.setattr(dist, "all_gather_into_tensor", gather)
        patched.setattr(dist, "reduce_scatter_tensor", scatter)
        return self

    def __exit__(self, *error):
        self._patch.__exit__(*error)


CASES = [
    ("parallel", "1f1b", 1, False),
    ("parallel", "gpipe", 1, True),
    ("serial", "1f1b", 1, True),
    ("serial", "interleaved", 2, False),
    ("tied", "interleaved", 2, True),
    ("gptj", "zero-bubble", 2, False),
    ("parallel", "zero-bubble", 1, False),
    ("gptj", "zero-bubble-v", 2, False),
]


@pytest.mark.parametrize(("tensor_size", "splits_tokens"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("network", "schedule", "stages_a_rank", "recompute"), CASES)
def test_messages_are_those_of_a_real_pipeline(
    monkeypatch, network, schedule, stages_a_rank, recompute, tensor_size, splits_tokens
):
    config = NETWORKS[network]
    options = {"micro_batch_size": 2, "seq_length": 8, "precision": "float32", "recompute": recompute}
    options["sequence_parallel"] = splits_tokens
    run = planned(config, 4, 2, tensor_size, schedule, stages_a_rank, m=8, on_gpu=False, **options)
    for pipeline_rank in (0, 1, 3):
        rank = (run.pipeline_size + pipeline_rank) * tensor_size
        with fake_ranks(rank, run.world_size):
            layout, _ = lay_out(monkeypatch, rank, pipeline_size=4, replicas=2, tensor_size=tensor_size)
            assert layout.pipeline_rank == pipeline_rank
            stages = make_rank(config, run, layout)
            pipeline = make_pipeline(stages, layout, run)
            tokens = torch.zeros(16, 8, dtype=torch.int64)
            with Counter(monkeypatch):
                pipeline.forward_backward(tokens, tokens)  # torch 2.11 begins with messages that connect neighbours
            with Counter(monkeypatch) as counter:
                pipeline.forward_backward(tokens, tokens)
            traffic = rank_traffic(run, pipeline_rank)
            assert counter.gathered == traffic["gathered"]
            assert counter.sent == traffic["pipeline"]
            assert counter.received == traffic["received"]
            # The sums of gradients come with the step.
            uncut = parameters.count_rank(run, pipeline_rank).uncut
            own = Traffic(1, 4 * uncut) if tensor_size > 1 else Traffic()
            assert counter.sums.get(layout.tensor, Traffic()) + own == traffic["tensor"]
            assert count_buffers(pipeline) == sum(memory.receive_bytes(run, n) for n in run.stages_of(pipeline_rank))


def count_buffers(pipeline):
    """Bytes of the receive buffers that torch's stages keep; a V's turn holds what it was given in their place."""
    schedule = pipeline._schedule
    stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
    infos = [
        info
        for s in stages
        for table in (s.args_recv_info, s.grad_recv_info)
        for each in table.values()
        for info in each
    ]
    buffers = (getattr(info, "buffer", None) for info in infos)  # in torch 2.11 the root's arguments have none
    return sum(buffer.nbytes for buffer in buffers if buffer is not None)


def saved_bytes(function, *, besides):
    """Bytes of what autograd keeps of a call, each storage once, but for those of `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, found


# Tensor size, and whether tokens are split between its ranks; documents.
CONFINED = [(1, False, False), (2, False, False), (2, True, False), (2, True, True), (1, False, True)]


@pytest.mark.parametrize(("tensor_size", "splits_tokens", "documents"), CONFINED)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_stage_keeps_what_the_plan_says(network, recompute, precision, tensor_size, splits_tokens, documents):
    config = NETWORKS[network]
    options = {"micro_batch_size": 2, "seq_length": 8, "precision": precision, "recompute": recompute}
    options |= {"sequence_parallel": splits_tokens, "documents": documents, "on_gpu": False}
    run = planned(config, 4, 1, tensor_size, "1f1b", m=4, **options)
    with fake_ranks(0, tensor_size):
        for number in range(4):
            assert count_kept(run, number) == memory.kept_bytes(run, number), number


WITH_OPTIONS = {
    "plain": {},
    "softsign": {"activation": "softsign", "parallel_residual": False},
    "llama": {
        "activation": "swiglu",
        "parallel_residual": False,
        "options": NeoxOptions(norm="rmsnorm", num_kv_heads=2, use_bias_in_mlp=False),
    },
    "one norm": {"activation": "bilinear", "options": NeoxOptions(gpt_j_tied=True)},
    "query-key norm": {"options": NeoxOptions(norm="scalenorm", use_qk_layernorm=True)},
    "window": {"options": NeoxOptions(sliding_window_width=2)},
    "blocks": {
        "options": NeoxOptions(attention_config=("local", "bigbird") * 4, sparsity_config=(("block", 2),)),
    },
    "alibi": {"rotary_dim": 0, "options": NeoxOptions(pos_emb="alibi")},
    "alibi, documents": {"rotary_dim": 0, "options": NeoxOptions(pos_emb="alibi")},
}


@pytest.mark.parametrize(("precision", "tensor_size"), [("float32", 2), ("bfloat16", 1)])
@pytest.mark.parametrize("network", WITH_OPTIONS)
def test_a_stage_with_options_keeps_what_the_plan_says(network, precision, tensor_size):
    """But for the first layer's input, where norms in float32 keep a copy, and for the widths of norms' statistics."""
    config = dataclasses.replace(TINY, family="neox", **WITH_OPTIONS[network])
    options = {"micro_batch_size": 2, "seq_length": 8, "precision": precision, "recompute": False, "on_gpu": False}
    options["documents"] = network.endswith("documents")
    run = planned(config, 4, 1, tensor_size, "1f1b", m=4, **options)
    near = run.tokens * 4 if precision == "float32" else run.hidden_bytes + run.tokens * 32
    with fake_ranks(0, tensor_size):
        for number in range(4):
            assert abs(count_kept(run, number) - memory.kept_bytes(run, number)) <= near, number


def count_kept(run, number):
    """Bytes that a stage of a run's first part keeps of a micro-batch."""
    config, dtype = run.config, DTYPES[run.precision]
    starts = torch.zeros(2, 8, dtype=torch.int64) if run.documents else None
    stage = make_stage(run, number)
    copy_matrices(stage, dtype)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    shape = (2, 8 // stage.hidden_parts, config.hidden_size)
    x = tokens if number == 0 else torch.randn(shape, dtype=dtype, requires_grad=True)
    loss = VocabularyLoss(stage.projection) if number == 3 else None

    def forward():
        hidden = stage(x, starts)
        return (hidden, None if loss is None else loss(hidden, tokens % (config.vocab_size // run.tensor_size)))

    tables = stage.rotary(8, CPU)
    with autocast(CPU, dtype):
        (hidden, _), found = saved_bytes(forward, besides=[*stage.parameters(), *tables, x])
    found[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    # A part of the embedding notes which of the tokens' rows are elsewhere, and the others' numbers.
    rows = 2 * 8 * (1 + 8) if number == 0 and run.tensor_size > 1 else 0
    return sum(storage.nbytes() for storage in found.values()) - rows


def make_stage(run, number):
    """A stage of the first part of a run's model, with its seams where it is one of several."""
    part, ends = Part(0, run.tensor_size), {"embed": number == 0, "head": number == len(run.layers) - 1}
    again = {"recompute": run.recompute, "selective": run.selective}
    stage = Stage(run.config, *run.layers[number], part=part, **ends, **again)
    stage.init_weights(0)
    if run.tensor_size > 1:
        seams = (Gather, Scatter) if run.sequence_parallel else (Enter, Leave)
        stage.connect_parts(*(seam(dist.group.WORLD) for seam in seams), splits_tokens=run.sequence_parallel)
    return stage


def copy_matrices(stage, dtype):
    """Give the layers matrices of a dtype, as training does."""
    for shard, module in stage.named_shards():
        for parameter in module.parameters():
            if parameter.dim() > 1 and shard != EMBED and dtype != torch.float32:
                parameter.data = parameter.data.to(dtype)
                pytorch.keep_gradient_in_float32(parameter)


STATES = [
    ("float32", "float32", "allreduce", False),
    ("bfloat16", "float32", "allreduce", False),
    ("bfloat16", "float32", "sharded", False),
    ("float32", "bf16", "sharded", False),
    ("float32", "8bit", "allreduce", False),
    ("bfloat16", "8bit", "sharded", False),
    ("float32", "float32", "allreduce", True),
    ("bfloat16", "bf16", "sharded", True),
    ("float32", "float32", "sharded-gradients", False),
    ("bfloat16", "8bit", "sharded-gradients", False),
    ("bfloat16", "float32", "sharded-parameters", False),
    ("bfloat16", "lion", "sharded", True),
    ("float32", "madgrad", "sharded-gradients", False),
    ("float32", "madgrad without momentum", "sharded-parameters", False),
    ("bfloat16", "sm3", "allreduce", False),
    ("float32", "sm3 without momentum", "allreduce", True),
]


@pytest.mark.parametrize(("precision", "moments", "dp_mode", "offload"), STATES)
def test_state_of_a_parameter_takes_the_bytes_of_the_table(monkeypatch, precision, moments, dp_mode, offload):
    """After one real step of the real optimizer: weights, gradients, masters and moments of each of four replicas."""
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=160, num_layers=3)
    options = {"precision": precision, "moments": moments, "dp_mode": dp_mode, "offload": offload, "on_gpu": False}
    run = planned(config, 1, 4, **options)
    expected = memory.rank_bytes(run, 0)
    shared = 0
    for replica in range(4):
        with fake_ranks(replica, 4):
            layout, _ = lay_out(monkeypatch, replica, replicas=4)
            found = allocate(run, layout, monkeypatch)
        # While the loss is computed, a replica also has the projection's own gradient.
        projection = 4 * config.vocab_size * config.hidden_size if dp_mode == "sharded-gradients" else 0
        if dp_mode in ("allreduce", "sharded"):
            assert found["weights"] == expected.weights
            assert 0 <= found["gradients"] - expected.gradients <= 4  # the factor of a fused step
            assert found["data"].bytes == rank_traffic(run, 0)["data"].bytes
            assert found["data"].messages >= rank_traffic(run, 0)["data"].messages
        # Runs begin at whole units of 4,096 elements: shares differ by less than one on each side.
        own = found["weights"] + found["gradients"] + found["masters"] + found["moments"]
        wanted = expected.weights + expected.gradients + expected.masters + expected.moments - projection
        assert abs(own - wanted) <= 4 + (dp_mode != "allreduce") * 2 * 4096 * (8 + memory.MOMENTS[moments])
        shared += own
    assert shared == pytest.approx(4 * wanted, rel=1e-4)
    # On a card, --use-offload leaves what layers compute with and its gradients; the rest is in main memory.
    if offload:
        on_card = dataclasses.replace(run, on_gpu=True)
        held = memory.rank_bytes(on_card, 0)
        assert (held.masters, held.moments) == (0, 0)
        shares = 1 if dp_mode == "allreduce" else 4
        whole = 4 * parameters.count_rank(run, 0).elements / shares
        assert memory.main_memory_bytes(on_card, 0) == pytest.approx(expected.masters + expected.moments + whole)


@pytest.mark.parametrize("bucket", [BUCKET, 10_000])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shared_gradients_wait_for_a_message_that_is_worth_it(monkeypatch, precision, bucket):
    """After each backward pass of a large model, and once a step of one whose gradients all fit into one message."""
    monkeypatch.setitem(Gradients.__init__.__kwdefaults__, "bucket", bucket)
    monkeypatch.setattr("openchatkit.training.plan.traffic.BUCKET", bucket)
    run = planned(TINY, 1, 4, m=3, precision=precision, dp_mode="sharded-gradients", on_gpu=False)
    with fake_ranks(1, 4):
        layout, _ = lay_out(monkeypatch, 1, replicas=4)
        stages = make_rank(TINY, run, layout)
        weights = Weights(stages, layout, dtype=DTYPES[precision], shard_gradients=True)
        weights.optimizer = build_optimizer("adamw", weights, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        stage = next(iter(stages))
        counted = [parameter for parameter in stage.parameters() if parameter is not stage.projection.weight]
        with count_exchanged(monkeypatch) as exchanged:
            for _ in range(run.micro_batches):
                torch.stack([parameter.float().sum() for parameter in counted]).sum().backward()
            weights.reduce_gradients()
            weights.step(1.0, 0.0)
    planned_traffic = rank_traffic(run, 0)["data"]
    assert sum(exchanged) == planned_traffic.bytes
    if precision == "float32":  # half-precision copies are sent apart from what has none
        assert len(exchanged) == pytest.approx(planned_traffic.messages, rel=0.25)


@contextlib.contextmanager
def count_exchanged(monkeypatch):
    """The bytes of each message between replicas, as they come."""
    exchanged: list[int] = []
    with monkeypatch.context() as patched:
        for name in ("all_reduce", "reduce", "broadcast"):
            original = getattr(dist, name)

            def count(tensor, *args, original=original, **kwargs):
                exchanged.append(tensor.nbytes)
                return original(tensor, *args, **kwargs)

            patched.setattr(dist, name, count)
        yield exchanged


def read_table():
    """Rows of the table of bytes a parameter in training's README: {(precision, moments): cells after them}."""
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| precision | moments |") :].split("\n\n")[0]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {(row[0], row[1]): row[2:] for row in cells}


@pytest.mark.parametrize(("precision", "moments"), itertools.product(("float32", "half"), memory.MOMENTS))
def test_the_table_of_bytes_is_the_planners(precision, moments):
    """Of a model that is nothing but matrices, as good as; scales of 8-bit moments are not in the table."""
    row = read_table()[precision, moments]
    config = dataclasses.replace(TINY, hidden_size=1024, intermediate_size=4096, num_layers=64, vocab_size=64)
    modes = ("allreduce", "sharded", "sharded-gradients", "sharded-parameters")
    for mode, cell in zip(modes, row[4:], strict=True):
        options = {"precision": {"half": "bfloat16"}.get(precision, precision), "moments": moments, "dp_mode": mode}
        run = planned(config, 1, 4, **options)
        held, elements = memory.rank_bytes(run, 0), parameters.count_rank(run, 0).elements
        found = (held.weights + held.gradients + held.masters + held.moments) / elements
        if cell:
            expected = sum(float(term) for term in cell.split(" + ") if "/" not in term)
            expected += sum(float(term.removesuffix("/R")) / 4 for term in cell.split(" + ") if "/" in term)
            assert found == pytest.approx(expected, rel=0.02), mode
        if mode == "allreduce":
            kinds = (held.weights, held.gradients, held.masters, held.moments)
            assert [size / elements for size in kinds] == pytest.approx([float(each) for each in row[:4]], abs=0.1)


def test_inputs_in_main_memory_are_not_on_the_card():
    options = {"schedule": "1f1b", "m": 8, "recompute": True}
    run = planned(NEOX_20B, 4, **options)
    moved = dataclasses.replace(run, activation_offload=True)
    for rank in range(4):
        freed = memory.rank_bytes(run, rank).activations - memory.rank_bytes(moved, rank).activations
        layers, passes = 11, min(8, 4 - rank)
        # The input of a rank's first layer is a receive buffer, which stays.
        assert freed == (layers - (rank > 0)) * passes * run.hidden_bytes
        assert memory.main_memory_bytes(moved, rank) == layers * passes * run.hidden_bytes
    assert memory.main_memory_bytes(run, 0) == 0


def allocate(run, layout, monkeypatch):
    """Bytes of each kind after a step, and what replicas exchanged for it."""
    dtype = DTYPES[run.precision]
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "moments": run.moments}
    name, *without_momentum = run.moments.split(maxsplit=1)
    if name in ("madgrad", "sm3"):
        options["momentum"] = 0.0 if without_momentum else 0.9
    with count_exchanged(monkeypatch) as exchanged, LiveBytes([]) as live:
        stages = make_rank(run.config, run, layout)
        if run.dp_mode == "sharded-parameters":
            weights = shard_parameters(stages, layout, dtype)
        else:
            modes = {"sharded": run.dp_mode == "sharded", "shard_gradients": run.dp_mode == "sharded-gradients"}
            weights = Weights(stages, layout, dtype=dtype, offloaded=run.offload, **modes)
            weights.reduce_gradients()
        weights.optimizer = build_optimizer(name if name in OPTIMIZERS else "adamw", weights, **options)
        weights.step(0.5, 1e-3)
    held = [weights.parameter(each) for each in weights.masters]
    held = held if run.dp_mode == "sharded-parameters" else list(stages.parameters())
    parameters = {storage_of(parameter).data_ptr() for parameter in held}
    masters = [m for m in weights.masters.values() if storage_of(m).data_ptr() not in parameters]
    state = list(weights.optimizer.state.values())
    moments = sum(
        value.nbytes
        for each in state
        for key, value in each.items()
        if isinstance(value, torch.Tensor) and not key.startswith(("step", "qmap"))  # counts, tables that all share
    )
    others = {
        storage_of(value).data_ptr(): value.nbytes
        for each in state
        for key, value in each.items()
        if isinstance(value, torch.Tensor) and key.startswith(("step", "qmap"))
    }
    found = {
        "weights": sum(storage_of(parameter).nbytes() for parameter in held),
        "masters": sum(master.nbytes for master in masters),
        "moments": moments,
    }
    gc.collect()
    return found | {
        "gradients": live.now - sum(found.values()) - sum(others.values()),
        "data": Traffic(len(exchanged), sum(exchanged)),
    }


def shard_parameters(stages, layout, dtype):
    """Weights as `sharded-parameters` has them, with gradients of zeros."""
    sharding = MatrixSharding(layout, dtype)
    for shard, module in stages.named_shards():
        sharding.cut(shard, module)
    weights = FullyShardedWeights(stages, layout, sharding)
    for run in weights.masters:
        weights.parameter(run).grad = torch.zeros_like(weights.parameter(run))
    return weights


def storage_of(tensor):
    """The memory of a tensor; of one that is spread over ranks, this rank's."""
    return own_rows(tensor).untyped_storage()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"])
@pytest.mark.parametrize(("ranks", "m"), [(2, 2), (2, 6), (4, 4), (4, 12), (4, 40)])
def test_the_worst_moment_is_that_of_the_schedule(schedule, ranks, m):
    """By torch's own list, whole; that of 1F1B has one micro-batch too few on the last rank."""
    stages_a_rank = 1 if schedule in ("gpipe", "1f1b") else 2
    run = planned(TINY, ranks, 1, 1, schedule, stages_a_rank, m=m, recompute=False)
    lists = get_schedule_ops(SCHEDULES[schedule].torch_class.removeprefix("Schedule"), ranks, m, stages_a_rank)
    kept = {stage: 10 + stage for stage in range(ranks * stages_a_rank)}
    pending = {stage: 3 + stage % 2 for stage in kept}
    for rank, actions in enumerate(lists):
        now = most = 0
        for action in actions:
            kind = None if action is None else action.computation_type.value
            if kind in ("F", "B", "W"):
                now += kept[action.stage_index] * (1 if kind == "F" else -1)
            if kind in ("I", "W"):
                now += pending[action.stage_index] * (1 if kind == "I" else -1)
            most = max(most, now)
        assert memory.peak(run, rank, kept, pending) == most, rank


def test_without_torchs_list_all_micro_batches_count(monkeypatch):
    run = planned(TINY, 4, 1, 1, "interleaved", 2, m=8)
    monkeypatch.setattr(pytorch, "list_pipeline_actions", lambda *_: None)
    assert work.simulate(run, [1.0] * 8, [2.0] * 8) is None
    assert memory.peak(run, 1, {1: 10, 5: 20}, {1: 1, 5: 1}) == 8 * 30


class LiveBytes(TorchDispatchMode):
    """The most bytes at a time of tensors that operations make, but for those of `known`."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for storage in [storage_of(result) for result in tree_leaves(results) if isinstance(result, torch.Tensor)]:
            if storage not in self._seen:
                self._seen.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return results

    def _change(self, size):
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("pipeline_rank", [1, 3])
@pytest.mark.parametrize(
    ("schedule", "stages_a_rank", "recompute", "precision", "tensor_size"),
    [
        ("1f1b", 1, True, "bfloat16", 1),
        ("1f1b", 1, "selective", "bfloat16", 1),
        ("gpipe", 1, "selective", "float32", 2),
        ("1f1b", 1, False, "float32", 2),
        ("gpipe", 1, False, "bfloat16", 1),
        ("interleaved", 2, True, "bfloat16", 2),
        ("zero-bubble", 1, False, "float32", 1),
        ("zero-bubble-v", 2, False, "bfloat16", 1),
    ],
)
def test_a_pipeline_takes_little_less_than_planned(
    monkeypatch, schedule, stages_a_rank, recompute, precision, tensor_size, pipeline_rank
):
    """At its fullest moment, while real micro-batches pass: the plan is an upper bound, and a close one."""
    config = dataclasses.replace(
        TINY, hidden_size=128, intermediate_size=512, num_layers=8, vocab_size=1024, rotary_dim=8
    )
    options = {"micro_batch_size": 2, "seq_length": 64, "precision": precision}
    options |= {"recompute": bool(recompute), "selective": recompute == "selective"}
    run = planned(config, 4, 1, tensor_size, schedule, stages_a_rank, m=8, on_gpu=False, **options)
    rank = pipeline_rank * tensor_size
    with fake_ranks(rank, run.world_size):
        layout, _ = lay_out(monkeypatch, rank, pipeline_size=4, tensor_size=tensor_size)
        stages = make_rank(config, run, layout)
        Weights(stages, layout, dtype=DTYPES[precision])
        pipeline = make_pipeline(stages, layout, run)
        tokens = torch.zeros(16, 64, dtype=torch.int64)
        with Counter(monkeypatch), autocast(CPU, DTYPES[precision]), LiveBytes(stages.parameters()) as live:
            pipeline.forward_backward(tokens, tokens)
    kinds = memory.rank_bytes(run, pipeline_rank)
    expected = kinds.gradients + kinds.activations + kinds.receive_buffers + kinds.logits + kinds.working
    assert 0.85 * expected <= live.most <= expected


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"])
@pytest.mark.parametrize(("ranks", "m"), [(4, 8), (4, 32), (8, 32)])
def test_the_bubble_is_that_of_the_order_of_work(schedule, ranks, m):
    """The published formula against torch's own order of passes, of which each begins when it can."""
    stages_a_rank = 1 if schedule in ("gpipe", "1f1b") else 2
    run = planned(dataclasses.replace(TINY, num_layers=32), ranks, 1, 1, schedule, stages_a_rank, m=m, recompute=False)
    stages = len(run.layers)
    seconds = work.simulate(run, [1.0] * stages, [2.0] * stages)
    assert work.bubble(run) == pytest.approx(1 - 3 * stages_a_rank * m / seconds, abs=0.005)


def test_passes_are_in_the_order_of_torch():
    """GPipe's; of 1F1B, what torch draws has one micro-batch too few on the last rank."""
    run = planned(TINY, 4, 1, 1, "gpipe", m=8)
    for passes, actions in zip(work.list_passes(run), get_schedule_ops("GPipe", 4, 8, 1), strict=True):
        actions = [each for each in actions if each is not None and each.computation_type.value in ("F", "B")]
        assert passes == [(each.computation_type.value, each.stage_index, each.microbatch_index) for each in actions]


def test_uneven_stages_wait_for_the_slowest():
    """By hand: two stages, the second three times as slow; the first waits, the second only for the first input."""
    run = planned(TINY, 2, 1, 1, "gpipe", m=4)
    # Forward passes of the second stage end at 1 + 3 x 4; the first's backward passes follow each of its own.
    assert work.simulate(run, [1.0, 3.0], [1.0, 3.0]) == 1 + 4 * 3 + 4 * 3 + 1
    even = dataclasses.replace(run, layers=((0, 4), (4, 8)))
    assert work.idle_share(even) > work.bubble(even)  # the head is on the second
    assert work.idle_share(dataclasses.replace(run, layers=((0, 1), (1, 8)))) > work.idle_share(even)


# The command.


CONFIG = {
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
}
RATES = ["--flops", "400", "--link-gbs", "50", "--local-gbs", "450"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def command(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        planning.main([str(word) for word in argv])
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def test_the_command_prints_a_plan(capsys, config_file):
    flags = ["--pipeline-group-size", 4, "--data-group-size", 12, "--tensor-group-size", 2, "--pp-mode", "1f1b"]
    batches = ["--batch-size", 32, "--micro-batch-size", 1, "--dp-mode", "sharded", "--bf16", "--total-steps", 100]
    status, output, error = command(
        capsys, "--model-name", config_file, *flags, *batches, "--cards", "96x80GB", "--spare", 6, *RATES
    )
    assert (status, error) == (0, "")
    run = planned(NEOX_20B, 4, 12, 2, "1f1b", m=32, dp_mode="sharded")
    rank = memory.fullest_rank(run)
    assert f"pipeline rank {rank}, with {parameters.count_rank(run, rank).elements:,} parameters" in output
    total = memory.rank_bytes(run, rank).total
    assert f"{total / 2**30:.2f} GiB  fits into 80 GiB less 6 to spare" in output
    assert "layers of stages: 4 x 11\n" in output
    assert f"waiting by the schedule itself: 8.6% of a step; with uneven stages: {work.idle_share(run):.1%}" in output
    assert "96 ranks = 4 in a pipeline x 12 replicas x 2 in a tensor group" in output
    assert "384 rows of 2,048 = 786,432 tokens" in output
    # Weights of 4 bytes and two moments of 4.
    assert f"a checkpoint: {12 * 20554567680 / 1e9:.2f} GB" in output
    assert "100 steps: " in output
    assert "assumptions:" in output
    # The same from a folder, with training's own way to say what is not of a plan; without rates nothing is of time.
    others = ["--task-name", "x.jsonl", "--lr", "1e-5", "--checkpoint-steps", 10]
    status, output, _ = command(capsys, "--model-name", config_file.parent, *flags, *batches, *others)
    assert status == 0
    assert "estimated" not in output
    assert "FIT" not in output


@pytest.mark.parametrize(
    "layout",
    [
        ["--pipeline-group-size", 8, "--pp-mode", "1f1b"],
        ["--pipeline-group-size", 8, "--pp-mode", "1f1b", "--num-layers", 6],
        ["--pipeline-group-size", 8, "--pp-mode", "interleaved", "--stages-per-rank", 5, "--optimizer-state", "bf16"],
        ["--data-group-size", 8, "--check-replicas", 10],
    ],
)
def test_a_run_that_does_not_fit_is_named_with_one_that_does(capsys, config_file, layout):
    flags = [*layout, "--batch-size", 32, "--micro-batch-size", 1, "--bf16", "--cards", "8x40GB"]
    _, output, _ = command(capsys, "--model-name", config_file, *flags)
    assert "DOES NOT FIT into 40 GiB less 2 to spare" in output
    advice = output.splitlines()[-1]
    assert " GiB would do with " in advice
    # What it names does fit.
    changed = advice.split(" would do with ")[1].split()
    _, output, _ = command(capsys, "--model-name", config_file, *flags, *changed)
    assert "fits into 40 GiB less 2 to spare" in output


def test_main_memory_is_that_of_a_host(capsys, config_file):
    flags = ["--data-group-size", 16, "--bf16", "--use-offload", "--batch-size", 1, "--micro-batch-size", 1]
    _, output, _ = command(capsys, "--model-name", config_file, *flags, "--host-memory", 1000, "--compile")
    whole = 8 * 16 * 20554567680 / 2**30  # masters, moments and gradients, of eight ranks
    assert f"main memory of a host with 8 such ranks: {whole:.2f} GiB  DOES NOT FIT into 1000 GiB" in output
    assert "take the total as an upper bound" in output


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--pipeline-group-size", 4, "--batch-size", 4], "ranks wait in "),
        (["--dp-mode", "sharded"], "--dp-mode sharded has no effect: there is one replica"),
        (["--sequence-parallel"], "--sequence-parallel has no effect: there is no tensor group"),
        (["--cards", "8x400GB"], "7 of --cards 8x400GB have nothing to do"),
    ],
    ids=str,
)
def test_ranks_that_are_wasted_are_warned_of(capsys, config_file, flags, warning):
    status, output, _ = command(capsys, "--model-name", config_file, "--micro-batch-size", 4, *flags)
    assert status == 0
    assert warning in output


def test_a_layout_that_waits_less_is_named(capsys, config_file):
    """With the same rows a step, on the same ranks, in no more memory."""
    flags = ["--pipeline-group-size", 4, "--batch-size", 16, "--micro-batch-size", 8, "--bf16"]
    _, output, _ = command(capsys, "--model-name", config_file, *flags)
    [advice] = [line for line in output.splitlines() if line.startswith("ranks wait in ")]
    assert "4 stages take turns with 2 micro-batches" in advice
    changed = advice.split(" with ")[-1].split()
    _, again, _ = command(capsys, "--model-name", config_file, *flags, *changed)
    assert "ranks wait in" not in again
    assert "step: 16 rows of 2,048" in again


def test_the_estimate_is_its_parts(config_file):
    """With the numbers of a hand: products by operations, sums and messages by bytes over the slowest link."""
    machines = Machines(operations=1e14, link=1e10, local=1e11, cards_a_host=8)
    run = planned(NEOX_20B, 4, 3, 8, "1f1b", m=8, dp_mode="allreduce")
    found = estimate(run, machines)
    traffic = rank_traffic(run, 3)
    assert found.products == work.rank_operations(run, 3) / 1e14  # with the head
    assert found.tensor == pytest.approx(2 * 7 / 8 * traffic["tensor"].bytes / 1e11)
    assert found.pipeline == pytest.approx(8 * 2048 * 6144 * 2 / 1e10)
    busy = found.products + found.tensor + found.pipeline
    assert found.waiting / (busy + found.waiting) == pytest.approx(3 / 11)
    largest = max(parameters.count_rank(run, rank).elements for rank in range(4))
    assert found.replicas == pytest.approx(2 * 2 / 3 * 4 * largest / 1e10)
    assert found.total == pytest.approx(busy + found.waiting + found.replicas)
    # Everything of a replica within a host: the fast link.
    within = dataclasses.replace(run, pipeline_size=1, tensor_size=8, replicas=1, layers=((0, 44),))
    assert estimate(within, dataclasses.replace(machines, link=1.0)).total < 60


def test_operations_are_six_for_each_weight_and_token_and_those_of_attention():
    """6 N + 6 L h T a token (Narayanan et al., arXiv 2104.04473, with attention that sees only what came before)."""
    run = planned(NEOX_20B, 4, 1, 2, "1f1b", m=8, recompute=False)
    done = 2 * sum(work.rank_operations(run, rank) for rank in range(4))
    matrices = 44 * 12 * 6144**2 + 50432 * 6144
    assert done == 8 * 2048 * (6 * matrices + 6 * 44 * 6144 * 2048)
    again = dataclasses.replace(run, recompute=True)
    head = 4 * work.head_operations(run) * 8
    assert 2 * sum(work.rank_operations(again, rank) for rank in range(4)) * 3 == 4 * done - head // 2
    # Attention and the products back to the hidden state are kept; the first products of attention and MLP are not.
    whole = planned(NEOX_20B, selective=True)
    assert work.layer_operations(whole) * (work.layer_passes(whole) - 3) == pytest.approx(2 * 2048 * 7 * 6144**2)


def test_suggestions_fit_and_the_fastest_comes_first(capsys, config_file):
    flags = ["--suggest", "--cards", "96x80GB", "--batch-size", 384, "--dp-mode", "sharded", "--bf16", *RATES]
    status, output, error = command(capsys, "--model-name", config_file, *flags)
    assert (status, error) == (0, "")
    rows = [line.split("  ") for line in output.split("\n\n")[0].splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert len(rows) == 6
    seconds = [float(row[-2].removesuffix(" s")) for row in rows[1:]]
    assert seconds == sorted(seconds)
    assert all(float(row[-4]) <= 78 for row in rows[1:])
    assert all(int(row[0]) * int(row[1]) * int(row[2]) == 96 for row in rows[1:])
    assert len({tuple(row[:3]) for row in rows[1:]}) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-group-size", "5"], "error: --tensor-group-size 5: expected a number that divides all"),
        (["--pipeline-group-size", "45", "--batch-size", "512"], "error: 45 stages, the model has only 44 layers"),
        (["--batch-size", "12"], "error: --batch-size 12 is not a multiple of --micro-batch-size 8"),
        (["--seq-length", "4096"], "error: --seq-length 4096: the model was made for at most 2048 tokens"),
        (["--pp-mode", "1f1b", "--pipeline-group-size", "8"], "error: --pp-mode 1f1b needs at least as many"),
        (["--stages-per-rank", "2"], "error: --stages-per-rank 2: one rank has the whole model"),
        (["--flops", "400"], "error: --flops asks for an estimate of time, which needs --link-gbs and --local-gbs"),
        (["--flops", "0"], "error: argument --flops: expected a number above 0, got '0'"),
        (["--suggest", "--cards", "8x80GB"], "error: --suggest compares layouts by memory and time, and needs --flops"),
        (["--suggest", "--cards", "1x24GB", *RATES], "error: no layout of --cards 1x24GB with 32 rows"),
        (["--cards", "8"], "error: argument --cards: expected a number of cards and the memory of each, as 8x24GB"),
        (["--cards", "0x24GB"], "error: argument --cards: expected a number of cards"),
        (["--cards", "1x24GB", "--data-group-size", "2"], "error: --cards 1x24GB: the layout has 2 ranks"),
        (
            ["--activation-checkpointing", "some"],
            "error: argument --activation-checkpointing: expected none, full or selective, got 'some'",
        ),
        (["--optimizer", "8bit-adam", "--tensor-group-size", "2"], "error: 8-bit optimizer state and --tensor-group"),
        (["--dp-mode", "sharded-parameters", "--pipeline-group-size", "2"], "error: --dp-mode sharded-parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_flags_are_one_line_and_status_2(capsys, config_file, flags, message):
    status, output, error = command(capsys, "--model-name", config_file, *flags)
    assert (status, output) == (2, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_missing_model_is_one_line(capsys, tmp_path):
    status, _, error = command(capsys, "--model-name", tmp_path / "none")
    assert status == 2
    assert error.startswith("error: cannot read ")
    assert error.count("\n") == 1


def test_the_head_is_balanced_by_operations(capsys, config_file):
    flags = ["--pipeline-group-size", 8, "--balance", "auto", "--batch-size", 8, "--micro-batch-size", 1]
    _, output, _ = command(capsys, "--model-name", config_file, *flags)
    head = work.head_cost(planned(NEOX_20B))
    assert head == pytest.approx(6 * 50432 * 6144 / (4 * (2 * 12 * 6144**2 + 2 * 2048 * 6144)))
    layers = balanced_layers(44, stages=8, head=head)
    counts = [last - first for first, last in layers]
    described = [f"{len(list(g))} x {n}" for n, g in itertools.groupby(counts)]
    assert f"layers of stages: {', '.join(d.removeprefix('1 x ') for d in described)}\n" in output
