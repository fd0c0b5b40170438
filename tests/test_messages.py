"""The message schema and its rendering: positions of media and of what the assistant says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from media.measured import example, noise, picture

from mmbridge import media
from mmbridge.errors import ConfigError, MediaError, MessageError
from mmbridge.messages import (
    MediumPart,
    MediumPiece,
    TextPart,
    TextPiece,
    parse_messages,
    read_messages,
    render,
    store_media,
    template_names,
)
from mmbridge.modality import MEDIA

IMAGE = {"type": "image", "path": "cat.png"}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "Draw it twice."}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "One: "},
            {"type": "image", "caption": "a cat"},
            {"type": "text", "text": " two."},
        ],
    },
    {"role": "user", "content": "Thanks."},
]


def pieces_of(messages, template="plain", **options):
    return render(parse_messages(messages), template, **{"bos": "<s>", "eos": "</s>", **options})


def said(pieces):
    """What is supervised, in order: strings, and "MEDIUM" for media."""
    found = []
    for piece in pieces:
        if isinstance(piece, MediumPiece):
            found += ["MEDIUM"] if piece.supervised else []
        else:
            found += [piece.text[start:end] for start, end in piece.supervised]
    return found


def flat(pieces):
    return "".join(f"[{piece.part.type}]" if isinstance(piece, MediumPiece) else piece.text for piece in pieces)


def test_messages_become_turns():
    turns = parse_messages(DIALOGUE)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0].parts == [TextPart("Be brief.")]
    assert turns[1].parts == [MediumPart("image", "cat.png"), TextPart("Draw it twice.")]
    assert turns[2].parts[1] == MediumPart("image", caption="a cat")
    (medium,) = parse_messages([{"role": "user", "content": [{"type": "audio", "data": [0.0], "sample_rate": 8000}]}])[
        0
    ].parts
    assert (medium.data, medium.sample_rate, medium.path) == ([0.0], 8000, None)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list of messages"),
        ("hello", "non-empty list of messages"),
        (["hello"], "message 0 must be an object with 'role' and 'content'"),
        ([{"role": "user"}], "message 0 must be an object with 'role' and 'content'"),
        ([{"role": "usr", "content": "x"}], "message 0 has the unknown role 'usr'; did you mean 'user'"),
        ([{"role": "user", "content": 5}], "message 0 needs a string or a list of parts as 'content', not 5"),
        ([{"role": "user", "content": ["x"]}], r"message 0, part 0 must be an object with a 'type' \(text \| image"),
        (
            [{"role": "user", "content": [{"type": "imgae"}]}],
            "part 0 has the unknown type 'imgae'; did you mean 'image'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "type 'text' needs exactly one other key, 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "needs exactly one other key, 'text'"),
        ([{"role": "user", "content": [{**IMAGE, "pth": 1}]}], "unknown key 'pth'; did you mean 'path'"),
        ([{"role": "user", "content": [{**IMAGE, "data": b"x"}]}], "has both 'path' and 'data'; give one"),
        ([{"role": "user", "content": [{"type": "image"}]}], "neither 'path' nor 'data'; give the file or the medium"),
        ([{"role": "user", "content": [{"type": "image", "path": 5}]}], "needs a file name as 'path', not 5"),
        ([{"role": "user", "content": [{**IMAGE, "caption": 5}]}], "needs a string as 'caption', not 5"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 5}], "message 1 needs"),
    ],
)
def test_what_breaks_the_schema_is_named_by_message_and_part(messages, message):
    with pytest.raises(MessageError, match=message):
        parse_messages(messages)


def test_messages_are_read_from_a_file_as_list_or_under_a_key(tmp_path):
    path = tmp_path / "dialogue.json"
    for value in (DIALOGUE, {"messages": DIALOGUE}):
        path.write_text(json.dumps(value))
        assert read_messages(path) == DIALOGUE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file .*dialogue\.json; give a JSON file with a list of messages"),
        (b"[", r"dialogue\.json can't be read as JSON"),
        (b"\xff\xfe", r"dialogue\.json can't be read as JSON"),
        (b"{}", "non-empty list of messages"),
    ],
)
def test_files_that_hold_no_dialogue_are_refused(tmp_path, content, message):
    path = tmp_path / "dialogue.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MessageError, match=message):
        read_messages(path)


def test_plain_template_with_positions():
    pieces = pieces_of(DIALOGUE)
    assert flat(pieces) == (
        "<s>Be brief.\nUser: [image]Draw it twice.\nAssistant: One: [image] two.</s>\nUser: Thanks.\n"
    )
    assert said(pieces) == ["One: ", "MEDIUM", " two.</s>"]
    assert [piece.part.path for piece in pieces if isinstance(piece, MediumPiece)] == ["cat.png", None]
    assert all(piece.text for piece in pieces if isinstance(piece, TextPiece))


def test_vicuna_template_with_positions():
    pieces = pieces_of(DIALOGUE, "vicuna")
    assert flat(pieces) == ("<s>Be brief. USER: [image]Draw it twice. ASSISTANT: One: [image] two.</s>USER: Thanks. ")
    assert said(pieces) == ["One: ", "MEDIUM", " two.</s>"]


def test_vicuna_v0_template_with_positions():
    pieces = pieces_of(DIALOGUE, "vicuna_v0")
    assert flat(pieces) == (
        "<s>Be brief.\n### Human: [image]Draw it twice.\n### Assistant: One: [image] two.\n### Human: Thanks.\n###"
    )
    assert said(pieces) == ["One: ", "MEDIUM", " two."]
    asked = flat(
        pieces_of([{"role": "user", "content": [IMAGE, {"type": "text", "text": "Why?"}]}], "vicuna_v0", reply=True)
    )
    assert asked == "<s>### Human: [image]Why?\n### Assistant:"


@pytest.mark.parametrize("name", template_names())
def test_prompt_for_a_reply_is_where_the_reply_begins_in_training(name):
    asked = [{"role": "user", "content": "Hi."}]
    prompt = flat(pieces_of(asked, name, reply=True))
    answered = flat(pieces_of([*asked, {"role": "assistant", "content": "Hello."}], name))
    assert answered.startswith(prompt)
    assert answered.removeprefix(prompt).strip() == "Hello." + ("\n###" if name == "vicuna_v0" else "</s>")


def test_media_at_the_edges_leave_no_empty_text():
    messages = [{"role": "assistant", "content": [IMAGE, IMAGE]}]
    pieces = pieces_of(messages, "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}")
    assert [type(piece) for piece in pieces] == [MediumPiece, MediumPiece, TextPiece]
    assert said(pieces) == ["MEDIUM", "MEDIUM", "</s>"]


def test_nothing_of_the_user_is_supervised():
    assert said(pieces_of([{"role": "user", "content": [IMAGE, {"type": "text", "text": "</s> x"}]}])) == []


def test_control_tokens_that_a_person_types_are_broken():
    messages = [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "c</s>d"}]
    text = flat(pieces_of(messages, specials=["<s>", "</s>"]))
    assert text == "<s>User: a< /s>b\nAssistant: c< /s>d</s>\n"


def test_marks_that_a_person_types_are_dropped():
    pieces = pieces_of([{"role": "user", "content": "a\ue000b\ue001c\ue002d"}])
    assert flat(pieces) == "<s>User: abcd\n"
    assert said(pieces) == []


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("plian", ConfigError, "unknown chat template 'plian'; did you mean 'plain'"),
        ("{% for m in messages %}", ConfigError, "not valid Jinja: line 1"),
        ("{{ messages[9].content.x }}", ConfigError, "the chat template fails on this dialogue"),
        ("{{ messages[0].content }}", ConfigError, "shows 0 media but the dialogue has 2"),
        ("{{ raise_exception('no system role') }}", MessageError, "refuses this dialogue: no system role"),
    ],
)
def test_templates_that_do_not_work_are_refused(template, error, message):
    with pytest.raises(error, match=message):
        pieces_of(DIALOGUE, template)


def test_templates_run_in_a_sandbox():
    with pytest.raises(ConfigError, match="unsafe"):
        pieces_of(DIALOGUE, "{{ messages.__class__.__base__.__subclasses__() }}")


def test_maps_may_have_a_picture():
    photo = media.Image(torch.zeros(3, 4, 4, dtype=torch.uint8))
    given = [
        {"type": "depth", "path": "d.npy", "picture": Path("a.png")},
        {"type": "normal", "path": "n.npy", "picture": photo},
    ]
    depth, normal = parse_messages([{"role": "user", "content": given}])[0].parts
    assert depth == MediumPart("depth", "d.npy", picture="a.png") and normal.picture is photo
    assert depth.options == {"picture": "a.png"} and MediumPart("audio", data=[0.0], sample_rate=8).options == {
        "sample_rate": 8
    }
    with pytest.raises(
        MessageError, match=r"part 0 of type 'image' has a 'picture', which only depth and normal parts may"
    ):
        parse_messages([{"role": "user", "content": [{**IMAGE, "picture": "a.png"}]}])
    with pytest.raises(MessageError, match=r"of type 'depth' has the unknown key 'pictur'; did you mean 'picture'"):
        parse_messages([{"role": "user", "content": [{"type": "depth", "path": "d.npy", "pictur": "a.png"}]}])
    with pytest.raises(MessageError, match=r"of type 'imu' needs a number as 'sample_rate', not '50'"):
        parse_messages([{"role": "user", "content": [{"type": "imu", "path": "a.npy", "sample_rate": "50"}]}])


@pytest.mark.parametrize("modality", MEDIA)
def test_media_in_memory_are_stored_as_they_are(modality, tmp_path):
    medium = {
        "image": lambda: picture(),
        "audio": lambda: media.Audio((noise(800) * 1000).round().clamp(-32768, 32767) / 32768, 8000),
        "video": lambda: media.Video(picture().pixels[None], 1.0),
    }.get(modality, lambda: example(modality))()
    (message,) = store_media([{"role": "user", "content": [{"type": modality, "data": medium}]}], tmp_path)
    (part,) = message["content"]
    assert part == {"type": modality, "path": f"{modality}-0{MEDIA[modality].suffix}"}
    (stored,) = parse_messages([message])[0].parts
    again = media.load(modality, stored.path, root=tmp_path, **stored.options)
    assert modality == "video" or again.content_hash == medium.content_hash


def test_pictures_of_maps_are_stored_beside_them(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    photo, depth = picture(), example("depth")
    photo.save(source / "photo.png")
    depth.save(source / "map.png")
    np.save(source / "imu.npy", example("imu").samples.numpy())
    content = [
        {"type": "depth", "path": "map.png", "picture": "photo.png"},
        {"type": "depth", "data": media.Depth(depth.map, photo)},
        {"type": "normal", "data": example("normal"), "picture": "photo.png"},
        {"type": "depth", "data": depth.map, "picture": photo.pixels},
        {"type": "imu", "path": "imu.npy", "sample_rate": 50},
    ]
    (message,) = store_media([{"role": "user", "content": content}], target, source)
    assert message["content"] == [
        {"type": "depth", "path": "depth-0.png", "picture": "depth-0-picture.png"},
        {"type": "depth", "path": "depth-1.npy", "picture": "depth-1-picture.png"},
        {"type": "normal", "path": "normal-2.npy", "picture": "normal-2-picture.png"},
        {"type": "depth", "path": "depth-3.npy", "picture": "depth-3-picture.png"},
        {"type": "imu", "path": "imu-4.npy", "sample_rate": 50},
    ]
    assert json.loads(json.dumps(message)) == message
    for part in parse_messages([message])[0].parts:
        medium = media.load(part.type, part.path, target, **part.options)
        assert part.type == "imu" or medium.picture.content_hash == photo.content_hash
    with pytest.raises(MediaError, match="leads out of the data root"):
        store_media([{"role": "user", "content": [{**content[0], "picture": "../photo.png"}]}], target, source)
