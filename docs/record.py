"""Run `qllm` and keep what it prints as a picture: `python docs/record.py docs/run.svg ask novel.txt "Who ...?"`."""

import subprocess
import sys

from rich.console import Console

picture, *arguments = sys.argv[1:]
printed = subprocess.run(["qllm", *arguments], capture_output=True, text=True, check=True).stdout
console = Console(record=True, width=110, quiet=False)
console.print("$ qllm " + " ".join(f'"{a}"' if " " in a else a for a in arguments), style="bold", highlight=False)
console.print(printed, highlight=False)
console.save_svg(picture, title="qllm")
