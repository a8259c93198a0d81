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

import warnings
from pathlib import Path

import torch
from ase import Atoms
from torch import Tensor
from torch_sim.models.interface import ModelInterface
from torch_sim.state import SimState

from allscaip_lite.applicability import warn_outside
from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.errors import StructureError, StructureWarning
from allscaip_lite.model import AllScAIP
from allscaip_lite.structures import (
    LARGEST_SPREAD,
    Structures,
    in_own_numbers,
    structures_from_atoms,
)


class TorchSimModel(ModelInterface):
    """torch-sim's view of a model, or of the name or path of one.

    `device` and `model` as for `AllScAIPCalculator`, on whose weights it runs. `charge` and
    `multiplicity` hold for every structure, unless a state carries its own (`charge` and `spin`, a
    number a structure), which torch-sim 0.3 does not read from `atoms.info`. Without them, charge 0
    and the lowest multiplicity that the electrons allow are assumed, with a warning the first time.
    Structures are compared with what training saw when they first come, as by `AllScAIPCalculator`
    with `outside_training`. Integrators keep positions in `dtype`; the model computes in its own.

    Raises `StructureError` for what the model cannot answer for, such as positions that are not
    finite, or a multiplicity that the electrons of a structure forbid.
    """

    def __init__(
        self,
        model: AllScAIP | str | Path = "lite",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
        charge: int | None = None,
        multiplicity: int | None = None,
        outside_training: str = "warn",
    ) -> None:
        super().__init__()
        self.model = AllScAIPCalculator(model, device, outside_training=outside_training).model
        given = Atoms(info={"charge": charge, "spin": multiplicity})
        self.charge, self.multiplicity = stated_charge_and_spin(given, "TorchSimModel")
        self.outside_training, self._said = outside_training, set[str]()
        self._known: list[Tensor] = []  # what of the last state was checked, and its
        self._charge_and_spin: list[Tensor] = []  # (B,) each
        self._device, self._dtype = self.model.device, dtype
        self._compute_forces = True
        self._compute_stress = self.model.config.conservative and self.model.config.stress
        self._memory_scales_with = "n_atoms"  # the number of edges an atom is bounded

    @in_own_numbers
    def forward(self, state: SimState, **_: object) -> dict[str, Tensor]:
        """Energy, forces and, for a conservative model, stress (0 of what is not periodic)."""
        numbers, system = state.atomic_numbers, state.system_idx
        cell = state.cell.transpose(1, 2)  # rows are lattice vectors here, columns there
        count = len(cell)
        natoms = torch.bincount(system, minlength=count)
        structures = Structures(
            positions=state.positions,
            atomic_numbers=numbers,
            cell=cell,
            pbc=torch.as_tensor(state.pbc, device=cell.device).expand(count, 3),
            charge=natoms,  # until they are read
            spin=natoms,
            natoms=natoms,
        )
        stated = [getattr(state, name, None) for name in ("charge", "spin")]
        known = [numbers, system, *(value for value in stated if value is not None)]
        # integrators keep the structures; looking at each takes time
        new = len(known) != len(self._known) or not all(map(torch.equal, known, self._known))
        centered = structures.centered()
        near = bool((centered.positions.abs() <= LARGEST_SPREAD).all())  # no NaN is
        if new or not near:
            self._charge_and_spin = self._checked(structures, *stated)
        if not near and not centered.positions.isfinite().all():
            raise StructureError("a periodic structure has a lattice vector of zeros: complete it")
        charge, spin = self._charge_and_spin
        centered = centered.replace(charge=charge, spin=spin)
        if new:
            warn_outside(self.model.seen, centered, self.outside_training, self._said)
            self._known = [value.clone() for value in known]
        with torch.no_grad():
            energy, forces, stress = self.model(centered, create_graph=False)
        found = {"energy": energy, "forces": forces}
        if self._compute_stress:
            found["stress"] = forces.new_zeros(count, 3, 3) if stress is None else stress
        return {name: value.detach().to(self._dtype) for name, value in found.items()}

    def _checked(
        self, structures: Structures, charges: Tensor | None, spins: Tensor | None
    ) -> list[Tensor]:
        """(B,) charges and multiplicities: the state's own, those given, or charge 0 and the lowest
        multiplicity. Raises `StructureError` for what the model cannot answer for.
        """
        if charges is None and self.charge is None and not self._known:
            warnings.warn(
                "no charge is given for torch-sim's structures, whose states carry none: charge 0 "
                "and, without a multiplicity, the lowest are assumed for all of them. Give "
                "TorchSimModel(..., charge=, multiplicity=)",
                StructureWarning,
                stacklevel=4,
            )
        batch = [
            Atoms(
                one.atomic_numbers.numpy(),
                one.positions.numpy(),
                cell=one.cell[0].numpy(),
                pbc=one.pbc[0].numpy(),
                info={
                    "charge": self.charge if charges is None else charges.view(-1)[index],
                    "spin": self.multiplicity if spins is None else spins.view(-1)[index],
                },
            )
            for index, one in enumerate(structures.each())
        ]
        limit = self.model.config.max_num_elements
        read = structures_from_atoms(batch, torch.float64, max_num_elements=limit, assumed={})
        return [value.to(structures.natoms) for value in (read.charge, read.spin)]
