"""Text that users write is read in one way: prompts, COCO's captions, captions beside images."""

import json

import pytest
from helpers import refusal

from support.captions import read_coco, read_prompts


@pytest.mark.parametrize("content", ["a cat".encode("utf-16"), "a cat".encode("utf-16-le"), b"K\xe4se"])
def test_what_is_no_utf8_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    message = refusal(read_prompts, tmp_path / "a.txt")
    assert message.startswith(f"cannot read {tmp_path}/a.txt: it is no UTF-8 text (") and "save it as" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the latter with a byte order mark, as Notepad does
def test_prompts_end_at_line_feeds_and_nowhere_else(tmp_path, encoding):
    within = "\u2028\x0b\x0c\x1c\x85\u2029\r"
    (tmp_path / "p.txt").write_bytes(f"日本{within}cat\r\n\r\n  a dog \nend".encode(encoding))
    assert read_prompts(tmp_path / "p.txt") == [f"日本{within}cat", "a dog", "end"]
    assert "No such file" in refusal(read_prompts, tmp_path / "none.txt")
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
    said = capsys.readouterr().err
    assert "1 captions are left out: image 1 (its caption " in said and reason in said


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


@pytest.mark.parametrize("content", ["{}", '{"annotations": [{"id": 1}]}', '{"annotations": []}'])
def test_another_json_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    wanted = "holds no captions" if "[]" in content else "is not a COCO captions JSON"
    assert f"c.json {wanted}" in refusal(read_prompts, tmp_path / "c.json")
