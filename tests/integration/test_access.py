"""A gateway that asks who asks: HTTPS, users and tokens by configuration, as an operator sets them up."""

import json
import re
import time

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from dicomscp.web import users
from tests.certificates import certified
from tests.gateway import Gateway, run_command
from tests.integration.commands import send
from tests.processes import wait_until

PASSWORD = "a good password"


@pytest.fixture(scope="module")
def private():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, private):
    folder = tmp_path_factory.mktemp("access")
    certificate_file, key_file = certified(folder)
    users.set_password(folder / "users", "anna", ["read"], PASSWORD, cost=users.Cost(10, 8, 1))
    key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key()))
    (folder / "keys.json").write_text(json.dumps({"keys": [key]}))
    config = folder / "dicomscp.toml"
    config.write_text(
        f"""
        [web]
        host = "0.0.0.0"
        users_file = "{folder}/users"
        certificate_file = "{certificate_file}"
        key_file = "{key_file}"
        [web.tokens]
        keys = "{folder}/keys.json"
        issuer = "https://idp.example.org"
        audience = "dicomscp"
        """
    )
    gateway = Gateway(
        folder / "root",
        config=config,
        settings={"dimse.listeners": 1, "pipeline.quiet_seconds": 0.2},
        certificate=certificate_file,
    )
    gateway.users_file = folder / "users"
    with gateway:
        yield gateway


@pytest.fixture
def client(gateway):
    with httpx.Client(base_url=gateway.url(""), verify=gateway.context, http2=True, timeout=30) as client:
        yield client


def test_what_is_sent_is_read_by_who_may(gateway, client, ct_small, private):
    send(gateway, [ct_small])
    assert client.get("/dicomweb/studies").status_code == 401

    def held():
        answer = client.get("/dicomweb/studies", auth=("anna", PASSWORD))
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
        return answer.json()

    wait_until(held, 30, "the study to be found")
    said = {
        "iss": "https://idp.example.org",
        "aud": "dicomscp",
        "sub": "viewer",
        "exp": time.time() + 60,
        "scope": "read",
    }
    token = jwt.encode(said, private, "ES256")
    answer = client.get("/", headers={"authorization": f"Bearer {token}"})
    assert answer.status_code == 200
    assert client.post("/dicomweb/studies", auth=("anna", PASSWORD)).status_code == 403
    assert gateway.wait_for_event("access_granted", user="viewer")["scheme"] == "bearer"
    text = gateway.log.read_text()
    assert PASSWORD not in text
    assert token not in text


def test_a_user_is_let_in_as_soon_as_the_command_has_run(gateway, client):
    assert client.get("/metrics", auth=("bert", "another password")).status_code == 401
    users.set_password(gateway.users_file, "bert", ["read"], "another password", cost=users.Cost(10, 8, 1))
    answer = client.get("/metrics", auth=("bert", "another password"))
    assert re.search(r'dicomscp_granted_accesses_total\{scheme="basic"\} [1-9]', answer.text)


def test_the_gateway_says_by_which_scheme_it_is_reached(gateway):
    assert gateway.url("/").startswith("https://")
    assert gateway.events("ready")[0]["web"].startswith("https://")


def test_serve_does_not_begin_with_files_that_will_not_do(tmp_path):
    (tmp_path / "users").write_text("anna:read:secret\n")
    (tmp_path / "users").chmod(0o600)
    environ = {"DICOMSCP_WEB__USERS_FILE": str(tmp_path / "users")}
    result = run_command("serve", "--root", tmp_path / "root", **environ)
    assert result.returncode == 2
    assert "line 1" in result.stderr
    assert not (tmp_path / "root").exists()
