"""Look the installed packages up among known vulnerabilities: ``python -m tools.audit``; needs pip-audit and a network.

Exit code 1: a package has one that a release mends. Whatever else is known, or could not be asked for, is said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

COMMAND = ("-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off", "--format", "json")


def judge(packages: Iterable[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Return the exit code and what to say about pip-audit's ``dependencies``."""
    listed = list(packages)
    known = [package for package in listed if package.get("vulns")]
    asked = [package for package in listed if "skip_reason" not in package]
    if known:
        # Nobody can act on what no release mends yet, so it stops nothing.
        mended = any(found.get("fix_versions") for package in known for found in package["vulns"])
        return int(mended), [f"{package['name']} {package['version']}: {_names(package)}" for package in known]
    if not asked:
        return 0, ["audit skipped: no package could be looked up; run it again with a network"]
    left = sorted(package["name"] for package in listed if "skip_reason" in package)
    note = f"; could not be looked up: {', '.join(left)}" if left else ""
    return 0, [f"audit: nothing known against {len(asked)} packages{note}"]


def _names(package: Mapping[str, Any]) -> str:
    fixed = sorted({version for found in package["vulns"] for version in found.get("fix_versions", ())})
    names = ", ".join(sorted(found["id"] for found in package["vulns"]))
    return f"{names}; fixed in {', '.join(fixed) or 'no release yet'}"


def main() -> int:
    """Audit the environment that runs this."""
    done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, check=False)
    try:
        code, lines = judge(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError):
        # Without a network pip-audit ends with a traceback instead of a document.
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        code, lines = 0, [f"audit skipped: pip-audit gave no answer ({reason[:160]})"]
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
