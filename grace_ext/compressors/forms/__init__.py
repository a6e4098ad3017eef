"""This package holds what several compressors share.

`positions.py` codes indices; `scales.py` has blocks and the floats that are sent per block; `sparse.py`, `two_sided.py` and `lowrank.py`
have the bases of sparse, sign and low-rank compressors; `merged.py` compresses many small tensors as one.
"""
