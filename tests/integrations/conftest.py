"""Each test begins without settings of Accelerate's."""

import pytest
from models import reset_accelerate


@pytest.fixture(autouse=True)
def without_settings():
    reset_accelerate()
    yield
    reset_accelerate()
