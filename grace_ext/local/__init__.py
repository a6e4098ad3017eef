"""Local-update training: ranks train models of their own and exchange, from time to time, how far these have moved.

`schedule.py` says when, `settings.py` checks what goes with what, `model.py` is the algorithm on one rank, `worker.py` runs it over a real
engine (with `server.py`, where ranks wait for each other), `messages.py` is the asynchronous form, `cluster.py` simulates N ranks.
"""

from __future__ import annotations

from .cluster import LocalSGDCluster as LocalSGDCluster
from .schedule import Schedule as Schedule
from .schedule import post_local as post_local
