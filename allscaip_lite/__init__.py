"""AllScAIP (arXiv 2603.06567), small enough to read and complete enough to use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allscaip_lite.calculator import AllScAIPCalculator
    from allscaip_lite.checkpoints import load_model, save_model, save_official
    from allscaip_lite.config import PRESETS, AllScAIPConfig
    from allscaip_lite.errors import StructureError
    from allscaip_lite.model import AllScAIP, Prediction, Result
    from allscaip_lite.structures import Structures, structures_from_atoms

__all__ = [
    "PRESETS",
    "AllScAIP",
    "AllScAIPCalculator",
    "AllScAIPConfig",
    "Prediction",
    "Result",
    "StructureError",
    "Structures",
    "load_model",
    "save_model",
    "save_official",
    "structures_from_atoms",
]
__version__ = "0.2.0"

_MODULES = ("config", "errors", "structures", "model", "checkpoints", "calculator")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first used: torch is slow to load, and workers that
    label structures do without it.
    """
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
