import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")
sys.path.insert(0, str(Path(__file__).parent))

from kernel_machines import MACHINES, Machine


@pytest.fixture(params=list(MACHINES))
def machine(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[request.param]
