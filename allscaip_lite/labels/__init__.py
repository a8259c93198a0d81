"""Reference methods that label structures: GFN2-xTB, wB97M-V/def2-TZVPD, SPC/Fw, CHGNet."""

from __future__ import annotations

from allscaip_lite.errors import InputError


class LabelError(InputError):
    """A structure that a method cannot label, or a geometry that cannot be made."""
