"""Differential privacy: what a rank adds to its gradients before they are compressed, and the epsilon that this buys."""

from .settings import Privacy as Privacy
