"""If sizes travel before the data, a rank compares each announced size with the largest possible payload before it allocates memory."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ext.errors import PayloadError
from grace_ext.testing import inputs

from .hub import Hub, Poor, step
from .test_driver import SHAPES, drivers, shuffled

GATHERED = "threshold(threshold=0.5) + residual"
BROADCAST = f"{GATHERED} @ broadcast"
SCATTERED = "threshold(threshold=0.5) + residual @ sparse_allreduce"


class Told(Poor):
    """An engine on which rank 1 announces `said` bytes."""

    said = 0

    def received(self, collective, result):
        if collective.label.endswith(".size"):
            result[1] = np.full(len(result[1]) // 8, self.said, np.int64).view(np.uint8)
        return result


@pytest.mark.parametrize("spec", [GATHERED, BROADCAST, SCATTERED])
@pytest.mark.parametrize("said", [2**60, 10**6, -1])
def test_an_impossible_size_is_refused(spec, said):
    made = drivers(spec, 3, Told)
    gradients = inputs.ranks(3, 0, shapes=SHAPES)
    hub = Hub([driver.transport for driver in made])
    for driver in made:
        driver.agreed, driver.prefix = True, "grace/0"
        driver.transport.said = said
    results = hub.run([step(d, g, o) for d, g, o in zip(made, gradients, shuffled(3, 0), strict=True)])
    for result in results:
        assert isinstance(result, PayloadError) and result.rank == 1, result
        assert f"announced size is {said} bytes; it can be of at most" in str(result)
    assert all(name.endswith(".size") or "scatter" in name for names in hub.starts for name in names)
    assert all(not driver.state for driver in made)


def test_an_agreement_of_impossible_size_is_refused():
    made = drivers(GATHERED, 3, Told)
    for driver in made:
        driver.transport.said = 2**60
    results = Hub([driver.transport for driver in made]).run([driver.agree() for driver in made])
    assert all(isinstance(result, PayloadError) and result.rank == 1 for result in results), results
