"""Every registered part, with default and other knobs, passes the contract of its kind, which docs/extending.md describes.

Communicators of two levels are missing: they carry nothing themselves (tests/exchange/test_hierarchy.py). The engines' transports pass
theirs in real jobs (tests/frameworks/test_transports.py).
"""

from grace_ext.testing import communicator_contract, contract, memory_contract, policy_contract

from ..catalog import COMMUNICATORS, COMPRESSORS, MEMORIES, POLICIES

TestRegistry = contract(*COMPRESSORS)
TestMemories = memory_contract(*MEMORIES)
TestCommunicators = communicator_contract(*COMMUNICATORS, "reduce_scatter(feedback=False)")
TestPolicies = policy_contract(*POLICIES)
