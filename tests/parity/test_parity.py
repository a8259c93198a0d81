"""Equal to the reference: energies, forces and stresses beside fairchem's, weight for weight.

Official-format checkpoints with random weights are made through fairchem (`reference.py`),
read by `load_model`, and both models answer for the same structures: within 2e-5 eV/atom and 2e-4
of the largest force in float32, and within 1e-8 where both compute in float64.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule

from allscaip_lite import AllScAIP, AllScAIPConfig
from allscaip_lite.checkpoints import load_model, save_official

pytest.importorskip("fairchem.core", reason="the reference is the `parity` extra")
import reference

ENERGY_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-8}  # eV/atom
FORCE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-8}  # of the largest component
BOTH = (torch.float32, torch.float64)


# --- structures -------------------------------------------------------------------------------


def state(atoms: Atoms, charge: int = 0, spin: int = 1, seed: int = 0) -> Atoms:
    """The structure with charge and multiplicity, and no symmetry that makes distances equal."""
    atoms.info.update(charge=charge, spin=spin)
    atoms.rattle(0.05, seed=seed)
    return atoms


def molecules() -> list[Atoms]:
    """2 to 60 atoms: closed shells, radicals, ions."""
    corners = np.array([(0, 0, 0), (1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
    ammonium = Atoms("NH4", 0.6 * corners)
    return [
        state(molecule("H2")),
        state(molecule("OH"), spin=2),
        state(molecule("O2"), spin=3),
        state(molecule("OH"), charge=-1),
        state(ammonium, charge=1),
        state(molecule("CH3CH2OH")),
        state(molecule("C6H6"), charge=1, spin=2),
        state(molecule("isobutane"), seed=3),
        state(molecule("C60")),
    ]


def fragments(distance: float = 9.0) -> Atoms:
    """Two waters, too far apart for the neighbourhood graph."""
    near, far = molecule("H2O"), molecule("H2O")
    far.rotate(70, (1, 2, 3))
    far.positions += (distance, 0.3, -0.2)
    return state(near + far)


def dense_cluster() -> Atoms:
    """63 atoms, 40 and more within the cutoff of most: the k-limit decides who is a neighbour."""
    atoms = bulk("Ar", "fcc", a=3.4, cubic=True) * (3, 3, 2)
    atoms.pbc = False
    from_center = np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1)
    atoms = atoms[np.argsort(from_center)[:63]]
    atoms.numbers[::3], atoms.numbers[1::3] = 8, 16
    atoms.rattle(0.25, seed=5)
    return state(atoms, spin=1)


def triclinic_crystal() -> Atoms:
    """16 atoms in a skewed cell. Its heights exceed the cutoff by the width of the soft ranks, so
    that the reference lists every candidate (in smaller cells it can miss some)."""
    cell = np.array([(7.4, 0.0, 0.0), (2.1, 7.6, 0.0), (-1.3, 1.7, 7.9)])
    corners = np.stack(np.meshgrid(*3 * [[0.1, 0.6]], indexing="ij"), -1).reshape(-1, 3)
    scaled = corners.repeat(2, axis=0)
    scaled[1::2] += (0.27, 0.21, 0.24)
    atoms = Atoms("MgO" * 8, cell=cell, scaled_positions=scaled, pbc=True)
    atoms.rattle(0.2, seed=1)
    return state(atoms)


def slab() -> Atoms:
    """Two periodic directions."""
    atoms = fcc111("Al", (3, 3, 2), vacuum=4.0)
    add_adsorbate(atoms, molecule("CO"), 2.0, offset=(0.3, 0.4))
    assert atoms.pbc.tolist() == [True, True, False]
    return state(atoms)


def wrapped_crystal() -> Atoms:
    """The triclinic crystal, one atom of it carried into another cell."""
    atoms = triclinic_crystal()
    atoms.positions[3] += atoms.cell[0] - 2 * atoms.cell[2]
    return atoms


# --- models -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoint(**options)`: the path of an official-format file, made once for these options."""
    folder = tmp_path_factory.mktemp("official")
    made: dict[str, Path] = {}

    def make(**options: object) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = reference.make_checkpoint(folder / f"{len(made)}.pt", **options)
        return made[key]

    return make


@cache
def unit(path: Path, dtype: torch.dtype):
    return reference.load_unit(path, dtype)


def compare(path: Path, systems: list[Atoms], dtype: torch.dtype) -> reference.Reference:
    """Assert that both models answer alike for this batch; returns the reference's answer."""
    theirs = reference.predict(unit(path, dtype), systems)
    ours = load_model(path, dtype=dtype).predict(systems)
    assert len(ours) == len(theirs.forces) == len(systems)
    for index, (result, atoms) in enumerate(zip(ours, systems, strict=True)):
        per_atom = abs(result.energy - theirs.energies[index]) / len(atoms)
        assert per_atom < ENERGY_TOLERANCE[dtype], atoms
        forces = theirs.forces[index]
        largest = np.abs(forces).max()
        assert largest > 1e-3  # else the comparison would be of zeros
        assert np.abs(result.forces - forces).max() < FORCE_TOLERANCE[dtype] * largest, atoms
        if theirs.stresses is not None and atoms.pbc.any():
            stress = theirs.stresses[index]
            assert np.abs(stress).max() > 1e-5
            difference = np.abs(result.stress - stress).max()
            assert difference < FORCE_TOLERANCE[dtype] * np.abs(stress).max(), atoms
    return theirs


# --- structures, with the main models ---------------------------------------------------------

MAIN = {
    "conservative": {},
    "direct": {"direct": True},
    "conservative, k 12": {"knn_k": 12},
    "no encodings": {"use_freq_mask": False, "use_sincx_mask": False},
}
NON_PERIODIC = {
    "molecules": molecules,
    "fragments": lambda: [fragments()],
    "dense cluster": lambda: [dense_cluster()],
}
PERIODIC = {
    "triclinic crystal": lambda: [triclinic_crystal()],
    "slab": lambda: [slab()],
    "wrapped": lambda: [wrapped_crystal()],
    "mixed batch": lambda: [slab(), state(molecule("C6H6")), triclinic_crystal()],
}


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("model", MAIN)
@pytest.mark.parametrize("systems", NON_PERIODIC | PERIODIC)
def test_structures(checkpoint, systems: str, model: str, dtype: torch.dtype) -> None:
    compare(checkpoint(**MAIN[model]), (NON_PERIODIC | PERIODIC)[systems](), dtype)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("k", [12, 30])
@pytest.mark.parametrize("systems", PERIODIC)
def test_stress(checkpoint, systems: str, k: int, dtype: torch.dtype) -> None:
    answer = compare(checkpoint(stress=True, knn_k=k), PERIODIC[systems](), dtype)
    assert answer.stresses is not None


def test_the_k_limit_bites(checkpoint) -> None:
    """The dense cluster is a test of ranks only if ranks decide there."""
    cluster = [dense_cluster()]
    few, some, many = (
        compare(checkpoint(knn_k=k), cluster, torch.float64).energies[0] for k in (12, 30, 60)
    )
    assert abs(few - some) > 1e-3 and abs(some - many) > 1e-3


@pytest.mark.parametrize("erope", [True, False])
def test_far_fragments_feel_each_other_through_erope(checkpoint, erope: bool) -> None:
    path = checkpoint(use_sincx_mask=erope)
    near, far = (compare(path, [fragments(d)], torch.float64).energies[0] for d in (9.0, 11.0))
    assert (abs(near - far) > 1e-6) == erope


# --- options, one by one ----------------------------------------------------------------------

OPTIONS = {
    "no LAE": {"use_freq_mask": False},
    "no ERoPE": {"use_sincx_mask": False},
    "no node attention": {"use_node_path": False},
    "no node attention, no LAE": {"use_node_path": False, "use_freq_mask": False},
    "direct, no encodings": {"direct": True, "use_freq_mask": False, "use_sincx_mask": False},
    "direct, no node attention": {"direct": True, "use_node_path": False},
    "full ranking": {"knn_use_low_mem": False},
    "full ranking, k 12": {"knn_use_low_mem": False, "knn_k": 12},
    # the reference cannot differentiate through its hard ranking
    "hard ranking": {"knn_soft": False, "direct": True},
    "hard ranking, k 12": {"knn_soft": False, "direct": True, "knn_k": 12},
    "rank width": {"knn_sigmoid_scale": 0.35, "knn_lse_scale": 0.2, "knn_k": 12},
    "cutoff": {"max_radius": 4.5},
    "sigmoid basis": {"distance_function": "sigmoid"},
    "linear sigmoid basis": {"distance_function": "linear_sigmoid"},
    "basis size": {"edge_distance_expansion_size": 100},
    "degrees": {"edge_direction_expansion_size": 3, "node_direction_expansion_size": 7},
    "frequencies": {"attn_num_freq": 12},
    "layer norm": {"normalization": "layernorm"},
    "no norm": {"normalization": "skip", "gain": 0.7},
    "relu": {"activation": "relu"},
    "leaky relu": {"activation": "leaky_relu"},
    "squared relu": {"activation": "squared_relu", "gain": 0.7},
    "star relu": {"activation": "star_relu", "gain": 0.7},
    "smelu": {"activation": "smelu"},
    "no residual scaling": {"use_residual_scaling": False},
    "dropout, asleep": {"mlp_dropout": 0.3, "atten_dropout": 0.2},
    "wide FFNs": {"ffn_hidden_layer_multiplier": 3, "output_hidden_layer_multiplier": 3},
    "other units": {"energy_mean": 0.4, "energy_rmsd": 2.0, "force_rmsd": 3.5, "direct": True},
    "OmegaConf": {"omegaconf": True},
    "one layer, two heads": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
    "three layers, gaps in LAE": {
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 3,
        "freequency_list": [5, 0, 4, 7],
    },
    "one head": {"hidden_size": 24, "num_heads": 1, "freequency_list": [24]},
    "wide": {"hidden_size": 128, "num_heads": 4},
}


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(checkpoint, options: str, dtype: torch.dtype) -> None:
    few = molecules()
    systems = [few[1], few[4], few[6], fragments(4.0), triclinic_crystal()]
    compare(checkpoint(**OPTIONS[options]), systems, dtype)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_silu_basis(checkpoint, dtype: torch.dtype) -> None:
    """The reference draws this basis at every call, so here it is lent ours."""
    path = checkpoint(distance_function="silu")
    with pytest.warns(UserWarning, match="SiLU"):
        model = load_model(path, dtype=dtype)
    basis = model.input.distance_basis
    systems = molecules()[5:7]
    with reference.fixed_silu_basis(basis.weight, basis.bias):
        theirs = reference.predict(unit(path, dtype), systems)
    for index, result in enumerate(model.predict(systems)):
        assert abs(result.energy - theirs.energies[index]) < 12 * ENERGY_TOLERANCE[dtype]
        forces = theirs.forces[index]
        error = np.abs(result.forces - forces).max()
        assert error < FORCE_TOLERANCE[dtype] * np.abs(forces).max()


@pytest.mark.filterwarnings("ignore:.*neighbors")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("slots", [8, 40])
def test_fixed_number_of_slots(checkpoint, slots: int, direct: bool, dtype: torch.dtype) -> None:
    """Padding as in compiled training: rows of a fixed width, with what does not fit dropped."""
    path = checkpoint(direct=direct, knn_k=12, max_atoms=80)
    systems = [dense_cluster(), molecules()[6]]
    theirs = reference.predict(reference.load_unit(path, dtype, slots), systems)
    plain = load_model(path, dtype=dtype)
    model = AllScAIP(plain.config.replace(max_neighbors=slots)).to(dtype).eval()
    model.load_state_dict(plain.state_dict())
    for index, result in enumerate(model.predict(systems)):
        atoms = len(systems[index])
        assert abs(result.energy - theirs.energies[index]) < atoms * ENERGY_TOLERANCE[dtype]
        forces = theirs.forces[index]
        error = np.abs(result.forces - forces).max()
        assert error < FORCE_TOLERANCE[dtype] * np.abs(forces).max()
    dropped = abs(plain.predict(systems)[0].energy - theirs.energies[0]) > 1e-3
    assert dropped == (slots == 8)


# --- the other way, and ASE's interface -------------------------------------------------------


def random_model(**changes: object) -> AllScAIP:
    torch.manual_seed(3)
    config = AllScAIPConfig(
        hidden_size=32, num_layers=2, num_heads=2, angular_channels=(6, 3, 1, 3, 3), k=16
    ).replace(**changes)
    model = AllScAIP(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        model.energy_scale.fill_(1.7)
        model.energy_mean.fill_(-0.2)
        model.force_scale.fill_(1.7 if config.conservative else 2.5)
        model.element_references.copy_(-20.0 * torch.arange(config.max_num_elements) ** 1.5)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conservative": False},
        {"angular_channels": None, "rotary": False, "stress": False},
        {"node_attention": False, "normalization": "layer", "activation": "smelu"},
        {"distance_basis": "sigmoid", "truncated_rank": False, "residual_scaling": False},
    ],
    ids=["conservative", "direct", "no encodings", "no node attention", "sigmoids"],
)
def test_save_official_is_loaded_and_answers_alike(tmp_path: Path, changes: dict) -> None:
    model = random_model(**changes)
    path = save_official(model, tmp_path / "official.pt")
    systems = [*molecules()[4:6], triclinic_crystal()]
    theirs = reference.predict(unit(path, torch.float64), systems)
    for index, result in enumerate(model.predict(systems)):
        assert result.energy == pytest.approx(theirs.energies[index], abs=1e-7, rel=0)
        np.testing.assert_allclose(result.forces, theirs.forces[index], atol=1e-8, rtol=0)
    if model.config.conservative and model.config.stress:
        np.testing.assert_allclose(result.stress, theirs.stresses[-1], atol=1e-8, rtol=0)


@pytest.mark.parametrize("direct", [False, True])
def test_calculators(checkpoint, direct: bool) -> None:
    """ASE's view of both: energy, forces, Voigt stress."""
    from allscaip_lite import AllScAIPCalculator

    path = checkpoint(direct=direct, stress=not direct)
    theirs, ours = reference.load_calculator(path), AllScAIPCalculator(path, device="cpu")
    for atoms in (molecules()[6], wrapped_crystal()):
        one, other = atoms.copy(), atoms.copy()
        one.calc, other.calc = theirs, ours
        energy = one.get_potential_energy()
        assert other.get_potential_energy() == pytest.approx(energy, abs=2e-5 * len(atoms), rel=0)
        forces = one.get_forces()
        largest = np.abs(forces).max()
        np.testing.assert_allclose(other.get_forces(), forces, atol=2e-4 * largest, rtol=0)
    if not direct:
        stress = one.get_stress()
        tolerance = 2e-4 * np.abs(stress).max()
        np.testing.assert_allclose(other.get_stress(), stress, atol=tolerance, rtol=0)
