"""PADet: promoted anchors with aligned features (Tang et al., arXiv 1908.03295, 2019)."""

import sys
from importlib.util import find_spec
from pathlib import Path

# `core` is a common name, and Python looks in the current folder first.
_core = find_spec("core")
if _core is None or _core.origin is None or Path(_core.origin).parents[1] != Path(__file__).parents[1]:
    _place = _core.origin or next(iter(_core.submodule_search_locations or ["?"])) if _core else "nothing"
    print(f"error: the package core is {_place}, which is not ours; run from another folder", file=sys.stderr)
    sys.exit(2)
