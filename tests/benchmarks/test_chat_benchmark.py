"""The benchmarks run; what they measure is not judged here."""

import runpy


def test_chat_prints_its_table(root, capsys):
    main = runpy.run_path(str(root / "benchmarks" / "chat.py"))["main"]
    main(["--turns", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:3]]
    assert [row[0] for row in rows] == ["1", "2"]
    new, whole = ([int(row[column]) for row in rows] for column in (1, 2))
    assert new[0] == whole[0] and new[1] < whole[1]
    assert lines[-1].startswith("turn 2: reading everything again takes ")
