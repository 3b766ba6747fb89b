"""Lists: every format is detected, paths with blanks are found, and a line without sense is named."""

import json
import random
import re
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import UserError
from tests.test_project import call_make
from tests.tools.test_pack import LABELS, VAL, encoded, flat_val, pixels, rows_of, write
from tests.tools.test_pack_videos import PACKING, make, numbered
from tools.folders import FRAMES, PICTURES, VIDEOS, Kind
from tools.listing import plan_of
from tools.lists import Index, parse, read_text
from tools.pack import ClipOptions, ListOptions, find_list, pack_all, pack_clips, plan_clips
from tools.samples import flat_classes, list_samples, read_annotations, read_list
from tools.shards import PackPlan
from tools.verify import verify

SOURCES = ["riding a bike/x.mp4", "jumping, twice/y 1.mp4", "plain/78687.webm", "plain/v_Run_g01_c01.avi"]


def read(tmp_path: Path, text: str, sources: list[str] = SOURCES, kind: Kind = VIDEOS) -> dict[str, str]:
    """{source: class} of a list with this text."""
    write(tmp_path / "list.txt", text.encode())
    listed = read_list(tmp_path / "list.txt", "train", Index(sources, kind), tmp_path)
    return {item.source: item.label for item in listed}


def test_other_spellings_of_a_path_are_the_same_sample(tmp_path: Path):
    for spelling in ("plain/./78687.webm", "plain//78687.webm", "./plain/x/../78687.webm"):
        assert read(tmp_path, f"{spelling} 1\nplain/v_Run_g01_c01.avi 0\n")["plain/78687.webm"] == "1"
        with pytest.raises(UserError, match=r"line 2"):
            read(tmp_path, f"plain/78687.webm 0\n{spelling} 1\n")


def test_a_name_may_begin_with_a_bracket(tmp_path: Path):
    assert read(tmp_path, "[1] a.mp4 0\n{y}.mp4 1\n", ["[1] a.mp4", "{y}.mp4"]) == {
        "[1] a.mp4": "0",
        "{y}.mp4": "1",
    }


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_paths_of_windows_are_found(tmp_path: Path, capsys, separator: str):
    sources = ["pets/a.jpg", "pets/b.jpg", "c.jpg", "odd\\name.jpg"]
    text = f"pets\\a.jpg{separator}0\r\nD:\\data\\pets\\b.jpg{separator}1\r\nodd\\name.jpg{separator}1\r\n"
    text += f"D:\\data\\c.jpg{separator}0\r\n"
    found = read(tmp_path, text, sources, PICTURES)
    assert found == {"pets/a.jpg": "0", "pets/b.jpg": "1", "odd\\name.jpg": "1", "c.jpg": "0"}
    assert "absent" not in capsys.readouterr().out


@pytest.mark.parametrize(("on_disk", "in_list"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_list_and_the_files_may_compose_letters_differently(tmp_path: Path, capsys, on_disk, in_list):
    """As files that come from a Mac: the two names look the same."""
    sources = [normalize(on_disk, f"café/é {n}.jpg") for n in range(2)]
    text = normalize(in_list, "café/é 0.jpg,thé\n/elsewhere/café/é 1.jpg,thé\n")
    assert {*read(tmp_path, text, sources, PICTURES)} == {
        *sources
    } and "absent" not in capsys.readouterr().out
    classes = {normalize(on_disk, "thé")}
    write(tmp_path / "val.csv", text.encode())
    assert flat_classes(tmp_path / "val.csv", None, sources, classes) == [*classes] * 2


def lines(*cells: tuple[str, ...], by: str) -> str:
    return "".join(f"{by.join(row)}\n" for row in cells)


NUMBERS = [("0",), ("17",), ("2",), ("0",)]
NAMES = [("riding a bike",), ("jumping, twice",), ("plain",), ("plain",)]


@pytest.mark.parametrize("heading", [False, True])
@pytest.mark.parametrize("by", [" ", ",", "\t", ", ", ";", "   "])
@pytest.mark.parametrize("labels", [NUMBERS, NAMES])
def test_path_and_label_with_any_separator(tmp_path, capsys, labels, by, heading):
    rows = [(path, *label) for path, label in zip(SOURCES, labels, strict=True)]
    text = lines(*[("path", "label")] * heading, *rows, by=by)
    assert read(tmp_path, text) == {path: label for path, (label,) in zip(SOURCES, labels, strict=True)}
    kind = "class numbers" if labels is NUMBERS else "class names"
    assert re.search(rf"list.txt: 4 samples; .*; {kind}$", capsys.readouterr().out.strip())


def test_quoted_cells_windows_lines_and_a_byte_order_mark(tmp_path):
    text = '\ufeff"file","class"\r\n"riding a bike/x.mp4","a, b"\r\n"jumping, twice/y 1.mp4","c ""d"""\r\n'
    assert read(tmp_path, text) == {SOURCES[0]: "a, b", SOURCES[1]: 'c "d"'}


def test_a_quoted_heading_of_kinetics_is_recognized(tmp_path):
    (tmp_path / "list.csv").write_text('"label","youtube_id","time_start","time_end"\n"a b","abc",7,17\n')
    index = Index([source := "x/abc_000007_000017.mp4"], VIDEOS)
    (clip,) = read_list(tmp_path / "list.csv", "train", index, tmp_path)
    assert (clip.source, clip.label) == (source, "a b")


def test_class_numbers_in_json_may_have_a_decimal_point(tmp_path):
    entries = [{"path": path, "label": float(number)} for number, path in enumerate(SOURCES)]
    wanted = {path: str(number) for number, path in enumerate(SOURCES)}
    assert read(tmp_path, json.dumps(entries)) == wanted


def test_columns_are_found_by_content_and_heading(tmp_path, capsys):
    text = "id,label,video,split\n1,run,plain/78687.webm,train\n2,jump,riding a bike/x.mp4,train\n"
    assert read(tmp_path, text) == {SOURCES[2]: "run", SOURCES[0]: "jump"}
    assert "; video, label separated by commas; class names" in capsys.readouterr().out
    for text, words in {
        "id,kind,video\n1,run,plain/78687.webm\n": "one of its columns id, kind, video is the class",
        "plain/78687.webm,run,1\nriding a bike/x.mp4,run,2\n": "has 3 columns and no header; keep two",
    }.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path, text)


@pytest.mark.parametrize(
    "path",
    [
        "plain/78687.webm",
        "./plain/78687.webm",
        "/data/somewhere/plain/78687.webm",
        "videos/plain/78687.webm",
        "plain/78687",
        "plain/78687.mp4",
        "78687.webm",
        "78687",
    ],
)
def test_a_path_may_begin_elsewhere_and_lack_its_suffix(tmp_path, path):
    assert read(tmp_path, f"{path} 3\n") == {SOURCES[2]: "3"}


def test_rawframe_lists_of_mmaction(tmp_path, capsys):
    folders = ["riding a bike/x_000001_000011", "plain/y"]
    text = "riding a bike/x_000001_000011 250 0\nplain/y 300 1\nplain/absent one 300 1\n"
    found = read(tmp_path, text, folders, FRAMES)
    assert found == {folders[0]: "0", folders[1]: "1", "plain/absent one": "1"}
    out = capsys.readouterr().out
    assert "3 samples; path and class per line; class numbers after numbers of frames; 1 absent" in out
    with pytest.raises(UserError, match="two numbers after each path; keep one"):
        read(tmp_path, "a.jpg 250 0\n", ["a.jpg"], PICTURES)


def test_absent_files_are_kept_for_the_catalogue(tmp_path):
    text = "gone 1/g.mp4 17\nplain/78687.webm 17\nriding a bike/gone too.mp4 3\nplain/none 17\n"
    expected = {"gone 1/g.mp4": "17", SOURCES[2]: "17", "riding a bike/gone too.mp4": "3", "plain/none": "17"}
    assert read(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "list.txt is empty"),
        ("\0\1", "it contains zero bytes"),
        (
            "a/b.mp4 1\nc/d.mp4 2\n",
            r"none of its lines names one of the videos below .*, such as 'a/b.mp4 1'; give",
        ),
        ("plain/78687.webm 1\nplain/78687.webm 2\n", "line 2: 'plain/78687.webm' has a second class, '2'"),
        ("plain/78687.webm 1\nplain/v_Run_g01_c01.avi\n", "line 2: 'plain/v_Run_g01_c01.avi' has no class"),
        (
            "plain/78687.webm 0\nriding a bike/x.mp4 -1\n",
            "line 2: '-1' is not a class; write classes as 0",
        ),
        ("plain/78687.webm run\nriding a bike/x.mp4 -1\n", "list.txt line 2: '-1' is not a class"),
        ("plain/78687.webm run\nriding a bike/x.mp4 1.0\n", "list.txt line 2: '1.0' is not a class"),
        ("plain/78687.webm,0.5\nriding a bike/x.mp4,1\n", "list.txt line 1: '0.5' is not a class"),
        ("plain/78687.webm 12 0\nriding a bike/x.mp4 12 -1\n", "list.txt line 2: '-1' is not a class"),
        ("plain/78687.webm 1\nnonsense\n", "line 2: 'nonsense' has no path and class"),
        ("plain/78687.webm 0 30 1\nriding a bike/x.mp4 30 60 2\n", "line 1: '0 30 1' is not a class; keep"),
        ("x/a.mp4 1\n", "line 1: 'x/a.mp4' can be 1/x/a.mp4 or 2/x/a.mp4; give paths relative"),
        ('{"a": 1}', "is not a list of objects; of SSv2"),
        ("[1, 2]", "is not a list of objects"),
        ('[{"id": "78687"', "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
        ('[{"id": "78687", "label": "\\ud800"}]', "is not a path; correct it"),
        ('"plain/78687.webm",1\n"riding a bike/x.mp4",2,3\n', "line 2 has 3 columns, most lines have 2"),
        ("mine\n1,plain/78687.webm\n2,riding a bike/x.mp4\n", "line 1 has 1 columns, most lines have 2"),
        (
            'plain/78687.webm,run\nriding a bike/x.mp4,"ride\nplain/v_Run_g01_c01.avi,run\n',
            "a quoted cell of several lines that ends in line 3; close its quote",
        ),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, text, [*SOURCES, "1/x/a.mp4", "2/x/a.mp4"])
    assert "\n" not in str(caught.value) and "list.txt" in str(caught.value)


@pytest.mark.parametrize("numbers", ["0 -1", "1 230"])
def test_pretraining_lists_of_videomae_v2_have_no_classes(tmp_path, capsys, numbers):
    """They had the class -1, or the number of frames as the class."""
    text = "".join(f"{source} {numbers}\n" for source in SOURCES)
    assert [*read(tmp_path, text).values()] == [""] * 4
    assert "no classes, but first frames and numbers of frames" in capsys.readouterr().out


def test_class_numbers_are_read_in_any_form(tmp_path):
    """They were class names, in the order of text."""
    text = f"{SOURCES[0]} 01\n{SOURCES[1]} 1.0\n{SOURCES[2]} 1e1\n{SOURCES[3]} +2\n"
    assert [*read(tmp_path, text).values()] == ["1", "1", "10", "2"]


def test_a_list_that_is_not_in_utf8_is_named_with_the_fix(tmp_path):
    for text in ("café/1.mp4 0\n", "label,youtube_id,time_start,time_end\ncafé,a,0,10\n"):
        write(tmp_path / "train.csv", text.encode("latin-1"))
        for reads in (lambda path: read_text(path, "--train-list"), read_annotations):
            with pytest.raises(UserError, match=r"train\.csv is not a text file in UTF-8; .* iconv"):
                reads(tmp_path / "train.csv")


def plan(tmp_path: Path, train: str, val: str) -> PackPlan:
    """The plan of two lists of videos."""
    lists = tmp_path / "train.csv", tmp_path / "val.csv"
    for path, text in zip(lists, (train, val), strict=True):
        write(path, text.encode())
    return plan_clips(tmp_path, None, ClipOptions(train_list=lists[0], val_list=lists[1]), videos=True)


def test_what_train_and_val_disagree_on_names_the_lists(tmp_path, capsys):
    for name in ("a_000000_000010", "b_000000_000010", "c_000000_000010"):
        write(tmp_path / f"{name}.mp4", b"")
    write(tmp_path / "c_000000_000010.mkv", b"")
    both = r"^\S*train\.csv and \S*val\.csv: "
    with pytest.raises(UserError, match=both + "validation has class '2', but training does not"):
        plan(tmp_path, "a_000000_000010 0\nb_000000_000010 1\n", "c_000000_000010 2.0\n")
    heading = "label,youtube_id,time_start,time_end\n"
    with pytest.raises(UserError, match=both + r"'a_000000_000010\.mp4' is in train and in val; remove it"):
        plan(tmp_path, f"{heading}run,a,0,10\nrun,b,0,10\n", f"{heading}run,a,0,10\n")
    with pytest.raises(UserError, match=both + r"'c_000000_000010\.\w+' is in train and in val"):
        plan(tmp_path, "c_000000_000010.mkv 0\n", "c_000000_000010.mp4 0\n")  # the same video
    found = plan(tmp_path, "a_000000_000010 7\nb_000000_000010 2\n", "c_000000_000010.mp4 7\n")
    assert found.classes == ["2", "7"]
    assert found.splits["val"][0].others == ("c_000000_000010.mkv",)
    words = "class number 0 is missing: the 2 numbers that occur, in their order, become the labels 0 to 1"
    assert words in capsys.readouterr().out


def test_a_line_with_two_readings_is_rejected(tmp_path):
    with pytest.raises(UserError, match="line 1 is ambiguous: 'a' and 'a 1' exist"):
        read(tmp_path, "a 1 2\n", ["a", "a 1"], FRAMES)
    assert read(tmp_path, "a\t1\na 1\t2\n", ["a", "a 1"], FRAMES) == {"a": "1", "a 1": "2"}


def test_class_numbers_keep_their_order(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number}.jpg", encoded(pixels(number)))
    write(tmp_path / "train.txt", "".join(f"{n}.jpg {n}\n" for n in range(12)).encode())
    listing = list_samples(tmp_path, PICTURES, tmp_path / "train.txt", None, None)
    assert listing.numbered and listing.left_out[".txt files"] == (1, "train.txt")
    assert {item.source: item.label for item in listing.train}["11.jpg"] == "11"


def test_lists_without_classes_take_them_from_the_folders_of_the_other_list(tmp_path):
    """As UCF101's testlist01.txt."""
    for label, group in (("Run", 1), ("Run", 2), ("Jump", 1), ("Jump", 2)):
        write(tmp_path / f"v/{label}/v_{label}_g0{group}_c01.avi", b"")
    write(tmp_path / "trainlist01.txt", b"Run/v_Run_g02_c01.avi 2\nJump/v_Jump_g02_c01.avi 1\n")
    write(tmp_path / "testlist01.txt", b"Run/v_Run_g01_c01.avi\r\nJump/v_Jump_g01_c01.avi\r\n")
    lists = tmp_path / "trainlist01.txt", tmp_path / "testlist01.txt"
    listing = list_samples(tmp_path / "v", VIDEOS, *lists, None)
    assert [item.label for item in listing.train] == ["2", "1"] == [item.label for item in listing.val or ()]


def test_a_sample_in_both_lists_is_rejected(tmp_path):
    for path in ("videos/a.mp4", "videos/b.mp4"):
        write(tmp_path / path, b"")
    write(tmp_path / "train.txt", b"a.mp4 0\nb.mp4 1\n")
    write(tmp_path / "val.txt", b"/data/b.mp4 1\n")
    listing = list_samples(tmp_path / "videos", VIDEOS, tmp_path / "train.txt", tmp_path / "val.txt", None)
    with pytest.raises(
        UserError, match=r"train\.txt and .*val\.txt: 'b\.mp4' is in train and in val; remove"
    ):
        plan_of("video", listing, 0.1, PACKING, "videos")


def test_the_lists_of_a_folder_are_found_by_name(tmp_path):
    for names, split, wanted in (
        (["tiny_train.csv", "train.csv"], "train", "tiny_train.csv"),
        (["kinetics400_train_list_rawframes.txt", "kinetics400_val_list_rawframes.txt"], "val", None),
        (
            ["something-something-v2-train.json", "labels.json", "something-something-v2-validation.json"],
            "val",
            None,
        ),
        (["trainlist01.txt", "testlist01.txt"], "train", "trainlist01.txt"),
        (["train.json", "test.json"], "val", ""),
    ):
        folder = tmp_path / names[0]
        for name in names:
            write(folder / name, b"")
        found = find_list(folder, split)
        assert (found.name if found else "") == (names[-1] if wanted is None else wanted)
    write(tmp_path / "several/trainlist01.txt", b"")
    write(tmp_path / "several/trainlist02.txt", b"")
    with pytest.raises(
        UserError, match=r"several lists for train: trainlist01\.txt, trainlist02\.txt; name one"
    ):
        find_list(tmp_path / "several", "train")


# ---- any text ----------------------------------------------------------------------------------------------

WORDS = ["78687", "path", "label", "template", "0", "17", "250", "id", "absent/z.mp4", "..", "é", "-1", "1e9"]
MARKS = [
    " ",
    "  ",
    "\t",
    ",",
    ";",
    "\n",
    "\r\n",
    '"',
    "[",
    "]",
    "{",
    "}",
    ":",
    "\ufeff",
    "/",
    "\x0b",
    "\u2028",
]
PIECES = st.sampled_from([*SOURCES, *WORDS, *MARKS])


@given(
    st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text(max_size=200)),
    st.sampled_from([VIDEOS, FRAMES]),
)
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_list_or_a_user_error(tmp_path_factory, text, kind):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        listed = read_list(path, "train", Index(SOURCES, kind), path.parent)
    except UserError as error:
        assert "any.txt" in str(error)
    else:
        assert listed and any(item.source in SOURCES for item in listed)
    for classes in (None, {"0", "17"}):
        try:
            assert len(flat_classes(path, None, SOURCES, classes)) == len(SOURCES)
        except UserError as error:
            assert "any.txt" in str(error)


@given(
    st.lists(st.tuples(st.sampled_from(SOURCES), st.integers(0, 999)), min_size=1, max_size=20),
    st.sampled_from("\t, ;"),
)
@settings(max_examples=100, deadline=None)
def test_written_lists_are_read_back(tmp_path_factory, rows, by):
    path = tmp_path_factory.getbasetemp() / "written.txt"
    text = lines(*((source, str(label)) for source, label in rows), by=by)
    _, found = parse(path, text, Index(SOURCES, VIDEOS).find)
    assert [(line.path, line.label) for line in found] == [(source, str(label)) for source, label in rows]


def test_long_lines_take_no_time_or_memory(tmp_path):
    for text in (" " * 300_000 + "q", "q " * 150_000, "q,\n" * 50_000, '"' + "q\n" * 100_000):
        with pytest.raises(UserError):
            read(tmp_path, text)


# ---- through the command -----------------------------------------------------------------------------------


def videos(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        codec = "libvpx" if name.endswith(".webm") else "mpeg4"
        make(root / name, [numbered(8 * number + frame) for frame in range(4)], codec)


def test_a_list_of_videos_is_packed_by_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [f"part {n % 2}/clip {n}.mp4" for n in range(6)]
    videos(tmp_path / "own", names)
    write(
        tmp_path / "train.csv",
        "".join(f"/old/place/{name} {n % 2 + 3}\n" for n, name in enumerate(names[:4])).encode(),
    )
    write(tmp_path / "val.csv", "".join(f"{name} {n % 2 + 3}\n" for n, name in enumerate(names[4:])).encode())
    lists = {"train_list": Path("train.csv"), "val_list": Path("val.csv")}
    assert pack_all(ListOptions(workers=1, **lists), videos=Path("own")) == 0
    assert "train.csv: 4 samples; path and class per line; class numbers" in capsys.readouterr().out
    rows = rows_of(Path("shards/kinetics"))
    assert sorted((row["source"], row["class_name"], row["label"]) for row in rows) == [
        ("part 0/clip 0.mp4", "3", 0),
        ("part 0/clip 2.mp4", "3", 0),
        ("part 1/clip 1.mp4", "4", 1),
        ("part 1/clip 3.mp4", "4", 1),
    ]
    assert verify(Path("shards/kinetics")) == 0
    with pytest.raises(UserError, match="a list is for one folder; name it"):
        pack_all(ListOptions(**lists))


def test_rawframes_are_packed_by_one_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        for frame in range(3):
            write(Path(f"own/class {n % 2}/clip{n}/img_{frame:05}.jpg"), encoded(pixels(10 * n + frame)))
    for split, numbers in (("train", (0, 1)), ("val", (2, 3))):
        text = "".join(f"class {n % 2}/clip{n} 3 {n % 2}\n" for n in numbers)
        write(Path(f"lists/own_{split}_list_rawframes.txt"), text.encode())
    assert pack_clips(Path("lists"), Path("out"), ClipOptions(workers=1), frames=Path("own")) == 0
    assert sorted((row["source"], row["label"], row["frames"]) for row in rows_of(Path("out"), "val")) == [
        ("class 0/clip2", 0, 3),
        ("class 1/clip3", 1, 3),
    ]


def test_ssv2_is_packed_by_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    videos(Path("ssv2"), [f"{n}.webm" if n else "0.mp4" for n in range(6)])
    templates = ["Holding [something]", "Putting [something] onto [something]"]
    entries = [
        {"id": str(n), "label": f"a thing {n}", "template": templates[n % 2], "placeholders": ["a thing"]}
        for n in range(6)
    ]
    labels = {"Holding something": "0", "Putting something onto something": "1"}
    files = {"train": entries[:4], "validation": entries[4:5], "test": [{"id": "5"}], "labels": labels}
    for name, content in files.items():
        write(Path(f"labels/{name}.json"), json.dumps(content).encode())
    assert pack_clips(Path("labels"), Path("out"), ClipOptions(workers=1), videos=Path("ssv2")) == 0
    out = capsys.readouterr().out
    assert "train.json: 4 samples; id, template in JSON; class names" in out
    assert "left out: videos in no list" in out
    rows = rows_of(Path("out"))
    assert {(row["class_name"], row["label"]) for row in rows} == {
        (name, int(n)) for name, n in labels.items()
    }
    assert [row["source"] for row in rows_of(Path("out"), "val")] == ["4.webm"]
    for name, words in {
        "labels": "not a list of objects",
        "test": "only one of train and val has classes",
    }.items():
        lists = {"train_list": Path("labels/train.json"), "val_list": Path(f"labels/{name}.json")}
        with pytest.raises(UserError, match=words):
            pack_clips(None, Path("no"), ClipOptions(workers=1, **lists), videos=Path("ssv2"))


@pytest.mark.parametrize("kind", ["kaggle", "names"])
def test_a_flat_val_folder_with_labels_is_packed_by_one_command(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    flat_val(Path("in"))
    write(Path("labels.csv"), LABELS[kind].encode())
    assert pack_all(ListOptions(workers=1, val_list=Path("labels.csv")), images=Path("in")) == 0
    rows = sorted(rows_of(Path("shards/imagenet"), "val"), key=lambda row: row["source"])
    assert [row["label"] for row in rows] == [1, 0, 1, 1]


@pytest.mark.parametrize("names", ["--val-labels", "--train-list"])
def test_a_flat_folder_with_kaggles_csv_alone_has_classes_and_both_splits(
    tmp_path, monkeypatch, capsys, names
):
    monkeypatch.chdir(tmp_path)
    order = [*range(1, 21)]
    random.Random(1).shuffle(order)
    text = ["ImageId,PredictionString", *(f"{VAL}{n:02},n{n % 2} 1 2 3 4 n{n % 2} 5 6 7 8 " for n in order)]
    write(Path("LOC_val_solution.csv"), "\n".join(text).encode())
    for n in order:
        write(Path(f"imagenet_val/{VAL}{n:02}.JPEG"), encoded(pixels(n)))
    list_option = {"--val-labels": "val_list", "--train-list": "train_list"}[names]
    options = ListOptions(workers=1, **{list_option: Path("LOC_val_solution.csv")})
    assert pack_all(options, images=Path("imagenet_val")) == 0
    assert ("has no train folder" in capsys.readouterr().out) == (names == "--val-labels")
    rows = {split: rows_of(Path("shards/imagenet"), split) for split in ("train", "val")}
    assert [len(rows["train"]), len(rows["val"])] == [18, 2]
    assert {row["label"] for row in rows["train"]} == {row["label"] for row in rows["val"]} == {0, 1}
    assert all(row["label"] == int(row["source"][-6]) % 2 for found in rows.values() for row in found)


def test_make_shards_takes_lists():
    printed = call_make("-n", "shards", "IMAGES=in", "TRAIN_LIST=a b.txt", "VAL_LIST=c.txt")
    assert "--train-list 'a b.txt' --val-list 'c.txt'" in " ".join(printed.split())
