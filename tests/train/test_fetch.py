"""The one download: cut off in time whatever the network does, nothing half-done left behind."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from fusedmlp.train.data import images
from fusedmlp.train.data.images import download

from .. import made_data


@pytest.fixture
def silent_server():
    """Accepts connections and never says a word, as a network that swallows packets looks."""
    server = socket.create_server(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{server.getsockname()[1]}/"
    server.close()


def test_a_download_that_is_never_answered_is_cut_off(tmp_path, silent_server):
    started = time.monotonic()
    reason = download("MNIST", tmp_path / "new" / "root", silent_server, connect_seconds=0.5)
    assert reason is not None
    assert time.monotonic() - started < 60
    assert list(tmp_path.iterdir()) == []  # also the folders are gone that the attempt made


def test_a_download_that_stalls_in_the_middle_is_cut_off_and_removed(tmp_path):
    """The first request is answered, all others hang: what the total limit is for."""
    made_data.need("torchvision")
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve():
        first = True
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            if first:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx")
                connection.close()
                first = False
            else:
                connection.recv(4096)
                connection.sendall(
                    b"HTTP/1.0 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 9
                )

    threading.Thread(target=serve, daemon=True).start()
    mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
    started = time.monotonic()
    # No limit for silence on the connection in this one: only the limit for all of it can end it.
    reason = download("MNIST", tmp_path, mirror, connect_seconds=60.0, download_seconds=4.0)
    server.close()
    assert reason == "not done within 4 s"
    assert time.monotonic() - started < 60
    assert list(tmp_path.iterdir()) == []


def test_a_refused_connection_is_reported_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    reason = download("MNIST", tmp_path, f"http://127.0.0.1:{port}/")
    assert "refused" in reason
    assert list(tmp_path.iterdir()) == []


def test_a_download_puts_complete_files_in_place(tmp_path, monkeypatch):
    """A child that makes files where torchvision would: what is checked is all around it."""
    code = (
        "import sys, pathlib\n"
        "raw = pathlib.Path(sys.argv[4], sys.argv[3], 'raw'); raw.mkdir(parents=True)\n"
        "(raw / 'file').write_text('x')\n"
    )
    monkeypatch.setattr(images, "_PROBE", "")
    monkeypatch.setattr(images, "_DOWNLOAD", code)
    assert download("MNIST", tmp_path / "root", "mirror") is None
    assert (tmp_path / "root" / "MNIST" / "raw" / "file").read_text() == "x"
    assert [entry.name for entry in (tmp_path / "root").iterdir()] == ["MNIST"]


def test_a_folder_that_cannot_be_made_is_a_reason_not_a_crash(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot write to" in download("MNIST", tmp_path / "file" / "below", "mirror")
