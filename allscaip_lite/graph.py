"""The bi-directional differentiable kNN graph (paper section 3.1).

In: `Structures`. Out: `Graph`: edges that fade out smoothly as they lose rank or reach the cutoff,
and the table of slots in which attention reads them.

An edge i→j exists with its reverse j→i: the soft maximum treats both ranks alike. So the edges
are kept as P pairs, first all forward, then all reversed, and *reversing* is swapping the two
halves. The states of the network stand in one flat list of M = N + 2P rows:

    [ N self-edges (the atoms) | P forward edges | P reversed edges ]

and attention reads them through a table of N rows with K slots. In the source layout, row i holds
the edges that leave i; in the destination layout, the edges that arrive at i. Slot s of the one is
the reverse of slot s of the other, so angles between slots and envelopes are shared by both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.neighbors import TIE, candidate_pairs, pair_vectors, places_in_rows, safe_norm
from allscaip_lite.structures import Structures

EXTRA_CANDIDATES = 20  # ranks count the k + 20 nearest
ABSENT = 1.9  # stands behind every value of what is there, in `places_in_rows`
SLOT_STEP = 4  # rows are as long as a multiple of this: small matrix products run best so


@dataclass(frozen=True)
class Graph:
    """Edges of a batch. M = N + 2P rows of states, K slots a row.

    source, target (2P,): atoms i and j of each edge; shift (2P, 3): the periodic image of j.
    distances (P,) Å and directions (P, 3), unit vectors from i to j, of the forward edges.
    log_weight (N, K): logarithm of the envelope, 0 for the self-edge, -inf for empty slots.
    slot_directions (N, K, 3): zero for self-edges and empty slots.
    source_slot, destination_slot (M,): where each state stands in the N·K slots of a layout.
    counts (N,): occupied slots of each row.
    """

    source: Tensor
    target: Tensor
    shift: Tensor
    distances: Tensor
    directions: Tensor
    log_weight: Tensor
    slot_directions: Tensor
    source_slot: Tensor
    destination_slot: Tensor
    counts: Tensor

    @property
    def num_atoms(self) -> int:
        return self.log_weight.shape[0]

    @property
    def num_slots(self) -> int:
        return self.log_weight.shape[1]

    @property
    def num_pairs(self) -> int:
        return self.distances.shape[0]

    def slot(self, layout: str) -> Tensor:
        """(M,) where each state stands in the `source` or the `destination` layout."""
        return self.source_slot if layout == "source" else self.destination_slot


def bump(x: Tensor) -> Tensor:
    """A smooth step: exactly 0 for x ≤ -4, ½ at 0, exactly 1 for x ≥ 4, any shape.

    With u = x/4, a = exp(-2/(1+u)) and b = exp(-2/(1-u)) it is a/(a+b), a logistic function of
    log a - log b = 4u/(1-u²). Beyond |u| = 0.999 that argument is past ±1998, where the logistic
    function is 0 or 1 to the last bit, so clamping there changes nothing.
    """
    u = (x / 4).clamp(-0.999, 0.999)
    return torch.sigmoid(4 * u / (1 - u * u))


def soft_rank(distances: Tensor, width: float, truncated: bool = True) -> Tensor:
    """How many candidates of the row are nearer, (N, C); a candidate counts ½ for itself.

    distances (N, C) Å, inf for empty candidates; the step that counts is `width` Å wide, a `bump`
    or, not truncated, a plain sigmoid.
    """
    step = bump if truncated else torch.sigmoid
    real = distances.isfinite()
    finite = torch.where(real, distances, torch.full_like(distances, 1e6))
    nearer = step((finite.unsqueeze(2) - finite.unsqueeze(1)) / width)  # (N, C, C)
    return torch.where(real, nearer.sum(2), torch.full_like(distances, torch.inf))


def hard_rank(distances: Tensor) -> Tensor:
    """(N, C) position of each candidate in its row, the nearest 0; no gradient, so jumps."""
    order = distances.detach().argsort(dim=1, stable=True)
    return order.argsort(dim=1).to(distances.dtype).masked_fill(distances.isinf(), torch.inf)


def soft_maximum(values: Tensor, temperature: float) -> Tensor:
    """Smooth maximum over the first dimension: τ·logsumexp(values/τ)."""
    return temperature * torch.logsumexp(values / temperature, dim=0)


def log_envelope(envelope: Tensor) -> Tensor:
    """Log w = -env²/(1 - env²): 0 at env = 0, falling smoothly to -inf at env = 1."""
    squared = envelope * envelope
    return -squared / (1 - squared)


def build_graph(
    structures: Structures, config: AllScAIPConfig, rank: Callable[..., Tensor] = soft_rank
) -> Graph:
    """Graph of a batch; differentiable in positions and cell.

    `rank` is `soft_rank`, or a faster form of it. Raises StructureError where two atoms stand on
    one spot.
    """
    n = len(structures.positions)
    first, second, shift = candidate_pairs(structures, config.reach)
    vectors = pair_vectors(structures, first, second, shift)  # (P, 3)
    distances = safe_norm(vectors)  # (P,)
    near = torch.ones_like(first, dtype=torch.bool)
    envelope, alive = pair_envelopes(first, second, distances, near, n, config, rank)

    chosen = alive.nonzero().squeeze(1)  # (P',)
    position = places_in_rows(torch.cat([first[chosen], second[chosen]]), envelope[chosen], n)
    longest = int(position.max()) + 1 if len(position) else 1
    num_slots = config.max_neighbors or -(-longest // SLOT_STEP) * SLOT_STEP
    if longest > num_slots:
        warnings.warn(
            f"max_neighbors = {num_slots} is fewer than the {longest} edges of the fullest row: "
            "the weakest edges are dropped, and the energy is no longer smooth",
            stacklevel=3,
        )
        chosen = chosen[(position < num_slots).view(2, -1).all(0)]
        position = places_in_rows(torch.cat([first[chosen], second[chosen]]), envelope[chosen], n)

    first, second, shift = first[chosen], second[chosen], shift[chosen]
    edge_slot = torch.cat([first, second]) * num_slots + position  # (2P',)
    distances, directions = distances[chosen], vectors[chosen] / distances[chosen].unsqueeze(1)
    pairs = (first, second, shift, distances, directions, log_envelope(envelope[chosen]))
    return in_slots(pairs, edge_slot, n, num_slots)


def pair_envelopes(
    first: Tensor,
    second: Tensor,
    distances: Tensor,
    near: Tensor,
    n: int,
    config: AllScAIPConfig,
    rank: Callable[..., Tensor] = soft_rank,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The envelope of each candidate pair (P,), and which of the pairs are edges, (P,) bool.

    Args:
        first: one atom of each pair, (P,).
        second: the other, (P,).
        distances: (P,) Å.
        near: which of the pairs count at all, (P,) bool.
        n: how many atoms there are.
        config: has cutoff, k, and how edges are ranked.
        rank: `soft_rank`, or a faster form of it.
        width: candidates of an atom, itself included, that are ranked; where it is not given the
            k + 20 nearest, and those as far as the last.
    """
    # Every pair is a candidate of both its atoms: a table (N, C) of distances, nearest first.
    rows = torch.cat([first, second])  # (2P,)
    order = torch.where(near, distances.double() / config.reach, ABSENT)
    position = places_in_rows(rows, order, n)
    kept = near.repeat(2)
    if width is not None:
        kept = kept & (position < width)
    else:
        if config.truncated_rank:
            kept = _first_candidates(rows, position, distances, config.k + EXTRA_CANDIDATES, n)
        width = 1 + (int(position[kept].max()) if len(rows) else 0)
    listed = kept.view(2, -1).all(0)  # pairs that both atoms count among their nearest
    # place in the table, slot 0 being the atom itself; what has no place goes to the very last one
    entry = torch.where(kept, rows * width + position, n * width)
    table = distances.new_full((n * width + 1,), torch.inf)
    table = table.index_fill(0, torch.arange(n, device=rows.device) * width, 0.0)
    value = torch.where(kept, distances.repeat(2), torch.inf)
    table = table.scatter(0, entry, value)[:-1].view(n, width)
    if not config.soft_rank:
        ranks = hard_rank(table)
    elif config.truncated_rank:
        ranks = rank(table, config.rank_width)
    else:
        ranks = soft_rank(table, config.rank_width, truncated=False)

    # Ranks and distance of each pair over their limits; the largest of the three decides.
    of_pair = ranks.flatten().gather(0, torch.where(listed.repeat(2), entry, 0)).view(2, -1)
    limits = torch.cat([of_pair / config.k, distances.unsqueeze(0) / config.cutoff])  # (3, P)
    smooth = soft_maximum(limits, config.envelope_temperature)
    envelope = smooth if config.soft_rank else limits.amax(0)
    return envelope, listed & (envelope < 1)


def _first_candidates(
    rows: Tensor, position: Tensor, distances: Tensor, width: int, n: int
) -> Tensor:
    """(2P,) bool: places 1 .. width - 1 of each row, and what is as far as the last of them.

    Atoms of a perfect crystal stand at equal distances; cutting through them would let the order of
    the atoms decide.
    """
    last = torch.where(position == width - 1, distances.detach().repeat(2), 0.0)
    last = last.new_zeros(n).index_add(0, rows, last)  # one entry a row, 0 of a shorter row
    return (position < width) | (distances.repeat(2) < last[rows] + TIE)


def in_slots(pairs: tuple[Tensor, ...], edge_slot: Tensor, n: int, num_slots: int) -> Graph:
    """The graph of n atoms from P pairs.

    Args:
        pairs: their atoms (twice), shifts, distances, directions and log envelopes.
        edge_slot: the slot of each edge, of the forward ones first, (2P,); no two are the same.
        n: how many atoms.
        num_slots: of a row.
    """
    first, second, shift, distances, directions, pair_weight = pairs
    self_slot = torch.arange(n, device=first.device) * num_slots
    log_weight = distances.new_full((n * num_slots,), -torch.inf)
    log_weight = log_weight.index_put((self_slot,), distances.new_zeros(()))
    log_weight = log_weight.index_put((edge_slot,), pair_weight.repeat(2)).view(n, num_slots)
    slot_directions = distances.new_zeros(n * num_slots, 3)
    slot_directions = slot_directions.index_put((edge_slot,), torch.cat([directions, -directions]))
    return Graph(
        source=torch.cat([first, second]),
        target=torch.cat([second, first]),
        shift=torch.cat([shift, -shift]),
        distances=distances,
        directions=directions,
        log_weight=log_weight,
        slot_directions=slot_directions.view(n, num_slots, 3),
        source_slot=torch.cat([self_slot, edge_slot]),
        destination_slot=torch.cat([self_slot, *edge_slot.view(2, -1).flip(0)]),
        counts=log_weight.isfinite().sum(1),
    )
