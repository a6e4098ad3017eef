"""All that grace_ext asks of its own parts and transports, asked of these: pytest examples/plugin (once it is installed)."""

from tempfile import mkdtemp

from grace_ext_files import FileTransport

from grace_ext.testing import communicator_contract, contract, memory_contract, policy_contract, transport_contract


def connected(size):
    folder = mkdtemp()
    return [FileTransport(folder, rank, size) for rank in range(size)]


TestBlur = contract("blur", "blur(block=1)", "blur(block=100)")
TestBounded = memory_contract("bounded", "bounded(limit=0.01)")
TestSharded = communicator_contract("sharded")
TestByDims = policy_contract("by_dims(matrices=topk(ratio=0.1) + residual)", "by_dims(others=fp16)")
TestFiles = transport_contract(connected)
