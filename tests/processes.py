"""Fresh interpreters, for what can only be seen in one."""

import json
import subprocess
import sys
from typing import Any


def run(code: str) -> Any:
    """Run code in a new interpreter and return the JSON that it prints."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)
