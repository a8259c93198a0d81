"""Where the lessons' weights and data come from, in one place, so that others drop in.

In: the environment variables ALLSCAIP_MODEL (a name or a file that `load_model` takes, default
`lite-xtb`), ALLSCAIP_DATA (a file or folder of `.aselmdb`, OMol25's too, default the sample that
comes with the package's source) and ALLSCAIP_DEVICE (default a GPU where there is one). Out: a
model and a data set. What a lesson teaches stands in the lesson.
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

BUNDLED_MODEL = "lite-xtb"  # has everything that a lesson may need
BUNDLED_DATA = Path(__file__).parents[2] / "data" / "xtb"

# what a lesson may ask of a model: how to say that it is absent, and how to see that it is there
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
    """The model that ALLSCAIP_MODEL names, in evaluation mode; says in one line which.

    `needs` are names out of `NEEDS`. Where the model lacks one of them, a line says so, and
    `default` is taken instead, as where no model is named: the bundled `lite-xtb`, or another.
    `device` overrules ALLSCAIP_DEVICE, for lessons that take the model apart on the CPU. Raises
    `ValueError` for an unknown need, and what `load_model` raises.
    """
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise ValueError(f"a lesson cannot need {sorted(unknown)}, only {sorted(NEEDS)}")
    name = os.environ.get("ALLSCAIP_MODEL") or default
    place = device or os.environ.get("ALLSCAIP_DEVICE")
    place = place or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(name, device=place, dtype=dtype)
    lacking = _lacking(model.config, needs)
    if lacking:
        print(f"{Path(name).stem} has no {' and no '.join(lacking)}: taking {default} here")
        name = default
        model = load_model(name, device=place, dtype=dtype)
    config = model.config
    print(
        f"{Path(name).stem}: {model.num_parameters:,} parameters, {config.num_layers} blocks of "
        f"{config.num_heads} heads, {config.hidden_size} channels, on {model.device}"
    )
    return model


def _lacking(config: AllScAIPConfig, needs: tuple[str, ...]) -> list[str]:
    return [NEEDS[need][0] for need in needs if not NEEDS[need][1](config)]


def open_data(split: str = "test") -> Dataset:
    """The labelled structures that ALLSCAIP_DATA names; says in one line which, and how many.

    Of a folder, what its `{split}.aselmdb` or its subfolder `{split}` holds, or else all of it.
    Raises `DataError` or `FileNotFoundError` where there is nothing.
    """
    named = os.environ.get("ALLSCAIP_DATA")
    path = Path(named or BUNDLED_DATA).expanduser()
    if not named and not path.exists():
        raise DataError(
            "the bundled data come with the source of the package, not with an installed one: "
            "set ALLSCAIP_DATA to a file or folder of .aselmdb"
        )
    for part in (path / f"{split}.aselmdb", path / split):
        if part.exists():
            path = part
            break
    data = Dataset(path)
    print(f"{path.parent.name}/{path.name}: {len(data):,} structures")
    return data
