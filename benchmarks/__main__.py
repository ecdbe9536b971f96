"""`python -m benchmarks`: CPU speed against stock attention, as JSON, a table and a picture."""

import typer

from benchmarks.speed_cpu import main

typer.run(main)
