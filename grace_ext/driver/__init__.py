"""Drives one rank's exchange: its pending gradients, their buckets and order, rounds, agreement, commit and rollback.

driver.py      the driver, and why it cannot deadlock
layout.py      buckets: which parameters travel together
agreement.py   how ranks find out that they do the same
choices.py     a policy at work: what each tensor goes through at a step
state.py       a state that was saved: read, checked, fitted
observer.py    the interface by which metrics watch a driver
"""

from .driver import Driver as Driver
