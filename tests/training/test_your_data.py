"""docs/your-data.md, end to end: its own code writes real scans, and the recipe it names learns from them."""

import csv
import json
from pathlib import Path

from docs.doc_pages import ROOT, blocks_of, commands_of

from mmbridge.bridge import Bridge
from mmbridge.cli.main import main

PAGE = ROOT / "docs" / "your-data.md"
BRIEF = ["run.steps=240", "run.batch_size=16", "run.validate_every=120"]


def test_scans_train_through_the_recipe_by_their_path_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks_of(PAGE):
        if block.language == "python":
            exec(block.code, names)
    train, generate = commands_of(PAGE)
    assert main([*train, *BRIEF]) == 0
    with open("runs/digits/logs/metrics.csv", newline="") as file:
        held = [float(row["val/loss/text"]) for row in csv.DictReader(file) if row["val/loss/text"]]
    assert len(held) == 2 and held[1] < held[0]
    dialogues = [json.loads(line)["messages"] for line in Path("digits/validation.jsonl").read_text().splitlines()]
    bridge = Bridge.from_pretrained("runs/digits")
    answers = bridge.generate([dialogue[:1] for dialogue in dialogues], root="digits", max_new_tokens=16)
    right = [answer.text.strip() == said["content"] for answer, (_, said) in zip(answers, dialogues, strict=True)]
    assert sum(right) / len(right) > 0.5, [answer.text for answer in answers]  # three times what guesses reach
    question = {"messages": dialogues[0][:1]}
    (tmp_path / "digits" / "question.json").write_text(json.dumps(question))
    capsys.readouterr()
    words = [word.replace("question.json", "digits/question.json") for word in generate]
    assert main(words) == 0
    assert json.loads((tmp_path / "answer" / "reply.json").read_text())
