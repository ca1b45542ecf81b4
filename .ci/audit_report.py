"""Print what pip-audit found, from its JSON report: a line for each known vulnerability.

.ci/audit_report.py REPORT
"""

import json
import sys
from pathlib import Path

for package in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["dependencies"]:
    for found in package.get("vulns", []):
        fixed = ", ".join(found["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
