"""Composes parts that fit: `grace(...)` makes a Grace, one composition for all tensors or a policy that chooses among compositions.

`composition.py` has compositions, and what a composition and a policy have in common; `grace.py` has what users hold; `making.py` reads
specs into it; `porting.py` reads GRACE's own dictionary.
"""
