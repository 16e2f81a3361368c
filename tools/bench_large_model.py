"""Seconds and peak memory of every command on one large model, each in a process of its own.

    python -m tools.bench_large_model MODEL.onnx --output FOLDER [--onnxslim PYTHON] [--only NAME,...]

``anonymous`` is the peak of memory that only swapping could free (RssAnon); ``resident`` adds the pages of mapped
files, which the system takes back at need (VmRSS). Child processes count.
``decompose`` is rewrite without running either model: everything up
to the written file. PYTHON is an interpreter that has onnxslim installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTERVAL = 0.02

_DECOMPOSE = """
import sys, pathlib
import numpy as np
from onnx_decompose.analysis.criteria import make_criterion
from onnx_decompose.planning.cost import CPU
from onnx_decompose.decomposition.decompose import attempt, rewritten_model
from onnx_decompose.decomposition.gather import gather_all
from onnx_decompose.model.metadata import write_decomposition
from onnx_decompose.model.model_io import load_model, save_model
from onnx_decompose.options import Options
from onnx_decompose.graph.study import study_model
source, output = map(pathlib.Path, sys.argv[1:])
study = study_model(load_model(source))
evidence = gather_all(study, Options(null="zero"))
tried = attempt(study, evidence, make_criterion("fdr", 0.01), cost=CPU, emit="auto", rng=np.random.default_rng(0))
assert tried.rewrites, "nothing to rewrite"
model, decomposition = rewritten_model(tried, 0.0)
write_decomposition(model.proto, decomposition, "0")
save_model(model.proto, output, data_from=study.model)
"""
_LOAD_SAVE = """
import sys, onnx
model = onnx.load(sys.argv[1])
onnx.save(model, sys.argv[2], save_as_external_data=True, location="plain.data")
"""
_SLIM = (
    "import sys, onnxslim; onnxslim.slim(sys.argv[1], sys.argv[2], save_as_external_data=True)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a process took.

    Attributes:
        code: its exit code.
        seconds: wall-clock time.
        anonymous: peak of RssAnon in bytes.
        resident: peak of the resident set in bytes.
        last: last line that it printed.
    """

    code: int
    seconds: float
    anonymous: int
    resident: int
    last: str


def measured(command: list[str]) -> Usage:
    """Run ``command`` and watch its memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    anonymous = resident = 0
    while process.poll() is None:
        statuses = list(_statuses(process.pid))
        anonymous = max(anonymous, sum(_field(status, "RssAnon") for status in statuses))
        resident = max(resident, sum(_field(status, "VmRSS") for status in statuses))
        time.sleep(_INTERVAL)
    output, _ = process.communicate()
    lines = output.strip().splitlines() or [""]
    return Usage(
        process.returncode, time.perf_counter() - start, anonymous, resident, lines[-1]
    )


def _statuses(number: int) -> Iterator[str]:
    """The status of a process and of all its children, as long as they are there."""
    try:
        yield Path(f"/proc/{number}/status").read_text("ascii", "replace")
        children = Path(f"/proc/{number}/task/{number}/children").read_text("ascii").split()
    except OSError:
        return
    for child in children:
        yield from _statuses(int(child))


def _field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--onnxslim", help="interpreter that has onnxslim")
    parser.add_argument("--only", default="analyze,decompose,rewrite,onnx,onnxslim")
    options = parser.parse_args()
    data = options.model.parent.glob(f"{options.model.name}*")
    size = sum(path.stat().st_size for path in data)
    python, source = sys.executable, str(options.model)
    cli = [python, "-c", "from onnx_decompose.cli import main; main()"]
    commands = {
        "analyze": [*cli, "analyze", source, "--quiet", "--null", "zero"],
        "decompose": [python, "-c", _DECOMPOSE, source],
        "rewrite": [
            *cli,
            "rewrite",
            source,
            "--quiet",
            "--null",
            "zero",
            "--batch",
            "1,16",
            "-o",
        ],
        "onnx": [python, "-c", _LOAD_SAVE, source],
        "onnxslim": [options.onnxslim or python, "-c", _SLIM, source],
    }
    print(f"{options.model}: {size / 2**30:.2f} GiB\n")
    print(
        "| command | seconds | peak anonymous GiB | of the model | peak resident GiB | of the model | outcome |"
    )
    print("|---|---|---|---|---|---|---|")
    failed = False
    for name in options.only.split(","):
        command = list(commands[name])
        if name != "analyze":
            (options.output / name).mkdir(parents=True, exist_ok=True)
            command.append(str(options.output / name / "out.onnx"))
        usage = measured(command)
        failed |= usage.code != 0
        print(
            f"| {name} | {usage.seconds:.1f} | {usage.anonymous / 2**30:.2f} | {usage.anonymous / size:.2f} "
            f"| {usage.resident / 2**30:.2f} | {usage.resident / size:.2f} | {usage.last} |",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(_main())
