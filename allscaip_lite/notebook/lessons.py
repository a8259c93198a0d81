"""The model and the data set that the lessons use, and how to replace them.

Input: the environment variables ALLSCAIP_MODEL (a name or a file for `load_model`, default
`lite-xtb`), ALLSCAIP_DATA (a file or folder of `.aselmdb`, also that of OMol25; default the sample
that comes with the source of the package) and ALLSCAIP_DEVICE (default a GPU if there is one).
Output: a model and a data set.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from allscaip_lite.checkpoints.native import load_model
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.errors import DataError
from allscaip_lite.model import AllScAIP

BUNDLED_MODEL = "lite-xtb"  # has all parts that a lesson may need
BUNDLED_DATA = Path(__file__).parents[2] / "data" / "xtb"
SMALL = AllScAIPConfig(  # learns one molecule in minutes: lesson 06, and the study `rivals`
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    angular_channels=(10, 6, 2, 4, 10),
    k=16,
    num_distance_basis=64,
    direction_degree=0,
    smooth_bond_order=True,
)
STUDIES = Path(__file__).parents[2] / "docs" / "studies"  # their results, where this is the source

# parts that a lesson may need: the name in messages, and whether a configuration has the part
NEEDS = {
    "angular": ("angular encoding (LAE)", lambda config: config.angular_channels is not None),
    "rotary": ("rotary encoding (ERoPE)", lambda config: config.rotary),
    "node_attention": ("node attention", lambda config: config.node_attention),
    "conservative": ("conservative forces", lambda config: config.conservative),
}


def open_model(
    *needs: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    default: str = BUNDLED_MODEL,
) -> AllScAIP:
    """The model that ALLSCAIP_MODEL names, in evaluation mode; prints one line about it.

    Args:
        *needs: Names from `NEEDS`. If the model lacks one of these parts, a line says so and
            `default` is used instead.
        dtype: The floating-point type; None keeps that of the file.
        device: Overrides ALLSCAIP_DEVICE, for lessons that call parts of the model on the CPU.
        default: The model that is used if ALLSCAIP_MODEL is not set.

    Raises:
        ValueError: A need is unknown; and all errors of `load_model`.
    """
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"a lesson cannot need {sorted(unknown)}, only {sorted(NEEDS)}")
    name = os.environ.get("ALLSCAIP_MODEL") or default
    place = device or os.environ.get("ALLSCAIP_DEVICE")
    place = place or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(name, device=place, dtype=dtype)
    lacking = [NEEDS[need][0] for need in needs if not NEEDS[need][1](model.config)]
    if lacking:
        print(f"{Path(name).stem} has no {' and no '.join(lacking)}: {default} is used instead")
        name = default
        model = load_model(name, device=place, dtype=dtype)
    config = model.config
    print(
        f"{Path(name).stem}: {model.num_parameters:,} parameters, {config.num_layers} blocks of "
        f"{config.num_heads} heads, {config.hidden_size} channels, on {model.device}"
    )
    return model


def open_data(split: str = "test", part: str | None = None) -> Dataset:
    """The labelled structures that ALLSCAIP_DATA names; prints one line about them.

    If it names a folder: the file `{split}.aselmdb` or the subfolder `{split}` in it, or the whole
    folder if it has neither. `part` is a folder inside the bundled data, such as "ethanol", which
    ALLSCAIP_DATA does not replace. Raises DataError, FileNotFoundError where there are no data.
    """
    named = os.environ.get("ALLSCAIP_DATA") if part is None else None
    path = Path(os.path.expanduser(named or BUNDLED_DATA / (part or "")))  # noqa: PTH111
    if not named and not path.exists():
        raise DataError(
            "the sample data come with the source of the package, not with an installed package: "
            "run the lesson in a copy of the repository"
            + ("" if part else ", or set ALLSCAIP_DATA to a file or folder of .aselmdb")
        )
    for place in (path / f"{split}.aselmdb", path / split):
        if place.exists():
            path = place
            break
    data = Dataset(path)
    print(f"{path.parent.name}/{path.name}: {len(data):,} structures")
    return data
