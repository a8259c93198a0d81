"""GFN2-xTB as a teacher: what labels structures on a laptop, and the command that makes a data set.

Comes in: nothing but the tables of species below (SMILES of common molecules). Goes out:
`{train,val,test}.aselmdb` with energies (eV) and forces (eV/Å), split by molecule, and
`references.json` with the energies of the free atoms. Structures come from RDKit conformers and
random assemblies of molecules, short Langevin runs, turned bonds and random displacements.

Teacher: GFN2-xTB (Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652, 2019), with spin
polarisation, by the tblite library. Metadata follow OMol25 (arXiv:2505.08762).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, CalculatorError, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, covalent_radii
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

from allscaip_lite.data import (
    SPLITS,
    Dataset,
    checksum,
    split_by_molecule,
    store_text,
    write_aselmdb,
)
from allscaip_lite.workers import in_processes

# --- The teacher -----------------------------------------------------------------------------


class GFN2xTB(Calculator):
    """ASE calculator: GFN2-xTB with spin polarisation.

    Charge and spin multiplicity come from `atoms.info["charge"]` and `["spin"]`; absent means
    neutral and the lowest multiplicity. Results: energy (eV), forces (N, 3) (eV/Å), stress (6,)
    (eV/Å³) of a periodic system, homo_lumo_gap [eV], one number for each occupied spin channel.
    `accuracy` scales tblite's SCF thresholds (smaller is tighter). A step of a trajectory starts
    from the electronic state of the step before; `reset()` forgets it.

    Raises CalculatorError for a multiplicity that the electron count forbids and for an SCF that
    does not converge.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, accuracy: float = 1.0) -> None:
        super().__init__()
        self.accuracy = accuracy
        self._key, self._tblite, self._state = None, None, None

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last call; charge and spin in `atoms.info` count too."""
        changes = super().check_state(atoms, tol)
        if self._key is not None and _charge_and_spin(atoms) != self._key[:2]:
            changes.append("info")
        return changes

    def reset(self) -> None:
        super().reset()
        self._key, self._tblite, self._state = None, None, None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        from tblite.exceptions import TBLiteRuntimeError
        from tblite.interface import Calculator as TBLite

        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        charge, spin = _charge_and_spin(atoms)
        positions = atoms.positions / units.Bohr
        lattice = atoms.cell.array / units.Bohr if atoms.pbc.any() else None
        key = (charge, spin, tuple(atoms.numbers), tuple(atoms.pbc))
        try:
            if key != self._key:
                self._state = None
                self._tblite = TBLite(
                    "GFN2-xTB", atoms.numbers, positions, charge, spin - 1, lattice, atoms.pbc
                )
                self._tblite.set("verbosity", 0)
                self._tblite.set("accuracy", self.accuracy)
                self._tblite.add("spin-polarization", 1.0)
                self._key = key
            else:
                self._tblite.update(positions, lattice)
            self._state = self._tblite.singlepoint(self._state)
        except TBLiteRuntimeError as error:
            self.reset()
            raise CalculatorError(
                f"GFN2-xTB failed for {atoms.symbols}, charge {charge}, "
                f"multiplicity {spin}: {error}"
            ) from error
        energy = float(self._state["energy"]) * units.Hartree
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": -np.asarray(self._state["gradient"]) * (units.Hartree / units.Bohr),
            "homo_lumo_gap": _gaps(self._state, spin),
        }
        if lattice is not None:
            stress = np.asarray(self._state["virial"]) * (units.Hartree / atoms.get_volume())
            self.results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def _charge_and_spin(atoms: Atoms) -> tuple[int, int]:
    charge = int(atoms.info.get("charge", 0))
    electrons = int(atoms.numbers.sum()) - charge
    return charge, int(atoms.info.get("spin", 0)) or 1 + electrons % 2


def _gaps(state, spin: int) -> list[float]:
    """HOMO–LUMO gaps in eV: one of a singlet, of alpha and beta spins else."""
    levels = np.atleast_2d(state["orbital-energies"]) * units.Hartree
    filled = np.atleast_2d(state["orbital-occupations"]) > 0.5
    gaps = []
    for level, full in zip(levels, filled, strict=True):
        if full.any() and not full.all():
            gaps.append(round(float(level[~full].min() - level[full].max()), 6))
    return gaps[:1] if spin == 1 else gaps


def free_atom_energies(elements: Iterable[str]) -> dict[str, float]:
    """GFN2-xTB energy in eV of each free neutral atom, in its lowest multiplicity state."""
    energies = {}
    for element in elements:
        number = atomic_numbers[element]
        tried = []
        for spin in range(1 + number % 2, 6, 2):
            atom = Atoms(element, info={"charge": 0, "spin": spin})
            atom.calc = GFN2xTB(accuracy=0.1)
            try:
                tried.append(atom.get_potential_energy())
            except CalculatorError:
                continue  # more unpaired electrons than the valence shell has room for
        energies[element] = min(tried)
    return energies


# --- Species ---------------------------------------------------------------------------------
# One word each: SMILES, or SMILES|charge|multiplicity where these are not those of the SMILES
# with the fewest unpaired electrons.

ORGANIC = """
[H][H] N#N [C-]#[O+] O=C=O O N F Cl Br I S P OO FF ClCl BrBr ClI FCl NN NO N=N OCl N#CC#N C CC CCC
CCCC CC(C)C CCCCC CCC(C)C CC(C)(C)C CCCCCC CCCCCCC CCCCCCCC C1CC1 C1CCC1 C1CCCC1 C1CCCCC1 CC1CCCCC1
C1CC2CCC1C2 C1C2CC3CC1CC(C2)C3 C12C3C4C1C5C4C3C25 C=C CC=C C=CC=C C/C=C/C C/C=C\\C CC(C)=C CC(C)=CC
C#C CC#C CC#CC C=C=C C=CC#C C=CC=CC=C C1CC=CCC1 C1C=CC=C1 C1=CCCC1 C1CC=C1 CO CCO CCCO CC(C)O
CC(C)(C)O CCCCO CCC(C)O OCCO OCC(O)CO OCCCO CC(O)CO OC1CCCCC1 C=CCO C#CCO COCO COC CCOCC CCOC C1CO1
CC1CO1 C1COC1 C1CCOC1 C1CCOCC1 C1COCO1 C1COCCO1 COCCOC COCOC COCCO COO COOC CN CNC CN(C)C CCN CCNCC
CCCN CC(C)N NCCN NCCO CNN C1CN1 C1CNC1 C1CCNC1 C1CCNCC1 C1COCCN1 C1CNCCN1 C=N CC=N CN=C C=NO CC=NO
CC(C)=NO NC=N CC(=N)N NC(=N)N CN=NC CON NC#N CN(C)C#N C1CN2CCN1CC2 C=O CC=O CCC=O CC(C)=O CCC(C)=O
CC(C)C=O C1CCC(=O)C1 C1CCC(=O)CC1 O=CC=O CC(=O)C(C)=O CC(=O)CC(C)=O C=CC=O CC=CC=O C=CC(C)=O C=C=O
OC=O CC(=O)O CCC(=O)O CCCC(=O)O CC(C)C(=O)O OC(=O)C(=O)O OC(=O)CC(=O)O OC(=O)CCC(=O)O
OC(=O)/C=C/C(=O)O OC(=O)/C=C\\C(=O)O C=CC(=O)O CC(O)C(=O)O CC(=O)C(=O)O OCC(=O)O
OC(=O)CC(O)(CC(=O)O)C(=O)O OC(C(O)C(=O)O)C(=O)O COC=O CC(=O)OC CCOC(C)=O C=COC(C)=O C=CC(=O)OC
CC(=O)OC(C)=O O=C1CCCO1 O=C1OCCO1 CC1COC(=O)O1 COC(=O)OC NC=O CNC=O CN(C)C=O CC(N)=O CC(=O)NC
CC(=O)N(C)C NC(N)=O CNC(=O)NC C=CC(N)=O O=C1CCCN1 CN1CCCC1=O O=C1CCC(=O)N1 NC(=O)C(N)=O NNC=O
COC(N)=O O=C1CC(=O)NC(=O)N1 O=C1NCCN1 CC(=O)NO C#N CC#N CCC#N C=CC#N N#CCC#N N#CC(C#N)=C(C#N)C#N
CN=C=O C[N+]#[C-] CN=[N+]=[N-] C=[N+]=[N-] C[N+](=O)[O-] CC[N+](=O)[O-] C=C[N+](=O)[O-] ON=O
O[N+](=O)[O-] CO[N+](=O)[O-] CON=O [N-]=[N+]=O [O-][O+]=O C[N+](C)(C)[O-] [O-][n+]1ccccc1
N=[N+]=[N-] c1ccccc1 Cc1ccccc1 CCc1ccccc1 Cc1ccccc1C Cc1cccc(C)c1 Cc1ccc(C)cc1 C=Cc1ccccc1
C#Cc1ccccc1 Oc1ccccc1 Cc1ccc(O)cc1 Oc1ccccc1O Oc1cccc(O)c1 Oc1ccc(O)cc1 COc1ccccc1 OCc1ccccc1
Nc1ccccc1 CN(C)c1ccccc1 Nc1ccc(N)cc1 Nc1ccccc1O N#Cc1ccccc1 O=Cc1ccccc1 CC(=O)c1ccccc1
OC(=O)c1ccccc1 NC(=O)c1ccccc1 COC(=O)c1ccccc1 [O-][N+](=O)c1ccccc1 [O-][N+](=O)c1ccc(O)cc1
Nc1ccc([N+](=O)[O-])cc1 c1ccc2ccccc2c1 c1ccc2cccc2cc1 C1C=Cc2ccccc21 c1ccc(-c2ccccc2)cc1
c1ccc2cc3ccccc3cc2c1 O=C1C=CC(=O)C=C1 O=C1NC(=O)c2ccccc12 OC(=O)c1ccccc1O OC(=O)c1ccc(C(=O)O)cc1
c1ccc(N=Nc2ccccc2)cc1 c1ccncc1 Cc1ccncc1 Nc1ccccn1 Oc1ccccn1 O=c1cccc[nH]1 CN(C)c1ccncc1 c1ccnnc1
c1cncnc1 c1cnccn1 c1ncncn1 Nc1nc(N)nc(N)n1 c1cc[nH]c1 Cn1cccc1 c1ccoc1 Cc1ccco1 O=Cc1ccco1 c1ccsc1
Cc1cccs1 c1c[nH]cn1 Cn1ccnc1 Cc1c[nH]cn1 c1cn[nH]c1 c1cocn1 c1cnoc1 c1cscn1 c1nc[nH]n1 c1c[nH]nn1
c1nnn[nH]1 c1nncs1 c1nnco1 c1ccc2[nH]ccc2c1 c1ccc2[nH]cnc2c1 c1ccc2occc2c1 c1ccc2sccc2c1
c1ccc2ncccc2c1 c1ccc2cnccc2c1 c1ccc2nccnc2c1 c1ccc(-c2ccccn2)nc1 c1ncc2[nH]cnc2n1 O=c1ccc2ccccc2o1
Nc1ncnc2[nH]cnc12 Nc1nc2[nH]cnc2c(=O)[nH]1 Nc1cc[nH]c(=O)n1 Cc1c[nH]c(=O)[nH]c1=O
O=c1cc[nH]c(=O)[nH]1 Cn1ccc(=O)[nH]c1=O O=c1[nH]cnc2[nH]cnc12 O=c1[nH]c(=O)c2[nH]cnc2[nH]1
Cn1c(=O)c2[nH]cnc2n(C)c1=O Cn1cnc2c1c(=O)[nH]c(=O)n2C CN1C=NC2=C1C(=O)N(C(=O)N2C)C
Cn1cnc2c(N)ncnc12 NCC(=O)O CNCC(=O)O NCCC(=O)O NCCCC(=O)O C[C@H](N)C(=O)O N[C@@H](CO)C(=O)O
N[C@@H](CS)C(=O)O CC(C)[C@H](N)C(=O)O OC(=O)[C@@H]1CCCN1 C[C@@H](O)[C@H](N)C(=O)O
N[C@@H](CC(N)=O)C(=O)O N[C@@H](CC(=O)O)C(=O)O N[C@@H](CCC(=O)O)C(=O)O N[C@@H](CCC(N)=O)C(=O)O
CC(C)C[C@H](N)C(=O)O N[C@@H](Cc1ccccc1)C(=O)O N[C@@H](Cc1ccc(O)cc1)C(=O)O
N[C@@H](Cc1c[nH]cn1)C(=O)O N[C@@H](Cc1c[nH]c2ccccc12)C(=O)O CSCC[C@H](N)C(=O)O NCCCC[C@H](N)C(=O)O
CC(=O)NCC(=O)NC CC(=O)N[C@@H](C)C(=O)NC NCC(=O)NCC(=O)O NCC(N)=O CC(=O)NCC(=O)O
C[N+](C)(C)CC(=O)[O-] CC(=O)Oc1ccccc1C(=O)O CC(=O)Nc1ccc(O)cc1 CC(=O)Nc1ccccc1 CN1CCC[C@H]1c1cccnc1
NCCc1ccc(O)c(O)c1 NCCc1ccccc1 NCCc1c[nH]c2ccc(O)cc12 NCCc1c[nH]cn1 CNC[C@H](O)c1ccc(O)c(O)c1
COc1cc(C=O)ccc1O OC[C@H](O)[C@H]1OC(=O)C(O)=C1O OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O
OC[C@H]1OC(O)[C@H](O)[C@@H]1O NC(=O)c1cccnc1 OC(=O)c1cccnc1 NNC(=O)c1ccncc1 CN(C)C(=N)NC(N)=N
CN(CC(=O)O)C(N)=N CCOC(=O)c1ccc(N)cc1 O=CC=Cc1ccccc1 CC1=CCC(CC1)C(C)=C CC1(C)C2CCC1(C)C(=O)C2
COc1cc(CC=C)ccc1O
"""

HETEROATOMS = """
CS CCS CSC CCSC CSSC SS SCCS C1CS1 C1CCSC1 Sc1ccccc1 CSc1ccccc1 CS(C)=O CS(C)(=O)=O O=S=O O=S(=O)=O
S=C=S O=C=S C=S CC(C)=S NC=S CC(N)=S NC(N)=S CSC#N CN=C=S CC(=O)S CC(=O)SC CS(=O)(=O)O OS(=O)(=O)O
CS(N)(=O)=O NS(N)(=O)=O NCCS(=O)(=O)O OS(=O)O COS(=O)(=O)OC O=S1(=O)CCCC1 FS(F)(F)(F)(F)F O=S(F)F
O=S(=O)(F)F O=S(Cl)Cl ClSCl FS(F)(F)F CS(=O)(=O)Cl Nc1ccc(S(N)(=O)=O)cc1 O=C1NS(=O)(=O)c2ccccc12
OS(=O)(=O)c1ccccc1 CF FCF FC(F)F FC(F)(F)F CCF FCCF CC(F)F CC(F)(F)F FC(F)C(F)F C=CF FC=CF C=C(F)F
FC(F)=C(F)F Fc1ccccc1 Fc1ccc(F)cc1 Fc1c(F)c(F)c(F)c(F)c1F FC(F)(F)c1ccccc1 OCC(F)(F)F
OC(=O)C(F)(F)F CC(=O)F O=CF O=C(F)F CC(=O)C(F)(F)F FN(F)F FOF NF COCF C#CF N#CF CCl ClCCl ClC(Cl)Cl
ClC(Cl)(Cl)Cl CCCl ClCCCl CC(Cl)Cl CC(C)Cl C=CCl C=C(Cl)Cl Cl/C=C/Cl Cl/C=C\\Cl ClC=C(Cl)Cl
ClC(Cl)=C(Cl)Cl C#CCl N#CCl Clc1ccccc1 Clc1ccc(Cl)cc1 Clc1ccccc1Cl OC(=O)CCl CC(=O)Cl O=C(Cl)Cl
O=CCl NCl CNCl COCl ClOCl ClN(Cl)Cl FC(Cl)(Cl)Cl FC(F)(Cl)Cl FC(F)(F)Cl FCCl Clc1ccncc1
Oc1ccc(Cl)cc1 Nc1ccc(Cl)cc1 O=NCl CBr BrCBr BrC(Br)Br CCBr BrCCBr C=CBr C#CBr N#CBr Brc1ccccc1
Brc1ccc(Br)cc1 CC(=O)Br OC(=O)CBr FCBr ClCBr FC(F)(F)Br COBr OBr CC(C)Br Brc1ccncc1 Brc1cccs1
CC(Br)C(=O)O CI ICI CCI ICCI C=CI C#CI N#CI Ic1ccccc1 FC(F)(F)I FCI ClCI OC(=O)CI CC(C)I
Ic1ccc(I)cc1 Ic1ccncc1 BrI II OI CP CPC CP(C)C PP FP(F)F ClP(Cl)Cl BrP(Br)Br O=P(Cl)(Cl)Cl
O=P(F)(F)F OP(O)(O)=O O[PH](=O)O CP(C)(C)=O COP(=O)(OC)OC COP(O)(O)=O CP(=O)(O)O CP(=O)(OC)OC
COP(OC)OC FP(F)(F)(F)F C#P C=P Pc1ccccc1 CP(C)(C)=S OP(=O)(O)OP(=O)(O)O CCOP(=O)(O)O NCCOP(=O)(O)O
S=P(Cl)(Cl)Cl CP(Cl)Cl C[P](C)(C)=C OB(O)O COB(OC)OC CB(C)C CB(O)O OB(O)c1ccccc1 FB(F)F ClB(Cl)Cl
BrB(Br)Br [BH3-][NH3+] B1NBNBN1 F[B-](F)(F)[NH3+] [BH3-][N+](C)(C)C CBO NB C=CB(O)O CB(F)F OBO
CN(C)B(C)C [SiH4] C[SiH3] C[SiH2]C C[SiH](C)C C[Si](C)(C)C [SiH3][SiH3] F[Si](F)(F)F
Cl[Si](Cl)(Cl)Cl O[Si](O)(O)O C[Si](C)(C)O C[Si](C)(C)Cl C[Si](C)(C)F [SiH3]O[SiH3] C[Si](C)(C)OC
N[SiH3] C[SiH2]O C=C[SiH3] C#C[SiH3] [SiH3]c1ccccc1 Cl[SiH](Cl)Cl C[Si](Cl)(Cl)Cl CO[SiH3]
C[Si](C)(C)C#N [SiH3]S
"""

# Each substituent with each group at its end.
SUBSTITUENTS = """
C CC CCC CC(C) CC(C)(C) C=C C=CC C#C C1CC1 C1CCCC1 c1ccccc1 c1ccncc1 c1ccoc1 c1ccsc1
"""
GROUPS = """
O OC N NC N(C)C F Cl Br S SC C#N C=O C(C)=O C(=O)O C(=O)OC C(N)=O C(=O)NC NC=O NC(C)=O OC=O OC(C)=O
[N+](=O)[O-] S(C)=O S(C)(=O)=O S(N)(=O)=O C(F)(F)F OC(F)F N=C=O C=NO CO CN CF CCl NC(N)=O NN
P(=O)(O)O OP(=O)(O)O B(O)O [Si](C)(C)C
"""

IONS = """
[OH3+] [NH4+] [SH3+] [PH4+] C[OH2+] CC[OH2+] C[OH+]C C=[OH+] CC=[OH+] CC(C)=[OH+] OC=[OH+]
CC(O)=[OH+] NC=[OH+] CC(N)=[OH+] C[NH3+] C[NH2+]C C[NH+](C)C C[N+](C)(C)C CC[NH3+] CC(C)[NH3+]
C[NH+]=C C=[NH2+] CC(C)=[NH2+] CC#[NH+] NC(N)=[NH2+] CC(N)=[NH2+] NCC[NH3+] OCC[NH3+]
[NH3+]CC[NH3+] [NH3+]N O[NH3+] C1CC[NH2+]C1 C1CC[NH2+]CC1 C1COCC[NH2+]1 c1cc[nH+]cc1 c1c[nH]c[nH+]1
Cn1cc[n+](C)c1 Nc1cc[nH+]cc1 C[n+]1ccccc1 [NH3+]c1ccccc1 [NH3+]CC(=O)O C[C@H]([NH3+])C(=O)O
OC(=O)[C@@H]1CCC[NH2+]1 [NH3+]CCCC[C@H](N)C(=O)O Nc1[nH+]cnc2[nH]cnc12 Nc1cc[nH]c(=O)[nH+]1
OCC[N+](C)(C)C CC(=O)OCC[N+](C)(C)C C[S+](C)C C[SH2+] C[PH3+] C[P+](C)(C)C C[C+](C)C C=C[CH2+]
[CH2+]c1ccccc1 [cH+]1cccccc1 CC#[O+] O=[N+]=O N#[O+] C[O+](C)C [NH3+]CC(N)=O c1ccc2[nH+]cccc2c1
Cc1c[nH]c[nH+]1 [OH-] C[O-] CC[O-] CC(C)[O-] [O-]c1ccccc1 [O-]C=C O=C[O-] CC(=O)[O-] CCC(=O)[O-]
C=CC(=O)[O-] CC(O)C(=O)[O-] CC(=O)C(=O)[O-] OCC(=O)[O-] NCC(=O)[O-] C[C@H](N)C(=O)[O-]
N[C@@H](CO)C(=O)[O-] N[C@@H](CS)C(=O)[O-] OC(=O)C(=O)[O-] OC(=O)CC(=O)[O-] O=C([O-])c1ccccc1
OC1=CC=CC=C1C(=O)[O-] O=C([O-])C(F)(F)F OC(=O)[O-] CC(=O)[CH-]C(C)=O [C-]#N [O-]C#N [S-]C#N [SH-]
C[S-] [S-]c1ccccc1 [N-]=[N+]=[N-] O=[N+]([O-])[O-] O=N[O-] [CH2-][N+](=O)[O-] [NH2-] C[NH-] [C-]#C
[cH-]1cccc1 c1c[n-]cn1 c1cc[n-]c1 CS(=O)(=O)[O-] OS(=O)(=O)[O-] OS(=O)[O-] FC(F)(F)S(=O)(=O)[O-]
OP(=O)(O)[O-] COP(=O)(O)[O-] O=P([O-])(F)F F[B-](F)(F)F F[P-](F)(F)(F)(F)F [BH4-] O=Cl(=O)(=O)[O-]
[O-]Cl [O-]O O=S(=O)([N-]S(=O)(=O)C(F)(F)F)C(F)(F)F N#C[N-]C#N [O-]S(=O)(=O)[O-]
O=C([O-])CCC(=O)[O-] O=C([O-])C(=O)[O-] OP(=O)([O-])[O-] O=c1cc[n-]c(=O)[nH]1 CC(=O)[N-]C
Cc1ccc([O-])cc1 [O-][N+](=O)c1ccc([O-])cc1 [NH3+]CC(=O)[O-] OB([O-])O C[SiH2][O-] O=S([O-])CO
"""

RADICALS = """
[CH3] C[CH2] CC[CH2] C[CH]C CCC[CH2] CC[CH]C C[C](C)C [CH2]C1CC1 C1CCCC[CH]1 C=[CH] [CH2]C=C C#[C]
[CH2]C#C [OH] C[O] CC[O] CC(C)[O] [O]O CO[O] CCO[O] [NH2] C[NH] C[N]C [SH] C[S] [S]c1ccccc1 [C]#N
[N]=O O=[N+][O-] [CH]=O C[C]=O O=[C]O [O]C=O CC(=O)[O] [CH2]C=O [CH2]C(C)=O [CH2]C(=O)O [CH2]C(N)=O
[CH2]O C[CH]O CC(C)(C)[O] [CH2]OC [CH2]N [CH2]NC [CH2]S [CH2]SC N[CH]C(=O)O [CH2]C#N [CH2]F F[CH]F
F[C](F)F [CH2]Cl Cl[C](Cl)Cl [CH2]Br [CH2]CO OC[CH]O [O]c1ccccc1 [CH2]c1ccccc1 [NH]c1ccccc1
[c]1ccccc1 [CH]1C=CC=C1 [CH2]c1ccco1 [SiH3] C[Si](C)C [PH2] C[P]C [O]P(=O)(O)O [BH2] [O]Cl [O]Cl=O
[O]F [O]Br [N]=[N+]=[N-] CN([O])C CC1(C)CCCC(C)(C)N1[O] [O]N=C [O]c1ccc(O)cc1 CS([O])=O [O]S(=O)O
[O-][O] c1ccccc1|1|2 c1ccc2ccccc2c1|1|2 c1ccc2ccccc2c1|-1|2 Nc1ccccc1|1|2 COc1ccccc1|1|2 N|1|2
O|1|2 CO|1|2 C=O|1|2 C=C|1|2 C=CC=C|1|2 CN(C)C|1|2 CSC|1|2 c1ccsc1|1|2 c1ccoc1|1|2 c1cc[nH]c1|1|2
O=C1C=CC(=O)C=C1|-1|2 C[N+](=O)[O-]|-1|2 [O-][N+](=O)c1ccccc1|-1|2 N#CC(C#N)=C(C#N)C#N|-1|2
O=S=O|-1|2 CC(C)=O|1|2 CI|1|2 CCl|1|2 Oc1ccccc1|1|2 [O][O]|0|3 [O][O]|0|1 [CH2]|0|3 [CH2]|0|1
[NH]|0|3 C[CH]|0|3 C[N]|0|3 [O][S]|0|3 [S][S]|0|3 [SiH2]|0|3 [SiH2]|0|1 [PH]|0|3 F[C]F|0|1
F[C]F|0|3 Cl[C]Cl|0|1 Cl[C]Cl|0|3 [CH]c1ccccc1|0|3 [N]c1ccccc1|0|3 C=C|0|3 CC=C|0|3 C=CC=C|0|3
C=O|0|3 CC=O|0|3 CC(C)=O|0|3 O=CC=O|0|3 c1ccccc1|0|3 c1ccc2ccccc2c1|0|3 c1ccncc1|0|3
O=C1C=CC(=O)C=C1|0|3 [CH2]CC[CH2]|0|3 O=Cc1ccccc1|0|3 C#C|0|3 c1ccoc1|0|3 c1ccsc1|0|3 C=CC=O|0|3
N=N|0|3 C[C]C|0|3 [O]O[O]|0|3 [CH]C=C|0|3 [CH]|0|4
"""

DISSOLVED = "[Li+] [Na+] [K+] [Mg+2] [Ca+2] [F-] [Cl-] [Br-] [OH-] [NH4+] [OH3+]"
ION_PAIRS = """
[Li+].[F-] [Li+].[Cl-] [Li+].[OH-] [Na+].[F-] [Na+].[Cl-] [Na+].[Br-] [Na+].[OH-] [K+].[F-]
[K+].[Cl-] [K+].[Br-] [Mg+2].[Cl-] [Ca+2].[Cl-] [Ca+2].[F-] [NH4+].[Cl-] [Li+].F[P-](F)(F)(F)(F)F
[Na+].CC(=O)[O-] [K+].O=[N+]([O-])[O-] [Ca+2].O=C([O-])[O-] C[NH3+].CC(=O)[O-] C[N+](C)(C)C.[Cl-]
Cn1cc[n+](C)c1.F[B-](F)(F)F [Li+].O=C1OCCO1 [Li+].COC(=O)OC [Na+].NC=O [K+].c1ccccc1 [Na+].c1ccccc1
[Mg+2].OP(=O)([O-])[O-]
"""
SOLUTES = """
C CC CCC CO CCO CC(C)O OCCO COC C1CCOC1 C=O CC=O CC(C)=O OC=O CC(=O)O CC(=O)OC NC=O CC(N)=O
CC(=O)NC CN(C)C=O NC(N)=O N CN CNC CN(C)C CC#N C#N C[N+](=O)[O-] c1ccccc1 Oc1ccccc1 Nc1ccccc1
c1ccncc1 c1cc[nH]c1 c1c[nH]cn1 O=c1cc[nH]c(=O)[nH]1 Nc1ncnc2[nH]cnc12 Nc1cc[nH]c(=O)n1 NCC(=O)O
C[C@H](N)C(=O)O N[C@@H](CO)C(=O)O CN1C=NC2=C1C(=O)N(C(=O)N2C)C S CS CSC CS(C)=O CS(C)(=O)=O CF
FC(F)F CCl ClC(Cl)Cl CBr F Cl OO O=C=O [O][O]|0|3 OP(O)(O)=O OB(O)O C[Si](C)(C)O C[NH3+] CC(=O)[O-]
[NH3+]CC(=O)[O-] O=C[O-] [CH3] [O]O OS(=O)(=O)O O[N+](=O)[O-] [OH] CC(=O)N[C@@H](C)C(=O)NC C=C C#C
"""
DIMERS = """
C.C CC.CC C.CO CO.CO CCO.CCO N.N N.CO CC(=O)O.CC(=O)O OC=O.OC=O NC=O.NC=O CC(N)=O.CC(N)=O
CC(=O)NC.CO C=O.CO CC(C)=O.CO CC(C)=O.ClC(Cl)Cl C#N.C#N CC#N.CC#N c1ccccc1.c1ccccc1 c1ccccc1.C
c1ccccc1.N c1ccccc1.CO c1ccncc1.c1ccncc1 c1ccccc1.Oc1ccccc1 Oc1ccccc1.CO c1cc[nH]c1.c1ccncc1
c1c[nH]cn1.c1c[nH]cn1 C#C.C=C C=C.C=C S.S CS.CO CSC.CS F.F F.Cl Cl.N CF.CF CCl.CCl CBr.N CI.N
ClC(Cl)Cl.N O=C=O.O=C=O O=C=O.N O=S=O.N C[N+](=O)[O-].CO Nc1ncnc2[nH]cnc12.Cc1c[nH]c(=O)[nH]c1=O
Nc1nc2[nH]cnc2c(=O)[nH]1.Nc1cc[nH]c(=O)n1 O=c1cc[nH]c(=O)[nH]1.O=c1cc[nH]c(=O)[nH]1
NCC(=O)O.NCC(=O)O C[NH3+].c1ccccc1 CC(=O)[O-].CO C[NH3+].CO CC(=O)[O-].NC(N)=[NH2+] FB(F)F.N
OP(O)(O)=O.CO [SiH4].N C[Si](C)(C)C.C [H][H].C=C BrBr.N ClCl.N FCl.N CCCC.CCCC C1CCCCC1.C CO.CN
CN.CN CS(C)=O.CO CN(C)C=O.CO OO.OO Fc1c(F)c(F)c(F)c(F)c1F.c1ccccc1
"""

# --- families --------------------------------------------------------------------------------
# Written as patterns and thinned by a hash: volume, and molecules nobody would think of listing.

# Two groups on one core: of all pairs, a fifth.
CORES = """
C({})C{} C({})CC{} C({})CCC{} C({})=C{} C({})#C{} C({})C=CC{} CC({}){} C({})OC{} C({})SC{}
C1({})CC1{} C({})C(=O){} C({})NC(=O)C{} c1({})ccc({})cc1 c1({})cccc({})c1 c1({})ccccc1{}
c1({})ccc({})nc1 c1({})ccc({})o1 c1({})cc({})sc1 C1({})CCC({})CC1 CC({})(C){}
"""
AMINO_ACIDS = """
NCC(=O) N[C@@H](C)C(=O) N[C@@H](CO)C(=O) N[C@@H](CS)C(=O) N[C@@H](C(C)C)C(=O)
N[C@@H]([C@H](O)C)C(=O) N1CCC[C@H]1C(=O) N[C@@H](CC(N)=O)C(=O) N[C@@H](CC(=O)O)C(=O)
N[C@@H](CC(C)C)C(=O) N[C@@H](CCC(=O)O)C(=O) N[C@@H](CCC(N)=O)C(=O) N[C@@H](CCSC)C(=O)
N[C@@H](Cc1c[nH]cn1)C(=O) N[C@@H](Cc1ccccc1)C(=O) N[C@@H](Cc1ccc(O)cc1)C(=O) N[C@@H](CCCCN)C(=O)
"""
CHARGED_GROUPS = """
[NH3+] [NH2+]C C[NH3+] [N+](C)(C)C C(=[NH2+])N [O-] [S-] C(=O)[O-] CC(=O)[O-] OP(=O)(O)[O-]
S(=O)(=O)[O-] C(=O)[N-]C
"""
# Two of one sign on one core: doubly charged, -2 and +2.
DOUBLY_CHARGED = """
[NH3+]{}[NH3+] C[NH2+]{}[NH3+] [O-]C(=O){}C(=O)[O-] [O-]{}C(=O)[O-] [O-]{}[O-] [S-]{}C(=O)[O-]
[O-]S(=O)(=O){}C(=O)[O-]
"""
SPACERS = "CC CCC CCCC C=C C1CC1 c1ccc(cc1) c1cccc(c1) CCOCC CNC"
RADICAL_SITES = "[CH2] [CH2]C C[CH] [CH2]c1ccccc1 [CH2]C=C [O]C [NH] [CH2]O [CH2]N [S]C"
PARTNERS = """
O N C F S CO CN CF CS CCl CBr C=O C#N C=C C#C CC CCO COC CC=O CC#N OC=O NC=O CC(N)=O CC(=O)O CC(C)=O
CNC=O O=C=O O=S=O C1CO1 C1CCOC1 c1ccccc1 c1ccncc1 c1cc[nH]c1 c1c[nH]cn1 c1ccoc1 c1ccsc1 Oc1ccccc1
Nc1ccccc1 CSC CS(C)=O CS C[N+](=O)[O-] FC(F)F ClC(Cl)Cl OO NO NN FB(F)F C[SiH3] CP OP(O)(O)=O
NC(N)=O CNC
"""
LIGANDS = """
O N S CO C=O NC=O CC#N [OH-] [SH-] [Cl-] [F-] [Br-] O=C[O-] C[S-] CC(=O)[O-] c1c[nH]cn1 c1ccncc1 CSC
"""
METALS = "[Zn+2] [Mg+2] [Ca+2] [Li+] [Na+] [K+]"
MOST_ATOMS = 40

# Held out on purpose, whatever the hash says. Names are those of `System.molecule`.
CAFFEINE = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"
GLYCINE = "NCC(=O)O"
WATER = "O"
HELD_OUT = {
    CAFFEINE: "test",  # with all that contains it
    f"{GLYCINE}.{WATER}": "test",
    f"{GLYCINE}.{WATER}.{WATER}": "test",
    ".".join([WATER] * 7): "test",
    ".".join(["[Na+]"] + [WATER] * 4): "test",
    ".".join(["[Cl-]"] + [WATER] * 4): "test",
    ".".join([WATER] * 5): "val",
    ".".join(["[K+]"] + [WATER] * 3): "val",
    ".".join(["[Ca+2]"] + [WATER] * 5): "val",
}
KEPT_IN_TRAIN = {"CCO", "CCCC", GLYCINE, "c1ccccc1", "CC(N)=O", "CNC(C)=O"}


@dataclass(frozen=True)
class System:
    """What is sampled in one job: molecules (SMILES) side by side, one charge and multiplicity."""

    domain: str
    parts: tuple[str, ...]
    charge: int
    multiplicity: int
    weight: float = 1.0

    @property
    def molecule(self) -> str:
        return ".".join(self.parts)

    @property
    def name(self) -> str:
        return f"{self.molecule}|{self.charge}|{self.multiplicity}"


@dataclass(frozen=True)
class Job:
    """A system, how many structures of it are wanted, and the split they go to."""

    system: System
    count: int
    split: str


def systems() -> list[System]:
    """Every system of the data set, each once, in a fixed order."""
    pairs = itertools.product(SUBSTITUENTS.split(), GROUPS.split())
    grid = [substituent + group for substituent, group in pairs]
    found = [_system("organic", word) for word in ORGANIC.split() + HETEROATOMS.split()]
    found += [_system("organic_grid", word) for word in grid]
    found += [_system("ions", word) for word in IONS.split()]
    found += [_system("radicals", word, weight=2.0) for word in RADICALS.split()]
    found += [_system("water_clusters", ".".join("O" * n), weight=10.0) for n in range(2, 9)]
    found += [
        _system("solvated_ions", ".".join([ion] + ["O"] * n), weight=1.5)
        for ion in DISSOLVED.split()
        for n in range(1, 7)
    ]
    found += [_system("ion_pairs", pair) for pair in ION_PAIRS.split()]
    found += [_system("ion_pairs", f"{pair}.O.O") for pair in ION_PAIRS.split()[:14]]
    for word in SOLUTES.split():
        smiles, *state = word.split("|")
        for n in (1, 2):
            found.append(_system("hydrates", "|".join([".".join([smiles] + ["O"] * n), *state])))
    found += [_system("dimers", pair) for pair in DIMERS.split()]
    found += [_system(domain, word) for domain, word in _families()]
    unique: dict[str, System] = {}
    for system in found:
        unique.setdefault(system.name, system)
    return [system for system in unique.values() if atom_count(system) <= MOST_ATOMS]


def _families() -> Iterator[tuple[str, str]]:
    """Domain and SMILES of what the patterns yield."""
    groups, ions = GROUPS.split(), DISSOLVED.split()
    pairs = itertools.combinations_with_replacement(groups, 2)
    both = [core.format(*pair) for pair, core in itertools.product(pairs, CORES.split())]
    yield from _thinned("organic_pairs", both, 0.2)

    acids = AMINO_ACIDS.split()
    yield from _thinned("peptides", [a + b + "O" for a, b in itertools.product(acids, acids)], 0.6)
    yield from _thinned("peptides", [f"CC(=O){acid}NC" for acid in acids], 1.0)

    heads = itertools.product(SUBSTITUENTS.split(), CHARGED_GROUPS.split())
    yield from _thinned("ions_grid", [a + b for a, b in heads], 1.0)
    charged = itertools.product(CORES.split(), groups, CHARGED_GROUPS.split())
    yield from _thinned("ions_grid", [core.format(a, b) for core, a, b in charged], 0.03)
    twice = itertools.product(DOUBLY_CHARGED.split(), SPACERS.split())
    yield from _thinned("ions_grid", [pattern.format(spacer) for pattern, spacer in twice], 1.0)

    sites = itertools.product(RADICAL_SITES.split(), groups)
    yield from _thinned("radicals_grid", [site + group for site, group in sites], 0.7)

    partners = PARTNERS.split()
    pairs = itertools.combinations_with_replacement(partners, 2)
    yield from _thinned("dimers_grid", [".".join(pair) for pair in pairs], 0.4)
    triples = itertools.combinations_with_replacement(partners, 3)
    yield from _thinned("dimers_grid", [".".join(triple) for triple in triples], 0.006)
    solvated = itertools.product([*ions, "[Zn+2]", "[I-]"], partners)
    yield from _thinned("ion_molecules", [".".join(pair) for pair in solvated], 0.7)

    for count, share in ((1, 1.0), (2, 0.3), (3, 0.03), (4, 0.005)):
        shells = itertools.combinations_with_replacement(LIGANDS.split(), count)
        complexes = itertools.product(METALS.split(), shells)
        words = [".".join([metal, *shell]) for metal, shell in complexes]
        charges = [w.count("+]") + 2 * w.count("+2]") - w.count("-]") for w in words]
        kept = [word for word, charge in zip(words, charges, strict=True) if abs(charge) <= 2]
        yield from _thinned("metals", kept, share)


def _thinned(domain: str, words: Iterable[str], share: float) -> Iterator[tuple[str, str]]:
    """The same `share` of the words always: those whose hash is small enough."""
    for word in words:
        digest = hashlib.sha256(f"{domain}:{word}".encode()).digest()
        if int.from_bytes(digest[:4], "big") < share * 2**32:
            yield domain, word


def atom_count(system: System) -> int:
    """Atoms of a system, hydrogens included."""
    return sum(_rdkit(part).GetNumAtoms() for part in system.parts)


def _system(domain: str, word: str, weight: float = 1.0) -> System:
    from rdkit import Chem

    smiles, *state = word.split("|")
    molecules = [Chem.MolFromSmiles(part) for part in smiles.split(".")]
    charge = sum(Chem.GetFormalCharge(molecule) for molecule in molecules)
    unpaired = sum(a.GetNumRadicalElectrons() for m in molecules for a in m.GetAtoms())
    if state:
        charge, unpaired = int(state[0]), int(state[1]) - 1
    parts = tuple(Chem.MolToSmiles(molecule) for molecule in molecules)
    if len(parts) == 1 and (parts[0] in KEPT_IN_TRAIN or parts[0] == CAFFEINE):
        weight = 3.0
    return System(domain, parts, charge, unpaired + 1, weight)


@cache
def parent(smiles: str) -> str:
    """SMILES of the molecule with its charges neutralised by protons, without stereochemistry:
    what decides the split, so that an acid and its anion stay together."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem.MolStandardize import rdMolStandardize

    RDLogger.DisableLog("rdApp.*")
    neutral = rdMolStandardize.Uncharger().uncharge(Chem.MolFromSmiles(smiles))
    return Chem.MolToSmiles(neutral, isomericSmiles=False)


def split_of(system: System) -> str:
    """The split of a system, whatever the seed of its structures, so that data sets can be joined.

    Named systems go where `HELD_OUT` says. Molecules of one or two heavy atoms and those of
    `KEPT_IN_TRAIN` are trained on. Others go by the hash of their `parent`. A complex goes with
    its most held-out molecule; if all of them are trained on, by the hash of its parents, so that
    some complexes are new although their molecules are not.
    """
    whole = ".".join(sorted(system.parts))
    if whole in _HELD_OUT:
        return _HELD_OUT[whole]
    splits = [_split_of_part(part) for part in system.parts]
    if len(splits) > 1:
        splits += split_by_molecule([".".join(sorted(map(parent, system.parts)))])
    return max(splits, key=SPLITS.index)


@cache
def _split_of_part(smiles: str) -> str:
    from rdkit import Chem

    key = parent(smiles)
    if key in _HELD_OUT:
        return _HELD_OUT[key]
    if key in KEPT_IN_TRAIN or Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() <= 2:
        return "train"
    return split_by_molecule([key])[0]


_HELD_OUT = {".".join(sorted(name.split("."))): split for name, split in HELD_OUT.items()}


def plan(structures: int) -> list[Job]:
    """The jobs that together yield about `structures` structures."""
    chosen = systems()
    share = 1.05 * structures / sum(system.weight for system in chosen)
    return [
        Job(system, max(2, round(share * system.weight)), split_of(system)) for system in chosen
    ]


# --- Sampling --------------------------------------------------------------------------------

MAX_FORCE = 25.0  # eV/Å: beyond it, a structure is no use for training
STATE_TOLERANCE = 0.02  # eV between a run's electronic state and one found from scratch


class JobFailed(RuntimeError):
    """A system that yields too few usable structures."""


def sample(job: Job, seed: int = 0) -> list[Atoms]:
    """Labelled structures of one system: the same ones for the same job and seed, always.

    Half come from Langevin runs (1 fs steps, 25 fs between snapshots, 300–1000 K; complexes
    200–500 K), started from a conformer or assembly relaxed for a few steps; the rest from
    turned bonds (complexes: new assemblies) and random displacements.
    Raises JobFailed if fewer than half of the structures wanted come out usable.
    """
    system, count = job.system, job.count
    digest = hashlib.sha256(f"{seed}:{system.name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    number = min(6, max(2, count // 4))
    molecules = {part: embed(part, rng, number) for part in dict.fromkeys(system.parts)}
    shapes = [_shape(system, molecules, rng, contact=2.0) for _ in range(number)]
    bonds = _turnable(system.parts[0]) if len(system.parts) == 1 else []
    kept: list[Atoms] = []

    def keep(atoms: Atoms, how: str, expected: float | None = None) -> None:
        labelled = _label(atoms, system, expected)
        if labelled is not None and len(kept) < count:
            labelled.info["source"] = f"xtb/{system.domain}/{system.name}/{len(kept)}/{how}"
            kept.append(labelled)

    runs = max(1, min(len(shapes), count // 6))
    relaxed = []
    for shape in shapes[:runs]:
        try:
            relaxed.append(_relax(shape, steps=15 if len(system.parts) == 1 else 30))
        except CalculatorError:
            continue
        keep(relaxed[-1], "relaxed")
        for atoms, energy in _langevin(relaxed[-1], rng, -(-count // (2 * runs)), system):
            keep(atoms, "langevin", energy)
    shapes = relaxed + shapes[runs:]
    for attempt in range(4 * count):
        if len(kept) >= count:
            break
        atoms = shapes[rng.integers(len(shapes))].copy()
        how = "displaced"
        if attempt % 2 and len(system.parts) > 1:
            atoms, how = _shape(system, molecules, rng, rng.uniform(1.6, 3.6)), "assembled"
        elif attempt % 2 and bonds:
            _turn(atoms, *bonds[rng.integers(len(bonds))], rng.uniform(0, 2 * np.pi))
            how = "turned"
        atoms.positions += rng.normal(size=(len(atoms), 3)) * rng.choice([0.02, 0.05, 0.1])
        keep(atoms, how)
    if 2 * len(kept) < count:
        raise JobFailed(f"{len(kept)} usable structures of {count}")
    return kept


def _label(atoms: Atoms, system: System, expected: float | None = None) -> Atoms | None:
    """The structure with its labels and metadata, or None if it is not fit for training."""
    numbers, positions = atoms.numbers, atoms.positions
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bond = covalent_radii[numbers][:, None] + covalent_radii[numbers][None]
    if (distance + 9.0 * np.eye(len(atoms)) < 0.6 * bond).any():
        return None
    if not _connected(distance < (1.8 * bond if len(system.parts) == 1 else 6.0)):
        return None
    labelled = Atoms(numbers, positions - positions.mean(axis=0))
    labelled.info = {"charge": system.charge, "spin": system.multiplicity}
    # A calculator of its own: the label depends on the structure alone, not on how a run came by.
    teacher = GFN2xTB(accuracy=0.1)
    try:
        teacher.calculate(labelled)
    except CalculatorError:
        return None
    energy, forces = teacher.results["energy"], teacher.results["forces"]
    if not (np.isfinite(energy) and np.abs(forces).max() < MAX_FORCE):
        return None
    if expected is not None and abs(energy - expected) > STATE_TOLERANCE:
        return None
    labelled.info |= {
        "reference_source": "allscaip-lite data xtb",
        "data_id": system.domain,
        "num_atoms": len(atoms),
        "num_electrons": int(numbers.sum()) - system.charge,
        "composition": labelled.get_chemical_formula("hill"),
        "homo_lumo_gap": teacher.results["homo_lumo_gap"],
        "molecule": system.molecule,
        "label": f"GFN2-xTB, spin-polarised (tblite {version('tblite')})",
    }
    labelled.calc = SinglePointCalculator(labelled, energy=energy, forces=forces)
    return labelled


def _connected(near: np.ndarray) -> bool:
    """Whether every atom is reached from the first by steps between near atoms; near (N, N)."""
    reached = near[0]
    for _ in range(len(near)):
        reached = near[reached].any(0)
    return bool(reached.all())


def _relax(atoms: Atoms, steps: int) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = GFN2xTB()
    BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=steps)
    return atoms


def langevin(start: Atoms, temperature: float, rng: np.random.Generator) -> Langevin:
    """Dynamics at `temperature` (K) by the teacher, of a copy of `start`: steps of 1 fs."""
    atoms = start.copy()
    atoms.calc = GFN2xTB()
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)  # Maxwell–Boltzmann, (N,)
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * spread[:, None])
    return Langevin(
        atoms,
        1.0 * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=rng,
    )


def _langevin(
    start: Atoms, rng: np.random.Generator, snapshots: int, system: System
) -> Iterator[tuple[Atoms, float]]:
    """Snapshots (structure, energy in eV) of one run; it ends early where the teacher fails."""
    hot = len(system.parts) == 1
    temperature = float(rng.choice([300, 500, 700, 1000] if hot else [200, 300, 400, 500]))
    run = langevin(start, temperature, rng)
    for _ in range(snapshots):
        try:
            run.run(25)
        except CalculatorError:
            return
        yield run.atoms.copy(), run.atoms.get_potential_energy()


def _shape(
    system: System, molecules: dict[str, list[Atoms]], rng: np.random.Generator, contact: float
) -> Atoms:
    """A conformer of a molecule, or a random assembly of conformers of several."""
    parts = [molecules[part][rng.integers(len(molecules[part]))] for part in system.parts]
    shape = assemble(parts, rng, contact)
    shape.info = {"charge": system.charge, "spin": system.multiplicity}
    return shape


def _rdkit(smiles: str):
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    return Chem.AddHs(Chem.MolFromSmiles(smiles))


def embed(smiles: str, rng: np.random.Generator, number: int) -> list[Atoms]:
    """At most `number` conformers of a molecule, at minima of MMFF94 or UFF where these know it.

    Raises JobFailed if there is none.
    """
    from rdkit.Chem import AllChem

    molecule = _rdkit(smiles)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    if len(numbers) == 1:
        return [Atoms(numbers, [[0.0, 0.0, 0.0]])]
    seed = int(rng.integers(2**31 - 1))
    found = list(AllChem.EmbedMultipleConfs(molecule, number, randomSeed=seed))
    if not found:
        found = list(
            AllChem.EmbedMultipleConfs(molecule, number, randomSeed=seed, useRandomCoords=True)
        )
    if not found:
        raise JobFailed(f"no conformer of {smiles}")
    try:
        if AllChem.MMFFHasAllMoleculeParams(molecule):
            AllChem.MMFFOptimizeMoleculeConfs(molecule)
        elif AllChem.UFFHasAllMoleculeParams(molecule):
            AllChem.UFFOptimizeMoleculeConfs(molecule)
    except (RuntimeError, ValueError):
        pass  # no force field for it: the teacher relaxes the embedded structure
    return [Atoms(numbers, molecule.GetConformer(index).GetPositions()) for index in found]


def assemble(parts: Sequence[Atoms], rng: np.random.Generator, contact: float) -> Atoms:
    """Molecules around the first, each turned at random and slid towards it from a random side
    until its closest atom is `contact` (Å) away from one that is there already."""
    whole = parts[0].copy()
    whole.positions -= whole.positions.mean(0)
    for part in parts[1:]:
        turned = part.copy()
        centred = part.positions - part.positions.mean(0)
        turned.positions = Rotation.random(random_state=rng).apply(centred)
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        for distance in np.arange(0.0, 30.0, 0.1):
            moved = turned.positions + distance * direction
            if np.linalg.norm(moved[:, None] - whole.positions, axis=-1).min() >= contact:
                break
        turned.positions = moved
        whole += turned
    return whole


def _turnable(smiles: str) -> list[tuple[int, int, np.ndarray]]:
    """Single bonds outside rings with something to turn: (i, j, which atoms hang on j)."""
    from rdkit import Chem

    molecule = _rdkit(smiles)
    bonds = []
    for bond in molecule.GetBonds():
        ends = bond.GetBeginAtom(), bond.GetEndAtom()
        if bond.IsInRing() or bond.GetBondType() != Chem.BondType.SINGLE:
            continue
        if min(end.GetDegree() for end in ends) < 2:
            continue
        i, j = (end.GetIdx() for end in ends)
        cut = Chem.RWMol(molecule)
        cut.RemoveBond(i, j)
        side = next(group for group in Chem.GetMolFrags(cut) if j in group)
        bonds.append((i, j, np.array(side)))
    return bonds


def _turn(atoms: Atoms, i: int, j: int, side: np.ndarray, angle: float) -> None:
    """Turn the atoms `side` by `angle` (radians) about the bond from i to j, in place."""
    axis = atoms.positions[j] - atoms.positions[i]
    turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis))
    pivot = atoms.positions[j].copy()
    atoms.positions[side] = turn.apply(atoms.positions[side] - pivot) + pivot


# --- The command -----------------------------------------------------------------------------


def generate(
    folder: str | os.PathLike, jobs: Sequence[Job], seed: int = 0, workers: int = 1
) -> None:
    """Run the jobs and write `{train,val,test}.aselmdb` and `references.json` into `folder`, and
    `checksums.json`, by which two runs of one command are compared.

    Each job's result is stored under `folder/jobs` as it is done; a run that was stopped goes on
    from there, and yields what an uninterrupted one does. The number of workers changes nothing
    but the time. A job that fails is recorded in `folder/failed.json` and skipped.
    Raises ValueError where `folder` holds the results of other jobs or another seed. The workers
    are new processes: a script that calls this needs the usual `if __name__ == "__main__"`.
    """
    folder = Path(folder)
    store = folder / "jobs"
    store.mkdir(parents=True, exist_ok=True)
    listed = [[job.system.name, job.count, job.split] for job in jobs]
    text = json.dumps({"seed": seed, "jobs": listed}, indent=0)
    listing = folder / "plan.json"
    if listing.exists() and listing.read_text() != text:
        raise ValueError(f"{folder} holds another data set (its plan.json): choose a new --out")
    store_text(listing, text)

    tasks = [(job, seed, store / f"{index:05d}") for index, job in enumerate(jobs)]
    waiting = [task for task in tasks if not any(_outcomes(task[2]))]
    started = shown = time.monotonic()
    for done, _ in enumerate(in_processes(_work, waiting, workers), start=1):
        now = time.monotonic()
        if sys.stderr.isatty() or now - shown > 30 or done == len(waiting):
            left = (now - started) / done * (len(waiting) - done)
            print(
                f"\r{len(tasks) - len(waiting) + done} of {len(tasks)} systems,"
                f" {left / 60:.1f} min left ",
                end="" if sys.stderr.isatty() and done < len(waiting) else "\n",
                file=sys.stderr,
                flush=True,
            )
            shown = now

    results = [_outcomes(stem) for _, _, stem in tasks]
    failed = {
        job.system.name: bad.read_text() for job, (_, bad) in zip(jobs, results, strict=True) if bad
    }
    store_text(folder / "failed.json", json.dumps(failed, indent=1))
    elements: set[str] = set()
    checksums = {}
    for split in SPLITS:
        mine = [outcome for job, outcome in zip(jobs, results, strict=True) if job.split == split]
        files = [good for good, _ in mine if good]
        if not files:
            continue
        structures = [atoms for file in files for atoms in Dataset(file)]
        write_aselmdb(folder / f"{split}.aselmdb", structures, overwrite=True)
        elements |= {symbol for atoms in structures for symbol in atoms.symbols}
        checksums[split] = checksum(structures)
        print(
            f"{split}: {len(structures)} structures of {len(files)} systems, "
            f"checksum {checksums[split][:16]}",
            file=sys.stderr,
        )
    references = free_atom_energies(sorted(elements, key=atomic_numbers.get))
    store_text(folder / "references.json", json.dumps(references, indent=1))
    store_text(folder / "checksums.json", json.dumps(checksums, indent=1))
    if failed:
        message = f"{len(failed)} of {len(jobs)} systems failed: see {folder / 'failed.json'}"
        print(message, file=sys.stderr)


def _outcomes(stem: Path) -> tuple[Path | None, Path | None]:
    """The stored result of a job and the record of its failure, whichever is there."""
    files = stem.with_suffix(".aselmdb"), stem.with_suffix(".failed")
    return tuple(file if file.exists() else None for file in files)


def _work(task: tuple[Job, int, Path]) -> None:
    job, seed, stem = task
    try:
        write_aselmdb(stem.with_suffix(".aselmdb"), sample(job, seed))
    except (ArithmeticError, RuntimeError, ValueError) as error:
        # One odd system must not end a run of hundreds; a full disk or a missing library does.
        store_text(stem.with_suffix(".failed"), f"{type(error).__name__}: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data xtb`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--structures", type=int, default=60_000, help="about how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data xtb`: make the data set, or go on making one; the exit status."""
    generate(args.out, plan(args.structures), args.seed, args.workers)
    return 0


if __name__ == "__main__":
    command = argparse.ArgumentParser(prog="allscaip-lite data xtb", description=__doc__)
    add_arguments(command)
    sys.exit(run(command.parse_args()))
