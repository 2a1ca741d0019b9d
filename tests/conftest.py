"""Fixtures for all tests: one device, one thread, and buffers that are never zero by accident."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("wkv", deadline=None, derandomize=True)
settings.load_profile("wkv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors live: cpu (default), cuda, cuda:1, ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: `pytest --device cuda` runs the same claims on a GPU."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run side by side (pytest -n); a thread each keeps them out of one another's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so that reading a buffer before writing it cannot go unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Optional public data files beside the checkout; tests that want them skip where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no optional data folder {folder}")
    return folder
