"""Predicts what compression gains: `grace-ext plan`, policy `auto` and `grace-ext bench`.

shapes.py, models.py   a model's shapes
bench.py               how fast the parts are on this machine
trace.py, cached.py    records one rank's step and replays it on a network
cost.py, network.py, simulate.py   what collectives take on a network, by formulas and message by message
probe.py, measure.py   the job's own network, measured
candidates.py, plan.py, picture.py, auto.py   what is compared, and what is recommended
"""
