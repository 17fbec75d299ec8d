"""The functions that bash, zsh and fish load (``_VRING_COMPLETE=bash_source vring``).

click's own complete no part of a word. Most of our words have parts: bash begins a word anew at
each ``=`` and ``:``, click's function for fish ends one at the first comma, and no space may follow
``path=``. These let the command see the line as it was typed.
"""

from __future__ import annotations

import os
import re
from typing import Any

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from vring_serial.cli.completion.words import complete_path

_BASH = """\
%(complete_func)s() {
    local reply
    COMPREPLY=()
    reply=$(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORD="$2" \
%(complete_var)s=bash_complete "$1" 2>/dev/null) || return 0
    [[ -n $reply ]] && mapfile -t COMPREPLY <<< "$reply"
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=,/:] ]]; then
        compopt -o nospace
    fi
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a response described whole begun
    local value help
    (( $+commands[$words[1]] )) || [[ -x $words[1] ]] || return 1
    response=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete $words[1] 2>/dev/null)}")
    for value help in "${response[@]}"; do
        if [[ -z $value ]]; then
            continue
        elif [[ $help != _ ]]; then
            described+=("$value:$help")
        elif [[ $value == *[=,/:] ]]; then
            begun+=("$value")
        else
            whole+=("$value")
        fi
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#whole )) && compadd -U -V unsorted -a whole
    (( $#begun )) && compadd -U -S '' -V unsorted -a begun
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = """\
function %(complete_func)s
    set -l program (commandline -cpo)[1]
    env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -ct) \
$program 2>/dev/null
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""

#: What bash takes as it is outside quotes. Names of files may hold anything.
_PLAIN = re.compile(r"([^\w@%+=:,./-])")


class _WholeWords(ShellComplete):
    """A shell that is given whole words, whatever part of them was completed."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Return whole words: click takes ``--option=`` off, and does not put it back."""
        items: list[CompletionItem[str]] = []
        for item in super().get_completions(args, incomplete):
            if item.type == "plain":
                items.append(item)
            else:  # click's own paths: "file" or "dir", for a shell to complete
                paths = complete_path(item.value)
                only = (path for path in paths if item.type == "file" or path.endswith("/"))
                items += map(CompletionItem, only)
        option, equals, _ = incomplete.partition("=")
        if not (equals and option.startswith("-")):
            return items
        return [CompletionItem(f"{option}={item.value}", help=item.help) for item in items]


class Bash(_WholeWords, BashComplete):
    """bash, whose words end where COMP_WORDBREAKS says."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one at the cursor, and what there is of that."""
        words = split_arg_string(os.environ["COMP_LINE"] + "x")
        return words[1:-1], words[-1][:-1]

    def complete(self) -> str:
        """Return what bash puts in the place of its word, one a line."""
        args, incomplete = self.get_completion_args()
        word = os.environ["COMP_WORD"]
        quoted = word[:1] in ("'", '"')
        unquoted = word[1:] if quoted else re.sub(r"\\(.)", r"\1", word)
        # Its word may be a part of ours.
        cut = len(incomplete) - len(unquoted) if incomplete.endswith(unquoted) else 0
        lines = []
        for item in self.get_completions(args, incomplete):
            value = item.value[cut:]
            if not quoted:
                lines.append(_PLAIN.sub(r"\\\1", value))
            elif not _PLAIN.search(value.replace(" ", "")):
                lines.append(value)
        return "\n".join(lines)


class Zsh(_WholeWords, ZshComplete):
    """zsh: a line for the word, one for what it is."""

    source_template = _ZSH

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return both lines, without the kind that click's function expects."""
        return super().format_completion(item).partition("\n")[2]


class Fish(_WholeWords, FishComplete):
    """fish: a word, a tab, what it is."""

    source_template = _FISH

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return the line, without the kind that click's function expects."""
        return super().format_completion(item).partition(",")[2]


def install() -> None:
    """Have click use these."""
    for shell in (Bash, Zsh, Fish):
        add_completion_class(shell)
