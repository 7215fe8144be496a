"""Seams between parts (distributed/seams.py) over gloo: what they sum, what they leave alone, how often they run."""

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from openchatkit.distributed.seams import Enter, Leave

RANKS = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def value(rank):
    return torch.arange(6.0).view(2, 3) * (rank + 1) - 4


def run_both(rank):
    """Of each dtype: what both seams return and hand back, and their arguments afterwards."""
    enter, leave = Enter(dist.group.WORLD), Leave(dist.group.WORLD)
    found = {}
    for dtype in DTYPES:
        for name, seam in (("enter", enter), ("leave", leave)):
            x = value(rank).to(dtype).requires_grad_()
            y = seam(x)
            gradient = (value(rank) * 2).to(dtype)
            y.backward(gradient)
            found[f"{name} {dtype}"] = [y.detach(), x.grad, x.detach(), gradient]
    return found


def run_others(rank):
    """No gradients, a transposed tensor, recomputation, a frozen input, and the number of sums of each."""
    enter, leave = Enter(dist.group.WORLD), Leave(dist.group.WORLD)
    sums, all_reduce = [], dist.all_reduce

    def count(*args, **kwargs):
        sums.append(1)
        return all_reduce(*args, **kwargs)

    def add_up(function):
        before = len(sums)
        return [function(), torch.tensor(len(sums) - before)]

    def recompute(x, weight, *, after):
        def layer(x):
            y = (leave((enter(x) * weight).tanh()) if after else leave(enter(x) * weight)).sin()
            return y + x

        checkpoint(layer, x, use_reentrant=False).sum().backward()
        return x.grad

    dist.all_reduce = count
    weight = torch.tensor(0.1 * (rank + 1))
    shared, again = (torch.linspace(-1, 1, 4).requires_grad_() for _ in range(2))
    with torch.no_grad():
        plain = add_up(lambda: leave(enter(value(rank))))
    return {
        "no gradients": plain,
        "transposed": add_up(lambda: leave(value(rank).T)),
        "recomputed": add_up(lambda: recompute(shared, weight.clone().requires_grad_(), after=False)),
        "recomputed after": add_up(lambda: recompute(again, weight.clone().requires_grad_(), after=True)),
        "frozen": add_up(lambda: enter(value(rank))),
    }


def run_all(rank):
    return {"both": run_both(rank), "others": run_others(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return gloo_ranks.run(run_all, RANKS, tmp_path_factory.mktemp("seams"))


def test_what_seams_sum_and_leave_alone(found):
    values = [value(rank) for rank in range(RANKS)]
    total = sum(values)
    for rank, result in enumerate(found):
        own = values[rank]
        for dtype in DTYPES:
            entered, left = result["both"][f"enter {dtype}"], result["both"][f"leave {dtype}"]
            assert all(tensor.dtype == dtype for tensor in entered + left)
            # output, gradient of the input; then the arguments, which are as they were
            assert [t.tolist() for t in entered] == [t.tolist() for t in (own, 2 * total, own, 2 * own)]
            assert [t.tolist() for t in left] == [t.tolist() for t in (total, 2 * own, own, 2 * own)]
        others = result["others"]
        assert torch.equal(others["no gradients"][0], total)
        assert others["no gradients"][1] == 1
        assert torch.equal(others["transposed"][0], total.T)
        assert torch.equal(others["frozen"][0], own)
        assert others["frozen"][1] == 0


def test_recomputation_sums_again_only_what_backward_needs(found):
    weights = [0.1 * (rank + 1) for rank in range(RANKS)]
    for after, name in ((False, "recomputed"), (True, "recomputed after")):
        x = torch.linspace(-1, 1, 4).requires_grad_()
        pieces = [(x * weight).tanh() if after else x * weight for weight in weights]
        (sum(pieces).sin() + x).sum().backward()
        for result in found:
            gradient, sums = result["others"][name]
            assert torch.allclose(gradient, x.grad, rtol=1e-6, atol=0)
            # Forward, again for the argument of sin, and the gradient of the input.
            assert sums == 3
            assert torch.equal(gradient, found[0]["others"][name][0])
