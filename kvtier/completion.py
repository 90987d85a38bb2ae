"""``kvtier completion``: scripts that complete the command line in bash, zsh and fish, made from its parser.

Static text: the shell starts no Python while somebody types.
"""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SHELLS = ("bash", "zsh", "fish")
PATHS = {"FILE", "DIR", "STORE", "MODEL"}
"""Metavars of arguments that are paths, or can be."""
FOLDERS = {"DIR", "STORE"}


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command."""

    names: list[str]
    help: str
    takes: str | None
    """Metavar of its value; None: a flag."""
    choices: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: what can follow its name."""

    name: str
    help: str
    options: list[Option]
    words: list[str]
    """Choices of its positional arguments."""
    paths: str | None
    """Metavar of a positional argument that is a path."""


class Parser(argparse.ArgumentParser):
    """An argument parser that remembers what it was given, which argparse keeps under private names."""

    def __init__(self, *, prog: str, summary: str = "", **settings: Any) -> None:
        self.name = prog.split()[-1]
        self.summary = summary
        self.given: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        self.commands: dict[str, Parser] = {}
        super().__init__(prog=prog, **settings)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse's."""
        self.given.append((names, settings))
        return super().add_argument(*names, **settings)


def script(parser: Parser, shell: str) -> str:
    """The completion script of ``parser`` for a shell of ``SHELLS``."""
    commands = list(_commands(parser))
    if shell == "fish":
        return _fish(parser.name, commands)
    bash = _bash(parser.name, commands)
    return bash if shell == "bash" else _zsh(parser.name, bash)


def _commands(parser: Parser) -> Iterator[Command]:
    for name, command in parser.commands.items():
        options = [_option(names, settings) for names, settings in command.given if names[0].startswith("-")]
        positional = [settings for names, settings in command.given if not names[0].startswith("-")]
        words = [str(word) for settings in positional for word in settings.get("choices", ())]
        paths = next((s["metavar"] for s in positional if s.get("metavar") in PATHS), None)
        yield Command(name, command.summary, options, words, paths)


def _option(names: tuple[str, ...], settings: dict[str, Any]) -> Option:
    flag = settings.get("action") in ("help", "store_true")
    takes = None if flag else settings.get("metavar", "VALUE")
    return Option(list(names), settings.get("help", ""), takes, [str(c) for c in settings.get("choices", ())])


_BASH = """\
# Completion of {prog} for bash, made by `{prog} completion bash`. Source it, for example from ~/.bashrc:
#   eval "$({prog} completion bash)"
_{prog}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${{COMP_WORDS[i]}} != -* ]]; then
            command=${{COMP_WORDS[i]}}
            break
        fi
    done
    local words="" folders=""
    case "$command $previous" in
{values}
    *)
        case "$command" in
        "") words="{commands} --help --version" ;;
{options}
        esac
        if [[ -n $command && $word != -* ]]; then
            case "$command" in
{positional}
            *) words="" ;;
            esac
        fi
        ;;
    esac
    COMPREPLY=()
    if [[ -n $folders ]]; then
        COMPREPLY=($(compgen -d -- "$word"))
    elif [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
}}
complete -o default -F _{prog} {prog}
"""


def _bash(prog: str, commands: list[Command]) -> str:
    """Values of an option by the word before; else options after a "-", and the command's own words or files."""
    values, options, positional = [], [], []
    for command in commands:
        for option in command.options:
            if option.takes is None:
                continue
            pattern = " | ".join(f'"{command.name} {name}"' for name in option.names)
            what = f'words="{" ".join(option.choices)}"' if option.choices else ""
            what = "folders=1" if option.takes in FOLDERS else what
            values.append(f"    {pattern}) {what or ':'} ;;")
        names = " ".join(name for option in command.options for name in option.names)
        options.append(f'        {command.name}) words="{names}" ;;')
        if command.words or command.paths in FOLDERS:
            what = f'words="{" ".join(command.words)}"' if command.words else 'words="" folders=1'
            positional.append(f"            {command.name}) {what} ;;")
    return _BASH.format(
        prog=prog,
        commands=" ".join(command.name for command in commands),
        values="\n".join(values),
        options="\n".join(options),
        positional="\n".join(positional),
    )


def _zsh(prog: str, bash: str) -> str:
    """The bash script through zsh's own emulation."""
    body = "\n".join(bash.splitlines()[2:])
    return (
        f"# Completion of {prog} for zsh, made by `{prog} completion zsh`. Source it after compinit, from ~/.zshrc:\n"
        f"#   autoload -Uz compinit && compinit\n"
        f'#   eval "$({prog} completion zsh)"\n'
        f"autoload -U +X bashcompinit && bashcompinit\n{body}\n"
    )


def _fish(prog: str, commands: list[Command]) -> str:
    begin = f"complete -c {prog}"
    lines = [
        f"# Completion of {prog} for fish, made by `{prog} completion fish`. For example:",
        f"#   {prog} completion fish > ~/.config/fish/completions/{prog}.fish",
        f"{begin} -n __fish_use_subcommand -f -l help -d 'show help'",
        f"{begin} -n __fish_use_subcommand -f -l version -d 'show the version'",
    ]
    for command in commands:
        here = f"{begin} -n '__fish_seen_subcommand_from {command.name}'"
        lines.append(f"{begin} -n __fish_use_subcommand -f -a {command.name} -d {shlex.quote(command.help)}")
        if command.paths is None:
            lines.append(f"{here} -f" + (f" -a {shlex.quote(' '.join(command.words))}" if command.words else ""))
        elif command.paths in FOLDERS:
            lines.append(f"{here} -f -a '(__fish_complete_directories)'")
        lines.extend(f"{here} {_fish_option(option)}" for option in command.options)
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    words = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    if option.takes is not None:
        if option.choices:
            words.append(f"-x -a {shlex.quote(' '.join(option.choices))}")
        elif option.takes in FOLDERS:
            words.append("-x -a '(__fish_complete_directories)'")
        else:
            words.append("-r -F" if option.takes in PATHS else "-x")
    return " ".join([*words, "-d", shlex.quote(" ".join(option.help.split()))])
