"""Exchanges the tensors of one bucket without touching the network: generators that yield collectives and are resumed with results.

From the inside out, each file knowing only those before it:
  effects.py     what a generator may yield: Start, Wait, Split, and the Collective that they carry
  message.py     the bytes of one rank's message: header, payloads
  transport.py   the interface of an engine, and how it carries a collective that the engine lacks
  tensor.py      one tensor: memory -> compressor -> communicator -> memory
  merge.py       small tensors of a bucket laid end to end and exchanged as one
  fusing.py      the requests of one round, one collective for each kind
  bucket.py      all tensors of a bucket, side by side
  hierarchy.py   the same in two levels: inside the nodes, and between them
  perform.py, lockstep.py   execute the effects: on a transport, and for N simulated ranks in one process
"""
