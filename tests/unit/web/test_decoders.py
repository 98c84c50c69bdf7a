"""What a decoder that crashes, hangs or grows costs: its request, and nothing else."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from multiprocessing import active_children
from tempfile import TemporaryFile

import numpy as np
import pydicom
import pytest
from PIL import Image

from dicomscp.errors import BusyError
from dicomscp.web.decoders import Decoders, Job, Limits
from dicomscp.web.imaging import Picture
from tests.processes import command_of, cpu_seconds, wait_until
from tests.unit.web.held import SOURCES
from tests.unit.web.test_render import address, frames_of

GIF = {"accept": "image/gif"}


@pytest.fixture
def slow(gateway):
    """An instance that takes seconds to be made a GIF."""
    return gateway.archive.add(noisy(60, 512))


def noisy(frames, side, **attributes):
    dataset = frames_of(1, SOPInstanceUID="1.9.77", **attributes)
    dataset.Rows = dataset.Columns = side
    dataset.NumberOfFrames = frames
    dataset.PixelData = np.random.default_rng(1).integers(0, 4096, frames * side * side, "<u2").tobytes()
    return dataset


def decoders():
    """The processes that are there to decode."""
    return {child.pid for child in active_children() if "decoder" in " ".join(command_of(child.pid))}


def wait_until_busy(pid, since):
    wait_until(lambda: cpu_seconds(pid) > since, 10, "a decoder that works")


def test_a_decoder_that_is_killed_costs_its_request_alone(gateway, slow):
    other = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(limits=Limits(processes=1))
    assert client.get(address(other, "/rendered")).status_code == 200
    (decoder,) = decoders()
    idle = cpu_seconds(decoder)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.get, address(slow, "/rendered"), headers=GIF)
        wait_until_busy(decoder, idle + 0.1)
        waiting = pool.submit(client.get, address(other, "/thumbnail"))
        assert client.get("/healthz").status_code == 200
        os.kill(decoder, signal.SIGKILL)
        response = asked.result()
        assert (response.status_code, "SIGKILL" in response.json()["detail"]) == (500, True)
        assert waiting.result().status_code == 200
    assert decoder not in decoders()
    assert client.get(address(other, "/rendered")).status_code == 200


def test_a_decoder_that_died_between_requests_costs_none(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(limits=Limits(processes=1))
    assert client.get(address(held, "/rendered")).status_code == 200
    (decoder,) = decoders()
    os.kill(decoder, signal.SIGKILL)
    wait_until(lambda: decoder not in decoders(), 10, "the end of a decoder to be known")
    assert client.get(address(held, "/rendered")).status_code == 200


def test_a_decoder_that_takes_too_long_is_ended(gateway, slow):
    other = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(limits=Limits(processes=1, seconds=0.4))
    response = client.get(address(slow, "/rendered"), headers=GIF)
    assert (response.status_code, "more than 0.4 s" in response.json()["detail"]) == (500, True)
    assert client.get(address(other, "/rendered")).status_code == 200


def test_a_decoder_that_does_not_even_end_itself_is_ended(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(limits=Limits(processes=1, seconds=2))
    assert client.get(address(held, "/rendered")).status_code == 200
    (decoder,) = decoders()
    os.kill(decoder, signal.SIGSTOP)  # no alarm reaches it
    response = client.get(address(held, "/rendered"))
    assert (response.status_code, "more than 2 s" in response.json()["detail"]) == (500, True)
    assert client.get(address(held, "/rendered")).status_code == 200
    assert decoder not in decoders()


def test_a_decoder_may_take_so_much_memory(gateway):
    large = gateway.archive.add(noisy(1, 4096))
    other = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(limits=Limits(processes=1, memory_bytes=200 << 20))
    assert client.get(address(other, "/rendered")).status_code == 200
    decoder = decoders()
    response = client.get(address(large, "/rendered"))
    assert (response.status_code, "200 MiB of memory" in response.json()["detail"]) == (413, True)
    assert client.get(address(other, "/rendered")).status_code == 200
    assert decoders() == decoder


def test_a_result_may_be_so_large(gateway):
    dataset = pydicom.dcmread(SOURCES / "MR_small_RLE.dcm")
    dataset.decompress()
    dataset.NumberOfFrames, dataset.PixelData = 40, dataset.PixelData * 40
    dataset.compress(pydicom.uid.RLELossless)
    held = gateway.archive.add(dataset, pydicom.uid.RLELossless)
    client = gateway.start(limits=Limits(result_bytes=1 << 18))
    wanted = {"accept": "application/dicom; transfer-syntax=1.2.840.10008.1.2.1"}
    response = client.get(address(held), headers=wanted)
    assert response.status_code == 406
    assert "is more than" in response.json()["detail"]
    assert client.get(address(held, "/rendered")).status_code == 200


def test_more_than_can_wait_are_told_to_come_again(gateway, slow):
    other = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start(limits=Limits(processes=1, waiting=0))
    assert client.get(address(other, "/rendered")).status_code == 200
    (decoder,) = decoders()
    idle = cpu_seconds(decoder)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.get, address(slow, "/rendered"), headers=GIF)
        wait_until_busy(decoder, idle)
        response = client.get(address(other, "/rendered"))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert client.get(address(other, "/frames/1")).status_code == 200
        assert asked.result().status_code == 200
    assert client.get(address(other, "/rendered")).status_code == 200


def test_decoders_end_with_their_owner(gateway):
    held = gateway.archive.add_file("CT_small.dcm")
    client = gateway.start()
    assert client.get(address(held, "/rendered")).status_code == 200
    assert decoders()
    gateway.decoders.close()
    assert not decoders()


def test_many_ask_at_the_same_time(gateway):
    held = [gateway.archive.add_file(name) for name in ("CT_small.dcm", "examples_palette.dcm")]
    client = gateway.start(limits=Limits(processes=2, waiting=100))
    answers = []

    def ask(number):
        paths = ("/rendered", "/thumbnail", "/frames/1/rendered")
        answers.extend(client.get(address(held[number % 2], path)).status_code for path in paths)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 36
    assert time.monotonic() - began < 60
    assert len(decoders()) <= 2


# What is made counts until it is sent


def result(size):
    """What opens a file and asks for its *size* samples."""
    image = Image.fromarray(np.zeros((1, size), np.uint8))
    file = BytesIO()
    image.save(file, "PNG")

    def opened():
        copy = TemporaryFile(buffering=0)  # noqa: SIM115 -- the decoder that asks for it closes it
        copy.write(file.getvalue())
        return copy, Job("samples", 0, size=len(file.getvalue()), picture=Picture("image/png"))

    return opened


@pytest.fixture
def few():
    """Decoders that keep 1000 bytes."""
    decoders = Decoders(Limits(processes=2, result_bytes=1000))
    yield decoders
    decoders.close()


def test_what_finds_no_room_when_it_is_made_is_not_kept(few):
    async def ask():
        kept = await few.run(result(600))
        with pytest.raises(BusyError):
            await few.run(result(600))
        also = await few.run(result(400))
        with pytest.raises(BusyError):
            await few.run(result(1))
        del kept
        return (await few.run(result(600))).size + also.size

    assert asyncio.run(ask()) == 1000


def test_those_who_ask_together_keep_no_more_than_may_be_kept(few):
    async def ask():
        return await asyncio.gather(*(few.run(result(600)) for _ in range(6)), return_exceptions=True)

    answers = asyncio.run(ask())
    assert sorted(type(one).__name__ for one in answers) == ["BusyError"] * 5 + ["Made"]


def test_who_is_patient_is_given_room_once_there_is_some(few):
    async def ask():
        kept = await few.run(result(600))
        asked = asyncio.ensure_future(few.run(result(600), patient=True))
        done, _ = await asyncio.wait([asked], timeout=0.5)
        assert not done
        del kept
        return (await asyncio.wait_for(asked, 10)).size

    assert asyncio.run(ask()) == 600
