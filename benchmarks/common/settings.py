"""Lists the settings of every compressor that accuracy and speed are measured with, so that both tables can be joined by spec."""

from __future__ import annotations

from grace_ext.planning.candidates import completed

#: Two or three settings where a knob decides how much is sent, one of them the usual one; memories are the natural ones. Compressors that
#: choose positions at random send 5% (blocks: 10%) where others send 1%, which is too few for short trainings.
SETTINGS: dict[str, tuple[str, ...]] = {
    "none": ("none",),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "u8bit": ("u8bit",),
    "scaled_int": ("scaled_int(width=16)", "scaled_int"),
    "natural": ("natural(bits=8)", "natural"),
    "qsgd": ("qsgd(bits=2)", "qsgd(bits=4)", "qsgd(bits=8)"),
    "dqsgd": ("dqsgd(levels=7)", "dqsgd"),
    "adaqs": ("adaqs(levels=1)", "adaqs"),
    "inceptionn": ("inceptionn(bound_exponent=8)", "inceptionn"),
    "terngrad": ("terngrad",),
    "sketch": ("sketch(quantiles=8)", "sketch"),
    "signsgd": ("signsgd",),
    "signum": ("signum",),
    "efsignsgd": ("efsignsgd", "efsignsgd(block=1024)"),
    "onebit": ("onebit", "onebit(block=1024)"),
    "topk": ("topk(ratio=0.001)", "topk", "topk(ratio=0.1)"),
    "global_topk": ("global_topk(ratio=0.001)", "global_topk", "global_topk(ratio=0.1)"),
    "dgc": ("dgc(ratio=0.001)", "dgc", "dgc(ratio=0.1)"),
    "sidco": ("sidco(ratio=0.001)", "sidco", "sidco(ratio=0.1)"),
    "adaq": ("adaq(ratio=0.001)", "adaq", "adaq(ratio=0.1)"),
    "threshold": ("threshold(threshold=0.1)", "threshold", "threshold(threshold=0.001)"),
    "strom": ("strom(threshold=0.1)", "strom"),
    "pipeline": ("topk(ratio=0.001) > qsgd(bits=4)", "topk(ratio=0.01) > qsgd(bits=4)", "topk(ratio=0.1) > qsgd(bits=4)"),
    "randomk": ("randomk", "randomk(ratio=0.05)"),
    "randblock": ("randblock", "randblock(ratio=0.1)"),
    "wangni": ("wangni", "wangni(ratio=0.05)"),
    "demo": ("demo(topk=4)", "demo"),
    "powersgd": ("powersgd(rank=1)", "powersgd", "powersgd(rank=4)"),
    "powersgd_plus": ("powersgd_plus(rank=1)", "powersgd_plus", "powersgd_plus(rank=4)"),
    "lqsgd": ("lqsgd", "lqsgd(rank=4)"),
    "random_projection": ("random_projection(rank=1)", "random_projection"),
    "atomo": ("atomo(rank=1)", "atomo"),
    "vqsgd": ("vqsgd", "vqsgd(repeats=1000)"),
    "induced": ("induced",),
}


def specs() -> list[str]:
    """Returns the full specs of all settings."""
    return [str(completed(text)) for texts in SETTINGS.values() for text in texts]
