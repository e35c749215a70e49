"""What all tests share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Times and last bits do not depend on the machine's cores; a test of threads sets its own number."""
    torch.set_num_threads(1)
