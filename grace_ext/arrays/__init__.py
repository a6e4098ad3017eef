"""Implements the array protocol on the host: `NumpyOps`, the reference; `CompiledOps`, the same bits by compiled loops; sampling."""
