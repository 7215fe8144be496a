"""`distributed/rendezvous.py`: many ranks meet with few open files; a problem of one is that of all."""

import multiprocessing
import resource
import socket
from datetime import timedelta

import gloo_ranks
import pytest

from openchatkit.errors import RESUMABLE, Interrupted, UserError

RANKS, OPEN_FILES = 80, 72
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "openchatkit.training.setup"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(rank, url, open_files, results):
    import torch

    from openchatkit.distributed import rendezvous
    from openchatkit.distributed.layout import make_layout

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    device, timeout = torch.device("cpu"), timedelta(seconds=300)
    rendezvous.connect(url, rank=rank, world_size=RANKS, device=device, timeout=timeout)
    layout = make_layout(rank=rank, replicas=10, pipeline_size=4, tensor_size=2, device=device, timeout=timeout)
    sums = []
    for add_up in (layout.sum_over_replicas, layout.sum_over_pipeline, layout.sum_over_parts):
        value = torch.tensor([float(rank)])
        add_up(value)
        sums.append(int(value))
    layout.gather(rank)
    gathered = layout.gather(rank)
    results.put((rank, sums, gathered == list(range(RANKS))))
    rendezvous.disconnect()


def share_of(rank):
    """The exit status that a problem of rank 1 ends a rank with, and whether its words say whose it is."""
    import torch

    from openchatkit.distributed import rendezvous

    with pytest.raises(UserError) as ended:
        rendezvous.share_problem(Interrupted("storage is busy") if rank == 1 else None, rank)
    words = f"rank 1 on {socket.gethostname()}: storage is busy"
    return torch.tensor([ended.value.exit_status, str(ended.value) == words])


def test_a_problem_of_one_rank_ends_all_with_its_words_and_status(tmp_path):
    assert [found.tolist() for found in gloo_ranks.run(share_of, 2, tmp_path)] == [[RESUMABLE, True]] * 2


@pytest.mark.long
def test_many_ranks_meet_with_few_open_files():
    """Fewer than there are ranks, though each has five process groups, two of them of all ranks."""
    results, url = _context.SimpleQueue(), f"tcp://127.0.0.1:{free_port()}"
    processes = []
    for rank in range(RANKS):
        # Rank 0 keeps the store, to which all others connect.
        open_files = OPEN_FILES + 2 * RANKS * (rank == 0)
        processes.append(_context.Process(target=meet, args=(rank, url, open_files, results)))
        processes[-1].start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0] * RANKS
    found = dict((rank, (sums, complete)) for rank, sums, complete in (results.get() for _ in range(RANKS)))
    for rank, (sums, complete) in found.items():
        replica, pipeline_rank, part = rank // 8, rank // 2 % 4, rank % 2
        assert sums == [
            sum(range(rank % 8, RANKS, 8)),
            sum(replica * 8 + stage * 2 + part for stage in range(4)),
            2 * (rank - part) + 1,
        ], (rank, pipeline_rank)
        assert complete
