"""The lab: is a change to training real? It starts `scripts.base_train`, reads each run's result.json, and decides.

| file | what |
| --- | --- |
| `plan.py` | profiles, templates, variants; which flags a cell (one variant, one seed) is run with, and in which order |
| `claim.py`, `cells.py` | a folder of cells: who runs which, what each left; several workers may share the folder |
| `rows.py` | result.json -> a row of runs.csv, the columns of the execution plan |
| `stats.py`, `target.py` | t intervals over pairs; what a step is worth; time to target across horizons |
| `decide.py` | the gates, the net gain, the verdict: pure functions over rows |
| `experiments.py` | compare, sweep, noise, gate, miniseries: what is run, what is decided, what is left |
| `report.py`, `charts.py` | one HTML file that fetches nothing, and its pictures |
| `cycle.py` | the book-keeping of a cycle: target, phases, plateau, rollback, change log |

Nothing here imports torch or reads what a run prints.
"""
