"""Models in files, by name or path.

In: a name or a path. Out: an `AllScAIP` in evaluation mode; and back into a file.

- ours: one `.safetensors` file with weights, configuration, normaliser, element references, card;
- official: fairchem's `.pt` files, which `official` reads and writes; the released ones come from
  the model hub.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from allscaip_lite.applicability import Seen
from allscaip_lite.checkpoints.official import check_numbers, check_weights, read_official
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.errors import CheckpointError, InputError
from allscaip_lite.files import atomic_write, fingerprint
from allscaip_lite.kernels import choose
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP, check_model, check_number_type
from allscaip_lite.structures import in_own_numbers

FORMAT = "allscaip-lite"
FORMAT_VERSION = 1
OFFICIAL_REPOSITORY = "facebook/OMol25"
OFFICIAL_FILES = {
    "allscaip-md-conserving-all-omol": "checkpoints/AllScAIP/AllScAIP-OMol102M-md-cons.pt",
    "allscaip-md-direct-all-omol": "checkpoints/AllScAIP/AllScAIP-OMol102M-md-d.pt",
}


# --- names and paths --------------------------------------------------------------------------


def bundled_models() -> dict[str, Path]:
    """The models that come with the package, by name."""
    folder = Path(str(resources.files("allscaip_lite"))) / "weights"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


@torch.inference_mode(mode=False)  # weights made in that mode allow no gradients, so no forces
@in_own_numbers
def load_model(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> AllScAIP:
    """Load a model by its name or from a file.

    Args:
        name_or_path: a bundled model ("lite"), a released one ("allscaip-md-conserving-all-omol",
            "allscaip-md-direct-all-omol": fetched once from the model hub, gated), or the path of a
            `.safetensors` file of ours or of an official `.pt` file.
        device: where it computes; the CPU where nothing is said.
        dtype: its number type; that of the file where nothing is said.
        kernels: how it computes: the fastest way on the device where nothing is said, "plain" for
            the formulas as they are written (see `allscaip_lite.kernels`).

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: for an unknown name or none, and where the hub does not give the file.
        FileNotFoundError: for a path without a file.
        CheckpointError: for a file that is no model, or a damaged one.
        UnsafeCheckpointError: for a pickle that contains more than data.
    """
    device = None if device is None else usable_device(device)
    check_number_type(dtype)
    path = _locate(name_or_path)
    if _is_safetensors(path):
        with _opened(path) as file:
            config, _, seen = _read_metadata(file, path)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            written = file.metadata().get("checksum")  # older files have none
        changed = written is not None and written != _checksum(state)
    else:
        config, state = read_official(path)
        released = {Path(file).name for file in OFFICIAL_FILES.values()}
        known = name_or_path in OFFICIAL_FILES or path.name in released
        seen, changed = copy.deepcopy(OMOL25) if known else None, False
    with torch.device("meta"):  # no weights are drawn only to be replaced
        model = AllScAIP(config)
    state.setdefault("charge_reference", torch.zeros((), dtype=torch.float64))  # of old files
    posterior = state.pop("posterior", None)
    check_weights(model.state_dict(), state, path.name)
    check_numbers(state, path.name)
    if changed:
        raise CheckpointError(f"{path.name} is damaged: its weights have another checksum")
    model.load_state_dict(state, assign=True)
    model.seen, model.posterior = seen, _factor(posterior, model, path)
    model = model.to(device=device, dtype=dtype).eval()
    model.operations = choose(kernels, model.device, model.dtype)
    return model


def read_card(name_or_path: str | Path) -> dict[str, Any]:
    """The card of a bundled model or of a `.safetensors` file of ours; see `save_model`."""
    path = _locate(name_or_path)
    if not _is_safetensors(path):
        return {}
    with _opened(path) as file:
        return _read_metadata(file, path)[1]


def _locate(name_or_path: str | Path) -> Path:
    if not isinstance(name_or_path, (str, Path)) or not str(name_or_path).strip():
        raise InputError(
            "give the name of a model, such as 'lite', or the path of its file, not "
            f"{name_or_path!r:.80}"
        )
    name, bundled = str(name_or_path), bundled_models()
    if name in bundled:
        return bundled[name]
    if name in OFFICIAL_FILES:
        return download_official(name)
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111  # leaves ~nobody as it is
    if path.is_file():
        return path
    known = [*bundled, *OFFICIAL_FILES]
    for official, file in OFFICIAL_FILES.items():
        if path.name == Path(file).name:
            raise FileNotFoundError(
                f"no file {name}; load_model({official!r}) fetches this one from the model hub"
            )
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder: give the path of the model file in it")
    if path.suffix in (".pt", ".safetensors") or path.parent != Path():
        raise FileNotFoundError(f"no file {name}; the models known by name are {', '.join(known)}")
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.3) or known
    raise InputError(
        f"no model is called {name!r}, and there is no such file. Did you mean {' or '.join(near)}?"
    )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"  # eight bytes of length, then JSON


def download_official(name: str) -> Path:
    """Fetch a released checkpoint, one of `OFFICIAL_FILES`, with `download_from_hub`."""
    return download_from_hub(OFFICIAL_REPOSITORY, OFFICIAL_FILES[name], name)


def download_from_hub(
    repository: str, file: str, name: str | None = None, kind: str = "model"
) -> Path:
    """Fetch a file of the model hub into the hub's cache, with progress, and return its path.

    Files that are there already are not fetched again, and need no network. The hub and its cache
    are those of `HF_ENDPOINT` and `HF_HOME`.

    Args:
        repository: OWNER/NAME on the hub.
        file: its path in the repository.
        name: what messages call it.
        kind: "model", or "dataset" for a repository of that kind.

    Raises:
        InputError: without token, access or network; the message says what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name = name or file
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    login = (
        "make a token at https://huggingface.co/settings/tokens and run `hf auth login`, "
        "or set HF_TOKEN"
    )
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type=kind))
    except errors.GatedRepoError as error:
        if huggingface_hub.get_token() is None:
            raise InputError(
                f"{name} is given to logged-in users only, and no token was found. "
                f"Accept the licence at {page}, then {login}."
            ) from error
        raise InputError(
            f"your account has no access to {name} yet. Ask for it at {page} (log in, accept the "
            "licence, wait for the approval), and make sure that your token may read gated "
            "repositories."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"the hub does not show {repository} to you: your token is missing, wrong or "
            f"expired: {login}."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is not in the cache and the model hub cannot be reached. Check the network "
            f"(and that HF_HUB_OFFLINE is not set), or bring {Path(file).name} from {page} on "
            "another way and give its path."
        ) from error
    except errors.EntryNotFoundError as error:
        raise InputError(
            f"{page} has no file {file} any more. Look for its new place there, download it, and "
            "give its path."
        ) from error
    except Exception as error:  # with its versions, the hub's client changes its HTTP library
        raise InputError(
            f"fetching {name} failed ({type(error).__name__}: {error}). Check the network and the "
            "space on the disk, and try again; what was fetched is kept."
        ) from error


# --- ours -------------------------------------------------------------------------------------


def save_model(model: AllScAIP, path: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Write a model into one `.safetensors` file, and return its path; its folder is made.

    The card is what a user should know (data, level of theory, errors, licence), any JSON values.
    Raises TypeError for what is no model, InputError for a name that does not end in .safetensors.
    """
    check_model(model)
    path = Path(path)
    check_file_name(path, path.name)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(model.config.to_dict()),
        "card": json.dumps(dict(card or {})),
    }
    if model.seen is not None:
        metadata["seen"] = json.dumps(model.seen.to_dict())
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if model.posterior is not None:  # half of it, since the other half is zero
        row, column = torch.tril_indices(*model.posterior.shape)
        state["posterior"] = model.posterior[row, column].float().cpu().contiguous()
    metadata["checksum"] = _checksum(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        save_file(state, partial, metadata)  # which only its owner may read
        plain = partial.with_name("mode")
        plain.touch()
        partial.chmod(plain.stat().st_mode)
    return path


def _checksum(state: Mapping[str, Tensor]) -> str:
    return fingerprint(state[name].reshape(-1).view(torch.uint8).numpy() for name in sorted(state))


def check_file_name(path: Path, shown: str) -> None:
    """Raise `InputError`, calling it `shown`, for a name that `save_model` would refuse."""
    if path.suffix != ".safetensors":
        raise InputError(f"{shown}: a model's file name ends in .safetensors")


# Levine et al., arXiv:2505.08762: H to Bi, charges −10 to +10, up to ten unpaired electrons, no
# cells; shortest and longest distances are not published.
OMOL25 = Seen(
    elements=set(chemical_symbols[1:84]),
    charges=set(range(-10, 11)),
    multiplicities=set(range(1, 12)),
    atoms=350,
    closest=None,
    farthest=None,
    kinds={"molecules"},
)


def _factor(values: Tensor | None, model: AllScAIP, path: Path) -> Tensor | None:
    """The factor of the last layer's covariance, (2H + 1, 2H + 1), from its lower half."""
    if values is None:
        return None
    size = model.energy_head.contract.weight.numel() + 1
    if values.shape != (size * (size + 1) // 2,) or not bool(values.isfinite().all()):
        raise CheckpointError(f"{path.name}: its posterior does not fit to its last layer")
    factor = torch.zeros(size, size, dtype=torch.float64)
    row, column = torch.tril_indices(size, size)
    factor[row, column] = values.double()
    return factor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path.name} is damaged ({error}); fetch or write it again"
        ) from error


def _read_metadata(file: Any, path: Path) -> tuple[AllScAIPConfig, dict[str, Any], Seen | None]:
    """The configuration, the card, and what training saw, where the file says so."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name} holds tensors, but is no {FORMAT} model: it must come from save_model"
        )
    if not metadata.get("format_version", "").isdecimal():
        raise CheckpointError(f"{path.name} is damaged: it has no version")
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(f"{path.name} is from a newer version: update this package")
    try:
        config = AllScAIPConfig.from_dict(json.loads(metadata["config"]))
        card = json.loads(metadata["card"])
        known = json.loads(metadata.get("seen", "null"))
        seen = None if known is None else Seen.from_dict(known)
    except KeyError as error:
        raise CheckpointError(f"{path.name} is damaged: it has no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: {error}; is this package too old?") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path.name} is damaged: its card is no dictionary")
    return config, card, seen
