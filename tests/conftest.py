"""Fixtures for all tests: one device, one thread, and buffers that are never zero by accident."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from scorecard import ScoreCard

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=500)  # pytest --hypothesis-profile thorough
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors live: cpu (default), cuda, cuda:1, ...")
    parser.addoption("--scorecard", action="store_true", help="full counts, and the score card at the end")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ScoreCard(config.getoption("--scorecard")))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: `pytest --device cuda` runs the same claims on a GPU."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run side by side (pytest -n); a thread each keeps them out of one another's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(device: torch.device) -> Iterator[None]:
    """`torch.empty` gives NaN, so that reading a buffer before writing it cannot go unnoticed.

    Torch does so in its deterministic mode only, in which some CUDA kernels refuse to run.
    """
    torch.use_deterministic_algorithms(device.type == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Optional public data files beside the checkout; tests that want them skip where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no optional data folder {folder}")
    return folder
