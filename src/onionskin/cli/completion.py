"""Completion in bash, zsh and fish.

click's own scripts serve zsh and fish. bash splits words at '@', so click's script would complete the part behind it
alone. The script here passes the whole line up to the cursor, and removes the part that bash keeps from the answers.
"""

import os

from click.shell_completion import BashComplete, add_completion_class, split_arg_string

_SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n' line type value typed kept=""
    local before="${COMP_LINE:0:COMP_POINT}"
    typed="${before##*[[:space:]]}"
    [[ $COMP_WORDBREAKS == *@* && $typed == *@* ]] && kept="${typed%%@*}"
    COMPREPLY=()
    for line in $(_ONIONSKIN_LINE="$before" %(complete_var)s=bash_complete %(prog_name)s); do
        type="${line%%%%,*}"
        value="${line#*,}"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$kept"}") ;;
        esac
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """bash, with names that hold an '@'."""

    name = "bash"
    source_template = _SCRIPT

    @staticmethod
    def _check_version() -> None:
        """Do not ask bash for its version: the script may be for another machine."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Take the words, and the one that is being typed, from the line up to the cursor."""
        line = os.environ.get("_ONIONSKIN_LINE", "")
        words = split_arg_string(line)[1:]
        if line[-1:].isspace() or not words:
            return words, ""
        return words[:-1], words[-1]


add_completion_class(Bash)
