"""The lab: is a change to training real? It starts `scripts.base_train`, reads each run's result.json, and decides.

| file | content |
| --- | --- |
| `cli.py` | the command line: flags, commands |
| `plan.py` | profiles, templates, variants; the flags of each cell (one variant, one seed), and the order of the cells |
| `claim.py`, `cells.py`, `processes.py` | a folder of cells, which several workers may share; the runs of base_train |
| `rows.py` | result.json -> a row of runs.csv |
| `stats.py`, `target.py` | Student's t, the worth of a step; time to target extrapolated across horizons |
| `decide.py` | the gates, the net gain, the verdict: pure functions over rows |
| `experiments.py` | compare, sweep, noise, miniseries: which cells are run, and what is decided |
| `outputs.py`, `report.py`, `charts.py` | table, verdict.json, and one self-contained HTML file with charts |
| `cycle.py` | the state of an optimization cycle: target, phases, plateau, rollback, change log |
| `resume_proof.py` | kill runs and resume them, and compare the bits (`scripts.prove_resume`) |

No module here imports torch or reads the output of a run. For users: docs/lab.md.
"""
