"""What several tests of the server share. They are skipped where the extra `serve` is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx", "jsonschema")
MISSING = [name for name in NEEDED if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str | None:
    return f"tests/serve are left out: {', '.join(MISSING)} not installed" if MISSING else None


if not MISSING:
    from collections.abc import Iterator

    from lcm_kit.serve.adapters import Served
    from tests.serve.small import ADAPTER, Process, served

    @pytest.fixture(scope="session")
    def tiny() -> Served:
        """The embedded base with the LoRA that comes with it."""
        return served()

    @pytest.fixture(scope="session")
    def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
        """A server that keeps pictures and votes, for tests of the page."""
        from tests.serve.browser import chromium

        chromium()  # or the test is skipped before a server is started for it
        data = str(tmp_path_factory.mktemp("live"))
        found = Process.start("--adapter", ADAPTER, "--data", data)
        yield found
        found.end()
