"""Composes parts that fit: `grace(...)` makes a Grace, one composition for all tensors or a policy that chooses among compositions.

`route.py` is what a composition and a policy have in common; `composition.py` has both classes; `making.py` reads specs into them;
`porting.py` reads GRACE's own dictionary.
"""

from .composition import Composition as Composition
from .composition import Grace as Grace
from .making import grace as grace
from .porting import from_params as from_params
