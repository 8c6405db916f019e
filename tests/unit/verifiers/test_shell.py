"""Shell commands as `functional` compares them: what the lexer reads, which commands are the same, and which are not."""

from __future__ import annotations

import shlex
import time

import pytest
from hypothesis import assume, example, given, settings, strategies as st

from nemo_pivotrl.config import Limits
from nemo_pivotrl.verifiers.bounds import LimitExceeded
from nemo_pivotrl.verifiers.functional import RULES
from nemo_pivotrl.verifiers.shell import MAX_CHARS, _read, read_command
from nemo_pivotrl.verifiers.shell_lexer import ACTIVE, BEGIN, END, WHOLE, Lexer

ALL = frozenset(rule for rule, (on, _) in RULES.items() if on)


def words(text: str) -> list[str]:
    """Words and operators as read, quotes taken away; marks of what is special shown as !, <, >."""
    shown = str.maketrans({ACTIVE: "!", BEGIN: "<", END: ">", WHOLE: "^"})
    return [token.op or token.word.translate(shown) for token in Lexer(text).read()]


def same(left: str, right: str, rules: frozenset[str] = ALL, directory: str | None = None) -> bool:
    """Whether two commands have one form."""
    ours, theirs = (read_command(text, rules, lambda units: None, directory)[0] for text in (left, right))
    return ours == theirs


# ---- the lexer ----


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("ls  -la\tsrc", ["ls", "-la", "src"]),
        ("", []),
        ("# nothing", []),
        ("ls # all", ["ls"]),
        ("echo a#b '#c'", ["echo", "a#b", "#c"]),
        ("a&&b||c;d|e&", ["a", "&&", "b", "||", "c", ";", "d", "|", "e", "&"]),
        ("a\nb", ["a", "\n", "b"]),
        ("a \\\n b", ["a", "b"]),
        ("ab\\\ncd", ["abcd"]),
        ("'a b' \"c d\" e\\ f", ["a b", "c d", "e f"]),
        ("a'b'\"c\"d", ["abcd"]),
        ("'' \"\"", ["", ""]),
        ("'*' * \\*", ["*", "!*", "*"]),
        ("~/a '~/a' a~", ["!~/a", "~/a", "a~"]),
        ("x=~/a --y=~", ["x=!~/a", "--y=!~"]),
        ("{a,b} '{a,b}' {} x{0} {1..2} {a..b", ["!{a,b}", "{a,b}", "{}", "x{0}", "!{1..2}", "{a..b"]),
        ("[ a ] [ab] '[ab]'", ["[", "a", "]", "![ab]", "[ab]"]),
        ("$(a 'b  c' \"$(d ')')\")", ["<(a 'b  c' \"$(d ')')\")>"]),
        ("$x ${x} \"$x\" '$x' \\$x", ["<x>", "<x>", "^x>", "$x", "$x"]),
        ("$x1 ${x}1 $11", ["<x1>", "<x>1", "<1>1"]),
        ("$? $# $@ $", ["<?>", "<#>", "<@>", "$"]),
        ("$(a  b) `a b`", ["<(a b)>", "<(a b)>"]),
        ("$((1 + 2)) ${x:-a  b}", ["<((1 + 2))>", "<{x:-a  b}>"]),
        ("$(a $(b) c)", ["<(a $(b) c)>"]),
        ('"a\\b\\"c\\$d"', ['a\\b"c$d']),
        ("a 2>&1 >b <c", ["a", "2", ">&", "1", ">", "b", "<", "c"]),
        ("echo 2 >b", ["echo", "2", ">", "b"]),
        ("a &>b", ["a", "&>", "b"]),
        ("cat <<E\na\nE\nls", ["cat", "<<", "", "\n", "ls"]),
        ("cat <<'E'\n$a\nE", ["cat", "<<", "'", "\n"]),
    ],
)
def test_the_lexer_reads_words_operators_and_what_is_special_in_them(text: str, read: list[str]) -> None:
    assert words(text) == read


@pytest.mark.parametrize(
    "text",
    [
        "'a",
        '"a',
        "`a",
        "$(a",
        "${a",
        "$(a 'b)",
        "$(case x in a) b;; esac)",
        "$(a # b)",
        "`a \\`b\\` c`",
        "$'a\\n'",
        "cat <<E\na",
        "cat <<E",
        "a\0b",
        "a\ue000b",
    ],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"closing|quot|quotes|here-document|private|inside an expansion"):
        Lexer(text).read()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\ue000\ue001\ue002"))))
def test_words_that_shlex_quotes_are_read_back(given_words: list[str]) -> None:
    assert [t.word for t in Lexer(shlex.join(given_words)).read()] == given_words


# ---- the same ----


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("ls -la", "ls  -l   -a"),
        ("ls -la", "ls -al # all of them"),
        ("ls -la src", "ls src -la"),
        ("rm -rf build", "rm -fr ./build"),
        ("rm -rf a b", "rm a b -r -f"),
        ("rm -rf a b", "rm -rf b a"),
        ("cp -rp a b", "cp -p -r a b"),
        ("mkdir -p a/b", "mkdir -p a/b/"),
        ("cat -nA f", "cat -A -n f"),
        ("wc -lw f", "wc -w -l f"),
        ("head -20 f", "head -n 20 f"),
        ("head -n20 f", "head -n 20 f"),
        ("tail -fn5 f", "tail -f -n 5 f"),
        ("grep -rn 'foo' src", 'grep -nr "foo" src'),
        ("grep -rn foo src/", "grep -n -r foo ./src"),
        ("grep --include='*.py' -r foo .", "grep -r foo --include '*.py' ."),
        ("grep -A3 foo f", "grep -A 3 foo f"),
        ("sort -k2 -n f", "sort -n -k 2 f"),
        ("tar -xzf a -C d", "tar -C d -xzf a"),
        ("sed -n 5,10p f", "sed -n '5,10p' f"),
        ("find . -name '*.py'", 'find ./ -name "*.py"'),
        ("python -m pytest -q", "python  -m  pytest  -q"),
        ("python3.11 ./a.py", "python3.11 a.py"),
        ("pytest -k 'a and b' tests", 'pytest tests -k "a and b"'),
        ("pytest --maxfail=1 -q", "pytest -q --maxfail 1"),
        ("tool --x=1 --y", "tool --x 1 --y"),
        ("git commit -m 'a b'", 'git commit -m "a b"'),
        ("NO_COLOR=1 pytest", "pytest"),
        ("FOO=1 BAR=2 make", "BAR=2 FOO=1 make"),
        ("find . -exec rm {} \\;", "find . -exec rm '{}' ';'"),
        ("find -name x", "find . -name x"),
        ("find . -not -name x -a -type f", "find . ! -name x -type f"),
        ("find . -type d -print", "find . -type d"),
        ("X=$y make", 'X="$y" make'),
        ("make > out 2>err", "make 2> err > out"),
        ("make > out", "make >out"),
        ("make >out 2>&1", "make > ./out 2>&1"),
        ("a\nb\n", "a; b"),
        ("a\n\n\nb", "a\nb"),
        ("a &&\nb", "a && b"),
        ("a;", "a"),
        ("echo $HOME", "echo ${HOME}"),
        ("echo $(date +%s)", "echo `date +%s`"),
        ("for i in 1 2; do echo $i; done", "for i in 1 2\ndo\n    echo $i\ndone"),
        ("if a; then\n b\nelse\n c\nfi", "if a; then b; else c; fi"),
        ("f() {\n a\n}", "f() { a; }"),
        ("(cd a && b)", "( cd a && b )"),
        ("cat <<EOF > f\na\nEOF", "cat > f <<X\na\nX"),
        ("cat <<'EOF'\na\nEOF", "cat <<EOF\na\nEOF"),
        ("cat <<-EOF\n\ta\nEOF", "cat <<EOF\na\nEOF"),
        ("ls -la | grep foo", "ls -a -l|grep foo"),
        ("ls\r\n", "ls"),
    ],
)
def test_these_commands_are_the_same(left: str, right: str) -> None:
    assert same(left, right)


# ---- not the same ----


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("grep -rn foo src", "rm -rf /"),
        ("ls", "ls -a"),
        ("ls -la", "ls -lA"),
        ("ls a b", "ls b a"),
        ("ls", "X=$(rm -rf ~) ls"),
        ("cd /repo && ls", "ls"),
        ("cd src && cat a.py", "cat src/a.py"),
        ("cd /repo > f && ls", "cd /repo && ls"),
        ("FOO=1 pytest", "pytest"),
        ("GIT_PAGER='rm x' git log", "git log"),
        ("NO_COLOR=$(x) pytest", "pytest"),
        ('rm "$x"', "rm $x"),
        ("rm -i -f a", "rm -f -i a"),
        ("mytool --x 1 --y 2", "mytool --y 2 --x 1"),
        ("mkdir a a/b", "mkdir a/b a"),
        ("rm -rf build", "rm -rf build/"),
        ("find . -name -a", "find . -name"),
        ("find . -name x -o -name y -print", "find . -name x -o -name y"),
        ("find . -exec echo -not {} \\;", "find . -exec echo ! {} \\;"),
        ("find . -ls -print", "find . -ls"),
        ("find . -print -print", "find . -print"),
        ("find -L x", "find x"),
        ("cat a/../b", "cat b"),
        ("a && true; ls", "a && ls"),
        ("a; true", "a"),
        ("cat -n f | head", "head f"),
        ("cat f | wc -l", "wc -l f"),
        ("rm -r a", "rm -r b"),
        ("rm -rf a", "rm -rf a b"),
        ("rm -rf '*'", "rm -rf *"),
        ("rm -rf */", "rm -rf *"),
        ("rm '~/a'", "rm ~/a"),
        ("rm $x/../y", "rm y"),
        ("rm a b", "rm 'a b'"),
        ("rm a ''", "rm a"),
        ("echo '$HOME'", "echo $HOME"),
        ("echo \\$HOME", "echo $HOME"),
        ("echo $ab", "echo ${a}b"),
        ("echo $10", "echo ${10}"),
        ("echo $(a\nb)", "echo $(a b)"),
        ('echo "${x:-a  b}"', 'echo "${x:-a b}"'),
        ("X=~/a make", "X='~/a' make"),
        ("echo a", "echo A"),
        ("echo a//b", "echo a/b"),
        ("head -n 5 f", "head -n 50 f"),
        ("head -5 f", "head -c 5 f"),
        ("grep -15 foo f", "grep -51 foo f"),
        ("grep -n15 foo f", "grep -n51 foo f"),
        ("kill -15 1", "kill -51 1"),
        ("kill -INT 1", "kill -TIN 1"),
        ("grep 'a//b' f", "grep 'a/b' f"),
        ("grep -e a//b f", "grep -e a/b f"),
        ("grep a b", "grep b a"),
        ("sed 's/a/./g' f", "sed 's/a/g/' f"),
        ("sed -i.bak s/a/b/ f", "sed -i.kab s/a/b/ f"),
        ("sed -i.bak s/a/b/ f", "sed -i s/a/b/ f"),
        ("perl -pe s/a/./g f", "perl -pe s/a/g f"),
        ("jq '.a//.b' f", "jq '.a/.b' f"),
        ("python -c 'print(7//2)'", "python -c 'print(7/2)'"),
        ("python -c 7//2", "python -c 7/2"),
        ("bc <<< 7//2", "bc <<< 7/2"),
        ("cat <<E\n7//2\nE", "cat <<E\n7/2\nE"),
        ("cat <<E\na b\nE", "cat <<E\na  b\nE"),
        ("cat <<'E'\n$a\nE", "cat <<E\n$a\nE"),
        ("curl http://a/b//c", "curl http://a/b/c"),
        ("sort -k1 -k2 f", "sort -k2 -k1 f"),
        ("find . -name a -delete", "find . -delete -name a"),
        ("timeout 5 find . -name a -delete", "timeout 5 find . -delete -name a"),
        ("sudo find . -name a -delete", "sudo find . -delete -name a"),
        ("rsync -a --include=a --exclude=* s d", "rsync -a --exclude=* --include=a s d"),
        ("rsync a/ b", "rsync a b"),
        ("tar -cf a -C d x -C e y", "tar -cf a -C d -C e x y"),
        ("gcc a.o -lx -ly", "gcc a.o -ly -lx"),
        ("git commit -m a -m b", "git commit -m b -m a"),
        ("foo -- -x", "foo -x --"),
        ("foo -x 1 -y 2", "foo -x 2 -y 1"),
        ("foo -x a", "foo a -x"),
        ("foo --x=1", "foo --x=2"),
        ("foo ./-x", "foo -x"),
        ("xargs ./-x", "xargs -x"),
        ("FOO=1 make", "FOO=2 make"),
        ("PATH=/x make", "make"),
        ("LD_PRELOAD=/x make", "make"),
        ("HOME=/x make", "make"),
        ("PYTHONPATH=/x make", "make"),
        ("'FOO=1' make", "FOO=1 make"),
        ("FOO=1", "FOO=2"),
        ("A=1 x; y", "x; A=1 y"),
        ("cd /a && ls", "cd /b && ls"),
        ("cd / && rm -rf *", "rm -rf *"),
        ("cd .. && ls", "ls"),
        ("cd src && ls", "ls"),
        ("cd /a && cat f", "cat /b/f"),
        ("cd /a", "ls"),
        ("cd /a || ls", "ls"),
        ("a && b", "a || b"),
        ("a && b", "a; b"),
        ("a; b", "b; a"),
        ("a | b", "b | a"),
        ("a &", "a"),
        ("a & b", "a && b"),
        ("a > f", "a >> f"),
        ("a > f", "a < f"),
        ("a >f >g", "a >g >f"),
        ("a 2>&1 >f", "a >f 2>&1"),
        ("a 2>f", "a 1>f"),
        ("a 2>f", "a 2 >f"),
        ("a &>f", "a >f"),
        ("if x; then echo do; rm y; fi", "if x; then echo do rm y; fi"),
        ("if x; then a; fi", "if x; then b; fi"),
        ("if x; then a; fi", "while x; do a; done"),
        ("for i in a b; do c; done", "for i in b a; do c; done"),
        ("(a; b) > f", "a; (b) > f"),
        ("echo 'a b", "echo 'a  b"),
        ("echo $'a\\n'", "echo $'a\\t'"),
        ("ls", ""),
        ("echo a\\\\b", "echo ab"),
    ],
)
def test_these_commands_are_not_the_same(left: str, right: str) -> None:
    assert not same(left, right)


def test_each_shell_rule_switched_off_accepts_less_and_never_more() -> None:
    pairs = [
        ("ls -la", "ls -l -a"),
        ("ls -l -a", "ls -a -l"),
        ("a\nb", "a; b"),
        ("for i in 1\ndo a\ndone", "for i in 1; do a; done"),
        ("echo 'a'", "echo a"),
        ("NO_COLOR=1 ls", "ls"),
        ("tool --x=1", "tool --x 1"),
        ("ls ./a", "ls a"),
        ("rm a b", "rm b a"),
        ("true; ls", "ls"),
    ]
    needed = set()
    for pair in pairs:
        for rule in (r for r in RULES if r.startswith("shell_")):
            assert not (same(*pair, ALL - {rule}) and not same(*pair)), (pair, rule)
            needed |= {rule} if same(*pair) and not same(*pair, ALL - {rule}) else set()
    assert needed == {rule for rule in RULES if rule.startswith("shell_")} - {"shell_cd_prefix"}


def test_a_cd_to_where_the_shell_is_known_to_be_does_nothing_and_any_other_does() -> None:
    for program in ("cd /repo && make", "cd /repo/; make", "cd /repo && cd /repo && make"):
        assert same(program, "make", directory="/repo") and not same(program, "make")
        assert not same(program, "make", ALL - {"shell_cd_prefix"}, "/repo")
    for program in (
        "cd /other && make",
        "cd repo && make",
        "cd /repo > f && make",
        "X=1 cd /repo && make",
        "cd /repo || make",
    ):
        assert not same(program, "make", directory="/repo"), program


# ---- properties: sound rewritings are accepted, changes are not ----

WORD = st.text(st.sampled_from("abcXYZ019_.,:+@%"), min_size=1, max_size=8)
ODD_WORD = st.text(st.sampled_from("ab /*?~$'\"\\;|&<>()#{}[]!\n\t=`é"), min_size=1, max_size=8)
FLAGS = {"ls": "laRt", "rm": "rfv", "cp": "rpv", "grep": "rnilv", "cat": "nAE", "wc": "lwc", "sort": "nru", "du": "sh"}
OTHER_COMMAND = st.sampled_from(["make", "./run.sh", "frobnicate", "echo", "git", "docker"])


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """The words of a command: its name, flags in one cluster, operands."""
    name = draw(st.sampled_from(sorted(FLAGS)) | OTHER_COMMAND)
    flags = draw(st.lists(st.sampled_from(FLAGS[name]), unique=True, max_size=3)) if name in FLAGS else []
    return [name, *(["-" + "".join(flags)] if flags else []), *draw(st.lists(WORD | ODD_WORD, max_size=4))]


def double_quoted(word: str) -> str:
    return '"' + "".join("\\" + c if c in '\\"$`' else c for c in word) + '"'


def single_quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def escaped(word: str) -> str:
    return "".join(c if c.isalnum() else f"'{c}'" if c == "\n" else "\\" + c for c in word) or "''"


QUOTINGS = st.sampled_from([shlex.quote, single_quoted, double_quoted, escaped])


@settings(max_examples=200, deadline=None)
@given(commands(), st.data())
def test_requoting_words_and_spacing_them_out_changes_nothing(parts: list[str], data: st.DataObject) -> None:
    head, rest = parts[0], parts[1:]
    written = [data.draw(QUOTINGS)(word) for word in rest]
    blanks = data.draw(st.lists(st.sampled_from([" ", "  ", "\t", " \\\n "]), min_size=len(rest), max_size=len(rest)))
    assert same(shlex.join(parts), head + "".join(b + w for b, w in zip(blanks, written, strict=True)))


@settings(max_examples=150, deadline=None)
@given(commands(), st.randoms(use_true_random=False))
def test_a_cluster_of_flags_may_be_taken_apart_and_shuffled(parts: list[str], random: object) -> None:
    assume(len(parts) > 1 and parts[0] in FLAGS and parts[1].startswith("-"))
    assume(all(not word.startswith("-") for word in parts[2:]))
    flags = ["-" + letter for letter in parts[1][1:]]
    shuffled = random.sample(flags, len(flags))  # type: ignore[attr-defined]
    assert same(shlex.join(parts), shlex.join([parts[0], *shuffled, *parts[2:]]))
    assert same(shlex.join(parts), shlex.join([parts[0], *parts[2:], *shuffled]))
    assert not same(shlex.join(parts), shlex.join([parts[0], *flags[1:], *parts[2:]]))


@settings(max_examples=250, deadline=None)
@example(["grep", "a/b"], 1, 2, "/")
@example(["sed", "s/a/./g"], 1, 4, "x")
@given(commands(), st.integers(0, 5), st.integers(0, 7), st.sampled_from("qQ7_*;$/."))
def test_another_character_in_a_word_is_another_command(parts: list[str], which: int, at: int, new: str) -> None:
    which %= len(parts)
    word = parts[which]
    at %= len(word)
    changed = word[:at] + new + word[at + 1 :]
    assume(changed != word and "/" not in word + new and word.strip() == word)
    assert not same(shlex.join(parts), shlex.join([*parts[:which], changed, *parts[which + 1 :]]))


@settings(max_examples=150, deadline=None)
@given(commands(), commands(), st.sampled_from(["&&", "||", ";", "|", "&"]), st.sampled_from(["&&", "||", ";", "|"]))
def test_the_operator_between_two_commands_counts(one: list[str], two: list[str], first: str, second: str) -> None:
    left, right = shlex.join(one), shlex.join(two)
    assert same(f"{left} {first} {right}", f"{left}{first}{right}")
    assert same(f"{left} {first} {right}", f"{left} {second} {right}") == (first == second)
    assert same(f"{left}; {right}", f"{right}; {left}") == same(left, right)


FRAGMENTS = [
    "ls",
    "-la",
    "'",
    '"',
    "`",
    "$(",
    ")",
    "${",
    "}",
    "<<E\n",
    "\nE\n",
    "\\",
    "$x",
    "|",
    "&&",
    ";",
    "\n",
    ">",
    "2>&1",
]
FRAGMENTS += [
    "cd x && ",
    "A=1 ",
    "if ",
    "then ",
    "fi",
    "for i in ",
    "do ",
    "done",
    "*",
    "~",
    "#",
    "((",
    "[[",
    "\ue000",
    "\0",
    "\ud800",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join),
)
def test_any_two_texts_get_an_answer_and_every_text_is_itself(left: str, right: str) -> None:
    assert same(left, left) and isinstance(same(left, right), bool)
    assert left.endswith("\\") or same(left, f"{left} \n")


# ---- what it costs ----

LONG = [
    "a " * (MAX_CHARS // 2),
    "a|" * (MAX_CHARS // 2),
    "a;" * (MAX_CHARS // 2),
    "a\n" * (MAX_CHARS // 2),
    "$(" * (MAX_CHARS // 2),
    "$x" * (MAX_CHARS // 2),
    "${x}" * (MAX_CHARS // 4),
    "$(a)" * (MAX_CHARS // 4),
    "`a`" * (MAX_CHARS // 3),
    "'" * MAX_CHARS,
    '"a"' * (MAX_CHARS // 3),
    "\\" * MAX_CHARS,
    "(" * MAX_CHARS,
    "<<a " * (MAX_CHARS // 4),
    "<<a " * 500 + "\n" + "a\n" * 3000,
    "A=1 " * (MAX_CHARS // 4),
    "".join(f"A{i}=1 " for i in range(1000)) + "ls",
    "".join(f"A{i}=1 ls;" for i in range(600)),
    "ls " + "-a " * (MAX_CHARS // 4),
    "ls -" + "abcdefgh" * (MAX_CHARS // 9),
    "foo " + "--x=1 " * (MAX_CHARS // 7),
    "cat " + "./a/../" * (MAX_CHARS // 8),
    "cat " + "/" * (MAX_CHARS - 9) + "a",
    "cd a && cat " + "./b " * (MAX_CHARS // 5),
    "if a; then " * (MAX_CHARS // 11),
    "a >b " * (MAX_CHARS // 5),
    "2>&1 " * (MAX_CHARS // 5),
    "\ud800" * MAX_CHARS,
    "\U0001f600 " * (MAX_CHARS // 2),
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_the_longest_command_that_is_read_costs_less_than_a_tenth_of_a_second(text: str) -> None:
    spent = [0]

    def spend(units: int) -> None:
        spent[0] += units

    other = text[:-2] + ("x" if text[-2] != "x" else "y") + text[-1]
    fastest = []
    for actual in (
        text[: MAX_CHARS // 2],
        other[:MAX_CHARS],
        f"cd q && Q=1 {text}"[:MAX_CHARS],
        f"{text[:999]} # all rules",
    ):
        times = []
        expected = text[:999] if actual.endswith("rules") else text[:MAX_CHARS]
        for _ in range(3):
            begun = time.thread_time()
            for command in (expected, actual):
                _read.cache_clear()
                read_command(command, ALL, spend)
            times.append(time.thread_time() - begun)
            if times[-1] < 0.05:
                break
        fastest.append(min(times))
    print(f"{1000 * max(fastest):.1f} ms")
    assert max(fastest) < 0.3  # 0.1 is the aim; a busy machine gets three times that
    assert spent[0] > 0


def test_a_longer_command_is_compared_as_text_and_work_is_counted() -> None:
    text = "echo " + "a" * MAX_CHARS
    assert same(text, text) and not same(text, text.replace(" ", "  "))

    def nothing_left(units: int) -> None:
        if units > Limits().max_work // 10:
            raise LimitExceeded("spent")

    with pytest.raises(LimitExceeded):
        read_command("echo a" * 1000, ALL, nothing_left)
