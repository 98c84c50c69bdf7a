"""Who may ask: the whole application in memory, with users and tokens as a site has them."""

import asyncio
import base64
import json
import time
from urllib.parse import unquote

import httpx
import jwt
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router

from dicomscp.errors import BusyError
from dicomscp.telemetry.metrics import AccessMetrics, IntakeMetrics
from dicomscp.web import users
from dicomscp.web.access import Access, OpenRoute, Principal, Verdict
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.store import StoreSettings
from dicomscp.web.tokens import Keys, Rules, Tokens
from dicomscp.web.users import Cost, Users
from dicomscp.web.viewer import ViewerSettings
from tests.clock import Clock
from tests.unit.web.held import FilledArchive

CHEAP = Cost(log_n=10, r=8, p=1)
PASSWORDS = {"anna": "anna's password", "store": "a device's password", "ward": "ward's: password"}
ORIGIN = "https://viewer.example.org"


def basic(name, password=None):
    pair = f"{name}:{PASSWORDS[name] if password is None else password}"
    return {"authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


@pytest.fixture
def users_file(tmp_path):
    path = tmp_path / "users"
    for name, scopes in {"anna": ["read", "write"], "store": ["write"], "ward": ["read"]}.items():
        users.set_password(path, name, scopes, PASSWORDS[name], cost=CHEAP)
    return path


class Site:
    """An application and requests to it, all in one event loop."""

    def __init__(self, app):
        self.app = app
        self.runner = asyncio.Runner()

    def ask(self, method="GET", path="/dicomweb/studies", headers=None, times=1, **options):
        async def asked():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                asks = (client.request(method, path, headers=headers, **options) for _ in range(times))
                return await asyncio.gather(*asks)

        answers = self.runner.run(asked())
        return answers[0] if times == 1 else answers

    def status(self, *arguments, **options):
        return self.ask(*arguments, **options).status_code


@pytest.fixture(scope="module")
def signing_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def keys_file(tmp_path, signing_key):
    path = tmp_path / "keys.json"
    key = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(signing_key.public_key()))
    path.write_text(json.dumps({"keys": [key | {"kid": "1"}]}))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    archive = FilledArchive(tmp_path_factory.mktemp("archive"))
    yield archive
    archive.engine.dispose()


@pytest.fixture
def site(tmp_path, archive, users_file, keys_file):
    rules = Rules(issuer="https://idp.example.org", audience="dicomscp")
    schemes = {"basic": Users(users_file), "bearer": Tokens(Keys(str(keys_file)), rules)}
    settings = WebSettings(schemes=schemes, cors_origins=(ORIGIN,))
    site = Site(create_app(archive, settings, tmp_path / "dicomweb", tmp_path / "state"))
    with site.runner:
        yield site


def token(signing_key, **claims):
    said = {
        "iss": "https://idp.example.org",
        "aud": "dicomscp",
        "sub": "viewer",
        "exp": time.time() + 60,
        "scope": "openid read",
    }
    signed = jwt.encode(said | claims, signing_key, "RS256", headers={"kid": "1"})
    return {"authorization": f"Bearer {signed}"}


def test_who_says_nothing_is_asked_by_every_scheme(site):
    answer = site.ask()
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    challenges = answer.headers.get_list("www-authenticate")
    assert challenges == ['Basic realm="dicomscp", charset="UTF-8"', 'Bearer realm="dicomscp"']


@pytest.mark.parametrize("path", ["/", "/dicomweb/studies", "/metrics", "/changes", "/nothing", "/healthz/"])
def test_nothing_is_told_to_who_is_not_known_not_even_what_is_there(site, path):
    assert site.status(path=path) == 401
    assert site.status("POST", path) == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_whether_it_lives_is_told_to_all(site, path):
    assert site.status(path=path) == 200


def test_a_user_and_a_token_are_let_in(site, signing_key):
    assert site.status(headers=basic("anna")) == 200
    assert site.status(headers=basic("ward")) == 200
    assert site.status(headers=token(signing_key)) == 200


def test_the_scheme_is_called_as_one_likes(site):
    headers = basic("anna")
    headers["authorization"] = headers["authorization"].replace("Basic ", "bAsIc  ")
    assert site.status(headers=headers) == 200


@pytest.mark.parametrize(
    "presented",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"anna").decode(),
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Basic " + base64.b64encode(b":").decode(),
        "Bearer",
        "Bearer x.y.z",
        "Digest username=anna",
        "anna:anna's password",
    ],
)
def test_what_is_not_well_formed_is_not_let_in(site, presented):
    assert site.status(headers={"authorization": presented}) == 401


def test_a_wrong_password_and_a_name_that_is_none_are_told_in_the_same_words(site):
    wrong = site.ask(headers=basic("anna", "guess")).json()
    assert site.ask(headers=basic("nobody", "guess")).json() == wrong


def test_two_who_ask_at_once_are_nobody(site):
    headers = [("authorization", basic(name)["authorization"]) for name in ("anna", "ward")]
    assert site.status(headers=headers) == 400


def test_read_lets_ask_and_write_lets_store(site):
    assert site.status("POST", headers=basic("ward")) == 403
    assert site.status("DELETE", headers=basic("ward")) == 403
    assert site.status("GET", headers=basic("store")) == 403
    # Beyond the door the application answers: here by saying that nothing is stored at this address.
    assert site.status("POST", "/", headers=basic("store")) == 405
    assert site.status("POST", "/", headers=basic("anna")) == 405


def test_a_token_has_the_scopes_that_it_says(site, signing_key):
    assert site.status("POST", "/", headers=token(signing_key)) == 403
    assert site.status("POST", "/", headers=token(signing_key, scope="write")) == 405
    assert site.status("GET", headers=token(signing_key, scope="")) == 403


def test_a_token_that_is_refused_says_why_in_its_challenge_alone(site, signing_key):
    answer = site.ask(headers=token(signing_key, exp=time.time() - 60))
    basic_challenge, bearer = answer.headers.get_list("www-authenticate")
    assert 'error="invalid_token"' in bearer
    assert "expired" in bearer
    assert "error" not in basic_challenge


def test_a_token_in_the_address_is_none(site, signing_key):
    bare = token(signing_key)["authorization"].removeprefix("Bearer ")
    assert site.status(path=f"/dicomweb/studies?access_token={bare}") == 401


def test_who_is_taken_out_is_out_with_the_next_request(site, users_file):
    assert site.status(headers=basic("anna")) == 200
    users.remove(users_file, "anna")
    assert site.status(headers=basic("anna")) == 401
    assert site.status(headers=basic("ward")) == 200


def test_a_new_password_counts_at_once_and_the_old_one_no_more(site, users_file):
    assert site.status(headers=basic("ward")) == 200
    users.set_password(users_file, "ward", ["read"], "another password", cost=CHEAP)
    assert site.status(headers=basic("ward")) == 401
    assert site.status(headers=basic("ward", "another password")) == 200


def test_while_the_file_cannot_be_read_nobody_is_let_in_and_the_log_says_why(site, users_file):
    users_file.chmod(0o644)
    with structlog.testing.capture_logs() as logs:
        answer = site.ask(headers=basic("anna"))
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    assert "chmod 600" in next(entry for entry in logs if entry["event"] == "users_file_unreadable")["reason"]
    users_file.chmod(0o640)
    assert site.status(headers=basic("anna")) == 200


def test_the_log_says_who_was_let_in_and_never_what_was_presented(site, signing_key):
    presented = [basic("anna"), basic("anna", "not my password"), token(signing_key)]
    with structlog.testing.capture_logs() as logs:
        for headers in presented:
            site.ask(headers=headers)
            site.ask(headers=headers)
    granted = [entry["user"] for entry in logs if entry["event"] == "access_granted"]
    assert granted == ["anna", "viewer"]  # once, not for each request
    assert [entry["event"] for entry in logs].count("access_refused") == 1
    for headers in presented:
        secret = headers["authorization"].split()[1]
        assert secret not in str(logs)
    assert "password" not in str(logs).replace("name or password is wrong", "")


def test_a_flood_of_refusals_is_a_line_a_second_for_each_address(site):
    with structlog.testing.capture_logs() as logs:
        for number in range(20):
            site.ask(headers={"authorization": f"Bearer {number}"})
    assert 1 <= [entry["event"] for entry in logs].count("access_refused") < 20


# Origins


def preflight(origin=ORIGIN):
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }


def test_a_preflight_is_answered_before_anybody_is_asked(site):
    answer = site.ask("OPTIONS", headers=preflight())
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    assert "Origin" in answer.headers["vary"]


def test_a_preflight_of_another_origin_gives_nothing_away(site):
    answer = site.ask("OPTIONS", headers=preflight("https://evil.example.org"))
    assert "access-control-allow-origin" not in answer.headers  # without which a browser heeds no other


def test_other_questions_by_options_need_a_name(site):
    assert site.status("OPTIONS") == 401
    assert site.status("OPTIONS", headers={"origin": ORIGIN}) == 401


def test_a_page_that_is_listed_can_read_that_it_must_say_who_asks(site):
    answer = site.ask(headers={"origin": ORIGIN})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    answer = site.ask(headers={"origin": ORIGIN} | basic("anna"))
    assert (answer.status_code, answer.headers["access-control-allow-credentials"]) == (200, "true")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example.org", 403),
        ("null", 403),
        ("https://127.0.0.1.evil.org", 403),
        ("http://127.0.0.1:81", 403),
        ("file://", 403),
        (ORIGIN, 405),
        ("http://127.0.0.1", 405),
        ("https://127.0.0.1", 405),  # a proxy in front encrypts
    ],
)
def test_no_page_of_elsewhere_stores_with_its_readers_password(site, origin, status):
    assert site.status("POST", "/", headers={"origin": origin} | basic("anna")) == status


# The middleware by itself


class Counting:
    """A scheme that knows one word, and counts what it is asked."""

    def __init__(self):
        self.judged = 0
        self.failing = None
        self.known_by = 0

    def challenge(self, problem):
        return "Counting"

    def revision(self):
        return self.known_by

    async def judge(self, credentials):
        self.judged += 1
        await asyncio.sleep(0)
        if self.failing:
            raise self.failing
        if credentials == "right":
            return Verdict(Principal("someone", frozenset({"read"})), 10)
        return Verdict(None, 5, "it is wrong")


async def whoever(scope, receive, send):
    await PlainTextResponse(Request(scope).user)(scope, receive, send)


@pytest.fixture
def counting():
    scheme, clock, metrics = Counting(), Clock(0.0), AccessMetrics()
    site = Site(Access(whoever, schemes={"counting": scheme}, metrics=metrics, now=clock))
    site.scheme, site.clock, site.metrics = scheme, clock, metrics
    with site.runner:
        yield site


RIGHT, WRONG = {"authorization": "Counting right"}, {"authorization": "Counting wrong"}


def test_the_application_knows_who_asks(counting):
    assert counting.ask(headers=RIGHT).text == "someone"


def test_what_many_present_at_once_is_judged_once(counting):
    assert {answer.status_code for answer in counting.ask(headers=RIGHT, times=50)} == {200}
    assert {answer.status_code for answer in counting.ask(headers=WRONG, times=50)} == {401}
    assert counting.scheme.judged == 2


def test_a_verdict_is_remembered_for_as_long_as_it_says(counting):
    for headers, seconds in ((RIGHT, 10), (WRONG, 5)):
        counting.scheme.judged = 0
        counting.ask(headers=headers)
        counting.clock.now += seconds - 0.1
        counting.ask(headers=headers)
        assert counting.scheme.judged == 1
        counting.clock.now += 0.1
        counting.ask(headers=headers)
        assert counting.scheme.judged == 2


def test_a_verdict_goes_with_what_it_was_judged_by(counting):
    counting.ask(headers=RIGHT)
    counting.scheme.known_by += 1
    counting.ask(headers=RIGHT)
    assert counting.scheme.judged == 2


def test_wrong_ones_by_the_thousand_drive_out_no_right_one(counting):
    counting.ask(headers=RIGHT)
    for number in range(1100):
        counting.ask(headers={"authorization": f"Counting {number}"})
    counting.scheme.judged = 0
    counting.ask(headers=RIGHT)
    assert counting.scheme.judged == 0
    counting.ask(headers={"authorization": "Counting 0"})  # the oldest made room
    assert counting.scheme.judged == 1


def test_what_cannot_be_judged_now_is_neither_let_in_nor_remembered(counting):
    counting.scheme.failing = BusyError("Later.")
    assert {answer.status_code for answer in counting.ask(headers=RIGHT, times=3)} == {503}
    counting.scheme.failing = None
    assert counting.status(headers=RIGHT) == 200


def test_what_was_found_is_counted(counting):
    counting.ask(headers=RIGHT)
    counting.ask(headers=WRONG)
    counting.ask("POST", headers=RIGHT)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for counter in (counting.metrics._granted, counting.metrics._refused)
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert found == {
        ("dicomscp_granted_accesses_total", "counting"): 1,
        ("dicomscp_refused_accesses_total", "counting"): 1,
        ("dicomscp_refused_accesses_total", "scope"): 1,
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/live", 200),
        ("HEAD", "/live", 200),
        ("POST", "/live", 401),
        ("GET", "/live/", 401),
        ("GET", "/live/x", 401),
        ("GET", "/viewer", 200),
        ("GET", "/viewer/", 200),
        ("GET", "/viewer/app/x.js", 200),
        ("GET", "/viewers/", 401),
        ("GET", "/viewer/held/1.2", 401),
        ("GET", "/viewer/../held/1.2", 200),  # the viewer's, and nobody else's
        ("GET", "/viewer/%2e%2e/held/1.2", 200),
        ("POST", "/viewer/held", 401),
        ("DELETE", "/viewer/held", 401),
        ("GET", "/", 401),
    ],
)
def test_what_is_open_is_what_an_open_resource_answers(method, path, status):
    def told(name):
        async def answer(_):
            return PlainTextResponse(name)

        return answer

    routes = [
        OpenRoute("/live", told("live")),
        Route("/viewer/held/{study}", told("held")),
        Route("/viewer/held", told("store"), methods=["POST"]),
        OpenRoute("/viewer", told("viewer")),
        OpenRoute("/viewer/{path:path}", told("viewer")),
    ]
    router = Router(routes, redirect_slashes=False)
    access = Access(router, schemes={"counting": Counting()}, routes=routes, metrics=AccessMetrics())
    sent = []

    async def send(message):
        sent.append(message)

    # Not through a client, which would resolve the path.
    scope = {"type": "http", "method": method, "path": unquote(path), "headers": []}
    asyncio.run(access(scope, None, send))
    assert sent[0]["status"] == status
    assert sent[1]["body"] not in {b"held", b"store"}


@pytest.mark.parametrize("schemes", [{"bearer"}, {"bearer", "basic"}])
@pytest.mark.parametrize("base_path", ["/ohif", "/pacs", "/pacs/dicomweb"])
def test_with_tokens_alone_the_viewer_is_open_and_nothing_that_lies_below_it(
    tmp_path, archive, base_path, schemes
):
    settings = WebSettings(
        base_url="/pacs/dicomweb",
        schemes=dict.fromkeys(schemes, Counting()),
        viewer=ViewerSettings(tmp_path, base_path),
        store=StoreSettings(archive=lambda: archive, aside=tmp_path, metrics=IntakeMetrics()),
    )
    site = Site(create_app(archive, settings, tmp_path / "dicomweb", tmp_path / "state"))
    with site.runner:
        open_to_all = 404 if schemes == {"bearer"} else 401  # none is installed
        for path in (f"{base_path}/", f"{base_path}/viewer", f"{base_path}/app-config.js", base_path):
            assert site.status(path=path) == open_to_all, path
        for path in ("/", "/metrics", "/changes", "/studies/1.2/ohif-dicom-json", "/pacs/dicomweb/studies"):
            assert site.status(path=path) == 401, path
        for path in ("/studies/1.2", "/studies/1.2/metadata", "/studies/1.2/thumbnail", "/series"):
            assert site.status(path=f"/pacs/dicomweb{path}") == 401, path
        for path in ("/studies", "/studies/1.2"):
            assert site.status("POST", f"/pacs/dicomweb{path}") == 401, path
        assert site.status("POST", f"{base_path}/x") == 401


def test_a_websocket_is_closed(counting):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(counting.app({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
