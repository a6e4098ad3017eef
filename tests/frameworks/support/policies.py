"""Policies for real jobs. Each changes what is sent, or which collectives are used, by tensor or within 8 steps."""

from __future__ import annotations

#: Patterns match the parameters of both problems: 'b' of tf_training.py, '*.bias' of training.py.
SPECS = (
    "by_size(min_elements=40, large=topk(ratio=0.1) + residual)",
    "by_name({'*b': none, '*bias': none}, default=powersgd(rank=2) + residual)",
    "warmup(steps=2, then=topk(ratio=0.1) + residual)",
    "every(3, none, topk(ratio=0.1) + residual)",
    "every(2, powersgd(rank=2) + residual, topk(ratio=0.1) + residual)",
    "ratio_warmup(steps=4, stages=2, then=topk(ratio=0.05) + residual)",
    "accordion(high=topk(ratio=0.2) + residual, low=efsignsgd + residual, interval=2, threshold=0.3)",
    "by_size(min_elements=40, large=lgreco(base=powersgd(rank=2) + residual, every=3, window=2))",
    "warmup(steps=2, then=lgreco(base=topk(ratio=0.1) + residual, every=3, window=2, alpha=1.2))",
)
