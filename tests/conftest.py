import os
import sys

import pytest
import torch
import tqdm.std

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), os.path.join(TESTS, "bench")]
torch.set_num_threads(1)  # the models here are small; CI's machine has two cores
# tqdm's default lock is shared over forks. A fork that is killed while it holds it would never give
# it back, and tests kill forks. So only locks of threads, and no thread that may hold one at a fork.
tqdm.std.TqdmDefaultWriteLock.mp_lock = None
tqdm.std.tqdm.monitor_interval = 0


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that train for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless --slow is given")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
