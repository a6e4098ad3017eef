"""Serves the names of horovod.torch over torch.distributed, for jobs without Horovod.

`api.py` collects the public names; `world.py` has init, shutdown, ranks and process sets; `move.py` and `reduce.py` have the collectives;
`model.py` has broadcasts of parameters and optimizer states.

Below them, `pieces.py` says how each collective is launched, and `handles.py` keeps those that were started. `channel.py` launches the
collectives of a process set in order; its docstring has the rules by which ranks that differ get an error and not a hang. Its parts are
`signature.py` (what ranks compare), `groups.py` (process groups, comparisons, waits) and `deadlock.py` (ranks that wait for each other).
"""
