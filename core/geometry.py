"""The two box conventions (imports no torch: configurations need it).

`modern` measures a box as x2 - x1 and centres the anchor of column j at j * stride. `legacy`, the convention of
maskrcnn-benchmark, counts the last pixel too (x2 - x1 + 1) and centres it at (j + 0.5) * stride. Weights trained with
one are wrong with the other, so the name travels in every checkpoint.
"""

from typing import Literal, NamedTuple

GeometryName = Literal["modern", "legacy"]


class Geometry(NamedTuple):
    """A box convention as the two constants that formulas need."""

    plus_one: float  # added to x2 - x1 for a width: 0 or 1 pixel
    centre_offset: float  # of an anchor inside its cell, in strides: 0 or 0.5


MODERN = Geometry(plus_one=0.0, centre_offset=0.0)
LEGACY = Geometry(plus_one=1.0, centre_offset=0.5)
GEOMETRIES: dict[str, Geometry] = {"modern": MODERN, "legacy": LEGACY}
