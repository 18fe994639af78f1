"""Where tests of kernels make sense."""

import pytest

from pallas_kernels.testing import ON_GPU

simulated = pytest.mark.skipif(ON_GPU, reason="about the simulator, or about no GPU")
