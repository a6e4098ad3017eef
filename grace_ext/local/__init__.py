"""Local-update training: each rank trains a model of its own, and from time to time the ranks exchange how far their models have moved.

`schedule.py` says when they do, `settings.py` checks that the options and parts fit, `model.py` is the algorithm on one rank, `worker.py`
runs it over a real engine, `server.py` and `connection.py` let ranks wait for each other, `messages.py` is the asynchronous form, and
`cluster.py` simulates N ranks in one process.
"""

from __future__ import annotations

from .cluster import LocalSGDCluster as LocalSGDCluster
from .schedule import Schedule as Schedule
from .schedule import post_local as post_local
