"""The lab: is a change to training real? It starts `scripts.base_train`, reads each run's result.json, and decides.

| file | content |
| --- | --- |
| `cli.py` | the command line: flags, commands |
| `plan.py` | profiles, templates, variants; the flags of each cell (one variant, one seed), and the order of the cells |
| `workers.py` | starts several workers, one for each GPU or group of cores, or as jobs of a cluster |
| `claim.py`, `cells.py` | a folder of cells, which several workers may share, and the store of cells that experiments share |
| `training_run.py`, `processes.py` | the runs of base_train |
| `evaluation.py`, `evaluation_process.py` | the lab's own evaluation of final checkpoints; the process that does it |
| `timing.py` | times the steps of two sides that take turns |
| `clock.py` | what such jobs say: the time saved and its error; the card of the machine's clock noise |
| `rows.py` | result.json -> a row of runs.csv |
| `stats.py`, `target.py` | Student's t, repeated tests, slopes; time to target extrapolated across horizons |
| `gain.py`, `gates.py`, `decide.py` | pairs of runs and the net gain; the gates; the verdict: pure functions over rows |
| `experiments.py` | compare, sweep, noise, miniseries: which cells are run, and what is decided |
| `outputs.py`, `report.py`, `charts.py` | table, verdict.json, and one self-contained HTML file with charts |
| `cycle.py` | an optimization cycle: target, phases and their order, what counts, plateau, rollback, change log |
| `resume_proof.py` | kill runs and resume them, and compare the bits (`scripts.prove_resume`) |

No module here imports torch, but `evaluation_process.py`, a program of its own; none reads the output of a run. For users:
docs/lab.md.
"""
