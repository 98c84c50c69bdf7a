import struct
import zlib
from base64 import b64decode

import orjson
import pytest

from dicomscp.dicom.elements import LONG_VRS, SHORT_VRS, PrefixError
from dicomscp.dicom.jsonmodel import Compiler
from dicomscp.errors import RefusedError
from tests.unit.dicom.encoding import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    JPEG_BASELINE,
    SEQUENCE_END,
    UNDEFINED,
    big,
    dataset,
    deflate,
    explicit,
    fragments,
    implicit,
    item,
    open_item,
)

NAME = 0x00100010
PIXELS = 0x7FE00010
CHARSET = 0x00080005


def header(data, transfer_syntax_uid=EXPLICIT_LITTLE, *, compiler=None, **options):
    options = {"total_bytes": len(data), "bulk_uri": "/bulk", **options}
    return (compiler or Compiler()).header(data, transfer_syntax_uid, **options)


def attributes(data, transfer_syntax_uid=EXPLICIT_LITTLE, **options):
    found = header(data, transfer_syntax_uid, **options)
    return orjson.loads(b"{" + b",".join(found.fragments.values()) + b"}")


def one(element, transfer_syntax_uid=EXPLICIT_LITTLE, **options):
    """The attribute of the only element, and what was warned of."""
    found = header(element, transfer_syntax_uid, **options)
    found.fragments.pop(0x00083002)
    (fragment,) = (text for tag, text in found.fragments.items() if tag != CHARSET)
    (attribute,) = orjson.loads(b"{" + fragment + b"}").values()
    return attribute, found.warnings


def told(vr, value, **options):
    return one(explicit(0x00111010, vr, value), **options)[0].get("Value")


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vr", ["AE", "AS", "CS", "DA", "DT", "LO", "SH", "TM", "UC", "UI"])
def test_strings_are_split_and_empty_ones_are_null(vr):
    assert told(vr, "A") == ["A"]
    assert told(vr, "A\\\\B ") == ["A", None, "B"]
    assert told(vr, "\\") == [None, None]
    assert told(vr, "A\0\0\0") == ["A"]


@pytest.mark.parametrize("vr", ["LT", "ST", "UT", "UR"])
def test_one_text_is_not_split(vr):
    assert told(vr, "A\\B ") == ["A\\B"]
    assert told(vr, "  A\r\n B") == ["  A\r\n B"] if vr != "UR" else True


@pytest.mark.parametrize("vr", ["AE", "CS", "LO", "SH", "DS", "IS"])
def test_leading_spaces_are_dropped_where_they_mean_nothing(vr):
    assert told(vr, " 1\\ 2 ") in (["1", "2"], [1, 2])


@pytest.mark.parametrize("vr", ["DT", "UC", "LT", "ST", "UT"])
def test_leading_spaces_are_kept_where_they_may_mean_something(vr):
    assert told(vr, " 1 ") == [" 1"]


@pytest.mark.parametrize("vr", [vr.decode() for vr in sorted(LONG_VRS | SHORT_VRS)])
def test_an_empty_attribute_has_a_vr_only(vr):
    assert one(explicit(0x00111010, vr)) == ({"vr": vr}, ())
    if vr in ("AE", "CS", "DA", "DS", "IS", "LO", "LT", "PN", "SH", "ST", "UC", "UI", "UR", "UT"):
        assert one(explicit(0x00111010, vr, "  ")) == ({"vr": vr}, ())


@pytest.mark.parametrize(
    ("vr", "typecode", "numbers"),
    [
        ("SS", "h", [-32768, 0, 32767]),
        ("US", "H", [0, 65535]),
        ("SL", "i", [-(2**31), 7]),
        ("UL", "I", [2**32 - 1]),
        ("SV", "q", [-(2**53) + 1, 2**53 - 1]),
        ("UV", "Q", [0, 2**53 - 1]),
        ("FL", "f", [0.5, -1.25, 0.10000000149011612]),
        ("FD", "d", [0.1, -1e300, 5e-324]),
    ],
)
def test_binary_numbers_are_numbers_in_either_byte_order(vr, typecode, numbers):
    little = struct.pack(f"<{len(numbers)}{typecode}", *numbers)
    large = struct.pack(f">{len(numbers)}{typecode}", *numbers)

    assert told(vr, little) == numbers
    assert one(big(0x00111010, vr, large), EXPLICIT_BIG)[0]["Value"] == numbers


def test_integers_beyond_53_bits_stay_strings():
    assert told("SV", struct.pack("<3q", -(2**53), 2**53, 5)) == ["-9007199254740992", "9007199254740992", 5]
    assert told("UV", struct.pack("<Q", 2**64 - 1)) == ["18446744073709551615"]


@pytest.mark.parametrize(("vr", "typecode"), [("FL", "f"), ("FD", "d")])
def test_what_is_no_finite_number_is_a_string(vr, typecode):
    value = struct.pack(f"<4{typecode}", float("nan"), float("inf"), float("-inf"), 1)

    assert told(vr, value) == ["NaN", "Infinity", "-Infinity", 1.0]


@pytest.mark.parametrize(
    ("text", "json"),
    [
        ("1", b"1"),
        ("-1.20", b"-1.20"),
        ("+1", b"1"),
        ("007", b"7"),
        (".5", b"0.5"),
        ("-.5", b"-0.5"),
        ("5.", b"5"),
        ("1E3", b"1E3"),
        ("+1E3", b"1e3"),
        ("1.5e-07", b"1.5e-07"),
        ("0.333333333333333333333", b"0.333333333333333333333"),
        ("-0", b"-0"),
        ("000", b"0"),
        ("0e5", b"0e5"),
        ("123456789.12345678901", b"123456789.12345678901"),
        ("0.10000000000000001", b"0.10000000000000001"),
        ("9007199254740992", b"9007199254740992"),
        ("12345678901234567890e3", b"12345678901234567890e3"),
        ("1e400", b'"1e400"'),
        ("1e-400", b'"1e-400"'),
        ("NaN", b'"NaN"'),
        ("1,5", b'"1,5"'),
        ("1 2", b'"1 2"'),
        (".", b'"."'),
        ("1_000", b'"1_000"'),
        ("0x10", b'"0x10"'),
    ],
)
def test_a_decimal_string_keeps_its_digits_or_stays_a_string(text, json):
    found = header(explicit(0x00111010, "DS", text)).fragments[0x00111010]

    assert found == b'"00111010":{"vr":"DS","Value":[' + json + b"]}"
    assert bool(header(explicit(0x00111010, "DS", text)).warnings) is json.startswith(b'"')


@pytest.mark.parametrize(
    "text", ["9007199254740993", "-9007199254740993", "9999999999999999", "12345678901234567."]
)
def test_a_whole_decimal_that_a_float_would_change_is_a_string_of_its_digits(text):
    attribute, warnings = one(explicit(0x00111010, "DS", "1.5\\" + text))

    assert attribute["Value"] == [1.5, text.rstrip(".")]
    assert warnings == ()


@pytest.mark.parametrize("vr", ["DS", "IS"])
def test_empty_values_among_numbers_are_null(vr):
    assert told(vr, "1\\\\2\\ ") == [1, None, 2, None]
    assert told(vr, "\\") == [None, None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1\\-2\\+3", [1, -2, 3]),
        ("0012", [12]),
        ("12.0", [12]),
        ("9007199254740991", [9007199254740991]),
        ("9007199254740993", ["9007199254740993"]),
        ("12.5", ["12.5"]),
        ("1e2", ["1e2"]),
        ("A", ["A"]),
        ("\\5", [None, 5]),
    ],
)
def test_an_integer_string_is_a_whole_number_or_stays_a_string(text, value):
    assert told("IS", text) == value


def test_attribute_tags_are_eight_digits_in_either_byte_order():
    assert told("AT", b"\x10\x00\x20\x00\xfe\xff\x0d\xe0") == ["00100020", "FFFEE00D"]
    assert one(big(0x00111010, "AT", b"\x00\x10\x00\x20"), EXPLICIT_BIG)[0]["Value"] == ["00100020"]


def test_person_names_are_groups_of_components():
    assert told("PN", "A^B=C^D=E^F") == [{"Alphabetic": "A^B", "Ideographic": "C^D", "Phonetic": "E^F"}]
    assert told("PN", "=C") == [{"Ideographic": "C"}]
    assert told("PN", "A==E ") == [{"Alphabetic": "A", "Phonetic": "E"}]
    assert told("PN", "A\\\\B") == [{"Alphabetic": "A"}, None, {"Alphabetic": "B"}]
    assert told("PN", "==") is None
    assert told("PN", "A^B^^^") == [{"Alphabetic": "A^B^^^"}]
    assert told("PN", 'A"\\B\0') == [{"Alphabetic": 'A"'}, {"Alphabetic": "B"}]


def test_a_fourth_component_group_is_left_out_and_counted():
    attribute, warnings = one(explicit(0x00111010, "PN", "A=B=C=D"))

    assert attribute["Value"] == [{"Alphabetic": "A", "Ideographic": "B", "Phonetic": "C"}]
    assert warnings == ("1 person names have more than three component groups",)


@pytest.mark.parametrize("vr", ["AE", "CS", "LO", "SH", "UC", "UI", "PN", "LT", "UT", "UR", "DS", "IS"])
def test_values_of_odd_length_and_any_padding_read_alike(vr):
    expected = told(vr, "12")
    for value in (b"12", b"12\0", b"12 ", b"12  \0 ", b"12\0\0\0"):
        assert one(explicit(0x00111010, vr, value)) == ({"vr": vr, "Value": expected}, ())


def test_text_that_needs_no_escape_reads_as_text_that_does():
    for vr in ("AE", "AS", "CS", "DA", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"):
        for text in (" a b ", "~{|}", "a\\b", "a\\ b ", "\\a", "", "  "):
            plain, quoted = told(vr, text + "x"), told(vr, text + '"')
            assert orjson.dumps(quoted) == orjson.dumps(plain).replace(b"x", b'\\"')


@pytest.mark.parametrize(
    ("vr", "word"), [("OB", 1), ("OW", 2), ("OF", 4), ("OL", 4), ("OD", 8), ("OV", 8), ("UN", 1)]
)
def test_binary_values_are_inline_in_little_endian_order(vr, word):
    value = bytes(range(16))
    turned = b"".join(value[at : at + word][::-1] for at in range(0, 16, word))

    assert b64decode(one(explicit(0x00111010, vr, value))[0]["InlineBinary"]) == value
    assert b64decode(one(big(0x00111010, vr, value), EXPLICIT_BIG)[0]["InlineBinary"]) == turned


def test_long_binary_values_and_all_pixel_data_are_links():
    long, short = bytes(11), bytes(10)
    compiler = Compiler(inline_bytes=10)
    data = dataset(
        explicit(0x00420011, "OB", long), explicit(0x00420012, "OB", short), explicit(PIXELS, "OW", b"\0\0")
    )
    found = attributes(data, compiler=compiler)

    assert found["00420011"] == {"vr": "OB", "BulkDataURI": "/bulk/00420011"}
    assert "InlineBinary" in found["00420012"]
    assert found["7FE00010"] == {"vr": "OW", "BulkDataURI": "/bulk/7FE00010"}


def test_a_link_in_a_sequence_names_items_from_one():
    inner = explicit(0x54001010, "OW", bytes(4000))
    waveforms = explicit(0x54000100, "SQ", item() + item(explicit(0x54000100, "SQ", item(inner))))
    for _ in range(2):  # a link is not remembered for another instance
        compiler = Compiler()
        for uri in ("/a", "/b"):
            found = attributes(waveforms, compiler=compiler, bulk_uri=uri)
            nested = found["54000100"]["Value"][1]["54000100"]["Value"][0]["54001010"]
            assert nested == {"vr": "OW", "BulkDataURI": f"{uri}/54000100/2/54000100/1/54001010"}


@pytest.mark.parametrize(
    ("vr", "value", "kept"),
    [("US", b"\1\0\2", [1]), ("FD", bytes(9), [0.0]), ("AT", bytes(6), ["00000000"]), ("UL", b"\1\2", None)],
)
def test_a_length_that_does_not_fit_costs_the_odd_bytes_and_a_warning(vr, value, kept):
    attribute, warnings = one(explicit(0x00111010, vr, value))

    assert attribute.get("Value") == kept
    assert warnings == ("1 values have a length that does not fit their VR",)


# --- the dataset --------------------------------------------------------------------------------------------


def test_attributes_stand_in_ascending_order_whatever_the_dataset_does():
    data = (
        explicit(0x00200013, "IS", "1") + explicit(0x00080060, "CS", "CT") + explicit(0x00100020, "LO", "X")
    )
    inner = explicit(0x00081140, "SQ", item(data))

    assert list(header(data).fragments) == [0x00080060, 0x00083002, 0x00100020, 0x00200013]
    assert list(attributes(inner)["00081140"]["Value"][0]) == ["00080060", "00100020", "00200013"]


def test_group_lengths_commands_and_file_meta_information_are_left_out():
    lengths = explicit(0x00080000, "UL", b"\1\0\0\0"), explicit(0x00090000, "UL", b"\1\0\0\0")
    data = explicit(0x00000110, "US", b"\1\0") + explicit(0x00020010, "UI", "1.2") + b"".join(lengths)

    assert list(header(data + explicit(0x00100020, "LO", "X")).fragments) == [0x00083002, 0x00100020]


def test_the_transfer_syntax_held_is_told():
    assert attributes(dataset(), bulk_uri="")["00083002"] == {"vr": "UI", "Value": [EXPLICIT_LITTLE]}


def test_the_last_of_equal_elements_counts():
    assert told("LO", "") is None
    assert attributes(explicit(NAME, "PN", "A") + explicit(NAME, "PN", "B"))["00100010"]["Value"] == [
        {"Alphabetic": "B"}
    ]


def test_sequences_of_every_framing_read_alike():
    inner = explicit(0x00081150, "UI", "1.2") + explicit(0x00081155, "UI", "1.2.3")
    framings = [
        explicit(0x00081140, "SQ", item(inner) + item()),
        explicit(0x00081140, "SQ", open_item(inner) + open_item()),
        explicit(0x00081140, "SQ", item(inner) + item() + SEQUENCE_END, length=UNDEFINED),
        explicit(0x00081140, "SQ", open_item(inner) + open_item() + SEQUENCE_END, length=UNDEFINED),
    ]
    expected = {"00081150": {"vr": "UI", "Value": ["1.2"]}, "00081155": {"vr": "UI", "Value": ["1.2.3"]}}

    for framing in framings:
        assert one(framing + explicit(0x00080000, "UL")) == ({"vr": "SQ", "Value": [expected, {}]}, ())


def test_an_empty_sequence_has_a_vr_only():
    assert one(explicit(0x00081140, "SQ", SEQUENCE_END, length=UNDEFINED)) == ({"vr": "SQ"}, ())


def test_implicit_vr_is_looked_up():
    data = (
        implicit(0x00080060, "CT")
        + implicit(0x00200013, "7")
        + implicit(0x00081140, item(implicit(0x00081150, "1.2")))
    )
    found = attributes(data + implicit(0x60020010, b"\1\0") + implicit(0x00189999, b"??"), IMPLICIT_LITTLE)

    assert found["00080060"] == {"vr": "CS", "Value": ["CT"]}
    assert found["00200013"] == {"vr": "IS", "Value": [7]}
    assert found["00081140"]["Value"] == [{"00081150": {"vr": "UI", "Value": ["1.2"]}}]
    assert found["60020010"] == {"vr": "US", "Value": [1]}
    assert found["00189999"]["vr"] == "UN"


@pytest.mark.parametrize(
    ("write", "transfer_syntax_uid"),
    [(implicit, IMPLICIT_LITTLE), (lambda tag, value: explicit(tag, "UN", value), EXPLICIT_LITTLE)],
)
def test_a_private_vr_is_looked_up_by_its_creator(write, transfer_syntax_uid):
    compiler = Compiler()
    value = struct.pack("<l", 5)
    known = write(0x00190010, b"GEMS_ACQU_01") + write(0x0019100F, b"1.5 ")
    other = write(0x00190010, b"SOMEBODY") + write(0x0019100F, b"1.5 ")
    for _ in range(2):
        found = attributes(known, transfer_syntax_uid, compiler=compiler)
        assert found["00190010"] == {"vr": "LO", "Value": ["GEMS_ACQU_01"]}
        assert found["0019100F"] == {"vr": "DS", "Value": [1.5]}
        assert attributes(other, transfer_syntax_uid, compiler=compiler)["0019100F"]["vr"] == "UN"
    assert attributes(write(0x0019100F, value), transfer_syntax_uid)["0019100F"]["vr"] == "UN"


def test_un_is_read_by_the_standards_vr_and_in_little_endian_order():
    assert one(explicit(0x00280010, "UN", b"\2\0"))[0] == {"vr": "US", "Value": [2]}
    assert one(big(0x00280010, "UN", b"\2\0"), EXPLICIT_BIG)[0] == {"vr": "US", "Value": [2]}
    inner = item(implicit(0x00081150, "1.2"))
    expected = {"vr": "SQ", "Value": [{"00081150": {"vr": "UI", "Value": ["1.2"]}}]}
    assert one(explicit(0x00081140, "UN", inner))[0] == expected


def test_un_of_defined_length_holds_implicit_vr_in_either_byte_order():
    inner = item(implicit(0x00081150, "1.2") + implicit(0x00280106, b"\2\0"))
    expected = [{"00081150": {"vr": "UI", "Value": ["1.2"]}, "00280106": {"vr": "US", "Value": [2]}}]

    for element, syntax in ((explicit, EXPLICIT_LITTLE), (big, EXPLICIT_BIG)):
        assert one(element(0x00081140, "UN", inner), syntax) == ({"vr": "SQ", "Value": expected}, ())


def test_private_un_is_left_as_it_is_if_so_configured():
    compiler = Compiler(private_un="keep")
    private = explicit(0x00190010, "UN", b"GEMS_ACQU_01") + explicit(0x0019100F, "UN", b"1.5 ")
    items = open_item(implicit(0x00081150, "1.2")) + SEQUENCE_END
    sequence = explicit(0x00191010, "UN", items, length=UNDEFINED)
    written = explicit(0x001910E0, "DS", "2")
    data = explicit(0x00080060, "UN", b"CT") + private + sequence + written
    for _ in range(3):
        found = attributes(data, compiler=compiler)
        assert found["00080060"] == {"vr": "CS", "Value": ["CT"]}
        assert found["00190010"] == {"vr": "LO", "Value": ["GEMS_ACQU_01"]}
        assert found["0019100F"] == {"vr": "UN", "InlineBinary": "MS41IA=="}
        assert found["00191010"]["Value"] == [{"00081150": {"vr": "UI", "Value": ["1.2"]}}]
        assert found["001910E0"] == {"vr": "DS", "Value": [2]}
        implicit_vr = implicit(0x00190010, b"GEMS_ACQU_01") + implicit(0x0019100F, b"1.5 ")
        assert attributes(implicit_vr, IMPLICIT_LITTLE, compiler=compiler)["0019100F"]["vr"] == "DS"


def test_a_private_creator_counts_in_its_own_item_only():
    block = implicit(0x00190010, b"GEMS_ACQU_01") + implicit(0x0019100F, b"1.5 ")
    without = implicit(0x0019100F, b"1.5 ")
    data = block + implicit(0x00400275, item(block) + item(without) + item(block))
    for first, second, third in (
        found["00400275"]["Value"] for found in remembered(data, data, syntax=IMPLICIT_LITTLE)
    ):
        assert first["0019100F"] == third["0019100F"] == {"vr": "DS", "Value": [1.5]}
        assert second["0019100F"]["vr"] == "UN"


@pytest.mark.parametrize("write", [explicit, big])
def test_un_of_undefined_length_is_a_sequence_in_implicit_vr(write):
    inner = open_item(implicit(0x00091001, b"ab") + implicit(0x00080060, "CT"))
    private = write(0x00091010, "UN", inner + SEQUENCE_END, length=UNDEFINED)
    syntax = EXPLICIT_BIG if write is big else EXPLICIT_LITTLE

    attribute, warnings = one(private, syntax)
    assert attribute["vr"] == "SQ"
    assert attribute["Value"][0]["00080060"] == {"vr": "CS", "Value": ["CT"]}
    assert attribute["Value"][0]["00091001"] == {"vr": "UN", "InlineBinary": "YWI="}
    assert warnings == ()


@pytest.mark.parametrize(("representation", "vr", "value"), [(0, "US", 65535), (1, "SS", -1)])
def test_us_or_ss_follows_the_pixel_representation_around_it(representation, vr, value):
    compiler = Compiler()
    told_first = implicit(0x00280103, struct.pack("<H", representation))
    padding = implicit(0x00280120, b"\xff\xff")
    lut = implicit(0x00283000, item(implicit(0x00283002, b"\xff\xff\0\0\x10\0")))
    early = implicit(0x00189810, b"\xff\xff")
    for _ in range(2):
        found = attributes(early + told_first + padding + lut, IMPLICIT_LITTLE, compiler=compiler)
        assert found["00280120"] == found["00189810"] == {"vr": vr, "Value": [value]}
        assert found["00283000"]["Value"][0]["00283002"] == {"vr": vr, "Value": [value, 0, 16]}
        neither = attributes(padding + lut, IMPLICIT_LITTLE, compiler=compiler)
        assert neither["00280120"] == {"vr": "US", "Value": [65535]}
        assert neither["00283000"]["Value"][0]["00283002"]["vr"] == "US"


def test_an_items_own_pixel_representation_is_nearer():
    own = implicit(0x00280103, b"\1\0") + implicit(0x00280106, b"\xff\xff")
    found = attributes(implicit(0x00280103, b"\0\0") + implicit(0x00880200, item(own)), IMPLICIT_LITTLE)

    assert found["00880200"]["Value"][0]["00280106"] == {"vr": "SS", "Value": [-1]}


@pytest.mark.parametrize(("entries", "vr"), [(1, "US"), (2, "OW")])
def test_a_lut_of_one_entry_is_a_number(entries, vr):
    descriptor = implicit(0x00283002, struct.pack("<3H", entries, 0, 16))
    found = attributes(descriptor + implicit(0x00283006, bytes(2 * entries)), IMPLICIT_LITTLE)

    assert found["00283006"]["vr"] == vr


def test_gray_lookup_table_data_are_words():
    assert one(implicit(0x00281200, b"\1\0"), IMPLICIT_LITTLE)[0] == {"vr": "OW", "InlineBinary": "AQA="}


def test_implicit_pixel_data_are_words_and_encapsulated_ones_bytes():
    native = implicit(PIXELS, bytes(8))
    encapsulated = explicit(PIXELS, "OB", fragments(b"abcd"), length=UNDEFINED)

    assert one(native, IMPLICIT_LITTLE)[0] == {"vr": "OW", "BulkDataURI": "/bulk/7FE00010"}
    assert one(encapsulated, JPEG_BASELINE)[0] == {"vr": "OB", "BulkDataURI": "/bulk/7FE00010"}
    assert one(implicit(0x60003000, b"\1\0"), IMPLICIT_LITTLE)[0] == {"vr": "OW", "InlineBinary": "AQA="}


@pytest.mark.parametrize("bits", [8, 16])
def test_implicit_waveforms_are_words_whatever_their_bits(bits):
    """PS3.5 section 8.3 and A.1: OB is for transfer syntaxes that say so."""
    waveform = implicit(0x5400100A, b"\0\0") + implicit(0x54001004, struct.pack("<H", bits))
    waveform = waveform + implicit(0x54001006, "SB") + implicit(0x54001010, b"\1\2")
    (found,) = attributes(implicit(0x54000100, item(waveform)), IMPLICIT_LITTLE)["54000100"]["Value"]

    assert found["5400100A"] == {"vr": "OW", "InlineBinary": "AAA="}
    assert found["54001010"] == {"vr": "OW", "InlineBinary": "AQI="}


@pytest.mark.parametrize(
    ("tag", "vr"),
    [(0x50003000, "OW"), (0x5002200C, "OW"), (0x60023000, "OW"), (0x7F020010, "OW"), (0x00420011, "OB")],
)
def test_implicit_curves_overlays_and_documents_have_the_vr_of_annex_a_1(tag, vr):
    assert one(implicit(tag, b"\1\2"), IMPLICIT_LITTLE)[0] == {"vr": vr, "InlineBinary": "AQI="}
    assert one(explicit(tag, "UN", b"\1\2"))[0] == {"vr": vr, "InlineBinary": "AQI="}
    assert one(explicit(tag, "OB", b"\1\2"))[0] == {"vr": "OB", "InlineBinary": "AQI="}


@pytest.mark.parametrize("vr", ["OB", "OD", "OF", "OL", "OV", "OW", "UN"])
def test_the_size_of_a_link_is_more_than_the_longest_that_is_inline(vr):
    inline, link = explicit(0x00111010, vr, bytes(1024)), explicit(0x00111010, vr, bytes(1032))

    assert "InlineBinary" in one(inline)[0]
    assert one(link)[0] == {"vr": vr, "BulkDataURI": "/bulk/00111010"}


def test_an_icon_image_links_to_its_pixel_data_however_short():
    icon = explicit(0x00880200, "SQ", item(explicit(PIXELS, "OB", b"\1\2")))

    assert one(icon)[0]["Value"] == [{"7FE00010": {"vr": "OB", "BulkDataURI": "/bulk/00880200/1/7FE00010"}}]


def test_long_text_is_no_bulk_data():
    for vr in ("UT", "UC", "UR", "LT"):
        assert told(vr, "x" * 9000) == ["x" * 9000]


def test_a_deflated_dataset_is_inflated():
    assert attributes(deflate(dataset(explicit(NAME, "PN", "A"))), DEFLATED)["00100010"]["Value"] == [
        {"Alphabetic": "A"}
    ]
    with pytest.raises(RefusedError):
        header(zlib.compress(dataset()), DEFLATED)


def test_bytes_are_believed_and_not_the_transfer_syntax_and_that_is_warned_of():
    found = header(dataset(write=implicit), EXPLICIT_LITTLE)

    assert found.warnings == ("the dataset is not encoded as its transfer syntax says",)
    assert found.fragments[0x0020000D] == b'"0020000D":{"vr":"UI","Value":["1"]}'


def test_an_implicit_item_in_an_explicit_dataset_is_read():
    sequence = explicit(
        0x00081140, "SQ", open_item(implicit(0x00081150, "1.2")) + SEQUENCE_END, length=UNDEFINED
    )

    assert one(sequence)[0]["Value"] == [{"00081150": {"vr": "UI", "Value": ["1.2"]}}]


# --- character sets -----------------------------------------------------------------------------------------


def in_charset(term, vr, value, **options):
    declared = explicit(CHARSET, "CS", term) if term is not None else b""
    return one(declared + explicit(0x00111010, vr, value), **options)


@pytest.mark.parametrize(
    ("term", "codec", "text"),
    [
        ("ISO_IR 100", "latin-1", "Äneas"),
        ("ISO_IR 101", "iso8859-2", "Wałęsa"),
        ("ISO_IR 109", "iso8859-3", "Ĉapek"),
        ("ISO_IR 110", "iso8859-4", "Āboliņš"),
        ("ISO_IR 144", "iso8859-5", "Люди"),
        ("ISO_IR 127", "iso8859-6", "قباني"),
        ("ISO_IR 126", "iso8859-7", "Διονυσιος"),
        ("ISO_IR 138", "iso8859-8", "שרון"),
        ("ISO_IR 148", "iso8859-9", "Çavuşoğlu"),
        ("ISO_IR 166", "tis-620", "สมชาย"),
        ("ISO_IR 13", "shift_jis", "ﾔﾏﾀﾞ"),
        ("ISO_IR 192", "utf-8", "王小东 Ünicode 𝄞"),
        ("GB18030", "gb18030", "王小东\u4e02"),
        ("GBK", "gbk", "王小东"),
        ("ISO-IR 100", "latin-1", "Äneas"),
        ("iso_ir_192", "utf-8", "王"),
    ],
)
@pytest.mark.parametrize("vr", ["LO", "SH", "ST", "LT", "UC", "UT", "PN"])
def test_text_is_decoded_by_its_character_set(term, codec, text, vr):
    attribute, warnings = in_charset(term, vr, text.encode(codec))

    assert attribute["Value"] == ([{"Alphabetic": text}] if vr == "PN" else [text])
    assert warnings == ()


def test_a_backslash_byte_inside_a_character_is_no_delimiter():
    text = "誠\\乗"
    assert b"\\" in "乗".encode("gb18030") or b"\\" in "誠".encode("gb18030")

    assert in_charset("GB18030", "LO", text.encode("gb18030"))[0]["Value"] == text.split("\\")


# PS3.5 annexes H.3, I.2, J.3 and K: the standard's own examples.
JAPANESE_1 = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"
JAPANESE_2 = (
    b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J"
)
KOREAN = b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf"
CHINESE = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="


@pytest.mark.parametrize(
    ("term", "value", "names"),
    [
        ("\\ISO 2022 IR 87", JAPANESE_1, ["Yamada^Tarou", "山田^太郎", "やまだ^たろう"]),
        ("ISO 2022 IR 13\\ISO 2022 IR 87", JAPANESE_2, ["ﾔﾏﾀﾞ^ﾀﾛｳ", "山田^太郎", "やまだ^たろう"]),
        ("\\ISO 2022 IR 149", KOREAN, ["Hong^Gildong", "洪^吉洞", "홍^길동"]),
        ("\\ISO 2022 IR 58", CHINESE, ["Zhang^XiaoDong", "张^小东"]),
        ("\\ISO 2022 IR 87\\ISO 2022 IR 159", b"X=\x1b$(D0!\x1b(B^\x1b$B;3\x1b(B", ["X", "\u4e02^山"]),
    ],
)
def test_code_extensions_are_followed_and_end_at_delimiters(term, value, names):
    attribute, warnings = in_charset(term, "PN", value)

    assert list(attribute["Value"][0].values()) == names
    assert warnings == ()


def test_a_code_extension_ends_with_the_line_and_the_value():
    greek = b"\x1b-F\xc4\xe9"
    value = greek + b"\r\n\xc4 " + greek
    assert in_charset("ISO 2022 IR 100\\ISO 2022 IR 126", "LT", value)[0]["Value"] == ["Δι\r\nÄ Δι"]
    assert in_charset("ISO 2022 IR 100\\ISO 2022 IR 126", "LO", greek + b"\\\xc4 ")[0]["Value"] == ["Δι", "Ä"]


def test_an_escape_sequence_is_followed_even_if_its_set_is_not_declared():
    assert in_charset("ISO_IR 100", "LO", b"\x1b$B;3ED\x1b(B")[0]["Value"] == ["山田"]


def test_the_character_set_that_is_told_is_that_of_the_json():
    data = explicit(CHARSET, "CS", "ISO_IR 100") + explicit(NAME, "PN", b"\xc4.")

    assert attributes(data)["00080005"] == {"vr": "CS", "Value": ["ISO_IR 192"]}
    assert "00080005" not in attributes(explicit(NAME, "PN", "A"))


def test_implicit_vr_has_character_sets_too():
    data = implicit(CHARSET, "ISO_IR 144") + implicit(NAME, b"\xbb\xee") + implicit(0x00280010, b"\2\0")
    found = attributes(data, IMPLICIT_LITTLE, wanted=frozenset({NAME, CHARSET}))

    assert found["00100010"]["Value"] == [{"Alphabetic": "Лю"}]
    assert set(found) == {"00080005", "00100010"}


def test_an_item_inherits_the_character_set_or_has_its_own():
    text = "Ä".encode("latin-1")
    own = explicit(CHARSET, "CS", "ISO_IR 144") + explicit(0x00080104, "LO", b"\xbb\xee")
    inherits = explicit(0x00080104, "LO", text + b" ")
    sequence = explicit(0x00081140, "SQ", item(inherits) + item(own) + item(inherits))
    first, second, third = attributes(explicit(CHARSET, "CS", "ISO_IR 100") + sequence)["00081140"]["Value"]

    assert first == third == {"00080104": {"vr": "LO", "Value": ["Ä"]}}
    assert second["00080104"]["Value"] == ["Лю"]
    assert second["00080005"]["Value"] == ["ISO_IR 192"]


def test_the_character_set_of_an_item_ends_with_it_and_serves_what_is_within():
    cyrillic = explicit(CHARSET, "CS", "ISO_IR 144")
    text = explicit(0x00080104, "LO", b"\xbb\xee")
    within = explicit(0x00081140, "SQ", open_item(text) + SEQUENCE_END, length=UNDEFINED)
    outer = explicit(0x00400275, "SQ", item(cyrillic + text + within) + item(text))
    found = attributes(explicit(CHARSET, "CS", "ISO_IR 100") + outer + explicit(0x00400280, "ST", b"\xc4 "))
    first, second = found["00400275"]["Value"]

    assert first["00080104"]["Value"] == first["00081140"]["Value"][0]["00080104"]["Value"] == ["Лю"]
    assert second["00080104"]["Value"] == ["»î"]
    assert found["00400280"]["Value"] == ["Ä"]


@pytest.mark.parametrize("vr", ["LO", "SH", "UN", "ST"])
def test_a_character_set_of_the_wrong_vr_is_obeyed(vr):
    found = attributes(explicit(CHARSET, vr, b"ISO_IR 144") + explicit(NAME, "PN", b"\xbb\xee"))

    assert found["00100010"]["Value"] == [{"Alphabetic": "Лю"}]
    assert found["00080005"] == {"vr": "CS", "Value": ["ISO_IR 192"]}


def test_a_character_set_told_twice_holds_from_where_it_stands():
    twice = explicit(CHARSET, "CS", "ISO_IR 144") * 2 + explicit(NAME, "PN", b"\xbb\xee")
    other = explicit(CHARSET, "CS", "ISO_IR 100") + explicit(CHARSET, "CS", "ISO_IR 144")
    for found in remembered(twice, other + explicit(NAME, "PN", b"\xbb\xee"), twice):
        assert found["00100010"]["Value"] == [{"Alphabetic": "Лю"}]
        assert list(found) == ["00080005", "00083002", "00100010"]


def test_a_default_character_set_serves_those_that_declare_none():
    greek = "Δ".encode("iso8859-7") + b" "
    options = {"default_charset": "ISO_IR 126"}

    assert in_charset(None, "LO", greek, **options) == ({"vr": "LO", "Value": ["Δ"]}, ())
    assert in_charset("", "LO", greek, **options)[0]["Value"] == ["Δ"]
    assert in_charset("ISO_IR 100", "LO", b"\xc4 ", **options)[0]["Value"] == ["Ä"]
    assert attributes(explicit(0x00111010, "LO", greek), **options)["00080005"]["Value"] == ["ISO_IR 192"]


@pytest.mark.parametrize(
    ("term", "value", "text", "warning"),
    [
        (None, b"\xc4neas ", "Äneas", "1 texts hold bytes outside their character set"),
        ("ISO_IR 192", b"\xc4neas ", "\ufffdneas", "1 texts hold bytes outside their character set"),
        ("ISO_IR 999", b"A ", "A", "1 character sets are unknown"),
        (
            "\\ISO 2022 IR 87",
            b"\x1b$B;3E\x1b(B ",
            "山\ufffd",
            "1 texts hold bytes outside their character set",
        ),
        ("\\ISO 2022 IR 87", b"\x1b%Z", "\x1b%Z", "1 texts hold bytes outside their character set"),
    ],
)
def test_text_that_is_not_in_its_character_set_is_replaced_and_counted(term, value, text, warning):
    compiler = Compiler()
    for _ in range(2):  # a warning is not forgotten when the fragment is known
        attribute, warnings = in_charset(term, "LO", value, compiler=compiler)
        assert attribute["Value"] == [text]
        assert warnings == (warning,)


def test_a_code_string_beyond_ascii_is_read_as_latin_1_and_counted():
    assert in_charset("ISO_IR 192", "CS", b"\xc4 ") == (
        {"vr": "CS", "Value": ["Ä"]},
        ("1 texts hold bytes outside their character set",),
    )


def test_control_characters_and_quotes_are_escaped():
    assert told("LT", 'a"b\\c\x01\x1f\u00e9'.encode(), default_charset="ISO_IR 192") == ['a"b\\c\x01\x1fé']


# --- prefixes, damage ---------------------------------------------------------------------------------------


def test_a_prefix_without_the_bulk_data_is_enough():
    data = dataset(explicit(PIXELS, "OW", bytes(1 << 20)))

    assert header(data[:4096], total_bytes=len(data)) == header(data)


def test_a_prefix_that_lacks_elements_is_not_enough():
    data = dataset(explicit(PIXELS, "OW", bytes(1 << 20)), explicit(0xFFFCFFFC, "OB", b"\0\0"))

    for end in (0, 10, 100, 4096, len(data) - 10):
        with pytest.raises(PrefixError):
            header(data[:end], total_bytes=len(data))
    with pytest.raises(PrefixError):
        header(deflate(data)[:100], DEFLATED, total_bytes=len(deflate(data)))


def test_a_value_that_is_not_bulk_data_must_be_there():
    data = dataset(explicit(0x00104000, "LT", "x" * 60_000), explicit(PIXELS, "OW", bytes(1 << 20)))

    with pytest.raises(PrefixError):
        header(data[:4096], total_bytes=len(data))


def test_what_crosses_the_window_is_read_whole():
    long = [explicit(0x00111000 + number, "UT", f"{number:05d}" * 9000) for number in range(8)]
    inner = explicit(0x00081150, "UI", "1.2") + explicit(0x00420011, "OB", bytes(200_000))
    sequence = explicit(0x00131010, "SQ", open_item(inner) * 2 + SEQUENCE_END, length=UNDEFINED)
    found = attributes(dataset(*long, sequence, explicit(0x00150010, "LO", "end")))

    assert [found[f"{0x00111000 + number:08X}"]["Value"][0] for number in range(8)] == [
        f"{number:05d}" * 9000 for number in range(8)
    ]
    assert [list(one_item) for one_item in found["00131010"]["Value"]] == [["00081150", "00420011"]] * 2
    assert found["00150010"]["Value"] == ["end"]


def test_only_what_is_wanted_is_compiled():
    data = dataset(
        explicit(NAME, "PN", "A"), implicit(0x00190010, b"X") + explicit(PIXELS, "OW", bytes(1 << 20))
    )
    wanted = frozenset({NAME, 0x0020000D, 0x00400275})

    assert list(header(data, wanted=wanted).fragments) == [NAME, 0x0020000D]
    assert header(data, wanted=frozenset({0x00400275})).fragments == {}


def test_what_is_wanted_needs_no_more_of_a_prefix_than_itself():
    pixels = explicit(PIXELS, "OB", fragments(bytes(100_000)), length=UNDEFINED)
    data = dataset(pixels)

    assert list(header(data[:4096], total_bytes=len(data), wanted=frozenset({0x0020000D})).fragments) == [
        0x0020000D
    ]
    with pytest.raises(PrefixError):
        header(data[:4096], total_bytes=len(data), wanted=frozenset({0x7FE10010}))


def test_a_wanted_text_is_decoded_and_a_wanted_private_vr_is_found():
    data = (
        explicit(CHARSET, "CS", "ISO_IR 100")
        + explicit(NAME, "PN", b"\xc4.")
        + explicit(0x00190010, "LO", "GEMS_ACQU_01")
    )
    data += explicit(0x0019100F, "UN", b"1.5 ")
    found = attributes(data, wanted=frozenset({NAME, 0x0019100F}))

    assert found == {
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Ä."}]},
        "0019100F": {"vr": "DS", "Value": [1.5]},
    }


def test_a_dataset_cut_short_gives_what_is_there_and_a_warning():
    found = header(dataset(explicit(NAME, "PN", "A"), explicit(0x00400280, "ST", "x" * 90))[:-50])

    assert NAME in found.fragments
    assert 0x00400280 not in found.fragments
    assert found.warnings == ("the dataset is cut short",)


@pytest.mark.parametrize("open_ended", [True, False])
def test_a_dataset_cut_short_in_a_sequence_gives_the_items_that_are_there(open_ended):
    contents = [explicit(0x00081150, "UI", "1.2") + explicit(0x00400007, "LO", text * 40) for text in "ab"]
    framed = open_item if open_ended else item
    items = b"".join(map(framed, contents)) + SEQUENCE_END * open_ended
    sequence = explicit(0x00400275, "SQ", items, length=UNDEFINED if open_ended else None)
    whole = dataset(explicit(NAME, "PN", "A")) + sequence
    found = header(whole[:-30])

    (attribute,) = orjson.loads(b"{" + found.fragments[0x00400275] + b"}").values()
    assert [list(one) for one in attribute["Value"]] == [["00081150", "00400007"], ["00081150"]]
    assert found.warnings == ("the dataset is cut short", "1 elements could not be read")
    with pytest.raises(PrefixError):
        header(whole[:-30], total_bytes=len(whole))


def test_padding_after_the_last_element_is_no_damage():
    assert header(dataset() + bytes(5)).warnings == ()


def test_damage_in_a_sequence_costs_that_item_only():
    broken = item(explicit(0x00081150, "UI", "1.2") + explicit(0x00081155, "UI", "1.2.3", length=400))
    data = explicit(0x00081140, "SQ", broken + item(explicit(0x00081150, "UI", "1.3"))) + explicit(
        NAME, "PN", "A"
    )
    found = header(data)

    items = orjson.loads(b"{" + found.fragments[0x00081140] + b"}")["00081140"]["Value"]
    assert [one_item["00081150"]["Value"] for one_item in items] == [["1.2"], ["1.3"]]
    assert NAME in found.fragments
    assert found.warnings == ("1 elements could not be read",)


def test_bytes_that_are_no_items_cost_that_sequence_only():
    found = header(explicit(0x00081140, "SQ", b"nonsense" * 4) + explicit(NAME, "PN", "A"))

    assert found.fragments[0x00081140] == b'"00081140":{"vr":"SQ"}'
    assert NAME in found.fragments
    assert found.warnings == ("1 elements could not be read",)


def test_nesting_without_end_is_cut_off():
    inner = explicit(NAME, "PN", "A")
    for _ in range(200):
        inner = explicit(0x00081140, "SQ", item(inner))
    found = header(inner)

    assert found.warnings == ("1 sequences nest too deep",)
    deep = b"".join(explicit(0x00081140, "SQ", length=UNDEFINED) + item(length=UNDEFINED) for _ in range(500))
    assert header(explicit(NAME, "PN", "A") + deep).warnings == ("1 elements could not be read",)


def test_damage_after_the_first_window_ends_the_reading():
    long = explicit(0x00111010, "UT", "x" * 70_000)
    broken = explicit(0x00131010, "SQ", b"no items" * 10_000, length=UNDEFINED)
    found = header(dataset(long, broken, explicit(0x00150010, "LO", "lost")))

    assert list(found.fragments)[-1] == 0x00200000 + 0x0E
    assert found.warnings == ("1 elements could not be read",)


def test_half_an_item_header_at_the_end_of_a_sequence_is_counted():
    found = header(explicit(0x00081140, "SQ", item() + b"\xfe\xff\x00"))

    assert found.warnings == ("1 elements could not be read",)


def test_what_holds_nothing_readable_is_refused():
    for data in (b"", b"\0" * 100, b"garbage", SEQUENCE_END * 5):
        with pytest.raises(RefusedError):
            header(data)


# --- the cache ----------------------------------------------------------------------------------------------


def test_fragments_of_one_context_are_not_taken_for_another():
    compiler = Compiler()
    value = explicit(0x00111010, "LO", b"\xc4 ")
    texts = [
        one(explicit(CHARSET, "CS", term) + value, compiler=compiler)[0]["Value"]
        for term in ("ISO_IR 100", "ISO_IR 144", "ISO_IR 126", "ISO_IR 100")
    ]

    assert texts == [["Ä"], ["Ф"], ["Δ"], ["Ä"]]


def test_equal_bytes_in_either_byte_order_are_different_values():
    compiler = Compiler()
    little, large = explicit(0x11111111, "US", b"\0\1"), big(0x11111111, "US", b"\0\1")

    assert one(little, compiler=compiler)[0]["Value"] == [256]
    assert one(large, EXPLICIT_BIG, compiler=compiler)[0]["Value"] == [1]


@pytest.mark.parametrize("cache_bytes", [0, 2_000, 64 << 20])
def test_a_header_does_not_depend_on_what_is_remembered(cache_bytes):
    compiler = Compiler(cache_bytes=cache_bytes)
    for number in [*range(50), *range(50)]:
        data = dataset(explicit(0x00200013, "IS", str(number)), explicit(NAME, "PN", f"A{number % 3}"))
        assert header(data, compiler=compiler) == header(data)


def remembered(*datasets, syntax=EXPLICIT_LITTLE, **options):
    """The attributes of each dataset in turn by one compiler, which are those that a new one finds."""
    compiler, told = Compiler(), []
    for data in datasets:
        found = header(data, syntax, compiler=compiler, **options)
        assert found == header(data, syntax, **options)
        assert found.body == b",".join(found.fragments.values())
        told.append(orjson.loads(b"{" + found.body + b"}"))
    return told


def test_what_a_series_has_in_common_is_one_run_and_what_differs_is_not():
    compiler = Compiler()
    common = [explicit(0x00411000 + number, "LO", str(number)) for number in range(9)]
    for number in range(40):
        settled = explicit(0x00411004, "LO", str(min(number, 5)))
        varying = explicit(0x00411006, "LO", str(number))
        header(dataset(*common[:4], settled, common[5], varying, *common[7:]), compiler=compiler)

    (context,) = compiler._compilation._cache.contexts.values()
    (runs,) = context.runs.values()
    assert sorted((run.first, run.last) for run in runs.by_head.values()) == [
        (0x00080016, 0x00080018),  # (0008,3002) has its place between them
        (0x0020000D, 0x00411005),
        (0x00411007, 0x00411008),
    ]


@pytest.mark.parametrize("place", range(4))
def test_a_run_ends_where_an_instance_differs(place):
    tags = [0x00411000, 0x00411001, 0x00411002, 0x00411003]
    series = [dataset(*(explicit(tag, "LO", "same") for tag in tags))] * 2
    series.append(dataset(*(explicit(tag, "LO", "same") for tag in tags if tag != tags[place])))
    series.append(dataset(*(explicit(tag, "LO", f"{tag == tags[place]}") for tag in tags)))
    series.append(series[0] + explicit(0x00411004, "LO", "more"))
    found = remembered(*series, *series)

    assert f"{tags[place]:08X}" not in found[2]
    assert found[3][f"{tags[place]:08X}"]["Value"] == ["True"]
    assert found[4]["00411004"]["Value"] == ["more"]


def test_what_is_put_in_by_us_stands_at_its_place_inside_a_run():
    around = (
        explicit(0x00080001, "UL", bytes(4)),
        explicit(0x00080016, "UI", "1.2"),
        explicit(NAME, "PN", "A"),
    )
    told_itself = around[1] + explicit(0x00083002, "UI", "9.9") + around[2]
    series = [told_itself] * 3 + [b"".join(around)] * 3 + [told_itself] * 3
    for found in remembered(*series, default_charset="ISO_IR 100"):
        assert sorted(found) == list(found)
        assert found["00083002"]["Value"] == [EXPLICIT_LITTLE]
        assert "00080005" in found


@pytest.mark.parametrize("syntax", [IMPLICIT_LITTLE, EXPLICIT_LITTLE])
def test_a_private_vr_follows_the_creator_that_stands_before_a_run(syntax):
    def series(creator, number):
        write = implicit if syntax == IMPLICIT_LITTLE else lambda tag, value: explicit(tag, "UN", value)
        first = write(0x00190010, creator), write(0x00191002, number)
        return b"".join(first) + write(0x0019100F, b"1.5 ") + write(0x00191023, b"2 ")

    known, unknown = (b"GEMS_ACQU_01", b"SOMEBODY")
    found = remembered(
        *(series(known, number) for number in (b"\1\0", b"\2\0", b"\3\0")),
        *(series(unknown, number) for number in (b"\3\0", b"\4\0")),
        series(known, b"\5\0"),
        syntax=syntax,
    )

    assert [one["0019100F"]["vr"] for one in found] == ["DS", "DS", "DS", "UN", "UN", "DS"]


def test_a_vr_that_follows_another_element_is_in_no_run():
    def one(representation):
        return implicit(0x00280103, representation) + implicit(0x00280106, b"\xff\xff") + rest

    rest = implicit(0x00281050, b"40") + implicit(0x00281051, b"400 ")
    found = remembered(*map(one, [b"\0\0"] * 3 + [b"\1\0"] * 3), syntax=IMPLICIT_LITTLE)
    assert [told["00280106"]["vr"] for told in found] == ["US"] * 3 + ["SS"] * 3

    ahead = [implicit(0x00189810, b"\xff\xff") + one(told) for told in (b"\0\0", b"\0\0", b"\1\0")]
    assert [told["00189810"]["vr"] for told in remembered(*ahead, syntax=IMPLICIT_LITTLE)] == [
        "US",
        "US",
        "SS",
    ]


def test_a_run_of_one_character_set_is_not_taken_for_another():
    text = explicit(0x00111010, "LO", b"\xc4 ") + explicit(0x00111011, "LO", b"\xc4 ")
    series = [explicit(CHARSET, "CS", term) + text for term in ("ISO_IR 100", "ISO_IR 144") * 2]
    series.insert(2, text)

    assert [found["00111011"]["Value"] for found in remembered(*series)] == [
        ["Ä"],
        ["Ф"],
        ["Ä"],
        ["Ä"],
        ["Ф"],
    ]


def test_runs_serve_datasets_whose_elements_stand_in_any_order():
    names = [explicit(tag, "LO", f"{tag:X}") for tag in (0x00111010, 0x00111011, 0x00111012, 0x00111013)]
    again = [*names, explicit(0x00111011, "LO", "again")]
    found = remembered(
        *(b"".join(each) for each in (names, names, names[::-1], again, names[2:] + names[:2]))
    )

    assert [list(one)[1:] for one in found] == [["00111010", "00111011", "00111012", "00111013"]] * 5
    assert found[3]["00111011"]["Value"] == ["again"]


def test_what_it_costs_to_split_a_run_is_bounded():
    compiler = Compiler()
    for _ in range(9):
        header(b"".join(explicit(0x00111000 + number, "LO", "x") for number in range(700)), compiler=compiler)

    (context,) = compiler._compilation._cache.contexts.values()
    lengths = [len(run.pieces) for run in context.runs[None].by_head.values()]
    assert lengths == [256, 256, 188]


def test_what_is_learned_from_one_dataset_is_bounded():
    compiler, data = Compiler(), b"".join(implicit(0x00111000 + number, b"x ") for number in range(10_000))
    header(data, IMPLICIT_LITTLE, compiler=compiler)

    (context,) = compiler._compilation._cache.contexts.values()
    assert 8000 < sum(len(run.pieces) for run in context.runs[None].by_head.values()) <= 8192
    assert header(data, IMPLICIT_LITTLE, compiler=compiler) == header(data, IMPLICIT_LITTLE)


def test_what_is_past_what_is_wanted_need_not_be_there_in_implicit_vr_either():
    data = implicit(0x00080018, b"1.2 ") + implicit(NAME, b"A ") + implicit(PIXELS, bytes(1 << 17))
    for _ in range(2):
        found = header(data[:70_000], IMPLICIT_LITTLE, total_bytes=len(data), wanted=frozenset({NAME}))
        assert list(found.fragments) == [NAME]
    assert header(data[:70_000], IMPLICIT_LITTLE, total_bytes=len(data)) == header(data, IMPLICIT_LITTLE)


def test_runs_of_what_is_wanted_are_its_own():
    compiler = Compiler()
    data = dataset(explicit(NAME, "PN", "A"), explicit(0x00190010, "LO", "GEMS_ACQU_01"))
    data += explicit(0x0019100F, "UN", b"1.5 ")
    for wanted in (None, frozenset({0x0019100F}), frozenset({0x00080018}), None, frozenset({0x0019100F})):
        found = header(data, compiler=compiler, wanted=wanted)
        assert found == header(data, wanted=wanted)
        assert wanted is None or set(found.fragments) == wanted


def test_the_cache_is_bounded():
    compiler = Compiler(cache_bytes=100_000)
    contexts = compiler._compilation._cache.contexts
    sizes = []
    for number in range(5_000):
        never_again = explicit(0x00411000 + number % 3000, "LO", f"{number}")
        within = explicit(0x00400275, "SQ", item(explicit(0x00200013, "IS", str(number))))
        header(dataset(within, sop_uid=f"1.{number}") + never_again, compiler=compiler)
        runs = [runs for context in contexts.values() for runs in context.runs.values()]
        sizes.append(sum(one.size for one in runs))

    tables = [table for context in contexts.values() for table in (context.young, context.old)]
    assert any(context.old for context in contexts.values())
    assert sum(len(key) + len(text) for table in tables for key, text in table.items()) < 75_000
    assert 10_000 < max(sizes) < 25_000
