"""Names: what is folded away and what is not, parts and sound."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomscp.dicom.names import fold, name_parts, sound


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("DOE^JOHN", "doe^john"),
        ("Buc^Jérôme", "buc^jerome"),
        ("Je\u0301ro\u0302me", "jerome"),
        ("Äneas^Rüdiger", "aneas^rudiger"),
        ("Straße", "strasse"),
        ("STRASSE", "strasse"),
        ("Łęcki^Żółw", "lecki^zolw"),
        ("Søren^Ærø", "soren^aero"),
        ("Đặng^Đức", "dang^duc"),
        ("Þórður^Guðmundsson", "thordur^gudmundsson"),
        ("İstanbul", "istanbul"),
        ("ısparta", "isparta"),
        ("Œuvré", "oeuvre"),
        ("Διονυσιος", "διονυσιοσ"),
        ("ΔΙΟΝΎΣΙΟΣ", "διονυσιοσ"),
        ("Люкceмбypг", "люкceмбypг".lower()),
        ("Йосиф^Ёлка", "иосиф^елка"),
        ("ＹＡＭＡＤＡ^ﾀﾛｳ", "yamada^タロウ"),
        ("山田\u3000太郎", "山田 太郎"),
        ("ﬁn", "fin"),
        ("O\u2019Brien", "o'brien"),
        ("O\u00b4Brien", "o'brien"),
        ("Anna\u2013Maria", "anna-maria"),
        ("\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
        ("\ufb2a", "\u05e9"),
        ("\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f", "\u0645\u062d\u0645\u062f"),
        ("\u0645\u0640\u0640\u062d", "\u0645\u062d"),
        ("\ufee3\ufea4\ufee4\ufeaa", "\u0645\u062d\u0645\u062f"),
    ],
)
def test_what_a_name_may_be_written_otherwise_in_is_folded_away(name, folded):
    assert fold(name) == folded
    assert fold(unicodedata.normalize("NFD", name)) == folded
    assert fold(name.upper()) == fold(name.lower()) == folded


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("か", "が"),
        ("カ", "ｶﾞ"),
        ("ハ", "パ"),
        ("や", "ヤ"),
        ("김", "기"),
        ("國", "国"),
        ("أ", "ا"),
        ("ש", "ס"),
        ("ö", "oe"),
        ("и", "i"),
        ("α", "a"),
        ("Doe^John", "Doe John"),
        ("का", "की"),
        ("กิ", "กี"),
    ],
)
def test_what_are_different_letters_stay_so(one, other):
    assert fold(one) != fold(other)


def test_hangul_is_whole_and_kana_keep_their_voicing():
    assert fold("\u1100\u1175\u11b7") == "김"
    assert fold("か\u3099") == "が"
    assert len(fold("김희중")) == 3


@pytest.mark.parametrize("character", "＾＝＊？＼⁼﹡﹖≠")
def test_no_character_becomes_a_delimiter_or_wildcard(character):
    assert fold(character) == character


@given(st.text(max_size=12))
def test_folding_again_changes_nothing(text):
    assert fold(fold(text)) == fold(text)


@given(st.text(max_size=12), st.sampled_from("=^*?\\"), st.text(max_size=12))
def test_groups_and_components_fold_by_themselves(before, delimiter, after):
    assert fold(f"{before}{delimiter}{after}") == f"{fold(before)}{delimiter}{fold(after)}"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Doe^John^^Dr.", ["doe", "john", "dr"]),
        ("Smith, Mary", ["smith", "mary"]),
        ("O'Brien^Anna-Maria", ["obrien", "anna", "maria"]),
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", ["yamada", "tarou", "山田", "太郎", "やまだ", "たろう"]),
        ("^^", []),
        ("", []),
    ],
)
def test_a_name_has_parts(name, parts):
    assert name_parts(fold(name)) == parts


@pytest.mark.parametrize(
    ("one", "other"), [("smith", "smyth"), ("swain", "swayne"), ("muller", "mueller"), ("jon", "john")]
)
def test_parts_that_sound_alike_have_one_sound(one, other):
    assert sound(one) == sound(other)
    assert sound(one).isupper()


@pytest.mark.parametrize("part", ["山田", "김희중", "люкceмбypг", "3", "w"])
def test_what_has_no_sound_in_latin_letters_sounds_as_it_is(part):
    assert sound(part) == part


def test_what_sounds_different_has_another_sound():
    assert len({sound(part) for part in ("smith", "doe", "garcia", "john", "mary")}) == 5
