#!/usr/bin/env bash
# Optuna 5.0.0: a journal whose last line was cut off (by a full disk or a power failure) can be
# read until the next write, and never again after it.
#
# JournalFileBackend passes over an unfinished last line when it reads, but appends the next record
# to it on the same line. From then on, opening the study ends in json.JSONDecodeError, although
# every record before the cut is intact.
#
# Seen: after the cut, a process still reads the 3 trials. A process that adds one fails, and from
# then on reading fails, too. This script fails if that is no longer so.
#
# Usage: findings/optuna-journal-unfinished-line.sh
# PY names a python that has optuna; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q optuna==5.0.0
    PY=$folder/venv/bin/python
fi
cd "$folder"
cat >study.py <<'PYTHON'
"""Print the number of trials in the study; with the argument `add`, after adding one."""
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.disable_default_handler()
try:
    storage = JournalStorage(JournalFileBackend("study.journal"))
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    if sys.argv[1:] == ["add"]:
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    print(len(study.trials))
except Exception as error:
    print(f"{type(error).__module__}.{type(error).__name__}")
PYTHON
"$PY" -c 'import optuna; print("optuna", optuna.__version__)'
for _ in 1 2 3; do "$PY" study.py add >/dev/null; done
truncate -s -20 study.journal # what a full disk leaves of the last record
before=$("$PY" study.py) adding=$("$PY" study.py add) after=$("$PY" study.py)
echo "read after the cut: $before; a trial added: $adding; read again: $after"
error=json.decoder.JSONDecodeError
[[ $before == 3 && $adding == "$error" && $after == "$error" ]] || { echo "CHANGED"; exit 1; }
echo "as described: the study cannot be read any more"
