"""Fixtures for all tests."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # as where a shell runs the tests in its background: commands that they start, and interrupt, would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

from servers import DISTURBING, ENVIRONMENT, S3Server, run_moto, run_seaweed

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the test servers' credentials into the environment, and take the developer's own out of it."""
    nowhere = tmp_path_factory.mktemp("aws") / "none"
    with pytest.MonkeyPatch.context() as patch:
        for name in DISTURBING:
            patch.delenv(name, raising=False)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            patch.setenv(name, str(nowhere))
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def seaweed(s3_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS server; fails, never skips, where the binary is missing."""
    yield from run_seaweed(tmp_path_factory.mktemp("seaweed"))


@pytest.fixture(scope="session")
def moto_server(s3_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A moto server; fails, never skips, where moto is missing."""
    yield from run_moto(tmp_path_factory.mktemp("moto"))
