"""OMol25's evaluations, as its leaderboard takes them: `allscaip-lite leaderboard`.

In: a model, and the inputs of one task as OMol25 gives them out, a pickle or the same as JSON:
nested dictionaries with structures at their ends, charge and spin in their `info`. Out: the JSON
file of predictions to upload there: the same nesting, with the energy (eV) and forces (eV/Å) of
each structure, or of the start and the end of its relaxation. OMol25 keeps its own labels secret;
whoever has results of the same shape, from DFT, gets the errors that OMol25 counts.

Tasks, shapes and errors: D. S. Levine et al., arXiv:2505.08762, section on evaluations, and
fairchem's modules `recipes.omol` and `evaluator` (fairchem-core 2.24.0, fairchem-data-omol 0.1.2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.jsonio import encode
from ase.optimize import LBFGS
from tqdm import tqdm

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.checkpoints import load_model
from allscaip_lite.data.batches import fill_batches
from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.errors import DataError, InputError, RunError, StructureError
from allscaip_lite.evaluation.omol_errors import Keys, Tree, check_systems, metrics, table
from allscaip_lite.evaluation.omol_files import read
from allscaip_lite.files import locked_file, sha256_of, store_text
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP
from allscaip_lite.structures import structures_from_atoms

FMAX, STEPS = 0.01, 500  # eV/Å and steps of LBFGS: OMol25's settings for the evaluations


# --- Tasks -----------------------------------------------------------------------------------


class Task(NamedTuple):
    """What the inputs of a task look like.

    So many keys (`depths`) lead to a structure, or to a dictionary that has it under `key`.
    """

    shape: str
    depths: tuple[int, ...]
    key: str | None


TASKS = {
    "conformers": Task("{family: [{sid, initial_atoms}]}", (2,), "initial_atoms"),
    "protonation": Task("{family: {state: {initial_atoms}}}", (2,), "initial_atoms"),
    "ieea": Task("{system: {charge: {spin: {atoms}}}}", (3,), "atoms"),
    "spin_gap": Task("{system: {spin: {atoms}}}", (2,), "atoms"),
    "ligand_pocket": Task("{system: {ligand, pocket, ligand_pocket}}", (2,), None),
    "ligand_strain": Task("{system: {bioactive_conf, conformers: [atoms]}}", (2, 3), None),
    "distance_scaling": Task("{kind: {system: {scale: atoms}}}", (3,), None),
    "singlepoint": Task("{system: atoms}", (1,), None),
}


# --- Computing -------------------------------------------------------------------------------


class Job(NamedTuple):
    """One structure, and whether it is to be relaxed."""

    path: Keys
    atoms: Atoms
    relax: bool

    @property
    def name(self) -> str:
        return " / ".join(self.path)


def jobs(task: str, data: Any, max_num_elements: int = 100) -> list[Job]:
    """All structures of the inputs of a task, checked before the first is computed.

    Args:
        task: the name of the task.
        data: its inputs, as `read` gives them.
        max_num_elements: atomic numbers below this are in the model's table.

    Raises:
        DataError: where the inputs are not of the task's shape, and, naming it, for a structure
            without charge and spin in its `info` or one that no model can answer for.
    """
    found: dict[Keys, Job] = {}
    try:
        for path, atoms in _ends(task, data):
            job = Job(path, atoms, TASKS[task].key == "initial_atoms" or "gas_phase" in path)
            placed = len(path) in TASKS[task].depths and path[-1] not in ("atoms", "initial_atoms")
            if not placed or not isinstance(atoms, Atoms):
                raise TypeError(f"no structure belongs or stands at {job.name}")
            found[path] = job
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"these are no inputs of {task}, which are {TASKS[task].shape} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not found:
        raise DataError("there are no structures in these inputs")
    for job in found.values():
        try:
            stated = stated_charge_and_spin(job.atoms, job.name)
            if missing := [n for n, v in zip(("charge", "spin"), stated, strict=True) if v is None]:
                raise DataError(f"{job.name}: no {' and no '.join(missing)} in its info")
            structures_from_atoms(job.atoms, max_num_elements=max_num_elements)
        except StructureError as error:
            raise DataError(f"{job.name}: {error}") from error
    return list(found.values())


def _ends(task: str, data: Any) -> Iterator[tuple[Keys, Any]]:
    """Every structure of the inputs of a task, at the place that its results have."""
    if task == "conformers":
        data = {name: {one["sid"]: one for one in members} for name, members in data.items()}
    elif task == "ligand_pocket":
        three = ("ligand", "pocket", "ligand_pocket")
        data = {name: {part: parts[part] for part in three} for name, parts in data.items()}
    elif task == "ligand_strain":
        data = {
            name: {
                "bioactive": ligand["bioactive_conf"],
                "gas_phase": dict(enumerate(ligand["conformers"])),
            }
            for name, ligand in data.items()
        }

    wanted = TASKS[task].key

    def walk(tree: Any, path: Keys) -> Iterator[tuple[Keys, Any]]:
        if not isinstance(tree, dict) or wanted in tree:
            yield path, tree if wanted is None else tree[wanted]
            return
        for key, value in tree.items():
            yield from walk(value, (*path, str(key)))

    return walk(data, ())


def predict(
    model: AllScAIP,
    task: str,
    inputs: Path,
    out: Path,
    *,
    max_atoms: int = 400,
    kernels: str = "auto",
    progress: bool = False,
) -> list[str]:
    """Write the predictions of a task.

    Results are kept in `out` + ".journal" as they come, and a later call continues from there; only
    a relaxation that was under way starts again.

    Args:
        model: whose predictions they are.
        task: one of `TASKS`.
        inputs: the file of the task's inputs.
        out: the file to write, `.json`.
        max_atoms: atoms of a batch of single points (one structure at least).
        kernels: how the model computes, see `allscaip_lite.kernels`.
        progress: whether to show a progress bar.

    Returns:
        The relaxations that did not converge, by name.

    Raises:
        DataError: for inputs that do not fit the task (see `read`, `jobs`).
        RunError: for a journal of another task, model or inputs.
        FileExistsError: where `out` exists without a journal.
    """
    if out.suffix != ".json" or not out.resolve().parent.is_dir():
        raise InputError(f"{out}: give the name of a .json file in a folder that exists")
    journal = out.with_name(out.name + ".journal")
    if out.exists() and not journal.exists():
        raise FileExistsError(f"{out} exists: give another name (--out), or move it away")
    todo = jobs(task, read(inputs), model.config.max_num_elements)
    digest = sha256_of(inputs)
    done = _resume(journal, {"task": task, "model": _fingerprint(model), "inputs": digest})
    left = [job for job in todo if job.path not in done]
    calculator = AllScAIPCalculator(model, kernels=kernels)
    bar = tqdm(total=len(todo), initial=len(done), unit="structures", disable=not progress)
    with journal.open("a") as stream, bar:
        for group in _groups(left, max_atoms):
            bar.set_postfix_str(group[0].name)
            if group[0].relax:
                results = [relaxation(group[0].atoms, calculator)]
            else:
                results = single_points([job.atoms for job in group], calculator)
            for job, result in zip(group, results, strict=True):
                stream.write(_line({"system": job.path, "result": result}))
                done[job.path] = result
            stream.flush()
            bar.update(len(group))
    tree: Tree = {}
    for job in todo:
        place = tree
        for key in job.path[:-1]:
            place = place.setdefault(key, {})
        place[job.path[-1]] = done[job.path]
    store_text(out, json.dumps(tree))
    return [job.name for job in todo if job.relax and not _converged(done[job.path])]


def single_points(structures: Sequence[Atoms], calculator: AllScAIPCalculator) -> list[Tree]:
    """Energy (eV) and forces (eV/Å) of structures, in one batch, as the leaderboard has them."""
    results = []
    for atoms, found in zip(structures, calculator.model.predict(structures), strict=True):
        atoms = atoms.copy()
        atoms.calc = SinglePointCalculator(atoms, energy=found.energy, forces=found.forces)
        results.append(_result(atoms))
    return results


def relaxation(start: Atoms, calculator: AllScAIPCalculator) -> Tree:
    """A structure before and after at most `STEPS` steps of LBFGS; one that does not come to rest,
    or that falls apart until the model has no answer, as it was last.
    """
    atoms = start.copy()
    calculator.reset()
    atoms.calc = calculator
    initial, last = _result(atoms), atoms.positions.copy()
    try:
        # ase's type leaves out the None that its documentation gives
        for _ in LBFGS(atoms, logfile=None).irun(fmax=FMAX, steps=STEPS):  # type: ignore[arg-type]
            if not np.isfinite(atoms.get_forces()).all():
                raise FloatingPointError
            last = atoms.positions.copy()
    except (ArithmeticError, ValueError):
        atoms.positions = last
    return {"initial": initial, "final": _result(atoms)}


def _result(atoms: Atoms) -> Tree:
    energy, forces = float(atoms.get_potential_energy()), atoms.get_forces()
    if not np.isfinite([energy, *forces.ravel()]).all():
        raise DataError(f"{atoms.symbols}: the model's energy or forces are not finite")
    bare = atoms.copy()
    bare.info = {}
    info = json.dumps(atoms.info, default=lambda value: getattr(value, "tolist", value.__str__)())
    return {
        "atoms": {
            "@module": "pymatgen.io.ase",
            "@class": "MSONAtoms",
            "atoms_json": encode(bare),
            "atoms_info": json.loads(info),
        },
        "energy": energy,
        "forces": forces.tolist(),
    }


def _converged(result: Tree) -> bool:
    return bool((np.linalg.norm(result["final"]["forces"], axis=1) < FMAX).all())


def _groups(todo: Sequence[Job], max_atoms: int) -> Iterator[list[Job]]:
    """Single points together as far as `max_atoms` goes, then relaxations one by one."""
    single = [job for job in todo if not job.relax]
    for members in fill_batches([len(job.atoms) for job in single], max_atoms):
        yield [single[index] for index in members]
    yield from ([job] for job in todo if job.relax)


def _resume(journal: Path, header: Tree) -> dict[Keys, Tree]:
    """What a journal has, after a half-written line is cut off; a new one where there is none."""
    content = journal.read_bytes() if journal.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        store_text(journal, _line(header))
        return {}
    head, *lines = whole.splitlines()
    if not (first := _entry(head)):
        raise RunError(f"{journal} is damaged in its first line: remove it to start anew")
    other = [name for name in header if first.get(name) != header[name]]
    if other:
        raise RunError(
            f"{journal} is of another {' and another '.join(other)}: "
            "give another --out, or remove this file to start anew"
        )
    if len(whole) < len(content):
        with journal.open("r+b") as stream:
            stream.truncate(len(whole))
    entries = [entry for line in lines if (entry := _entry(line)) and _is_result(entry)]
    if len(entries) < len(lines):
        warnings.warn(
            f"{journal}: {len(lines) - len(entries)} damaged lines, which are computed again",
            stacklevel=2,
        )
    return {tuple(entry["system"]): entry["result"] for entry in entries}


def _line(entry: Tree) -> str:
    """An entry of a journal, with its checksum."""
    return json.dumps({**entry, "check": _check(entry)}) + "\n"


def _entry(line: bytes) -> Tree | None:
    """The entry of a line; None of a line that is damaged."""
    try:
        entry = json.loads(line)
        right = entry.pop("check", None) in (None, _check(entry))  # older ones have no checksum
    except (AttributeError, RecursionError, TypeError, ValueError):
        return None
    return entry if right else None


def _is_result(entry: Tree) -> bool:
    kinds = {name: type(value) for name, value in entry.items()}
    return kinds == {"system": list, "result": dict}


def _check(entry: Tree) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(model: AllScAIP) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        values = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite leaderboard`."""
    parser.add_argument("task", choices=TASKS, metavar="task", help=", ".join(TASKS))
    parser.add_argument("model", help="a name such as lite, or a file (.safetensors or .pt)")
    parser.add_argument("inputs", type=Path, help="the task's inputs (.pkl or .json)")
    parser.add_argument("--out", type=Path, required=True, help="file of the predictions (.json)")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="results of the same shape, from DFT: print the errors against them",
    )
    parser.add_argument("--device", help="default: a CUDA GPU where there is one")
    parser.add_argument("--max-atoms", type=int, default=400, help="atoms of a batch")
    add_kernels_option(parser)


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite leaderboard`."""
    device = usable_device(args.device)
    model = load_model(args.model, device=device, kernels="plain")  # `predict` chooses
    reference = read(args.reference) if args.reference else None
    if reference is not None:  # before the work, not after
        check_systems(reference, [job.path for job in jobs(args.task, read(args.inputs))])
    with locked_file(args.out):
        options = {"max_atoms": args.max_atoms, "kernels": args.kernels, "progress": True}
        restless = predict(model, args.task, args.inputs, args.out, **options)
    print(f"written: {args.out}")
    if restless:
        print(f"{len(restless)} relaxations ended before {FMAX} eV/Å: {', '.join(restless[:5])}")
    if reference is not None:
        print(table(metrics(args.task, reference, read(args.out))))
