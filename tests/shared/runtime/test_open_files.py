"""A command raises its soft limit of open files, and is refused where the system allows too few."""

import resource

import pytest
from mapet.shared.errors import UsageError
from mapet.shared.runtime.memory import allow_enough_files


@pytest.fixture(autouse=True)
def _limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    allow_enough_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(4096, hard)


def test_a_limit_that_cannot_be_raised_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))
    with pytest.raises(UsageError, match="may open 32 files at once"):
        allow_enough_files()
