"""Starts a collective on rank 0 only, with plain Horovod over Gloo, and prints the error with which Horovod's own stall check ends it."""

from __future__ import annotations

import os
import time

os.environ.update(HOROVOD_STALL_CHECK_TIME_SECONDS="1", HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="3")
import horovod.tensorflow as hvd  # noqa: E402 (reads them)
import tensorflow as tf  # noqa: E402

hvd.init()
if hvd.rank() == 0:
    try:
        hvd.allreduce(tf.ones(3), name="alone")
    except Exception as error:
        print("ENDED", str(error).partition("}} ")[2], flush=True)
else:
    time.sleep(20)
