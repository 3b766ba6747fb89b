"""ImageNet's synsets are shown with their words; other names and the stored classes do not change."""

from train.words import lemmas, shown

SYNSETS = ["n01440764", "n02012849", "n03126707", "n15075141"]


def test_synsets_are_shown_with_their_first_word():
    assert shown(SYNSETS) == [
        "tench (n01440764)",
        "crane (n02012849)",  # a bird
        "crane (n03126707)",  # a machine
        "toilet tissue (n15075141)",
    ]
    assert len(lemmas()) > 21_000


def test_other_names_are_unchanged():
    names = ["dark things", "n1", "n99999999", "N01440764", "n01440764x", ""]
    assert shown(names) == names
    assert shown([]) == []
    assert shown([*names, "n01440764"]) == [*names, "tench (n01440764)"]
