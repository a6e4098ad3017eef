"""Reproduces claims of papers with the package alone, one experiment per file, for `grace-ext papers` and benchmarks/papers.

`experiment.py` says what an experiment has, `listed.py` names those that are here. benchmarks/papers has more, which need the checkout.
"""
