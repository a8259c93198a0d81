"""Both attentions, sums over pairs of edges, norm and GELU in C, compiled on the user's machine.

In and out: what the functions of the same names in `operations` and `attention` take and give, on a
CPU. PyTorch's own operators work on padded tables, which they write and read many times;
`kernels.c` keeps what belongs to one atom in the nearest cache. Everything can be differentiated
twice, so that it serves in training on forces; node attention and distances once. What the kernels
are not made for (another device or number type, dropout) is left to the plain formulas.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from allscaip_lite import attention, neighbors, operations
from allscaip_lite.attention import Heads, Neighborhoods, SystemTable
from allscaip_lite.errors import KernelError
from allscaip_lite.files import sha256_of
from allscaip_lite.graph import Graph
from allscaip_lite.kernels import elementwise, fused_attention
from allscaip_lite.kernels.elementwise import RMSNormDerivative
from allscaip_lite.structures import Structures

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

    Where the cache is read-only, full or damaged, this process compiles its own. Raises
    `KernelError` without a C compiler, or where it fails.
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
    name = f"kernels-{key.hexdigest()[:16]}"
    try:
        return _compiled(command, cache_folder(), name)
    except OSError:
        try:
            with tempfile.TemporaryDirectory() as folder:
                return _compiled(command, Path(folder), name)
        except OSError as error:
            raise KernelError(
                f'kernels="c" cannot be kept or run here ({error}): set XDG_CACHE_HOME or TMPDIR '
                'to a folder of your own, or ask for kernels="torch"'
            ) from error


def _compiled(command: list[str], folder: Path, name: str) -> ctypes.CDLL:
    """The library `name`-CHECKSUM.so of a folder; it is made where none is there that is whole, for
    a damaged one would end the process, and that nobody else could write.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    open_to_others = _kept_to_user(folder)
    for library in folder.glob(f"{name}-*.so"):
        changed = _kept_to_user(library) or open_to_others
        if changed or library.stem != f"{name}-{sha256_of(library)[:16]}":
            library.unlink(missing_ok=True)
        else:
            return ctypes.CDLL(str(library))
    return ctypes.CDLL(str(_compile(command, folder, name)))


def _kept_to_user(path: Path) -> bool:
    """Take the right to write from others; whether they had it.

    Raises `KernelError` for what is somebody else's.
    """
    found = path.stat()
    if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
        raise KernelError(
            f"{path} is another user's, whose code would run here: set XDG_CACHE_HOME to a "
            'folder of your own, or ask for kernels="torch"'
        )
    if hasattr(os, "getuid") and found.st_mode & 0o022:
        path.chmod(found.st_mode & 0o755)
        return True
    return False


def _processor() -> str:
    """What the compiler may use of this processor."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = information.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str], folder: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        made = Path(partial) / name
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
        library = folder / f"{name}-{sha256_of(made)[:16]}.so"
        return made.replace(library)  # at once, so that no other process sees half a file


_C = {"int": ctypes.c_int, "long": ctypes.c_long, "double": ctypes.c_double, "*": ctypes.c_void_p}


def _fields(*lines: str) -> list[tuple[str, Any]]:
    """The fields of a structure of kernels.c, from lines of a type and names; * is any pointer."""
    return [(name, _C[kind]) for kind, *names in map(str.split, lines) for name in names]


class _Structure(ctypes.Structure):
    """A structure of kernels.c. Tensors are pointers in it, and live as long as it does."""

    def __init__(self, *values: Any) -> None:
        self.kept = values
        super().__init__(*(_pointer(x) if isinstance(x, Tensor) else x for x in values))


class _Rows(_Structure):
    _fields_ = _fields("int heads size groups", "* width first state log_weight direction")


class _Boxes(_Structure):
    _fields_ = _fields(
        "int systems", "long longest", "double tie", "* natoms periodic", "* lattice inverse"
    )


class _Systems(_Structure):
    _fields_ = _fields(
        "int heads size systems",
        "long longest intervals",
        "double per_length",
        "* first distance table",
    )


def _pointer(x: Tensor) -> int:
    assert x.is_contiguous()
    return x.data_ptr()


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
    qkv: Tensor, neighborhoods: Rows | Neighborhoods, layout: str, heads: Heads
) -> tuple[Tensor, Tensor | None]:
    """`attention.neighborhood_attention`: (M, 3H) → (M, H); weights only where it serves itself."""
    if heads.dropout or isinstance(neighborhoods, Neighborhoods):
        plain = neighborhoods if isinstance(neighborhoods, Neighborhoods) else neighborhoods.plain
        return attention.neighborhood_attention(qkv, plain, layout, heads)
    rows, widths = neighborhoods, [group.stop - group.start for group in heads.groups]
    call = _by_rows("attention", rows, layout, heads.number, widths)
    # made contiguous out here, where the derivative of doing so is known
    qkv = qkv.contiguous()
    shape = (len(qkv), qkv.shape[1] // 3)
    return _Kernel.apply(call, shape, qkv, rows.log_weight, rows.direction), None


def pair_sums(neighborhoods: Rows | Neighborhoods, weights: Tensor, degree: int) -> Tensor:
    """`attention.pair_sums`: (N, K) → (N, degree)."""
    if isinstance(neighborhoods, Neighborhoods):
        return attention.pair_sums(neighborhoods, weights, degree)
    rows = neighborhoods
    call = _by_rows("order", rows, "source", 1, [1], degree)
    weights = weights.flatten()[rows.slots].contiguous()
    return _Kernel.apply(call, (len(rows.first) - 1, degree), weights, rows.direction)


def gelu(x: Tensor) -> Tensor:
    """`F.gelu`, any shape."""
    return _Kernel.apply(_by_number, x.shape, x.contiguous()) if _serves(x) else F.gelu(x)


def _by_number(form: str, x: Tensor, *others: Tensor) -> None:
    """Call a form of GELU's kernel (forward, backward, twice)."""
    _run(f"gelu_{form}", x.numel(), None, x, *others)


def _by_rows(
    kernel: str, rows: Rows, layout: str, heads: int, widths: list[int], *numbers: int
) -> Callable[..., None]:
    """What calls a form of a kernel (forward, backward, twice) with tensors, for all rows."""
    width = torch.tensor(widths, dtype=torch.int32)
    tensors = (rows.first, getattr(rows, layout), rows.log_weight.detach(), rows.direction.detach())
    about = _Rows(heads, sum(widths), len(widths), width, *tensors)

    def call(form: str, *arguments: Tensor) -> None:
        _run(f"{kernel}_{form}", len(rows.first) - 1, about, *numbers, *arguments)

    return call


def _run(
    name: str, n: int, about: _Structure | None, *arguments: Tensor | float | list[Tensor]
) -> None:
    """Call a kernel for n rows or numbers, a part of them on each thread PyTorch may use.

    Of an argument that is a list each thread gets a tensor of its own, see `_threads`.
    """
    dtype = next(x.dtype for x in arguments if isinstance(x, Tensor))
    function = getattr(load_kernels(dtype), name)
    before = [] if about is None else [ctypes.byref(about)]

    def passed(x: Tensor | float | list[Tensor], thread: int) -> Any:
        if isinstance(x, list):
            x = x[thread]
        if isinstance(x, Tensor):
            return ctypes.c_void_p(_pointer(x))
        return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int(x)

    def part(thread: int) -> int:
        begin, end = n * thread // threads, n * (thread + 1) // threads
        own = [passed(x, thread) for x in arguments]
        return function(*before, ctypes.c_int(begin), ctypes.c_int(end), *own)

    threads = _threads(n)
    # ctypes lets go of the interpreter while C runs
    if part(0) if threads == 1 else any(_pool(threads).map(part, range(threads))):
        raise MemoryError("the compiled kernels found no memory for their tables")


def _threads(n: int) -> int:
    """How many threads share the work on n rows."""
    return max(1, min(torch.get_num_threads(), n))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # the threads of a pool do not follow into a forked process
    os.register_at_fork(after_in_child=_pool.cache_clear)


class _Kernel(torch.autograd.Function):
    """A kernel in three forms, twice differentiable: its value, derivative and second derivative.

    call: calls a form with the first input; the gradient; changes of the derivatives; results.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., None], shape: tuple[int, ...], *inputs: Tensor
    ) -> Tensor:
        result = inputs[0].new_empty(shape)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        call("forward", inputs[0], result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_KernelDerivative.apply(ctx.call, gradient, *ctx.saved_tensors)


class _KernelDerivative(torch.autograd.Function):
    """What `_Kernel` gives back, itself differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., None], gradient: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        gradient = gradient.contiguous()
        ctx.call = call
        ctx.save_for_backward(gradient, *inputs)
        results = tuple(map(torch.empty_like, inputs))
        call("backward", inputs[0], gradient, *results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *changes: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *inputs = ctx.saved_tensors
        results = [torch.empty_like(x) for x in (gradient, *inputs)]
        ctx.call("twice", inputs[0], gradient, *(x.contiguous() for x in changes), *results)
        return None, *results


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(R, a), (a,) → (R, a): x / rms(x) · w."""
    if not _serves(x):
        return operations.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x.contiguous(), weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = torch.empty_like(x), x.new_empty(len(x), 1)
        _run("norm_forward", len(x), None, x.shape[1], float(eps), x, weight, normed, inverse)
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
        _run("norm_backward", len(x), None, x.shape[1], gradient, x, weight, inverse, d_x)
        return d_x, (gradient * x * inverse).sum(0) if asked else None


# --- blocks -----------------------------------------------------------------------------------

KEPT = 2**30  # bytes of all blocks together that are kept for the derivative
KEPT_OF_STATES = 11  # times the states of a block: what its derivative needs


def call_block(block: Any, states: Tensor, *arguments: Any) -> Tensor:
    """`operations.call_block`; what takes more memory than `KEPT` is made again when it is needed.

    That happens to the first blocks. Their forward pass is then done twice.
    """
    _, index, record = arguments
    of_block = KEPT_OF_STATES * states.numel() * states.element_size()
    kept = max(0, KEPT // max(of_block, 1) - 1)  # besides the last, which is called in another way
    again = states.requires_grad and torch.is_grad_enabled() and record is None
    again = again and not block.dropout  # with which angles are made in between, once
    if not again or index >= block.config.num_layers - 1 - kept:
        return block(states, *arguments)
    return checkpoint(block, states, *arguments, use_reentrant=False, determinism_check="none")


# --- node attention ---------------------------------------------------------------------------

LANES = 4  # heads whose biases are read at once, as in kernels.c
FEWEST_INTERVALS = 128  # of the table in 1 Å
MOST_INTERVALS = 1024
TABLE_STEP = 32.0  # Å; tables reach as far as a multiple of it, so that they serve again
LONGEST_TABLE = 512.0  # Å
VALUE_ERROR = 1e-7  # of the largest value
SLOPE_ERROR = 5e-6  # of the steepest slope: what rounding a distance of 20 Å does to it


@dataclass(frozen=True)
class TabulatedBias:
    """ERoPE's bias of one block, as a function of the distance that is read where it is needed.

    distances (B, n, n) Å. table (intervals, heads / LANES rounded up, 4, LANES): coefficients of
    the cubic polynomials, 0 at the beginning of each interval and 1 at its end. plain: the bias as
    a tensor (B, h, n, n), and -inf at empty keys.
    """

    distances: Tensor
    table: Tensor
    per_length: float
    plain: Callable[[], Tensor]


def rotary_biases(
    distances: Tensor, weight: Tensor, frequencies: Tensor, empty: Tensor | None = None
) -> Sequence[TabulatedBias | Tensor]:
    """`attention.rotary_biases` by tables, one for each block, read by `node_attention`.

    In float32, where the weights need no derivatives: else as tensors.
    """

    def tensors() -> Sequence[Tensor]:
        bias = elementwise.rotary_bias
        return attention.rotary_biases(distances, weight, frequencies, empty, bias)

    def plain(block: int) -> Tensor:
        return tensors()[block]

    gradient = weight.requires_grad and torch.is_grad_enabled()
    if distances.device.type != "cpu" or distances.dtype != torch.float32 or gradient:
        return tensors()
    farthest = float(distances.detach().max())
    if not farthest < LONGEST_TABLE:
        return tensors()
    reach = TABLE_STEP * (farthest // TABLE_STEP + 1)
    exact = (x.detach().double().numpy() for x in (weight, frequencies))
    tables, per_length = _tables(reach, weight.shape, *(x.tobytes() for x in exact))
    if tables is None:
        return tensors()
    return [
        TabulatedBias(distances, table, per_length, functools.partial(plain, block))
        for block, table in enumerate(tables.unbind(0))
    ]


@functools.lru_cache(maxsize=8)
def _tables(
    reach: float, shape: tuple[int, int, int], weight: bytes, frequencies: bytes
) -> tuple[Tensor | None, float]:
    """Of all blocks, (L, intervals, sets, 4, LANES), and the intervals in 1 Å; float32 of float64.

    Cubic polynomials with the values and slopes of the bias at both ends of each interval, up to
    `reach` Å. The intervals are halved until the errors are below `VALUE_ERROR` and `SLOPE_ERROR`;
    None where they never are. weight (of that shape: blocks, heads, frequencies) and frequencies
    (1/Å) are bytes of float64.
    """
    mix = torch.from_numpy(np.frombuffer(weight).copy()).view(-1, shape[2])  # (L·h, F)
    omega = torch.from_numpy(np.frombuffer(frequencies).copy())
    per_length = FEWEST_INTERVALS
    while per_length <= MOST_INTERVALS:
        knots = torch.arange(int(reach * per_length) + 1, dtype=torch.float64) / per_length
        value, slope = elementwise.rotary_bias_and_slope(knots, mix, omega)  # (L·h, knots)
        slope /= per_length
        rise, left, right = value.diff(dim=1), slope[:, :-1], slope[:, 1:]
        cubic = [value[:, :-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise]
        near = True
        for t, order, most in ((0.5, 0, VALUE_ERROR), (0.211, 1, SLOPE_ERROR)):  # largest there
            exact = elementwise.rotary_bias_and_slope(knots[:-1] + t / per_length, mix, omega)[
                order
            ]
            powers = [1, t, t**2, t**3] if order == 0 else [0, 1, 2 * t, 3 * t**2]
            found = sum(c * power for c, power in zip(cubic, powers, strict=True))
            error = (found * per_length**order - exact).abs().amax(1)
            near = near and bool((error <= most * exact.abs().amax(1).clamp(min=1e-3)).all())
        if near:
            heads = -(-shape[1] // LANES) * LANES
            table = torch.zeros(shape[0], heads, len(knots) - 1, 4)
            table[:, : shape[1]] = torch.stack(cubic, dim=2).view(*shape[:2], -1, 4)
            table = table.view(shape[0], -1, LANES, len(knots) - 1, 4)
            return table.permute(0, 3, 1, 4, 2).contiguous(), float(per_length)
        per_length *= 2
    return None, 0.0


def node_attention(
    qkv: Tensor,
    bias: TabulatedBias | Tensor | None,
    systems: SystemTable,
    num_heads: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """`attention.node_attention`: (N, 3H) → (N, H); once differentiable with a table.

    Queries and keys are taken in tiles, and a logit's bias is read from the table by the distance:
    no matrix of biases, logits or weights is made.
    """
    if not isinstance(bias, TabulatedBias):
        return fused_attention.node_attention(qkv, bias, systems, num_heads, dropout)
    if dropout or not qkv.numel():
        return attention.node_attention(qkv, bias.plain(), systems, num_heads, dropout)
    batch, longest = systems.real.shape
    if systems.slot is None:
        first = torch.arange(batch + 1) * longest
    else:
        first = F.pad(torch.bincount(systems.slot // longest, minlength=batch).cumsum(0), (1, 0))
    distances, size = bias.distances.contiguous(), qkv.shape[1] // (3 * num_heads)
    table = (len(bias.table), bias.per_length, first, distances.detach(), bias.table)
    about = _Systems(num_heads, size, batch, longest, *table)
    return _NodeAttention.apply(qkv.contiguous(), distances, about), None


class _NodeAttention(torch.autograd.Function):
    """about: heads, and where the atoms of each system begin, their distances and the table."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, distances: Tensor, about: _Systems) -> Tensor:
        mixed = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        total = qkv.new_empty(len(qkv), about.heads)
        ctx.about = about
        ctx.save_for_backward(qkv, distances, mixed, total)
        _run("node_forward", len(qkv), about, qkv, mixed, total)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, distances, mixed, total = ctx.saved_tensors
        d_distances = torch.zeros_like(distances)  # of padding, nothing is written
        d_q = torch.empty_like(mixed)
        parts = [qkv.new_zeros(len(qkv), 2 * mixed.shape[1]) for _ in range(_threads(len(qkv)))]
        rest = (mixed, total, gradient.contiguous(), d_q, parts, d_distances)
        _run("node_backward", len(qkv), ctx.about, qkv, *rest)
        return torch.cat([d_q, sum(parts[1:], parts[0])], dim=1), d_distances, None


def system_distances(structures: Structures, positions: Tensor) -> Tensor:
    """`neighbors.system_distances`: (B, n, 3) → (B, n, n) Å; once differentiable."""
    if not _serves(positions):
        return neighbors.system_distances(structures, positions)
    lattice, inverse, operation = neighbors.reduced_cells(structures)
    boxes = (neighbors.TIE, structures.natoms, structures.pbc.long(), lattice, inverse)
    about = _Boxes(*positions.shape[:2], *boxes)
    return _Distances.apply(positions, structures.cell, about, operation)


class _Distances(torch.autograd.Function):
    """about: atoms, periodic directions, reduced lattices and their inverses; operation (B, 3, 3):
    what makes these lattices of the cells.
    """

    @staticmethod
    def forward(
        ctx: Any, positions: Tensor, cell: Tensor, about: _Boxes, operation: Tensor
    ) -> Tensor:
        x = positions.permute(2, 0, 1).contiguous()  # (3, B, n)
        ctx.save_for_backward(x, operation)
        ctx.about = about
        distances = x.new_zeros(*x.shape[1:], x.shape[2])
        _run("distance_forward", x[0].numel(), about, x, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, operation = ctx.saved_tensors
        d_positions = x.new_zeros(*x.shape[1:], 3, dtype=torch.float64)
        d_lattice = d_positions.new_zeros(*x.shape[1:], 3, 3)
        results = (d_positions, d_lattice)
        _run("distance_backward", x[0].numel(), ctx.about, x, gradient.contiguous(), *results)
        d_cell = operation.transpose(1, 2) @ d_lattice.sum(1)
        return d_positions.to(x.dtype), d_cell.to(x.dtype), None, None
