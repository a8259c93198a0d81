"""The model as an ASE calculator.

In: `ase.Atoms`, charge and multiplicity in `atoms.info`. Out: energy and free energy in eV, forces
(N, 3) in eV/Å, stress (6,) in eV/Å³, in ASE's signs and Voigt order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    BaseCalculator,
    Calculator,
    PropertyNotImplementedError,
    all_changes,
)
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite.checkpoints import load_model
from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.errors import WAYS, InputError, check_kind
from allscaip_lite.kernels import choose
from allscaip_lite.kernels.cuda_graphs import RecordedModel
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP, Result, check_number_type, without_weight_grad
from allscaip_lite.structures import structures_from_atoms


def check_calculator(calculator: object) -> None:
    """Raise TypeError for what is no calculator of ASE, such as a model."""
    check_kind(calculator, BaseCalculator, "a calculator, such as AllScAIPCalculator(model)")


class AllScAIPCalculator(Calculator):
    """ASE calculator of a model, or of the name or path of one.

    `device` defaults to the model's own, or for a name to a CUDA GPU where there is one, else the
    CPU. The model that is given stays as it is, in training mode or not: the calculator's own
    `model` is a copy on the same weights that takes no gradients of them (on a copy of them, where
    `device` or `dtype` ask for another place). Results are kept until positions, cell, elements,
    charge or multiplicity change; after a change of the weights, call `reset()`.

    `atoms.get_potential_energies()` gives each atom's share of the energy, which is arbitrary: only
    the sum means anything (see `AllScAIP.atomic_energies`).

    `kernels` chooses how the model computes, see the table of `allscaip_lite.kernels`; the results
    are the same. "auto" takes what is fastest on the device: on a CPU kernels in C, where there is
    a C compiler (the first call on a machine compiles them, in a second or two); on a CUDA GPU a
    step that is recorded and repeated, once a composition has been asked for several times.

    `outside_training` says what happens where a structure has something that the model did not see
    in training (elements, charges, sizes, distances, …, see `model.seen`): "warn", once a kind and
    formula, "error" (`StructureError`) or "ignore".

    Raises `KernelError` where `kernels="c"` cannot be compiled, and where
    `kernels="cuda-graphs"` cannot record a step, `StructureError` for structures the model cannot
    answer for, and ASE's `PropertyNotImplementedError` for a stress that does not exist: of a
    structure without periodic directions, or of a model with a head for direct forces.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]

    def __init__(
        self,
        model: AllScAIP | str | Path = "lite",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernels: str = "auto",
        outside_training: str = "warn",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if outside_training not in WAYS:
            raise InputError(f"outside_training {outside_training!r}: one of {', '.join(WAYS)}")
        check_number_type(dtype)
        self.outside_training = outside_training
        if not isinstance(model, AllScAIP):
            device = usable_device(device)
            model = load_model(model, kernels="plain")
        self.model = without_weight_grad(model).to(device=device, dtype=dtype).eval()
        self.model.operations = choose(kernels, self.model.device, self.model.dtype)
        self.recorded = None
        if self.model.device.type == "cuda" and kernels in ("auto", "cuda-graphs"):
            self.recorded = RecordedModel(self.model, patient=kernels == "auto")

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last call, of all that the model reads: ASE's own way takes longer
        and leaves out charge and multiplicity in `atoms.info`.
        """
        if not isinstance(atoms, Atoms):
            raise InputError("no structure: give an ase.Atoms, as in atoms.calc = calculator")
        last = self.atoms
        if last is None:
            return [*all_changes, "charge", "spin"]
        stated = zip(("charge", "spin"), stated_charge_and_spin(atoms), self.stated, strict=True)
        changes = [name for name, now, before in stated if now != before]
        for name, old, new in (
            ("positions", last.positions, atoms.positions),
            ("numbers", last.numbers, atoms.numbers),
            ("cell", last.cell.array, atoms.cell.array),
            ("pbc", last.pbc, atoms.pbc),
        ):
            same = old.shape == new.shape
            if not same or not (np.abs(np.subtract(old, new, dtype=float)) <= tol).all():
                changes.append(name)  # also where there is no number
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        if not isinstance(self.atoms if atoms is None else atoms, Atoms):
            raise InputError("no structure: give an ase.Atoms, as in atoms.calc = calculator")
        super().calculate(atoms, properties, system_changes)
        atoms = cast(Atoms, self.atoms)  # a copy, which ASE compares with the next one
        self.stated = stated_charge_and_spin(atoms)
        has_stress = self.model.config.conservative and self.model.config.stress
        if "stress" in (properties or ()):
            if not has_stress:
                raise PropertyNotImplementedError(
                    "this model gives no stress: it needs conservative forces and stress=True"
                )
            if not atoms.pbc.any() or atoms.cell.rank < 3:
                raise PropertyNotImplementedError(
                    "no stress: the structure is not periodic, or its cell has no volume; "
                    "set atoms.cell and atoms.pbc"
                )
        result = self.answer(atoms)
        self.results = {
            "energy": result.energy,
            "free_energy": result.energy,
            "forces": result.forces,
        }
        if "energies" in (properties or ()):  # on request, for it takes a pass of its own
            structures = structures_from_atoms(atoms, torch.float64, assumed={})
            self.results["energies"] = self.model.atomic_energies(structures).cpu().numpy()
        if result.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(result.stress)

    def answer(self, atoms: Atoms) -> Result:
        """What the model gives, computed anew."""
        return self.model.predict(atoms, self.recorded, self.outside_training)
