"""Does `shell_options.toml` say of options what the tools of this machine say? `python benchmarks/shell_options.py`

Reads `COMMAND --help`, and `git COMMAND -h` for git, of the installed tools that print it in GNU's way. Prints options that the
table has and the tool has not, and those of which both differ in whether they take a value. Other versions may differ rightly.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from nemo_pivotrl.verifiers.shell_options import Options, option_table

OTHERS = ("apt", "aws", "docker", "git diff", "git log", "git show", "kubectl", "npm", "pytest", "rg", "wget")
"""Tools whose help has another form, or not all options; their rows come from their manuals."""
LINE = re.compile(r"^\s{1,8}(-\S.*)$")
LONG = re.compile(r"--(?:\[no-\])?([A-Za-z0-9][\w-]*)(.*)")


def told(command: str) -> dict[str, str]:
    """Option to what follows it (`=`: a value, `?`: one after `=` alone, '': none), as the tool's own help says."""
    flag = "-h" if command.startswith("git ") else "all" if command == "curl" else ""
    asked = [*command.split(), *(["--help", flag] if flag == "all" else [flag or "--help"])]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False)
    found: dict[str, str] = {}
    for line in (answer.stdout + answer.stderr).splitlines():
        shown = LINE.match(line)
        if not shown:
            continue
        spec = re.split(r"\s{2,}|\t", shown[1])[0]
        names, value = [], ""
        for part in (part.strip() for part in spec.split(",")):
            long, short = LONG.fullmatch(part), re.fullmatch(r"-(\w)(.*)", part)
            rest = (long[2] if long else short[2] if short else "").strip()
            names += [long[1]] if long else [short[1]] if short else []
            value = value or ("?" if rest.startswith("[") else "=" if re.match(r"[=<(A-Z]", rest) else "")
        found |= dict.fromkeys(names, value)
    return found


def differences(command: str, options: Options) -> list[str]:
    """What the table and the tool do not agree on."""
    found = told(command)
    lines = []
    for name, chosen in options.names.items():
        ours = "=" if chosen in options.valued else "?" if chosen in options.optional else ""
        if name not in found and not (name.startswith("no-") and name[3:] in found):
            lines.append(f"{command}: {name} is not in its help")
        elif found.get(name, ours) != ours and not (len(name) == 1 and name in options.glued):
            lines.append(f"{command}: {name} has {ours or 'no value'} here and {found[name] or 'no value'} there")
    return lines


def main() -> int:
    table = option_table()
    installed = [command for command in table if shutil.which(command.split()[0]) and not command.startswith(OTHERS)]
    lines = [line for command in installed for line in differences(command, table[command])]
    print("\n".join(lines))
    print(f"{len(installed)} of {len(table)} commands looked at, {len(lines)} differences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
