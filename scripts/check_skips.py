"""Counts the tests of a pytest report and refuses skips that nobody allowed.

    python scripts/check_skips.py REPORT.xml tests/allowed_skips.txt

A test that skips itself proves nothing: each skip must match a line `node id glob | reason glob` of the allowed list.
Exits 1 on such a skip, on a failed test, and when no test ran at all. The last line is `N passed, N failed, N skipped`.
"""

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Outcome:
    node_id: str
    outcome: str  # passed, failed or skipped
    reason: str = ""

    def allowed_by(self, rules: list[tuple[str, str]]) -> bool:
        return any(fnmatchcase(self.node_id, node) and fnmatchcase(self.reason, reason) for node, reason in rules)


def read_report(path: Path) -> list[Outcome]:
    """The outcome of every test in a junit report of the xunit1 family; none when pytest died before writing one."""
    if not path.exists() or not path.stat().st_size:
        return []
    return [read_case(case) for case in ElementTree.parse(path).iter("testcase")]


def read_case(case: ElementTree.Element) -> Outcome:
    file = case.get("file", "")
    module = file.removesuffix(".py").replace("/", ".")
    classes = case.get("classname", "").removeprefix(module).strip(".").split(".")
    node_id = "::".join(part for part in (file, *classes, case.get("name", "")) if part)
    if case.find("failure") is not None or case.find("error") is not None:
        return Outcome(node_id, "failed")
    skipped = case.find("skipped")
    if skipped is not None:
        return Outcome(node_id, "skipped", skipped.get("message", ""))
    return Outcome(node_id, "passed")


def read_rules(path: Path) -> list[tuple[str, str]]:
    """The `(node id glob, reason glob)` pairs of an allowed list; "#" starts a comment line."""
    rules = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        node, bar, reason = (part.strip() for part in line.partition("|"))
        if not (node and bar and reason):
            raise SystemExit(f"{path}:{number}: expected `node id glob | reason glob`, found {line!r}")
        rules.append((node, reason))
    return rules


def verdict(outcomes: list[Outcome], rules: list[tuple[str, str]]) -> tuple[list[str], bool]:
    """The lines to print, the counts last, and whether everything is well."""
    counts = {kind: sum(test.outcome == kind for test in outcomes) for kind in ("passed", "failed", "skipped")}
    skips = [test for test in outcomes if test.outcome == "skipped"]
    refused = [test for test in skips if not test.allowed_by(rules)]
    lines = [f"{'NOT ALLOWED: ' if test in refused else ''}skipped {test.node_id}: {test.reason}" for test in skips]
    ran = counts["passed"] + counts["failed"]
    if not ran:
        lines.append("no test ran")
    lines.append(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return lines, bool(ran) and not counts["failed"] and not refused


def main() -> int:
    report, allowed = map(Path, sys.argv[1:])
    lines, well = verdict(read_report(report), read_rules(allowed))
    print(*lines, sep="\n")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
