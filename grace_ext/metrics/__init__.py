"""Measures one or more drivers: bytes, ratios, errors, residuals and times, and warns of what they show.

`metrics.py` is what users turn on and read; `recorder.py` watches one driver; `advice.py` judges what it saw.
"""

from .metrics import Measured as Measured
from .metrics import Metrics as Metrics
from .metrics import Report as Report
