"""Bearer tokens: only those of the issuer, for us, signed by a key that it publishes, and in time."""

import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import threading
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from dicomscp.errors import BusyError, ConfigError, UnreachableError
from dicomscp.web.tokens import Keys, Rules, Tokens
from tests.clock import Clock

RULES = Rules(issuer="https://idp.example.org", audience="dicomscp", algorithms=("RS256", "ES256", "EdDSA"))
MAKERS = {"RS256": jwt.algorithms.RSAAlgorithm, "ES256": jwt.algorithms.ECAlgorithm}
MAKERS |= {"PS256": MAKERS["RS256"], "ES384": MAKERS["ES256"], "EdDSA": jwt.algorithms.OKPAlgorithm}


@pytest.fixture(scope="module")
def private():
    """A key for each algorithm, and another RSA key."""
    new = rsa.generate_private_key(65537, 2048)
    return {
        "RS256": new,
        "PS256": new,
        "other": rsa.generate_private_key(65537, 2048),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "ES384": ec.generate_private_key(ec.SECP384R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    }


def jwk(key, algorithm, **members):
    return json.loads(MAKERS[algorithm].to_jwk(key.public_key())) | members


@pytest.fixture
def keys_file(tmp_path, private):
    path = tmp_path / "keys.json"
    kinds = ("RS256", "ES256", "ES384", "EdDSA")
    path.write_text(json.dumps({"keys": [jwk(private[kind], kind, kid=kind) for kind in kinds]}))
    return path


def signed(key, algorithm="RS256", headers=None, **claims):
    said = {"iss": RULES.issuer, "aud": RULES.audience, "sub": "viewer", "exp": time.time() + 60}
    said = {name: value for name, value in (said | claims).items() if value is not None}
    return jwt.encode(said, key, algorithm, headers=headers or {"kid": algorithm})


def judge(keys, token, rules=RULES):
    return asyncio.run(Tokens(keys, rules).judge(token))


def admits(keys, token, rules=RULES):
    return judge(keys, token, rules).principal is not None


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_token_of_the_issuer_is_taken(keys_file, private, algorithm):
    verdict = judge(Keys(str(keys_file)), signed(private[algorithm], algorithm, scope="read write other"))
    assert (verdict.principal.name, verdict.principal.scopes) == ("viewer", {"read", "write"})
    assert 50 < verdict.seconds <= 60


def test_an_algorithm_that_is_not_listed_is_not_taken(keys_file, private):
    keys = Keys(str(keys_file))
    for algorithm, kid in (("ES384", "ES384"), ("PS256", "RS256")):
        token = signed(private[algorithm], algorithm, {"kid": kid})
        assert not admits(keys, token)
        listing = Rules(RULES.issuer, RULES.audience, algorithms=(algorithm,))
        assert admits(keys, token, listing), algorithm


def unsigned(header, claims=None):
    said = claims or {"iss": RULES.issuer, "aud": RULES.audience, "sub": "x", "exp": time.time() + 60}
    parts = (json.dumps(part).encode() for part in (header, said))
    return b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)


def test_what_nobody_signed_is_not_taken(keys_file):
    keys = Keys(str(keys_file))
    for algorithm in ("none", "None", "NONE", "", None, 3, ["RS256"], {}):
        header = {"alg": algorithm, "typ": "JWT", "kid": "RS256"}
        assert not admits(keys, unsigned(header).decode() + "."), algorithm


def test_a_public_key_taken_for_a_shared_secret_opens_nothing(keys_file, private):
    """The confusion of RS256 with HS256: whoever has the public key could sign."""
    public = private["RS256"].public_key()
    encodings = [
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
    ]
    secrets = [public.public_bytes(*encoding) for encoding in encodings]
    secrets.append(json.dumps(jwk(private["RS256"], "RS256")).encode())
    keys = Keys(str(keys_file))
    for secret in [*secrets, b""]:
        body = unsigned({"alg": "HS256", "typ": "JWT", "kid": "RS256"})
        signature = base64.urlsafe_b64encode(hmac.digest(secret, body, hashlib.sha256)).rstrip(b"=")
        assert not admits(keys, (body + b"." + signature).decode())


def test_a_shared_secret_among_the_keys_is_no_key(tmp_path):
    path = tmp_path / "keys.json"
    secret = base64.urlsafe_b64encode(b"s" * 32).rstrip(b"=").decode()
    path.write_text(json.dumps({"keys": [{"kty": "oct", "k": secret, "kid": "1"}]}))
    with pytest.raises(ConfigError, match="no public key that signs"):
        Keys(str(path))


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": time.time() - 3600}, "expired"),
        ({"exp": None}, "not one of the issuer's"),
        ({"exp": "tomorrow"}, "not one of the issuer's"),
        ({"nbf": time.time() + 3600}, "not valid yet"),
        ({"iat": time.time() + 3600}, "not valid yet"),
        ({"iss": "https://idp.example.org.evil.org"}, "another issuer"),
        ({"iss": None}, "not one of the issuer's"),
        ({"aud": "another"}, "another audience"),
        ({"aud": ["another", "dicomscp2"]}, "another audience"),
        ({"aud": None}, "not one of the issuer's"),
    ],
)
def test_a_token_must_say_when_whose_and_for_whom(keys_file, private, claims, reason):
    verdict = judge(Keys(str(keys_file)), signed(private["RS256"], **claims))
    assert verdict.principal is None
    assert reason in verdict.reason


def test_clocks_may_differ_by_what_the_configuration_says(keys_file, private):
    keys, now = Keys(str(keys_file)), time.time()
    for claims in ({"exp": now - 20}, {"nbf": now + 20}):
        token = signed(private["RS256"], **claims)
        assert admits(keys, token)
        assert not admits(keys, token, Rules(RULES.issuer, RULES.audience, leeway_seconds=5))


def test_a_verdict_is_not_remembered_beyond_the_token(keys_file, private):
    rules = Rules(RULES.issuer, RULES.audience, leeway_seconds=0)
    assert judge(Keys(str(keys_file)), signed(private["RS256"], exp=time.time() + 9), rules).seconds <= 9


def test_another_key_s_signature_and_a_changed_word_are_not_taken(keys_file, private):
    keys = Keys(str(keys_file))
    assert not admits(keys, signed(private["other"]))
    head, body, signature = signed(private["RS256"], scope="read").split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "==")) | {"scope": "read write"}
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    assert not admits(keys, f"{head}.{forged}.{signature}")
    assert not admits(keys, f"{head}.{body}.")
    assert not admits(keys, f"{head}.{body}")
    assert not admits(keys, "x" * 20000)
    assert not admits(keys, "." * 2000)


def test_a_key_in_the_token_itself_is_not_believed(keys_file, private):
    own = jwk(private["other"], "RS256", kid="RS256")
    for header in ({"jwk": own}, {"jku": "https://evil.example.org/keys"}, {"x5u": "https://evil.org"}):
        assert not admits(Keys(str(keys_file)), signed(private["other"], headers={"kid": "RS256"} | header))


def test_an_extension_that_must_be_understood_and_is_not_ends_it(keys_file, private):
    """RFC 7515 4.1.11."""
    headers = {"kid": "RS256", "crit": ["urn:x"], "urn:x": 1}
    assert not admits(Keys(str(keys_file)), signed(private["RS256"], headers=headers))


def test_a_token_that_names_no_key_goes_by_the_only_one_there_is(tmp_path, private):
    path = tmp_path / "keys.json"
    one, two = jwk(private["RS256"], "RS256", kid="a"), jwk(private["other"], "RS256", kid="b")
    token = signed(private["RS256"], headers={"typ": "JWT"})
    path.write_text(json.dumps({"keys": [one, jwk(private["ES256"], "ES256", kid="c")]}))
    assert admits(Keys(str(path)), token)
    path.write_text(json.dumps({"keys": [one, two]}))
    assert not admits(Keys(str(path)), token)


def test_a_key_for_encryption_or_for_another_algorithm_does_not_sign(tmp_path, private):
    path = tmp_path / "keys.json"
    token = signed(private["RS256"], headers={"kid": "a"})
    for members in ({"use": "enc"}, {"alg": "PS256"}):
        key = jwk(private["RS256"], "RS256", kid="a") | members
        path.write_text(json.dumps({"keys": [key, jwk(private["ES256"], "ES256", kid="c")]}))
        assert not admits(Keys(str(path)), token), members


def test_a_weak_key_is_not_taken(tmp_path):
    weak = rsa.generate_private_key(65537, 1024)
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [jwk(weak, "RS256", kid="RS256")]}))
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        token = signed(weak)
    assert not admits(Keys(str(path)), token)


@pytest.mark.parametrize(
    ("claim", "claims", "scopes"),
    [
        ("scope", {"scope": "pacs.read"}, {"read"}),
        ("scp", {"scp": ["pacs.read", "pacs.write"]}, {"read", "write"}),
        ("realm_access.roles", {"realm_access": {"roles": ["radiologist"]}}, {"read", "write"}),
        ("https://example.org/roles", {"https://example.org/roles": ["mtra"]}, {"write"}),
        ("roles", {"roles": None}, set()),
        ("roles", {"roles": {"radiologist": 1}}, set()),
        ("roles", {"roles": 3}, set()),
        ("roles", {"roles": [1, ["radiologist"], "mtra"]}, {"write"}),
        ("a.b.c", {"a": {"b": "radiologist"}}, set()),
        ("scope", {"scope": "pacs.reader radiologists"}, set()),
    ],
)
def test_scopes_are_read_from_the_claim_that_the_configuration_names(
    keys_file, private, claim, claims, scopes
):
    reading, writing = ("pacs.read", "radiologist"), ("pacs.write", "radiologist", "mtra")
    rules = Rules(RULES.issuer, RULES.audience, scope_claim=claim, read=reading, write=writing)
    assert judge(Keys(str(keys_file)), signed(private["RS256"], **claims), rules).principal.scopes == scopes


def test_a_client_without_a_subject_goes_by_its_own_name(keys_file, private):
    keys = Keys(str(keys_file))
    assert judge(keys, signed(private["RS256"], sub=None, azp="router")).principal.name == "router"
    assert judge(keys, signed(private["RS256"], sub=None)).principal.name == "token"


# Keys


def test_keys_of_a_file_are_read_again_when_it_changes(keys_file, private):
    keys = Keys(str(keys_file))
    new = signed(private["other"], headers={"kid": "new"})
    before = keys.revision()
    assert not admits(keys, new)
    keys_file.write_text(json.dumps({"keys": [jwk(private["other"], "RS256", kid="new")]}))
    assert keys.revision() != before
    assert admits(keys, new)
    assert not admits(keys, signed(private["RS256"]))
    keys_file.write_text("{")
    with pytest.raises(BusyError, match="its log says why"):
        judge(keys, new)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": {}}', '{"keys": [1]}', '{"keys": []}', "\xff"])
def test_a_file_that_holds_no_keys_is_an_error(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"web\.tokens\.keys"):
        Keys(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(str(tmp_path / "none"))


class Issuer:
    """Publishes keys, or fails to, and counts how often it is asked."""

    def __init__(self):
        self.asked, self.status, self.body = 0, 200, b""
        self.headers = {}
        self.go_on = threading.Event()
        self.go_on.set()
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                issuer.asked += 1
                issuer.go_on.wait(10)
                self.send_response(issuer.status)
                for name, value in issuer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(issuer.body)))
                self.end_headers()
                self.wfile.write(issuer.body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/keys"

    def publish(self, *keys):
        self.body = json.dumps({"keys": keys}).encode()


@pytest.fixture
def issuer(private):
    issuer = Issuer()
    issuer.publish(jwk(private["RS256"], "RS256", kid="RS256"))
    yield issuer
    issuer.go_on.set()
    issuer.server.shutdown()
    issuer.thread.join()
    issuer.server.server_close()


def test_keys_are_fetched_once_for_many_tokens(issuer, private):
    keys = Keys(issuer.url, now=Clock())
    assert issuer.asked == 0
    for name in ("anna", "bert"):
        assert admits(keys, signed(private["RS256"], sub=name))
    assert issuer.asked == 1


def test_a_new_key_is_fetched_when_a_token_names_it_once_a_minute_at_most(issuer, private):
    clock = Clock()
    keys = Keys(issuer.url, now=clock)
    assert admits(keys, signed(private["RS256"]))
    issuer.publish(jwk(private["other"], "RS256", kid="new"))
    new = signed(private["other"], headers={"kid": "new"})
    clock.now += 59
    assert not admits(keys, new)
    assert issuer.asked == 1
    clock.now += 1
    before = keys.revision()
    assert admits(keys, new)
    assert keys.revision() != before
    for number in range(20):
        assert not admits(keys, signed(private["other"], headers={"kid": str(number)}))
    assert issuer.asked == 2


def test_a_key_that_is_withdrawn_is_good_for_no_more_than_a_quarter_of_an_hour(issuer, private):
    clock = Clock()
    keys = Keys(issuer.url, now=clock)
    token = signed(private["RS256"])
    assert admits(keys, token)
    issuer.publish(jwk(private["other"], "RS256", kid="new"))
    clock.now += 900
    assert not admits(keys, token)


def test_keys_that_cannot_be_fetched_anew_stay_good(issuer, private):
    clock = Clock()
    keys = Keys(issuer.url, now=clock)
    assert admits(keys, signed(private["RS256"]))
    issuer.status = 500
    clock.now += 900
    assert admits(keys, signed(private["RS256"]))
    assert issuer.asked == 2


@pytest.mark.parametrize("failure", ["status", "body", "redirect", "away"])
def test_while_there_are_no_keys_nobody_can_be_judged(issuer, private, failure):
    match failure:
        case "status":
            issuer.status = 404
        case "body":
            issuer.body = b"<html>"
        case "redirect":
            issuer.status, issuer.headers = 302, {"Location": issuer.url}
        case "away":
            issuer.url = "http://127.0.0.1:1/keys"
    clock = Clock()
    keys = Keys(issuer.url, now=clock)
    with pytest.raises(UnreachableError, match="cannot be had"):
        judge(keys, signed(private["RS256"]))
    asked = issuer.asked
    with pytest.raises(UnreachableError, match="cannot be had"):
        judge(keys, signed(private["RS256"]))
    assert issuer.asked == asked  # not for each who asks
    issuer.status, issuer.url = 200, issuer.url
    issuer.publish(jwk(private["RS256"], "RS256", kid="RS256"))
    clock.now += 1
    if failure != "away":
        assert admits(keys, signed(private["RS256"]))


def test_while_keys_are_fetched_others_are_told_to_come_again_or_go_by_those_known(issuer, private):
    clock = Clock()
    keys = Keys(issuer.url, now=clock)
    issuer.go_on.clear()
    found = []
    first = threading.Thread(target=lambda: found.append(keys.find("RS256", "RS256")))
    first.start()
    while not issuer.asked:
        first.join(0.01)
    with pytest.raises(BusyError, match="being fetched"):
        keys.find("RS256", "RS256")
    issuer.go_on.set()
    first.join()
    assert found[0]["kid"] == "RS256"

    issuer.go_on.clear()
    clock.now += 900
    second = threading.Thread(target=lambda: found.append(keys.find("RS256", "RS256")))
    second.start()
    while issuer.asked < 2:
        second.join(0.01)
    assert keys.find("RS256", "RS256")["kid"] == "RS256"
    issuer.go_on.set()
    second.join()
