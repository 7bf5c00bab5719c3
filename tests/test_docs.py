"""The documentation tells the truth: its Python runs and prints what it shows, its commands and links exist."""

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from effjax.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("plan", "compress", "convert", "verify", "eval", "generate", "calibrate-kv", "report")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def examples(page: Path) -> list[tuple[str, str | None]]:
    """Every Python block, with the text block right behind it: what it prints."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match[1] == "python":
            behind = re.match(r"\s*```text\n(.*?)^```$", text[match.end() :], re.MULTILINE | re.DOTALL)
            found.append((match[2], behind[1] if behind else None))
    return found


def command_lines(page: Path) -> list[str]:
    """Lines of shell blocks, without prompts and comments; continued lines joined."""
    lines = []
    for language, text in blocks(page):
        shown = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
        if language == "sh":
            lines += shown
        elif language == "console":
            lines += [line[2:] for line in shown if line.startswith("$ ")]
    return [line.split(" # ")[0].strip() for line in lines]


def help_of(command: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main([command, "--help"]) == 0
    return text.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name)
def test_python_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, (code, expected) in enumerate(examples(page), start=1):
        exec(compile(code, f"{name(page)}, Python block {number}", "exec"), namespace)
        printed = capsys.readouterr().out
        if expected is not None:
            assert printed.rstrip() == expected.rstrip(), f"block {number} prints something else:\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in command_lines(page):
        words = shlex.split(line)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        if words[0] == "effjax":
            commands = [word for word in words[1:] if word in COMMANDS]
            assert commands or words[1:] in (["--help"], ["COMMAND", "--help"]), f"{line}: no subcommand"
            for flag in re.findall(r"(?<=\s)--[\w-]+", line):
                if flag != "--help":
                    assert re.search(rf"{flag}\b", help_of(commands[0])), f"{line}: no option {flag}"
        if words[0] == "make":
            for target in words[1:]:
                assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), f"{line}: no target {target}"
        if words[0].endswith("python") and words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None, f"{line}: no module {words[2]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name(page)} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_hosts_and_no_machine_paths(page):
    text = page.read_text(encoding="utf-8")
    found = re.search(r"https?://|(?<![\w.])/(?:home|work|tmp|Users)/", text)
    assert found is None, f"{name(page)}: {found}"


def test_there_is_something_to_test():
    assert sum(len(examples(page)) for page in PAGES) > 30
    assert sum(line.startswith("effjax") for page in PAGES for line in command_lines(page)) > 10


@pytest.mark.parametrize(
    "what, text",
    [
        ("prints something else", "```python\nprint(1)\n```\n\n```text\n2\n```\n"),
        ("no option --colour", "```sh\neffjax plan --colour red\n```\n"),
        ("which is not there", "[a](nowhere.md)\n"),
    ],
)
def test_a_wrong_page_is_caught(what, text, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "Makefile").write_text("", encoding="utf-8")
    with pytest.raises(AssertionError, match=what):
        test_python_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys)
        test_commands_exist(page)
        test_links_lead_somewhere(page)
