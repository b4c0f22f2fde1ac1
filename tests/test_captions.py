"""Text that users write is read in one way: prompts, COCO's captions, captions beside images."""

import json

import pytest
from helpers import refusal

from support.captions import lines_of, read_coco, read_prompts, read_text


def test_a_text_file_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    for mark in b"", b"\xef\xbb\xbf":  # which Notepad writes
        (tmp_path / "a.txt").write_bytes(mark + "日本\u2028語\n".encode())
        assert read_text(tmp_path / "a.txt") == "日本\u2028語\n"


@pytest.mark.parametrize("content", ["a cat".encode("utf-16"), "a cat".encode("utf-16-le"), b"K\xe4se"])
def test_what_is_no_utf8_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    message = refusal(read_text, tmp_path / "a.txt")
    assert message.startswith(f"cannot read {tmp_path}/a.txt: it is no UTF-8 text (") and "save it as" in message


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    assert "No such file" in refusal(read_prompts, tmp_path / "none.txt")
    assert "Is a directory" in refusal(read_coco, tmp_path)


def test_lines_end_at_line_feeds_and_nowhere_else(tmp_path):
    within = "\u2028\x0b\x0c\x1c\x85\u2029\r"
    text = f"a{within}cat\r\n\r\n  a dog \nend"
    assert lines_of(text) == [f"a{within}cat", "", "  a dog ", "end"]
    assert lines_of("a\nb\n") == ["a", "b"]
    (tmp_path / "p.txt").write_bytes(text.encode("utf-8-sig"))
    assert read_prompts(tmp_path / "p.txt") == [f"a{within}cat", "a dog", "end"]
    (tmp_path / "p.txt").write_text(" \n\r\n")
    assert "holds no prompts; write one per line" in refusal(read_prompts, tmp_path / "p.txt")


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "null, not text"), (["a", "b"], '["a", "b"], not text'), (" \n", "empty"), ("\ud83d", "half a letter"),
        ("a\0b", "zero byte"),
    ],
)  # fmt: skip
def test_what_is_no_caption_is_left_out_and_named(tmp_path, capsys, value, reason):
    entries = [{"image_id": image, "caption": caption} for image, caption in ((1, value), (2, " a\n cat "), (1, "b"))]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": entries}))
    assert read_coco(tmp_path / "c.json")[0] == {2: ["a cat"], 1: ["b"]}
    told = capsys.readouterr().err
    assert "1 captions are left out: image 1 (its caption " in told and reason in told


def test_cocos_captions_come_in_the_order_of_the_file(tmp_path):
    """COCO's own files are not sorted by annotation id, and people's tools take the first that comes."""
    images = [{"id": 9, "file_name": "val/000000000009.jpg"}, {"id": "x", "file_name": "x.png"}]
    annotations = [
        {"image_id": "x", "id": 7, "caption": "of x"},
        {"image_id": 9, "id": 4, "caption": "first of\n 9"},
        {"image_id": 9, "id": 3, "caption": "second of 9"},
    ]
    content = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "c.JSON").write_text(content, encoding="utf-8-sig")
    captions, names = read_coco(tmp_path / "c.JSON")
    assert list(captions.items()) == [("x", ["of x"]), (9, ["first of 9", "second of 9"])]
    assert list(names.items()) == [(9, "000000000009.jpg"), ("x", "x.png")]
    assert read_prompts(tmp_path / "c.JSON") == ["of x", "first of 9"]


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"annotations": [{"id": 1}]}', "[" * 100_000])
def test_another_json_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    assert "c.json is not a COCO captions JSON" in refusal(read_prompts, tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"annotations": []}')
    assert "c.json holds no captions" in refusal(read_prompts, tmp_path / "c.json")
