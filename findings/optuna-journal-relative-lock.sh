#!/usr/bin/env bash
# Optuna 5.0.0: if a process is killed while it holds the lock of a journal, and the path of the
# journal is relative and in a folder, every other process waits for the lock without an end.
#
# JournalFileSymlinkLock, the default of JournalFileBackend, is a link to the path as it was given.
# The path "runs/study.journal" makes the link runs/study.journal.lock lead to
# runs/runs/study.journal, which does not exist. The grace period, after which a lock is taken over,
# is measured by os.stat of the link: it raises OSError, and the loop begins again, without sleeping.
#
# Seen with a grace period of 3 s: with an absolute path the next process goes on after 3 s, with a
# relative path it still waits after 20 s. This script fails if that is no longer so.
#
# Usage: findings/optuna-journal-relative-lock.sh
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
"""Make a study in the journal of that path; with a second argument, die with the lock held."""
import os
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

optuna.logging.disable_default_handler()
path = sys.argv[1]
lock = JournalFileSymlinkLock(path, grace_period=3)
if len(sys.argv) > 2:
    lock.acquire()
    os.kill(os.getpid(), 9)
optuna.create_study(storage=JournalStorage(JournalFileBackend(path, lock_obj=lock)))
PYTHON
"$PY" -c 'import optuna; print("optuna", optuna.__version__)'
mkdir absolute relative
declare -A ended
for kind in absolute relative; do
    path=relative/study.journal
    [[ $kind == absolute ]] && path=$folder/absolute/study.journal
    "$PY" study.py "$path" || exit 1
    "$PY" study.py "$path" die 2>/dev/null || true
    ended[$kind]=0
    timeout 20 "$PY" study.py "$path" || ended[$kind]=$?
    echo "$kind path: exit status ${ended[$kind]} of the next process (124: still waiting after 20 s)"
done
[[ ${ended[absolute]} == 0 && ${ended[relative]} == 124 ]] || { echo "CHANGED"; exit 1; }
echo "as described: only the lock of an absolute path is taken over"
