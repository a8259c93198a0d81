"""Sets of kernels in the whole model, and what happens around a C compiler.

`test_operations` holds each operation to its formula.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from allscaip_lite import AllScAIP, AllScAIPCalculator
from allscaip_lite.errors import InputError, KernelError
from allscaip_lite.kernels import choose, compiled
from allscaip_lite.kernels.compiled import load_kernels
from allscaip_lite.operations import PLAIN

ModelMaker = Callable[..., AllScAIP]

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of compiled kernels, and none loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_kernels.cache_clear()
    yield tmp_path / "cache" / "allscaip-lite"
    load_kernels.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"angular_channels": None},
        {"node_attention": False},
        {"smooth_bond_order": True},
        {"soft_rank": False},
        {"conservative": False},
        {"max_neighbors": 24},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernels", ["torch", "c"])
def test_answers_are_those_of_the_plain_formulas(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms, slab: Atoms, options: dict, kernels: str
) -> None:
    model = make_model(**options)
    plain = AllScAIPCalculator(model, kernels="plain")
    fast = AllScAIPCalculator(model, kernels=kernels)
    lone = Atoms("He", info={"charge": 0, "spin": 1})
    for atoms in (cluster, crystal, slab, lone):
        energy, forces = (f(atoms) for f in (plain.get_potential_energy, plain.get_forces))
        assert fast.get_potential_energy(atoms) == pytest.approx(energy, abs=1e-10)
        np.testing.assert_allclose(fast.get_forces(atoms), forces, atol=1e-9)
        if atoms is crystal and model.config.conservative:
            stress = plain.get_stress(atoms)
            np.testing.assert_allclose(fast.get_stress(atoms), stress, atol=1e-10)
    # several systems at once
    batch = [cluster, crystal, lone]
    pairs = zip(fast.model.predict(batch), plain.model.predict(batch), strict=True)
    assert all(a.energy == pytest.approx(b.energy, abs=1e-10) for a, b in pairs)


@needs_compiler
@pytest.mark.parametrize("kernels", ["torch", "c"])
def test_answers_in_float32(make_model: ModelMaker, cluster: Atoms, kernels: str) -> None:
    model = make_model(dtype=torch.float32)
    forces = AllScAIPCalculator(model, kernels="plain").get_forces(cluster)
    found = AllScAIPCalculator(model, kernels=kernels).get_forces(cluster)
    assert np.abs(found - forces).max() < 2e-5 * np.abs(forces).max()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("width", [16, 32, 64])
def test_any_width_of_registers(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_model: ModelMaker,
    cluster: Atoms,
    crystal: Atoms,
    width: int,
) -> None:
    """Answers and a training step where registers have 16 bytes (NEON), 32 (AVX2), 64 (AVX-512)."""
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -DBYTES={width}")
    test_answers_in_float32(make_model, cluster, "c")
    test_a_training_step_is_the_plain_one(make_model, cluster, crystal, {}, "c")


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [{}, {"angular_channels": None}, {"node_attention": False}, {"smooth_bond_order": True}],
    ids=str,
)
@pytest.mark.parametrize("kernels", ["torch", "c"])
def test_a_training_step_is_the_plain_one(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms, options: dict, kernels: str
) -> None:
    """A loss on energies, forces and stress moves every weight alike."""
    model = make_model(**options)
    batch = _structures([cluster, crystal, Atoms("He", info={"charge": 0, "spin": 1})])
    gradients = []
    for model.operations in (PLAIN, choose(kernels, "cpu", torch.float64)):
        energy, forces, stress = model(batch, create_graph=True)
        (energy.sum() + forces.pow(3).sum() + stress.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    for name, plain in gradients[0].items():
        found = gradients[1][name]
        assert (plain is None) == (found is None), name
        if plain is not None:
            assert (found - plain).abs().max() <= 1e-9 * (1 + plain.abs().max()), name


@needs_compiler
def test_attention_with_dropout_trains_as_ever(make_model: ModelMaker, cluster: Atoms) -> None:
    """The kernels draw no random numbers: where attention has dropout, they do not serve."""
    model = make_model(attention_dropout=0.5).train()
    forces = []
    for model.operations in (PLAIN, choose("c", "cpu", torch.float64)):
        torch.manual_seed(0)
        forces.append(model(_structures(cluster)).forces.detach())
    assert torch.allclose(*forces, rtol=0, atol=1e-12)


@needs_compiler
def test_the_calculator_leaves_the_model_as_it_is(make_model: ModelMaker) -> None:
    model = make_model()
    calculator = AllScAIPCalculator(model, kernels="c")
    assert model.operations is PLAIN
    assert calculator.model.operations is choose("c", "cpu", torch.float64)


def _structures(atoms: Atoms | list[Atoms]):  # type: ignore[no-untyped-def]
    from allscaip_lite.structures import structures_from_atoms

    return structures_from_atoms(atoms, torch.float64)


@needs_compiler
def test_dynamics_of_a_fixed_composition(make_model: ModelMaker, cluster: Atoms) -> None:
    """Edges come and go on the way; the trajectory is that of the plain formulas."""
    ends = []
    for kernels in ("plain", "c"):
        atoms = cluster.copy()
        atoms.calc = AllScAIPCalculator(make_model(), kernels=kernels)
        VelocityVerlet(atoms, 0.5 * units.fs).run(20)
        ends.append(atoms.positions)
    assert np.abs(ends[0] - cluster.positions).max() > 1e-3
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-9)


@pytest.mark.slow
@needs_compiler
def test_compiled_once_on_a_machine(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process finds the file, also where the compiler has gone since."""
    load_kernels(torch.float32)
    (made,) = fresh.iterdir()
    written = made.stat().st_mtime_ns
    load_kernels.cache_clear()
    load_kernels(torch.float32)
    assert [(p.name, p.stat().st_mtime_ns) for p in fresh.iterdir()] == [(made.name, written)]
    load_kernels(torch.float64)
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "a bit"])
def test_a_damaged_library_is_made_again(fresh: Path, damage: str) -> None:
    """To load it would end the process."""
    load_kernels(torch.float32)
    (library,) = fresh.iterdir()
    content = library.read_bytes()
    library.unlink()  # this process has mapped it
    half = len(content) // 2
    rest = b"" if damage == "cut" else bytes([content[half] ^ 1]) + content[half + 1 :]
    library.write_bytes(content[:half] + rest)
    load_kernels.cache_clear()
    load_kernels(torch.float32)
    (again,) = fresh.iterdir()
    assert sha256(again.read_bytes()).hexdigest()[:16] == again.stem[-16:]


@needs_compiler
def test_where_the_cache_is_no_folder_a_process_compiles_its_own(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> None:
        raise OSError("no room")

    fresh.parent.touch()  # as in a home that is read-only
    assert load_kernels(torch.float32) is load_kernels(torch.float32)
    assert fresh.parent.is_file()
    load_kernels.cache_clear()
    monkeypatch.setattr(compiled.tempfile, "TemporaryDirectory", no_room)
    with pytest.raises(KernelError, match="set XDG_CACHE_HOME or TMPDIR"):
        load_kernels(torch.float32)


def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(KernelError, match="install gcc or clang"):
        AllScAIPCalculator(model, kernels="c")
    calculator = AllScAIPCalculator(model)  # "auto" does without
    assert calculator.model.operations is choose("torch", "cpu", torch.float64)
    assert np.isfinite(calculator.get_forces(Atoms("H2", [(0, 0, 0), (0, 0, 0.7)]))).all()


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, make_model: ModelMaker, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'fatal: no such target' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    for compiler, message in ((broken, "no such target"), (tmp_path / "none", "does not run")):
        monkeypatch.setenv("CC", str(compiler))
        with pytest.raises(KernelError, match=message):
            AllScAIPCalculator(make_model(), kernels="c")
    assert not list(fresh.rglob("*"))


def test_half_precision_is_refused(make_model: ModelMaker) -> None:
    with pytest.raises(InputError, match="float32 or torch.float64"):
        AllScAIPCalculator(make_model(), dtype=torch.bfloat16, kernels="c")


def test_names_that_are_none_are_refused(make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match="'fast' is not one of auto, plain, torch, c, cuda-graphs"):
        AllScAIPCalculator(make_model(), kernels="fast")
    with pytest.raises(ValueError, match="runs on a CPU|is not here"):
        choose("c", "cuda")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        AllScAIPCalculator(make_model(), device="cpu", kernels="cuda-graphs")


def test_a_library_that_others_could_write_is_not_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled.cache_folder()
    compiled.load_kernels.__wrapped__(torch.float64)
    (library,) = folder.iterdir()
    assert not (folder.stat().st_mode | library.stat().st_mode) & 0o022
    for loose in ("folder", "library"):
        kept = library.read_bytes()
        library.unlink()
        library.write_bytes(kept)  # as another may have written it, under the right name
        (folder if loose == "folder" else library).chmod(0o777)
        written = library.stat().st_mtime_ns
        compiled.load_kernels.__wrapped__(torch.float64)
        (library,) = folder.iterdir()
        assert library.stat().st_mtime_ns > written
        assert not (folder.stat().st_mode | library.stat().st_mode) & 0o022
    monkeypatch.setattr(compiled.os, "getuid", lambda: 12345)
    if folder.stat().st_uid:
        with pytest.raises(KernelError, match="is another user's"):
            compiled.load_kernels.__wrapped__(torch.float64)
