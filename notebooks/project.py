"""The project of the course: change the model, train it, defend a table of three rows.

A starting point that runs in minutes on a CPU. It trains three small models on point charges, whose
interaction is known exactly (lesson 08), each with several seeds, and prints the table of their
errors on structures that none of them was trained on. Change VARIANTS to ask your own question:
each entry has the name of a row and the fields of `AllScAIPConfig` that differ from SMALL. For your
own data, put a `Dataset` of `.aselmdb` files in place of `ions`. docs/teaching.md has the rubric.

    python notebooks/project.py --steps 150 --seeds 0 1
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allscaip_lite import AllScAIPConfig
from allscaip_lite.data.aselmdb import InMemory
from allscaip_lite.tables import markdown_table
from allscaip_lite.training.loop import Stage, fresh_model, train
from data.long_range.curves import errors_by_gap
from data.long_range.ions import ions

SMALL = AllScAIPConfig(
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    cutoff=4.0,
    k=12,
    num_distance_basis=64,
    angular_channels=(5, 3, 1, 2, 5),
    smooth_bond_order=True,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "without ERoPE": {"rotary": False},
    "without node attention": {"node_attention": False, "rotary": False},
}
KEYS = ("energy_mae", "force_mae")  # meV a structure, meV/Å


def main(arguments: Sequence[str] | None = None) -> int:
    """Train each variant with each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each training (default: 150)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--structures", type=int, default=600, help="to train on (default: 600)")
    args = parser.parse_args(arguments)
    training, test = (InMemory(list(ions(n, seed))) for n, seed in ((args.structures, 0), (100, 1)))
    stage = Stage(
        "conservative",
        steps=args.steps,
        learning_rate=1.2e-2,
        energy_weight=20,
        force_weight=20,
        warmup=0.05,
        ema_decay=0.98,
        muon=1.0,
    )
    rows = []
    for name, changes in VARIANTS.items():
        errors = []
        for seed in args.seeds:
            model = fresh_model(SMALL.replace(**changes), training, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                model = train(
                    model, [stage], training, test, Path(folder) / "run", max_atoms=96, seed=seed,
                    validate_every=args.steps,
                )  # fmt: skip
            errors.append(errors_by_gap(model, test, (2.0, 20.0))["all"])
        energies, forces = (", ".join(f"{error[key]:.0f}" for error in errors) for key in KEYS)
        rows.append((name, f"{model.num_parameters:,}", energies, forces))
    print(markdown_table(("model", "parameters", "energy, meV", "forces, meV/Å"), rows))
    print(f"\nMean absolute errors of {len(test)} structures, by seed: {args.seeds}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
