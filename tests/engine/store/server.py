"""A real S3 server on loopback, which can lose responses."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "cask"


class Losing:
    """An application that processes every request, but answers some conditional puts with an error.

    A client that retries then finds that the name exists, by its own put.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        """Held for a whole request: this server looks first and stores later, so that two puts of
        one name could both succeed, and fails to list what is removed, as no object store does."""
        self.every = 0
        """One of so many successful puts loses its response; 0 = none."""
        self.done = self.lost = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if not (environ["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environ):
            with self._lock:
                return [b"".join(self._app(environ, start_response))]
        answer: list[Any] = []
        with self._lock:
            body = b"".join(self._app(environ, lambda *fields: answer.extend(fields)))
            self.done += answer[0].startswith("200")
            lose = self.every and answer[0].startswith("200") and self.done % self.every == 0
            self.lost += bool(lose)
        if lose:
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        start_response(*answer[:2])
        return [body]


@contextmanager
def s3_server() -> Iterator[tuple[dict[str, str], Losing]]:
    """Run a server; yield (environment for clients, its application)."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = Losing(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ALLOW_HTTP": "true",
    }
    old = dict(os.environ)
    os.environ.update(environment)
    try:
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield environment, app
    finally:
        os.environ.clear()
        os.environ.update(old)
        server.shutdown()
        thread.join()
