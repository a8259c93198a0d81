"""Make `data/omol-mini`: small systems from OMol25's domains, labelled with wB97M-V/def2-TZVPD.

    python data/omol-mini/make.py --out data/generated/omol-mini --known data/omol-mini --workers 2

In: the tables below and a seed. Out: `{train,val,test}.aselmdb`, split by molecule, with energies
(eV) and forces (eV/Å), GFN2-xTB's in `info`, and `references.json` with the energies of the free
atoms. Labels are made in an order in which every beginning is a fair sample of the whole: labelling
that stops early still leaves a data set (`--collect`), and the same command goes on.

With `--set thermal`: pieces of drugs, peptides, electrolytes and reagents at 300 to 600 K, and ions
with ions and water from contact to 8 Å. Of several candidates the one is labelled on whose forces
`lite` and `lite-local` disagree most.

With `--set iodine`: molecules and ions with iodine, whose inner electrons are a core potential.

With `--method gfn2-xtb` the same systems, sampled by the same rules, are labelled with GFN2-xTB
alone: many more structures, and other ones, half of them far from any minimum (the set `reactive`
of `data/xtb/README.md`).

Domains follow D. S. Levine et al., The Open Molecules 2025 dataset, arXiv:2505.08762.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculatorError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from scipy.spatial.transform import Rotation

from allscaip_lite.checkpoints import load_model
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import SPLITS
from allscaip_lite.files import store_text
from allscaip_lite.labels import LabelError, queue, xtb
from allscaip_lite.labels.sampling import System, parse_system, with_hydrogens
from allscaip_lite.labels.xtb import GFN2xTB
from allscaip_lite.model import AllScAIP
from allscaip_lite.tables import markdown_table
from data.xtb.sets import (
    Job,
    in_state,
    label_entry,
    langevin,
    make_set,
    relax,
    take_over,
    take_share,
)
from data.xtb.splits import split_of

# --- Species ---------------------------------------------------------------------------------
# One word each: SMILES, or SMILES|charge|multiplicity where these are not those of the SMILES
# with the fewest unpaired electrons. Molecules of three and more heavy atoms are also there to be
# held out: smaller ones are all trained on (see `split_of` of `data/xtb/splits.py`).

ORGANIC = """
[H][H] C O N F Cl Br S P [SiH4] B [C-]#[O+] N#N O=C=O C#N [C-]#[NH+] C=O CO CN CF CCl CBr CS C#C C=C
CC OO OF OCl NN N=N NO N=O ON=O FF ClCl BrBr FCl BrCl C=N C=S S=C=S O=C=S O=S=O SS CSC CP C[SiH3] CB
FB(F)F OB(O)O F[SiH3] Cl[SiH3] O[SiH3] FC(F)F FCF ClCCl ClC(Cl)Cl FC(F)(F)F FC(F)(F)Cl OP=O FP(F)F
ClP(Cl)Cl NP PP OS N=S [Li][H] [Li]C [Na][H] [Na]Cl [Li]F [Li]O [MgH2] Cl[Mg]Cl C[Mg]Cl [H][K]
[H][Ca][H] [H][Zn][H] C[Zn][H] BrC(Br)Br C=CBr C=CCl C=CF C#CF C#CCl C#CC CC=O CC#N CCO COC CCN CNC
NC=O OC=O OCO C=C=O C=C=C CC=C CCC C1CC1 C1CO1 C1CN1 C1CS1 C1=CC1 CN=O N=C=O N=C=S C[N+]#[C-] N#CO
NC#N C=[N+]=[N-] N=[N+]=[N-] [O-][O+]=O [N-]=[N+]=O CC=N C=NO C=NN NCO OCC=O OCF OC(F)F FC=O FC(F)=O
ClC=O ClC(Cl)=O O=CC=O N#CC#N C#CC#C C=CC=O C#CC=O C=CC#N C#CC#N C=CC=C CC#CC CC(C)=O CCC=O CC(=O)O
COC=O OC(=O)O CC(N)=O CNC=O NC(N)=O NC(=O)O C[N+](=O)[O-] O[N+](=O)[O-] CON=O COO COCO OCCO NCCO
CC(=O)F CC(=O)Cl CC=C=O C=CC=N C=CN C=CO C=CS CC=S CC(=O)S NC=S NC(N)=S CSC=O CS(C)=O CS(=O)O
O=S(=O)=O OS(O)=O O=S(Cl)Cl OP(O)O OP(O)(O)=O CP(C)C CPC C[SiH2]C C=C[SiH3] C=[SiH2] CBC C=CB CB(O)O
c1ccoc1 c1ccsc1 c1cc[nH]c1 c1c[nH]cn1 c1cocn1 c1cnoc1 c1ccccc1 c1ccncc1 c1cncnc1 C1=CC=CC1 C1CCC1
C1COC1 C1=COC1 O=C1CC1 O=C1CO1 O=C1C=C1 C1=CCC1 NC1CC1 FC1CC1 N#CCO N#CCN N#CC=O O=CC(=O)O CC(F)F
FCCF C=C(F)F ClC=CCl FC=CF CCS CCCl CCBr CC=CF C=CCF C=CCCl ONC=O NNC=O CN=C=O CSC#N C=CN=O NN(C)C
"""
RADICALS = """
[H] [CH3] [OH] [NH2] [SH] [PH2] [SiH3] [CH] [BH2] [O]O [CH]=O [CH2]O C[O] C[NH] [CH2]N C[S] [CH2]S
[C]#N [N]=O O=[N+][O-] [CH]=C [C]#C [CH2]C [CH2]F F[CH]F F[C](F)F [CH2]Cl [CH2]Br [O]Cl [O]F [O]Br
[N]=N [NH]N [CH]=N [CH2]C=C [CH2]C#C [CH2]C#N [CH2]C=O C[C]=O O=[C]O [O]C=O CO[O] CC[O] C[CH]O
[CH2]CO [CH2]OC C[CH]C C[C]=C [CH2]C(C)=O CC(=O)[O] [CH2]C(=O)O [CH2]C(N)=O N[C]=O [O]N=O C=C[O]
[CH2]N=O [SiH2]C CB[CH2] C[Si]C [N]=[N+]=[N-] [CH2]SC [O]S(=O)O [O]N=C O|1|2 N|1|2 CO|1|2 C=O|1|2
C=C|1|2 C#C|1|2 CN|1|2 S|1|2 C|1|2 O=C=O|1|2 O=C=O|-1|2 [O][O]|-1|2 [O][O]|1|2 O=S=O|-1|2 FF|-1|2
ClCl|-1|2 C[N+](=O)[O-]|-1|2 CC=O|1|2 COC|1|2 CSC|1|2 C=CC=C|1|2 CC(C)=O|1|2 [O-][O+]=O|-1|2
C#CC#C|1|2 [Mg][H]|0|2 [Ca][H]|0|2 [Zn][H]|0|2 [Ca]F|0|2 [Mg]C|0|2 [Li][Na]|1|2 [O-]N=O|0|2
c1ccoc1|1|2 c1ccccc1|1|2 C1CC1|1|2
"""
# Both spins at one geometry: SMILES, taken as singlet and as triplet.
TWO_SPINS = """
[O][O] [CH2] [NH] [PH] [SiH2] [O][S] [S][S] F[C]F F[CH] Cl[CH] Cl[C]Cl C[CH] C[N] C[P] N[CH] O[CH]
C=C C=O C#C C=N N=N C=S O=C=O O=S=O C=C=O CC=O C=CC=O C=CC=C O=CC=O C=CC C=CF C=CO C=CN C=CCl
[O-][O+]=O CC(C)=O C=CC#N C#CC#C [CH2]C[CH2] [CH]C=C [CH]C#C [CH]C#N [N]=[C]=[N] C=[N+]=[N-]
N=O C1=CC1 c1ccoc1 O=CO NC=O CN=O [C]=C OC=C=O S=C=S ON=O C=[SiH2] C=P B[H] [BH] [Mg] C[Zn]C C1CC1
"""
IONS = """
[OH3+] [OH-] [NH4+] [NH2-] [CH3+] [CH3-] [SH-] [SH3+] [PH4+] [PH2-] [BH4-] [CH-]=O [CH+]=O [C-]#N
[N+]=O|1|1 O=N[O-] [O-][N+](=O)[O-] O=[N+]=O N#[N+][H] [OH+]=C C[OH2+] C[NH3+] C[O-] C[S-] C[SH2+]
C=[NH2+] C[C+]=O C#C[O-] [C-]#C [CH2+]O|1|1 C[CH2+] C=[CH+] [CH2-]C=O [CH2-]C#N [CH2-]C=C
[CH2+]C=C C[C-]=O O=C[O-] CC(=O)[O-] O=C([O-])O O=C([O-])[O-] CC(O)=[OH+] OC=[OH+] CC=[OH+]
CC(C)=[OH+] C[OH+]C C[NH2+]C CC[NH3+] CC[O-] C[NH-] NC=[OH+] NC(N)=[NH2+] CC#[NH+] N#[C-] N#C[O-]
N#C[S-] [N-]=[N+]=[N-] N#C[N-]C#N [O-]Cl [O-]Cl=O [O-]Br F[B-](F)(F)F F[P-](F)(F)(F)(F)F [F-].F|-1|1
ClO [O-]S(=O)(=O)O CS(=O)(=O)[O-] [O-]S(=O)(=O)[O-] O=S(=O)([O-])F [O-]P(=O)(O)O [O-]P(=O)=O [SiH3-]
[SiH3+] [NH3+]CC(=O)[O-] C[N+](C)(C)[O-] [NH3+]C[O-] [NH3+]CC[O-] [NH3+]C(=O)[O-] C[NH2+]C(=O)[O-]
[CH2-][NH3+] [CH2-][PH3+] [O-][NH3+] [CH2-][OH+]C [CH2-]S(C)=[OH+] [O-]C=[NH2+] c1c[nH]c[nH+]1
[nH+]1ccccc1 c1ccccc1[O-] c1cc[n-]c1 c1cn[n-]c1 [O-]C=C CC([O-])=C [O-]C#C [S-]C=O O=C([O-])C=O
[O-]OC [O-]O [NH2+]=C=O [O-]B(O)O [O-][SiH3] [Mg+]O [Mg+]Cl [Ca+]O [Zn+]O|1|1 [Zn+]C [Mg+]C
"""

SALTS = """
[Li+].[F-] [Li+].[Cl-] [Li+].[OH-] [Li+].[Br-] [Na+].[F-] [Na+].[Cl-] [Na+].[Br-] [Na+].[OH-]
[K+].[F-] [K+].[Cl-] [K+].[OH-] [Mg+2].[Cl-] [Mg+2].[F-] [Mg+2].[OH-] [Ca+2].[Cl-] [Ca+2].[F-]
[Ca+2].[OH-] [Zn+2].[Cl-] [Zn+2].[OH-] [NH4+].[Cl-] [NH4+].[F-] [Li+].[BH4-] [Na+].[C-]#N
[Li+].O=C[O-] [Na+].O=C[O-] [K+].O=C[O-] [Li+].[O-][N+](=O)[O-] [K+].[O-][N+](=O)[O-]
[Ca+2].O=C([O-])[O-] [Mg+2].O=C[O-] [Li+].CC(=O)[O-] [Na+].F[B-](F)(F)F [Li+].F[B-](F)(F)F
[Li+].F[P-](F)(F)(F)(F)F [Mg+2].[Cl-].[Cl-] [Ca+2].[F-].[F-] [Zn+2].[Cl-].[Cl-] [Li+].[Li+].[O-2]
C[NH3+].[Cl-] C[NH3+].O=C[O-] [NH4+].O=C[O-] [Li+].[Cl-].O [Na+].[Cl-].O [K+].[F-].O [Li+].[F-].O
[Na+].[Cl-].O.O [Li+].[Cl-].O.O [Mg+2].[Cl-].O [Ca+2].[Cl-].O [Na+].[OH-].O [K+].[Br-].O
"""
DISSOLVED = "[Li+] [Na+] [K+] [Mg+2] [Ca+2] [F-] [Cl-] [Br-] [OH-] [NH4+] [OH3+]"
SOLVENTS = """
[Li+].CO [Li+].C=O [Li+].CC#N [Li+].COC [Li+].OC=O [Li+].NC=O [Li+].C=O.C=O [Li+].N [Li+].CC(C)=O
[Na+].CO [Na+].N [Na+].C=O [Na+].CC#N [Na+].NC=O [Na+].OC=O [K+].CO [K+].C=O [K+].NC=O [K+].COC
[Mg+2].CO [Mg+2].C=O [Mg+2].NC=O [Ca+2].CO [Ca+2].C=O [Ca+2].NC=O [F-].CO [Cl-].CO [Cl-].C=O
[Cl-].C [Cl-].CCl [F-].CF [Br-].CBr [Cl-].N [F-].N [Cl-].OC=O [Cl-].S [Cl-].C#N [Br-].O=C=O [Li+].S
[Li+].O=C=O [Na+].O=C=O [OH-].CO [NH4+].N [NH4+].CO [OH3+].CO
"""
DIMERS = """
C.C C.O C.N C.F C.S N.N N.O N.F N.Cl O.F O.Cl O.S O.Br F.F F.Cl Cl.Cl S.S S.N P.O P.P [SiH4].O
[SiH4].N B.N FB(F)F.N FB(F)F.O C#N.C#N C#N.O C#N.N C=O.O C=O.C=O C=O.N C=O.F CO.O CO.CO CO.N CO.F
CN.O CN.N CS.O CF.O CF.F CF.CF CCl.O CCl.N CBr.N CBr.O FCl.N FCl.O ClCl.N ClCl.O BrBr.N BrBr.O
BrBr.S FF.N O=C=O.O O=C=O.N O=C=O.C O=C=O.O=C=O O=C=O.F N#N.O N#N.N#N N#N.C [C-]#[O+].O [C-]#[O+].F
[H][H].O [H][H].N [H][H].C [H][H].[H][H] C#C.O C#C.N C#C.F C=C.O C=C.F C=C.Cl C=C.C CC.O CC.F OO.O
OO.N O=S=O.O O=S=O.N O=S=O.S C=S.O C=C=O.O OC=O.O OC=O.F OC=O.N NC=O.O NC=O.F CC#N.O CC#N.F CC=O.O
CC=O.F COC.O C=CC=O.F C1CO1.O C1CC1.O C#CC.F C=C=C.O CC=C.F C=[N+]=[N-].O N=C=O.O O=CC=O.O C=CC#N.O
c1ccoc1.F C=CF.O [O-][O+]=O.O [N-]=[N+]=O.O C[N+]#[C-].O CC#N.N FC=O.O OC=O.C OC=O.S [CH3].O|0|2
[OH].O|0|2 [CH3].N|0|2 [O]O.O|0|2 [NH2].O|0|2 [N]=O.O|0|2 [CH3].F|0|2 [SH].O|0|2 [O][O].O|0|3
[O][O].N|0|3 [CH2].O|0|3 [OH].C|0|2 [OH].N|0|2 [O][O].C|0|3
"""
# Donor X–H and acceptor Y of a hydrogen that moves: X-H.Y.
TRANSFERS = """
[OH3+].O [NH4+].O [NH4+].N [OH3+].N C[OH2+].O C[NH3+].O O.[OH-] O.[F-] O.[Cl-] O.[NH2-] O.[SH-]
F.[F-] F.[Cl-] Cl.[F-] S.[OH-] F.N Cl.N Br.N F.O Cl.O Br.O OC=O.N OC=O.O CO.[OH-] CO.[F-] C#C.[OH-]
C#N.[OH-] C#N.N C#N.[F-] CC=O.[OH-] CC#N.[OH-] OC=O.[F-] OC=O.[Cl-] S.N CS.[OH-] P.[OH-] B.[NH2-]
[SiH4].[OH-] C.[OH]|0|2 C.[H]|0|2 C.[F-] C.[CH3]|0|2 C.[NH2]|0|2 C.[SH]|0|2 O.[H]|0|2 O.[OH]|0|2
O.[CH3]|0|2 N.[H]|0|2 N.[OH]|0|2 N.[NH2]|0|2 F.[H]|0|2 Cl.[H]|0|2 Cl.[OH]|0|2 Cl.[CH3]|0|2
Br.[H]|0|2 S.[H]|0|2 S.[OH]|0|2 [SiH4].[H]|0|2 P.[H]|0|2 C=O.[H]|0|2 C=O.[OH]|0|2 CO.[H]|0|2
CO.[OH]|0|2 C=C.[H]|0|2 C#C.[OH]|0|2 CC=O.[OH]|0|2 OC=O.[OH]|0|2 OO.[H]|0|2 OO.[OH]|0|2 C#N.[H]|0|2
CC.[H]|0|2 CC=O.[H]|0|2 [H][H].[OH]|0|2 [H][H].[CH3]|0|2 [H][H].[H]|0|2 [H][H].[NH2]|0|2
[H][H].[CH]=C|0|2 CC#N.[H]|0|2
"""
METALS = """
[Zn+2].O [Zn+2].O.O [Zn+2].O.O.O [Zn+2].N [Zn+2].N.N [Zn+2].N.O [Zn+2].S [Zn+2].[OH-].O
[Zn+2].[OH-].N [Zn+2].[Cl-].O [Zn+2].[Cl-].N [Zn+2].[SH-] [Zn+2].[SH-].O [Zn+2].C=O [Zn+2].CO
[Zn+2].NC=O [Zn+2].O=C[O-] [Zn+2].[C-]#N [Zn+2].[C-]#N.[C-]#N [Zn+2].[Cl-].[Cl-].O
[Zn+2].[OH-].[OH-] [Zn+2].[F-] [Zn+2].[C-]#[O+] [Zn+2].[H-].[H-] [Zn+2].[Br-].[Br-]
[Zn+2].[CH3-].[Cl-] [Mg+2].N [Mg+2].N.N [Mg+2].N.O [Mg+2].[OH-].O [Mg+2].[OH-].[OH-]
[Mg+2].[C-]#[O+] [Mg+2].[C-]#[O+].O [Mg+2].[CH3-].[Cl-] [Mg+2].[H-].[H-] [Mg+2].[Cl-].[Cl-].O
[Mg+2].S [Mg+2].O=C=O [Mg+2].C#N [Ca+2].N [Ca+2].N.N [Ca+2].[OH-].[OH-] [Ca+2].[C-]#[O+] [Ca+2].N.O
[Ca+2].[Cl-].[Cl-] [Ca+2].S [Li+].[CH3-] [Li+].[NH2-] [Li+].[C-]#[O+] [Li+].[H-] [Na+].[H-]
[K+].[NH2-] [Na+].[NH2-] [Li+].[CH3-].O
"""


# The set `thermal`: pieces of larger molecules, of 5 to 12 atoms.
FRAGMENTS = """
NC=O CNC=O CN(C)C=O CC(N)=O CNC(C)=O C=CC(N)=O C#CC(N)=O NC(N)=O CNC(N)=O NC(=O)NO NNC(N)=O NNC=O
COC(N)=O NC(=O)C(N)=O NC(=O)CO NC(=O)C=O NC(=O)NC=O O=CNC=O NC(=O)C#N NC(=O)CF NC(=O)CCl ONC=O
CC(=O)NO NC=N CC(=N)N NC(N)=N NC(N)=S CC(N)=S NC=S CNC=S CN=C=O CN=C=S NC#N CNC#N NCC=O NCC(=O)O
NCC(N)=O NCC#N O=CNCC=O NC(CO)=O OC(=O)C=O OC(=O)CO OCC=O CC(=O)C=O CC(=O)C(=O)O OC(=O)C(=O)O
OC(=O)CC(=O)O SCC(=O)O CC(=O)OO CC(=O)S CC(=O)SC COC(C)=O COC=O CCOC=O O=COC=O CC(=O)F CC(=O)Cl
O=C(Cl)C(=O)Cl CS(N)(=O)=O NS(N)(=O)=O NS(=O)(=O)O CS(=O)(=O)O CS(=O)(=O)F CS(=O)(=O)Cl CS(C)=O
CS(C)(=O)=O CS(=O)O C=CS(=O)(=O)F NS(=O)(=O)F NS(=O)(=O)C(F)(F)F CSSC CSC#N CSCO CSCF CS(=O)Cl
c1ccoc1 c1ccsc1 c1cc[nH]c1 c1c[nH]cn1 c1cn[nH]c1 c1cocn1 c1cnoc1 c1cscn1 c1cnsc1 c1c[nH]nn1
c1nc[nH]n1 c1nnn[nH]1 c1nnco1 c1cnon1 c1nnsc1 c1ncon1 c1ccncc1 c1cncnc1 c1cnccn1 c1ccnnc1 c1ncncn1
Fc1ccccn1 Fc1ccccc1 Clc1ccccc1 Clc1cccs1 Fc1ccco1 Clc1nccs1 Nc1ncon1 Nc1nnn[nH]1 Nc1ncc[nH]1
Nc1cc[nH]n1 Cc1ccno1 Cc1cnco1 Cc1nnn[nH]1 Cn1ccnc1 Cn1ccnn1 Cc1cscn1 O=c1cccco1 O=c1cc[nH]c(=O)[nH]1
O=C1C=CC(=O)N1 O=C1CCC(=O)N1 O=C1CNC(=O)N1 O=C1NCCO1 O=C1CCN1 O=c1cc[nH]s1 O=c1[nH]ccs1 OC1=NOC=C1
O=C1OCCO1 O=C1OC=CO1 O=C1OCC(F)O1 COC(=O)OC COC(=O)F COC(=O)Cl O=C1CCCO1 O=C1CCO1 C1COCO1 O=S1OCCO1
O=S1(=O)OCCO1 CC#N CCC#N N#CCC#N N#CCCC#N C=CC#N CC(C)=O CCC=O C[N+](=O)[O-] CC[N+](=O)[O-]
NC[N+](=O)[O-] C=C[N+](=O)[O-] CO[N+](=O)[O-] CON=O COC(F)F FC(F)OC(F)F COC OCC(F)(F)F OCC(F)F
NCC(F)F FC(F)C(F)F CC(F)F CC(F)(F)F C=C(F)F FC=CF C=CF C=CCl C=CBr ClC=CCl ClCCCl BrCCBr BrCCO ClCCO
FCCO CC(=O)CF CC(=O)CCl CC(=O)CBr CC(=O)C(F)(F)F O=CC(F)(F)F OC(=O)C(F)(F)F OC(=O)CF OC(=O)CCl
OC(=O)CBr OC(=O)C(Cl)Cl FC(F)(F)C(Cl)Br C=CCF C=CCCl C#CCBr N#CCCl ClCC1CO1 FC1CC1 OP(O)(O)=O
COP(O)(O)=O CP(O)(O)=O NP(O)(O)=O OP(O)(=O)F O=P(O)(F)F C[PH](=O)O COP(=O)(F)F CP(=O)(F)F
CP(=O)(Cl)Cl CPC OP(O)O CB(O)O OB(O)O C=CB(O)O COB(O)O CB(F)F NB(O)O OB(O)F C1OBO1 [BH3-][NH3+]
B1NBNBN1 C[SiH2]O C[SiH2]Cl O[SiH2]O C[SiH2]F NN CNN CN(C)N CNC CCN NCCO NCCF CON CNO ON=C CC=NO
C=NN CC=NN CN=[N+]=[N-] C1CN1 C1CO1 C1CS1 CC1CO1 C1COC1 C1CNC1 C1CSC1 C=CO C=CN COC=C C=CC=O
C=CC(=O)O C#CC=O C#CC(=O)O C#CCO C=CCO CC=C=O CCO OCCO COCO CC(O)O CCS CCCl CCBr OCCS NCCS CC=C
C=CC=C CC#CC C#CC=C CCC C1CC1 C1CCC1 C=C1CC1 NCC(=O)[O-] [NH3+]CC(=O)O [NH3+]CC(N)=O NC(N)=[NH2+]
CC(N)=[NH2+] NC=[NH2+] c1c[nH]c[nH+]1 c1cc[nH+]cc1 c1c[n-]cn1 C[NH3+] CC[NH3+] C[NH2+]C [NH3+]CCO
CC(=O)[O-] O=C[O-] O=C([O-])C(F)(F)F OCC(=O)[O-] CS(=O)(=O)[O-] FC(F)(F)S(=O)(=O)[O-] NS(=O)(=O)[O-]
O=S(=O)(F)[N-]S(=O)(=O)F OP(=O)(O)[O-] COP(=O)(O)[O-] F[B-](F)(F)F OC(=O)[O-] [O-]c1ccccc1
CC([S-])=O CC[S-] C[O-] CC(C)=[OH+] CC(O)=[OH+] NC(N)=[OH+] CC(N)=[OH+]
"""
# Ions with ions, polar molecules and water, and such molecules with water.
CONTACTS = """
[Na+].[Cl-] [Li+].[F-] [Li+].[Cl-] [K+].[Cl-] [K+].[Br-] [Na+].[F-] [NH4+].[Cl-] [NH4+].[F-]
[NH4+].[Br-] [NH4+].O=C[O-] [NH4+].CC(=O)[O-] [NH4+].C[S-] [NH4+].O=[N+]([O-])[O-]
[NH4+].OP(=O)(O)[O-] [NH4+].F[B-](F)(F)F C[NH3+].[Cl-] C[NH3+].[F-] C[NH3+].[Br-] C[NH3+].O=C[O-]
C[NH3+].[OH-] C[NH2+]C.[Cl-] NC=[NH2+].[Cl-] NC=[NH2+].O=C[O-] NC(N)=[NH2+].[Cl-] NC(N)=[NH2+].[F-]
c1c[nH]c[nH+]1.[Cl-] c1c[nH]c[nH+]1.[F-] [Li+].F[B-](F)(F)F [Li+].O=C([O-])C(F)(F)F [Na+].CC(=O)[O-]
[Na+].O=C[O-] [Na+].OP(=O)(O)[O-] [Na+].CS(=O)(=O)[O-] [Na+].FC(F)(F)S(=O)(=O)[O-] [K+].CC(=O)[O-]
[K+].O=[N+]([O-])[O-] [Na+].C[S-] [Na+].OC(=O)[O-] [Mg+2].CC(=O)[O-] [Mg+2].O=C[O-]
[Ca+2].CC(=O)[O-] [Ca+2].OP(=O)(O)[O-] [Zn+2].C[S-] [Zn+2].O=C[O-] [Zn+2].c1c[nH]cn1
[Na+].c1c[nH]cn1 [Li+].O=C1OCCO1 [Li+].COC(C)=O [Na+].CC(N)=O [K+].CC#N [Li+].CS(C)=O [Na+].NC=O
[Mg+2].NC=O [Cl-].NC=O [Cl-].CC(N)=O [F-].NC=O [Cl-].NC(N)=O [Br-].CO [Cl-].CC#N [F-].CC#N [Li+].O
[Na+].O [K+].O [Mg+2].O [Ca+2].O [Zn+2].O [F-].O [Cl-].O [Br-].O [OH-].O [NH4+].O [OH3+].O C[NH3+].O
NC=[NH2+].O c1c[n-]cn1.O CC(=O)[O-].O O=C[O-].O C[S-].O OP(=O)(O)[O-].O CS(=O)(=O)[O-].O
O=[N+]([O-])[O-].O F[B-](F)(F)F.O NC=O.O CC(N)=O.O NC(N)=O.O OC=O.O c1c[nH]cn1.O CC#N.O CO.O CN.O
[NH4+].[NH4+] [Na+].[K+] [Cl-].[F-] [NH4+].[Na+] C[NH3+].[K+] O=C[O-].[Cl-] CC(=O)[O-].[F-]
"""

# The set `iodine`.
IODINE = """
I II FI ClI BrI OI CI ICI IC(I)I CCI CC(C)I ICCI C=CI C#CI N#CI FCI ClCI BrCI NCI OCI SCI C[SiH2]I
O=CI CC(=O)I OC(=O)CI O=C(N)CI N#CCI COCI C=CCI Ic1ccccc1 Ic1ccno1 Ic1cc[nH]n1 Ic1cscn1 IC1CC1 CSI
[I-].O [I-].[Li+] [I-].[Na+] [I-].[K+] [I-].CO [I-].[NH4+] I.O I.N CI.O CI.N II.O II.N [I-].I
C#N.ClI
"""

# How many structures each domain gets.
SIZES = {
    "organic": 380,
    "stretches": 190,
    "transfers": 130,
    "radicals": 170,
    "two_spins": 140,
    "ions": 150,
    "electrolytes": 200,
    "water_clusters": 60,
    "dimers": 160,
    "metal_complexes": 80,
}
# The shares of the domains in what GFN2-xTB alone labels: more of what is far from a minimum.
REACTIVE = SIZES | {
    "organic": 240,
    "stretches": 570,
    "transfers": 260,
    "radicals": 260,
    "two_spins": 210,
    "electrolytes": 150,
    "water_clusters": 20,
    "metal_complexes": 120,
}
THERMAL = {"fragments": 2200, "contacts": 600}
IODINE_SIZES = {"iodine": 120}
SHARES = {"train": 0.80, "val": 0.08, "test": 0.12}
MOST_ATOMS = 12
MAX_FORCE = 30.0  # eV/Å, by GFN2-xTB: a structure with a larger one is left out
REACTIVE_MAX_FORCE = 25.0  # the same where GFN2-xTB labels


@dataclass(frozen=True)
class Item:
    """One entry of the plan: the `index`-th structure (of two spins: pair) of a system.

    It depends on this and the seed alone, so it stays the same when the tables above grow. Same
    processor, same numbers: others round differently.
    """

    domain: str
    system: System
    split: str
    index: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.system.name}/{self.index}/seed {self.seed}"

    def structures(self) -> list[Atoms]:
        """One structure, or singlet and triplet; none if no attempt yields a usable one."""
        for attempt in range(6):
            rng = np.random.default_rng(int(_digest(f"{self.name}/{attempt}")[:16], 16))
            try:
                made = _MAKERS[self.domain](self, rng)
            except (CalculatorError, LabelError):
                continue
            checked = [_checked(atoms, self, how) for atoms, how in made]
            if all(atoms is not None for atoms in checked):
                return checked
        return []


def systems() -> dict[str, list[System]]:
    """The systems of each domain, each once, of 2 to 12 atoms."""
    ions = [".".join([ion] + ["O"] * n) for ion in DISSOLVED.split() for n in (1, 2, 3)]
    words = {
        "organic": ORGANIC.split(),
        "stretches": ORGANIC.split() + IONS.split(),
        "transfers": TRANSFERS.split(),
        "radicals": RADICALS.split(),
        "two_spins": [f"{smiles}|0|1" for smiles in TWO_SPINS.split()],
        "ions": IONS.split(),
        "electrolytes": SALTS.split() + ions + SOLVENTS.split(),
        "water_clusters": [".".join("O" * n) for n in (2, 3, 4)],
        "dimers": DIMERS.split(),
        "metal_complexes": METALS.split(),
    }
    return _each_once(words)


def thermal_systems() -> dict[str, list[System]]:
    """The systems of the two domains of the set `thermal`, each once, of 2 to 12 atoms."""
    return _each_once({"fragments": FRAGMENTS.split(), "contacts": CONTACTS.split()})


def iodine_systems() -> dict[str, list[System]]:
    """The systems of the set `iodine`, each once."""
    return _each_once({"iodine": IODINE.split()})


def _each_once(words: dict[str, list[str]]) -> dict[str, list[System]]:
    found: dict[str, list[System]] = {}
    for domain, listed in words.items():
        unique = {system.name: system for system in (parse_system(domain, word) for word in listed)}
        found[domain] = [
            system
            for system in unique.values()
            if 2 <= sum(len(_symbols(part)) for part in system.parts) <= MOST_ATOMS
        ]
    return found


# The systems of a set, and how many structures each of its domains gets.
SETS = {
    "mini": (systems, SIZES),
    "thermal": (thermal_systems, THERMAL),
    "iodine": (iodine_systems, IODINE_SIZES),
}


def plan(seed: int = 0, kind: str = "mini") -> list[Item]:
    """The whole list of one of `SETS`, in the order of labelling: any beginning is a fair sample.

    Every domain gives each split its share; within a split its systems take turns, in the order of
    a hash of their names. The entries of all domains and splits are then merged, each
    evenly spread over the whole.
    """
    placed = []
    make_systems, sizes = SETS[kind]
    for domain, listed in make_systems().items():
        groups: dict[str, list[System]] = {split: [] for split in SPLITS}
        for system in sorted(listed, key=lambda system: _digest(f"{seed}:{system.name}")):
            groups[split_of(system)].append(system)
        for split, members in groups.items():
            entries = sizes[domain] // 2 if domain == "two_spins" else sizes[domain]
            wanted = round(SHARES[split] * entries)
            if not members or not wanted:
                continue
            for k in range(wanted):
                item = Item(domain, members[k % len(members)], split, k // len(members), seed)
                placed.append(((k + 0.5) / wanted, _digest(item.name), item))
    return [item for *_, item in sorted(placed, key=lambda entry: entry[:2])]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- Sampling -------------------------------------------------------------------------------

Made = list[tuple[Atoms, str]]  # structures, charge and spin in `info`, and how each was made


def _molecule(item: Item, rng: np.random.Generator) -> Made:
    """In turn: a snapshot, a thermal distortion along normal modes, random steps of all atoms."""
    start = _relaxed(item.system, item.index // 3)
    way = (item.index + int(_digest(item.system.name)[:4], 16)) % 3
    return [_distorted(start, way, rng)]


def _distorted(start: Atoms, way: int, rng: np.random.Generator) -> tuple[Atoms, str]:
    if way == 0:
        temperature = float(rng.choice([300, 500, 700, 1000]))
        return _snapshot(start, temperature, rng), f"langevin {temperature:.0f} K"
    if way == 1:
        temperature = float(rng.choice([300, 600, 1000, 1500]))
        return _along_modes(start, temperature, rng), f"modes {temperature:.0f} K"
    size = float(rng.choice([0.02, 0.05, 0.1]))
    return _rattled(start, size, rng), f"displaced {size} A"


CANDIDATES = 4


def _thermal(item: Item, rng: np.random.Generator) -> Made:
    """A conformer at 300 to 600 K, of `CANDIDATES` the one that two models disagree on most."""
    found = []
    for number in range(CANDIDATES):
        start = _relaxed(item.system, number)
        temperature = float(rng.choice([300, 400, 500, 600]))
        if number % 2:
            found.append((_snapshot(start, temperature, rng), f"langevin {temperature:.0f} K"))
        else:
            found.append((_along_modes(start, temperature, rng), f"modes {temperature:.0f} K"))
    return [found[int(np.argmax(_disagreement([atoms for atoms, _ in found])))]]


def _disagreement(structures: Sequence[Atoms]) -> list[float]:
    """Root mean square difference of the forces of `lite` and `lite-local`, in eV/Å."""
    first, second = (model.predict(structures) for model in _models())
    pairs = zip(first, second, strict=True)
    return [float(np.sqrt(((one.forces - other.forces) ** 2).mean())) for one, other in pairs]


@cache
def _models() -> tuple[AllScAIP, AllScAIP]:
    return load_model("lite", device="cpu"), load_model("lite-local", device="cpu")


def _two_spins(item: Item, rng: np.random.Generator) -> Made:
    """Singlet and triplet of one geometry, near the minimum of either."""
    multiplicity = (1, 3)[item.index % 2]
    near = replace(item.system, multiplicity=multiplicity)
    atoms, how = _distorted(_relaxed(near, item.index // 3), item.index % 3, rng)
    return [
        (in_state(atoms, item.system.charge, spin), f"near multiplicity {multiplicity}, {how}")
        for spin in (1, 3)
    ]


def _stretched(item: Item, rng: np.random.Generator) -> Made:
    """One bond of 0.8 to 2 times its length, all atoms displaced a little."""
    from rdkit import Chem

    atoms = _relaxed(item.system, 0)
    molecule = with_hydrogens(item.system.parts[0])
    bonds = [bond for bond in molecule.GetBonds() if not bond.IsInRing()]
    if not bonds:
        raise LabelError("only rings")
    bond = bonds[rng.integers(len(bonds))]
    i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
    cut = Chem.RWMol(molecule)
    cut.RemoveBond(i, j)
    side = list(next(group for group in Chem.GetMolFrags(cut) if j in group))
    factor = float(rng.uniform(0.8, 2.0))
    atoms.positions[side] += (factor - 1.0) * (atoms.positions[j] - atoms.positions[i])
    spin = item.system.multiplicity
    if spin == 1 and factor > 1.4 and rng.random() < 0.3:
        spin = 3
    ends = atoms.symbols[i] + atoms.symbols[j]
    atoms = in_state(_rattled(atoms, 0.03, rng), item.system.charge, spin)
    return [(atoms, f"{ends} stretched {factor:.2f}")]


def _transfer(item: Item, rng: np.random.Generator) -> Made:
    """X–H···Y with the hydrogen on its way from X to Y, nearly along the line."""
    donor, acceptor = (_relaxed(parse_system("", part), 0) for part in item.system.parts)
    bonds = [
        (int(np.argmin(donor.get_distances(h, range(len(donor))) + 9.0 * (donor.numbers == 1))), h)
        for h in np.flatnonzero(donor.numbers == 1)
        if (donor.numbers > 1).any()
    ] or [(0, 1)]
    # The most acidic hydrogens are those at the most electronegative atom.
    most = max(_NEGATIVITY.get(donor.symbols[x], 2.0) for x, _ in bonds)
    bonds = [pair for pair in bonds if _NEGATIVITY.get(donor.symbols[pair[0]], 2.0) == most]
    x, h = bonds[rng.integers(len(bonds))]
    heavy = np.flatnonzero(acceptor.numbers > 1)
    negativities = [_NEGATIVITY.get(acceptor.symbols[k], 2.0) for k in heavy]
    y = int(heavy[int(np.argmax(negativities))]) if len(heavy) else 0
    radii = covalent_radii[[donor.numbers[x], 1, acceptor.numbers[y]]]
    fraction, slack = float(rng.uniform(0.0, 1.0)), float(rng.uniform(0.0, 0.7))
    axis = donor.positions[h] - donor.positions[x]
    axis /= np.linalg.norm(axis)
    donor.positions -= donor.positions[x]
    span = radii[0] + 2 * radii[1] + radii[2] + slack
    donor.positions[h] = axis * (radii[0] + radii[1] + fraction * slack)
    best = None
    for _ in range(50):
        moved = acceptor.positions - acceptor.positions[y]
        moved = Rotation.random(random_state=rng).apply(moved) + span * axis
        gap = np.linalg.norm(np.delete(donor.positions, h, 0)[:, None] - moved, axis=-1).min()
        gap = min(gap, _least(moved, donor.positions[h], y) + 0.5)
        if best is None or gap > best[0]:
            best = gap, moved
    atoms = Atoms([*donor.symbols, *acceptor.symbols], np.vstack([donor.positions, best[1]]))
    atoms = in_state(_rattled(atoms, 0.04, rng), item.system.charge, item.system.multiplicity)
    return [(atoms, f"H {fraction:.2f} of the way, {span:.2f} A apart")]


_NEGATIVITY = {"F": 4.0, "O": 3.5, "Cl": 3.2, "N": 3.0, "Br": 2.95, "S": 2.6, "C": 2.5}


def _least(positions: np.ndarray, point: np.ndarray, but: int) -> float:
    others = np.delete(positions, but, 0)
    return float(np.linalg.norm(others - point, axis=1).min()) if len(others) else 9.0


def _complex(item: Item, rng: np.random.Generator) -> Made:
    """In turn: a snapshot of the relaxed complex, a new assembly a little off contact."""
    charge, spin = item.system.charge, item.system.multiplicity
    parts = [_relaxed(parse_system("", part), 0) for part in item.system.parts]
    if item.index % 2 == 0:
        whole = in_state(_assembled(parts, rng, lambda: 1.0), charge, spin)
        whole = relax(whole, steps=40)
        temperature = float(rng.choice([200, 300, 500]))
        return [(_snapshot(whole, temperature, rng), f"langevin {temperature:.0f} K")]
    off = float(rng.uniform(-0.3, 0.8))
    whole = in_state(_assembled(parts, rng, lambda: 1.0 + off), charge, spin)
    return [(_rattled(whole, 0.04, rng), f"assembled {off:+.2f} A off contact")]


def _separated(item: Item, rng: np.random.Generator) -> Made:
    """Two molecules from a little inside contact to 8 Å between their closest atoms, most near;
    a third of them relaxed first.
    """
    charge, spin = item.system.charge, item.system.multiplicity
    parts = [_relaxed(parse_system("", part), 0) for part in item.system.parts]
    whole = in_state(_assembled(parts, rng, lambda: 1.2), charge, spin)
    if rng.random() < 1 / 3:
        whole = relax(whole, steps=40)
    first, second = whole[: len(parts[0])], whole[len(parts[0]) :]
    axis = second.positions.mean(0) - first.positions.mean(0)
    axis /= np.linalg.norm(axis)
    least = 0.75 * _contact(first, second)
    wanted = least + (8.0 - least) * rng.random() ** 2
    away = np.linspace(-6.0, 12.0, 1801)
    gaps = [
        np.linalg.norm(first.positions[:, None] - second.positions - d * axis, axis=-1).min()
        for d in away
    ]
    # Only the outer branch: from the smallest gap outwards it grows.
    start = int(np.argmin(gaps))
    index = start + int(np.argmin(np.abs(np.array(gaps[start:]) - wanted)))
    whole.positions[len(first) :] += away[index] * axis
    return [(_rattled(whole, 0.03, rng), f"{gaps[index]:.2f} A apart")]


def _iodine(item: Item, rng: np.random.Generator) -> Made:
    return (_molecule if len(item.system.parts) == 1 else _complex)(item, rng)


_MAKERS: dict[str, Callable[[Item, np.random.Generator], Made]] = {
    "organic": _molecule,
    "stretches": _stretched,
    "transfers": _transfer,
    "radicals": _molecule,
    "two_spins": _two_spins,
    "ions": _molecule,
    "electrolytes": _complex,
    "water_clusters": _complex,
    "dimers": _separated,
    "metal_complexes": _complex,
    "fragments": _thermal,
    "contacts": _separated,
    "iodine": _iodine,
}


def _checked(atoms: Atoms, item: Item, how: str) -> Atoms | None:
    """The structure with its metadata and GFN2-xTB's energy and forces in `info`, or None if it is
    not fit for training.
    """
    bond = covalent_radii[atoms.numbers][:, None] + covalent_radii[atoms.numbers][None]
    distance = atoms.get_all_distances() + 9.0 * np.eye(len(atoms))
    if (distance < 0.55 * bond).any():
        return None
    done = Atoms(atoms.numbers, np.round(atoms.positions - atoms.positions.mean(axis=0), 6))
    done.info = {key: atoms.info[key] for key in ("charge", "spin")}
    try:
        labelled = xtb.label(done, MAX_FORCE)
    except LabelError:
        return None
    done.info |= {
        "data_id": item.domain,
        "source": f"omol-mini/{item.domain}/{item.system.name}/{item.index}/{how}",
        "reference_source": "allscaip-lite, data/omol-mini/make.py",
        "molecule": item.system.molecule,
        "xtb_energy": labelled.get_potential_energy(),
        "xtb_forces": labelled.get_forces(),
    }
    return done


# --- Geometry --------------------------------------------------------------------------------


@cache
def _symbols(smiles: str) -> tuple[str, ...]:
    return tuple(atom.GetSymbol() for atom in with_hydrogens(smiles).GetAtoms())


@cache
def _minimum(system: System, conformer: int) -> Atoms:
    from rdkit.Chem import AllChem

    if len(system.parts) > 1:  # an ion that falls in two by its SMILES, such as bifluoride
        parts = [_relaxed(parse_system("", part), 0) for part in system.parts]
        whole = _assembled(parts, np.random.default_rng(conformer), lambda: 1.0)
        return relax(in_state(whole, system.charge, system.multiplicity), steps=80)
    smiles = system.parts[0]
    symbols = _symbols(smiles)
    positions = np.zeros((1, 3))
    if len(symbols) > 1:
        molecule = with_hydrogens(smiles)
        seed = 1 + conformer
        if (
            AllChem.EmbedMolecule(molecule, randomSeed=seed) < 0
            and AllChem.EmbedMolecule(molecule, randomSeed=seed, useRandomCoords=True) < 0
        ):
            raise LabelError(f"no conformer of {smiles}")
        positions = molecule.GetConformer().GetPositions()
    atoms = in_state(Atoms(symbols, positions), system.charge, system.multiplicity)
    return relax(atoms, steps=80) if len(atoms) > 1 else atoms


def _relaxed(system: System, conformer: int) -> Atoms:
    """A molecule at a minimum of GFN2-xTB, or after 80 steps towards it."""
    return _minimum(system, conformer).copy()


def _rattled(atoms: Atoms, size: float, rng: np.random.Generator) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += rng.normal(size=(len(atoms), 3)) * size
    return atoms


def _snapshot(start: Atoms, temperature: float, rng: np.random.Generator) -> Atoms:
    """What 50 to 150 fs of Langevin dynamics make of a structure."""
    run = langevin(start, temperature, rng)
    run.run(int(rng.integers(50, 151)))
    return in_state(Atoms(start.numbers, run.atoms.positions), **_state_of(start))


def _state_of(atoms: Atoms) -> dict[str, int]:
    return {"charge": atoms.info["charge"], "spin": atoms.info["spin"]}


STIFFEST = 0.02  # eV/(Å² u): softer modes move as if they were as stiff as this


def _along_modes(start: Atoms, temperature: float, rng: np.random.Generator) -> Atoms:
    """A draw from the classical harmonic distribution: every normal mode displaced by
    N(0, kT/λ), where λ are the eigenvalues of the mass-weighted Hessian by GFN2-xTB.
    """
    atoms = start.copy()
    atoms.calc = GFN2xTB(accuracy=0.1)
    step, columns = 0.01, []
    for index in np.ndindex(len(atoms), 3):
        sides = []
        for sign in (1.0, -1.0):
            atoms.positions[index] = start.positions[index] + sign * step
            sides.append(atoms.get_forces().ravel())
        atoms.positions[index] = start.positions[index]
        columns.append((sides[1] - sides[0]) / (2 * step))
    roots = np.repeat(np.sqrt(atoms.get_masses()), 3)
    hessian = np.array(columns) / np.outer(roots, roots)
    values, modes = np.linalg.eigh((hessian + hessian.T) / 2)
    free = np.abs(values) > 1e-3  # without translations and rotations
    size = np.sqrt(units.kB * temperature / np.maximum(np.abs(values[free]), STIFFEST))
    moved = modes[:, free] @ (rng.normal(size=free.sum()) * size) / roots
    return in_state(
        Atoms(start.numbers, start.positions + moved.reshape(-1, 3)), **_state_of(start)
    )


def _contact(first: Atoms, second: Atoms) -> float:
    """Distance (Å) at which the two touch: an ion and a molecule closer than two molecules."""
    ionic = any(len(part) == 1 and part.info.get("charge") for part in (first, second))
    return 2.1 if ionic else 2.4


def _assembled(
    parts: Sequence[Atoms], rng: np.random.Generator, scale: Callable[[], float]
) -> Atoms:
    """Molecules around the first one, each turned at random and slid in from a random side until
    its closest atom is at `scale()` times the sum of the covalent radii plus a contact gap.
    """
    whole = parts[0].copy()
    whole.positions -= whole.positions.mean(0)
    for part in parts[1:]:
        turn, aim = Rotation.random(random_state=rng), rng.normal(size=3)
        centred = turn.apply(part.positions - part.positions.mean(0))
        aim /= np.linalg.norm(aim)
        touch = covalent_radii[whole.numbers][:, None] + covalent_radii[part.numbers][None]
        touch = scale() * (touch + 0.6)
        for distance in np.arange(0.0, 20.0, 0.05):
            moved = centred + distance * aim
            gap = np.linalg.norm(whole.positions[:, None] - moved[None], axis=-1)
            if (gap >= touch).all():
                break
        whole += Atoms(part.numbers, moved)
    return whole


# --- Free atoms ------------------------------------------------------------------------------

# Multiplicities of the ground states of the neutral atoms.
GROUND_STATES = {
    "H": 2, "Li": 2, "B": 2, "C": 3, "N": 4, "O": 3, "F": 2, "Na": 2, "Mg": 1, "Si": 3, "P": 4,
    "S": 3, "Cl": 2, "K": 2, "Ca": 1, "Zn": 1, "Br": 2, "I": 2,
}  # fmt: skip


@dataclass(frozen=True)
class FreeAtom:
    """One free, neutral atom in its ground state; its energy is a reference."""

    element: str

    @property
    def name(self) -> str:
        return f"free atom {self.element}"

    @property
    def split(self) -> str:
        return "free atoms"

    def structures(self) -> list[Atoms]:
        info = {"charge": 0, "spin": GROUND_STATES[self.element], "data_id": "free_atoms"}
        return [Atoms(self.element, [[0.0, 0.0, 0.0]], info=info)]


# --- Labels by GFN2-xTB alone ----------------------------------------------------------------


def reactive_plan(structures: int, seed: int = 0) -> list[Job]:
    """The set `reactive`: the systems of all domains, by the shares of `REACTIVE`."""
    seed += 3_000_000  # the sets of `data/xtb/make.py` have the millions before
    found = []
    for domain, listed in systems().items():
        wanted = structures * REACTIVE[domain] / sum(REACTIVE.values())
        count = max(1, round(wanted / len(listed) / (2 if domain == "two_spins" else 1)))
        found += [Job(system, count, split_of(system), seed) for system in listed]
    return found


def sample_reactive(job: Job) -> list[Atoms]:
    """The first `job.count` entries of a system, labelled by GFN2-xTB.

    Raises LabelError if there is none.
    """
    found = []
    for index in range(job.count):
        item = Item(job.system.domain, job.system, job.split, index, job.seed)
        for atoms in item.structures():
            how = atoms.info["source"].removeprefix("omol-mini/")
            atoms.info |= {"source": f"xtb/reactive/{how}"}
            for name in ("xtb_energy", "xtb_forces"):
                del atoms.info[name]
            try:
                found.append(xtb.label(atoms, REACTIVE_MAX_FORCE))
            except LabelError:
                continue
    if not found:
        raise LabelError(f"no usable structure of {job.system.name}")
    return found


# --- Against OMol25's own labels ---------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A structure that OMol25 has labelled: a file that ASE reads, with charge, multiplicity,
    energy_eV, max_force_eV_per_A and homo_lumo_gap_eV in its comment.
    """

    path: Path

    def read(self) -> Atoms:
        """The structure; LabelError where its comment lacks one of these."""
        atoms = ase.io.read(self.path)
        needed = ("charge", "multiplicity", "energy_eV", "max_force_eV_per_A", "homo_lumo_gap_eV")
        if lacking := [key for key in needed if key not in atoms.info]:
            raise LabelError(f"{self.path} has no {', '.join(lacking)} in its comment line")
        return atoms

    def structures(self) -> list[Atoms]:
        theirs = self.read()
        state = int(theirs.info["charge"]), int(theirs.info["multiplicity"])
        return [in_state(theirs, *state)]


def compare(
    folder: Path, published: Path, workers: queue.Workers = 1, collect_only: bool = False
) -> str:
    """Label structures of OMol25, or go on with it, the smallest first; a table of what is done.

    Args:
        folder: Where the results are kept, in `folder/jobs`.
        published: Folder of `Published` files, named `*.xyz`.
        workers: As `run_jobs` has it.
        collect_only: Label nothing.

    Raises:
        LabelError: `published` has no such files.
    """
    from allscaip_lite.labels import dft

    entries = sorted(map(Published, published.glob("*.xyz")), key=lambda one: len(one.read()))
    if not entries:
        raise LabelError(f"{published} has no .xyz files")
    jobs = [queue.Job(one.path.stem, dft.job_file(one.path.stem), "all", one) for one in entries]
    if not collect_only:
        queue.run_jobs(folder / "jobs", jobs, label_entry, workers)
    rows = []
    for job in jobs:
        for ours in queue.stored(folder / "jobs", job):
            theirs = job.task.read().info
            energy = 1000 * (ours.get_potential_energy() - float(theirs["energy_eV"]))
            force = np.linalg.norm(ours.get_forces(), axis=1).max()
            rows.append(
                [
                    f"{ours.symbols.formula:hill}",
                    theirs.get("data_id", ""),
                    len(ours),
                    f"{energy:+.1f}",
                    f"{energy / len(ours):+.2f}",
                    f"{force:.3f}",
                    f"{float(theirs['max_force_eV_per_A']):.3f}",
                    f"{min(ours.info['homo_lumo_gap']):.2f}",
                    f"{float(theirs['homo_lumo_gap_eV']):.2f}",
                ]
            )
    head = ["molecule", "domain", "atoms", "energy, ours − theirs (meV)", "per atom"]
    head += ["largest force (eV/Å): ours", "OMol25", "gap (eV): ours", "OMol25"]
    return markdown_table(head, rows, "llrrrrrrr")


# --- The command -----------------------------------------------------------------------------


def make(
    folder: Path,
    entries: Sequence[Item | FreeAtom],
    workers: queue.Workers = 1,
    known: Path | None = None,
    collect_only: bool = False,
) -> None:
    """Label the entries, or go on with it, and write the data set of what is labelled.

    Args:
        folder: Folder of the data set; `folder/jobs` keeps the result of each entry.
        entries: What is labelled.
        workers: As `run_jobs` has it.
        known: Folder of a set that this command made, whose labels are taken.
        collect_only: Label nothing.
    """
    from allscaip_lite.labels import dft

    store = folder / "jobs"
    jobs = [queue.Job(e.name, dft.job_file(e.name), e.split, e) for e in entries]
    if known is not None:
        references = known / "references.json"
        energies = json.loads(references.read_text()) if references.exists() else {}
        atoms = {FreeAtom(one).name: [_with_energy(one, energies[one])] for one in energies}
        count = take_over(store, jobs, known, dft.OMOL25.name, atoms)
        print(f"{count} entries taken from {known}")
    if not collect_only:
        queue.run_jobs(store, jobs, label_entry, workers)
    queue.collect(store, jobs, folder)
    references = {
        job.task.element: atoms.get_potential_energy()
        for job in jobs
        if isinstance(job.task, FreeAtom)
        for atoms in queue.stored(store, job)
    }
    store_text(folder / "references.json", json.dumps(references, indent=1))


def _with_energy(element: str, energy: float) -> Atoms:
    [atom] = FreeAtom(element).structures()
    atom.calc = SinglePointCalculator(atom, energy=energy, forces=np.zeros((1, 3)))
    return atom


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--method",
        choices=("wb97m-v", "gfn2-xtb"),
        default="wb97m-v",
        help="wb97m-v: a quarter of a minute a structure; gfn2-xtb: the set reactive of data/xtb",
    )
    parser.add_argument(
        "--set",
        choices=tuple(SETS),
        default="mini",
        help="with wb97m-v: thermal is pieces of drugs, peptides, electrolytes and reagents at 300 "
        "to 600 K, and ions with ions and water; iodine is molecules and ions with it",
    )
    queue.add_workers(parser)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    parser.add_argument(
        "--structures", type=int, default=60_000, help="with gfn2-xtb: about how many"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="with gfn2-xtb: only this share of the systems"
    )
    parser.add_argument(
        "--known",
        type=Path,
        help="with wb97m-v: folder of a set this command made: its labels are taken",
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="with wb97m-v: label nothing, write the data set of what is labelled so far",
    )
    parser.add_argument(
        "--published",
        type=Path,
        help="label the structures of OMol25 in this folder instead, and print a table of ours and "
        "theirs (*.xyz with energy_eV and max_force_eV_per_A in the comment)",
    )


def run(args: argparse.Namespace) -> None:
    if args.method == "gfn2-xtb":
        if args.known or args.collect or args.published or args.set != "mini":
            raise LabelError("--known, --collect, --published and --set go with --method wb97m-v")
        jobs = take_share(reactive_plan(args.structures, args.seed), args.share)
        make_set(args.out, jobs, sample_reactive, args.workers)
        return
    if args.published:
        print(compare(args.out, args.published, args.workers, args.collect))
        return
    atoms = [FreeAtom(element) for element in GROUND_STATES] if args.set == "mini" else []
    entries = [*atoms, *plan(args.seed, args.set)]
    make(args.out, entries, args.workers, args.known, args.collect)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/omol-mini/make.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
