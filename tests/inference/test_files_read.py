"""How many files of the library a plain chat reads: no retrieval, no moderation, no server."""

import os
import subprocess
import sys

from openchatkit.paths import ROOT

LIMIT = 60
CHAT = """
import sys
from openchatkit.inference.bot import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
names = [name for name in sys.modules if name.partition(".")[0] == "openchatkit"]
print(*sorted(names), sep="\\n", file=sys.stderr)
"""


def test_a_plain_chat_reads_few_files_of_the_library(random_models):
    flags = ["--model", str(random_models["neox"]), "--max-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-c", CHAT, *flags],
        input="hello\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line for line in done.stderr.splitlines() if line.partition(".")[0] == "openchatkit"]
    assert "openchatkit.inference.engine.engine" in names
    assert len(names) <= LIMIT, "\n".join(names)
