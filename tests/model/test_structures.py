"""From atoms to tensors: what comes out, and every structure that is refused, with its message."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from conftest import state

from allscaip_lite import (
    AllScAIP,
    AllScAIPConfig,
    StructureError,
    structures_from_atoms,
)
from allscaip_lite.electrons import charge_and_spin
from allscaip_lite.errors import StructureWarning
from allscaip_lite.graph import build_graph
from allscaip_lite.neighbors import candidate_pairs
from allscaip_lite.structures import say_cells_not_used

# --- what comes out -----------------------------------------------------------------------------


def test_a_batch_of_a_molecule_and_a_crystal() -> None:
    water = state(molecule("H2O"), charge=1, spin=2)
    salt = state(bulk("NaCl", "rocksalt", a=5.6))
    salt.positions += 3  # all atoms within a cell of the cell
    batch = structures_from_atoms([water, salt])
    assert len(batch) == 2
    assert batch.natoms.tolist() == [3, 2] and batch.system.tolist() == [0, 0, 0, 1, 1]
    assert batch.atomic_numbers.tolist() == [8, 1, 1, 11, 17]
    assert batch.charge.tolist() == [1, 0] and batch.spin.tolist() == [2, 1]
    assert batch.pbc.tolist() == [[False] * 3, [True] * 3]
    assert batch.positions.dtype == batch.cell.dtype == torch.float32
    assert batch.charge.dtype == batch.spin.dtype == batch.atomic_numbers.dtype == torch.int64
    np.testing.assert_allclose(batch.cell[1], salt.cell.array, rtol=1e-6)
    np.testing.assert_allclose(batch.positions[3:], salt.positions, rtol=1e-6)
    centred = water.positions - water.positions.mean(0)
    np.testing.assert_allclose(batch.positions[:3], centred, atol=1e-6)


def test_far_from_the_origin_nothing_is_lost() -> None:
    near, far = state(molecule("CH4")), state(molecule("CH4"))
    far.positions += 1e5
    a, b = structures_from_atoms(near).positions, structures_from_atoms(far).positions
    assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize(("a", "vacuum"), [(1, None), (2, None), (3, 12.0)])
def test_unwrapped_periodic_atoms_lose_nothing_in_float32(a: int, vacuum: float | None) -> None:
    """Distances between nearest images, a thousand cells away and a surface high above."""
    atoms = state(bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (a, 1, 1))
    if vacuum is not None:
        atoms.center(vacuum, axis=2)
        atoms.pbc = True, True, False
    near, far = atoms.copy(), atoms.copy()
    cells = np.random.default_rng(1).integers(-1000, 1000, (len(atoms), 3)) * atoms.pbc
    far.positions += cells @ atoms.cell.array + 1e6 * ~atoms.pbc
    found = [structures_from_atoms(x).positions.double().numpy() for x in (near, far)]
    moved = found[1] - found[0]
    shift = np.linalg.solve(atoms.cell.array.T, (moved - moved[0]).T).T
    assert np.abs(shift - shift.round()).max() < 2e-7
    assert np.abs(found[1]).max() < 2.1 * np.abs(atoms.cell.array).max()


def test_an_atom_that_just_left_the_cell_stays() -> None:
    """So a list of near pairs keeps its images from one step of dynamics to the next."""
    atoms = state(bulk("NaCl", "rocksalt", a=5.6, cubic=True))
    atoms.positions[0] -= 0.1
    assert torch.equal(
        structures_from_atoms(atoms, torch.float64).positions, torch.tensor(atoms.positions)
    )


def test_atoms_are_left_as_they_are() -> None:
    atoms = state(bulk("MgO", "rocksalt", a=4.2))
    positions, cell = atoms.positions.copy(), atoms.cell.array.copy()
    batch = structures_from_atoms(atoms, torch.float64)
    batch.positions.add_(1)
    batch.cell.add_(1)
    np.testing.assert_array_equal(atoms.positions, positions)
    np.testing.assert_array_equal(atoms.cell.array, cell)


def test_to_casts_positions_and_cell_alone() -> None:
    batch = structures_from_atoms(state(molecule("H2O")), torch.float64)
    cast = batch.to(dtype=torch.float32)
    assert cast.positions.dtype == cast.cell.dtype == torch.float32
    assert cast.charge.dtype == torch.int64 and cast.pbc.dtype == torch.bool
    assert batch.to("cpu").positions.dtype == torch.float64


def test_a_periodic_cell_is_completed() -> None:
    """The missing lattice vectors of a wire stand across it, so that the cell can be inverted."""
    wire = state(Atoms("He", cell=[(3.0, 0, 0), (0, 0, 0), (0, 0, 0)], pbc=(True, False, False)))
    cell = structures_from_atoms(wire, torch.float64).cell[0]
    assert torch.equal(cell[0], torch.tensor([3.0, 0, 0]).double())
    assert torch.linalg.det(cell).abs() == pytest.approx(3.0)


# --- charge and multiplicity ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "info", "expected"),
    [
        ("H2O", {}, (0, 1)),
        ("OH", {}, (0, 2)),
        ("OH", {"charge": -1}, (-1, 1)),
        ("H2O", {"charge": 1}, (1, 2)),
        ("O2", {"spin": 3}, (0, 3)),
        ("O2", {"charge": 0, "spin": 1}, (0, 1)),
        ("O2", {"charge": 0, "spin": 0}, (0, 1)),  # 0 says: not given
        ("OH", {"charge": None, "total_charge": -1}, (-1, 1)),
        ("OH", {"charge": float("nan"), "spin": "none"}, (0, 2)),
        ("OH", {"Total Charge": "-1", "spin-multiplicity": " 3 "}, (-1, 3)),
        ("OH", {"charge": np.array([-1.0]), "spin": [1]}, (-1, 1)),
        ("OH", {"charge": torch.tensor([[-1]]), "mult": np.array([None])}, (-1, 1)),
        ("OH", {"charge": -1, "net_charge": -1.0}, (-1, 1)),
        ("H2O", {"charge": np.int64(2), "spin": 3.0}, (2, 3)),
        ("H2O", {"charge": np.array(1), "spin": "2"}, (1, 2)),
        ("O2", {"total_charge": 1, "multiplicity": 4}, (1, 4)),
        ("O2", {"charge": -0.9999, "total_charge": -1, "mult": 2}, (-1, 2)),
    ],
)
def test_charge_and_lowest_multiplicity(name: str, info: dict, expected: tuple) -> None:
    atoms = molecule(name)
    atoms.info = info
    found = charge_and_spin(atoms)
    assert found == expected
    assert all(type(number) is int for number in found)


def test_names_that_contradict_each_other_are_refused() -> None:
    atoms = molecule("OH", info={"charge": -1, "total_charge": 1})
    with pytest.raises(
        StructureError, match=r'"charge"\] = -1 and .*"total_charge"\] = 1 contradict'
    ):
        structures_from_atoms(atoms)


def said(warned: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in warned]


def test_what_is_assumed_is_said_once_a_case_and_formula() -> None:
    batch = [molecule(name) for name in ("OH", "H2O", "NH3", "OH")]
    batch.append(molecule("NH3", info={"charge": 1}))
    with pytest.warns(StructureWarning) as warned:
        structures_from_atoms(batch)
    first, second, third = said(list(warned))
    assert first.startswith("HO: no charge and no multiplicity in atoms.info: charge +0, mult")
    assert "charge +0, multiplicity 2 are assumed" in first
    assert second.startswith("H2O, H3N: no charge and no multiplicity")
    assert third.startswith("H3N: no multiplicity in atoms.info: charge +1, multiplicity 2 are")
    model = AllScAIP(AllScAIPConfig(hidden_size=32, num_heads=1, num_layers=1))
    for names, count in (("OH", 1), ("OH", 0), ("H2O", 1), ("OH", 0)):
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            model.predict(molecule(names))
        assert len(again) == count, names


def test_initial_charges_and_moments_that_contradict_are_mentioned() -> None:
    oxygen = molecule("O2")  # with ASE's magnetic moments of a triplet
    with pytest.warns(
        StructureWarning, match=r"O2 \(whose .*moments say multiplicity 3\): no charge"
    ):
        structures_from_atoms(oxygen)
    ion = molecule("OH", info={"spin": 2})
    ion.set_initial_charges([-1.2, 0.2])
    with pytest.warns(StructureWarning, match=r"\(whose initial charges add up to -1\): no charge"):
        structures_from_atoms(ion)
    ion.info["charge"] = 1
    words = r"^HO \(whose initial charges add up to -1\): charge \+1, multiplicity .* stated, and"
    ion.info["spin"] = 1
    with pytest.warns(StructureWarning, match=words):
        structures_from_atoms(ion)


@pytest.mark.parametrize("name", ["total_spin", "S", "2S", "q", "qtot", "total_magnetization"])
def test_a_name_whose_meaning_is_not_certain_is_mentioned(name: str) -> None:
    atoms = molecule("H2O", info={name: 0.5, "mulliken_charges": [0.1, 0.2, -0.3], "pbcs": 1})
    words = rf'^H2O \(whose info\["{name}"\] = 0.5 is not read\): no charge'
    with pytest.warns(StructureWarning, match=words):
        structures_from_atoms(atoms)


def test_nothing_is_said_when_nothing_is_assumed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oxygen = state(molecule("O2"), spin=1)  # against ASE's moments, as it is told
        structures_from_atoms([state(molecule("OH"), spin=2), oxygen])


@pytest.mark.parametrize(
    ("name", "charge", "spin", "message"),
    [
        ("H2O", 0, 2, r'structure 0 \(H2O\).*"spin"\] = 2 .*10 electrons \(charge \+0\).*is 1'),
        ("H2O", 1, 1, r"9 electrons \(charge \+1\) do not allow it; the lowest they allow is 2"),
        ("H2", 0, 5, "2 electrons"),  # of the right parity, but more unpaired than there are
        ("CH4", 0, -1, r"multiplicity -1 is outside 1 \.\. 100"),
        ("CH4", 0, 101, r"multiplicity 101 is outside"),
        ("H2", 3, 1, r"charge \+3 leaves fewer than no electrons"),
        ("CH4", -101, 2, "charge -101 is outside ±100"),
        ("CH4", 0.5, 1, r'"charge"\] = 0.5 is not a whole number'),
        ("CH4", 0, 1.5, r'"spin"\] = 1.5 is not a whole number'),
        ("CH4", "plus", 1, "'plus' is not a whole number"),
        ("CH4", [0, 1], 1, r"\[0, 1\] is not a whole number"),
        ("CH4", np.zeros(5), 1, "is not a whole number"),
        ("CH4", True, 1, "True is not a whole number"),
        ("CH4", {"value": 0}, 1, "is not a whole number"),
        ("CH4", b"0", 1, "is not a whole number"),
        ("CH4", "1e999", 1, "'1e999' is not a whole number"),
        ("CH4", float("inf"), 1, "inf is not a whole number"),
    ],
)
def test_impossible_charge_or_multiplicity(
    name: str, charge: object, spin: object, message: str
) -> None:
    with pytest.raises(StructureError, match=message):
        structures_from_atoms(state(molecule(name), charge, spin))


def test_the_proton_has_no_electron() -> None:
    batch = structures_from_atoms(state(Atoms("H"), charge=1, spin=1))
    assert batch.charge.tolist() == [1]


# --- geometry -----------------------------------------------------------------------------------


def misplaced(value: float, index: int) -> Atoms:
    atoms = state(molecule("CH4"))
    atoms.positions[index, 1] = value
    return atoms


def periodic(cell: object, pbc: object = True) -> Atoms:
    return state(Atoms("He2", [(0, 0, 0), (1, 1, 1)], cell=cell, pbc=pbc))


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms(), "structure 0.*has no atoms"),
        (state(Atoms("X")), "(X|0) is outside this model's table of elements, H to Es"),
        (state(Atoms([119])), "structure 0: 119 is outside this model's table of elements"),
        (state(Atoms([-1])), "structure 0: -1 is outside this model's table of elements"),
        (state(Atoms("He", [(1e15, 0, 0)])), "1e\\+15 Å from the origin"),
        (state(Atoms("Fm")), "Fm is outside this model's table of elements, H to Es"),
        (misplaced(float("nan"), 2), r"CH4.*positions of atoms \[2\] are not finite"),
        (misplaced(float("inf"), 0), r"positions of atoms \[0\] are not finite"),
        (periodic(None), "periodic along a lattice vector that is zero or flat"),
        (periodic([4.0, 4.0, 0.0]), "periodic along a lattice vector that is zero or flat"),
        (periodic([(4, 0, 0), (0, 4, 0), (4, 4, 0)]), "zero or flat: its cell is 0 Å thin"),
        (periodic([0.0, 4.0, 4.0], (True, False, False)), "zero or flat"),
        (periodic([4.0, 4.0, float("nan")]), "the cell is not finite"),
    ],
)
def test_impossible_geometry(atoms: Atoms, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        structures_from_atoms(atoms)


def test_atomic_numbers_are_whole_whatever_holds_them() -> None:
    atoms = state(molecule("H2O"))
    for kind in (float, object, np.uint8, ">i4"):
        atoms.arrays["numbers"] = np.array([8, 1, 1]).astype(kind)
        assert structures_from_atoms(atoms).atomic_numbers.tolist() == [8, 1, 1]
    atoms.arrays["numbers"] = np.array([8.5, 1, np.nan])
    with pytest.raises(StructureError, match=r"structure 0: 8.5, nan is outside this model's"):
        structures_from_atoms(atoms)


def test_a_wire_needs_its_own_lattice_vector_alone() -> None:
    assert len(structures_from_atoms(periodic([4.0, 0.0, 0.0], (True, False, False)))) == 1


def test_the_table_of_elements_is_the_models() -> None:
    fluoride = state(molecule("HF"))
    assert len(structures_from_atoms(fluoride, max_num_elements=10)) == 1
    with pytest.raises(StructureError, match="F is outside this model's table.*H to O"):
        structures_from_atoms(fluoride, max_num_elements=9)


def test_the_message_names_the_structure_of_a_batch() -> None:
    batch = [state(molecule("H2O")), state(molecule("CH4")), misplaced(float("nan"), 1)]
    with pytest.raises(StructureError, match=r"structure 2 \(CH4\)"):
        structures_from_atoms(batch)


def test_no_structures_and_no_atoms_objects() -> None:
    with pytest.raises(StructureError, match="no structures: give one ase.Atoms"):
        structures_from_atoms([])
    with pytest.raises(TypeError, match="structure 1 is a str"):
        structures_from_atoms([state(molecule("H2O")), "CH4"])


def test_structure_errors_are_value_errors() -> None:
    assert issubclass(StructureError, ValueError)


@pytest.mark.parametrize("case", ["dense", "cell list", "through the boundary"])
def test_two_atoms_on_one_spot(case: str, small_config: AllScAIPConfig) -> None:
    """Found with the neighbours, in each of the two searches, and across a periodic boundary."""
    if case == "through the boundary":
        atoms = Atoms("He3", [(0.1, 1, 1), (2, 2, 2), (4.1, 1, 5)], cell=[4, 4, 4], pbc=True)
    else:
        points = np.stack(np.meshgrid(*[np.arange(8.0)] * 3), -1).reshape(-1, 3)[:450]
        points = points[: 30 if case == "dense" else 450]
        atoms = Atoms("He3", np.vstack([[points[7]], points[:1], [points[7]]]))
        atoms += Atoms("He" * (len(points) - 8), points[8:])
    batch = structures_from_atoms(state(atoms))
    with pytest.raises(StructureError, match="^atoms 0 and 2 stand on one spot: move one"):
        build_graph(batch, small_config)
    long = state(Atoms("He40", np.arange(120.0).reshape(40, 3)))
    several = [long, *[state(molecule("CH4"))] * 50, state(atoms)]  # groups of different sizes
    words = rf"system 51 of a batch \(He{len(atoms)}\): atoms 0 and 2 stand on one spot"
    with pytest.raises(StructureError, match=words):
        AllScAIP(small_config).eval().predict(several)


@pytest.mark.parametrize(
    ("cell", "pbc", "complaint"),
    [
        ([0.01, 0.01, 0.01], True, "0.01 Å thin"),
        ([5.0, 5.0, 0.01], True, "0.01 Å thin"),
        ([0.05, 0.05, 0.02], True, "more neighbours within"),
        ([5.0, 5.0, 1e6], True, "1e\\+06 Å long"),
        ([5.0, 5.0, 1e6], [True, True, False], None),
    ],
)
def test_cells_that_would_fill_the_memory_are_refused(cell, pbc, complaint) -> None:
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=cell, pbc=pbc, info={"charge": 0, "spin": 1})
    if complaint is None:
        assert len(candidate_pairs(structures_from_atoms(atoms), 6.0)[0]) > 1
        return
    with pytest.raises(StructureError, match=complaint):
        candidate_pairs(structures_from_atoms(atoms), 6.0)


def test_a_molecule_far_away_changes_no_pairs() -> None:
    """A cell list of a long and thin box divided by zero, and ended the process."""
    near = Atoms("H450", 2.0 * np.indices((9, 10, 5)).reshape(3, -1).T)
    near.info = {"charge": 0, "spin": 1}
    alone = candidate_pairs(structures_from_atoms(near), 5.9)
    for distance in (30, 2e4):
        far = near + Atoms("H2", [[distance, 0, 0], [distance + 0.7, 0, 0]])
        far.info = near.info
        first, second, _ = candidate_pairs(structures_from_atoms(far, torch.float64), 5.9)
        pairs = {*zip(first.tolist(), second.tolist(), strict=True)} - {(450, 451)}
        assert pairs == {*zip(alone[0].tolist(), alone[1].tolist(), strict=True)}
    far.positions[450:] += 2e6
    with pytest.raises(StructureError, match="Å long"):
        structures_from_atoms(far)


@pytest.mark.parametrize(
    ("atoms", "touching"),
    [
        (bulk("NaCl", "rocksalt", 5.6), True),
        (bulk("Cu", cubic=True), True),
        (molecule("H2O", cell=[2.6, 2.6, 2.6]), True),
        (molecule("H2O", vacuum=3.0), False),
        (molecule("C6H6", vacuum=4.0), False),
        (molecule("H2O"), False),
        (Atoms("Na", cell=[0.1, 0.1, 0.1]), False),
    ],
)
def test_a_cell_that_is_full_and_not_periodic_is_said_once(atoms: Atoms, touching: bool) -> None:
    said: set[str] = set()
    for pbc, expected in ((True, 0), (False, touching), (False, 0)):
        atoms.pbc = pbc
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            say_cells_not_used([atoms], said)
        assert len(warned) == expected
