import pytest

from modelcask import gojson


def test_compact_escapes_what_go_escapes() -> None:
    assert gojson.compact({"w<1>&é\u2028\u2029": 1}) == b'{"w\\u003c1\\u003e\\u0026\xc3\xa9\\u2028\\u2029":1}'


def test_indented_sorts_keys_at_every_depth_and_indents_by_four() -> None:
    value = {"b": {"z": 1, "a": []}, "a": [1, {}]}
    expected = '{\n    "a": [\n        1,\n        {}\n    ],\n    "b": {\n        "a": [],\n        "z": 1\n    }\n}'
    assert gojson.indented(value).decode() == expected


# What Go 1.24 prints for a float64 in an `any` (strconv: 'f' from 1e-6 to 1e21, else 'e' without a padded exponent).
@pytest.mark.parametrize(
    ("number", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (0.1, "0.1"),
        (-0.0, "-0"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (1.5e300, "1.5e+300"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (1.25e-9, "1.25e-9"),
        (2**53 + 1, "9007199254740992"),
        (-12345.678, "-12345.678"),
    ],
)
def test_numbers_are_printed_as_go_prints_float64(number: float, text: str) -> None:
    assert gojson.indented([number]).decode() == f"[\n    {text}\n]"


def test_an_int64_is_printed_in_full() -> None:
    assert gojson.indented([gojson.GoInt(2**53 + 1)]).decode() == f"[\n    {2**53 + 1}\n]"


def test_booleans_and_null_are_no_numbers() -> None:
    assert gojson.indented([True, None]).decode() == "[\n    true,\n    null\n]"


@pytest.mark.parametrize("number", [float("inf"), 10**400])
def test_a_number_go_cannot_hold_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="too large"):
        gojson.indented([number])


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert gojson.indented(["\ud800"]) == '[\n    "\ufffd"\n]'.encode()
