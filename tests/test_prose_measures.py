"""Prose taken apart as a reader would."""

import pytest

from mlx_dpo.prose import grade, is_finished, sentences, syllables, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four…", ["One.", "Two!", "Three?", "Four…"]),
        ("Ask Dr. Lee at 3.5 p.m. tomorrow. Then rest.", ["Ask Dr. Lee at 3.5 p.m. tomorrow.", "Then rest."]),
        ('She said "Stop." Then she left.', ['She said "Stop."', "Then she left."]),
        ("Do this:\n1. Sit down.\n2) Breathe\n- Wait", ["Do this:", "Sit down.", "Breathe", "Wait"]),
        ("**Rest.** Then go", ["**Rest.**", "Then go"]),
        ("no end", ["no end"]),
        (" \n… \n", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]):
    assert sentences(text) == expected


def test_nothing_is_lost_between_sentences():
    text = "I’m here. Dr. No came, e.g. at 5 a.m. on Monday! Well-known facts: none? Yes."
    assert [word for part in sentences(text) for word in words(part)] == words(text)


def test_words_keep_what_is_inside_them():
    assert words("Don’t re-use the 2 old—cups (mother's).") == [
        "Don’t", "re-use", "the", "2", "old", "cups", "mother's",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "whole"), [("It ends.", True), ('"Ends!"', True), ("It end", False), ("So:", False)])
def test_whether_a_text_is_finished(text: str, whole: bool):
    assert is_finished(text) is whole
    assert is_finished(f"{text}  \n") is whole


COUNTED = {
    1: "a the care makes walked breathe eat time please rhythm'd through house asked gives helped loved",
    2: "mother doctor tired little table caring being wanted quiet asking people sleepy water evening'd seizure",
    3: "family caregiver medicine however hospital dementia'n possible remember beginning example",
    4: "medication emergency information independent understandable'n",
}


@pytest.mark.parametrize("count", COUNTED)
def test_syllables_of_common_words(count: int):
    asked = [word for word in COUNTED[count].split() if "'" not in word]
    assert {word: syllables(word) for word in asked} == dict.fromkeys(asked, count)


def test_the_grade_by_hand():
    # 11 words, 2 sentences, 13 syllables: the cat sat on the mat it was ver-y warm → 12 syllables in 11 words.
    text = "The cat sat on the mat. It was very warm there."
    assert len(words(text)) == 11
    assert sum(map(syllables, words(text))) == 12
    assert grade(text) == pytest.approx(0.39 * 11 / 2 + 11.8 * 12 / 11 - 15.59)


def test_longer_words_and_sentences_ask_more_of_a_reader():
    plain = "Sit with her. Hold her hand. Talk of old times."
    hard = "Facilitate therapeutic reminiscence interventions utilising individualised autobiographical materials."
    assert grade(hard) > grade(plain.replace(". ", " and ")) > grade(plain)
    assert grade("") == 0.0
