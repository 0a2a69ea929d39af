"""A `gs://` bucket on this machine: gcp-storage-emulator and what TensorStore needs beside it.

TensorStore writes on condition that an object is as it last saw it, by the generation that a read's
header told. The emulator knows generations but neither the header nor conditions.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from unittest import mock

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_insert, _download = objects.insert, objects.download


def _generation(storage, bucket: str, name: str) -> str:
    """Of an object, "0" where there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def insert(request, response, storage, *unused) -> None:
    """Writes an object if it is as the request wants it."""
    wanted = request.query.get("ifGenerationMatch")
    names = request.query.get("name") or [request.data["meta"]["name"]]
    if wanted and wanted[0] != _generation(storage, request.params["bucket_name"], names[0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
    else:
        _insert(request, response, storage)


def download(request, response, storage, *unused) -> None:
    """Reads an object, and its generation, unless it is the one that the request knows."""
    names = request.params["bucket_name"], request.params["object_id"]
    generation = _generation(storage, *names)
    if request.query.get("ifGenerationNotMatch") == [generation]:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    response["X-Goog-Generation"] = generation
    _download(request, response, storage)


@contextlib.contextmanager
def emulated(name: str) -> Iterator[dict[str, str]]:
    """Serves an empty bucket; gives the environment in which processes find it."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    handlers = [
        (path, {method: insert if f is _insert else f for method, f in methods.items()})
        for path, methods in server.HANDLERS
    ]
    with (
        mock.patch.object(server, "HANDLERS", handlers),
        mock.patch.object(objects, "download", download),
        server.create_server("localhost", port, in_memory=True, default_bucket=name),
    ):
        # Of gcsfs, TensorStore and ArrayRecord. The last asks gcsfs not to look for credentials.
        address = f"http://localhost:{port}"
        names = (
            "STORAGE_EMULATOR_HOST",
            "TENSORSTORE_GCS_HTTP_URL",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT",
        )
        settings = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        yield {**os.environ, **dict.fromkeys(names, address), **settings}
