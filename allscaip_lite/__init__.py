"""AllScAIP (arXiv 2603.06567), small enough to read and complete enough to use."""

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.checkpoints import load_model, save_model, save_official
from allscaip_lite.config import PRESETS, AllScAIPConfig
from allscaip_lite.model import AllScAIP, Prediction, Result
from allscaip_lite.structures import StructureError, Structures, structures_from_atoms

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
