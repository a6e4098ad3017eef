"""Saves and loads what compression keeps, on the same number of ranks or another.

`saveable.py` is what an object with state offers; `checkpoint.py` has `save` and `load`; `files.py` writes and reads a checkpoint's folder;
`statefile.py` is the format of one file; `resize.py` fits states to another number of ranks; `elastic.py` does so in a running job.
"""
