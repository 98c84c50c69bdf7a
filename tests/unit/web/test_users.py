"""The users' file: what is written is read again, and what others can touch is not believed."""

import asyncio
import base64
import hashlib
import stat

import pytest

from dicomscp.errors import BusyError, ConfigError
from dicomscp.web import users
from dicomscp.web.users import Cost, Users

CHEAP = Cost(log_n=10, r=8, p=1)


def judge(path, name, password):
    credentials = base64.b64encode(f"{name}:{password}".encode()).decode()
    return asyncio.run(Users(path).judge(credentials)).principal


def written(path, name="anna", scopes=("read",), password="a good password"):
    return users.set_password(path, name, scopes, password, cost=CHEAP)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "users"
    assert not written(path, "anna", ["read", "write"])
    assert not written(path, "bert")
    assert judge(path, "anna", "a good password").scopes == {"read", "write"}
    assert judge(path, "bert", "a good password").scopes == {"read"}
    assert judge(path, "anna", "a good passwore") is None
    assert judge(path, "claus", "a good password") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_password_is_not_in_the_file_and_no_two_hashes_are_equal(tmp_path):
    path = tmp_path / "users"
    written(path, "anna")
    written(path, "bert")
    first, second = (line.split(":")[2] for line in path.read_text().splitlines())
    assert first != second
    assert "good" not in path.read_text()


def test_the_cost_of_a_hash_stands_with_it(tmp_path):
    path = tmp_path / "users"
    written(path, "anna")
    users.set_password(path, "bert", ["read"], "a good password")
    assert "$scrypt$ln=10,r=8,p=1$" in path.read_text()
    assert "$scrypt$ln=15,r=8,p=3$" in path.read_text()
    assert judge(path, "bert", "a good password").name == "bert"


def test_a_change_leaves_other_lines_and_the_mode_as_they_are(tmp_path):
    path = tmp_path / "users"
    written(path, "anna")
    written(path, "bert")
    before = path.read_text().splitlines()
    path.write_text("# of the radiology\n\n" + path.read_text())
    path.chmod(0o640)
    assert written(path, "anna", password="another password")
    assert path.read_text().splitlines()[:3] == ["# of the radiology", "", before[1]]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert judge(path, "anna", "another password")
    assert users.remove(path, "anna")
    assert not users.remove(path, "anna")
    assert judge(path, "anna", "another password") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["users"]


@pytest.mark.parametrize("name", ["Jürgen Köhler", "山田", "a@b.org", "x" * 64])
def test_names_and_passwords_are_of_any_letters(tmp_path, name):
    path = tmp_path / "users"
    password = "pässwörd: 日本 #"
    written(path, name, password=password)
    assert judge(path, name, password).name == name
    # RFC 7617 2.1: however the letters were put together.
    composed, decomposed = "K\u00f6hler" * 2, "Ko\u0308hler" * 2
    written(path, name, password=composed)
    assert judge(path, name, decomposed).name == name


@pytest.mark.parametrize("name", ["", "a:b", "#a", " a", "a ", "a\nb", "a\tb", "x" * 65, "a\u2028b"])
def test_a_name_that_would_break_the_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        written(tmp_path / "users", name)
    assert not (tmp_path / "users").exists()


def test_a_short_password_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 8"):
        written(tmp_path / "users", password="1234567")


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o660, 0o666, 0o601])
def test_a_file_that_others_can_touch_is_not_believed(tmp_path, mode):
    path = tmp_path / "users"
    written(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Users(path)


@pytest.mark.parametrize(
    "line",
    [
        "anna",
        "anna:read:",
        "anna:read:secret",
        "anna:read:$scrypt$ln=10,r=8,p=1$c2FsdHNhbHRzYWx0$short",
        "anna:read:$scrypt$ln=99,r=8,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2g",
        "anna:all:$scrypt$ln=10,r=8,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2g",
        "anna::$scrypt$ln=10,r=8,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2g",
        ":read:$scrypt$ln=10,r=8,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2g",
    ],
)
def test_a_line_that_is_none_is_named_by_its_number_and_not_repeated(tmp_path, line):
    path = tmp_path / "users"
    path.touch(0o600)
    path.write_text(f"# users\n{line}\n")
    with pytest.raises(ConfigError, match=r"line 2 of .* is not NAME:SCOPES:HASH") as caught:
        users.read(path)
    assert "scrypt" not in str(caught.value)


def test_a_user_who_stands_there_twice_is_an_error(tmp_path):
    path = tmp_path / "users"
    written(path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(ConfigError, match=r"line 2 .* for the second time"):
        users.read(path)


def test_a_file_that_is_not_there_says_what_makes_it(tmp_path):
    with pytest.raises(ConfigError, match="'dicomscp password NAME' makes it"):
        Users(tmp_path / "users")


def test_a_file_in_a_folder_that_is_not_there_is_an_error_when_it_is_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        written(tmp_path / "none" / "users")


def test_a_user_that_is_not_there_costs_as_much_as_one_that_is(tmp_path, monkeypatch):
    path = tmp_path / "users"
    written(path)
    hashed = []
    scrypt = hashlib.scrypt
    monkeypatch.setattr(
        hashlib, "scrypt", lambda *a, **kw: hashed.append((kw["n"], kw["p"])) or scrypt(*a, **kw)
    )
    for name in ("anna", "nobody"):
        assert judge(path, name, "a wrong password") is None
    assert hashed == [(1024, 1)] * 2


def test_more_guesses_than_can_be_looked_at_are_sent_away(tmp_path):
    path = tmp_path / "users"
    written(path)
    scheme = Users(path)

    async def guess():
        # The hashing itself is what holds up; all guesses are there before the first is through.
        tries = [scheme.judge(base64.b64encode(b"nobody:%d" % number).decode()) for number in range(24)]
        return await asyncio.gather(*tries, return_exceptions=True)

    found = asyncio.run(guess())
    assert sum(isinstance(one, BusyError) for one in found) == 24 - 16
