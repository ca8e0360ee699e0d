import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.deploy.stop_strings import StopStrings


def run(stops, pieces):
    """Everything let through, and whether a stop string ended it."""
    watcher, text = StopStrings(stops), ""
    for piece in pieces:
        result = watcher.push(piece)
        text += result.text
        if result.stopped:
            return text, True
    return text + watcher.finish(), False


def expected(stops, text):
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


def test_match_across_pieces():
    assert run(["</end>"], ["Hello <", "/e", "nd> more"]) == ("Hello ", True)


def test_text_that_only_looks_like_a_stop_string_comes_later():
    watcher = StopStrings(["abc"])
    assert watcher.push("xa") == ("x", False)
    assert watcher.push("b") == ("", False)
    assert watcher.push("d") == ("abd", False)
    assert watcher.finish() == ""


def test_held_text_comes_at_the_end():
    assert run(["\n\nUser:"], ["fine\n", "\nUs"]) == ("fine\n\nUs", False)


def test_overlapping_prefix():
    assert run(["aab"], list("aaaab!")) == ("aa", True)


def test_first_complete_match_wins_then_the_longest():
    assert run(["abcdef", "cd"], ["abcdef"]) == ("ab", True)
    assert run(["bcd", "cd"], ["abcd"]) == ("a", True)


def test_no_stop_strings_hold_nothing():
    assert StopStrings([]).push("text") == ("text", False)


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


@given(
    st.lists(st.text("ab🤖", min_size=1, max_size=4), max_size=4),
    st.lists(st.text("ab🤖c", max_size=5), max_size=12),
)
def test_result_does_not_depend_on_the_cuts(stops, pieces):
    assert run(stops, pieces) == expected(stops, "".join(pieces))


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.text("abc", max_size=40))
def test_holds_back_less_than_the_longest_stop_string(stops, text):
    watcher, num_passed = StopStrings(stops), 0
    for num_pushed, character in enumerate(text, 1):
        result = watcher.push(character)
        num_passed += len(result.text)
        if result.stopped:
            break
        assert num_pushed - num_passed < max(map(len, stops))
