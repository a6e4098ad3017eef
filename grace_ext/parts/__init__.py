"""What the author of a part works with: `Part` and its knobs, tensors and steps, payload fields, and requests to the network.

Everything here is plain values: nothing imports numpy, a framework or the network (`ops.py` declares the array protocol).
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
