"""Many boxes at once: the model as torch-sim's `ModelInterface`.

In: torch-sim's state, a batch of structures on one device. Out: energy (B,) eV, forces (N, 3) eV/Å
and stress (B, 3, 3) eV/Å³ of all of them from one pass of the model. Where one small box leaves a
GPU idle, a hundred copies of it fill it:

    import torch_sim
    from allscaip_lite.md.torchsim import TorchSimModel

    final = torch_sim.integrate(
        system=boxes,  # ase.Atoms, any number
        model=TorchSimModel("lite", device="cuda"),
        integrator=torch_sim.Integrator.nvt_langevin,
        n_steps=10_000, temperature=300, timestep=0.0005,  # ps
    )

torch-sim: Cohen et al., arXiv:2508.06628.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch_sim.models.interface import ModelInterface
from torch_sim.state import SimState

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.model import AllScAIP
from allscaip_lite.structures import Structures


class TorchSimModel(ModelInterface):
    """torch-sim's view of a model, or of the name or path of one.

    `device` and `model` as for `AllScAIPCalculator`, on whose weights it runs. `charge` and
    `multiplicity` hold for every structure, since torch-sim's states carry neither; without a
    multiplicity each has the lowest that its electrons allow. Integrators keep positions in
    `dtype`; the model computes in its own.
    """

    def __init__(
        self,
        model: AllScAIP | str | Path = "lite",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
        charge: int = 0,
        multiplicity: int | None = None,
    ) -> None:
        super().__init__()
        self.model = AllScAIPCalculator(model, device).model
        self.charge, self.multiplicity = charge, multiplicity
        self._device, self._dtype = self.model.device, dtype
        self._compute_forces = True
        self._compute_stress = self.model.config.conservative and self.model.config.stress
        self._memory_scales_with = "n_atoms"  # the number of edges an atom is bounded

    def forward(self, state: SimState, **_: object) -> dict[str, Tensor]:
        """Energy, forces and, for a conservative model, stress (0 of what is not periodic)."""
        numbers, system = state.atomic_numbers, state.system_idx
        cell = state.cell.transpose(1, 2)  # rows are lattice vectors here, columns there
        count = len(cell)
        positions = state.positions
        pbc = torch.as_tensor(state.pbc, device=positions.device).expand(count, 3)
        natoms = torch.bincount(system, minlength=count)
        if not bool(pbc.any()):  # as in `structures_from_atoms`: nothing is lost far from 0
            center = positions.new_zeros(count, 3).index_add(0, system, positions)
            positions = positions - (center / natoms[:, None])[system]
        electrons = numbers.new_zeros(count).index_add(0, system, numbers) - self.charge
        spin = 1 + electrons % 2
        if self.multiplicity is not None:
            spin = torch.full_like(spin, self.multiplicity)
        structures = Structures(
            positions=positions,
            atomic_numbers=numbers,
            cell=cell,
            pbc=pbc,
            charge=torch.full_like(spin, self.charge),
            spin=spin,
            natoms=natoms,
        )
        with torch.no_grad():
            energy, forces, stress = self.model(structures, create_graph=False)
        found = {"energy": energy, "forces": forces}
        if self._compute_stress:
            found["stress"] = forces.new_zeros(count, 3, 3) if stress is None else stress
        return {name: value.detach().to(self._dtype) for name, value in found.items()}
