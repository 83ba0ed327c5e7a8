"""What makes a shell complete a program's flags and their choices: `--print-completion bash`, zsh or fish. No torch.

    eval "$(python -m scripts.base_train --print-completion bash)"     # bash: in ~/.bashrc
    eval "$(python -m scripts.base_train --print-completion zsh)"      # zsh:  in ~/.zshrc, behind compinit
    python -m scripts.base_train --print-completion fish | source      # fish: in ~/.config/fish/config.fish

A shell completes by the name of a command, which is `python` for every program here. So what is printed first looks for the
words of the program, `-m scripts.base_train`, among those that are typed. Several programs can be loaded. (shtab, the usual
package for argparse, completes commands with a name of their own only.)
"""

import re
import shlex
from dataclasses import dataclass, fields

from nanochat.cli.flags import default_of, flag_name


@dataclass
class Option:
    """A flag as a shell sees it: its names, with dashes; choices () where any value goes."""
    names: list[str]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


def completion(shell: str, prog: str, groups: list[type]) -> str:
    """The text that `shell` (bash, zsh or fish) is to read. prog: how the program is called, `python -m scripts.base_train`."""
    command, *rest = prog.split()
    commands = ["python", "python3", "torchrun"] if command == "python" else [command]
    words = " ".join(word for word in rest if not word.isupper())  # without the operands: runs show RUN
    name = re.sub(r"\W", "_", words)
    called = f"{command} {words}"
    about = f"# {shell}: completes the flags of `{called}`. Load it:  {LOAD[shell].format(prog=called)}\n"
    return about + WRITERS[shell](commands, words, name, [option for group in groups for option in options_of(group)])


def options_of(group: type) -> list[Option]:
    """The flags of a dataclass."""
    found = [Option(["--help", "-h"], "show all flags and stop", False, ())] if group.__name__ == "CommonFlags" else []
    for f in fields(group):
        names, default = [flag_name(f.name), *f.metadata["aliases"]], default_of(f)
        if default is True:
            names.append(f"--no-{names[0][2:]}")
        choices = tuple(str(choice) for choice in f.metadata["choices"] or () if choice != "")
        found.append(Option(names, f.metadata["help"], not isinstance(default, bool), choices))
    return found


def _bash(commands: list[str], words: str, name: str, options: list[Option]) -> str:
    cases = "".join(f"        {'|'.join(option.names)}) echo {shlex.quote(' '.join(option.choices))};;\n"
                    for option in options if option.takes_value)
    return f"""_nanochat{name}() {{  # the choices of a flag that takes a value, else all flags
    case "$1" in
{cases}        *) echo {shlex.quote(' '.join(name for option in options for name in option.names))};;
    esac
}}
{BASH}_nanochat_programs+=({shlex.quote(words)})
complete -o default -F _nanochat_complete {' '.join(commands)}"""


# readline breaks words at "=". macOS has bash 3.2. What is not found is completed as by default: a name of a file.
BASH = """_nanochat_complete() {
    local line=" ${COMP_WORDS[*]:0:COMP_CWORD} " current="${COMP_WORDS[COMP_CWORD]}" program choices
    local before="${COMP_WORDS[COMP_CWORD-1]}"
    [[ $current == "=" ]] && current=""
    [[ $before == "=" ]] && before="${COMP_WORDS[COMP_CWORD-2]}"
    COMPREPLY=()
    for program in "${_nanochat_programs[@]}"; do
        if [[ $line == *" $program "* ]]; then
            choices=$("_nanochat${program//[^a-zA-Z0-9_]/_}" "$before")
            COMPREPLY=($(compgen -W "$choices" -- "$current"))
        fi
    done
}
"""


def _zsh(commands: list[str], words: str, name: str, options: list[Option]) -> str:
    specs = []
    for option in options:
        about = re.sub(r"([\\\[\]:])", r"\\\1", option.help)
        action = f":value:({' '.join(option.choices)})" if option.choices else ":value:_files" if option.takes_value else ""
        equals = "=" if option.takes_value else ""
        specs += [shlex.quote(f"*{name}{equals if name.startswith('--') else ''}[{about}]{action}") for name in option.names]
    listed = "".join(f" \\\n        {spec}" for spec in specs)
    return f"""_nanochat{name}() {{
    _arguments{listed} \\
        '*:file of flags:{{ compset -P @; _files }}'
}}
{ZSH}typeset -gU _nanochat_programs
_nanochat_programs+=({shlex.quote(words)})
[[ ${{_comps[python]}} == _nanochat_complete ]] || typeset -g _nanochat_otherwise=${{_comps[python]:-_default}}
compdef _nanochat_complete {' '.join(commands)}"""


ZSH = """_nanochat_complete() {
    local program line=" ${words[1,CURRENT-1]} "
    for program in $_nanochat_programs; do
        if [[ $line == *" $program "* ]]; then
            while [[ ${words[1]} != ${program##* } ]]; do shift words; (( CURRENT-- )); done
            _nanochat${program//[^a-zA-Z0-9_]/_}
            return
        fi
    done
    $_nanochat_otherwise
}
"""


def _fish(commands: list[str], words: str, name: str, options: list[Option]) -> str:
    start = " ".join(["complete", *(f"-c {command}" for command in commands), f"-n '_nanochat_typed {words}'"])
    lines = [FISH]
    for option in options:
        value = f" -x -a {shlex.quote(' '.join(option.choices))}" if option.choices else " -r" if option.takes_value else ""
        for name in option.names:
            kind = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            lines.append(f"{start} {kind} -d {_fish_quoted(option.help)}{value}")
    return "\n".join(lines)


FISH = """function _nanochat_typed
    string match -q -- "* $argv *" (commandline -pc | string collect)
end"""


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


LOAD = {"bash": 'eval "$({prog} --print-completion bash)"', "zsh": 'eval "$({prog} --print-completion zsh)"',
        "fish": "{prog} --print-completion fish | source"}
WRITERS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
