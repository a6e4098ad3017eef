"""All that grace_ext asks of its own compressors, asked of this one: pytest examples/plugin (once it is installed)."""

from grace_ext.testing import contract

TestBlur = contract("blur", "blur(block=1)", "blur(block=100)")
