"""The systems of `data/xtb`: tables of SMILES, and families written as patterns.

Each function lists the systems of one set of `make.py`, in a fixed order; `larger_systems`,
`further_ions` and `salts` are those of `data/delta`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from allscaip_lite.labels.sampling import System, parse_system
from data.xtb.splits import CAFFEINE, KEPT_IN_TRAIN, atom_count

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
# Written as patterns, of which a hash picks a share: many molecules that no table would list.

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
# The set `charged`: weights of the domains that it shares with `main`, and the states (charge,
# multiplicity) in which it labels the geometry of a neutral molecule.
CHARGED = {
    "ions": 2.0,
    "ions_grid": 0.5,
    "radicals": 1.0,
    "radicals_grid": 0.5,
    "solvated_ions": 1.5,
    "ion_pairs": 2.0,
    "ion_molecules": 1.5,
    "metals": 1.0,
}
VERTICAL = ((1, 2), (-1, 2), (0, 3))
WIDEST_GAP = 14.0  # Å, of the set `apart`
FARTHEST = 20.0  # Å, of the set `ionic`

# The set `ionic`: ions, and what they meet.
CATIONS = """
[Li+] [Na+] [K+] [Mg+2] [Ca+2] [Zn+2] [OH3+] [NH4+] C[OH2+] C[NH3+] CC[NH3+] C[NH2+]C C[NH+](C)C
C[N+](C)(C)C CC(C)[NH3+] C=CC[NH3+] OCC[NH3+] NCC[NH3+] C1C[NH2+]C1 C1CC[NH2+]C1 [NH3+]O [NH3+]N
[NH3+]CC(N)=O [NH3+]CC#N [NH3+]CC(F)(F)F NC=[NH2+] CC(N)=[NH2+] NC(N)=[NH2+] CNC(N)=[NH2+]
c1c[nH]c[nH+]1 Cc1c[nH]c[nH+]1 Cn1cc[nH+]c1 Cn1cc[n+](C)c1 c1[nH][nH+]cc1 c1c[nH]n[nH+]1
Nc1c[nH]c[nH+]1 c1cc[nH+]cc1 C[n+]1ccccc1 Nc1cc[nH+]cc1 C[PH3+] C[P+](C)(C)C C[S+](C)C C[S+](C)(C)=O
"""
ANIONS = """
[F-] [Cl-] [Br-] [I-] [OH-] [SH-] [C-]#N [S-]C#N [O-]C#N [N-]=[N+]=[N-] N#C[N-]C#N C[O-] CC[O-]
[O-]c1ccccc1 C[S-] CC[S-] CC(C)[S-] [S-]c1ccccc1 O=C[O-] CC(=O)[O-] CCC(=O)[O-] C=CC(=O)[O-]
C#CC(=O)[O-] OCC(=O)[O-] NCC(=O)[O-] O=C([O-])CS CC(=O)C(=O)[O-] O=C([O-])C(F)(F)F O=C([O-])CF
OC(=O)[O-] OC(=O)C(=O)[O-] O=C([O-])c1ccccc1 CC([S-])=O OP(=O)(O)[O-] O[PH](=O)[O-] COP(=O)(O)[O-]
CP(=O)(O)[O-] O=P([O-])(F)F CS(=O)(=O)[O-] CS(=O)[O-] OS(=O)(=O)[O-] COS(=O)(=O)[O-] NS(=O)(=O)[O-]
FC(F)(F)S(=O)(=O)[O-] O=[N+]([O-])[O-] O=N[O-] [O-]Cl(=O)(=O)=O F[B-](F)(F)F OB([O-])O c1c[n-]cn1
c1cc[n-]c1 c1c[n-]nn1 O=c1cc[n-]c(=O)[nH]1 CC(=O)[N-]C [CH2-][N+](=O)[O-]
"""
POLAR = """
O N F Cl S C#N CO CN CS OCCO COC C1CO1 C1CCOC1 CC#N C=O CC=O CC(C)=O OC=O CC(=O)O NC=O CC(N)=O
CNC(C)=O NC(N)=O COC(=O)OC O=C1OCCO1 CS(C)=O CS(C)(=O)=O O=S=O C[N+](=O)[O-] CCl FC(F)F OB(O)O
COP(=O)(OC)OC c1ccncc1 c1c[nH]cn1 c1cc[nH]c1
"""
# Shares of all pairs and trios of each kind.
MEETINGS = {
    ("cation", "anion"): 1.0,
    ("cation", "polar"): 0.4,
    ("anion", "polar"): 0.4,
    ("cation", "cation"): 0.2,
    ("anion", "anion"): 0.2,
    ("polar", "polar"): 0.2,
    ("cation", "anion", "polar"): 0.004,
    ("cation", "anion", "cation"): 0.004,
    ("cation", "anion", "anion"): 0.003,
}
# The set `simplest`.
DIATOMICS = """
[H][H] N#N [C-]#[O+] F Cl Br I FF ClCl BrBr II FCl ClBr ClI BrI [Li][H] [Na][H] [K][H] [H][H]|0|3
N#N|0|3 F|0|3 Cl|0|3 FF|0|3 ClCl|0|3 [O][O]|0|3 [O][O]|0|1 [S][S]|0|3 [O][S]|0|3 [O]=[Si]|0|1
[S]=[C]|0|1 P#P P#N [B]F|0|1 [BH]|0|1 [OH] [SH] [CH]|0|2 [C]#N [N]=O [O]F [O]Cl [O]Br [NH]|0|3
[PH]|0|3 [OH-] [SH-] [C-]#N [N+]=O|1|1 [H][H]|1|2 N#N|1|2 [O][O]|1|2 [O][O]|-1|2 [C-]#[O+]|1|2 F|1|2
Cl|1|2
"""
LINEAR = """
C#C C#N N#CC#N C#CC#C C#CC#N FC#C ClC#C CC#C CC#N CC#CC O=C=O O=C=S S=C=S O=C=C=C=O N#N=O
[N-]=[N+]=O [N-]=[N+]=[N-] [S-]C#N [O-]C#N N#[N+][H] [O-]C#C [C-]#C C[N+]#[C-] [H][Mg][H] Cl[Mg]Cl
Cl[Zn]Cl [H][Zn][H]
"""
ATOMS = """
[H]|0|2 [Li]|0|2 [B]|0|2 [C]|0|3 [N]|0|4 [O]|0|3 [F]|0|2 [Na]|0|2 [Mg]|0|1 [Si]|0|3 [P]|0|4 [S]|0|3
[Cl]|0|2 [K]|0|2 [Ca]|0|1 [Zn]|0|1 [Br]|0|2 [I]|0|2 [Li+] [Na+] [K+] [Mg+2] [Ca+2] [Zn+2] [F-] [Cl-]
[Br-] [I-]
"""

# Larger molecules. What drugs are like: a ring or chain, a linker, another ring. The first ends in
# the atom that is bound, the last begins with it.

BEGINNINGS = """
c1ccc(cc1) Cc1ccc(cc1) COc1ccc(cc1) Clc1ccc(cc1) Fc1cccc(c1) FC(F)(F)c1ccc(cc1) Nc1ccc(cc1)
OC(=O)c1ccc(cc1) c1ccnc(c1) c1cnc(nc1) Cc1nc(cs1) c1coc(c1) Cc1cc(no1) Cn1ccc(n1)
c1ccc2c(c1)c(c[nH]2) c1ccc2nc([nH]c2c1) CN1CCN(CC1) C1COCCN1 C1CCCCN1 C1CCCC1 CC(C)C CCC CN(C)CC
COCC OCC NC(=O)CC BrCC=C CS(=O)(=O)c1ccc(cc1) CP(C)(=O)C N#Cc1ccc(cc1)
"""
LINKERS = """
C(=O)N NC(=O) C(=O)O S(=O)(=O)N CN OC CO C(=O)NC NC(=O)N C=C SC C(=O) CNC(=O)C N(C)C(=O) CC C#C
C(O)C C=NO
"""
ENDS = """
c1ccccc1 c1ccc(F)cc1 c1ccc(O)cc1 c1cccc(Cl)c1 c1ccncc1 c1cn(C)cn1 c1nc2ccccc2[nH]1 c1ccc2OCOc2c1
C1CCN(C)CC1 C1CCOCC1 c1csc(N)n1 CC(=O)O c1ccc(S(N)(=O)=O)cc1 CCN(C)C c1ccc([N+](=O)[O-])cc1
c1cc(OC)c(OC)c(OC)c1 c1ccc(Br)cc1 C(C)(C)C C1CCCC1 c1nnc(C)o1 Cc1ccccc1 CC(N)C(=O)O CCS(C)(=O)=O
"""
WATERS = 6  # around an amino acid
LARGER_SHARES = {"druglike": 0.07, "peptides": 0.5}

# Of the ions of `main`'s molecules, the shares that meet in `salts`, and of the pairs.
SALT_IONS = {"cation": 0.16, "anion": 0.4}
SALT_SHARE, MOST_IN_SALT = 0.03, 20  # atoms of an ion

# The set `ethanol`: one molecule, as snapshots of Langevin runs. Each run, and with it all of its
# snapshots, belongs to one split.
RUN_SPLITS = ("train", "train", "train", "train", "val")
RUN_TEMPERATURE = 500  # K
RUN_START, RUN_STEPS = 300, 20  # fs before the first snapshot, and between two

# --- Which systems ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SampledSystem(System):
    """A system and how it is sampled.

    Attributes:
        weight: Its share of the structures, relative to the other systems.
        moves_as: Charge and multiplicity of the state that is relaxed and run, if it is not the one
            that is labelled: ionised or excited at once, before the atoms have moved.
        reach: If given, the molecules are separated, at gaps (Å) from contact up to it.
        stretched: Two atoms at distances from the wall to where they are free.
        run: If given, the structures are snapshots of one Langevin run, that of this number.
    """

    weight: float = 1.0
    moves_as: tuple[int, int] | None = None
    reach: float | None = None
    stretched: bool = False
    run: int | None = None

    @property
    def name(self) -> str:
        state = super().name
        if self.moves_as is not None:
            state += f", {self.moves_as[0]}|{self.moves_as[1]}"
        if self.stretched:
            state += ", stretched"
        if self.run is not None:
            state += f", run {self.run}"
        return state if self.reach is None else f"{state}, to {self.reach:g} Å"


def main_systems() -> list[SampledSystem]:
    """Every system of the set `main`, each once, in a fixed order."""
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
    return _each_once(found)


def charged_systems() -> list[SampledSystem]:
    """Every system of the set `charged`, each once, in a fixed order: what `main` has least of.

    The domains of `CHARGED` again, for other structures of them; and of the single neutral
    molecules the cation, the anion and the triplet at the molecule's geometry, and the ions with a
    proton more or less.
    """
    main = main_systems()
    found = [
        replace(system, weight=CHARGED[system.domain] * system.weight)
        for system in main
        if system.domain in CHARGED
    ]
    for system in _closed_shells(main, "organic", "organic_grid"):
        for charge, multiplicity in VERTICAL:
            state = replace(system, domain="vertical", charge=charge, multiplicity=multiplicity)
            found.append(replace(state, weight=0.5, moves_as=(0, 1)))
        found += _protomers_of(system)
    return _each_once(found)


def separated_systems() -> list[SampledSystem]:
    """Every system of the set `apart`, each once, in a fixed order: two molecules, which `main` has
    in contact only.
    """
    partners, ions = PARTNERS.split(), [*DISSOLVED.split(), "[Zn+2]", "[I-]"]
    words = [word for word in ["O.O"] + ION_PAIRS.split() + DIMERS.split() if word.count(".") == 1]
    found = [_system("apart", word, weight=3.0) for word in words]
    pairs = itertools.combinations_with_replacement(partners, 2)
    found += [_system("apart", ".".join(pair)) for pair in pairs]
    found += [_system("apart", ".".join(pair)) for pair in itertools.product(ions, partners)]
    return _each_once([replace(system, reach=WIDEST_GAP) for system in found])


def ionic_systems() -> list[SampledSystem]:
    """Every system of the set `ionic`, each once, in a fixed order.

    Ions with ions and polar molecules, two or three, from contact to `FARTHEST`.
    """
    words = {"cation": CATIONS.split(), "anion": ANIONS.split(), "polar": POLAR.split()}
    found = []
    for kinds, share in MEETINGS.items():
        domain = "ionic_pairs" if len(kinds) == 2 else "ionic_trios"
        together = [".".join(met) for met in itertools.product(*(words[kind] for kind in kinds))]
        found += [_system(domain, word) for _, word in _thinned(domain, together, share)]
    apart = [replace(system, reach=FARTHEST) for system in _each_meeting_once(found)]
    return _each_once([system for system in apart if abs(system.charge) <= 2])


def simplest_systems() -> list[SampledSystem]:
    """Every system of the set `simplest`, each once, in a fixed order: free atoms and their ions,
    diatomics over the whole curve, linear molecules.
    """
    diatomics = [_system("diatomics", word, weight=8.0) for word in DIATOMICS.split()]
    found = [replace(system, stretched=True) for system in diatomics]
    found += [_system("linear", word, weight=4.0) for word in LINEAR.split()]
    found += [_system("atoms", word) for word in ATOMS.split()]
    return _each_once(found)


def runs_of_ethanol() -> list[SampledSystem]:
    """The runs of the set `ethanol`, in a fixed order."""
    ethanol = _system("ethanol", "CCO")
    return [replace(ethanol, run=number) for number in range(len(RUN_SPLITS))]


def larger_systems() -> list[SampledSystem]:
    """Drug-like molecules, dipeptides with capped ends, and amino acids among waters."""
    acids = AMINO_ACIDS.split()
    parts = itertools.product(BEGINNINGS.split(), LINKERS.split(), ENDS.split())
    words = {
        "druglike": map("".join, parts),
        "peptides": (f"CC(=O){a}{b}NC" for a, b in itertools.product(acids, acids)),
    }
    found = [
        _system(domain, word)
        for domain, every in words.items()
        for _, word in _thinned(domain, every, LARGER_SHARES[domain])
    ]
    return found + [_system("solvated", f"CC(=O){acid}NC" + ".O" * WATERS) for acid in acids]


def further_ions() -> list[SampledSystem]:
    """The closed-shell molecules of `main`, each with a proton more or less."""
    domains = ("organic", "organic_grid", "organic_pairs", "peptides")
    molecules = _closed_shells(main_systems(), *domains)
    return _each_once([ion for molecule in molecules for ion in _protomers_of(molecule)])


def _closed_shells(systems: Iterable[SampledSystem], *domains: str) -> list[SampledSystem]:
    return [one for one in systems if one.domain in domains and one.multiplicity == 1]


def _protomers_of(system: System) -> list[SampledSystem]:
    return [_system("protomers", ion) for ion, _ in protomers(system.molecule)]


def salts() -> list[SampledSystem]:
    """Pairs of organic ions of opposite sign: some of `further_ions`, and those of `ionic`."""
    ions: dict[str, list[str]] = {"cation": [], "anion": []}
    for system in further_ions():
        if atom_count(system) <= MOST_IN_SALT and abs(system.charge) == 1:
            ions["cation" if system.charge > 0 else "anion"].append(system.molecule)
    further = {
        kind: [word for _, word in _thinned("salts", words, SALT_IONS[kind])]
        for kind, words in ions.items()
    }
    organic = [word for word in CATIONS.split() if word not in METALS.split()]
    pairs = itertools.product(further["cation"] + organic, further["anion"] + ANIONS.split())
    met = [word for _, word in _thinned("salts", map(".".join, pairs), SALT_SHARE)]
    return [_system("salts", word) for word in met]


def _each_meeting_once(found: Iterable[SampledSystem]) -> list[SampledSystem]:
    """Without those that differ in the order of their molecules alone."""
    unique: dict[tuple[str, ...], SampledSystem] = {}
    for system in found:
        unique.setdefault(tuple(sorted(system.parts)), system)
    return list(unique.values())


def _each_once(found: Iterable[SampledSystem]) -> list[SampledSystem]:
    unique: dict[str, SampledSystem] = {}
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


def _system(domain: str, word: str, weight: float = 1.0) -> SampledSystem:
    system = parse_system(domain, word)
    if len(system.parts) == 1 and (system.parts[0] in KEPT_IN_TRAIN or system.parts[0] == CAFFEINE):
        weight = 3.0
    return SampledSystem(domain, system.parts, system.charge, system.multiplicity, weight)


# --- Ions of a molecule ------------------------------------------------------------------------

# Sites that take a proton, and sites that give one: SMARTS of the atom, change of its charge.
PROTON_SITES = (
    ("[NX3;H2,H1,H0;!$(N[C,S]=[O,S,N]);!$(N-a);!$(N[!#6;!#1]);!$(NC#*)]", 1),
    ("[NX1]#[#6]", 1),
    ("[OX1]=[#6]", 1),
    ("[nX2]", 1),
    ("[OX2H][#6,P]", -1),
    ("[SX2H]", -1),
    ("[nX3;H1]", -1),
)


def protomers(smiles: str) -> list[tuple[str, int]]:
    """Ions of a molecule with a proton more (+1) or less (−1), one of each kind of
    `PROTON_SITES`: SMILES and charge.
    """
    from rdkit import Chem

    found = []
    for pattern, change in PROTON_SITES:
        molecule = Chem.MolFromSmiles(smiles)
        matches = molecule.GetSubstructMatches(Chem.MolFromSmarts(pattern))
        if not matches:
            continue
        site = molecule.GetAtomWithIdx(matches[0][0])
        hydrogens = site.GetTotalNumHs() + change
        site.SetFormalCharge(site.GetFormalCharge() + change)
        site.SetNoImplicit(True)
        site.SetNumExplicitHs(hydrogens)
        Chem.SanitizeMol(molecule)
        found.append((Chem.MolToSmiles(molecule), change))
    return found
