"""The model's configuration: one frozen dataclass, and presets that are values of it.

In: numbers from the paper (arXiv 2603.06567) or from a checkpoint. Out: `AllScAIPConfig`, which
every other module reads and none changes.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any, Literal

from allscaip_lite.errors import InputError

DISTANCE_BASES = ("gaussian", "sigmoid", "linear_sigmoid", "silu")
NORMALIZATIONS = ("rms", "layer", "none")
SIGMOID_REACH = 40.0  # a sigmoid is 0 or 1 in double precision this many widths away
ACTIVATIONS = ("gelu", "squared_relu", "leaky_relu", "relu", "smelu", "star_relu")
# The smallest and the largest value of each number. A number with a point may also be a whole one.
LIMITS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 16_384),
    "num_layers": (1, 500),
    "num_heads": (1, 1_024),
    "max_num_elements": (2, 119),  # the elements that have a symbol
    "cutoff": (0.1, 100.0),
    "k": (1, 10**9),  # no more than there are
    "rank_width": (1e-3, 100.0),
    "envelope_temperature": (1e-4, 100.0),
    "max_neighbors": (2, 5_000),
    "num_distance_basis": (2, 16_384),
    "direction_degree": (0, 20),
    "bond_order_degree": (1, 20),
    "bond_order_softness": (0.0, 1.0),
    "num_rotary_frequencies": (1, 4_096),
    "ffn_ratio": (1, 64),
    "attention_dropout": (0.0, 0.99),
    "ffn_dropout": (0.0, 0.99),
}
CHOICES = {
    "distance_basis": DISTANCE_BASES,
    "normalization": NORMALIZATIONS,
    "activation": ACTIVATIONS,
}
OPTIONAL = ("max_neighbors", "angular_channels")  # may be None
LARGEST = 10**9  # num_layers · hidden_size²; a model has some twenty times as many weights


@dataclass(frozen=True)
class AllScAIPConfig:
    """Everything that fixes the shape and the formulas of a model; lengths in Å.

    Raises `InputError`, saying what to change, for a value of another type or outside `LIMITS`, and
    when the values contradict each other.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    max_num_elements: int = 100  # rows of the atom embedding: atomic numbers 1 .. 99

    # the graph
    cutoff: float = 6.0
    k: int = 30  # the rank at which an edge has faded out
    soft_rank: bool = True  # False: positions in the sorted list, a surface with jumps
    truncated_rank: bool = True  # rank among the k + 20 nearest only; False: among all, by sigmoids
    rank_width: float = 0.2
    envelope_temperature: float = 0.1
    max_neighbors: int | None = None  # fixed number of slots a row (self-edge included)

    # the encodings
    distance_basis: Literal["gaussian", "sigmoid", "linear_sigmoid", "silu"] = "gaussian"
    num_distance_basis: int = 512
    direction_degree: int = 5  # Y_lm(direction) up to this degree goes into the edges
    bond_order_degree: int = 9  # Steinhardt orders up to this degree go into the nodes
    smooth_bond_order: bool = False  # edges count by their envelope; False: all alike, by steps
    bond_order_softness: float = 0.0  # δ of √(q² + δ²); 0: the energy has a kink where q is 0
    angular_channels: tuple[int, ...] | None = (10, 5, 2, 5, 10)  # LAE, by degree; None: off
    node_attention: bool = True
    rotary: bool = True  # ERoPE in the node attention
    num_rotary_frequencies: int = 32

    # the network
    activation: Literal["gelu", "squared_relu", "leaky_relu", "relu", "smelu", "star_relu"] = "gelu"
    normalization: Literal["rms", "layer", "none"] = "rms"
    residual_scaling: bool = True
    ffn_ratio: int = 2
    attention_dropout: float = 0.0  # both dropouts act in training only
    ffn_dropout: float = 0.0

    # the heads
    conservative: bool = True  # forces are the energy's gradient; False: a head of their own
    stress: bool = True  # conservative models of periodic systems also give the stress

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field.name, getattr(self, field.name), type(field.default))
            object.__setattr__(self, field.name, value)
        if self.num_layers * self.hidden_size**2 > LARGEST:
            raise InputError(
                f"num_layers {self.num_layers} of hidden_size {self.hidden_size} are more than "
                "fits into a memory: make them smaller"
            )
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.angular_channels is not None and sum(self.angular_channels) != self.head_size:
            raise InputError(
                f"angular_channels {self.angular_channels} add up to {sum(self.angular_channels)}, "
                f"but a head has {self.head_size} channels: make them equal, or None for no LAE"
            )
        if self.rotary and not self.node_attention:
            object.__setattr__(self, "rotary", False)  # ERoPE lives in the node attention

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def reach(self) -> float:
        """Å; pairs of atoms farther apart change neither an edge nor a rank."""
        return self.cutoff + self.rank_width * (4 if self.truncated_rank else SIGMOID_REACH)

    def replace(self, **changes: Any) -> AllScAIPConfig:
        """The same configuration with some values changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AllScAIPConfig:
        """Inverse of `to_dict`; unknown keys raise `InputError`, missing ones take the default."""
        if not isinstance(values, dict):
            raise InputError(f"a configuration is a dictionary, not a {type(values).__name__}")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"unknown configuration keys {sorted(unknown)}")
        return cls(**values)


def checked(name: str, value: Any, kind: type) -> Any:
    """A value of the configuration as it is kept; `InputError` for one that is not possible.

    name: of the field. kind: the type of its default.
    """
    if value is None and name in OPTIONAL:
        return None
    if name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            raise InputError(f"{name} {value!r} is not one of {', '.join(CHOICES[name])}")
        return value
    if name == "angular_channels":
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 20:
            raise InputError(f"{name} {value!r} is not a list of channels by degree, or None")
        for channels in value:
            if type(channels) is not int or channels < 0:
                raise InputError(
                    f"{name} {value!r}: numbers of channels are whole and not negative"
                )
        return tuple(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} {value!r} is neither True nor False")
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool) and kind is float:
        value = float(value)
    else:
        raise InputError(f"{name} {value!r} is not a {'' if kind is float else 'whole '}number")
    smallest, largest = LIMITS[name]
    if not smallest <= value <= largest:
        raise InputError(f"{name} {value} is outside {smallest:g} .. {largest:g}")
    return kind(value) if kind is float else value


# `lite` is this package's own: small enough to train and run on a laptop, and, unlike the
# reference, without steps where an edge comes or goes. 35M is the paper's small
# model with both encodings; the released 85M has neither.
PRESETS: dict[str, AllScAIPConfig] = {
    "lite": AllScAIPConfig(k=20, smooth_bond_order=True, bond_order_softness=0.03),
    "35M": AllScAIPConfig(
        hidden_size=512, num_layers=6, num_heads=8, angular_channels=(20, 10, 4, 10, 20)
    ),
    "85M": AllScAIPConfig(
        hidden_size=640, num_layers=10, num_heads=10, angular_channels=None, rotary=False
    ),
    "180M": AllScAIPConfig(
        hidden_size=768, num_layers=15, num_heads=12, angular_channels=None, rotary=False
    ),
    "1B": AllScAIPConfig(
        hidden_size=1536, num_layers=20, num_heads=24, angular_channels=None, rotary=False
    ),
}
