"""A bucket on this machine for tests/test_gs.py: gcp-storage-emulator, and the variables by which the four libraries
that open gs:// paths (gcsfs, google-cloud-storage, TensorStore, array_record) find it.

What it does not show is listed in docs/launch.md.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def emulated() -> Iterator[str]:
    """gs:// address of an empty bucket in this process's memory, for this process and those it starts."""
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
            patch.setenv(name, address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks a service that is not emulated
        from gcp_storage_emulator.server import create_server  # of the extra test

        server = create_server("localhost", port, in_memory=True, default_bucket="bucket")
        server.start()
        try:
            yield "gs://bucket"
        finally:
            server.stop()
