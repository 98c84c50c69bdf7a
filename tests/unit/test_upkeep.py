"""What an import finds in folders."""

import os
import tracemalloc
from pathlib import Path

from dicomscp.upkeep import _files

ELSEWHERE = Path(__file__).parent


def found(*paths, root=ELSEWHERE):
    """What is taken, and what is refused."""
    refused = []
    taken = sorted(_files(paths, root, lambda *refusal: refused.append(refusal)))
    return taken, refused


def test_files_in_folders_and_those_named_are_found_links_below_and_pipes_are_not(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "one").touch()
    (tmp_path / "in" / "two").touch()
    (tmp_path / "three").touch()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "three")
    (tmp_path / "in" / "around").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe")
    (tmp_path / "named").symlink_to(tmp_path / "three")

    taken, refused = found(tmp_path / "in", tmp_path / "named")

    assert taken == [f"{tmp_path}/in/deep/one", f"{tmp_path}/in/two", f"{tmp_path}/named"]
    assert refused == []


def test_the_root_is_not_entered(tmp_path):
    (tmp_path / "root" / "instances").mkdir(parents=True)
    (tmp_path / "root" / "instances" / "held").touch()
    (tmp_path / "two").touch()

    assert found(tmp_path, root=tmp_path / "root") == ([f"{tmp_path}/two"], [])
    taken, ((path, reason),) = found(tmp_path / "root", root=tmp_path / "root")
    assert (taken, path) == ([], f"{tmp_path}/root")
    assert "gateway itself" in reason


def test_a_folder_that_cannot_be_read_is_refused_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    above = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # together longer than a path may be
        os.mkdir("x" * 250, dir_fd=above)
        below = os.open("x" * 250, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)

    taken, ((path, reason),) = found(tmp_path)

    assert taken == [f"{tmp_path}/file"]
    assert path.endswith("x" * 250)
    assert reason == "The folder cannot be read: File name too long."


def test_a_wide_folder_is_not_held_in_memory(tmp_path):
    (tmp_path / "0").touch()
    for number in range(1, 20_000):
        os.link(tmp_path / "0", tmp_path / str(number))
    tracemalloc.start()
    try:
        count = sum(1 for _ in _files([tmp_path], ELSEWHERE, lambda *_: None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert count == 20_000
    assert peak < 200_000  # all their paths take ten times that
