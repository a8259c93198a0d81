"""Charge and spin multiplicity of a structure, from whatever names programs write them under.

In: `ase.Atoms`, whose `info` states them or not. Out: two whole numbers that its electrons allow.
Everything in the package reads them with `charge_and_spin`.
"""

from __future__ import annotations

import math
import re
import reprlib
import warnings
from collections.abc import Mapping

import numpy as np
from ase import Atoms

from allscaip_lite.errors import StructureError, StructureWarning

MAX_CHARGE = 100  # the charge table has rows for -100 .. 100
MAX_MULTIPLICITY = 100
# Names in `atoms.info` under which programs write the total charge and the multiplicity 2S + 1;
# capitals do not matter, and a space or a hyphen is as good as an underscore.
CHARGE_NAMES = (
    "charge total_charge net_charge system_charge molecular_charge formal_charge tot_charge"
).split()
SPIN_NAMES = (
    "spin multiplicity spin_multiplicity molecular_multiplicity total_multiplicity mult spin_mult"
).split()
_PERHAPS = re.compile(
    "charge|chrg|spin|multipl|unpaired|uhf|magmom|magneti|(?:^|total_)2?[qs]$|^q_?tot"
)
NOT_GIVEN = ("", "none", "nan", "null")  # as text


# By what is not given and the charge and multiplicity taken for it: formulas, in order.
Assumptions = dict[tuple[str, int, int], dict[str, None]]


def stated_charge_and_spin(
    atoms: Atoms, where: object = "the structure"
) -> tuple[int | None, int | None]:
    """Total charge in e and multiplicity 2S + 1 that `atoms.info` states, None where it does not.

    The names are `CHARGE_NAMES` and `SPIN_NAMES`. Values are numbers, numbers as text, or arrays of
    one of these; None, not a number, and a multiplicity of 0 state nothing. Raises StructureError,
    which calls the structure `where`, for what is not a whole number, and for two names that
    contradict.
    """
    info: Mapping[object, object] = atoms.info
    found: list[int | None] = []
    for names in (CHARGE_NAMES, SPIN_NAMES):
        stated: dict[str, int] = {}
        for name, value in info.items():
            if isinstance(name, str) and _spelt(name) in names:
                number = _whole_number(value, name, where)
                if number is not None and not (number == 0 and names is SPIN_NAMES):
                    stated[name] = number
        if len(set(stated.values())) > 1:
            listed = " and ".join(f'atoms.info["{n}"] = {value}' for n, value in stated.items())
            raise StructureError(f"{where}: {listed} contradict each other; keep the right one")
        found.append(next(iter(stated.values()), None))
    return found[0], found[1]


def states_charge_or_spin(name: object) -> bool:
    """Whether a name in `info` is one of `CHARGE_NAMES` or `SPIN_NAMES`."""
    return isinstance(name, str) and _spelt(name) in CHARGE_NAMES + SPIN_NAMES


def state_charge_and_spin(atoms: Atoms, charge: int | None, spin: int | None) -> None:
    """Put them into `info`, where nothing else states them then; None states nothing."""
    for name in [name for name in atoms.info if states_charge_or_spin(name)]:
        del atoms.info[name]
    given = {"charge": charge, "spin": spin}
    atoms.info |= {name: value for name, value in given.items() if value is not None}


def state_where_missing(atoms: Atoms, where: object, charge: int | None, spin: int | None) -> None:
    """Put a charge and a multiplicity into `info` where it states none; None states nothing.

    What it states counts more, and a warning says so where that is something else. Raises
    StructureError as `stated_charge_and_spin`.
    """
    stated = stated_charge_and_spin(atoms, where)
    for name, said, asked in zip(("charge", "multiplicity"), stated, (charge, spin), strict=True):
        if None not in (said, asked) and said != asked:
            warnings.warn(
                f"{atoms.get_chemical_formula()}: {name} {said} is stated, and used, not the "
                f"{asked} asked for, which is for structures that state none",
                StructureWarning,
                stacklevel=3,
            )
    state_charge_and_spin(
        atoms,
        charge if stated[0] is None else stated[0],
        spin if stated[1] is None else stated[1],
    )


def _spelt(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def lowest_multiplicity(atoms: Atoms, charge: int) -> int:
    """1 for an even number of electrons, 2 for an odd one."""
    return 1 + (int(atoms.numbers.sum()) - charge) % 2


def charge_and_spin(
    atoms: Atoms,
    where: object = "the structure",
    assumed: Assumptions | None = None,
) -> tuple[int, int]:
    """Total charge in e and spin multiplicity 2S + 1 of a structure.

    Args:
        atoms: states them in its `info`, see `stated_charge_and_spin`.
        where: what messages call the structure.
        assumed: where the structure is noted if one of them had to be assumed: a charge of 0, or
            the lowest multiplicity that its electrons allow.

    Returns:
        The two numbers.

    Raises:
        StructureError: for what is not a whole number, for two names that contradict, and for a
            charge or multiplicity that the number of electrons forbids.
    """
    charge, spin = stated_charge_and_spin(atoms, where)
    missing = [
        name for name, value in (("charge", charge), ("multiplicity", spin)) if value is None
    ]
    charge = charge or 0
    electrons = int(atoms.numbers.sum()) - charge
    lowest = lowest_multiplicity(atoms, charge)
    spin = lowest if spin is None else spin
    if abs(charge) > MAX_CHARGE:
        raise StructureError(f"{where}: charge {charge:+d} is outside ±{MAX_CHARGE}")
    if electrons < 0:
        raise StructureError(f"{where}: charge {charge:+d} leaves fewer than no electrons")
    if not 0 < spin <= MAX_MULTIPLICITY:
        raise StructureError(f"{where}: multiplicity {spin} is outside 1 .. {MAX_MULTIPLICITY}")
    if spin % 2 == electrons % 2 or spin > electrons + 1:
        raise StructureError(
            f'{where}: atoms.info["spin"] = {spin} is the multiplicity 2S + 1, and {electrons} '
            f"electrons (charge {charge:+d}) do not allow it; the lowest they allow is {lowest}"
        )
    if assumed is not None:
        hint = _contradicted(atoms, charge, spin, missing)
        if missing or hint:
            case = (" and ".join(f"no {name}" for name in missing), charge, spin)
            assumed.setdefault(case, {})[f"{atoms.get_chemical_formula()}{hint}"] = None
    return charge, spin


def _contradicted(atoms: Atoms, charge: int, spin: int, missing: list[str]) -> str:
    """What contradicts: initial charges the charge, magnetic moments a multiplicity that is
    assumed. And, where something is, names in `info` that may say it, but in an unknown way.
    """
    told = []
    for name, value in atoms.info.items() if missing else ():
        unread = isinstance(name, str) and _PERHAPS.search(_spelt(name))
        if unread and not states_charge_or_spin(name) and np.ndim(value) == 0:
            told.append(f'info["{name}"] = {reprlib.repr(value)} is not read')
    if atoms.has("initial_charges"):
        charges = atoms.get_initial_charges()
        if charges.any() and abs(charges.sum() - charge) > 0.5:
            told.append(f"initial charges add up to {charges.sum():+.3g}")
    if "multiplicity" in missing and atoms.has("initial_magmoms"):
        moments = atoms.get_initial_magnetic_moments()
        total = float(np.linalg.norm(moments.sum(0)))  # of vectors too
        if np.any(moments) and abs(total + 1 - spin) > 0.5:
            told.append(f"initial magnetic moments say multiplicity {total + 1:.3g}")
    return f" (whose {' and whose '.join(told)})" if told else ""


def say_assumptions(assumed: Assumptions, said: set[str] | None = None) -> None:
    """Warn of charges and multiplicities that were assumed, one warning a distinct case.

    Formulas and cases in `said` were mentioned before and are left out; new ones are added to it.
    """
    for (missing, charge, spin), formulas in assumed.items():
        taken = f"charge {charge:+d}, multiplicity {spin} are "
        taken = (
            f"{missing} in atoms.info: {taken}assumed" if missing else f"{taken}stated, and used"
        )
        new = [name for name in formulas if said is None or f"{name}: {taken}" not in said]
        if not new:
            continue
        if said is not None:
            said |= {f"{name}: {taken}" for name in new}
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        rule = " (neutral and the lowest where nothing is said)" if missing else ""
        warnings.warn(
            f"{', '.join(new[:5])}{more}: {taken}{rule}. "
            'Set atoms.info["charge"] and atoms.info["spin"], the multiplicity 2S + 1',
            StructureWarning,
            stacklevel=3,
        )


def _whole_number(value: object, name: str, where: object) -> int | None:
    """A charge or a multiplicity, which some programs write as -0.9999; None if none is given."""
    single = _single(value)
    if single is None or (isinstance(single, str) and single.strip().lower() in NOT_GIVEN):
        return None
    if isinstance(single, (int, float, str)) and not isinstance(single, bool):
        try:
            number = float(single)
            if math.isnan(number):
                return None
            if abs(number - round(number)) < 0.01:
                return round(number)
        except (OverflowError, ValueError):  # infinite, or no number at all
            pass
    raise StructureError(
        f'{where}: atoms.info["{name}"] = {reprlib.repr(single)} is not a whole number'
    )


def _single(value: object) -> object:
    """The value itself, or the only one of an array or a list."""
    if hasattr(value, "detach"):  # a tensor of torch, which is slow to import for this alone
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic, list, tuple)):
        array = np.asarray(value, dtype=object)
        value = array.item() if array.size == 1 else value
    return value.item() if isinstance(value, np.generic) else value
