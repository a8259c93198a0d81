"""What many tests share: one thread, small models whose every weight matters, and structures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import all_changes
from torch import Tensor

from allscaip_lite import AllScAIP, AllScAIPCalculator, AllScAIPConfig
from allscaip_lite.graph import Graph, build_graph
from allscaip_lite.structures import structures_from_atoms

SMALL = AllScAIPConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    k=12,
    num_distance_basis=48,
    angular_channels=(5, 4, 1, 3, 3),
    num_rotary_frequencies=8,
)

# Channels of an attention's groups by degree, of heads with 16.
CHANNELS = {
    "lae": (5, 4, 1, 3, 3),
    "empty group": (9, 0, 4, 0, 3),
    "no invariant group": (0, 8, 8),
    "one group": (16,),
    "none": None,
}

# Folders whose tests train, label, run dynamics or start servers: all of them are `slow`.
SLOW_FOLDERS = ("evaluation", "labels", "md", "notebook", "parity", "studies", "training")
# but this one: it holds the model to fairchem's numbers where fairchem is not installed
QUICK_FILES = ("test_golden.py",)


def is_slow(file: Path) -> bool:
    return file.parent.name in SLOW_FOLDERS and file.name not in QUICK_FILES


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "not slow"` does not even import what the slow folders need."""
    slow = collection_path.suffix == ".py" and is_slow(collection_path)
    return True if slow and config.getoption("markexpr") == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow folders, and skip those for a GPU where there is none."""
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def neutral(name: str, spin: int = 1) -> Atoms:
    atoms = Atoms("He") if name == "He" else molecule(name)
    atoms.info.update(charge=0, spin=spin)
    return atoms


def state(atoms: Atoms, charge: object = 0, spin: object = 1) -> Atoms:
    """The structure itself, with charge and multiplicity in its `info`."""
    atoms.info.update(charge=charge, spin=spin)
    return atoms


@pytest.fixture(scope="session")
def small_config() -> AllScAIPConfig:
    """Two layers of two heads with 16 channels, both encodings, k = 12."""
    return SMALL


def _randomised(config: AllScAIPConfig, dtype: torch.dtype, seed: int) -> AllScAIP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AllScAIP(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif "scale." in name and parameter.requires_grad:
                torch.nn.init.uniform_(parameter, 0.4, 0.9)
            elif "norm.weight" in name:
                torch.nn.init.uniform_(parameter, 0.6, 1.4)
            elif "rotary_weight" in name:
                torch.nn.init.normal_(parameter)
        model.energy_scale.fill_(1.7)
        model.force_scale.fill_(1.7)
        model.energy_mean.fill_(-0.3)
        model.element_references.copy_(torch.randn(config.max_num_elements))
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., AllScAIP]:
    """make_model(dtype, seed, **changes of SMALL): random in every weight, evaluation mode."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> AllScAIP:
        return _randomised(SMALL.replace(**changes), dtype, seed)

    return make


class Colliding(AllScAIPCalculator):
    """A model's calculator that, after so many calls, first puts two atoms on one spot."""

    def __init__(self, model: AllScAIP, after: int) -> None:
        super().__init__(model)
        self.left = after

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:
        self.left -= 1
        if self.left < 0:
            atoms.positions[1] = atoms.positions[0]
        super().calculate(atoms, properties, system_changes)


@pytest.fixture(scope="session")
def make_colliding() -> Callable[[AllScAIP, int], Colliding]:
    return Colliding


@pytest.fixture(scope="session")
def make_graph() -> Callable[..., Graph]:
    """make_graph(atoms, dtype, **changes of SMALL): the graph of one structure or of several."""

    def make(
        atoms: Atoms | list[Atoms], dtype: torch.dtype = torch.float64, **changes: object
    ) -> Graph:
        return build_graph(structures_from_atoms(atoms, dtype), SMALL.replace(**changes))

    return make


def scattered(
    symbols: str, density: float, seed: int = 0, closest: float = 0.9, **keywords: object
) -> Atoms:
    """Atoms strewn at random in a cube at `density` 1/Å³, none nearer than `closest` Å."""
    atoms = Atoms(symbols)
    random, points = np.random.default_rng(seed), []
    edge = (len(atoms) / density) ** (1 / 3)
    while len(points) < len(atoms):
        point = random.uniform(0, edge, 3)
        if all(np.linalg.norm(point - other) > closest for other in points):
            points.append(point)
    atoms.positions = points
    atoms.info.update(charge=0, spin=1 + int(atoms.numbers.sum()) % 2)
    atoms.set_cell(keywords.get("cell"))
    atoms.pbc = keywords.get("pbc", False)
    return atoms


@pytest.fixture(scope="session")
def cluster() -> Atoms:
    """19 atoms at liquid density, each with more neighbours than k = 12. Do not change it."""
    return scattered("C3H7N2O5SCl", 0.09)


@pytest.fixture(scope="session")
def crystal() -> Atoms:
    """7 atoms in a triclinic cell narrower than the cutoff, two of them outside it."""
    cell = [(4.1, 0.2, 0.0), (1.6, 3.9, 0.3), (-0.7, 1.1, 4.6)]
    atoms = Atoms("SiO2NaClH2", cell=cell, pbc=True)
    atoms.set_scaled_positions(
        [
            (0.05, 0.10, 0.02),
            (0.45, 0.15, 0.30),
            (0.10, 0.60, 0.35),
            (0.60, 0.55, 0.80),
            (0.15, 0.20, 0.65),
            (1.70, 0.90, 0.20),
            (0.80, -0.65, 0.55),
        ]
    )
    atoms.info.update(charge=0, spin=1)
    return atoms


@pytest.fixture(scope="session")
def slab() -> Atoms:
    """8 atoms in a skewed layer, periodic along two of three lattice vectors."""
    atoms = scattered("Cu4O2H2", 0.05, seed=4, closest=1.4)
    atoms.set_cell([(5.2, 0.0, 0.0), (2.1, 5.6, 0.0), (0.3, -0.4, 14.0)])
    atoms.pbc = (True, True, False)
    return atoms
