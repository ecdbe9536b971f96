"""Measure everything `docs/results.md` shows of the readers' answers: `python -m benchmarks.make_tables --text BOOKS`.

Steps run side by side in processes of one thread, the most important first. Each keeps its journal in a folder of its own below
`--work`: started again, everything goes on where it was. The journals of a table are put together in `benchmarks/results`
whenever one of its steps ends, and the tables into the document.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.fill_results import DOCUMENT, RESULTS, fill
from qllm_bench import infinite, needle, policies, rag
from qllm_bench.journal import Journal

_COMMAND = "import sys; from qllm_runtime.cli import run; sys.exit(run(sys.argv[1:]))"
_REPORTS = {"needle": needle.report, "rag": rag.report, "policies": policies.report, "infinite": infinite.report}
#: Every family; the hard ones early, so that the eight questions of the longest document hold them.
_FAMILIES = "two_hop,passkey,multi,attribute,absent,kv,place,magic,job,code,relation"
_EIGHT = f"needle --needles 8 --families {_FAMILIES}"
_PLAIN = f"needle --model reader-plain --needles 8 --families {_FAMILIES}"
_MANY = f"needle --needles 100 --distractors 0 --families {_FAMILIES} --policy qllm"
_WORDED = "needle --needles 8 --families worded,worded_two_hop,worded_absent,worded_multi"
_NEAR = "--lengths 4k,16k --documents 6,16k=25"
_EVERYONE = "--policy qllm,oracle,infllm,streaming --order last"
_SWEEP = (
    "policies --families passkey,magic,attribute,place,code,job,relation --distractors 1 --tokens 4k --order last --documents 8"
    " --sweep policy,query_weight,summary,selection"
)


@dataclass(frozen=True)
class Step:
    """A run of one benchmark.

    Attributes:
        name: Its folder below `--work`.
        table: The folder of `benchmarks/results` that its rows belong to.
        command: Arguments of `qllm bench`, without --text and --out.
    """

    name: str
    table: str
    command: str

    @property
    def benchmark(self) -> str:
        """The benchmark; its journal has this name."""
        return self.command.split()[0]

    @property
    def reads_books(self) -> bool:
        """Whether its facts are hidden in the books; the stories of the first step are made on the spot."""
        return self.benchmark != "infinite" and self.name != "stories"


#: The most important first; seconds on one core at 8,000 tokens read per second.
STEPS = (
    Step("stories", ".", "needle --lengths 512,1k,4k"),  # 90
    Step("window", "books", f"{_EIGHT} --lengths 512 --documents 63 --policy full --order last,both"),  # 130
    Step("16k-once", "books", f"{_EIGHT} --lengths 512,4k,16k --documents 6,16k=25 {_EVERYONE}"),  # 350
    Step("64k-once", "books", f"{_EIGHT} --lengths 64k --documents 8 {_EVERYONE}"),  # 280
    Step("16k-again", "books", f"{_EIGHT} {_NEAR} --policy qllm --order reread"),  # 200
    Step(
        "worded",
        "books-worded",
        f"{_WORDED} --lengths 512,4k,16k --documents 8,512=16 --policy qllm,infllm --order last,reread",
    ),  # 250
    Step("64k-again", "books", f"{_EIGHT} --lengths 64k --documents 8 --policy qllm --order reread"),  # 120
    Step(
        "plain-window", "books-plain", f"{_PLAIN} --lengths 512 --documents 63 --policy full --order last,both"
    ),  # 130
    Step("plain-once", "books-plain", f"{_PLAIN} --lengths 4k,16k,64k --documents 6,16k=12,64k=8 {_EVERYONE}"),  # 450
    Step("256k-once", "books", f"{_EIGHT} --lengths 256k --documents 3 --policy qllm --order last,reread"),  # 190
    Step(
        "infllm-again",
        "books",
        f"{_EIGHT} --lengths 4k,16k,64k --documents 6,16k=25,64k=8 --policy infllm --order reread",
    ),  # 280
    Step("1M-once", "books", f"{_EIGHT} --lengths 1M --documents 1 --policy qllm --order last,reread"),  # 250
    Step("many", "books-100", f"{_MANY} --lengths 16k,64k --documents 2,64k=1 --order last,reread"),  # 290
    Step("rag", ".", "rag --lengths 4k,16k --documents 4"),  # 250
    Step("infinite", ".", "infinite --lengths 4k,16k --questions 4 --order last,reread"),  # 130
    Step("policies", ".", f"{_SWEEP},block_size,budget"),  # 590
    Step("plain-policies", "plain", f"{_SWEEP} --model reader-plain"),  # 300
    Step("16k-aware", "books", f"{_EIGHT} {_NEAR} --policy qllm --order both"),  # 460
    Step(
        "plain-aware", "books-plain", f"{_PLAIN} --lengths 4k,16k --documents 6 --policy qllm --order both,reread"
    ),  # 210
    Step("first", "books", f"{_EIGHT} --lengths 512,4k,16k --documents 6,16k=3 --policy qllm --order first"),  # 100
    Step("infllm-aware", "books", f"{_EIGHT} --lengths 4k,16k --documents 6 --policy infllm --order both"),  # 130
    Step("64k-aware", "books", f"{_EIGHT} --lengths 64k --documents 8 --policy qllm --order both"),  # 560
    Step(
        "256k-others", "books", f"{_EIGHT} --lengths 256k --documents 3 --policy oracle,infllm,streaming --order last"
    ),  # 300
    Step("16k-aware-again", "books", f"{_EIGHT} {_NEAR} --policy qllm --order both-reread"),  # 700
    Step("64k-aware-again", "books", f"{_EIGHT} --lengths 64k --documents 8 --policy qllm --order both-reread"),  # 600
    Step("many-256k", "books-100", f"{_MANY} --lengths 256k --documents 1 --order last,reread"),  # 350
    Step("256k-aware", "books", f"{_EIGHT} --lengths 256k --documents 3 --policy qllm --order both"),  # 820
    Step(
        "1M-others", "books", f"{_EIGHT} --lengths 1M --documents 1 --policy oracle,infllm,streaming --order last"
    ),  # 350
    Step(
        "256k-aware-again", "books", f"{_EIGHT} --lengths 256k --documents 3 --policy qllm --order both-reread"
    ),  # 830
    Step("1M-aware", "books", f"{_EIGHT} --lengths 1M --documents 1 --policy qllm --order both"),  # 1110
    Step("many-1M", "books-100", f"{_MANY} --lengths 1M --documents 1 --order last,reread"),  # 900
)


class Run:
    """The steps of one call.

    Args:
        text: Folder of books.
        work: Folder of the steps' journals.
        deadline: When running steps are interrupted, by `time.monotonic`.
    """

    def __init__(self, text: Path, work: Path, deadline: float) -> None:
        self._text, self._work, self._deadline = text, work, deadline
        self._writing = threading.Lock()

    def do(self, step: Step) -> str:
        """Run a step and put its table together; returns how it went."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            return "not begun"
        folder = self._work / step.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            *shlex.split(step.command),
            "--out",
            str(folder),
            *(("--text", str(self._text)) if step.reads_books else ()),
        ]
        began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "bench", *command], stdout=log, stderr=log, env=environment
            )
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                code = -1
        if (folder / f"{step.benchmark}.jsonl").exists():
            try:
                with self._writing:
                    collect(step.table, step.benchmark, self._work)
            except ValueError as error:
                return str(error)
        ended = {0: "done", -1: "interrupted"}.get(code, f"failed, see {folder / 'log.txt'}")
        return f"{ended} after {time.monotonic() - began:.0f} s"


def collect(table: str, benchmark: str, work: Path) -> None:
    """Put the rows of all steps of a table into `benchmarks/results`, and its Markdown into the document."""
    subject: object = None
    rows: dict[str, str] = {}
    runs: list[str] = []
    for step in STEPS:
        path = work / step.name / f"{benchmark}.jsonl"
        if (step.table, step.benchmark) != (table, benchmark) or not path.exists():
            continue
        for text in path.read_bytes().decode().splitlines(keepends=True):
            if not text.endswith("\n"):
                continue  # a row under way
            line = json.loads(text)
            if "subject" in line:
                if subject not in (None, line["subject"]):
                    raise ValueError(
                        f"{path} is of another subject than the other steps of {table}; give another --work."
                    )
                subject = line["subject"]
            elif "run" in line:
                runs.append(text)
            else:
                rows.setdefault(line["key"], text)
    if not isinstance(subject, dict) or not rows:
        return
    out = RESULTS / table
    out.mkdir(parents=True, exist_ok=True)
    journal = out / f"{benchmark}.jsonl"
    journal.write_text("".join([json.dumps({"subject": subject}) + "\n", *runs, *rows.values()]), encoding="utf-8")
    _REPORTS[benchmark](Journal(out, benchmark, subject))
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt books, held-out ones among them")
    parser.add_argument(
        "--work", type=Path, default=Path("bench-results/tables"), help="where the steps keep their journals"
    )
    parser.add_argument("--processes", type=int, default=2, help="steps at a time")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="when to stop, and make tables of what there is")
    parser.add_argument("--only", default="*", help="steps by name or pattern, with commas, e.g. '16k-*,rag'")
    parser.add_argument("--anew", action="store_true", help="remove what the steps chosen measured before")
    parser.add_argument("--list", action="store_true", help="show the steps")
    options = parser.parse_args()
    chosen = [step for step in STEPS if any(fnmatch(step.name, pattern) for pattern in options.only.split(","))]
    if options.list:
        for step in chosen:
            print(
                f"{step.name:15} {step.table:12} qllm bench {step.command}{' --text DIR' if step.reads_books else ''}"
            )
        return
    if options.anew:
        for step in chosen:
            shutil.rmtree(options.work / step.name, ignore_errors=True)
    began = time.monotonic()
    run = Run(options.text, options.work, began + 60 * options.minutes)
    with ThreadPoolExecutor(options.processes) as pool:
        for future in as_completed(waiting := {pool.submit(run.do, step): step for step in chosen}):
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:5.1f} min  {waiting[future].name}: {future.result()}", flush=True)


if __name__ == "__main__":
    main()
