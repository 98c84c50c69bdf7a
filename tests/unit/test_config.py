"""Settings: precedence, errors all at once, and a shipped file that is complete and equal to the defaults."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from dicomscp import config
from dicomscp.errors import ConfigError
from dicomscp.telemetry.metrics import IntakeMetrics
from dicomscp.web.app import WebSettings, create_app
from dicomscp.web.store import StoreSettings
from tests.unit.web.held import FilledArchive

SHIPPED = Path(__file__).parents[2] / "conf" / "dicomscp.toml"
ON_PURPOSE = {"root": Path("/var/lib/dicomscp"), "dimse.host": "0.0.0.0"}


def errors(path=None, overrides=None, environ=None):
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides or {}, environ or {})
    return str(caught.value).splitlines()


def value(settings, key):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "test.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def uncommented():
    """The shipped file with every key set."""
    return re.sub(r"^#(?=[\[\w])", "", SHIPPED.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_without_any_source_there_are_defaults():
    settings = config.load(None, {}, {"HOME": "/root"})

    assert settings.root == Path("dicomscp-data")
    assert (settings.dimse.ae_title, settings.dimse.host, settings.dimse.port) == (
        "DICOMSCP",
        "127.0.0.1",
        11112,
    )
    assert (settings.web.host, settings.web.port) == ("127.0.0.1", 8080)
    assert settings.storage.reserve == 1 << 30


@pytest.mark.parametrize(("written", "status"), [("204", 204), ("200", 200)])
def test_a_number_out_of_two_may_come_from_the_environment(written, status):
    assert config.load(None, {}, {"DICOMSCP_WEB__EMPTY_SEARCH": written}).web.empty_search == status
    (error,) = errors(environ={"DICOMSCP_WEB__EMPTY_SEARCH": "404"})
    assert "web.empty_search" in error


def test_flags_beat_environment_beats_file_beats_default(file):
    path = file("[dimse]\nport = 1\nlisteners = 1\nmax_associations = 1\n")
    environ = {"DICOMSCP_DIMSE__PORT": "2", "DICOMSCP_DIMSE__LISTENERS": "2"}

    dimse = config.load(path, {"dimse.port": 3}, environ).dimse

    assert (dimse.port, dimse.listeners, dimse.max_associations, dimse.ae_title) == (3, 2, 1, "DICOMSCP")


def test_a_list_in_the_environment_is_split_at_commas():
    environ = {"DICOMSCP_DIMSE__CALLED_AE_TITLES": "ONE, TWO 2,", "DICOMSCP_WEB__CORS_ORIGINS": ""}

    settings = config.load(None, {}, environ)

    assert settings.dimse.called_ae_titles == ("ONE", "TWO 2")
    assert settings.web.cors_origins == ()


def test_the_variable_that_names_the_file_is_no_key():
    assert config.load(None, {}, {"DICOMSCP_CONFIG": "x"}) == config.load(None, {}, {})


def test_every_error_is_reported_at_once_each_with_source_and_key(file):
    path = file(
        """
        dran_seconds = 3
        query = 3
        [dimse]
        prot = 104
        port = 65536
        transfer_syntaxes = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.99"]
        [[dimse.ae]]
        title = "BACK\\\\SLASH"
        addresses = ["10.0.0.1/8"]
        [storage]
        reserve = "plenty"
        """
    )
    found = errors(path, {"dimse.host": "a b"}, {"DICOMSCP_INBOX__ENABLED": "perhaps"})

    assert sorted(": ".join(line.split(": ")[:2]) for line in found) == sorted(
        [
            "command line: dimse.host",
            "environment (DICOMSCP_INBOX__ENABLED): inbox.enabled",
            f"{path}: dimse.ae[0].addresses[0]",
            f"{path}: dimse.ae[0].title",
            f"{path}: dimse.port",
            f"{path}: dimse.prot",
            f"{path}: dimse.transfer_syntaxes[1]",
            f"{path}: dran_seconds",
            f"{path}: query",
            f"{path}: storage.reserve",
        ]
    )


def test_an_unknown_key_names_the_one_that_was_meant(file):
    path = file("[dimse]\nprot = 104\n")

    assert errors(path) == [f"{path}: dimse.prot: unknown key; did you mean dimse.port?"]


def test_an_unknown_variable_is_an_error():
    assert errors(environ={"DICOMSCP_DIMSE__PROT": "1"}) == [
        "environment (DICOMSCP_DIMSE__PROT): dimse.prot: unknown key; did you mean dimse.port?"
    ]


@pytest.mark.parametrize("text", ["dimse = \n", "[dimse\n", "a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_names_the_file_and_the_place(file, text):
    path = file(text)

    (line,) = errors(path)

    assert line.startswith(f"{path}: is not TOML: ")
    assert "line" in line


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    path = tmp_path / "none.toml"

    assert errors(path) == [f"{path}: cannot be read: No such file or directory"]


def test_a_value_in_place_of_a_table_hides_nothing(file):
    path = file("dimse = 3\n")

    assert errors(path, environ={"DICOMSCP_DIMSE__PORT": "1"}) == [
        f"{path}: dimse: is a table of keys, not a value (is 3)"
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_web_host_needs_nothing(host):
    assert config.load(None, {"web.host": host}, {}).web.host == host


ELSEWHERE = pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "gateway.example.org"])
TOKENS = {"web.tokens.keys": "keys.json", "web.tokens.issuer": "https://i", "web.tokens.audience": "a"}
TLS = {"web.certificate_file": "c.pem", "web.key_file": "k.pem"}


@ELSEWHERE
def test_another_web_host_is_refused_until_it_is_said_twice(host):
    (line,) = errors(overrides={"web.host": host})

    assert line.startswith("command line: web.host: ")
    for way_out in ("web.users_file", "web.tokens", "127.0.0.1", "a second time, with web.open = true"):
        assert way_out in line
    assert config.load(None, {"web.host": host, "web.open": True}, {}).web.host == host


@ELSEWHERE
@pytest.mark.parametrize("asking", [{"web.users_file": "users"}, TOKENS])
def test_where_people_are_asked_another_web_host_needs_encryption_or_a_word(host, asking):
    (line,) = errors(overrides={"web.host": host} | asking)

    assert line.startswith("command line: web.host: ")
    for way_out in ("web.certificate_file", "127.0.0.1", "web.plain_http = true"):
        assert way_out in line
    for enough in (TLS, {"web.plain_http": True}):
        assert config.load(None, {"web.host": host} | asking | enough, {}).web.asks


def test_to_ask_nobody_and_to_name_who_may_contradict_each_other():
    for asking in ({"web.users_file": "users"}, TOKENS):
        (line,) = errors(overrides={"web.open": True} | asking)
        assert "take one of them away" in line


@pytest.mark.parametrize("given", [["certificate_file"], ["key_file"]])
def test_a_certificate_and_its_key_come_together(given):
    (line,) = errors(overrides={f"web.{name}": "x.pem" for name in given})
    assert "belong together" in line


@pytest.mark.parametrize("left_out", sorted(TOKENS))
def test_tokens_need_keys_issuer_and_audience(left_out):
    (line,) = errors(overrides={name: value for name, value in TOKENS.items() if name != left_out})
    assert line.startswith("command line: web.tokens: ")
    assert "belong together" in line


def test_tokens_may_be_set_in_the_environment():
    environ = {config.variable(key): value for key, value in TOKENS.items()}
    environ |= {"DICOMSCP_WEB__TOKENS__READ": "a, b", "DICOMSCP_WEB__TOKENS__ALGORITHMS": "PS256,EdDSA"}
    tokens = config.load(None, {}, environ).web.tokens
    assert (tokens.read, tokens.algorithms) == (("a", "b"), ("PS256", "EdDSA"))


def test_the_two_servers_take_different_ports():
    assert errors(overrides={"web.port": 11112}) == ["dimse.port and web.port are both 11112 on 127.0.0.1"]
    assert config.load(None, {"web.port": 0, "dimse.port": 0}, {}).web.port == 0


@pytest.mark.parametrize(
    ("base_path", "base_url", "ours"),
    [
        ("/pacs", "/pacs/dicomweb", "/pacs/dicomweb/instances"),
        ("/pacs", "https://pacs.example.org/pacs/dicomweb", "/pacs/dicomweb/instances"),
        ("/dicomweb", "/dicomweb", "/dicomweb/instances"),
        ("/dicomweb/studies/viewer", "/dicomweb", "/dicomweb/studies"),
        ("/series", "https://pacs.example.org", "/series"),
        ("/status", "/dicomweb", "/status"),
        ("/wado/viewer", "/dicomweb", "/wado"),
    ],
)
def test_the_viewer_has_a_path_of_its_own(base_path, base_url, ours):
    (line,) = errors(overrides={"viewer.base_path": base_path, "publish.base_url": base_url})
    assert line.startswith(f"viewer.base_path is {base_path}, and {ours} is ours already")


@pytest.mark.parametrize(
    ("base_path", "base_url"),
    [
        ("/pacs/ohif", "https://pacs.example.org/pacs/dicomweb"),
        ("/dicomweb/ohif", "/dicomweb"),
        ("/stat", "/dicomweb"),
        ("/statuses", "/dicomweb"),
        ("/ohif", "https://pacs.example.org"),
    ],
)
def test_the_viewer_may_be_beside_all_else(base_path, base_url):
    overrides = {"viewer.base_path": base_path, "publish.base_url": base_url}
    assert config.load(None, overrides, {}).viewer.base_path == base_path


def test_no_path_of_the_web_server_is_left_to_the_viewer(tmp_path):
    archive = FilledArchive(tmp_path)
    settings = StoreSettings(archive=lambda: archive, aside=tmp_path, metrics=IntakeMetrics())
    app = create_app(archive, WebSettings(store=settings), tmp_path, tmp_path)
    archive.engine.dispose()
    paths = {route.path.partition("{")[0].rstrip("/") for route in app.routes} - {""}
    assert len(paths) > 10
    for path in paths:
        assert "viewer.base_path" in errors(overrides={"viewer.base_path": path})[0], path


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        (
            "dimse.ae_title",
            ["", "    ", "SEVENTEEN LETTERS", "A\\B", "A\tB", "Ä"],
            ["A", " A ", "SIXTEEN  LETTERS"],
        ),
        ("dimse.port", [-1, 65536, "x"], [0, 104, 65535]),
        ("dimse.listeners", [0, 65], [1]),
        ("dimse.transfer_syntaxes", [["1.2.840.10008.1.1"], ["LittleEndian"]], [["1.2.840.10008.1.2.4.90"]]),
        ("dimse.private_sop_classes", [["1..2"], ["1." * 32 + "1"]], [["1.2.3"]]),
        ("dimse.idle_seconds", [0, -1, "inf", "nan"], [0.5]),
        ("storage.reserve", ["-1", "x"], [0, "500MB"]),
        ("storage.segment_size", ["256KiB", "2GiB"], ["1MiB"]),
        ("storage.durability", ["none"], ["full", "relaxed"]),
        (
            "publish.base_url",
            ["dicomweb", "/dicomweb/", "", "/", "ftp://x", "/a?b"],
            ["/a/b", "https://x:1/y", "http://x"],
        ),
        ("web.cors_origins", [["*"], ["x.org"], ["https://x.org/"]], [["https://x.org:8443"]]),
        (
            "index.url",
            ["sqlite:///x", "postgresql://", "mysql://h/x", "h/x", "postgresql://[::1/x"],
            ["postgresql://u@h:5432/x?sslmode=require", "postgres:///x", "postgresql://?service=x", ""],
        ),
        (
            "web.tokens.algorithms",
            [["none"], ["HS256"], [], ["RS256", "HS512"], ["ES256K"]],
            [["RS512", "EdDSA"]],
        ),
        ("web.tokens.leeway_seconds", [-1, 301, "nan"], [0]),
        ("web.max_connections", [0, 15], [16]),
        ("web.stall_seconds", [0, "inf"], [1]),
        ("log.level", ["loud"], ["debug"]),
    ],
)
def test_values_are_checked(key, bad, good):
    for one in bad:
        assert key in errors(overrides={key: one})[0]
    for one in good:
        config.load(None, {key: one}, {})


@pytest.mark.parametrize(
    ("keys", "good"),
    [
        ("https://idp.example.org/keys", True),
        ("http://127.0.0.1:8081/keys", True),
        ("/etc/dicomscp/keys.json", True),
        ("http://idp.example.org/keys", False),
        ("ftp://idp.example.org/keys", False),
        ("file:///etc/passwd", False),
        ("https://", False),
        ("https://[::1/keys", False),
        ("https://user:secret@idp.example.org/keys", False),
    ],
)
def test_keys_come_from_a_file_or_by_a_safe_way(keys, good):
    told = TOKENS | {"web.tokens.keys": keys}
    if good:
        assert config.load(None, told, {}).web.tokens.keys == keys
    else:
        assert errors(overrides=told)[0].startswith("command line: web.tokens.keys: ")


@pytest.mark.parametrize("url", ["postgresql://u:S3CRET@h/x", "postgresql://u@h/x?password=S3CRET"])
def test_a_password_in_the_url_of_the_index_is_refused_and_not_repeated(file, url):
    path = file(f'[index]\nurl = "{url}"\n')

    (line,) = errors(path)

    assert line.startswith(f"{path}: index.url: ")
    assert "index.password_file" in line
    assert "S3CRET" not in line


def test_an_ae_is_listed_once(file):
    path = file('[[dimse.ae]]\ntitle = "CT"\n[[dimse.ae]]\ntitle = " CT "\n')

    assert errors(path) == [f"{path}: dimse.ae: CT is listed twice; put all its addresses in one entry"]


def test_an_extra_key_is_an_attribute_that_can_be_compared_and_is_not_known(file):
    path = file(
        '[index.extra_keys]\nstudy = ["AdmittingDate", "Nonsense"]\nseries = ["00180060", "Modality"]\n'
        'instance = ["PixelData"]\n'
    )
    of_bytes = "is of VR OB or OW, with which nothing is compared"
    told = "is no attribute of the standard, by keyword or eight hex digits"
    assert errors(path) == [
        f"{path}: index.extra_keys.instance[0]: 'PixelData' {of_bytes} (is 'PixelData')",
        f"{path}: index.extra_keys.series[1]: 'Modality' is known already (is 'Modality')",
        f"{path}: index.extra_keys.study[1]: 'Nonsense' {told} (is 'Nonsense')",
    ]


def test_a_time_zone_is_one_by_its_name(file):
    path = file('[query]\ntimezone = "Europe/Nowhere"\n')
    told = "is no time zone by its IANA name, such as Europe/Berlin"
    assert errors(path) == [f"{path}: query.timezone: {told} (is 'Europe/Nowhere')"]
    assert config.load(file('[query]\ntimezone = "Europe/Berlin"\n'), {}, {}).query.timezone


def test_an_extra_key_is_listed_once(file):
    path = file('[index.extra_keys]\nseries = ["00180060"]\ninstance = ["KVP"]\n')
    assert errors(path) == [
        f"{path}: index.extra_keys: 00180060, KVP: an attribute is listed once, at one level"
    ]
    environ = {"DICOMSCP_INDEX__EXTRA_KEYS__SERIES": "KVP, ConvolutionKernel"}
    assert config.load(None, {}, environ).index.extra_keys.series == ("KVP", "ConvolutionKernel")


def test_the_addresses_of_an_ae_are_networks(file):
    path = file('[[dimse.ae]]\ntitle = "CT"\naddresses = ["10.1.2.3", "fe80::/64"]\n')

    (ae,) = config.load(path, {}, {}).dimse.ae

    assert ae.addresses == ("10.1.2.3/32", "fe80::/64")
    assert (ae.store, ae.find) == (True, False)


def test_a_default_character_set_is_one_that_is_known(file):
    config.load(
        file('[[dimse.ae]]\ntitle="CT"\ndefault_character_set="ISO 2022 IR 6\\\\ISO 2022 IR 87"\n'), {}, {}
    )

    (line,) = errors(file('[[dimse.ae]]\ntitle="CT"\ndefault_character_set="latin1"\n'))
    assert "'latin1' is not a Specific Character Set term" in line


def test_settings_do_not_change_and_pass_through_json():
    settings = config.load(None, {"dimse.called_ae_titles": ["A"], "storage.reserve": "2GiB"}, {})

    assert config.Config.model_validate_json(settings.model_dump_json()) == settings
    with pytest.raises(ValidationError):
        settings.dimse.port = 1


def test_the_shipped_file_runs_as_it_stands_and_sets_only_what_it_means_to():
    shipped, plain = config.load(SHIPPED, {}, {}), config.load(None, {}, {})

    different = {
        key: value(shipped, key) for key in config.every_key() if value(shipped, key) != value(plain, key)
    }

    assert different == ON_PURPOSE


def test_the_shipped_file_has_every_key_at_its_default(tmp_path):
    path = tmp_path / "all.toml"
    path.write_text(uncommented(), encoding="utf-8")
    every, plain = config.load(path, {}, {}), config.load(None, {}, {})

    assert {k for k, _ in config._flatten(tomllib.loads(uncommented()))} == set(config.every_key())
    assert {k: value(every, k) for k in config.every_key() if k != "dimse.ae"} == {
        k: ON_PURPOSE.get(k, value(plain, k)) for k in config.every_key() if k != "dimse.ae"
    }


def test_the_shipped_example_of_an_ae_has_every_key_at_its_default():
    (example,) = tomllib.loads(uncommented())["dimse"]["ae"]

    assert set(example) == set(config.Ae.model_fields)
    assert config.Ae(**example) == config.Ae(title=example["title"])


def test_every_key_in_the_shipped_file_has_a_reason_beside_it():
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#?\w+ = ", line):
            above = [text for text in lines[max(0, number - 6) : number] if text.startswith("# ")]
            assert above or "host" in line, line
