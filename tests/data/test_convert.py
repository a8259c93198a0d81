"""One's own structures: what ASE reads goes in, what the package reads comes out."""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite import cli
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.data.checks import labels_under_any_name
from allscaip_lite.data.convert import convert
from allscaip_lite.data.reading import read_structure, read_structures
from allscaip_lite.electrons import charge_and_spin
from allscaip_lite.errors import DataError, InputError, StructureWarning

DATA = Path(__file__).parents[2] / "data"


def labelled(name: str, seed: int = 0, **info) -> Atoms:
    atoms = molecule(name)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    atoms.get_forces()
    atoms.info.update(info)
    return atoms


@pytest.mark.parametrize("suffix", ["extxyz", "traj", "db", "json"])
def test_formats_of_ase(tmp_path: Path, suffix: str) -> None:
    file, frames = tmp_path / f"mine.{suffix}", [labelled("H2O", seed) for seed in range(3)]
    ase.io.write(file, frames)
    found = list(convert([file], progress=False))
    assert len(found) == 3
    for atoms, original in zip(found, frames, strict=True):
        np.testing.assert_allclose(atoms.positions, original.positions, atol=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), original.get_forces(), atol=1e-6)
        assert atoms.get_potential_energy() == pytest.approx(original.get_potential_energy())
        assert (atoms.info["charge"], atoms.info["spin"]) == (0, 1)
        assert atoms.info["data_id"] == "mine"


def test_charge_and_multiplicity_are_read_given_or_the_lowest(tmp_path: Path) -> None:
    frames = [
        labelled("CH3"),
        labelled("H2O", charge=1, spin=2),
        labelled("O2", total_charge=0, multiplicity=3),
        labelled("NO"),
    ]
    ase.io.write(tmp_path / "a.extxyz", frames)
    found = list(convert([tmp_path / "a.extxyz"], progress=False))
    states = [(atoms.info["charge"], atoms.info["spin"]) for atoms in found]
    assert states == [(0, 2), (1, 2), (0, 3), (0, 2)]
    assert "multiplicity" not in found[2].info
    with pytest.warns(StructureWarning, match="charge 1 is stated, and used, not the -1 asked for"):
        (kept,) = convert([f"{tmp_path}/a.extxyz@1"], charge=-1, progress=False)
    assert kept.info["charge"] == 1
    (given,) = convert([f"{tmp_path}/a.extxyz@0"], charge=-1, spin=3, progress=False)
    assert (given.info["charge"], given.info["spin"]) == (-1, 3)
    with pytest.raises(
        DataError, match=r"structure 0 \(CH3\).*do not allow it; the lowest.*is 2: give"
    ):
        list(convert([f"{tmp_path}/a.extxyz@0"], spin=1, progress=False))


@pytest.mark.parametrize("suffix", ["db", "json", "aselmdb"])
@pytest.mark.parametrize("place", ["key_value_pairs", "data"])
def test_databases_keep_charge_and_multiplicity(tmp_path: Path, suffix: str, place: str) -> None:
    frames = [labelled("OH", charge=-1, spin=1), labelled("O2", charge=0, spin=3)]
    file = tmp_path / f"mine.{suffix}"
    with ase.db.connect(file) as database:
        for atoms in frames:
            database.write(atoms, **{place: atoms.info})
    found = list(convert([file], progress=False))
    states = [(atoms.info["charge"], atoms.info["spin"]) for atoms in found]
    assert states == [(-1, 1), (0, 3)]
    (second,) = convert([f"{file}@1"], progress=False)
    assert second.info["spin"] == 3
    assert read_structure(file).info["spin"] == 3  # as `md` reads a file: the last


@pytest.mark.parametrize("suffix", ["db", "json", "aselmdb"])
def test_pairs_and_data_of_a_row_may_not_contradict(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"mine.{suffix}"
    with ase.db.connect(file) as database:
        database.write(labelled("OH"), charge=-1, data={"charge": None, "spin": 1})
        database.write(labelled("OH"), charge=-1, data={"charge": 1})
    (first,) = convert([f"{file}@0:1"], progress=False)
    assert (first.info["charge"], first.info["spin"]) == (-1, 1)
    with pytest.raises(
        DataError, match=rf"mine\.{suffix}, row 2: its pairs say charge -1, its data"
    ):
        list(convert([file], progress=False))


def test_a_molfile_states_its_charges(tmp_path: Path) -> None:
    """The sum of those of its atoms, where it lists them; else it states none."""
    lines = ["salt", "", "", "  3  0  0  0  0  0            999 V2000"]
    lines += [
        f"{x:10.4f}    0.0000    0.0000 {name:3} 0" for x, name in enumerate(("O", "H", "Ca"))
    ]
    charges = "M  CHG  2   1  -1   3   2"
    for name, listed, expected in (
        ("a.mol", [charges], 1),
        ("b.sdf", [charges], 1),
        ("c.mol", [], None),
    ):
        ends = ["M  END", "M  CHG  1   1   5", "$$$$"]
        (tmp_path / name).write_text("\n".join([*lines, *listed, *ends, ""]))
        assert read_structure(tmp_path / name).info.get("charge") == expected


def test_a_gaussian_input_states_its_charge_and_multiplicity(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.com", molecule("OH"), charge=-1, mult=3)
    atoms = read_structure(tmp_path / "a.com")
    assert charge_and_spin(atoms) == (-1, 3)


GAUSSIAN = """ Entering Gaussian System, Link 0=g16
 Charge = -1 Multiplicity = 3
                          Input orientation:
 ---------------------------------------------------------------------
 Center     Atomic      Atomic             Coordinates (Angstroms)
 Number     Number       Type             X           Y           Z
 ---------------------------------------------------------------------
      1          8           0        0.000000    0.000000    0.000000
      2          1           0        0.000000    0.000000    0.960000
 ---------------------------------------------------------------------
 SCF Done:  E(RHF) =  -74.0635678     A.U. after    7 cycles
 Normal termination of Gaussian 16
"""
ORCA = """   * O   R   C   A *
Number of atoms                             ....  2
 Total Charge           Charge          ....   -1
 Multiplicity           Mult            ....    3
---------------------------------
CARTESIAN COORDINATES (ANGSTROEM)
---------------------------------
  O      0.000000    0.000000    0.000000
  H      0.000000    0.000000    0.960000

----------------------------
CARTESIAN COORDINATES (A.U.)
FINAL SINGLE POINT ENERGY       -74.063567800
                             ****ORCA TERMINATED NORMALLY****
"""
NWCHEM = """geometry units angstrom
  O 0 0 0
  H 0 0 0.96
end

charge -1
dft
  mult 3
end
"""


@pytest.mark.parametrize(
    ("name", "text"), [("a.log", GAUSSIAN), ("a.out", ORCA), ("a.nwi", NWCHEM)]
)
def test_texts_of_other_programs_state_charge_and_multiplicity(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    atoms = read_structure(tmp_path / name)
    assert (str(atoms.symbols), *charge_and_spin(atoms)) == ("OH", -1, 3)


def test_of_several_charges_in_a_text_none_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(GAUSSIAN + GAUSSIAN.replace("= -1 ", "=  1 "))
    with pytest.warns(StructureWarning, match=r"several values of charge, \[-1, 1\]"):
        atoms = read_structure(tmp_path / "a.log")
    assert "charge" not in atoms.info


def pdb(name: str = "O", element: str = "O", shift: float = 0.0, share: str = "  1.00") -> str:
    return (
        f"ATOM      1  {name:3} HOH A   1    {shift:8.3f}   0.000   0.100{share}  0.00"
        f"          {element:>2}\n"
    )


def test_a_molecule_in_no_cell_is_in_none(tmp_path: Path) -> None:
    """PDB files say so with a cell of 1 Å; a cell before several models is that of each."""
    head = "CRYST1{0:9.3f}{0:9.3f}{0:9.3f}  90.00  90.00  90.00 P 1           1\n"
    models = "".join(f"MODEL {n}\n{pdb()}{pdb('H1', 'H', 1.0)}ENDMDL\n" for n in (1, 2))
    for length, periodic in ((1, False), (20, True)):
        (tmp_path / "a.pdb").write_text(head.format(length) + models)
        for index in ("0", "1"):
            atoms = read_structure(f"{tmp_path}/a.pdb@{index}")
            assert atoms.pbc.tolist() == [periodic] * 3
            assert atoms.cell.lengths().tolist() == [length * periodic] * 3


def test_elements_that_are_guessed_and_sites_in_part_are_said(tmp_path: Path) -> None:
    gro = "x\n 2\n    1NA      NA    1   1.000   1.000   1.010\n"
    gro += "    1CL      CL    2   1.000   1.276   0.950\n 2 2 2\n"
    nacl = bulk("NaCl", "rocksalt", 5.6)
    ase.io.write(tmp_path / "a.cif", nacl)
    cif = re.sub(r"( Cl .*)1\.0", r"\1 0.5", (tmp_path / "a.cif").read_text())
    for name, text, words in (
        ("a.gro", gro, "which ASE guesses: NA as N, CL as C"),
        ("b.pdb", f"{pdb('CA', '')}END\n", "which ASE guesses: CA as Ca"),
        ("c.pdb", f"{pdb(share='  0.50')}{pdb(shift=0.4)}END\n", "1 of its .* occupied in part"),
        ("d.cif", cif, "1 of its structures are occupied in part"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.warns(StructureWarning, match=f"{name}: .*{words}"):
            read_structure(tmp_path / name)


def test_types_are_no_elements(tmp_path: Path) -> None:
    head = "ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n1\nITEM: BOX BOUNDS pp pp pp\n0 9\n0 9\n0 9\n"
    (tmp_path / "a.lammpstrj").write_text(f"{head}ITEM: ATOMS id type x y z\n1 1 0 0 0\n")
    with pytest.raises(DataError, match="types of atoms and not their elements"):
        read_structure(tmp_path / "a.lammpstrj")
    (tmp_path / "a.lammpstrj").write_text(f"{head}ITEM: ATOMS id element x y z\n1 O 0 0 0\n")
    assert str(read_structure(tmp_path / "a.lammpstrj").symbols) == "O"
    for masses in (False, True):
        atoms = molecule("H2O", cell=[9, 9, 9], pbc=True)
        ase.io.write(tmp_path / "a.lammps-data", atoms, masses=masses)
        if masses:
            assert str(read_structure(tmp_path / "a.lammps-data").symbols) == "OH2"
        else:
            with pytest.raises(DataError, match="types of atoms and not their elements"):
                read_structure(tmp_path / "a.lammps-data")


@pytest.mark.parametrize(
    ("charge", "expected"),
    [(1, 1), ("1", 1), (np.array([1]), 1), (None, 0), ("none", 0), (float("nan"), 0)],
)
def test_types_of_charges_that_files_bring(tmp_path: Path, charge: object, expected: int) -> None:
    ase.io.write(tmp_path / "a.traj", labelled("H2O", charge=charge))
    (atoms,) = convert([tmp_path / "a.traj"], progress=False)
    assert (atoms.info["charge"], atoms.info["spin"]) == (expected, 1 + expected)


def test_what_is_assumed_is_said_at_the_end(tmp_path: Path) -> None:
    frames = [labelled("OH"), labelled("OH", 1), labelled("H2O", charge=0, spin=1)]
    ase.io.write(tmp_path / "a.traj", frames)
    with pytest.warns(StructureWarning, match="^HO: no charge and no multiplicity") as warned:
        list(convert([tmp_path / "a.traj"], progress=False))
    assert len(warned) == 1


def test_cells_and_stresses_come_along(tmp_path: Path) -> None:
    crystal = bulk("Cu")
    crystal.rattle(0.02, seed=1)
    crystal.calc = EMT()
    crystal.get_stress()
    ase.io.write(tmp_path / "crystal.traj", crystal)
    (found,) = convert([tmp_path / "crystal.traj"], progress=False)
    assert found.pbc.all() and found.info["spin"] == 2  # an odd number of electrons in the cell
    np.testing.assert_allclose(found.get_stress(), crystal.get_stress())


def test_a_domain_that_is_given_counts_more(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", [labelled("H2O", data_id="theirs"), labelled("H2O")])
    read = convert([tmp_path / "a.extxyz"], progress=False)
    assert [atoms.info["data_id"] for atoms in read] == ["theirs", "a"]
    read = convert([tmp_path / "a.extxyz"], domain="mine", progress=False)
    assert [atoms.info["data_id"] for atoms in read] == ["mine", "mine"]


def test_charges_are_whole_numbers_but_for_rounding(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", [labelled("OH", charge=-0.9999)])
    (atoms,) = convert([tmp_path / "a.extxyz"], progress=False)
    assert (atoms.info["charge"], atoms.info["spin"]) == (-1, 1)
    ase.io.write(tmp_path / "a.extxyz", [labelled("OH", charge=-0.5)])
    with pytest.raises(DataError, match=r'"charge"\] = -0.5 is not a whole number'):
        list(convert([tmp_path / "a.extxyz"], progress=False))


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    folder.mkdir()
    ase.io.write(folder / "a.extxyz", [labelled("H2O"), labelled("CH4")])
    assert len(list(convert([folder / "a.extxyz"], progress=False))) == 2
    assert len(list(convert([f"{folder}/a.extxyz@1:"], progress=False))) == 1
    shutil.copy(folder / "a.extxyz", folder / "water@300K.extxyz")
    assert len(list(convert([folder / "water@300K.extxyz"], progress=False))) == 2
    assert len(list(convert([f"{folder}/water@300K.extxyz@0:1"], progress=False))) == 1


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    bare, broken = molecule("H2O"), molecule("NH3")
    only_energy = molecule("CH4")
    only_energy.calc = SinglePointCalculator(only_energy, energy=1.0)
    forces = np.full((4, 3), np.nan)
    broken.calc = SinglePointCalculator(broken, energy=1.0, forces=forces)
    (tmp_path / "text.foo").write_text("hello")
    for frames, words in (
        ([labelled("H2O"), bare], "structure 1 .*has no energy and no forces"),
        ([only_energy], "has no forces"),
        ([broken], "not finite"),
    ):
        ase.io.write(tmp_path / "a.traj", frames)
        with pytest.raises(DataError, match=words):
            list(convert([tmp_path / "a.traj"], progress=False))
    with pytest.raises(DataError, match="not a file that ASE can read"):
        list(convert([tmp_path / "text.foo"], progress=False))
    with pytest.raises(FileNotFoundError, match="nowhere.xyz"):
        list(convert([tmp_path / "nowhere.xyz"], progress=False))
    ase.io.write(tmp_path / "cut.extxyz", [labelled("H2O")] * 2)
    lines = (tmp_path / "cut.extxyz").read_text().splitlines(keepends=True)
    (tmp_path / "cut.extxyz").write_text("".join(lines[:-1]))  # ASE's error does not name the file
    with pytest.raises(DataError, match=r"cut.extxyz is not a file .* after structure 0"):
        list(convert([tmp_path / "cut.extxyz"], progress=False))


@pytest.mark.parametrize("suffix", ["extxyz", "db"])
def test_a_part_of_a_file_is_named_by_its_place_in_the_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    ase.io.write(file, [labelled("H2O", seed) for seed in range(6)])
    for index, numbers in (("1:6:2", [1, 3, 5]), ("4", [4]), (":2", [0, 1])):
        sources = [atoms.info["source"] for atoms in convert([f"{file}@{index}"], progress=False)]
        assert sources == [f"{file}, structure {number} (OH2)" for number in numbers]
    last = next(convert([f"{file}@-1"], progress=False))
    assert last.info["source"] == f"{file}@-1, structure 0 (OH2)"
    for index, words in (("6", "@6 has no structures"), ("first", "give numbers")):
        with pytest.raises(DataError, match=words):
            list(convert([f"{file}@{index}"], progress=False))


def bulk_with(**labels: object) -> Atoms:
    """Two atoms in a cell, with labels where another program might leave them."""
    atoms = bulk("MgO", "rocksalt", a=4.3)
    atoms.info.update(charge=0, spin=1)
    for key, value in labels.items():
        (atoms.arrays if np.shape(value) == (2, 3) else atoms.info)[key] = np.asarray(value)
    return atoms


SYMMETRIC = np.array([(1.0, 0.1, 0.2), (0.1, 2.0, 0.3), (0.2, 0.3, 3.0)])
FORCES = np.arange(6.0).reshape(2, 3)


def test_a_count_of_atoms_beyond_the_file_is_no_work_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("99999999999\n\nO 0 0 0\n")
    with pytest.raises(DataError, match="a.xyz .* fewer lines than it says"):
        list(read_structures(tmp_path / "a.xyz"))


def test_a_file_that_asks_for_all_memory_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*others: object, **named: object) -> None:
        raise MemoryError

    (tmp_path / "a.xyz").write_text("1\n\nO 0 0 0\n")
    monkeypatch.setattr(ase.io, "iread", too_much)
    with pytest.raises(DataError, match="a.xyz asks for more memory"):
        list(read_structures(tmp_path / "a.xyz"))


def test_labels_under_other_names_and_in_other_shapes() -> None:
    for atoms in (
        bulk_with(REF_energy=[-1.5], REF_forces=FORCES, REF_stress=SYMMETRIC),
        bulk_with(dft_energy=-1.5, dft_force=FORCES, virial=SYMMETRIC),
        bulk_with(energy_ref=-1.5, forces=FORCES.reshape(1, 2, 3), virials=SYMMETRIC.ravel()),
        bulk_with(**{"REF-energy": -1.5, "Forces (eV/Å)": FORCES, "REF_stress": SYMMETRIC}),
        bulk_with(total_energy=-1.2, energy=-1.5, forces=FORCES, REF_stress=SYMMETRIC),
        bulk_with(TotalEnergy=-1.5, DFT_forces_ev_ang=FORCES, virial_dft=SYMMETRIC),
    ):
        labels = labels_under_any_name(atoms, "here", Counter())
        assert type(labels["energy"]) is float and labels["energy"] == -1.5
        np.testing.assert_array_equal(labels["forces"], FORCES)
        factor = 1.0 if "REF_stress" in atoms.info else -1 / atoms.cell.volume
        expected = factor * np.array([1, 2, 3, 0.3, 0.2, 0.1])
        np.testing.assert_allclose(labels["stress"], expected, rtol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.3, -1.0, units.Bohr / units.Hartree])
def test_forces_of_a_trajectory_belong_to_its_energies(tmp_path: Path, factor: float) -> None:
    """Gradients, or forces in another unit, are no labels; errors of forces are another matter."""
    frames = [labelled("CH3OH", seed, charge=0, spin=1) for seed in range(20)]
    for atoms, seed in zip(frames, range(20), strict=True):
        atoms.positions = molecule("CH3OH").positions
        atoms.rattle(0.01, seed=seed)
        forces = factor * atoms.get_forces()
        energy = atoms.get_potential_energy()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    ase.io.write(tmp_path / "a.traj", frames)
    if 0.5 < factor < 2:
        assert len(list(convert(tmp_path / "a.traj", progress=False))) == 20
        return
    with pytest.raises(DataError, match="a.traj: .* its forces say: .* eV/Å") as raised:
        list(convert(tmp_path / "a.traj", progress=False))
    found = re.search("change by (.*) times", str(raised.value))
    assert found and float(found[1]) == pytest.approx(1 / factor, rel=0.01)


def test_a_structure_that_comes_twice_is_said(tmp_path: Path) -> None:
    one, ion = labelled("H2O", charge=0, spin=1), labelled("H2O", charge=1, spin=2)
    ase.io.write(tmp_path / "a.traj", [one, ion])
    ase.io.write(tmp_path / "b.traj", [one])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(convert(tmp_path / "a.traj", progress=False))) == 2
    with pytest.warns(StructureWarning, match="1 structures .*b.traj, structure 0 .* is .*a.traj"):
        assert len(list(convert([tmp_path / n for n in ("a.traj", "b.traj")], progress=False))) == 3
    one.calc.results["energy"] += 0.1
    ase.io.write(tmp_path / "b.traj", [one])
    with pytest.raises(DataError, match=r"is .*a.traj, structure 0 .*, with an energy that is 0.1"):
        list(convert([tmp_path / n for n in ("a.traj", "b.traj")], progress=False))


def test_names_that_labels_came_from_are_said(tmp_path: Path) -> None:
    frames = [bulk_with(REF_energy=-1.5, REF_forces=FORCES, virial=SYMMETRIC) for _ in range(2)]
    ase.io.write(tmp_path / "a.extxyz", frames)
    with pytest.warns(StructureWarning, match="2 structures: energy from REF_energy; 2 ") as warned:
        found = list(convert([tmp_path / "a.extxyz"], progress=False))
    assert "stress from virial (−virial/volume)" in str(warned[0].message)
    write_aselmdb(tmp_path / "a.aselmdb", found)
    stress = Dataset(tmp_path / "a.aselmdb")[1].get_stress(voigt=False)
    np.testing.assert_allclose(stress, -SYMMETRIC / found[0].cell.volume)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            {"energy": -1.0, "forces": FORCES[:1]},
            r"structure 0 \(MgO\).*forces have shape \(1, 3\)",
        ),
        ({"energy": [-1.0, 2.0], "forces": FORCES}, r"energy has shape \(2,\)"),
        ({"energy": "low", "forces": FORCES}, "low.*, not numbers"),
        ({"energy": np.inf, "forces": FORCES}, "energy is not finite"),
        ({"energy": True, "forces": FORCES}, "True.*, not numbers"),
        ({"energy": -1.0, "forces": FORCES * 1j}, "not numbers"),
        ({"energy_hartree": -1.0, "forces": FORCES}, "no energy; what .* energy_hartree, forces"),
        ({"formation_energy": -1.0, "forces": FORCES}, "no energy"),
        ({"total_energy": -1.0, "forces": FORCES, "momenta": FORCES}, "no energy; .*total_energy"),
        ({"my_energy": -1.0, "forces": FORCES}, "no energy; what is there: .*forces, my_energy"),
        ({"energy": -1.0, "REF_energy": -2.0, "forces": FORCES}, "energy and REF_energy are diff"),
        ({"energy": -9e4, "REF_energy": -9e4 - 0.1, "forces": FORCES}, "energy and REF_energy are"),
        ({"energy": -1.0, "forces": FORCES, "stress": np.arange(9.0)}, "stress is not symmetric"),
        ({"energy": -1.0, "forces": FORCES, "stress": SYMMETRIC, "virial": SYMMETRIC}, "different"),
    ],
)
def test_labels_that_are_not_certain_are_refused(labels: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        labels_under_any_name(bulk_with(**labels), "a.xyz, structure 0 (MgO)", Counter())


def test_a_virial_that_cannot_be_a_stress_is_mentioned() -> None:
    taken: Counter[str] = Counter()
    atoms = bulk_with(energy=-1.0, forces=FORCES, virial=np.arange(6.0))
    assert "stress" not in labels_under_any_name(atoms, "here", taken)
    assert list(taken) == ["no stress from virial (shape (6,), not (3, 3))"]


def test_an_energy_that_forces_do_not_belong_to_is_mentioned() -> None:
    """With smearing programs give one extrapolated to none beside the free energy."""
    for free, count in ((-1.5, 0), (-1.6, 1)):
        taken: Counter[str] = Counter()
        atoms = bulk("MgO", "rocksalt", a=4.3)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.5, free_energy=free, forces=FORCES)
        assert labels_under_any_name(atoms, "here", taken)["energy"] == -1.5
        assert sum("energy and not free_energy" in name for name in taken) == count


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ase.io.write(tmp_path / "a.extxyz", [labelled("H2O", seed) for seed in range(4)])
    ase.io.write(tmp_path / "b.extxyz", [labelled("CH3")])
    out = tmp_path / "all.aselmdb"
    files = [f"{tmp_path}/a.extxyz@1:3", str(tmp_path / "b.extxyz")]
    command = ["data", "convert", *files, "--out", str(out)]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "3 structures" in said.out and "charge +0, multiplicity 2: 1" in said.err
    assert [a.info["data_id"] for a in Dataset(out)] == ["a", "a", "b"]
    assert cli.main(command) == 2
    assert "exists" in capsys.readouterr().err
    before = out.read_bytes()
    assert cli.main([*command, "--spin", "1", "--overwrite"]) == 2  # CH3 has an odd electron
    assert out.read_bytes() == before, "a failed conversion spoiled what was there"


def test_atoms_without_element_or_place_are_named(tmp_path: Path) -> None:
    for change, words in (
        ((150, 0.0), "atom 1 has the atomic number 150, of no element"),
        ((0, 0.0), "atom 1 has the atomic number 0"),
        ((1, np.inf), "row 1 of its positions is not finite"),
    ):
        atoms = molecule("H2O")
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((3, 3)))
        atoms.numbers[1], atoms.positions[1, 2] = change
        ase.io.write(tmp_path / "a.traj", atoms)
        with pytest.raises(DataError, match=rf"a\.traj, structure 0: {words}"):
            list(convert([tmp_path / "a.traj"], progress=False))
        with pytest.raises(DataError, match=f"structure 0: {words}"):
            write_aselmdb(tmp_path / "a.aselmdb", [atoms])
    atoms.positions[1] = atoms.positions[2]
    with pytest.raises(DataError, match="structure 0: atoms 1 and 2 stand on one spot"):
        write_aselmdb(tmp_path / "a.aselmdb", [atoms])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((3, 3)))
    ase.io.write(tmp_path / "a.traj", atoms)
    with pytest.raises(DataError, match=r"a\.traj, structure 0 .*: atoms 1 and 2 stand on"):
        list(convert([tmp_path / "a.traj"], progress=False))


def test_a_mark_of_the_byte_order_is_no_part_of_a_file(tmp_path: Path) -> None:
    """Editors of Windows put it at the beginning."""
    (tmp_path / "a.xyz").write_text("1\n\nHe 0 0 0\n", encoding="utf-8-sig")
    assert read_structure(tmp_path / "a.xyz").symbols.get_chemical_formula() == "He"


@pytest.mark.parametrize("path", [None, "", 3, [None]])
def test_what_is_no_path_is_named(path: object, tmp_path: Path) -> None:
    for read in (Dataset, lambda name: list(convert(name, progress=False))):
        with pytest.raises(InputError, match="give the path of a file, or a list of paths, not"):
            read(path)
    with pytest.raises(DataError, match="structure 0 is a Atom, not an ase.Atoms"):
        write_aselmdb(tmp_path / "a.aselmdb", molecule("H2O"))


@pytest.mark.parametrize(
    ("energies", "words"),
    [([0.0, 0.0], "all its energies are 0"), ([-2000.0, 1e10], "an energy of 1e.10 eV, where")],
)
def test_energies_that_no_molecule_has_are_refused(
    tmp_path: Path, energies: list[float], words: str
) -> None:
    frames = []
    for energy in energies:
        atoms = molecule("H2O")
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((3, 3)))
        frames.append(atoms)
    ase.io.write(tmp_path / "odd.extxyz", frames)
    with pytest.raises(DataError, match=words):
        list(convert(tmp_path / "odd.extxyz", 0, 1))


def test_a_stress_in_another_unit_is_mentioned(tmp_path: Path) -> None:
    atoms = molecule("H2O", cell=[9, 9, 9], pbc=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-2000.0, forces=np.zeros((3, 3)))
    atoms.info["stress_gpa"] = np.ones(6)
    ase.io.write(tmp_path / "cell.extxyz", atoms)
    with pytest.warns(StructureWarning, match="1 structures: no stress from stress_gpa"):
        (read,) = convert(tmp_path / "cell.extxyz", 0, 1)
    assert "stress" not in read.calc.results


@pytest.mark.parametrize("unit", [1.0, units.Hartree, units.kcal / units.mol])
def test_total_energies_in_another_unit_are_not_taken_as_ev(tmp_path: Path, unit: float) -> None:
    """ωB97M-V of OMol25's level."""
    data = Dataset(DATA / "omol-mini" / "val.aselmdb")
    frames = [data[index] for index in range(0, len(data), 10)]
    for atoms in frames:
        atoms.calc.results["energy"] /= unit
    ase.io.write(tmp_path / "a.traj", frames)
    if unit == 1:
        assert len(list(convert([tmp_path / "a.traj"], progress=False))) == len(frames)
        return
    with pytest.raises(DataError, match=rf"11 of its 11 .*multiply them by {unit:.6g}"):
        list(convert([tmp_path / "a.traj"], progress=False))
    one = convert([f"{tmp_path}/a.traj@0"], progress=False)
    if unit == units.Hartree:  # of one molecule it may be chance
        with pytest.warns(StructureWarning, match="1 of its 1 energies are, in hartree"):
            assert len(list(one)) == 1
    else:
        with pytest.raises(DataError, match="1 of its 1 energies are, in kcal/mol"):
            list(one)


def test_energies_of_gfn2_xtb_are_taken(tmp_path: Path) -> None:
    """They leave out the core electrons: in eV some are as large as all electrons' in hartree."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("train", "ethanol/val"):
            list(convert(DATA / "xtb" / f"{name}.aselmdb", progress=False))


@pytest.mark.parametrize(
    "name", ["a.gen", "a.mol", "a.sdf", "a.gro", "a.dlp4", "a.rmc6f", "a.nwi", "a.xyz"]
)
def test_text_that_was_cut_short_is_not_taken(tmp_path: Path, name: str) -> None:
    box = molecule("CH3OH", cell=[9, 9, 9], pbc=name.endswith("rmc6f"))
    ase.io.write(tmp_path / name, box)
    assert len(read_structure(tmp_path / name)) == 6
    text = (tmp_path / name).read_text()
    lines = text.splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if re.search(r"\bC", line) and "C H" not in line)
    (tmp_path / name).write_text("".join(lines[: index + 2]))
    with pytest.raises(DataError, match=rf"{name} is not a file that ASE can read|has no"):
        read_structure(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pdb", "a.car", "a.g96", "a.res", "coord"])
def test_text_without_its_end_is_told(tmp_path: Path, name: str) -> None:
    ase.io.write(tmp_path / name, molecule("CH3OH", cell=[9, 9, 9], pbc=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_structure(tmp_path / name)) == 6
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if "END" in line.upper())
    (tmp_path / name).write_text("".join(lines[: last - 1]))
    with pytest.warns(StructureWarning, match="was it cut short"):
        read_structure(tmp_path / name)
