"""A real PostgreSQL for the tests that need one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "postgresql"


@pytest.fixture(scope="session")
def _server() -> Iterator[str]:
    """The URL of a server's first database; each of xdist's processes has a server of its own."""
    # not in tmp_path: what root alone may enter, the server's user cannot reach
    folder = tempfile.mkdtemp(prefix="archdsl-postgresql-")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True)
    try:
        if started.returncode:
            # where everything must be tested, a missing server is a failure
            (pytest.fail if os.environ.get("ARCHDSL_CI") else pytest.skip)(started.stderr)
        yield started.stdout.strip()
    finally:
        subprocess.run([SCRIPT, "stop", folder], capture_output=True)
        shutil.rmtree(folder)


@pytest.fixture
def postgresql(_server: str) -> str:
    """The SQLAlchemy URL of a fresh, empty database."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(_server.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return _server.rpartition("/")[0] + "/" + name
