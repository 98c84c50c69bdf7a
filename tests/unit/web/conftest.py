import gzip
import threading

import httpx
import orjson
import pytest

from dicomscp.study import layout
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.decoders import Decoders, Limits
from dicomscp.web.server import bind, serve
from tests.unit.web.held import FilledArchive


class Gateway:
    """The application on a real server, over an archive and a published tree."""

    def __init__(self, root):
        self.archive = FilledArchive(root)
        self.published, self.state = root / "dicomweb", root / "state"
        self.stop = threading.Event()
        self.client = None
        self.decoders = None

    def start(self, archive=None, limits=None, **settings):
        self.decoders = Decoders(limits or Limits())
        app = create_app(
            archive or self.archive, WebSettings(**settings), self.published, self.state, self.decoders
        )
        self.socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(
            target=serve, args=(app, self.socket, self.stop), kwargs={"drain_seconds": 2}
        )
        self.thread.start()
        # httpx would ask for gzip by itself.
        self.client = httpx.Client(base_url=self.url, headers={"accept-encoding": "identity"}, timeout=10)
        return self.client

    def publish(self, relative, document):
        self.publish_bytes(relative, orjson.dumps(document))

    def publish_bytes(self, relative, document):
        path = self.published / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_name(".making")
        making.write_bytes(gzip.compress(document, mtime=0))
        making.replace(path)

    def record(self, study_uid, **record):
        path = self.state.parent / layout.state_path(study_uid)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(record))

    def end(self):
        if self.client:
            self.client.close()
            self.stop.set()
            self.thread.join(10)
            self.socket.close()
            assert not self.thread.is_alive()
        if self.decoders:
            self.decoders.close()
        self.archive.engine.dispose()


@pytest.fixture
def gateway(tmp_path):
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.end()
