"""The documents tell the truth: their commands run, their files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from gmem_bank.cli import main as bank_main
from gmem_gen.cli import main as gen_main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_and_the_first_commands_stand_in_the_readme_word_for_word() -> None:
    """What the README promises is what CI runs."""
    from tools.first_commands import COMMANDS

    shell = "\n".join(blocks("sh"))
    for command in ("make quickstart", "make test", *COMMANDS):
        assert f"{command}\n" in shell
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_python_example_runs_as_it_stands(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copied into a file, it works."""
    [example] = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(4, 16, 16, 3) ")


def test_every_other_command_of_the_readme_runs(photos: Path, new_photos: Path) -> None:
    """Each gmem command below the first ones exits 0, in order, on a bank that a tiny model was trained on."""
    tiny = ["model.width=16", "model.depth=1", "model.num_heads=2", "data.image_size=8", "train.max_steps=2"]
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("gmem-")]
    assert len(lines) > 8
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        if words[0] == "build":
            words = ["build", str(photos), "--encoder", "hog"]
        if words[0] == "train":
            words += [word for setting in tiny for word in ("--set", setting)]
        result = CliRunner().invoke(bank_main if program == "gmem-bank" else gen_main, words)
        assert result.exit_code == 0, (line, result.output)


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_documents_name_files_that_exist_and_no_machine(name: str) -> None:
    """Paths in the documents lead somewhere; nothing of any machine is in them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:gmem_bank|gmem_gen|tools|tests|docs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
    assert not re.search(r"/(root|home|work|Users|tmp)/", text)
    assert not re.search(r"^[A-Z][A-Z_]{3,}$", text, flags=re.MULTILINE), "a placeholder was left"
