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
from torch import Tensor
from torch_sim.models.interface import ModelInterface
from torch_sim.state import SimState

from allscaip_lite.applicability import warn_outside
from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.errors import StructureError, StructureWarning
from allscaip_lite.model import AllScAIP
from allscaip_lite.structures import Structures


class TorchSimModel(ModelInterface):
    """torch-sim's view of a model, or of the name or path of one.

    `device` and `model` as for `AllScAIPCalculator`, on whose weights it runs. `charge` and
    `multiplicity` hold for every structure, unless a state carries its own (`charge` and `spin`, a
    number a structure), which torch-sim 0.3 does not read from `atoms.info`. Without them, charge 0
    and the lowest multiplicity that the electrons allow are assumed, with a warning the first time.
    Structures are compared with what training saw when they first come, as by `AllScAIPCalculator`
    with `outside_training`. Integrators keep positions in `dtype`; the model computes in its own.

    Raises `StructureError` for a multiplicity that the electrons of a structure forbid.
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
        self.model = AllScAIPCalculator(model, device).model
        self.charge, self.multiplicity = charge, multiplicity
        self.outside_training, self._said = outside_training, set[str]()
        self._known: tuple[Tensor, Tensor] | None = None  # atoms and systems that were compared
        self._device, self._dtype = self.model.device, dtype
        self._compute_forces = True
        self._compute_stress = self.model.config.conservative and self.model.config.stress
        self._memory_scales_with = "n_atoms"  # the number of edges an atom is bounded

    def forward(self, state: SimState, **_: object) -> dict[str, Tensor]:
        """Energy, forces and, for a conservative model, stress (0 of what is not periodic)."""
        numbers, system = state.atomic_numbers, state.system_idx
        cell = state.cell.transpose(1, 2)  # rows are lattice vectors here, columns there
        count = len(cell)
        pbc = torch.as_tensor(state.pbc, device=cell.device).expand(count, 3)
        natoms = torch.bincount(system, minlength=count)
        charge, spin = self._charge_and_spin(state, numbers, system, count)
        structures = Structures(
            positions=state.positions,
            atomic_numbers=numbers,
            cell=cell,
            pbc=pbc,
            charge=charge,
            spin=spin,
            natoms=natoms,
        ).centered()
        if self._known is None or not all(map(torch.equal, self._known, (numbers, system))):
            self._known = numbers, system  # integrators keep the structures; looking takes time
            warn_outside(self.model.seen, structures, self.outside_training, self._said)
        with torch.no_grad():
            energy, forces, stress = self.model(structures, create_graph=False)
        found = {"energy": energy, "forces": forces}
        if self._compute_stress:
            found["stress"] = forces.new_zeros(count, 3, 3) if stress is None else stress
        return {name: value.detach().to(self._dtype) for name, value in found.items()}

    def _charge_and_spin(
        self, state: SimState, numbers: Tensor, system: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """(B,) each: the state's own, those given, or charge 0 and the lowest multiplicity."""
        given = [getattr(state, "charge", None), getattr(state, "spin", None)]
        for index, value in enumerate((self.charge, self.multiplicity)):
            if given[index] is None and value is not None:
                given[index] = numbers.new_full((count,), value)
        if given[0] is None and self._known is None:
            warnings.warn(
                "no charge is given for torch-sim's structures, whose states carry none: charge 0 "
                "and, without a multiplicity, the lowest are assumed for all of them. Give "
                "TorchSimModel(..., charge=, multiplicity=)",
                StructureWarning,
                stacklevel=3,
            )
        charge = numbers.new_zeros(count) if given[0] is None else given[0].to(numbers).view(count)
        electrons = numbers.new_zeros(count).index_add(0, system, numbers) - charge
        lowest = 1 + electrons % 2
        if given[1] is None:
            return charge, lowest
        spin = given[1].to(numbers).view(count)
        spin = torch.where(spin == 0, lowest, spin)  # 0: not given
        impossible = ((spin - lowest) % 2 != 0) | (spin > electrons + 1) | (spin < 1)
        if bool(impossible.any()):
            index = int(impossible.nonzero()[0])
            raise StructureError(
                f"structure {index}: multiplicity {int(spin[index])} is not possible with "
                f"{int(electrons[index])} electrons (charge {int(charge[index]):+d}); the lowest "
                f"is {int(lowest[index])}"
            )
        return charge, spin
