"""The study of crystals: right for a potential whose constants are known, resumable, complete."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from allscaip_lite import AllScAIP, AllScAIPConfig, save_model
from allscaip_lite.applicability import Seen
from docs.studies.crystals import run as study


@pytest.fixture(scope="module")
def copper() -> dict[str, float]:
    """By effective medium theory, a function of pair distances."""
    return study.properties("Cu", EMT())


def test_constants_are_those_of_the_potential(copper):
    # ase's own page of its EMT: a 3.59 Å, bulk modulus 134 GPa
    assert copper["a"] == pytest.approx(3.59, abs=0.005)
    assert copper["bulk_modulus"] == pytest.approx(134, abs=2)
    assert copper["c11"] + 2 * copper["c12"] == pytest.approx(3 * copper["bulk_modulus"], rel=0.02)
    assert copper["c44"] > (copper["c11"] - copper["c12"]) / 2 > 0
    assert 0.9 < copper["surface_111"] < copper["surface_100"] < 1.3
    assert 1.0 < copper["vacancy"] < 1.4
    assert 0 < copper["transverse"] < copper["longitudinal"] < 10


def test_a_vacancy_jumps_over_the_saddle_that_symmetry_gives(copper):
    """It is half-way: the jumping atom is held there, the others come to rest."""
    whole = study._crystal("Cu", copper["a"], cubic=True).repeat(2)
    step = whole.get_distances(0, range(len(whole)), mic=True, vector=True)
    jumping = int(np.argsort(np.linalg.norm(step, axis=1))[1])
    energies = []
    for part in (0.0, 0.5):
        atoms = whole.copy()
        atoms.positions[jumping] -= part * step[jumping]
        del atoms[0]
        atoms.set_constraint(FixAtoms([jumping - 1]))
        energies.append(study.at_rest(atoms, EMT()).get_potential_energy())
    assert copper["migration"] == pytest.approx(energies[1] - energies[0], abs=0.01)


@pytest.mark.slow
def test_copper_expands_about_as_much_as_in_experiment():
    cube = study._crystal("Cu", 3.59, cubic=True)
    assert 8 < study.expansion(cube, EMT(), 1) < 35  # 21 in 2 ps


def test_what_a_perfect_crystal_has_exactly_is_found_exact(copper):
    for name in ("spread", "cubic", "force", "acoustic"):
        assert abs(copper[name]) < 1e-3, name
    assert abs(study.drift(study._crystal("Cu", cubic=True), EMT(), 0.1)) < 0.5


def test_forces_of_pair_distances_do_not_jump_between_images():
    assert study.image_jump(study._crystal("Cu", cubic=True), EMT()) < 1e-3


def test_sound_is_as_fast_as_the_elastic_constants_say():
    """Along (100) c = √(C/ρ), of waves so long that the lattice is a continuum to them."""
    atoms = study._crystal("Cu", 3.59)
    constants = study.elastic_constants(atoms, EMT())
    density = atoms.get_masses().sum() * study.units._amu / (atoms.get_volume() * 1e-30)
    speeds = np.sqrt(constants.diagonal()[[3, 3, 0]] * 1e9 / density)  # m/s
    q = 0.06
    with study.tempfile.TemporaryDirectory() as folder:
        found = study.Phonons(atoms, EMT(), supercell=(5, 5, 5), name=f"{folder}/phonons")
        found.run()
        found.read(acoustic=True)
        energies = np.sort(found.band_structure([(q, 0, q)], verbose=False)[0])
    wave = 2 * np.pi * 2 * q / 3.59e-10  # X, at q = ½, is 2π/a
    np.testing.assert_allclose(energies / study._PLANCK * 2 * np.pi / wave, speeds, rtol=0.05)


@pytest.fixture
def model(tmp_path) -> str:
    torch.manual_seed(0)
    config = AllScAIPConfig(hidden_size=16, num_layers=1, num_heads=2, angular_channels=(4, 2, 2))
    model = AllScAIP(config)
    model.seen = Seen({"Na", "Cl", "Cu"})
    save_model(model, tmp_path / "some.safetensors", {})
    return str(tmp_path / "some.safetensors")


def test_the_command_leaves_out_what_a_model_has_not_seen_and_goes_on(
    model, tmp_path, monkeypatch, capsys
):
    calls = []

    def quick(name: str, calculator: object) -> dict[str, float]:
        calls.append(name)
        return {"a": 4.0 + len(calls), "c11": 100.4, "spread": 0.25}

    monkeypatch.setattr(study, "properties", quick)
    out = tmp_path / "model.json"
    command = ["run", model, "--out", str(out), "--solids", "NaCl", "Al", "Cu"]
    assert study.main(command) == 0
    assert "Al: left out" in capsys.readouterr().out
    assert study.main(command) == 0
    assert calls == ["NaCl", "Cu"]

    def stop(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "drift", lambda *_: 0.25)
    monkeypatch.setattr(study, "expansion", stop)
    assert study.main([*command[:4], "--solids", "Cu", "--nve", "1", "--npt", "1"]) == 130
    assert json.loads(out.read_text())["solids"]["Cu"]["drift"] == 0.25
    assert study.main(["run", "chgnet", "--out", str(out)]) == 2
    assert "give another --out" in capsys.readouterr().err

    teacher = tmp_path / "chgnet.json"
    teacher.write_text(json.dumps({"method": "chgnet", "solids": {"Cu": {"a": 3.58}}}))
    page = tmp_path / "README.md"
    assert study.main(["table", str(out), str(teacher), "--page", str(page)]) == 0
    text = page.read_text()
    assert "| Cu | lattice constant, Å | 6.000 | 3.580 | 3.610 |" in text
    assert "| Cu | C₁₁, GPa | 100 | | 176 |" in text
    assert text.count("meV/atom | 0.2 |\n") == 2 and "| Al |" not in text
