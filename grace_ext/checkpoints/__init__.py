"""Saves and loads the state that compression keeps, on the same number of ranks or another.

`checkpoint.py` has `save` and `load`; `saveable.py` is the interface of an object with state; `files.py` writes and reads a checkpoint's
folder; `statefile.py` is the format of one file; `resize.py` fits states to another number of ranks; `elastic.py` does so in a running job.
"""
