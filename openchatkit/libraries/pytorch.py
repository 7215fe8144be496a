"""Parts of torch that are private, change between releases or exist on some devices alone: products, pipelining.

Each function looks for its operator. Where that is missing, or refuses this processor, plain code gives the same result
more slowly.
"""

import contextlib
import functools
import inspect
import os
import platform
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Elements. The 8-bit operator reads whole vectors, beyond the end of a row that is not a multiple of them.
_VECTOR = 32


def can_pack(dtype: torch.dtype) -> bool:
    """Whether weights of `dtype` can be packed as oneDNN reads them fastest.

    Packed weights are faster on x86, if the processor computes in `dtype`.
    """
    return (
        dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return x -> x @ weight.T + bias over a packed copy of `weight`; over `weight` itself where it cannot be packed.

    The results are the same up to the order of additions.
    """
    if can_pack(weight.dtype):
        try:
            # 1 is the number of rows to lay out for; many rows are no slower for it.
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        except RuntimeError:  # an operator of another signature, or a processor that it does not know
            pass
    return lambda x: functional.linear(x, weight, bias)


def multiply_int8(x: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """Return (x @ steps.T) * scale: x bfloat16 [rows, in], steps int8 [out, in], scale bfloat16 [out].

    Made for few rows, up to about 16 on a CPU; for more rows, widened weights are faster.
    """
    operator = getattr(torch, "_weight_int8pack_mm", None)
    if operator is not None and x.device.type == "cpu" and x.shape[1] % _VECTOR == 0:
        return operator(x.contiguous(), steps, scale)
    return (functional.linear(x, steps.to(x.dtype)) * scale).to(x.dtype)


# A number is written with digits of base 126, from -63 to 63: FBGEMM's unsigned 8 bits, moved by 64. Two products of a
# digit and a step of at most 127 then fit into the 16 bits in which processors without better instructions add them.
_BASE, _LARGEST_DIGIT, _MIDDLE = torch.tensor(126.0), torch.tensor(63.0), 64
_FBGEMM = "fbgemm"


def pack_int8(steps: Tensor, scale: Tensor, *, digits: int) -> Callable[[Tensor], Tensor] | None:
    """Return x -> (x @ steps.T) * scale over a packed copy of `steps`; None where FBGEMM's product is missing.

    `steps` is int8 [out, in] from -127 to 127, `scale` [out], x float32 [rows, in], the result float32 [rows, out]. x
    is rounded to `digits` digits: by at most its row's largest |x| / 126^digits. Digits and steps are multiplied and
    added as integers, without error, so that no row depends on the others.
    """
    if not can_pack_int8():
        return None
    packed = _pack_steps(steps, scale.double() / _LARGEST_DIGIT)

    def multiply(x: Tensor) -> Tensor:
        # Small operators cost as much as the product of one row, so there are few. Rows of zeros, and of infinities and
        # NaN, become what they must by the last product.
        largest = x.abs().amax(1, keepdim=True)
        rest = x * (_LARGEST_DIGIT / largest)
        rows = [rest]
        for _ in range(digits - 1):
            rest = (rest - rest.round()).mul_(_BASE)  # what rounding leaves, in the same range
            rows.append(rest)
        *parts, result = _multiply_digits(torch.cat(rows), packed).chunk(digits)
        for part in reversed(parts):
            result = torch.add(part, result, alpha=1 / 126)
        return result.mul_(largest)

    return multiply


def _pack_steps(steps: Tensor, scale: Tensor) -> Any:
    with packing_int8():
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        whole = torch._make_per_channel_quantized_tensor(steps.contiguous(), scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(whole, None)


@contextlib.contextmanager
def packing_int8() -> Iterator[None]:
    """Let torch pack for FBGEMM: which library does is a setting of the process, and what it has packed remembers it.

    Threads that call `pack_int8` need one of these around all of them: else one would put back the setting that
    another still needs.
    """
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, _FBGEMM
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _multiply_digits(digits: Tensor, packed: Any) -> Tensor:
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return operator(digits, 1.0, _MIDDLE, packed)  # rounds to the nearest, and to even


@functools.cache
def can_pack_int8() -> bool:
    """Whether FBGEMM multiplies digits by 8-bit weights on this processor, the largest of both without error."""
    steps, digits = torch.full((8, 64), 127, dtype=torch.int8), torch.tensor([[-63.0], [63.0]]).expand(2, 64)
    try:
        if _FBGEMM not in torch.backends.quantized.supported_engines:
            return False
        with warnings.catch_warnings():
            # Torch means to give up its quantised tensors, and says so once a process.
            warnings.simplefilter("ignore")
            got = _multiply_digits(digits, _pack_steps(steps, torch.ones(8)))
    except (AttributeError, RuntimeError, TypeError):  # missing, or of another signature
        return False
    return torch.equal(got, digits @ steps.float().T)


@functools.cache
def widens_products(device: torch.device) -> bool:
    """Whether `device` can write the product of two float16 or bfloat16 matrices in float32: CUDA, since torch 2.8."""
    half = torch.zeros(8, 8, dtype=torch.float16, device=device)
    try:
        mm_in_float32(half, half)
    except (TypeError, RuntimeError):  # no such argument, or no such kernel for this device
        return False
    return True


def mm_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return the float32 product of two matrices of half precision, where `widens_products` is true."""
    return torch.mm(left, right, out_dtype=torch.float32)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of main memory on `device`, without a wait for what a GPU still has to do.

    Only from page-locked memory does a copy queue up behind that work while this thread goes on.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def attend_to_segments(
    query: Tensor, key: Tensor, value: Tensor, *, borders: Tensor, longest: int, before: int = -1
) -> Tensor:
    """Return causal attention within each segment of a sequence, [tokens, heads, head_dim] as all three given.

    Segment i is tokens borders[i] to borders[i + 1] - 1: int32 [segments + 1]. None is longer than `longest`. A
    token sees itself and at most `before` tokens before it, -1 for all. For devices and dtypes that
    `attends_documents` knows.
    """
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(query, key, value, borders, borders, longest, longest, window_size=(before, 0))
    assert isinstance(mixed, Tensor), type(mixed)
    return mixed


@functools.cache
def attends_documents(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend_to_segments` works here, and backward through it: found out by two segments of one token."""
    borders = torch.arange(3, dtype=torch.int32, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        tokens = torch.zeros(2, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
        try:
            attend_to_segments(tokens, tokens, tokens, borders=borders, longest=1).sum().backward()  # type: ignore[no-untyped-call]
        except (ImportError, TypeError, NotImplementedError, RuntimeError):  # an older torch, or no such kernel
            return False
    return True


def tensors_without_memory() -> contextlib.AbstractContextManager[Any] | None:
    """Return a context whose tensors have shapes and no content, on whatever device; None where torch has none."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        return None
    return FakeTensorMode()


def make_block_mask(
    is_seen: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    rows: int | None,
    heads: int | None,
    length: int,
    reach: int,
    device: torch.device,
) -> Any:
    """Return what `attend_to_blocks` takes for a mask: `is_seen` of row, head, query and key, as tensors of numbers.

    None for rows or heads: all are alike.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(is_seen, rows, heads, length, reach, device=device)


def attend_to_blocks(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    """Attend over [batch, heads, length, head_dim] to what a mask of `make_block_mask` shows; the same shape.

    Blocks of pairs of which none is seen are not computed, where `attends_to_blocks`; elsewhere it is slow, and has no
    backward.
    """
    mixed = _flex_attention(query.device.type)(query, key, value, block_mask=block_mask)
    assert isinstance(mixed, Tensor), type(mixed)
    return mixed


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled, it forms all scores, which a CPU is faster at than at compiling.
    chosen: Any = torch.compile(flex_attention) if device_type == "cuda" else flex_attention
    return chosen


@functools.cache
def attends_to_blocks(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend_to_blocks` has a kernel here, and for its backward: found out on a GPU, where torch may."""
    if device.type != "cuda":
        return False
    try:
        mask = make_block_mask(lambda _, __, q, k: q >= k, rows=None, heads=None, length=256, reach=256, device=device)
        with torch.inference_mode(False), torch.enable_grad():
            tokens = torch.zeros(1, 1, 256, head_dim, dtype=dtype, device=device, requires_grad=True)
            attend_to_blocks(tokens, tokens, tokens, mask).sum().backward()  # type: ignore[no-untyped-call]
    except Exception:  # compilers of several libraries, which fail in ways of their own; a mask does without them
        return False
    return True


def connect_gloo_on_first_use() -> None:
    """Let gloo connect two ranks when one first sends to the other, in process groups that are made from now on.

    Otherwise each rank of a group connects with all others: as many open files as ranks, for every group. An older
    torch takes no notice; the environment's own choice stays.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def runs_v_schedules() -> bool:
    """Whether torch's V-shaped pipeline schedules work on gloo, as they do since those that can put off receiving."""
    from torch.distributed.pipelining import ScheduleZBVZeroBubble

    return "defer_pp_recv" in inspect.signature(ScheduleZBVZeroBubble.__init__).parameters


@contextlib.contextmanager
def forward_only(schedule: Any) -> Iterator[None]:
    """Let a pipeline schedule's list of actions hold forward passes alone, for an evaluation.

    torch 2.13 goes through the backward passes too, in which nothing is to be done, but fails between two stages of one
    rank: there is no gradient to hand on. A schedule of one stage a rank has no list, and does without.
    """
    name, forward = "pipeline_order_with_comms", {"F", "SEND_F", "RECV_F"}
    everything = getattr(schedule, name, None)
    if everything is None:
        yield
        return
    shortened = {
        rank: [action for action in actions if action is None or action.computation_type.value in forward]
        for rank, actions in everything.items()
    }
    setattr(schedule, name, shortened)
    try:
        yield
    finally:
        setattr(schedule, name, everything)


def keeps_gradients_in_float32() -> bool:
    """Whether a parameter of half precision can have a gradient in float32."""
    return hasattr(torch.Tensor, "grad_dtype")


def keep_gradient_in_float32(parameter: Tensor) -> None:
    """Let autograd cast a parameter's gradients to float32 and add them up there, if `keeps_gradients_in_float32`."""
    parameter.grad_dtype = torch.float32  # type: ignore[attr-defined, unused-ignore]


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype that a parameter's gradient has: the parameter's, but for `keep_gradient_in_float32`."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def scale_gradients_in_step(optimizer: torch.optim.Optimizer, factor: float) -> bool:
    """Let the optimizer's step multiply gradients by `factor` in its own pass over them; False if it cannot.

    Fused optimizers can, by what torch's GradScaler gives them: the inverse, as a float32 tensor.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), None)
    scale = None if factor == 1.0 else torch.full((), 1 / factor, dtype=torch.float32, device=device)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    return True


@functools.lru_cache(maxsize=64)
def list_pipeline_actions(
    torch_class: str, ranks: int, micro_batches: int, stages_a_rank: int
) -> list[list[tuple[str, int, int]]] | None:
    """Return each rank's passes by one of torch's schedules that take lists of stages: kind, stage, micro-batch.

    Kinds are F (forward), B (backward), and where backward is split I (of inputs) and W (of weights). The schedule is
    made of stages that can do nothing. It keeps its list in a public attribute whose entries have private names; None
    where either is missing.
    """
    from torch.distributed import pipelining

    stages: Any = [
        types.SimpleNamespace(
            group_rank=0, group_size=ranks, num_stages=ranks * stages_a_rank, stage_index=number * ranks, submod=None
        )
        for number in range(stages_a_rank)
    ]
    try:
        order = getattr(pipelining, torch_class)(stages, micro_batches).pipeline_order
        return [
            [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in order[rank] if a is not None]
            for rank in range(ranks)
        ]
    except (AttributeError, TypeError):
        return None
