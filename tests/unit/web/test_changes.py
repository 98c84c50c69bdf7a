"""The change feed, as a system that follows asks for it."""

import threading

import pytest

from dicomscp.archive.index import Publication


def published(gateway, study_uid, revision, instances=1):
    gateway.archive.index.mark_published(
        1, Publication(study_uid, revision, 1, instances, 1_700_000_000_250_000)
    )


def asked(client, **parameters):
    return client.get("/changes", params=parameters).raise_for_status().json()


def test_who_follows_sees_every_study_that_changed(gateway):
    client = gateway.start()
    published(gateway, "1.2", "a", 3)
    published(gateway, "1.3", "b")
    first = asked(client, limit=1)
    assert first["changes"] == [
        {
            "study_uid": "1.2",
            "revision": "a",
            "series": 1,
            "instances": 3,
            "published_at": "2023-11-14T22:13:20.250+00:00",
        }
    ]
    assert first["more"]
    second = asked(client, since=first["next"])
    assert [one["study_uid"] for one in second["changes"]] == ["1.3"]
    assert not second["more"]
    assert asked(client, since=second["next"])["changes"] == []


def test_a_study_that_was_withdrawn_has_no_revision(gateway):
    client = gateway.start()
    published(gateway, "1.2", "a")
    token = asked(client)["next"]
    published(gateway, "1.2", "", 0)
    assert [(one["study_uid"], one["revision"]) for one in asked(client, since=token)["changes"]] == [
        ("1.2", None)
    ]


def test_a_follower_of_an_index_that_was_made_anew_is_told_to_begin_anew(gateway):
    client = gateway.start()
    published(gateway, "1.2", "a")
    token = asked(client)["next"]
    gateway.archive.index.clear()
    published(gateway, "1.3", "a")
    again = asked(client, since=token)
    assert again["reset"]
    assert [one["study_uid"] for one in again["changes"]] == ["1.3"]


def test_who_waits_is_told_as_soon_as_there_is_something(gateway):
    client = gateway.start()
    published(gateway, "1.2", "a")
    token = asked(client)["next"]
    soon = threading.Timer(0.2, published, (gateway, "1.2", "b"))
    soon.start()
    found = client.get("/changes", params={"since": token, "wait": 60}).json()
    soon.join()
    assert [one["revision"] for one in found["changes"]] == ["b"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("since", "yesterday"), ("limit", "0"), ("limit", "-1"), ("limit", "x"), ("wait", "1.5")],
)
def test_what_cannot_be_understood_is_named(gateway, name, value):
    answer = gateway.start().get("/changes", params={name: value})
    assert answer.status_code == 400
    assert name in answer.json()["detail"]


def test_who_waits_is_answered_when_the_gateway_stops(gateway):
    stopping = threading.Event()
    client = gateway.start(stopping=stopping.is_set)
    published(gateway, "1.2", "a")
    token = asked(client)["next"]
    soon = threading.Timer(0.2, stopping.set)
    soon.start()
    answer = client.get("/changes", params={"since": token, "wait": 60})
    soon.join()
    assert answer.status_code == 200
    assert answer.json() == {"changes": [], "next": token, "more": False, "reset": False}
