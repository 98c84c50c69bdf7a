"""A package of npm that looks like OHIF's, small, with all that is fixed to "/" in the real one."""

import base64
import hashlib
import io
import tarfile

PAGE = """<!doctype html><html><head><meta name="x" content="/assets/browser.xml">
<script>console.time("x"),window.PUBLIC_URL="/"</script><link rel="manifest" href="/manifest.json">
<script rel="preload" as="script" src="/app-config.js"></script>
<script>function browserImportFunction(n){return import(n)}window.PUBLIC_URL="/"</script>
<script defer src="/app.bundle.0123456789abcdef.js"></script><link href="/app.bundle.css" rel="stylesheet">
</head><body><a href="//elsewhere.example/">x</a></body></html>"""
SCRIPT = (
    b"""__webpack_require__.p = "/";
browserImportFunction('/dicom-microscopy-viewer/dicomMicroscopyViewer.min.js');
for (let i = 0; i < ModalitiesInStudy.Value.length; i++) {}
"""
    + b"// so that deflating gains something\n" * 100
)
FILES = {
    "index.html": PAGE.encode(),
    "app.bundle.0123456789abcdef.js": SCRIPT,
    "app.bundle.css": b"@font-face{src:url(/a34f9d1faa5f3315.woff2)} b{background:url(//elsewhere.example/)}"
    * 9,
    "89.bundle.b327bf3664812958.js": b"'use strict';" * 200,
    "a34f9d1faa5f3315.woff2": hashlib.sha512(b"a font").digest(),
    "0ddf166f7a343eda.wasm": b"\0asm" * 100,
    "manifest.json": b'{"icons":[{"src":"/assets/icon.png"}]}' * 9,
    "assets/browser.xml": b'<logo src="/assets/icon.png"/>' * 9,
    "assets/icon.png": hashlib.sha512(b"an icon").digest(),
    "app-config.js": b"window.config = {}",
    "sw.js": b"importScripts('https://elsewhere.example/')",
    "app.bundle.0123456789abcdef.js.map": b"{}",
}


def package(path, files=None, prefix="package/dist/"):
    """Write the package to *path*; its integrity, as npm has it."""
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, "package/package.json", b'{"name":"@ohif/app","version":"3.13.2"}')
        for name, data in (FILES if files is None else files).items():
            _add(archive, prefix + name, data)
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def _add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
