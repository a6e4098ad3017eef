"""The version of this package, which packaging, checkpoints and `grace-ext check` read."""

__version__ = "0.1.0"
