"""Compresses the gradients of other packages' trainers: one file per trainer, each with one thing to import.

`transformers.py` has a callback for Hugging Face's Trainer, `accelerate.py` a function for Accelerate, `lightning.py` a strategy for
Lightning. Each finds the DistributedDataParallel that the trainer makes, registers the hook of `compress_ddp` on it, and keeps the memory
of every rank with the trainer's own checkpoints. A file imports its trainer, so nothing else imports that file. docs/trainers.md shows a
whole script for each. `torchft.py` has a DistributedDataParallel whose replicas may die and join (docs/torchft.md).
"""
