"""Completion in bash, zsh and fish.

click's own scripts do much of it, and their names of shell functions and variables are kept. What is different here:

- bash splits words at '@', ':' and '=', so click's script would complete the part behind one of them alone. The script here
  passes the whole line up to the cursor. Of an answer, bash is told only what it does not keep, and quoted.
- An option and its value in one word (``--wipe=zero``) stay together: click offers the value alone.
- In fish, a name may hold a comma.
"""

import os
from typing import Any, Final

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

from onionskin.base.named_tuples import NamedTuple

_BASH: Final = """\
%(complete_func)s() {
    local line type value
    COMPREPLY=()
    while IFS= read -r line; do
        type="${line%%%%,*}"
        value="${line#*,}"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done <<< "$(_ONIONSKIN_LINE="${COMP_LINE:0:COMP_POINT}" _ONIONSKIN_BREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete %(prog_name)s)"
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_FISH: Final = """\
function %(complete_func)s;
    set -l response (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \
COMP_CWORD=(commandline -t) %(prog_name)s);
    set -l option (string match -r -- '^--[^=/]+=' (commandline -t));

    for completion in $response;
        set -l metadata (string split -m 1 "," -- $completion);
        set -l path (string sub -s (math 1 + (string length -- "$option")) -- "$metadata[2]");

        if test $metadata[1] = "dir";
            for found in (__fish_complete_directories "$path"); echo "$option$found"; end;
        else if test $metadata[1] = "file";
            for found in (__fish_complete_path "$path"); echo "$option$found"; end;
        else if test $metadata[1] = "plain";
            echo $metadata[2];
        end;
    end;
end;

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)";
"""
_ESCAPED: Final = frozenset(" \\'\"`$&|;<>()*?[]{}!#^~")  # what means something to bash outside of quotes


class WholeOptions(ShellComplete):
    """A shell that gets an option with its value where it asked for both in one word."""

    def get_completions(self, args: list[str], incomplete: str) -> "list[CompletionItem[Any]]":
        """Put the option before each of its values."""
        option, equals, _ = incomplete.partition("=")
        found = super().get_completions(args, incomplete)
        if not (equals and option.startswith("--")):
            return found
        return [CompletionItem(f"{option}={item.value}", item.type, item.help) for item in found]


class Line(NamedTuple):
    """A line of bash up to the cursor."""

    words: list[str]
    typed: str  # the word at the cursor, without its quotes
    kept: int  # so many characters of it stay whatever is answered: bash takes the rest for a word of its own
    quote: str  # that is open at the cursor


class Bash(WholeOptions, BashComplete):
    """bash, with names that hold what it splits words at."""

    name = "bash"
    source_template = _BASH

    @staticmethod
    def _check_version() -> None:
        """Do not ask bash for its version: the script may be for another machine."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Take the words, and the one that is being typed, from the line up to the cursor."""
        self._line = line_of(os.environ.get("_ONIONSKIN_LINE", ""), os.environ.get("_ONIONSKIN_BREAKS", ""))
        return self._line.words[1:], self._line.typed

    def format_completion(self, item: "CompletionItem[Any]") -> str:
        """Leave out what bash keeps, and quote the rest."""
        value = str(item.value).removeprefix(self._line.typed[: self._line.kept])
        return f"{item.type},{quoted(value, self._line.quote)}"


def quoted(value: str, quote: str) -> str:
    """Quote a value as bash wants it, where a quote is open or none is."""
    if quote == "'":
        return value.replace("'", "'\\''")
    home = "~" if value.startswith("~/") and not quote else ""
    to_escape = '"$`\\' if quote else _ESCAPED
    return home + "".join(f"\\{one}" if one in to_escape else one for one in value[len(home) :])


def line_of(text: str, breaks: str) -> Line:
    """Take a line of bash apart, as bash does, where words break at some characters too."""
    words: list[str] = []
    typed: str | None = None  # None between words
    kept = before = 0
    quote = ""
    characters = iter(text)
    for character in characters:
        if not quote and character.isspace():
            if typed is not None:
                words.append(typed)
            typed, kept = None, 0
            continue
        typed = typed or ""
        if character == quote:
            quote, kept = "", before
        elif not quote and character in "'\"":
            quote, before, kept = character, kept, len(typed)
        elif character == "\\" and quote != "'":
            following = next(characters, "")
            typed += following if not quote or following in ('"', "\\", "$", "`") else character + following
        else:
            typed += character
            if not quote and character in breaks:
                kept = len(typed) - (character == "@")  # which bash leaves at the beginning of the word behind it
    return Line(words, typed or "", kept, quote)


class Zsh(WholeOptions, ZshComplete):
    """zsh, which completes paths behind an option of the same word too."""

    name = "zsh"
    source_template = ZshComplete.source_template.replace("_path_files", "compset -P 1 '--*='; _path_files")

    def format_completion(self, item: "CompletionItem[str]") -> str:
        """Write a home out: zsh would quote its ~."""
        if item.type == "plain" and item.value.startswith("~"):
            item = CompletionItem(os.path.expanduser(item.value), item.type, item.help)  # noqa: PTH111 - as the shell does
        return super().format_completion(item)


class Fish(WholeOptions, FishComplete):
    """fish, with names that hold a comma."""

    name = "fish"
    source_template = _FISH


for shell in (Bash, Zsh, Fish):
    add_completion_class(shell)
