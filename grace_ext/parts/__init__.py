"""Provides what an author of parts works with: `Part` and its knobs, tensors and steps, payload fields, and requests to the network.

All of these are plain values: none of them imports numpy, a framework or the network (`ops.py` declares the array protocol).
"""

from .field import Field as Field
from .part import Part as Part
from .part import knob as knob
from .requests import AllReduce as AllReduce
from .requests import Gather as Gather
from .requests import Scatter as Scatter
from .requests import Together as Together
from .tensor import StepInfo as StepInfo
from .tensor import TensorSpec as TensorSpec
