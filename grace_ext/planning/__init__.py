"""Predicts what compression gains: `grace-ext plan`, policy `auto` and `grace-ext bench`.

shapes.py, models.py   read the shapes of a model's gradients
bench.py               times the parts on this machine
trace.py, cached.py    record one rank's step and replay it on a network
cost.py, network.py, simulate.py   compute the time of collectives, by formulas and message by message
host.py                computes the time of copies between GPU and host
probe.py, measure.py   measure the job's own network
candidates.py, plan.py, picture.py, auto.py   choose candidates, compare and draw them, and recommend one
"""
