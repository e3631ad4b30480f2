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
    from typing import TYPE_CHECKING, Any

    from lcm_kit.serve.adapters import Served
    from tests.serve.small import ADAPTER, Process, served

    if TYPE_CHECKING:
        from tests.serve.browser import Visit

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

    @pytest.fixture(scope="module")
    def chrome() -> Iterator[Any]:
        """Chromium, without a window."""
        from tests.serve.browser import browser

        with browser() as found:
            yield found

    @pytest.fixture
    def visit(chrome: Any, live: Process) -> Iterator[Visit]:
        """The page in a browser that has been nowhere; complaints that a test does not expect fail it."""
        from tests.serve.browser import Visit

        found = Visit.begin(chrome, live)
        yield found
        found.end()
