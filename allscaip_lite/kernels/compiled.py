"""Sums over pairs of edges, norm and GELU in C, compiled on the user's machine, on a CPU.

In and out: what the functions of the same names in `operations` and `attention` take and give.
PyTorch's own operators work on padded tables, which they write and read many times; `kernels.c`
keeps what belongs to one atom in the nearest cache. Everything can be differentiated twice, so that
it serves in training on forces. What the kernels are not made for (another device or number type,
dropout) is left to the plain formulas.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from allscaip_lite import attention, operations
from allscaip_lite.attention import Neighborhoods
from allscaip_lite.errors import KernelError
from allscaip_lite.graph import Graph
from allscaip_lite.kernels.elementwise import RMSNormDerivative

SOURCE = Path(__file__).with_name("kernels.c")
# sums in any order, products and sums at once, no traps: what fast registers need; not -ffast-math,
# which, where a library is linked with it, changes the arithmetic of the whole process
FLAGS = (
    "-O3 -march=native -std=c11 -fPIC -shared -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math -ffinite-math-only"
).split()
TYPES = {torch.float32: "float", torch.float64: "double"}


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/allscaip-lite`, or below `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "allscaip-lite"


@functools.cache
def load_kernels(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for numbers of `dtype`, compiled if they are not in the cache, in seconds.

    Raises `KernelError` without a C compiler, or where it fails.
    """
    if dtype not in TYPES:
        raise KernelError(f"the kernels in C take float32 and float64, not {dtype}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    if not compiler:
        raise KernelError(
            'kernels="c" needs a C compiler: install gcc or clang (on Debian and Ubuntu: '
            'apt install gcc), or ask for kernels="auto"'
        )
    command = [*compiler.split(), *FLAGS, f"-DREAL={TYPES[dtype]}"]
    # -march=native makes another file on another processor
    machine = f"{platform.machine()} {_processor()} {shutil.which(command[0])}"
    key = hashlib.sha256("\0".join([SOURCE.read_text(), machine, *command]).encode())
    library = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    _keep_to_user(library)
    if not library.exists():
        _compile(command, library)
    return ctypes.CDLL(str(library))


def _keep_to_user(library: Path) -> None:
    """Take the right to write the library from others; what they may have written is removed.

    Raises `KernelError` where the folder is somebody else's.
    """
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (library.parent, library):
        if not path.exists() or not hasattr(os, "getuid"):
            continue
        found = path.stat()
        if found.st_uid not in (os.getuid(), 0):
            raise KernelError(
                f"{path} is another user's, whose code would run here: set XDG_CACHE_HOME to a "
                'folder of your own, or ask for kernels="torch"'
            )
        if found.st_mode & 0o022:
            library.unlink(missing_ok=True)
            if path.exists():
                path.chmod(found.st_mode & 0o755)


def _processor() -> str:
    """What the compiler may use of this processor."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = information.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [*command, "-o", str(made), str(SOURCE), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise KernelError(f'kernels="c": {command[0]} does not run: {error}') from error
        if done.returncode:
            raise KernelError(
                f'kernels="c": {command[0]} failed; set CC to another compiler, or ask for '
                f'kernels="auto"; it said:\n{done.stderr.strip()[-2000:]}'
            )
        made.chmod(0o755)
        made.replace(library)  # at once, so that no other process sees half a file


class _Rows(ctypes.Structure):
    """`Rows` of kernels.c."""

    _fields_ = (
        ("heads", ctypes.c_int),
        ("size", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("width", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("log_weight", ctypes.c_void_p),
        ("direction", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Rows:
    """The edges of a graph row by row, without empty slots: E = M = N + 2P of them.

    slots (E,): the slot of each edge among N·K; first (N+1,): where each row begins; source,
    destination (E,): the state of each edge in either layout; log_weight (E,) and direction (E, 3),
    which both layouts share.
    """

    graph: Graph
    degree: int
    slots: Tensor
    first: Tensor
    source: Tensor
    destination: Tensor
    log_weight: Tensor
    direction: Tensor

    @classmethod
    def make(cls, graph: Graph, degree: int) -> Rows:
        occupied = torch.arange(graph.num_slots) < graph.counts.unsqueeze(1)  # (N, K)
        slots = occupied.flatten().nonzero().squeeze(1)  # (E,)
        place = torch.empty(occupied.numel(), dtype=torch.long)
        place[slots] = torch.arange(len(slots))

        def states(slot: Tensor) -> Tensor:
            """(E,): the state of each edge, of a layout that puts them into these slots."""
            return torch.empty_like(slots).scatter(0, place[slot], torch.arange(len(slots)))

        return cls(
            graph=graph,
            degree=degree,
            slots=slots,
            first=torch.cat([graph.counts.new_zeros(1), graph.counts.cumsum(0)]),
            source=states(graph.source_slot),
            destination=states(graph.destination_slot),
            log_weight=graph.log_weight.flatten()[slots],
            direction=graph.slot_directions.flatten(0, 1)[slots],
        )

    @functools.cached_property
    def plain(self) -> Neighborhoods:
        """What the plain formulas read."""
        return Neighborhoods.make(self.graph, self.degree)


def neighborhoods(graph: Graph, degree: int) -> Rows | Neighborhoods:
    """The rows of a graph, or what the plain formulas read where these serve: of padded graphs too,
    some of whose states are no edges.
    """
    log_weight = graph.log_weight
    if _serves(log_weight) and bool(log_weight.flatten()[graph.source_slot].isfinite().all()):
        return Rows.make(graph, degree)
    return Neighborhoods.make(graph, degree)


def _serves(x: Tensor) -> bool:
    """Whether the kernels are made for a tensor like this one."""
    return x.device.type == "cpu" and x.dtype in TYPES


def neighborhood_attention(
    qkv: Tensor,
    neighborhoods: Rows | Neighborhoods,
    layout: str,
    groups: list[slice],
    num_heads: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """`attention.neighborhood_attention`: (M, 3H) → (M, H); weights only where it serves itself."""
    if dropout or isinstance(neighborhoods, Neighborhoods):
        plain = neighborhoods if isinstance(neighborhoods, Neighborhoods) else neighborhoods.plain
        return attention.neighborhood_attention(qkv, plain, layout, groups, num_heads, dropout)
    rows, widths = neighborhoods, [group.stop - group.start for group in groups]
    state = getattr(rows, layout)
    # made contiguous out here, where the derivative of doing so is known
    qkv = qkv.contiguous()
    shape = (rows, state, widths, num_heads)
    return _Attention.apply(qkv, rows.log_weight, rows.direction, *shape), None


def pair_sums(neighborhoods: Rows | Neighborhoods, weights: Tensor, degree: int) -> Tensor:
    """`attention.pair_sums`: (N, K) → (N, degree)."""
    if isinstance(neighborhoods, Neighborhoods):
        return attention.pair_sums(neighborhoods, weights, degree)
    weights = weights.flatten()[neighborhoods.slots].contiguous()
    return _PairSums.apply(weights, neighborhoods.direction, neighborhoods, degree)


def _call(
    function: Callable[..., int],
    rows: Rows,
    state: Tensor,
    log_weight: Tensor,
    direction: Tensor,
    heads: int,
    widths: list[int],
    *arguments: Tensor | int,
) -> None:
    """Call a kernel for all rows, on as many threads as PyTorch may use."""
    width = (ctypes.c_int * len(widths))(*widths)
    tensors = (rows.first, state, log_weight, direction)
    assert all(x.is_contiguous() for x in (*tensors, *arguments) if isinstance(x, Tensor))
    n = len(rows.first) - 1
    about = _Rows(
        heads,
        sum(widths),
        len(widths),
        ctypes.addressof(width),
        *(tensor.data_ptr() for tensor in tensors),
    )
    _share(function, n, *arguments, before=(ctypes.byref(about),))


def _share(
    function: Callable[..., int],
    n: int,
    *arguments: Tensor | float,
    before: tuple[Any, ...] = (),
) -> None:
    """Call a kernel for n rows or numbers, a part of them on each thread PyTorch may use."""
    passed = [
        ctypes.c_void_p(x.data_ptr())
        if isinstance(x, Tensor)
        else ctypes.c_double(x)
        if isinstance(x, float)
        else ctypes.c_int(x)
        for x in arguments
    ]

    def part(begin: int, end: int) -> int:
        return function(*before, ctypes.c_int(begin), ctypes.c_int(end), *passed)

    threads = max(1, min(torch.get_num_threads(), n))
    if threads == 1:
        failed = part(0, n)
    else:  # ctypes lets go of the interpreter while C runs
        cuts = [n * t // threads for t in range(threads + 1)]
        failed = any(_pool(threads).map(part, cuts[:-1], cuts[1:]))
    if failed:
        raise MemoryError("the compiled kernels found no memory for one atom's edges")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # the threads of a pool do not follow into a forked process
    os.register_at_fork(after_in_child=_pool.cache_clear)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        log_weight: Tensor,
        direction: Tensor,
        rows: Rows,
        state: Tensor,
        widths: list[int],
        num_heads: int,
    ) -> Tensor:
        mixed = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        ctx.save_for_backward(qkv, log_weight, direction)
        ctx.shape = (rows, state, num_heads, widths)
        kernel = load_kernels(qkv.dtype).attention_forward
        _call(kernel, rows, state, log_weight, direction, num_heads, widths, qkv, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        derivatives = _AttentionDerivative.apply(gradient, *ctx.saved_tensors, *ctx.shape)
        return *derivatives, None, None, None, None


class _AttentionDerivative(torch.autograd.Function):
    """What `_Attention` gives back, itself differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        qkv: Tensor,
        log_weight: Tensor,
        direction: Tensor,
        rows: Rows,
        state: Tensor,
        num_heads: int,
        widths: list[int],
    ) -> tuple[Tensor, ...]:
        gradient = gradient.contiguous()
        ctx.save_for_backward(gradient, qkv, log_weight, direction)
        ctx.shape = (rows, state, num_heads, widths)
        results = tuple(torch.empty_like(x) for x in (qkv, log_weight, direction))
        kernel = load_kernels(qkv.dtype).attention_backward
        about = (rows, state, log_weight, direction, num_heads, widths)
        _call(kernel, *about, qkv, gradient, *results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Tensor) -> tuple[Tensor | None, ...]:
        gradient, qkv, log_weight, direction = ctx.saved_tensors
        rows, state, num_heads, widths = ctx.shape
        results = [torch.empty_like(x) for x in (qkv, gradient, log_weight, direction)]
        kernel = load_kernels(qkv.dtype).attention_twice
        about = (rows, state, log_weight, direction, num_heads, widths)
        _call(kernel, *about, qkv, gradient, *(x.contiguous() for x in changes), *results)
        d_qkv, d_gradient, d_log_weight, d_direction = results
        return d_gradient, d_qkv, d_log_weight, d_direction, None, None, None, None


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, direction: Tensor, rows: Rows, degree: int) -> Tensor:
        sums = weight.new_empty(len(rows.first) - 1, degree)
        ctx.save_for_backward(weight, direction)
        ctx.shape = (rows, degree)
        kernel = load_kernels(weight.dtype).order_forward
        _call(kernel, rows, rows.source, weight, direction, 1, [1], degree, weight, sums)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        derivatives = _PairSumsDerivative.apply(gradient, *ctx.saved_tensors, *ctx.shape)
        return *derivatives, None, None


class _PairSumsDerivative(torch.autograd.Function):
    """What `_PairSums` gives back, itself differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, weight: Tensor, direction: Tensor, rows: Rows, degree: int
    ) -> tuple[Tensor, ...]:
        gradient = gradient.contiguous()
        ctx.save_for_backward(gradient, weight, direction)
        ctx.shape = (rows, degree)
        results = torch.empty_like(weight), torch.empty_like(direction)
        kernel = load_kernels(weight.dtype).order_backward
        about = (rows, rows.source, weight, direction, 1, [1], degree)
        _call(kernel, *about, weight, gradient, *results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight, direction = ctx.saved_tensors
        rows, degree = ctx.shape
        results = [torch.empty_like(x) for x in (gradient, weight, direction)]
        kernel = load_kernels(weight.dtype).order_twice
        about = (rows, rows.source, weight, direction, 1, [1], degree)
        _call(kernel, *about, weight, gradient, *(x.contiguous() for x in changes), *results)
        return *results, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(R, a), (a,) → (R, a): x / rms(x) · w."""
    if not _serves(x):
        return operations.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x.contiguous(), weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = torch.empty_like(x), x.new_empty(len(x), 1)
        kernel = load_kernels(x.dtype).norm_forward
        _share(kernel, len(x), x.shape[1], float(eps), x, weight, normed, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1]
        return *_RMSNormDerivative.apply(gradient, *ctx.saved_tensors, asked), None


class _RMSNormDerivative(RMSNormDerivative):
    """What `_RMSNorm` gives back; its own derivative is that of the other form."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, asked: bool
    ) -> tuple[Tensor, Tensor | None]:
        gradient, d_x = gradient.contiguous(), torch.empty_like(x)
        ctx.save_for_backward(gradient, x, weight, inverse)
        kernel = load_kernels(x.dtype).norm_backward
        _share(kernel, len(x), x.shape[1], gradient, x, weight, inverse, d_x)
        return d_x, (gradient * x * inverse).sum(0) if asked else None


def gelu(x: Tensor) -> Tensor:
    """`F.gelu`, any shape."""
    return _GELU.apply(x.contiguous()) if _serves(x) else F.gelu(x)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result = torch.empty_like(x)
        _share(load_kernels(x.dtype).gelu_forward, x.numel(), x, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _GELUDerivative.apply(gradient, *ctx.saved_tensors)


class _GELUDerivative(torch.autograd.Function):
    """What `_GELU` gives back, itself differentiable, once."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        gradient, d_x = gradient.contiguous(), torch.empty_like(x)
        ctx.save_for_backward(gradient, x)
        _share(load_kernels(x.dtype).gelu_backward, x.numel(), gradient, x, d_x)
        return d_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        change, d_gradient, d_x = change.contiguous(), torch.empty_like(x), torch.empty_like(x)
        kernel = load_kernels(x.dtype).gelu_twice
        _share(kernel, x.numel(), change, gradient, x, d_gradient, d_x)
        return d_gradient, d_x
