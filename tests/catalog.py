"""Lists the specs of the contract suite: every registered part, with default and other knobs, in every allowed combination."""

from __future__ import annotations

import grace_ext
from grace_ext.errors import IncompatiblePartsError

# Variants that are tested besides the bare name. A part without an entry is tested with its defaults only.
COMPRESSOR_VARIANTS = {
    "topk": ("topk(ratio=0.25)", "topk(ratio=0.25, values='fp16')", "topk(ratio=0.1, values='bf16')", "topk(ratio=1)",
             *(f"topk(ratio=0.1, index={index!r})" for index in ("golomb", "packed", "block16", "bitmap"))),
    "randomk": ("randomk(ratio=0.25)", "randomk(ratio=0.25, scale=True)", "randomk(ratio=0.25, values='fp16')"),
    "randblock": ("randblock(ratio=0.25)", "randblock(ratio=0.25, scale=True)"),
    "pipeline": ("topk(ratio=0.25) > sign", "threshold(threshold=0.5) > fp16", "topk(ratio=0.25) > qsgd(bits=2, bucket=64)"),
    "dgc": ("dgc(ratio=0.25)", "dgc(ratio=0.1, values='fp16', resample=False)", "dgc(ratio=0.05, sample_ratio=0.1, sampling='shared')"),
    "sidco": ("sidco(ratio=0.25, stages=1)", "sidco(ratio=0.05, distribution='pareto')",
              "sidco(ratio=0.05, distribution='gamma', values='fp16', every=1)"),
    "global_topk": ("global_topk(ratio=0.25)", "global_topk(ratio=0.1, values='bf16', index='golomb')",
                    "global_topk(ratio=0.1) > qsgd(bits=4)"),
    "adaq": ("adaq(ratio=0.25)", "adaq(ratio=1)", "adaq(ratio=0.1, index='packed')"),
    "strom": ("strom(threshold=0.5)", "strom(threshold=0.5, multi=True)", "strom(threshold=0.001, multi=True)"),
    "wangni": ("wangni(ratio=0.25)", "wangni(ratio=1)"),
    "random_projection": ("random_projection(rank=1)", "random_projection(rank=8)"),
    "atomo": ("atomo(rank=1)", "atomo(rank=4)"),
    "demo": ("demo(topk=4)", "demo(chunk=8, topk=8, values='fp32')", "demo(topk=4, values='fp16', sign=True)"),
    "induced": ("induced(biased=topk(ratio=0.25), rest=qsgd(bits=4))",
                "induced(biased=dgc(ratio=0.1), rest=randblock(ratio=0.25, scale=True))"),
    "signum": ("signum(momentum=0)", "signum(momentum=0.5, block=8)"),
    "threshold": ("threshold(threshold=0.5)", "threshold(threshold=0.5, values='bf16')", "threshold(threshold=0)",
                  "threshold(like_topk=0.01)"),
    "qsgd": ("qsgd(bits=4)", "qsgd(levels=1000)", "qsgd(bits=2, bucket=64)", "qsgd(levels=32767)"),
    "adaqs": ("adaqs(levels=1, window=1)",),
    "dqsgd": ("dqsgd(factor=0.5, max_levels=1000)",),
    "efsignsgd": ("efsignsgd(block=64)",),
    "onebit": ("onebit(block=64)",),
    "terngrad": ("terngrad(clip=2.5)",),
    "natural": ("natural(bits=8)",),
    "u8bit": ("u8bit(block=64)",),
    "inceptionn": ("inceptionn(bound_exponent=7)", "inceptionn(bound_exponent=15)"),
    "sketch": ("sketch(quantiles=2)", "sketch(quantiles=1000)"),
    "scaled_int": ("scaled_int(width=16, block=64)", "scaled_int(width=8, rounding='stochastic')"),
    "vqsgd": ("vqsgd(repeats=1)", "vqsgd(repeats=300, hull='l1')"),
    "signsgd": ("signsgd(ties='plus')", "signsgd(block=64)", "signsgd(ties='plus', block=1)"),
    "powersgd": ("powersgd(rank=4, feedback='mean')", "powersgd(rank=1, warm_start=False)"),
    "powersgd_plus": ("powersgd_plus(rank=3, refresh_period=2, refresh='randomized', feedback='mean')", "powersgd_plus(refresh_period=5)",
                      "powersgd_plus(refresh_period=1)", "powersgd_plus(rank=3, refresh_period=1, refresh='gram')",
                      "powersgd_plus(refresh_period=2, refresh='gram', feedback='mean')"),
    "lqsgd": ("lqsgd(rank=3, bits=4, alpha=50)",),
}
MEMORY_VARIANTS = {
    "residual": ("residual(beta=0.9, gamma=0.5)",),
    "dgc": ("dgc(nesterov=True, clipping=1)", "dgc(momentum=0.5, masking=False)"),
    "diana": ("diana(alpha=0.25)",),
    "cser": ("cser(reset_period=1)",),
    "dist_ef_block": ("dist_ef_block(momentum=0.9)", "dist_ef_block(momentum=0.5, nesterov=True)"),
    "gradient_compression": ("gradient_compression(momentum=0.5, nesterov=True)",),
    "momentum_compression": ("momentum_compression(momentum=0.5)",),
    "update_compression": ("update_compression(momentum=0.5, nesterov=True)", "update_compression(masking=True)"),
}
#: Policies have required knobs, so each registered one needs an entry here.
POLICY_VARIANTS = {
    "by_size": ("by_size(large=topk(ratio=0.1) + residual, min_elements=100)",),
    "by_name": ("by_name({'*.bias': none, 'embed*': topk(ratio=0.1) + residual}, default=efsignsgd + residual)",),
    "warmup": ("warmup(steps=2, then=topk(ratio=0.1) + residual)",),
    "ratio_warmup": ("ratio_warmup(steps=3, then=topk(ratio=0.1) + residual)",),
    "every": ("every(n=2, then=topk(ratio=0.1) + residual, otherwise=none)",),
    "accordion": ("accordion", "accordion(high=lgreco(every=2, window=1), interval=2)"),
    "lgreco": ("lgreco", "lgreco(every=2, window=1, base=qsgd(bits=4))", "lgreco(every=3, window=2, measure=compensated)"),
    "auto": ("auto(steps=2, candidates=['topk(ratio=0.01) + residual'])",),
}

COMPRESSORS = tuple(text for name in grace_ext.compressors.names() for text in (name, *COMPRESSOR_VARIANTS.get(name, ())))
MEMORIES = tuple(text for name in grace_ext.memories.names() for text in (name, *MEMORY_VARIANTS.get(name, ())))
POLICIES = tuple(text for name in grace_ext.policies.names() for text in POLICY_VARIANTS[name])


def natural(compressor: str) -> str:
    """Returns the communicator that a compressor gets if the spec names none."""
    return grace_ext.grace(f"{compressor} + none").communicator.name


def _allowed(compressor: str, memory: str, communicator: str) -> bool:
    try:
        grace_ext.grace(f"{compressor} + {memory} @ {communicator}")
    except IncompatiblePartsError:
        return False
    return True


#: Communicators that carry payloads themselves. Each of them may be used between nodes in a two-level one: test_levels.py.
COMMUNICATORS = tuple(name for name in grace_ext.communicators.names() if not grace_ext.communicators.get(name).two_level)


def compositions(compressors: tuple[str, ...], memories: tuple[str, ...], *, natural_only: bool) -> list[str]:
    """Returns all allowed specs of these parts, with the natural communicators only, or with all others only."""
    return [
        f"{compressor} + {memory} @ {communicator}"
        for compressor in compressors
        for communicator in COMMUNICATORS
        if (communicator == natural(compressor)) == natural_only
        for memory in memories
        if _allowed(compressor, memory, communicator)
    ]


#: Compressors that are combined with all memories that take them; the others are combined with 'none' and 'residual' only.
REPRESENTATIVE = (
    "topk(ratio=0.25)", "threshold(threshold=0.5)", "randomk(ratio=0.25)", "randomk(ratio=0.25, scale=True)", "qsgd(bits=4)",
    "efsignsgd", "powersgd",
)  # fmt: skip
_BARE = tuple(grace_ext.compressors.names())
_OTHER_MEMORIES = tuple(text for text in MEMORIES if text not in ("none", "residual"))
#: Specs with the natural communicators.
NATURAL = compositions(COMPRESSORS, ("none", "residual"), natural_only=True)
NATURAL += compositions(REPRESENTATIVE, _OTHER_MEMORIES, natural_only=True)
#: NATURAL, and specs with every other communicator that is allowed.
ALL = NATURAL + compositions(_BARE, ("residual",), natural_only=False)
#: One spec per compressor variant with its natural communicator: PLAIN without, FEEDBACK with error feedback.
PLAIN = compositions(COMPRESSORS, ("none",), natural_only=True)
FEEDBACK = compositions(COMPRESSORS, ("residual",), natural_only=True)
#: The contract (test_contract.py) tests PLAIN and FEEDBACK; these are the other specs.
MIXES = [s for s in ALL if s not in PLAIN + FEEDBACK]
#: Compressors whose residuals are representable in float32.
EXACT_VALUES = ("none", "fp16", "bf16", "topk", "randomk", "randblock", "threshold", "dgc", "sidco", "global_topk")


def shelf() -> list[str]:
    """Returns specs in which every part occurs at least once, in a natural combination; real jobs loop over them."""
    specs = []
    for name in grace_ext.compressors.names():
        part = grace_ext.compressors.get(name).create()
        specs.append(f"{part} + {part.natural_memory} @ {natural(name)}")
    for name in grace_ext.memories.names():
        if not grace_ext.memories.get(name).diverges:
            specs.append(next(s for s in compositions(REPRESENTATIVE, (name,), natural_only=True)))
    for name in COMMUNICATORS:
        for compressor in (*REPRESENTATIVE, "signsgd"):
            if _allowed(compressor, "residual", name):
                specs.append(f"{compressor} + residual @ {name}")
    return list(dict.fromkeys(specs))
