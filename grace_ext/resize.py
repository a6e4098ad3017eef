"""Keeps the public name `grace_ext.resize.resized`; the code is in checkpoints/resize.py."""

from .checkpoints.resize import resized as resized
