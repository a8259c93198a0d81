"""Faster forms of the operations of the model, with the same names and the same results.

In: the name of a set, a device and a number type. Out: `Operations` for `AllScAIP.operations`.

| name | what it is | where |
|---|---|---|
| `plain` | the formulas as the lessons write them | anywhere |
| `torch` | PyTorch with derivatives written by hand (`elementwise`, `fused_attention`) | anywhere |
| `c` | both attentions, distances, norm and GELU in C (`compiled`), the rest as `torch` | a CPU |
| `cuda-graphs` | `torch`, a whole step recorded and repeated (`cuda_graphs`) | a CUDA GPU |
| `auto` | a CPU: `c` if there is a C compiler, else `torch`; a GPU: `cuda-graphs` if it pays | |
"""

from __future__ import annotations

import argparse
import functools
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F

from allscaip_lite import attention
from allscaip_lite.errors import InputError, KernelError
from allscaip_lite.kernels import compiled, elementwise, fused_attention
from allscaip_lite.machine import (
    keep_freed_memory,
    processor_name,
    threads_for,
    usable_device,
)
from allscaip_lite.operations import PLAIN, Operations

KERNELS = ("auto", "plain", "torch", "c", "cuda-graphs")


def choose(
    kernels: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Operations:
    """The operations of a set for a device and a number type; see the table above.

    `cuda-graphs` records the operations of `torch`: what is recorded is a matter of the calculator
    and of training. Raises `InputError` for a name that is none or a set that the device cannot
    run, and `KernelError` where `c` is asked for by name and cannot be compiled. On a CPU the
    process keeps the memory that it frees from then on (`machine.keep_freed_memory`).
    """
    if kernels not in KERNELS:
        raise InputError(f"kernels={kernels!r} is not one of {', '.join(KERNELS)}")
    device = usable_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if kernels == "plain":
        return plain() if device.type == "cpu" else PLAIN
    if kernels == "c" and device.type != "cpu":
        raise InputError(f'kernels="c" runs on a CPU, not on {device}: ask for kernels="auto"')
    if kernels == "cuda-graphs" and device.type != "cuda":
        raise InputError(f'kernels="cuda-graphs" needs a CUDA GPU, not {device}: ask for "auto"')
    if kernels == "c" or (kernels == "auto" and device.type == "cpu" and dtype in compiled.TYPES):
        try:
            compiled.load_kernels(dtype)  # compiled now, not at the first step
            return in_c()
        except KernelError:
            if kernels == "c":
                raise
    return in_torch(device.type)


@functools.cache
def plain() -> Operations:
    """The formulas as they are written, with as many threads as pay on a CPU."""
    return replace(PLAIN, threads=threads_for)


@functools.cache
def in_torch(device_type: str) -> Operations:
    """PyTorch with derivatives by hand, for the CPU of this machine or for a GPU."""
    on_cpu = device_type == "cpu"
    by_onednn = on_cpu and "AMD" in processor_name() and elementwise.has_onednn()
    linear = elementwise.linear_by_onednn if by_onednn else F.linear
    twice = Operations(
        linear=linear,
        linear_of_parts=functools.partial(elementwise.linear_of_parts, linear=linear),
        rms_norm=elementwise.rms_norm if on_cpu else elementwise.native_rms_norm,
        gelu=elementwise.gelu,
        gaussian_basis=elementwise.gaussian_basis,
        soft_rank=elementwise.soft_rank,
        self_edge_attention=fused_attention.self_edge_attention,
        rotary_biases=functools.partial(attention.rotary_biases, bias=elementwise.rotary_bias),
        threads=threads_for if on_cpu else nullcontext,
    )
    return replace(
        twice,
        neighborhoods=fused_attention.PackedNeighborhoods.make,
        pair_sums=fused_attention.pair_sums,
        neighborhood_attention=fused_attention.neighborhood_attention,
        node_attention=fused_attention.node_attention,
        second_order=twice,
    )


@functools.cache
def in_c() -> Operations:
    """The kernels in C, and for the rest PyTorch with derivatives by hand."""
    kernels = replace(
        in_torch("cpu"),
        rms_norm=compiled.rms_norm,
        gelu=compiled.gelu,
        neighborhoods=compiled.neighborhoods,
        pair_sums=compiled.pair_sums,
        neighborhood_attention=compiled.neighborhood_attention,
    )
    twice = replace(kernels, node_attention=attention.node_attention, second_order=None)
    return replace(
        kernels,
        system_distances=compiled.system_distances,
        rotary_biases=compiled.rotary_biases,
        node_attention=compiled.node_attention,
        call_block=compiled.call_block,
        second_order=twice,
    )


def add_kernels_option(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """The option `--kernels` of a command."""
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default=default,
        help="how the model computes: the fastest way on the device (auto), the plain formulas, "
        "PyTorch with derivatives by hand, C (needs gcc or clang), or recorded steps on a GPU",
    )
